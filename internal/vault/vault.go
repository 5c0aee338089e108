// Package vault keeps a group's segments at rest: objects in a bucket, each
// written once, whole and stable, under a name that says what it holds. A
// listing is enough to open a vault.
//
//	tidemark-vault                                    marker: this place is a vault
//	groups/GROUP/lock                                 who may write
//	groups/GROUP/segments/L00/SEQ-FIRST-LAST.seg      sixteen hexadecimal digits each
//
// docs/formats/vault.md describes it. All methods may be called concurrently.
package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

// Errors that callers branch on.
var (
	ErrNotVault    = errors.New("not a vault")
	ErrNoGroup     = errors.New("the vault holds no such group")
	ErrName        = errors.New("not a group's name")
	ErrConflict    = errors.New("the vault holds another history")
	ErrUnreachable = errors.New("the vault cannot be reached")
	ErrScheme      = errors.New("not a kind of vault that this build knows")
)

const markerName = "tidemark-vault"

// marker makes a place a vault.
type marker struct {
	Version int    `json:"version"`
	CRC32C  uint32 `json:"crc32c"` // of the text "tidemark-vault N", N the version
}

func markerOf(version int) marker {
	text := fmt.Appendf(nil, "tidemark-vault %d", version)
	return marker{version, crc32.Checksum(text, crc32.MakeTable(crc32.Castagnoli))}
}

// Vault is an opened vault.
type Vault struct {
	dir string
	url string
}

// dirOf gives the folder of a plain path or file:// URL.
func dirOf(where string) (string, error) {
	if !strings.Contains(where, "://") {
		return filepath.Abs(where)
	}
	u, err := url.Parse(where)
	if err != nil {
		return "", err
	}
	if u.Scheme != "file" || u.Host != "" || u.Path == "" {
		return "", fmt.Errorf("%q: want a folder or file:///FOLDER: %w", where, ErrScheme)
	}
	return filepath.Clean(u.Path), nil
}

// Open opens an existing vault. ErrNotVault: the place has no marker.
func Open(_ context.Context, where string) (*Vault, error) {
	dir, err := dirOf(where)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, markerName))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%s: %w", dir, ErrNotVault)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	var m marker
	if err := json.Unmarshal(b, &m); err != nil || m != markerOf(m.Version) {
		return nil, fmt.Errorf("%s: the marker %s: %w", dir, markerName, segment.ErrDamaged)
	}
	if m.Version != 1 {
		return nil, fmt.Errorf("%s is a vault of version %d: this build reads version 1", dir, m.Version)
	}
	return &Vault{dir: dir, url: where}, nil
}

// Create opens a vault, and makes one of an absent or empty folder first. It
// refuses any other place with ErrNotVault.
func Create(ctx context.Context, where string) (*Vault, error) {
	v, err := Open(ctx, where)
	if !errors.Is(err, ErrNotVault) {
		return v, err
	}
	dir, err := dirOf(where)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if n := e.Name(); n != "lost+found" && n != markerName+temporary {
			return nil, fmt.Errorf("%s holds %s and is %w: give an absent or empty folder", dir, n, ErrNotVault)
		}
	}
	b, err := json.Marshal(markerOf(1))
	if err != nil {
		return nil, err
	}
	if err := put(filepath.Join(dir, markerName), func(f *os.File) error { _, err := f.Write(b); return err }); err != nil {
		return nil, err
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return nil, err
	}
	return Open(ctx, where)
}

// Dir is the folder of a local vault.
func (v *Vault) Dir() string { return v.dir }

var groupName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$`)

// CheckName returns an error wrapping ErrName where a group cannot be called so.
func CheckName(name string) error {
	if !groupName.MatchString(name) {
		return fmt.Errorf("%q: want 1 to 64 of letters, digits, - and _, not beginning with -: %w", name, ErrName)
	}
	return nil
}

// Groups lists the groups that the vault holds segments of.
func (v *Vault) Groups(context.Context) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(v.dir, "groups"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() && CheckName(e.Name()) == nil {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// Ref names a segment in the vault; all of it stands in the object's name.
type Ref struct {
	Sequence    uint64
	First, Last stream.Position
	Name        string // within the group's folder of segments
}

func refOf(s segment.Summary) Ref {
	return Ref{s.Sequence, s.First, s.Last, fmt.Sprintf("%016x-%016x-%016x.seg", s.Sequence, uint64(s.First), uint64(s.Last))}
}

func (v *Vault) segments(group string) string {
	return filepath.Join(v.dir, "groups", group, "segments", "L00")
}

// Segments lists a group's segments in order. A hole in their sequence is no
// error here: who reads them says what it spoils.
func (v *Vault) Segments(_ context.Context, group string) ([]Ref, error) {
	if err := CheckName(group); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(v.segments(group))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("group %q: %w", group, ErrNoGroup)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	var out []Ref
	for _, e := range entries {
		var seq, first, last uint64
		if n, _ := fmt.Sscanf(e.Name(), "%16x-%16x-%16x.seg", &seq, &first, &last); n != 3 || len(e.Name()) != 54 {
			continue
		}
		out = append(out, Ref{seq, stream.Position(first), stream.Position(last), e.Name()})
	}
	slices.SortFunc(out, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Object is an opened segment; Close it.
type Object struct {
	*segment.Segment
	Ref  Ref
	Path string
	file *os.File
}

// Close ends the reading.
func (o *Object) Close() error { return o.file.Close() }

// OpenSegment opens one. Errors wrap segment.ErrDamaged where its content is
// not what was written, or not what its name says.
func (v *Vault) OpenSegment(_ context.Context, group string, r Ref) (*Object, error) {
	path := filepath.Join(v.segments(group), r.Name)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	s, err := segment.Open(f, st.Size())
	if err == nil {
		if sum := s.Summary(); refOf(sum) != r || s.Header().Group != group {
			err = fmt.Errorf("%w: it is segment %d of group %q", segment.ErrDamaged, sum.Sequence, s.Header().Group)
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("group %s, object %s: %w", group, r.Name, err)
	}
	return &Object{Segment: s, Ref: r, Path: path, file: f}, nil
}
