package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gocloud.dev/blob"
	"golang.org/x/sys/unix"

	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

// Names are also what pins under bpffs can be called, which allows no dots.
var groupName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$`)

// CheckName returns an error wrapping ErrName where a group cannot be called so.
func CheckName(name string) error {
	if !groupName.MatchString(name) {
		return fmt.Errorf("%q: want 1 to 64 of letters, digits, - and _, not beginning with -: %w", name, ErrName)
	}
	return nil
}

// Ref names a segment in the vault. All but the size stands in the object's name.
type Ref struct {
	Sequence    uint64
	First, Last stream.Position
	Name        string // within the group's folder of segments
	Size        int64  // bytes, as listed
}

// RefOf is how a segment is, or will be, called in a vault.
func RefOf(s segment.Summary) Ref { return refOf(s) }

func refOf(s segment.Summary) Ref {
	return Ref{s.Sequence, s.First, s.Last, fmt.Sprintf("%016x-%016x-%016x.seg", s.Sequence, uint64(s.First), uint64(s.Last)), s.Size}
}

// parseRef reads an object's name. Only names that refOf gives are taken.
func parseRef(name string, size int64) (Ref, bool) {
	parts := strings.Split(strings.TrimSuffix(name, ".seg"), "-")
	if len(parts) != 3 || !strings.HasSuffix(name, ".seg") {
		return Ref{}, false
	}
	var n [3]uint64
	for i, p := range parts {
		var err error
		if n[i], err = strconv.ParseUint(p, 16, 64); err != nil || len(p) != 16 {
			return Ref{}, false
		}
	}
	r := refOf(segment.Summary{Sequence: n[0], First: stream.Position(n[1]), State: segment.State{Last: stream.Position(n[2])}, Size: size})
	return r, r.Name == name
}

func segmentsOf(group string) string { return "groups/" + group + "/segments/L00/" }

func (v *Vault) list(ctx context.Context, prefix, delimiter string) (out []*blob.ListObject, err error) {
	it := v.bucket.List(&blob.ListOptions{Prefix: prefix, Delimiter: delimiter})
	for {
		o, err := it.Next(ctx)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, unreachable(err)
		}
		out = append(out, o)
	}
}

// Segments lists a group's segments in order, from the names alone. A hole in
// their sequence is no error here: who reads them says what it spoils.
// ErrNoGroup: there is none, and none was ever stored.
func (v *Vault) Segments(ctx context.Context, group string) ([]Ref, error) {
	refs, _, err := v.Contents(ctx, group)
	return refs, err
}

// Contents is Segments that also names the objects among them that no segment
// is called like.
func (v *Vault) Contents(ctx context.Context, group string) (refs []Ref, strays []string, err error) {
	if err := CheckName(group); err != nil {
		return nil, nil, err
	}
	objects, err := v.list(ctx, segmentsOf(group), "/")
	if err != nil {
		return nil, nil, err
	}
	refs = make([]Ref, 0, len(objects))
	for _, o := range objects {
		name := strings.TrimPrefix(o.Key, segmentsOf(group))
		if r, ok := parseRef(name, o.Size); ok && !o.IsDir {
			refs = append(refs, r)
		} else {
			strays = append(strays, name)
		}
	}
	if len(objects) == 0 {
		if err := v.here(ctx); err != nil {
			return nil, nil, err
		}
		if stored, _, err := v.Newest(ctx, group); err != nil || stored > 0 { // they are all gone
			return nil, nil, err
		}
		return nil, nil, fmt.Errorf("group %q: %w", group, ErrNoGroup)
	}
	slices.SortFunc(refs, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	return refs, strays, nil
}

// Stray looks whether an object that Contents calls a stray is a segment of the
// group after all. segment.ErrDamaged: it is not, or not whole.
func (v *Vault) Stray(ctx context.Context, group, name string) (segment.Summary, error) {
	c, size, err := v.content(ctx, segmentsOf(group)+name)
	if notFound(err) || errors.Is(err, unix.EISDIR) || strings.HasSuffix(name, "/") {
		return segment.Summary{}, fmt.Errorf("%s: %w", name, segment.ErrDamaged)
	}
	if err != nil {
		return segment.Summary{}, unreachable(err)
	}
	defer c.Close()
	s, err := segment.Open(c, size)
	if err == nil && s.Header().Group != group {
		err = fmt.Errorf("%s: of group %q: %w", name, s.Header().Group, segment.ErrDamaged)
	}
	if err != nil {
		return segment.Summary{}, unreachable(err)
	}
	return s.Summary(), nil
}

// content reads an object at random.
type content interface {
	io.ReaderAt
	io.Closer
}

// ranged reads an object of a bucket by requests for ranges.
type ranged struct {
	ctx    context.Context
	bucket *blob.Bucket
	key    string
}

func (r ranged) ReadAt(p []byte, off int64) (int, error) {
	in, err := r.bucket.NewRangeReader(r.ctx, r.key, off, int64(len(p)), nil)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	n, err := io.ReadFull(in, p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}

func (ranged) Close() error { return nil }

func (v *Vault) content(ctx context.Context, key string) (content, int64, error) {
	if v.local != nil {
		return v.local.open(key)
	}
	a, err := v.bucket.Attributes(ctx, key)
	if err != nil {
		return nil, 0, err
	}
	return ranged{context.WithoutCancel(ctx), v.bucket, key}, a.Size, nil
}

// Object is an opened segment; Close it.
type Object struct {
	*segment.Segment
	Ref     Ref
	content content
}

// Close ends the reading.
func (o *Object) Close() error { return o.content.Close() }

// OpenSegment opens one. Errors wrap segment.ErrDamaged where its content is
// not what was written, not what its name says, or gone; ErrUnreachable where
// it cannot be read.
func (v *Vault) OpenSegment(ctx context.Context, group string, r Ref) (*Object, error) {
	s, c, err := v.openSegment(ctx, group, r)
	if err != nil {
		return nil, fmt.Errorf("group %s, object %s: %w", group, r.Name, unreachable(err))
	}
	return &Object{Segment: s, Ref: r, content: c}, nil
}

func (v *Vault) openSegment(ctx context.Context, group string, r Ref) (_ *segment.Segment, _ content, err error) {
	c, size, err := v.content(ctx, segmentsOf(group)+r.Name)
	if notFound(err) {
		if err := v.here(ctx); err != nil {
			return nil, nil, err
		}
		return nil, nil, fmt.Errorf("%w: it is not there any more", segment.ErrDamaged)
	}
	if err != nil {
		return nil, nil, err
	}
	s, err := segment.Open(c, size)
	if err == nil {
		if sum := s.Summary(); refOf(sum) != r || s.Header().Group != group {
			err = fmt.Errorf("%w: it is segment %d of group %q with positions %d to %d and %d bytes", segment.ErrDamaged,
				sum.Sequence, s.Header().Group, sum.First, sum.Last, sum.Size)
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return s, c, nil
}

// Payloads opens an object's bytes without looking at them: for who has its
// table of frames, which tells true bytes from others. segment.ErrDamaged: it
// is gone.
func (v *Vault) Payloads(ctx context.Context, group string, r Ref) (io.ReaderAt, io.Closer, error) {
	c, _, err := v.content(ctx, segmentsOf(group)+r.Name)
	if notFound(err) {
		if err = v.here(ctx); err == nil {
			err = fmt.Errorf("%w: it is not there any more", segment.ErrDamaged)
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("group %s, object %s: %w", group, r.Name, unreachable(err))
	}
	return c, c, nil
}
