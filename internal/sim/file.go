package sim

import (
	"errors"
	"io"
	"slices"
)

type file struct {
	fs   *FS
	node *inode
	name string
	at   int64
}

func (f *file) Read(b []byte) (int, error) {
	n, err := f.ReadAt(b, f.at)
	f.at += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}

func (f *file) ReadAt(b []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.crashed {
		return 0, ErrCrashed
	}
	if off >= int64(len(f.node.now)) {
		return 0, io.EOF
	}
	n := copy(b, f.node.now[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) Write(b []byte) (int, error) {
	n, err := f.WriteAt(b, f.at)
	f.at += int64(n)
	return n, err
}

// WriteAt that fails has written any front part; a crash leaves that to Crash.
func (f *file) WriteAt(b []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	err := f.fs.step("write %s %d+%d", f.name, off, len(b))
	n := len(b)
	if err != nil && len(b) > 0 {
		n = f.fs.rng.IntN(len(b))
	}
	if n > 0 {
		f.node.put(write{off, slices.Clone(b[:n])})
	}
	return n, err
}

// Sync that fails has lost a part of the writes: later Syncs do not bring them.
func (f *file) Sync() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	err := f.fs.step("sync %s", f.name)
	switch {
	case err == nil:
		for _, w := range f.node.pending {
			f.node.stable = apply(f.node.stable, write{w.off, slices.Clone(w.data)})
		}
		f.node.pending = nil
	case !errors.Is(err, ErrCrashed):
		f.node.stable = f.fs.torn(f.node)
		f.node.pending = nil
	}
	return err
}

func (f *file) Truncate(size int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.step("truncate %s %d", f.name, size); err != nil {
		return err
	}
	f.node.put(write{size, nil})
	return nil
}

func (f *file) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.crashed {
		return 0, ErrCrashed
	}
	return int64(len(f.node.now)), nil
}

func (f *file) Close() error { return nil }
