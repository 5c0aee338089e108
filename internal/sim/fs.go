// Package sim is a file system in memory that crashes, tears, forgets and fails
// as a seed says, for tests of what must survive that.
//
// # Fault model
//
// What File.Sync and FS.SyncDir made stable is always there after a crash. Of
// the rest any part may be: each write by itself, cut at sectors of 512 bytes, in
// any order; each change of a folder by itself, but a rename as a whole, and
// changes of one name in their order; a new folder with all that is in it. A
// Sync that fails loses a part of what it should have made stable, for good. A failed write may have been done in part.
// Stable content does not rot here; tests that want that change it themselves.
package sim

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"tidemark/internal/vfs"
)

// ErrCrashed is returned by every operation after the crash.
var ErrCrashed = errors.New("the machine has crashed")

const sector = 512

// FS is the file system. All methods may be called concurrently; where order
// matters to a test it calls them from one goroutine.
type FS struct {
	mu      sync.Mutex
	rng     *rand.Rand
	dirs    map[string]*dir
	locked  map[string]bool
	history []string
	ops     int // that change something, or make it stable
	failAt  int
	failFor int
	failErr error
	crashAt int
	crashed bool
}

type dir struct {
	now, stable map[string]*inode
	pending     []change
	fresh       bool // its own entry in the folder above is not stable
}

// change is one operation on a folder: each name set to its inode, or removed
// where that is nil.
type change map[string]*inode

type inode struct {
	now, stable []byte
	pending     []write
}

// write is one change of a file: data at off, or, where data is nil, the size.
type write struct {
	off  int64
	data []byte
}

var _ vfs.FS = (*FS)(nil)

// New gives an empty file system whose faults follow the seed.
func New(seed uint64) *FS {
	return &FS{rng: rand.New(rand.NewPCG(seed, 7)), dirs: map[string]*dir{"/": newDir()}, locked: map[string]bool{}}
}

func newDir() *dir { return &dir{now: map[string]*inode{}, stable: map[string]*inode{}} }

// Fail lets the n-th changing operation from now (1 is the next), and count-1
// after it, return err.
func (f *FS) Fail(n, count int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failAt, f.failFor, f.failErr = f.ops+n, count, err
}

// CrashAt lets the n-th changing operation from now (1 is the next) and all
// after it return ErrCrashed.
func (f *FS) CrashAt(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.crashAt = f.ops + n
}

// Crashed says whether the crash has come.
func (f *FS) Crashed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.crashed
}

// Ops is the number of changing operations so far.
func (f *FS) Ops() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ops
}

// History is one line for each changing operation so far.
func (f *FS) History() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.history, "\n")
}

// Crash ends this file system and gives what a machine finds that starts again.
func (f *FS) Crash() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.crashed = true
	after := &FS{rng: rand.New(rand.NewPCG(f.rng.Uint64(), 7)), dirs: map[string]*dir{}, locked: map[string]bool{}}
	after.history = append(slices.Clone(f.history), "--- crash")
	fresh := map[*inode]*inode{}
	for _, name := range sortedKeys(f.dirs) {
		if f.lost(name, after) {
			continue
		}
		d := newDir()
		for file, node := range f.surviving(f.dirs[name]) {
			if fresh[node] == nil {
				fresh[node] = &inode{}
			}
			d.now[file], d.stable[file] = fresh[node], fresh[node]
		}
		after.dirs[name] = d
	}
	for _, name := range sortedKeys(f.dirs) { // in an order of its own, for the seed's sake
		for _, node := range sortedNodes(f.dirs[name]) {
			if n := fresh[node]; n != nil && n.now == nil {
				n.now = f.torn(node)
				n.stable = slices.Clone(n.now)
			}
		}
	}
	return after
}

// lost says whether a crash takes a folder away, with what is in it. Those above come first.
func (f *FS) lost(name string, after *FS) bool {
	return after.dirs[path.Dir(name)] == nil && name != "/" || f.dirs[name].fresh && f.rng.IntN(2) == 0
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// sortedNodes are all inodes that the folder may have after a crash.
func sortedNodes(d *dir) (out []*inode) {
	all := append([]change{d.stable}, d.pending...)
	for _, c := range all {
		for _, name := range sortedKeys(c) {
			if c[name] != nil {
				out = append(out, c[name])
			}
		}
	}
	return out
}

// surviving is a folder as a crash leaves it.
func (f *FS) surviving(d *dir) map[string]*inode {
	out := map[string]*inode{}
	for k, v := range d.stable {
		out[k] = v
	}
	mode := f.rng.IntN(4) // 0: nothing, 1: everything, else any part
	held := map[string]bool{}
	for _, c := range d.pending {
		keep := mode == 1 || mode > 1 && f.rng.IntN(2) == 0
		for name := range c {
			keep = keep && !held[name]
		}
		for _, name := range sortedKeys(c) {
			node := c[name]
			if !keep {
				held[name] = f.rng.IntN(2) == 0 // later changes of the name may still be there
				continue
			}
			if node == nil {
				delete(out, name)
			} else {
				out[name] = node
			}
		}
	}
	return out
}

// torn is a file's content as a crash leaves it.
func (f *FS) torn(n *inode) []byte {
	out := slices.Clone(n.stable)
	if out == nil {
		out = []byte{}
	}
	mode := f.rng.IntN(4)
	order := f.rng.Perm(len(n.pending))
	if mode == 1 {
		slices.Sort(order)
	}
	for _, i := range order {
		if mode == 0 || mode == 3 && f.rng.IntN(2) == 0 {
			continue
		}
		w := n.pending[i]
		if mode == 1 || w.data == nil {
			out = apply(out, w)
			continue
		}
		for at := 0; at < len(w.data); at += sector {
			if f.rng.IntN(3) > 0 {
				out = apply(out, write{w.off + int64(at), w.data[at:min(at+sector, len(w.data))]})
			}
		}
	}
	return out
}

func apply(b []byte, w write) []byte {
	end := int(w.off) + len(w.data)
	if w.data == nil && end < len(b) {
		return b[:end]
	}
	if end > len(b) {
		b = append(b, make([]byte, end-len(b))...)
	}
	copy(b[w.off:], w.data)
	return b
}

// step counts an operation and says whether it fails. mu is held.
func (f *FS) step(format string, args ...any) error {
	if f.crashed {
		return ErrCrashed
	}
	f.ops++
	line := fmt.Sprintf(format, args...)
	if f.crashAt != 0 && f.ops >= f.crashAt {
		f.crashed = true
		f.history = append(f.history, line+" -> crash")
		return ErrCrashed
	}
	if f.failErr != nil && f.ops >= f.failAt && f.ops < f.failAt+f.failFor {
		f.history = append(f.history, line+" -> "+f.failErr.Error())
		return fmt.Errorf("%s: %w", line, f.failErr)
	}
	f.history = append(f.history, line)
	return nil
}

func (f *FS) find(name string) (*dir, string, *inode) {
	name = path.Clean(name)
	d := f.dirs[path.Dir(name)]
	if d == nil {
		return nil, "", nil
	}
	return d, path.Base(name), d.now[path.Base(name)]
}

func absent(op, name string) error { return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist} }

func (d *dir) change(c change) {
	for name, node := range c {
		if node == nil {
			delete(d.now, name)
		} else {
			d.now[name] = node
		}
	}
	d.pending = append(d.pending, c)
}

// OpenFile opens as os.OpenFile does.
func (f *FS) OpenFile(name string, flag int, _ fs.FileMode) (vfs.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.crashed {
		return nil, ErrCrashed
	}
	d, base, node := f.find(name)
	switch {
	case d == nil || node == nil && flag&os.O_CREATE == 0:
		return nil, absent("open", name)
	case node != nil && flag&(os.O_CREATE|os.O_EXCL) == os.O_CREATE|os.O_EXCL:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrExist}
	case node == nil:
		if err := f.step("create %s", name); err != nil {
			return nil, err
		}
		node = &inode{}
		d.change(change{base: node})
	case flag&os.O_TRUNC != 0:
		if err := f.step("truncate %s 0", name); err != nil {
			return nil, err
		}
		node.put(write{0, nil})
	}
	return &file{fs: f, node: node, name: name}, nil
}

func (n *inode) put(w write) {
	n.now = apply(n.now, w)
	n.pending = append(n.pending, w)
}

// ReadFile reads a whole file.
func (f *FS) ReadFile(name string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.crashed {
		return nil, ErrCrashed
	}
	_, _, node := f.find(name)
	if node == nil {
		return nil, absent("open", name)
	}
	return slices.Clone(node.now), nil
}

// Rename renames inside a folder.
func (f *FS) Rename(from, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, a, node := f.find(from)
	if node == nil && !f.crashed {
		return absent("rename", from)
	}
	if path.Dir(from) != path.Dir(to) {
		return errors.New("sim renames inside one folder only")
	}
	if err := f.step("rename %s %s", from, path.Base(to)); err != nil {
		return err
	}
	d.change(change{a: nil, path.Base(to): node})
	return nil
}

// Remove removes a file.
func (f *FS) Remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, base, node := f.find(name)
	if node == nil && !f.crashed {
		return absent("remove", name)
	}
	if err := f.step("remove %s", name); err != nil {
		return err
	}
	d.change(change{base: nil})
	return nil
}

// Link gives a file another name.
func (f *FS) Link(from, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, _, node := f.find(from)
	d, base, other := f.find(to)
	switch {
	case !f.crashed && (node == nil || d == nil):
		return absent("link", from)
	case !f.crashed && other != nil:
		return &fs.PathError{Op: "link", Path: to, Err: fs.ErrExist}
	}
	if err := f.step("link %s %s", from, to); err != nil {
		return err
	}
	d.change(change{base: node})
	return nil
}

// MkdirAll makes folders. SyncDir of the folder above makes each stable; it is
// no operation of its own: a crash at the next one is as good.
func (f *FS) MkdirAll(name string, _ fs.FileMode) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.crashed {
		return ErrCrashed
	}
	for name = path.Clean(name); f.dirs[name] == nil; name = path.Dir(name) {
		f.dirs[name] = newDir()
		f.dirs[name].fresh = true
	}
	return nil
}

// ReadDir lists what is in a folder.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.dirs[path.Clean(name)]
	switch {
	case f.crashed:
		return nil, ErrCrashed
	case d == nil:
		return nil, absent("readdir", name)
	}
	var out []fs.DirEntry
	for _, k := range sortedKeys(d.now) {
		out = append(out, fs.FileInfoToDirEntry(info{name: k, size: int64(len(d.now[k].now))}))
	}
	for _, k := range sortedKeys(f.dirs) {
		if k != "/" && path.Dir(k) == path.Clean(name) {
			out = append(out, fs.FileInfoToDirEntry(info{name: path.Base(k), dir: true}))
		}
	}
	slices.SortFunc(out, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return out, nil
}

// SyncDir makes a folder's entries stable.
func (f *FS) SyncDir(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.dirs[path.Clean(name)]
	if d == nil && !f.crashed {
		return absent("sync", name)
	}
	if err := f.step("syncdir %s", name); err != nil {
		return err
	}
	d.stable = map[string]*inode{}
	for k, v := range d.now {
		d.stable[k] = v
	}
	d.pending = nil
	for k, below := range f.dirs {
		if path.Dir(k) == path.Clean(name) {
			below.fresh = false
		}
	}
	return nil
}

// Stat tells of a file.
func (f *FS) Stat(name string) (fs.FileInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, base, node := f.find(name)
	switch {
	case f.crashed:
		return nil, ErrCrashed
	case f.dirs[path.Clean(name)] != nil:
		return info{name: path.Base(name), dir: true}, nil
	case node == nil:
		return nil, absent("stat", name)
	}
	return info{name: base, size: int64(len(node.now))}, nil
}

// Lock locks a name. The file itself is not part of the model.
func (f *FS) Lock(name string) (io.Closer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.crashed:
		return nil, ErrCrashed
	case f.locked[name]:
		return nil, fmt.Errorf("%s: %w", name, vfs.ErrLocked)
	}
	f.locked[name] = true
	return unlock{f, name}, nil
}

type unlock struct {
	fs   *FS
	name string
}

func (u unlock) Close() error {
	u.fs.mu.Lock()
	defer u.fs.mu.Unlock()
	delete(u.fs.locked, u.name)
	return nil
}

type info struct {
	name string
	size int64
	dir  bool
}

func (i info) Name() string { return i.name }
func (i info) Size() int64  { return i.size }
func (i info) IsDir() bool  { return i.dir }
func (i info) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | 0o700
	}
	return 0o600
}
func (info) ModTime() time.Time { return time.Time{} }
func (info) Sys() any           { return nil }
