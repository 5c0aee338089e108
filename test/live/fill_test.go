package live

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestFill: gaps that are filled while writers overlap what is being read, with
// a ring that cannot hold them and few requests, so that writes wait between
// their tracing and the disk. What was settled is the disk exactly, then and
// ever after; everything else that is offered keeps order.
func TestFill(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newOrder(t, rng, 32<<10, "--ring-size", "128K", "--seal-every", "50ms")
		var crossing []*crossing
		for i := range o.c.disks {
			crossing = append(crossing, newCrossing(t, rng, o.c.disks[i].Name(), i))
		}
		type quiet struct {
			at    string
			disks [][]byte
		}
		var was []quiet
		for round := range 3 {
			o.write(func() {
				var all sync.WaitGroup
				for _, c := range crossing {
					c.start(&all, o.note)
				}
				o.counted(40)
				if round == 1 {
					o.restart(20)
				}
				o.counted(40)
				all.Wait()
			})
			o.d.Settle("g")
			if err := o.bookmark(); err != nil {
				t.Fatal(err)
			}
			o.d.Run("verify", "--vault", o.d.Vault, "g", "--live")
			q := quiet{at: fmt.Sprintf("at-%d", o.c.n.Load())}
			for _, f := range o.c.disks {
				q.disks = append(q.disks, content(t, f.Name()))
			}
			was = append(was, q)
			o.calm()
		}
		g := identical(t, o.d, "g")
		for _, q := range was {
			for i, name := range o.names {
				same(t, name+" at "+q.at, q.disks[i], image(t, o.d, "g", name, q.at))
			}
		}
		o.everywhere()
		o.gapsRefused()
		if g.Disks[0].Lost+g.Disks[1].Lost == 0 {
			t.Error("the ring held everything: this tested nothing")
		}
	})
}

// TestFirstCopy: disks are written to everywhere while they are copied for the
// first time. Most sectors are written once: what a copy hides stays hidden.
func TestFirstCopy(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newOrderDisks(t, rng, 8<<10)
		var crossing []*crossing
		for i := range o.c.disks {
			c := newCrossing(t, rng, o.c.disks[i].Name(), i)
			for range crossingWrites { // something to copy
				if err := c.write(0); err != nil {
					t.Fatal(err)
				}
			}
			crossing = append(crossing, c)
		}
		o.write(func() {
			var all sync.WaitGroup
			var stop atomic.Bool
			for _, c := range crossing {
				c.trickle(&all, &stop, o.note)
			}
			o.protect("--wait=false", "--fill-rate", "16M")
			o.d.Await("g", "consistent", func(g *program.Group) bool { return g.Since > 0 && g.State == "protected" })
			o.counted(30)
			stop.Store(true)
			all.Wait()
		})
		o.d.Run("verify", "--vault", o.d.Vault, "g", "--live")
		g := identical(t, o.d, "g")
		o.everywhere()
		if all := stretches(t, o.d, "g"); len(all) != 1 || g.Disks[0].Lost+g.Disks[1].Lost > 0 {
			t.Errorf("stretches %v with room for everything", all)
		}
	})
}

// trickle has every writer write single sectors until it is stopped.
func (c *crossing) trickle(all *sync.WaitGroup, stop *atomic.Bool, note func(error)) {
	for w := range c.files {
		all.Go(func() {
			for !stop.Load() {
				first := c.rngs[w].Int64N(crossingBytes / testkit.Sector)
				note(c.writeSectors(w, first, 1))
				time.Sleep(time.Millisecond) // so that there is more of the disk than of the writes
			}
		})
	}
}

// crossing are writers whose writes overlap one another's, as sectors and as
// the blocks of the maps; never two on the same sector at one time, as those
// have no order on any disk.
type crossing struct {
	disk  int
	files []*os.File
	rngs  []*rand.Rand
	bufs  [][]byte
	mu    sync.Mutex
	freed *sync.Cond
	taken [][2]int64
	seq   uint64
}

// Crossing writers have the end of the disk, behind the noise.
const (
	crossingStart  = noiseEnd
	crossingBytes  = orderDisk - noiseEnd
	crossingMax    = 96 << 10
	crossingWrites = 60 // of each writer in a round
)

func newCrossing(t *testing.T, rng *rand.Rand, path string, disk int) *crossing {
	c := &crossing{disk: disk}
	c.freed = sync.NewCond(&c.mu)
	for range 4 {
		c.files = append(c.files, open(t, path, unix.O_DIRECT))
		c.rngs = append(c.rngs, fork(rng))
		c.bufs = append(c.bufs, aligned(t, crossingMax))
	}
	return c
}

// start has every writer make its writes.
func (c *crossing) start(all *sync.WaitGroup, note func(error)) {
	for w := range c.files {
		all.Go(func() {
			for range crossingWrites {
				note(c.write(w))
			}
		})
	}
}

func (c *crossing) write(w int) error {
	n := 1 + c.rngs[w].Int64N(1<<c.rngs[w].IntN(8)) // sectors, more often few
	n = min(n, crossingMax/testkit.Sector)
	return c.writeSectors(w, c.rngs[w].Int64N(crossingBytes/testkit.Sector-n+1), n)
}

func (c *crossing) writeSectors(w int, first, n int64) error {
	seq := c.take(first, first+n)
	defer c.free(first)
	off := crossingStart + first*testkit.Sector
	buf := c.bufs[w][:n*testkit.Sector]
	testkit.Fill(buf, c.disk, off, seq)
	_, err := c.files[w].WriteAt(buf, off)
	return err
}

// take waits until nobody else writes to the sectors.
func (c *crossing) take(first, end int64) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	for slices.ContainsFunc(c.taken, func(r [2]int64) bool { return r[0] < end && first < r[1] }) {
		c.freed.Wait()
	}
	c.taken = append(c.taken, [2]int64{first, end})
	c.seq++
	return c.seq
}

func (c *crossing) free(first int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.taken = slices.DeleteFunc(c.taken, func(r [2]int64) bool { return r[0] == first })
	c.freed.Broadcast()
}
