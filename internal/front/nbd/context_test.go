package nbd

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/block"
	"tidemark/internal/sim"
	"tidemark/internal/testkit"
)

// marked is a change map over a list of what has changed, in order.
type marked []block.Range

func (m marked) Run(r block.Range) (int64, bool, error) {
	for _, c := range m {
		switch {
		case c.End() <= r.Off:
		case c.Off <= r.Off:
			return min(c.End(), r.End()) - r.Off, true, nil
		case c.Off < r.End():
			return c.Off - r.Off, false, nil
		}
	}
	return r.Len, false, nil
}

type broken struct{}

func (broken) Run(block.Range) (int64, bool, error) { return 0, true, nil }

func bitmaps(all ...Bitmap) func() []Bitmap { return func() []Bitmap { return all } }

// TestContextQueries: who asks what contexts there are gets those that the protocol says.
func TestContextQueries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serveAt(t, "nbd+unix:///x?socket="+path, server(t, Export{Name: "x", Device: newMemory(4096), Bitmaps: bitmaps(Bitmap{"one", marked{}}, Bitmap{"two", marked{}})}))
	c := greet(t, &net.UnixAddr{Name: path, Net: "unix"})
	c.option(nbd.OptStructured, "")
	const all = "base:allocation qemu:dirty-bitmap:one qemu:dirty-bitmap:two"
	const both = "qemu:dirty-bitmap:one qemu:dirty-bitmap:two"
	for _, q := range []struct {
		opt     uint32
		queries []string
		want    string
	}{
		{nbd.OptListMeta, nil, all},
		{nbd.OptListMeta, []string{"base:"}, "base:allocation"},
		{nbd.OptListMeta, []string{"qemu:"}, both},
		{nbd.OptListMeta, []string{"qemu:dirty-bitmap:"}, both},
		{nbd.OptListMeta, []string{"qemu:dirty-bitmap:two", "base:allocation", "qemu:dirty-bitmap:two"}, "base:allocation qemu:dirty-bitmap:two"},
		{nbd.OptListMeta, []string{"qemu:allocation-depth", "x:", "", "qemu", "base:allocation:"}, ""},
		{nbd.OptSetMeta, nil, ""},
		{nbd.OptSetMeta, []string{"qemu:", "base:"}, ""},
		{nbd.OptSetMeta, []string{"qemu:dirty-bitmap:two", "base:allocation"}, "base:allocation qemu:dirty-bitmap:two"},
	} {
		data := text("x") + string(be.AppendUint32(nil, uint32(len(q.queries))))
		for _, s := range q.queries {
			data += text(s)
		}
		var got []string
		for _, r := range c.option(q.opt, data) {
			if r.kind == nbd.RepMetaContext {
				got = append(got, string(r.data[4:]))
			}
		}
		if strings.Join(got, " ") != q.want {
			t.Errorf("option %d %q: %q, not %q", q.opt, q.queries, got, q.want)
		}
	}
	c.option(nbd.OptGo, text("x")+"\x00\x00")
	c.request(0, nbd.CmdBlockStatus, 1, 0, 4096)
	if a := c.answer(1); fmt.Sprint(a.status) != "map[1:[{4096 3}] 2:[{4096 0}]]" {
		t.Errorf("status: %+v", a)
	}
}

// TestContextsVoid: what was agreed on for another export, or before a failure, is not kept.
func TestContextsVoid(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serveAt(t, "nbd+unix:///x?socket="+path, server(t, Export{Name: "x", Device: newMemory(4096)}, Export{Name: "y", Device: newMemory(4096)}))
	ask := text("x") + "\x00\x00\x00\x01" + text(nbd.BaseAllocation)
	for name, prepare := range map[string]func(*client){
		"another export": func(c *client) { c.option(nbd.OptSetMeta, strings.Replace(ask, "x", "y", 1)) },
		"failed later": func(c *client) {
			c.option(nbd.OptSetMeta, ask)
			c.option(nbd.OptSetMeta, text("no")+"\x00\x00\x00\x00")
		},
		"never": func(*client) {},
	} {
		c := greet(t, &net.UnixAddr{Name: path, Net: "unix"})
		c.option(nbd.OptStructured, "")
		prepare(c)
		c.option(nbd.OptGo, text("x")+"\x00\x00")
		c.request(0, nbd.CmdBlockStatus, 1, 0, 4096)
		if a := c.answer(1); a.code != nbd.EINVAL {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

// TestStatus compares answers about random ranges with the truth, over several
// contexts at one time, and walks the device as clients do.
func TestStatus(t *testing.T) {
	const size = 1 << 20
	for seed := range sim.Seeds(5) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		disk := newMemory(size)
		var changed block.Set
		for range rnd.IntN(40) {
			off := rnd.Int64N(size/512) * 512
			disk.b[off] = 1
			changed.Add(block.Range{Off: off &^ 4095, Len: 4096})
		}
		s := server(t, Export{Name: "x", Device: disk, Bitmaps: bitmaps(Bitmap{"c", marked(changed.Ranges())}, Bitmap{"s", stripes(8192)}, Bitmap{"bad", broken{}})})
		l := newPipes()
		end := run(s, l)
		c := l.dial(t)
		c.hello()
		c.enter("x", "base:allocation", "qemu:dirty-bitmap:c", "qemu:dirty-bitmap:s")
		truth := map[uint32]func(off int64) uint32{
			1: func(off int64) uint32 {
				if disk.b[off&^511] != 0 {
					return 0
				}
				return nbd.StateHole | nbd.StateZero
			},
			2: func(off int64) uint32 {
				_, d, _ := marked(changed.Ranges()).Run(block.Range{Off: off, Len: 1})
				return bit(d)
			},
			3: func(off int64) uint32 { return bit(off/8192%2 == 1) },
		}
		for off, i := int64(0), 0; off < size; i++ {
			n := min(rnd.Int64N(300<<10)+1, size-off)
			flags := uint16(0)
			if i%3 == 2 {
				flags = nbd.CmdFlagReqOne
			}
			c.request(flags, nbd.CmdBlockStatus, uint64(i), uint64(off), uint32(n))
			a := c.answer(uint64(i))
			if len(a.status) != len(truth) || a.code != 0 {
				t.Fatalf("seed %d: %d contexts, error %d %s", seed, len(a.status), a.code, a.why)
			}
			least := n
			for id, all := range a.status {
				least = min(least, agrees(t, seed, off, n, all, truth[id], flags != 0))
			}
			off += least
		}
		c.conn.Close()
		if err := end(); err != nil {
			t.Error(err)
		}
	}
}

func bit(b bool) uint32 {
	if b {
		return nbd.StateDirty
	}
	return 0
}

// agrees checks one context's answer, and gives how far it goes.
func agrees(t *testing.T, seed uint64, off, n int64, all []descriptor, truth func(int64) uint32, one bool) int64 {
	t.Helper()
	if one && len(all) != 1 || len(all) > statusMax {
		t.Fatalf("seed %d: %d extents", seed, len(all))
	}
	at := off
	for _, d := range all {
		if d.length == 0 || at+int64(d.length) > off+n {
			t.Fatalf("seed %d: extent %+v of %d+%d at %d", seed, d, off, n, at)
		}
		for o := at; o < at+int64(d.length); o += 64 {
			if truth(o) != d.state {
				t.Fatalf("seed %d: byte %d is said to be %d", seed, o, d.state)
			}
		}
		at += int64(d.length)
	}
	return at - off
}

// TestBrokenMap: a map that answers nonsense makes an error, not an endless loop or a wrong answer.
func TestBrokenMap(t *testing.T) {
	l := newPipes()
	end := run(server(t, Export{Name: "x", Device: newMemory(4096), Bitmaps: bitmaps(Bitmap{"bad", broken{}})}), l)
	c := l.dial(t)
	c.hello()
	c.enter("x", "qemu:dirty-bitmap:bad")
	c.request(0, nbd.CmdBlockStatus, 1, 0, 4096)
	if a := c.answer(1); a.code != nbd.EIO || !strings.Contains(a.why, "qemu:dirty-bitmap:bad") {
		t.Errorf("%+v", a)
	}
	c.works()
	c.conn.Close()
	if err := end(); err != nil {
		t.Error(err)
	}
}

// TestIncrement: unmodified clients read our change map, and a backup made with
// it is the disk.
func TestIncrement(t *testing.T) {
	testkit.Need(t, "nbdclients")
	d := device(t, 16<<20)
	changes := marked{{Off: 4096, Len: 8192}, {Off: 1 << 20, Len: 1 << 20}, {Off: 16<<20 - 4096, Len: 4096}}
	full := filepath.Join(t.TempDir(), "full")
	uri := serve(t, Export{Name: "disk", Device: d, Bitmaps: bitmaps(Bitmap{"since-full", changes}, Bitmap{"none", marked{}})})
	testkit.Run(t, "nbdcopy", uri, full)
	for _, c := range changes {
		b := make([]byte, c.Len)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		if _, err := d.WriteAt(b, c.Off); err != nil {
			t.Fatal(err)
		}
	}
	out := testkit.Run(t, "nbdinfo", uri)
	for _, want := range []string{"base:allocation", "qemu:dirty-bitmap:since-full", "qemu:dirty-bitmap:none"} {
		if !strings.Contains(out, want) {
			t.Errorf("nbdinfo does not show %s:\n%s", want, out)
		}
	}
	if got := nbdinfoMap(t, uri, "qemu:dirty-bitmap:none"); len(got) != 0 {
		t.Errorf("nothing has changed, and it says %v", got)
	}
	if got := nbdinfoMap(t, uri, "qemu:dirty-bitmap:since-full"); !slices.Equal(got, changes) {
		t.Errorf("nbdinfo --map: %v, not %v", got, changes)
	}
	if got := qemuDirty(t, uri, "qemu:dirty-bitmap:since-full"); !slices.Equal(got, changes) {
		t.Errorf("qemu-img map: %v, not %v", got, changes)
	}
	f, err := os.OpenFile(full, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, c := range changes { // as backup tools do
		b := make([]byte, c.Len)
		if _, err := d.ReadAt(b, c.Off); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, c.Off); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", full, uri)
}

// nbdinfoMap gives what nbdinfo says has changed.
func nbdinfoMap(t *testing.T, uri, context string) marked {
	t.Helper()
	var all []struct {
		Offset, Length int64
		Type           int
	}
	if err := json.Unmarshal([]byte(testkit.Run(t, "nbdinfo", "--json", "--map="+context, uri)), &all); err != nil {
		t.Fatal(err)
	}
	var out block.Set
	for _, e := range all {
		if e.Type&nbd.StateDirty != 0 {
			out.Add(block.Range{Off: e.Offset, Len: e.Length})
		}
	}
	return marked(out.Ranges())
}

// qemuDirty gives what qemu says has changed: with x-dirty-bitmap it takes dirty for a hole.
func qemuDirty(t *testing.T, uri, context string) marked {
	t.Helper()
	socket := strings.SplitN(uri, "socket=", 2)[1]
	image := fmt.Sprintf("driver=nbd,export=disk,server.type=unix,server.path=%s,x-dirty-bitmap=%s", socket, context)
	var all []struct {
		Start, Length int64
		Data          bool
	}
	if err := json.Unmarshal([]byte(testkit.Run(t, "qemu-img", "map", "--output=json", "--image-opts", image)), &all); err != nil {
		t.Fatal(err)
	}
	var out block.Set
	for _, e := range all {
		if !e.Data {
			out.Add(block.Range{Off: e.Start, Len: e.Length})
		}
	}
	return marked(out.Ranges())
}

// TestExports: exports by name, come, grown and gone.
func TestExports(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	a, b := newMemory(4096), newMemory(8192)
	s := server(t, Export{Name: "a", Description: "the first", Device: a})
	serveAt(t, "nbd+unix:///?socket="+path, s)
	at := &net.UnixAddr{Name: path, Net: "unix"}
	old := greet(t, at)
	old.enter("") // the only one
	if err := s.Add(Export{Name: "b", Device: b}); err != nil {
		t.Fatal(err)
	}
	for _, e := range []Export{{Name: "b"}, {Name: strings.Repeat("n", nameMax+1)}, {Name: "c", BlockSize: 3}} {
		if err := s.Add(e); err == nil {
			t.Errorf("%.10s was taken", e.Name)
		}
	}
	c := greet(t, at)
	var names []string
	for _, r := range c.option(nbd.OptList, "") {
		if r.kind == nbd.RepServer {
			names = append(names, string(r.data[4:][:be.Uint32(r.data)]))
		}
	}
	if fmt.Sprint(names) != "[a b]" {
		t.Errorf("list: %v", names)
	}
	size := func(name string) uint64 {
		for _, r := range c.option(nbd.OptInfo, text(name)+"\x00\x00") {
			if r.kind == nbd.RepInfo && be.Uint16(r.data) == nbd.InfoExport {
				return be.Uint64(r.data[2:])
			}
		}
		return 0
	}
	b.resize(16384)
	if size("a") != 4096 || size("b") != 16384 {
		t.Errorf("sizes %d and %d", size("a"), size("b"))
	}
	user := greet(t, at)
	user.enter("b")
	b.resize(12288) // a request that is beyond the end by now is an error, whatever the client thinks
	user.request(0, nbd.CmdRead, 1, 12288, 4096)
	if x := user.answer(1); x.code != nbd.EINVAL {
		t.Errorf("a read beyond the new end: %+v", x)
	}
	if err := s.Remove("b"); err != nil {
		t.Fatal(err)
	}
	user.closed()
	if k := last(c.option(nbd.OptGo, text("b")+"\x00\x00")); k != nbd.RepErrUnknown {
		t.Errorf("the removed export: %#x", k)
	}
	if err := s.Remove("b"); err == nil {
		t.Error("removed twice")
	}
	old.works()
}

// TestRemoveWaits: when Remove returns, nobody is in the device any more.
func TestRemoveWaits(t *testing.T) {
	g := &greedy{memory: newMemory(0), gate: make(chan struct{})}
	s := server(t, Export{Name: "x", Device: g})
	l := newPipes()
	end := run(s, l)
	c := l.dial(t)
	c.hello()
	c.enter("x")
	c.request(0, nbd.CmdRead, 1, 0, 4096)
	for g.now.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	removed := make(chan int64, 1)
	go func() {
		if err := s.Remove("x"); err != nil {
			t.Error(err)
		}
		removed <- g.now.Load()
	}()
	c.closed() // at once
	select {
	case <-removed:
		t.Error("removed, and a read is under way")
	default:
	}
	close(g.gate)
	if n := <-removed; n != 0 {
		t.Errorf("removed, and %d bytes are being read", n)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

// patchy is a device in memory that tells at most so many extents at a time.
type patchy struct {
	*memory
	most int
}

func (p patchy) Extents(r block.Range) ([]block.Extent, error) {
	all, err := p.memory.Extents(r)
	return all[:min(len(all), p.most)], err
}

// TestReadPieces: long reads come as data and holes, in one piece where the client wants it so, and are right.
func TestReadPieces(t *testing.T) {
	const size = 8 << 20
	disk := newMemory(size)
	holes := 0
	for seed := range sim.Seeds(6) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		clear(disk.b)
		for range 1 + rnd.IntN(250) {
			off, n := rnd.IntN(size-20000), rnd.IntN(20000)
			for i := range n {
				disk.b[off+i] = byte(i) | 1
			}
		}
		l := newPipes()
		end := run(server(t, Export{Name: "x", Device: patchy{disk, []int{1 << 20, 10000, 3000}[seed%3]}}), l)
		c := l.dial(t)
		c.hello()
		c.enter("x")
		for i := range uint64(12) {
			off := rnd.Uint64N(size / 4)
			n := uint32(rnd.IntN(size*3/4) + 1)
			flags := uint16(i%2) * nbd.CmdFlagDF
			c.request(flags, nbd.CmdRead, i, off, n)
			a := c.answer(i)
			if got, ok := a.whole(off, n); !ok || string(got) != string(disk.b[off:][:n]) || flags != 0 && len(a.data) != 1 {
				t.Fatalf("seed %d: read %d+%d with flags %d: %d pieces of data, %d holes, gapless %v", seed, off, n, flags, len(a.data), len(a.holes), ok)
			}
			if len(a.data)+len(a.holes) > piecesMax {
				t.Errorf("seed %d: %d pieces", seed, len(a.data)+len(a.holes))
			}
			holes += len(a.holes)
		}
		c.conn.Close()
		if err := end(); err != nil {
			t.Error(err)
		}
	}
	if holes == 0 {
		t.Error("no hole was ever sent as one")
	}
}

// discarded is a device of which half has no defined content.
type discarded struct{ *memory }

func (d discarded) Extents(r block.Range) ([]block.Extent, error) {
	half := block.Range{Len: d.Size() / 2}
	if u := r.Intersect(half); !u.Empty() {
		return []block.Extent{{Range: u, State: block.Undefined}}, nil
	}
	return []block.Extent{{Range: r, State: block.Data}}, nil
}

// TestUndefined: what has no defined content is said to be zero only of a device that reads so.
func TestUndefined(t *testing.T) {
	for zero, want := range map[bool]uint32{false: nbd.StateHole, true: nbd.StateHole | nbd.StateZero} {
		disk := newMemory(256 << 10)
		if !zero {
			for i := range disk.b {
				disk.b[i] = 5
			}
		}
		l := newPipes()
		end := run(server(t, Export{Name: "x", Device: discarded{disk}, UndefinedReadsZero: zero}), l)
		c := l.dial(t)
		c.hello()
		c.enter("x", nbd.BaseAllocation)
		c.request(0, nbd.CmdBlockStatus, 1, 0, 256<<10)
		if got := c.answer(1).status[1]; len(got) != 1 || got[0] != (descriptor{128 << 10, want}) {
			t.Errorf("reads as zeroes %v: %v", zero, got)
		}
		c.request(0, nbd.CmdRead, 2, 0, 256<<10)
		if b, ok := c.answer(2).whole(0, 256<<10); !ok || string(b) != string(disk.b) {
			t.Errorf("reads as zeroes %v: something else was read", zero)
		}
		c.conn.Close()
		if err := end(); err != nil {
			t.Error(err)
		}
	}
}

// whole puts the pieces of a read together; ok says that they cover it once.
func (a *answer) whole(off uint64, n uint32) (b []byte, ok bool) {
	b = make([]byte, n)
	covered := map[uint64]uint64{}
	for at, d := range a.data {
		copy(b[at-off:], d)
		covered[at] = at + uint64(len(d))
	}
	for at, n := range a.holes {
		covered[at] = at + uint64(n)
	}
	at := off
	for range len(covered) {
		at = covered[at]
	}
	return b, at == off+uint64(n)
}
