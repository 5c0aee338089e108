// Package vault keeps a group's segments at rest: objects in a bucket, each
// written once, whole and stable, under a name that says what it holds. A
// listing is enough to open a vault.
//
//	tidemark-vault                                    marker: this place is a vault
//	groups/GROUP/lock                                 who may write (local folders)
//	groups/GROUP/newest-SEQ-LAST                      what was stored last (local folders); empty
//	groups/GROUP/segments/L00/SEQ-FIRST-LAST.seg      sixteen hexadecimal digits each
//
// The bucket is gocloud's: a local folder through a driver of our own, anything
// else that gocloud knows through OpenBucket. docs/formats/vault.md describes
// it. All methods may be called concurrently.
package vault

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
	"golang.org/x/sys/unix"

	"tidemark/internal/segment"
	"tidemark/internal/vfs"
)

// Errors that callers branch on.
var (
	ErrNotVault    = errors.New("not a vault")
	ErrNoGroup     = errors.New("the vault holds no such group")
	ErrName        = errors.New("not a group's name")
	ErrConflict    = errors.New("the vault holds another history")
	ErrUnreachable = errors.New("the vault cannot be reached") // waiting may mend it
	ErrScheme      = errors.New("not a kind of vault that this build knows")
)

// Vault is an opened vault.
type Vault struct {
	bucket *blob.Bucket
	local  *folder // nil where the bucket is no local folder
	fs     vfs.FS  // where segments to be put lie
	where  string
	marker marker

	mu   sync.Mutex
	held map[string]Holder // locks of buckets that have none of their own
}

// Folder gives the absolute folder of what people name a vault by: a plain path
// or a file:// URL. ErrScheme: it is neither.
func Folder(where string) (string, error) {
	if where == "" {
		return "", fmt.Errorf("no vault is named: want a folder or file:///FOLDER: %w", ErrScheme)
	}
	if !strings.Contains(where, "://") {
		return filepath.Abs(where)
	}
	u, err := url.Parse(where)
	if err != nil {
		return "", fmt.Errorf("%q: %w: %w", where, ErrScheme, err)
	}
	if u.Scheme != "file" || u.Host != "" || u.Path == "" || u.RawQuery != "" {
		return "", fmt.Errorf("%q: want a folder or file:///FOLDER: %w", where, ErrScheme)
	}
	return filepath.Clean(u.Path), nil
}

// Open opens an existing vault: a plain path or file:///path. ErrNotVault: the
// place has no marker. segment.ErrDamaged: its marker is not what was written.
func Open(ctx context.Context, where string) (*Vault, error) {
	dir, err := Folder(where)
	if err != nil {
		return nil, err
	}
	return openFolder(ctx, vfs.OS{}, dir)
}

func openFolder(ctx context.Context, fsys vfs.FS, dir string) (*Vault, error) {
	local := newFolder(fsys, dir)
	return open(ctx, &Vault{bucket: blob.NewBucket(local), local: local, fs: fsys, where: dir})
}

// OpenBucket opens a vault in any bucket; name is what errors call it. Its
// locks hold in this process only.
func OpenBucket(ctx context.Context, b *blob.Bucket, name string) (*Vault, error) {
	return open(ctx, &Vault{bucket: b, fs: vfs.OS{}, where: name, held: map[string]Holder{}})
}

func open(ctx context.Context, v *Vault) (*Vault, error) {
	m, err := v.readMarker(ctx)
	v.marker = m
	if err != nil {
		return nil, err
	}
	return v, nil
}

// Create opens a vault, and makes one of an absent or empty folder first. It
// refuses any other place with ErrNotVault, and says what is there.
func Create(ctx context.Context, where string) (*Vault, error) {
	dir, err := Folder(where)
	if err != nil {
		return nil, err
	}
	return createFolder(ctx, vfs.OS{}, dir)
}

func createFolder(ctx context.Context, fsys vfs.FS, dir string) (*Vault, error) {
	v, err := openFolder(ctx, fsys, dir)
	if !errors.Is(err, ErrNotVault) {
		return v.settled(err)
	}
	var made []string
	if err := makeRoot(fsys, dir, &made); err != nil {
		return nil, errors.Join(unreachable(err), unmake(fsys, made))
	}
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return nil, unreachable(err)
	}
	for _, e := range entries {
		if n := e.Name(); n != "lost+found" && n != markerName && !isTemporaryMarker(n) {
			return nil, occupied(dir, n)
		}
	}
	failed := writeMarker(ctx, blob.NewBucket(newFolder(fsys, dir)))
	v, err = openFolder(ctx, fsys, dir) // another process may have made it
	if failed != nil && err != nil {
		return nil, errors.Join(failed, unmake(fsys, made))
	}
	return v.settled(err)
}

// unmake removes the folders that were made for a vault that did not come to
// be, but for those in which somebody has put something meanwhile.
func unmake(fsys vfs.FS, made []string) error {
	for i := len(made) - 1; i >= 0; i-- {
		if err := fsys.Remove(made[i]); errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

// settled makes the marker stable: whoever wrote it may have been killed before it was.
func (v *Vault) settled(err error) (*Vault, error) {
	if err == nil {
		err = unreachable(v.local.settle(markerName))
	}
	if err != nil {
		return nil, err
	}
	return v, nil
}

// CreateBucket opens a vault in any bucket, and makes one of an empty one first.
func CreateBucket(ctx context.Context, b *blob.Bucket, name string) (*Vault, error) {
	v, err := OpenBucket(ctx, b, name)
	if !errors.Is(err, ErrNotVault) {
		return v, err
	}
	page, _, err := b.ListPage(ctx, blob.FirstPageToken, 1, nil)
	if err != nil {
		return nil, unreachable(err)
	}
	if len(page) > 0 {
		return nil, occupied(name, page[0].Key)
	}
	if err := writeMarker(ctx, b); err != nil {
		return nil, err
	}
	return OpenBucket(ctx, b, name)
}

func occupied(where, what string) error {
	return fmt.Errorf("%s holds %s and is %w: give an absent or empty folder", where, what, ErrNotVault)
}

// makeRoot makes the vault's folder and its parents, stable, and says which it made.
func makeRoot(fsys vfs.FS, dir string, made *[]string) error {
	switch st, err := fsys.Stat(dir); {
	case err == nil && !st.IsDir():
		return fmt.Errorf("%s is a file and %w: give a folder", dir, ErrNotVault)
	case err == nil:
	case !errors.Is(err, fs.ErrNotExist):
		return err
	default:
		if err := makeRoot(fsys, filepath.Dir(dir), made); err != nil {
			return err
		}
		if err := fsys.MkdirAll(dir, 0o700); errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s is a link that leads nowhere and %w: give a folder", dir, ErrNotVault)
		} else if err != nil {
			return err
		}
		*made = append(*made, dir)
	}
	if filepath.Dir(dir) == dir {
		return nil
	}
	if err := fsys.SyncDir(filepath.Dir(dir)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil
}

// unreachable marks an error as one that waiting may mend. Those that say
// something else already are left as they are.
func unreachable(err error) error {
	for _, known := range []error{nil, ErrUnreachable, ErrNotVault, ErrConflict, segment.ErrDamaged, segment.ErrVersion, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, known) {
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

func notFound(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || gcerrors.Code(err) == gcerrors.NotFound
}

// here returns ErrUnreachable where the place is not, or no longer, this vault:
// unmounted, moved away, or another one mounted over it.
func (v *Vault) here(ctx context.Context) error {
	m, err := v.readMarker(ctx)
	switch {
	case errors.Is(err, ErrNotVault):
		return fmt.Errorf("%w: %s has lost its marker: is its file system mounted?", ErrUnreachable, v.where)
	case err != nil:
		return unreachable(err)
	case m != v.marker:
		return fmt.Errorf("%w: at %s there is another vault now", ErrUnreachable, v.where)
	}
	return nil
}

// Dir is the folder of a local vault, and the name of any other.
func (v *Vault) Dir() string { return v.where }

// ID identifies the vault wherever it is moved: 32 hexadecimal digits.
func (v *Vault) ID() string { return v.marker.ID }

// Groups lists the groups that the vault holds segments of, or should, by name.
func (v *Vault) Groups(ctx context.Context) ([]string, error) {
	names, err := v.folders(ctx)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, name := range names {
		page, _, err := v.bucket.ListPage(ctx, blob.FirstPageToken, 1, &blob.ListOptions{Prefix: segmentsOf(name)})
		if err != nil {
			return nil, unreachable(err)
		}
		stored, _, err := v.Newest(ctx, name)
		if err != nil {
			return nil, err
		}
		if len(page) > 0 || stored > 0 {
			out = append(out, name)
		}
	}
	return out, nil
}

// folders lists the groups that have anything in the vault, also only a lock.
func (v *Vault) folders(ctx context.Context) ([]string, error) {
	if err := v.here(ctx); err != nil {
		return nil, err
	}
	objects, err := v.list(ctx, "groups/", "/")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, o := range objects {
		name := strings.TrimSuffix(strings.TrimPrefix(o.Key, "groups/"), "/")
		if o.IsDir && CheckName(name) == nil {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out, nil
}
