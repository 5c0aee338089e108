package live

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/client"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestDrainWithoutPayloads: a group of which only the ranges of writes are kept.
// A consumer that asks for ranges is told what to read from the disk, and reads
// it; what is right comes as a fill, and a bookmark behind it is what the disk
// was. One that does not ask gets the fills alone.
func TestDrainWithoutPayloads(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		disk := testkit.NewDisk(t, 8*mib)
		d := program.New(t)
		f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 64<<10)
		write := func(seq uint64) {
			t.Helper()
			size := 4096 * (1 + rng.Int64N(16))
			off := 4096 * rng.Int64N((8*mib-size)/4096)
			testkit.Fill(buf[:size], 0, off, seq)
			if _, err := f.WriteAt(buf[:size], off); err != nil {
				t.Fatal(err)
			}
		}
		for n := range uint64(20) {
			write(n + 1)
		}
		d.Protect("g", "--metadata-only", "--seal-every", "50ms", disk.Path)
		if g := d.Group("g"); g.Mode != "metadata" || !g.Has("metadata-mode") {
			t.Fatalf("mode %s, conditions %v", g.Mode, g.Conditions)
		}
		dial := client.Dial(filepath.Join(d.Dir, "socket"))
		reader := &reading{t: t, disk: disk.Path, Consumer: dial.Consumer("g", "reader", client.Options{Ranges: true}), copy: make([]byte, 8*mib)}
		plain := &reading{t: t, disk: disk.Path, Consumer: dial.Consumer("g", "plain", client.Options{}), copy: make([]byte, 8*mib)}
		plain.drain()
		for round, name := range []string{"first", "second"} {
			for n := range uint64(50) {
				write(1000*uint64(round+1) + n)
			}
			reader.drain() // in the middle: the gap may be open, or closed already
			if round == 1 {
				d.Restart()
			}
			program.Eventually(t, patience, "the idle disk has a bookmark", func() error { // as soon as the gap is closed
				_, err := d.Verb("bookmark", "g", name)
				return err
			})
			want := content(t, disk.Path)
			d.Await("g", "durable", func(g *program.Group) bool { return g.Since > 0 && g.Captured == g.Durable })
			for _, c := range []*reading{reader, plain} {
				c.drain()
				same(t, "the copy at "+name, want, c.copy)
			}
			same(t, "restored at "+name, want, image(t, d, "g", "", name))
		}
		if reader.kinds[client.Writes]+plain.kinds[client.Writes] > 0 {
			t.Errorf("writes with payloads came where none were kept: %v, %v", reader.kinds, plain.kinds)
		}
		if reader.kinds[client.Ranges] == 0 || reader.kinds[client.Bookmark] != 2 || reader.kinds[client.Fill] == 0 {
			t.Errorf("who asked for ranges got %v", reader.kinds)
		}
		if plain.kinds[client.Ranges] > 0 || plain.kinds[client.Bookmark] != 2 || plain.kinds[client.Fill] == 0 {
			t.Errorf("who did not ask for ranges got %v", plain.kinds)
		}
	})
}

// reading is a consumer that reads from the disk what it is told to.
type reading struct {
	*client.Consumer
	t     *testing.T
	disk  string
	copy  []byte
	kinds map[client.Kind]int
}

// drain applies and commits all that there is.
func (r *reading) drain() {
	r.t.Helper()
	if r.kinds == nil {
		r.kinds = map[client.Kind]int{}
	}
	for b, err := range r.Batches(r.t.Context(), 0) {
		if errors.Is(err, client.ErrNothing) {
			return
		}
		if err != nil {
			r.t.Fatal(err)
		}
		r.kinds[b.Kind]++
		var now []byte
		if b.Kind == client.Ranges {
			now = content(r.t, r.disk)
		}
		for _, rec := range b.Records {
			to := r.copy[rec.Offset : rec.Offset+rec.Length]
			switch rec.Op {
			case client.Read:
				copy(to, now[rec.Offset:])
			case client.Write:
				copy(to, rec.Payload)
			default:
				clear(to)
			}
		}
		if err := r.Commit(r.t.Context(), b.Number); err != nil {
			r.t.Fatal(err)
		}
	}
}
