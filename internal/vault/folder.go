package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"gocloud.dev/blob/driver"
	"gocloud.dev/gcerrors"
	"golang.org/x/sys/unix"

	"tidemark/internal/vfs"
)

// temporary ends the name of an object that is being written. Listings ignore
// it, and the next writer removes it.
const temporary = ".writing"

// errKey is returned for keys that are no safe paths.
var errKey = errors.New("not a key of this bucket")

// folder is a local directory as a bucket: gocloud's driver.Bucket. Keys are
// slash-separated paths below root. An object appears whole and stable, or not
// at all. root itself is never made by writing: an unmounted vault must not
// grow a second one under its mount point.
type folder struct {
	fs   vfs.FS
	root string

	mu     sync.Mutex
	synced map[string]bool // folders whose entry in their parent this process made stable
}

func newFolder(fsys vfs.FS, root string) *folder {
	return &folder{fs: fsys, root: root, synced: map[string]bool{}}
}

// path gives the file of a key.
func (b *folder) path(key string) (string, error) {
	if !fs.ValidPath(key) || key == "." || strings.ContainsRune(key, 0) || strings.HasSuffix(key, temporary) {
		return "", fmt.Errorf("%q: %w", key, errKey)
	}
	return filepath.Join(b.root, filepath.FromSlash(key)), nil
}

// makeDirs makes a folder below root, and its entry in each parent stable.
func (b *folder) makeDirs(dir string) error {
	if dir == b.root {
		return nil
	}
	b.mu.Lock()
	done := b.synced[dir]
	b.mu.Unlock()
	if done {
		return nil
	}
	parent := filepath.Dir(dir)
	if err := b.makeDirs(parent); err != nil {
		return err
	}
	if _, err := b.fs.Stat(parent); err != nil {
		return err
	}
	if err := b.fs.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// Also where it was there: who made it may have been killed before this.
	if err := b.fs.SyncDir(parent); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.synced[dir] = true
	return nil
}

// settle makes an object that is there stable: whoever put it may have been
// killed before it did.
func (b *folder) settle(key string) error {
	name, err := b.path(key)
	if err != nil {
		return err
	}
	if err := b.syncFile(name); err != nil {
		return err
	}
	if err := b.makeDirs(filepath.Dir(name)); err != nil {
		return err
	}
	return b.fs.SyncDir(filepath.Dir(name))
}

func (b *folder) syncFile(name string) error {
	f, err := b.fs.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// errNoLink says that the file system cannot link the file: copy it.
var errNoLink = errors.New("cannot be linked")

// link makes an object of a finished file on the same file system.
func (b *folder) link(from, key string) error {
	to, err := b.path(key)
	if err != nil {
		return err
	}
	if err := b.makeDirs(filepath.Dir(to)); err != nil {
		return err
	}
	if err := b.syncFile(from); err != nil {
		return err
	}
	switch err := b.fs.Link(from, to); {
	case errors.Is(err, fs.ErrExist):
		return err
	case err != nil && noLinks(err):
		return errors.Join(errNoLink, err)
	case err != nil:
		return err
	}
	return b.fs.SyncDir(filepath.Dir(to))
}

// noLinks says whether an error of link means that there it cannot be done.
func noLinks(err error) bool {
	for _, e := range []error{unix.EXDEV, unix.EPERM, unix.EACCES, unix.EMLINK, unix.EOPNOTSUPP, unix.ENOSYS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// sweep removes what killed writers left in the folder of a prefix.
func (b *folder) sweep(prefix string) error {
	dir := filepath.Join(b.root, filepath.FromSlash(prefix))
	entries, err := b.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), temporary) {
			err = errors.Join(err, b.fs.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// Attributes gives size and time of an object.
func (b *folder) Attributes(_ context.Context, key string) (*driver.Attributes, error) {
	name, err := b.path(key)
	if err != nil {
		return nil, err
	}
	st, err := b.fs.Stat(name)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
	}
	return &driver.Attributes{ContentType: contentType, ModTime: st.ModTime(), Size: st.Size()}, nil
}

const contentType = "application/octet-stream"

// ListPaged lists by key. Everything comes in one page where no size is asked for.
func (b *folder) ListPaged(ctx context.Context, o *driver.ListOptions) (*driver.ListPage, error) {
	if o.Delimiter != "" && o.Delimiter != "/" {
		return nil, fmt.Errorf("delimiter %q: %w", o.Delimiter, errKey)
	}
	dir := ""
	if i := strings.LastIndexByte(o.Prefix, '/'); i >= 0 {
		dir = o.Prefix[:i]
	}
	if dir != "" && !fs.ValidPath(dir) {
		return &driver.ListPage{}, nil
	}
	found, err := b.walk(ctx, dir, o)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(found, func(x, y listed) int { return strings.Compare(x.key, y.key) })
	page := &driver.ListPage{}
	for _, l := range found {
		if o.PageSize > 0 && len(page.Objects) == o.PageSize {
			page.NextPageToken = []byte(page.Objects[o.PageSize-1].Key)
			break
		}
		if l.key <= string(o.PageToken) && len(o.PageToken) > 0 {
			continue
		}
		obj := &driver.ListObject{Key: l.key, IsDir: l.entry == nil}
		if l.entry != nil {
			st, err := l.entry.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed meanwhile
			}
			if err != nil {
				return nil, err
			}
			obj.Size, obj.ModTime = st.Size(), st.ModTime()
		}
		page.Objects = append(page.Objects, obj)
	}
	return page, nil
}

type listed struct {
	key   string
	entry fs.DirEntry // nil for a folder
}

func (b *folder) walk(ctx context.Context, dir string, o *driver.ListOptions) (out []listed, err error) {
	entries, err := b.fs.ReadDir(filepath.Join(b.root, filepath.FromSlash(dir)))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err == nil {
		err = ctx.Err()
	}
	for _, e := range entries {
		key := path.Join(dir, e.Name())
		switch {
		case err != nil:
			return nil, err
		case e.IsDir() && !strings.HasPrefix(key+"/", o.Prefix) && !strings.HasPrefix(o.Prefix, key+"/"):
		case e.IsDir() && o.Delimiter == "/":
			out = append(out, listed{key: key + "/"})
		case e.IsDir():
			var below []listed
			below, err = b.walk(ctx, key, o)
			out = append(out, below...)
		case strings.HasPrefix(key, o.Prefix) && !strings.HasSuffix(key, temporary):
			out = append(out, listed{key, e})
		}
	}
	return out, err
}

// reader is a range of an open file.
type reader struct {
	*io.SectionReader
	file  vfs.File
	attrs driver.ReaderAttributes
}

func (r *reader) Close() error                         { return r.file.Close() }
func (r *reader) Attributes() *driver.ReaderAttributes { return &r.attrs }
func (r *reader) As(any) bool                          { return false }

// NewRangeReader opens a range of an object; a negative length is the rest.
func (b *folder) NewRangeReader(_ context.Context, key string, off, length int64, _ *driver.ReaderOptions) (driver.Reader, error) {
	f, size, err := b.open(key)
	if err != nil {
		return nil, err
	}
	off = min(off, size)
	if length < 0 || length > size-off {
		length = size - off
	}
	return &reader{io.NewSectionReader(f, off, length), f, driver.ReaderAttributes{ContentType: contentType, Size: size}}, nil
}

func (b *folder) open(key string) (vfs.File, int64, error) {
	name, err := b.path(key)
	if err != nil {
		return nil, 0, err
	}
	f, err := b.fs.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, 0, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, size, nil
}

// writers numbers the temporary files of this process.
var writers atomic.Uint64

// writer writes a temporary file; Close gives it its name.
type writer struct {
	vfs.File
	ctx     context.Context
	b       *folder
	tmp, to string
	fresh   bool // refuse where an object has the name
	err     error
}

// NewTypedWriter begins an object. It keeps no content type and no metadata.
func (b *folder) NewTypedWriter(ctx context.Context, key, _ string, o *driver.WriterOptions) (driver.Writer, error) {
	to, err := b.path(key)
	if err != nil {
		return nil, err
	}
	if err := b.makeDirs(filepath.Dir(to)); err != nil {
		return nil, err
	}
	tmp := fmt.Sprintf("%s.%d-%d%s", to, os.Getpid(), writers.Add(1), temporary)
	f, err := b.fs.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|vfs.Uncached, 0o600)
	if err != nil {
		return nil, err
	}
	return &writer{File: f, ctx: ctx, b: b, tmp: tmp, to: to, fresh: o != nil && o.IfNotExist}, nil
}

// Write notes an error, so that Close does not make an object of a part.
func (w *writer) Write(p []byte) (int, error) {
	n, err := w.File.Write(p)
	w.err = errors.Join(w.err, err)
	return n, err
}

// Close returns when the object is there and stable. A context that has ended
// takes everything back.
func (w *writer) Close() error {
	err := errors.Join(w.err, w.ctx.Err())
	if err == nil {
		err = w.Sync()
	}
	if err = errors.Join(err, w.File.Close()); err == nil {
		err = w.name()
	}
	if err != nil {
		_ = w.b.fs.Remove(w.tmp) // the next writer removes it otherwise
		return err
	}
	return w.b.fs.SyncDir(filepath.Dir(w.to))
}

func (w *writer) name() error {
	if !w.fresh {
		return w.b.fs.Rename(w.tmp, w.to)
	}
	err := w.b.fs.Link(w.tmp, w.to) // refuses to replace
	if err != nil && !errors.Is(err, fs.ErrExist) && noLinks(err) {
		if _, err = w.b.fs.Stat(w.to); err == nil {
			return &fs.PathError{Op: "create", Path: w.to, Err: fs.ErrExist}
		}
		return w.b.fs.Rename(w.tmp, w.to) // no links here: the group's lock keeps others away
	}
	if err != nil {
		return err
	}
	return w.b.fs.Remove(w.tmp)
}

// Copy writes an object's content under another key.
func (b *folder) Copy(ctx context.Context, to, from string, _ *driver.CopyOptions) error {
	f, size, err := b.open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	w, err := b.NewTypedWriter(ctx, to, "", nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, io.NewSectionReader(f, 0, size))
	w.(*writer).err = errors.Join(w.(*writer).err, err)
	return w.Close()
}

// Delete removes an object.
func (b *folder) Delete(_ context.Context, key string, _ *driver.DeleteOptions) error {
	name, err := b.path(key)
	if err != nil {
		return err
	}
	if err := b.fs.Remove(name); err != nil {
		return err
	}
	return b.fs.SyncDir(filepath.Dir(name))
}

// ErrorCode translates into gocloud's codes.
func (b *folder) ErrorCode(err error) gcerrors.ErrorCode {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return gcerrors.NotFound
	case errors.Is(err, fs.ErrExist):
		return gcerrors.FailedPrecondition
	case errors.Is(err, fs.ErrPermission):
		return gcerrors.PermissionDenied
	case errors.Is(err, errKey):
		return gcerrors.InvalidArgument
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return gcerrors.ResourceExhausted
	case errors.Is(err, errors.ErrUnsupported):
		return gcerrors.Unimplemented
	}
	return gcerrors.Unknown
}

// As gives the folder itself to those who ask for it.
func (b *folder) As(i any) bool {
	p, ok := i.(**folder)
	if ok {
		*p = b
	}
	return ok
}

// The rest of driver.Bucket: nothing more to tell, no URLs, nothing to close.
func (b *folder) ErrorAs(error, any) bool { return false }
func (b *folder) Close() error            { return nil }
func (b *folder) SignedURL(context.Context, string, *driver.SignedURLOptions) (string, error) {
	return "", errors.ErrUnsupported
}
