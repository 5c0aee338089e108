package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"tidemark/internal/segment"
)

// temporary ends the name of an object that is being written. Listings ignore
// it, and the next writer replaces it.
const temporary = ".writing"

// put writes a file whole and stable, or not at all.
func put(path string, fill func(*os.File) error) error {
	tmp := path + temporary
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(fill(f), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// makeDirs makes a folder and its parents stable.
func makeDirs(dir string) error {
	if st, err := os.Stat(dir); err == nil && st.IsDir() {
		return nil
	}
	if err := makeDirs(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// Put stores the sealed segment in the file at path and returns when it is
// stable. The same segment again is no error; another under its sequence, or
// one that does not follow the newest, is refused with ErrConflict. The lock
// must be held. Where vault and file are on one file system the object is a
// link to the file, which nobody changes.
func (v *Vault) Put(ctx context.Context, l *Lock, path string, sum segment.Summary) error {
	group := l.group
	if err := makeDirs(v.segments(group)); err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	newest, err := v.newest(ctx, l)
	if err != nil {
		return err
	}
	ref := refOf(sum)
	to := filepath.Join(v.segments(group), ref.Name)
	switch {
	case newest != nil && newest.Sequence >= sum.Sequence:
		return same(to, path)
	case newest != nil && newest.Sequence+1 != sum.Sequence, newest == nil && sum.Sequence != 1:
		return fmt.Errorf("group %s: segment %d does not follow: %w", group, sum.Sequence, ErrConflict)
	}
	if err := store(to, path); err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	l.newest = &ref
	return nil
}

// newest is the newest segment, remembered while the lock is held.
func (v *Vault) newest(ctx context.Context, l *Lock) (*Ref, error) {
	if l.newest != nil {
		return l.newest, nil
	}
	refs, err := v.Segments(ctx, l.group)
	if err != nil || len(refs) == 0 {
		return nil, err
	}
	l.newest = &refs[len(refs)-1]
	return l.newest, nil
}

func store(to, from string) error {
	if err := os.Link(from, to+temporary); err == nil || errors.Is(err, fs.ErrExist) {
		if err != nil { // of a writer that was killed
			if err := os.Remove(to + temporary); err != nil {
				return err
			}
			return store(to, from)
		}
		if err := os.Rename(to+temporary, to); err != nil {
			return err
		}
		return syncDir(filepath.Dir(to))
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	return put(to, func(f *os.File) error { _, err := io.Copy(f, src); return err })
}

// same says whether two files have the same content.
func same(to, from string) error {
	a, err := os.ReadFile(to)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is not there, and a later one is: %w", filepath.Base(to), ErrConflict)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if !bytes.Equal(a, b) {
		return fmt.Errorf("%s has other content: %w", filepath.Base(to), ErrConflict)
	}
	return nil
}
