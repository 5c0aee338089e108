package vault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"tidemark/internal/segment"
	"tidemark/internal/vfs"
)

// Holder says who writes a group's history.
type Holder struct {
	Host     string    `json:"host"`
	PID      int       `json:"pid"`
	BootID   string    `json:"boot_id"` // of the holder's kernel; Lock fills it in
	Instance string    `json:"instance"`
	Since    time.Time `json:"since"`
}

// HeldError is returned by Lock where another writer has the group. The holder
// is zero where who it is could not be read; that there is one is certain.
type HeldError struct {
	Group  string
	Holder Holder
}

func (e *HeldError) Error() string {
	if e.Holder.PID == 0 && e.Holder.Host == "" {
		return fmt.Sprintf("group %s of this vault is written by another process: end that first", e.Group)
	}
	return fmt.Sprintf("group %s of this vault is written by process %d on %s (instance %s) since %s: end that first",
		e.Group, e.Holder.PID, e.Holder.Host, e.Holder.Instance, e.Holder.Since.Format(time.RFC3339))
}

// lockFile is the content of a lock.
type lockFile struct {
	Holder Holder `json:"holder"`
	CRC32C uint32 `json:"crc32c"` // of the holder's JSON
}

// lockSize is a lock's length in bytes, unless the holder's names are very long.
const lockSize = 512

func encodeHolder(h Holder) ([]byte, error) {
	text, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(struct {
		Holder json.RawMessage `json:"holder"`
		CRC32C uint32          `json:"crc32c"`
	}{text, checksum(text)})
	// A sector's length, so that a disk stores it as a whole.
	b = append(b, bytes.Repeat([]byte{' '}, max(0, lockSize-1-len(b)))...)
	return append(b, '\n'), err
}

// decodeHolder takes exactly what encodeHolder gives.
func decodeHolder(b []byte) (Holder, error) {
	var f lockFile
	if err := json.Unmarshal(b, &f); err != nil {
		return Holder{}, fmt.Errorf("%w: %w", segment.ErrDamaged, err)
	}
	if again, err := encodeHolder(f.Holder); err != nil || !bytes.Equal(again, b) {
		return Holder{}, segment.ErrDamaged
	}
	return f.Holder, nil
}

// Lock is the right to append to a group's history. The kernel takes it back
// when its process ends, however it ends. Its methods and Put may be called
// concurrently.
type Lock struct {
	group   string
	release func() error

	mu    sync.Mutex
	tail  *tail  // what the vault holds last; nil until the first Put
	noted newest // what the vault says it holds last; known when tail is
}

// lockPatience is how long Lock tries: Locks holds each lock for a moment.
const lockPatience = 200 * time.Millisecond

// Lock takes the right to write a group. *HeldError names who has it.
func (v *Vault) Lock(ctx context.Context, group string, h Holder) (*Lock, error) {
	if err := CheckName(group); err != nil {
		return nil, err
	}
	if err := v.here(ctx); err != nil {
		return nil, err
	}
	if h.BootID == "" {
		b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without it the holder is told by less
		h.BootID = strings.TrimSpace(string(b))
	}
	if v.local == nil {
		return v.lockInProcess(group, h)
	}
	name, err := v.local.lockPath(group)
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(name)
	if err := v.local.makeDirs(dir); err != nil {
		return nil, unreachable(err)
	}
	held, err := v.flock(ctx, name)
	if errors.Is(err, vfs.ErrLocked) {
		return nil, &HeldError{group, v.holder(name)}
	}
	if err != nil {
		return nil, unreachable(err)
	}
	if err := v.sign(name, h); err != nil {
		return nil, unreachable(errors.Join(err, held.Close()))
	}
	return &Lock{group: group, release: held.Close}, nil
}

func (b *folder) lockPath(group string) (string, error) { return b.path("groups/" + group + "/lock") }

func (v *Vault) flock(ctx context.Context, name string) (io.Closer, error) {
	until := time.Now().Add(lockPatience)
	for {
		held, err := v.fs.Lock(name)
		if !errors.Is(err, vfs.ErrLocked) || time.Now().After(until) {
			return held, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lockPatience / 20):
		}
	}
}

// sign writes the holder into the lock. Nothing hangs on it but the message that
// others get. It is emptied first, so that a crash leaves less than lockSize
// bytes, or zeroes, and never something that looks like damage.
func (v *Vault) sign(name string, h Holder) error {
	b, err := encodeHolder(h)
	if err != nil {
		return err
	}
	f, err := v.fs.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err = errors.Join(f.Truncate(0), f.Sync()); err == nil {
		_, err = f.WriteAt(b, 0)
		err = errors.Join(err, f.Sync())
	}
	return errors.Join(err, f.Close())
}

// holder is nobody where it cannot be read.
func (v *Vault) holder(name string) Holder {
	b, err := v.fs.ReadFile(name)
	if err != nil {
		return Holder{}
	}
	h, _ := decodeHolder(b) // whoever it is, there is one
	return h
}

// CheckLock returns an error that wraps segment.ErrDamaged where a group's lock
// says something else than was written. Nothing depends on it but the message
// that a second writer gets; the next writer writes it anew.
func (v *Vault) CheckLock(_ context.Context, group string) error {
	if v.local == nil {
		return nil
	}
	name, err := v.local.lockPath(group)
	if err != nil {
		return err
	}
	for try := 0; ; try++ {
		b, err := v.fs.ReadFile(name)
		switch {
		case notFound(err) || err == nil && unsigned(b):
			return nil
		case err != nil:
			return unreachable(err)
		}
		_, err = decodeHolder(b)
		if err == nil || try == 3 {
			return err
		}
		time.Sleep(lockPatience / 4) // it may be written just now
	}
}

// unsigned: never taken, or a crash came before the holder was written.
func unsigned(b []byte) bool {
	return len(b) < lockSize || len(bytes.Trim(b, "\x00")) == 0
}

func (v *Vault) lockInProcess(group string, h Holder) (*Lock, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if other, ok := v.held[group]; ok {
		return nil, &HeldError{group, other}
	}
	v.held[group] = h
	return &Lock{group: group, release: func() error {
		v.mu.Lock()
		defer v.mu.Unlock()
		delete(v.held, group)
		return nil
	}}, nil
}

// Unlock gives the right back; a second time it does nothing.
func (l *Lock) Unlock() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.release == nil {
		return nil
	}
	release := l.release
	l.release = nil
	return release()
}

// LockState is a group's lock as doctor shows it.
type LockState struct {
	Group  string
	Holder Holder // the last one to have taken it; zero where it cannot be read
	Held   bool   // false: the holder is gone, or has given it back
}

// Locks lists the locks of a vault, held or left over.
func (v *Vault) Locks(ctx context.Context) ([]LockState, error) {
	if v.local == nil {
		return nil, nil // they end with this process
	}
	groups, err := v.folders(ctx)
	if err != nil {
		return nil, err
	}
	var out []LockState
	for _, g := range groups {
		name, err := v.local.lockPath(g)
		if err != nil {
			return nil, err
		}
		if _, err := v.fs.Stat(name); notFound(err) {
			continue // asking would make it
		}
		s := LockState{Group: g, Holder: v.holder(name)}
		switch held, err := v.fs.Lock(name); {
		case errors.Is(err, vfs.ErrLocked):
			s.Held = true
		case err != nil:
			return nil, unreachable(err)
		default:
			if err := held.Close(); err != nil {
				return nil, unreachable(err)
			}
		}
		out = append(out, s)
	}
	return out, nil
}
