package vfs

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Uncached is a flag of OpenFile for a new file that is written once, from its
// beginning to its end, and not read soon: the page cache is left to others,
// and the processor copies less. Only Write, Sync and Close may be called on
// it, and nothing after Sync but Close. It is a wish: where the file system
// has no direct I/O the file is an ordinary one.
const Uncached = unix.O_DIRECT

const (
	directBuffer = 1 << 20
	directAlign  = 4096 // no disk has larger logical blocks
)

var directBuffers = sync.Pool{New: func() any {
	b := make([]byte, directBuffer+directAlign)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (directAlign - 1)
	b = b[skip : skip+directBuffer : skip+directBuffer]
	return &b
}}

// direct writes a file past the page cache in whole blocks; the last one is
// padded, and the padding cut off before the file is stable.
type direct struct {
	osFile
	buffer *[]byte
	used   int
	size   int64
}

// openDirect opens a file for direct I/O; ordinary says that it is to be opened as others are.
func openDirect(name string, flag int, perm fs.FileMode) (f File, ordinary bool, err error) {
	file, err := os.OpenFile(name, flag, perm)
	if errors.Is(err, unix.EINVAL) {
		return nil, true, nil
	}
	if err != nil {
		return nil, false, err
	}
	return &direct{osFile: osFile{file}, buffer: directBuffers.Get().(*[]byte)}, false, nil
}

func (d *direct) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		k := copy((*d.buffer)[d.used:], p)
		d.used, n, p = d.used+k, n+k, p[k:]
		if d.used == directBuffer {
			if err := d.flush(d.used); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// flush writes the first n bytes of the buffer, which are whole blocks.
func (d *direct) flush(n int) error {
	if _, err := d.osFile.Write((*d.buffer)[:n]); err != nil {
		return err
	}
	d.size += int64(d.used)
	d.used = 0
	return nil
}

// Sync writes what is left, gives the file its size and makes it stable.
func (d *direct) Sync() error {
	if d.used > 0 {
		padded := (d.used + directAlign - 1) &^ (directAlign - 1)
		clear((*d.buffer)[d.used:padded])
		if err := d.flush(padded); err != nil {
			return err
		}
		if err := d.Truncate(d.size); err != nil {
			return err
		}
	}
	return d.osFile.Sync()
}

func (d *direct) Close() error {
	if d.buffer != nil {
		directBuffers.Put(d.buffer)
		d.buffer = nil
	}
	return d.osFile.Close()
}

// Reading and writing at places are not for such a file.
func (d *direct) Read([]byte) (int, error)            { return 0, errUncached }
func (d *direct) ReadAt([]byte, int64) (int, error)   { return 0, errUncached }
func (d *direct) WriteAt([]byte, int64) (int, error)  { return 0, errUncached }
func (d *direct) ReadFrom(r io.Reader) (int64, error) { return io.Copy(struct{ io.Writer }{d}, r) }
func (d *direct) WriteString(string) (int, error)     { return 0, errUncached }
func (d *direct) WriteTo(io.Writer) (int64, error)    { return 0, errUncached }

var errUncached = errors.New("a file opened Uncached is only written, from its beginning to its end")
