package vault

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"

	"tidemark/internal/segment"
	"tidemark/internal/vfs"
)

// tail is what the next segment must follow.
type tail struct {
	sum     segment.Summary
	groupID [16]byte
}

// ErrUnlocked is returned by Put where the lock was given back.
var ErrUnlocked = errors.New("the group's lock is not held any more")

// Put stores the sealed segment in the file at path and returns when it is
// stable. The same segment again is no error; another under its sequence, or
// one that does not follow the newest, is refused with ErrConflict. Where vault
// and file are on one file system the object is a link to the file, which
// nobody may change. ErrUnreachable: try again. After an error the object is
// there whole or not at all.
func (v *Vault) Put(ctx context.Context, l *Lock, path string, sum segment.Summary) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.release == nil {
		return ErrUnlocked
	}
	if err := v.here(ctx); err != nil {
		return err
	}
	if l.tail == nil {
		t, err := v.findTail(ctx, l.group)
		if err == nil {
			err = v.findNoted(l)
		}
		if err != nil {
			return err
		}
		l.tail = t
	}
	src, err := v.fs.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	next, err := check(src, l.group, sum)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if sum.Sequence <= l.tail.sum.Sequence {
		if err := v.same(ctx, l.group, src, sum); err != nil || sum.Sequence < l.tail.sum.Sequence {
			return err
		}
		return v.note(l, newest{sum.Sequence, sum.Last})
	}
	if err := l.tail.follows(next); err != nil {
		return fmt.Errorf("group %s: %w", l.group, err)
	}
	if err := v.store(ctx, segmentsOf(l.group)+refOf(sum).Name, path, src, sum.Size); err != nil {
		l.tail = nil // it may be there nevertheless
		return unreachable(err)
	}
	l.tail = &tail{sum, next.GroupID}
	return v.note(l, newest{sum.Sequence, sum.Last})
}

// check opens the segment that is to be put.
func check(src vfs.File, group string, sum segment.Summary) (segment.Header, error) {
	size, err := src.Size()
	if err != nil {
		return segment.Header{}, err
	}
	s, err := segment.Open(src, size)
	if err != nil {
		return segment.Header{}, err
	}
	if s.Summary() != sum || s.Header().Group != group {
		return segment.Header{}, fmt.Errorf("it is segment %d of group %q, not %d of %q: %w", s.Summary().Sequence, s.Header().Group, sum.Sequence, group, ErrConflict)
	}
	return s.Header(), nil
}

// follows holds the chain: sequence, digest, group.
func (t *tail) follows(h segment.Header) error {
	switch {
	case h.Sequence != t.sum.Sequence+1:
		return fmt.Errorf("segment %d does not follow the newest, %d: %w", h.Sequence, t.sum.Sequence, ErrConflict)
	case h.Previous != t.sum.Digest:
		return fmt.Errorf("segment %d follows another segment %d than the vault's: %w", h.Sequence, t.sum.Sequence, ErrConflict)
	case t.sum.Sequence != 0 && h.GroupID != t.groupID:
		return fmt.Errorf("segment %d is of another group with the same name: %w", h.Sequence, ErrConflict)
	}
	return nil
}

// findTail removes what killed writers left and reads the newest segment.
func (v *Vault) findTail(ctx context.Context, group string) (*tail, error) {
	if v.local != nil {
		if err := errors.Join(v.local.sweep(""), v.local.sweep(segmentsOf(group))); err != nil {
			return nil, unreachable(err)
		}
	}
	refs, err := v.Segments(ctx, group)
	if errors.Is(err, ErrNoGroup) || err == nil && len(refs) == 0 {
		return &tail{}, nil
	}
	if err != nil {
		return nil, err
	}
	o, err := v.OpenSegment(ctx, group, refs[len(refs)-1])
	if err != nil {
		return nil, err
	}
	t := &tail{o.Summary(), o.Header().GroupID}
	return t, o.Close()
}

// store links the file, or copies it where that cannot be.
func (v *Vault) store(ctx context.Context, key, path string, src io.ReaderAt, size int64) error {
	if v.local != nil {
		if err := v.local.link(path, key); !errors.Is(err, errNoLink) {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // before Close it takes a part back
	w, err := v.bucket.NewWriter(ctx, key, &blob.WriterOptions{ContentType: contentType, IfNotExist: true})
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, io.NewSectionReader(src, 0, size)); err != nil {
		cancel()
		return errors.Join(err, w.Close())
	}
	return w.Close()
}

// same returns nil where the vault holds exactly this segment, and it is stable.
func (v *Vault) same(ctx context.Context, group string, src io.ReaderAt, sum segment.Summary) error {
	name := refOf(sum).Name
	key := segmentsOf(group) + name
	have, size, err := v.content(ctx, key)
	if notFound(err) {
		return fmt.Errorf("group %s: %s is not there, and a later segment is: %w", group, name, ErrConflict)
	}
	if err != nil {
		return unreachable(err)
	}
	defer have.Close()
	equal, err := equalContent(io.NewSectionReader(have, 0, size), io.NewSectionReader(src, 0, sum.Size))
	switch {
	case err != nil:
		return unreachable(err)
	case !equal:
		return fmt.Errorf("group %s: %s has other content: %w", group, name, ErrConflict)
	case v.local != nil:
		return unreachable(v.local.settle(key))
	}
	return nil
}

func equalContent(a, b *io.SectionReader) (bool, error) {
	if a.Size() != b.Size() {
		return false, nil
	}
	const size = 128 << 10
	x, y := bufio.NewReaderSize(a, size), bufio.NewReaderSize(b, size)
	for {
		p, errA := x.Peek(size)
		q, errB := y.Peek(size)
		if !bytes.Equal(p, q) {
			return false, nil
		}
		if errA != nil || errB != nil {
			if errors.Is(errA, io.EOF) && errors.Is(errB, io.EOF) {
				return true, nil
			}
			return false, errors.Join(errA, errB)
		}
		x.Discard(len(p))
		y.Discard(len(q))
	}
}

// exists tells the error of a writer that was to make a new object.
func exists(err error) bool {
	return errors.Is(err, fs.ErrExist) || gcerrors.Code(err) == gcerrors.FailedPrecondition
}
