// Package vfs is the seam between what keeps files durable and the file system:
// the few operations that a queue of files needs. OS is the real one; the tests'
// package sim has one that crashes, tears and fails.
package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// File is an open file. Reading and WriteAt may be done concurrently.
type File interface {
	io.Reader
	io.ReaderAt
	io.Writer
	io.WriterAt
	io.Closer
	Sync() error // returns when the content and the size are stable; a failed Sync may have lost any write since the last good one
	Truncate(size int64) error
	Size() (int64, error)
}

// FS is a file system. Names are as those of package os. Nothing but SyncDir
// makes a folder's entries stable, and nothing but File.Sync a file's content.
type FS interface {
	OpenFile(name string, flag int, perm fs.FileMode) (File, error)
	ReadFile(name string) ([]byte, error)
	Rename(from, to string) error
	Remove(name string) error
	Link(from, to string) error
	MkdirAll(name string, perm fs.FileMode) error
	ReadDir(name string) ([]fs.DirEntry, error) // by name
	SyncDir(name string) error
	Stat(name string) (fs.FileInfo, error)
	// Lock takes an exclusive lock on a file, which it makes where it is absent.
	// It ends with Close or with the process. ErrLocked: another has it.
	Lock(name string) (io.Closer, error)
}

// ErrLocked is returned by Lock where the file is locked by another.
var ErrLocked = errors.New("locked by another process")

// OS is the operating system's file system.
type OS struct{}

type osFile struct{ *os.File }

// Size is the file's length in bytes.
func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// OpenFile opens as os.OpenFile does, and knows Uncached.
func (OS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if flag&Uncached != 0 {
		f, ordinary, err := openDirect(name, flag, perm)
		if !ordinary {
			return f, err
		}
		flag &^= Uncached
	}
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// The others do what the functions of package os do.
func (OS) ReadFile(name string) ([]byte, error)         { return os.ReadFile(name) }
func (OS) Rename(from, to string) error                 { return os.Rename(from, to) }
func (OS) Remove(name string) error                     { return os.Remove(name) }
func (OS) Link(from, to string) error                   { return os.Link(from, to) }
func (OS) MkdirAll(name string, perm fs.FileMode) error { return os.MkdirAll(name, perm) }
func (OS) ReadDir(name string) ([]fs.DirEntry, error)   { return os.ReadDir(name) }
func (OS) Stat(name string) (fs.FileInfo, error)        { return os.Stat(name) }

// SyncDir makes the entries of a folder stable.
func (OS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Lock takes a flock.
func (OS) Lock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil
}

// WriteWhole makes a small file with this content durable, for its owner alone.
// Whatever happens in the middle, the file is as it was before or as it is to be.
func WriteWhole(fsys FS, name string, content []byte) error {
	unfinished := name + ".new"
	f, err := fsys.OpenFile(unfinished, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = fsys.Rename(unfinished, name)
	}
	if err != nil {
		return errors.Join(err, fsys.Remove(unfinished))
	}
	return fsys.SyncDir(filepath.Dir(name))
}
