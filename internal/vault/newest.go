package vault

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"tidemark/internal/stream"
)

// A listing shows that an object is missing between two others, but not that
// the last ones are. So the writer notes in the name of an empty file which
// segment it stored last: groups/GROUP/newest-SEQ-LAST. The name changes after
// the segment is stable and is not made stable itself: after a crash it tells
// of that segment or of an older one, never of one that is not there.
const newestPrefix = "newest-"

// newest is what such a name says; the zero value stands for no such file.
type newest struct {
	sequence uint64
	last     stream.Position
}

func (n newest) name() string {
	return fmt.Sprintf("%s%016x-%016x", newestPrefix, n.sequence, uint64(n.last))
}

func parseNewest(name string) (n newest, ok bool) {
	if _, err := fmt.Sscanf(name, newestPrefix+"%16x-%16x", &n.sequence, &n.last); err != nil {
		return newest{}, false
	}
	return n, n.name() == name
}

// Newest is the sequence and last position of the segment that a group's writer
// noted as stored last; 0 where nothing is noted. Ask before listing the
// segments: a list that ends earlier lacks what was stored.
func (v *Vault) Newest(_ context.Context, group string) (sequence uint64, last stream.Position, err error) {
	if v.local == nil {
		return 0, 0, nil
	}
	n, err := v.notes(group)
	if err != nil || len(n) == 0 {
		return 0, 0, err
	}
	return n[len(n)-1].sequence, n[len(n)-1].last, nil
}

// notes are a group's, in order: one, but where a file system renames in two steps.
func (v *Vault) notes(group string) (out []newest, err error) {
	entries, err := v.fs.ReadDir(v.groupDir(group)) // by name: in order of sequence
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, unreachable(err)
	}
	for _, e := range entries {
		if n, ok := parseNewest(e.Name()); ok {
			out = append(out, n)
		}
	}
	return out, nil
}

func (v *Vault) groupDir(group string) string {
	return filepath.Join(v.local.root, "groups", group)
}

// note says that a segment is stored, in place of what was said before.
func (v *Vault) note(l *Lock, now newest) error {
	if v.local == nil || l.noted == now {
		return nil
	}
	dir := v.groupDir(l.group)
	path := filepath.Join(dir, now.name())
	if l.noted != (newest{}) {
		if err := v.fs.Rename(filepath.Join(dir, l.noted.name()), path); err != nil {
			l.tail = nil // look what is there
			return unreachable(err)
		}
		l.noted = now
		return nil
	}
	f, err := v.fs.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return unreachable(err)
	}
	l.noted = now
	return unreachable(f.Close())
}

// findNoted learns what was noted, and leaves one note only.
func (v *Vault) findNoted(l *Lock) error {
	if v.local == nil {
		return nil
	}
	all, err := v.notes(l.group)
	if err != nil {
		return err
	}
	l.noted = newest{}
	for i, n := range all {
		if i == len(all)-1 {
			l.noted = n
		} else if err := v.fs.Remove(filepath.Join(v.groupDir(l.group), n.name())); err != nil {
			return unreachable(err)
		}
	}
	return nil
}
