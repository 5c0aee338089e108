package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"tidemark/internal/control/involflt"
	"tidemark/internal/protect"
	"tidemark/internal/vfs"
)

// tagStore keeps what a client's tags say: the stream has only the names of the
// marks. A file for each mark, stable before the mark is made, which goes when the last
// of its disks has drained it.
type tagStore struct {
	dir string
	mu  sync.Mutex
}

type tagFile struct {
	Tags      [][]byte `json:"tags"`
	Consumers []string `json:"consumers"` // of its disks, that have not drained it
}

const (
	tagMark   = "involflt:" // begins the names of marks that are tags
	tagSuffix = ".json"
)

var tagMarkRule = regexp.MustCompile("^" + tagMark + "[^:]*:[0-9a-z]+$")

func isTagMark(name string) bool { return tagMarkRule.MatchString(name) }

func openTags(dir string) (*tagStore, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &tagStore{dir: dir}, vfs.OS{}.SyncDir(filepath.Dir(dir))
}

// path of a mark's file. Marks' names are made here: a number follows the last colon.
func (t *tagStore) path(mark string) string {
	return filepath.Join(t.dir, mark[strings.LastIndexByte(mark, ':')+1:]+tagSuffix)
}

func (t *tagStore) put(mark string, f tagFile) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return errors.Join(vfs.WriteWhole(vfs.OS{}, t.path(mark), b), vfs.OS{}.SyncDir(t.dir))
}

func (t *tagStore) get(path string) (f tagFile, err error) {
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	return f, err
}

// find gives what a mark says; nothing where it is not known any more.
func (t *tagStore) find(mark string) (tags [][]byte, consumers []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f, err := t.get(t.path(mark))
	if err != nil {
		return nil, nil
	}
	return f.Tags, f.Consumers
}

// drained notes that a disk has it for good. What cannot be noted is not needed any more.
func (t *tagStore) drained(mark, consumer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drop(t.path(mark), consumer)
}

// dropConsumer does so for all marks.
func (t *tagStore) dropConsumer(consumer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	all, err := filepath.Glob(filepath.Join(t.dir, "*"+tagSuffix))
	if err != nil {
		return
	}
	for _, path := range all {
		t.drop(path, consumer)
	}
}

func (t *tagStore) drop(path, consumer string) {
	f, err := t.get(path)
	if err != nil {
		return
	}
	f.Consumers = slices.DeleteFunc(f.Consumers, func(c string) bool { return c == consumer })
	if len(f.Consumers) == 0 {
		_ = os.Remove(path)
		return
	}
	if b, err := json.Marshal(f); err == nil {
		_ = vfs.WriteWhole(vfs.OS{}, path, b)
	}
}

func (t *tagStore) forget(mark string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := os.Remove(t.path(mark)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// tagMarked is a mark over the groups of its disks.
type tagMarked struct {
	b    *involfltSystem
	name string
}

// Mark puts a bookmark over the groups of the disks, at one instant. Its name
// has the client's in it, as far as that can be one.
func (b *involfltSystem) Mark(ctx context.Context, m involflt.Mark) (involflt.Marked, error) {
	name := tagMark + strings.Map(func(r rune) rune {
		if r > ' ' && r < 0x7f && r != ':' {
			return r
		}
		return -1
	}, m.GUID) + ":" + strconv.FormatInt(time.Now().UnixNano(), 36)
	var groups []*protect.Group
	var consumers []string
	for _, device := range m.Devices {
		q := b.byDevice(device)
		if q == nil {
			return nil, fmt.Errorf("%s: %w", device, involflt.ErrNoDevice)
		}
		consumers = append(consumers, q.consumer)
		if !slices.Contains(groups, q.m.group) {
			groups = append(groups, q.m.group)
		}
	}
	if err := b.tags.put(name, tagFile{Tags: m.Tags, Consumers: consumers}); err != nil {
		return nil, err
	}
	req := protect.MarkRequest{Name: name}
	b.mu.Lock()
	if b.held > 0 { // the writes are held already
		req.Barrier = protect.BarrierCut
	}
	b.mu.Unlock()
	put := b.s.env.Ledger.Bookmark
	if !m.Until.IsZero() {
		put, req.Within = b.s.env.Ledger.Prepare, max(time.Until(m.Until), protect.WithinMin)
	}
	if _, err := put(ctx, groups, req); err != nil {
		if errors.Is(err, protect.ErrInsideGap) {
			err = fmt.Errorf("%w: %w", involflt.ErrNoOrder, err)
		}
		return nil, errors.Join(err, b.tags.forget(name))
	}
	return &tagMarked{b, name}, nil
}

func (t *tagMarked) Commit(ctx context.Context) error {
	_, err := t.b.s.env.Ledger.Commit(context.WithoutCancel(ctx), t.name)
	return err
}

func (t *tagMarked) Revoke(ctx context.Context) error {
	err := t.b.s.env.Ledger.Revoke(context.WithoutCancel(ctx), t.name)
	if errors.Is(err, protect.ErrRevoked) {
		err = nil
	}
	return errors.Join(err, t.b.tags.forget(t.name))
}

func unique(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}
