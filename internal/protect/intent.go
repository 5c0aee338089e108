package protect

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"tidemark/internal/stream"
	"tidemark/internal/vfs"
)

// intent is a commit that is decided. Groups that have it leave the list.
type intent struct {
	Version int           `json:"version"`
	Name    string        `json:"name"`
	Groups  []intentGroup `json:"groups"`
}

type intentGroup struct {
	Group    string          `json:"group"`
	ID       [16]byte        `json:"id"`
	Position stream.Position `json:"position"`
}

const intentSuffix = ".commit"

func (l *Ledger) path(name string) string {
	sum := sha256.Sum256([]byte(name))
	return filepath.Join(l.dir, hex.EncodeToString(sum[:16])+intentSuffix)
}

func readIntent(path string) (*intent, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	sum, body, ok := bytes.Cut(b, []byte("\n"))
	var i intent
	if !ok || string(sum) != checksum(body) {
		return nil, fmt.Errorf("%s is damaged: its checksum does not fit", path)
	}
	if err := json.Unmarshal(body, &i); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	if i.Version != 1 {
		return nil, fmt.Errorf("%s has version %d: this build reads version 1", path, i.Version)
	}
	return &i, nil
}

// write makes an intent stable: from then on it is decided.
func (l *Ledger) write(i *intent) error {
	body, err := json.Marshal(i)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return err
	}
	if err := (vfs.OS{}).SyncDir(filepath.Dir(l.dir)); err != nil {
		return err
	}
	return vfs.WriteWhole(vfs.OS{}, l.path(i.Name), append([]byte(checksum(body)+"\n"), body...))
}

// verdicts decides on prepared marks that a session finds in its group's history,
// and takes note of what it does not find: that has its verdict already. What is
// revoked here cannot be committed later.
func (l *Ledger) verdicts(id [16]byte, undecided []pendingMark) []bool {
	out := make([]bool, len(undecided))
	if l == nil {
		return out
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, i := range l.intents {
		for _, g := range slices.Clone(i.Groups) {
			if g.ID != id {
				continue
			}
			if n := slices.IndexFunc(undecided, func(u pendingMark) bool { return u.position == g.Position }); n >= 0 {
				out[n] = true
			} else {
				l.leave(i, id, g.Position)
			}
		}
	}
	for n, u := range undecided {
		if p := l.pending[u.name]; p != nil && !out[n] {
			p.doomed = ErrGroupWentAway
		}
	}
	return out
}

// decides says whether a group may lack a verdict that is a commit.
func (l *Ledger) decides(id [16]byte) bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, i := range l.intents {
		if slices.ContainsFunc(i.Groups, func(g intentGroup) bool { return g.ID == id }) {
			return true
		}
	}
	return false
}

// durable notes that a group has the verdict on a mark in its spool.
func (l *Ledger) durable(id [16]byte, position stream.Position) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, i := range l.intents {
		l.leave(i, id, position)
	}
}

// forget takes a group out that is not protected any more.
func (l *Ledger) forget(id [16]byte) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, i := range l.intents {
		for _, g := range slices.Clone(i.Groups) {
			if g.ID == id {
				l.leave(i, id, g.Position)
			}
		}
	}
}

// leave takes a group off an intent; the last one removes it. A file that stays is
// no harm: the next daemon's groups find their verdicts and leave it again.
func (l *Ledger) leave(i *intent, id [16]byte, position stream.Position) {
	i.Groups = slices.DeleteFunc(i.Groups, func(g intentGroup) bool { return g.ID == id && g.Position == position })
	if len(i.Groups) == 0 {
		_ = os.Remove(l.path(i.Name))
		delete(l.intents, i.Name)
	}
}
