package live

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"tidemark/client"
	"tidemark/internal/testkit/program"
)

// copies are what a consumer keeps of a group's disks, and the kinds of batches that it was given.
type copies struct {
	*client.Consumer
	t     *testing.T
	disks [][]byte
	kinds map[client.Kind]int
}

func newCopies(t *testing.T, d *program.Daemon, name string, o client.Options, disks int, size int64) *copies {
	c := &copies{Consumer: client.Dial(filepath.Join(d.Dir, "socket")).Consumer("g", name, o), t: t, kinds: map[client.Kind]int{}}
	for range disks {
		c.disks = append(c.disks, make([]byte, size))
	}
	return c
}

// all applies and commits everything that is pending.
func (c *copies) all() {
	c.t.Helper()
	last := uint64(0)
	for {
		b, err := c.Next(c.t.Context(), 0)
		if errors.Is(err, client.ErrNothing) {
			return
		}
		if err != nil {
			c.t.Fatal(err)
		}
		c.kinds[b.Kind]++
		for _, r := range b.Records {
			if b.Kind == client.Writes && r.Position <= last {
				c.t.Errorf("position %d after %d", r.Position, last)
			}
			last = max(last, r.Position)
			part := c.disks[r.Disk][r.Offset : r.Offset+r.Length]
			if clear(part); r.Payload != nil {
				copy(part, r.Payload)
			}
		}
		if err := c.Commit(c.t.Context(), b.Number); err != nil {
			c.t.Fatal(err)
		}
	}
}

// TestDrainServed: a group of served devices is drained as one of tapped disks is,
// the whole of it or one device, through a kill of the daemon.
func TestDrainServed(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		const size = 2 * mib
		d := program.New(t)
		var devices [2]*export
		for i := range devices {
			backing := filepath.Join(d.Dir, fmt.Sprint("backing", i))
			if err := errors.Join(os.WriteFile(backing, nil, 0o600), os.Truncate(backing, size)); err != nil {
				t.Fatal(err)
			}
			devices[i] = serve(t, d, fmt.Sprint("dev", i), backing)
		}
		d.Protect("g", "--seal-every", "50ms", devices[0].Name(), devices[1].Name())
		whole := newCopies(t, d, "whole", client.Options{}, 2, size)
		second := newCopies(t, d, "second", client.Options{Disk: devices[1].Name()}, 2, size)
		want := [2][]byte{make([]byte, size), make([]byte, size)}
		whole.all()
		second.all()
		for round := range 2 {
			for range 20 {
				i, n := rng.IntN(2), 512*(1+rng.Int64N(16))
				off := 512 * rng.Int64N((size-n)/512)
				for k := range want[i][off : off+n] {
					want[i][off+int64(k)] = byte(rng.Uint32())
				}
				if _, err := devices[i].WriteAt(want[i][off:off+n], off); err != nil {
					t.Fatal(err)
				}
			}
			d.Run("bookmark", "g", fmt.Sprint("mark", round))
			if round == 1 {
				d.Restart()
				d.Await("g", "online", online)
			}
			whole.all()
			second.all()
			for i := range want {
				same(t, fmt.Sprintf("round %d, disk %d of the copy of all", round, i), want[i], whole.disks[i])
			}
			same(t, fmt.Sprintf("round %d, the copy of one", round), want[1], second.disks[1])
			same(t, fmt.Sprintf("round %d, the disk that is not copied", round), make([]byte, size), second.disks[0])
		}
		if n := whole.kinds[client.Bookmark]; n != 2 || whole.kinds[client.Writes] == 0 || second.kinds[client.Bookmark] != 2 {
			t.Errorf("batches %v and %v", whole.kinds, second.kinds)
		}
	})
}
