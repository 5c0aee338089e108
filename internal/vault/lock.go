package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Holder says who writes a group's history.
type Holder struct {
	Host     string    `json:"host"`
	PID      int       `json:"pid"`
	Instance string    `json:"instance"`
	Since    time.Time `json:"since"`
}

// HeldError is returned by Lock where another writer has the group.
type HeldError struct {
	Group  string
	Holder Holder
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("group %s of this vault is written by process %d on %s (instance %s) since %s",
		e.Group, e.Holder.PID, e.Holder.Host, e.Holder.Instance, e.Holder.Since.Format(time.RFC3339))
}

// Lock is the right to append to a group's history. The kernel takes it back
// when its process ends, however it ends.
type Lock struct {
	group  string
	file   *os.File
	newest *Ref
}

// Lock takes the right to write a group. *HeldError names who has it.
func (v *Vault) Lock(_ context.Context, group string, h Holder) (*Lock, error) {
	if err := CheckName(group); err != nil {
		return nil, err
	}
	dir := filepath.Join(v.dir, "groups", group)
	if err := makeDirs(dir); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		held := &HeldError{Group: group}
		_ = json.NewDecoder(f).Decode(&held.Holder) // who it is may be unreadable; that it is held is certain
		f.Close()
		return nil, held
	}
	b, err := json.Marshal(h)
	if err == nil {
		_, err = f.WriteAt(append(b, '\n'), 0)
	}
	if err := errors.Join(err, f.Truncate(int64(len(b)+1)), f.Sync()); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return &Lock{group: group, file: f}, nil
}

// Unlock gives the right back.
func (l *Lock) Unlock() error { return l.file.Close() }
