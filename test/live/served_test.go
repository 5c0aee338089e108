package live

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// imageFile is a new image file, full of random bytes up to its middle.
func imageFile(t testing.TB, rng *rand.Rand, dir string, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(dir, "image-")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, size/2)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	if _, err = f.WriteAt(b, 0); err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// newServedOrder is newOrder over two devices that the daemon serves to NBD clients.
func newServedOrder(t *testing.T, rng *rand.Rand, noiseMax int, args ...string) *order {
	o := &order{t: t, rng: rng, c: &counter{seed: rng.Uint64(), buf: make([]byte, slotBytes)}, noiseMax: noiseMax, d: program.Serving(t)}
	for i := range o.c.disks {
		backing := filepath.Join(o.d.Dir, fmt.Sprint("backing-", i))
		if err := os.WriteFile(backing, make([]byte, orderDisk), 0o600); err != nil {
			t.Fatal(err)
		}
		e := serve(t, o.d, fmt.Sprint("disk", i), backing)
		o.c.disks[i] = e
		for _, part := range [][2]int64{{noiseStart, noiseMiddle}, {noiseMiddle, noiseEnd}} {
			o.noise = append(o.noise, noise{&export{name: e.name, uri: e.uri, stop: e.stop}, part[0], part[1]})
		}
	}
	o.protect("--wait", args...)
	return o
}

// TestServedOrder: every point is a prefix of the order in which writes came,
// over two served devices, with the daemon killed in the middle.
func TestServedOrder(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newServedOrder(t, rng, 8<<10)
		o.write(func() {
			for range 2 {
				o.counted(rng.Uint64N(200))
				if err := o.bookmark(); err != nil {
					t.Error(err)
				}
				o.counted(rng.Uint64N(100))
				o.d.Kill()
				o.d.Start()
				o.d.Settle("g") // what was on its way was a gap
			}
			o.counted(50)
		})
		if g := o.d.Settle("g"); g.Disks[0].Lost+g.Disks[1].Lost > 0 {
			t.Errorf("writes were lost, though the ring has room: %+v", g)
		}
		o.d.Run("verify", "--vault", o.d.Vault, "--live")
		o.everywhere()
	})
}

// TestServedOverflow: the same with a ring that most of the noise does not fit.
func TestServedOverflow(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newServedOrder(t, rng, 256<<10, "--ring-size", "64K", "--seal-every", "200ms")
		o.write(func() {
			o.counted(200)
			o.d.Kill()
			o.d.Start()
			o.counted(200)
		})
		o.d.Settle("g")
		o.write(func() { o.counted(20) })
		if g := o.d.Settle("g"); g.Disks[0].Lost+g.Disks[1].Lost == 0 {
			t.Error("no write was lost: this tests nothing")
		}
		o.d.Run("verify", "--vault", o.d.Vault, "--live")
		o.everywhere()
	})
}

// TestServedBackPressure: where writes wait for room, none is lost, however small the ring.
func TestServedBackPressure(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newServedOrder(t, rng, 32<<10, "--ring-size", "64K", "--seal-every", "10ms", "--back-pressure")
		o.write(func() {
			o.counted(300)
			if err := o.bookmark(); err != nil {
				t.Error(err)
			}
			o.counted(100)
		})
		if g := o.d.Settle("g"); g.Disks[0].Lost+g.Disks[1].Lost > 0 || g.Since != 1 {
			t.Errorf("writes were lost: %+v", g)
		}
		o.everywhere()
	})
}

// TestServedModel: writes, zeroes and restarts of every kind against a shadow in
// memory. Every bookmark is what the shadow was.
func TestServedModel(t *testing.T) {
	const size = 8*mib + 12*testkit.Sector
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		d := program.Serving(t, "--force") // it ends though there are clients
		backing := imageFile(t, rng, d.Dir, size)
		e := serve(t, d, "disk", backing)
		shadow, err := os.ReadFile(backing)
		if err != nil {
			t.Fatal(err)
		}
		d.Protect("g", "disk")
		marks := map[string][]byte{}
		for round := range 5 {
			for range 1 + rng.IntN(40) {
				n := (1 + rng.IntN(200)) * testkit.Sector
				off := rng.Int64N((size-int64(n))/testkit.Sector+1) * testkit.Sector
				if rng.IntN(4) == 0 {
					clear(shadow[off:][:n])
					err = e.zero(off, n)
				} else {
					testkit.Fill(shadow[off:][:n], 0, off, rng.Uint64())
					_, err = e.WriteAt(shadow[off:][:n], off)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			name := fmt.Sprint("mark-", round)
			d.Run("bookmark", "g", name)
			marks[name] = bytes.Clone(shadow)
			switch rng.IntN(4) {
			case 0: // the ring goes on
				d.Restart()
			case 1: // after a reboot everything is compared
				d.Kill()
				d.LoseRings()
				d.Start()
			case 2:
				e.drop()
				d.Stop()
				d.Start()
			}
			d.Settle("g")
		}
		d.Run("verify", "--vault", d.Vault, "--live")
		for name, want := range marks {
			same(t, name, want, image(t, d, "g", "disk", name))
		}
		e.Close()
		if text := d.Refused(9, "device", "rm", "disk"); !strings.Contains(text, "unprotect g") {
			t.Errorf("device rm names no remedy: %s", text)
		}
		d.Run("unprotect", "g")
		d.Run("device", "rm", "disk")
	})
}

// TestServedResized: a device that grows takes its group offline, by name, and
// spoils nothing of before. Another group can have it.
func TestServedResized(t *testing.T) {
	d := program.Serving(t, "--force")
	backing := imageFile(t, rand.New(rand.NewPCG(1, 2)), d.Dir, 4*mib)
	e := serve(t, d, "disk", backing)
	d.Protect("g", "disk")
	d.Run("bookmark", "g", "before")
	want, err := os.ReadFile(backing)
	if err != nil {
		t.Fatal(err)
	}
	d.Settle("g")
	d.Run("device", "resize", "disk", "--size", "5M")
	d.Await("g", "offline, for its size", func(g *program.Group) bool {
		return g.State == "offline" && len(g.Conditions) == 1 && strings.Contains(g.Conditions[0].Detail, "5242880 bytes and had 4194304")
	})
	e.drop() // a client learns of the size when it connects
	for _, off := range []int64{0, 4*mib - testkit.Sector, 4 * mib, 5*mib - 2*testkit.Sector} {
		if _, err := e.WriteAt(make([]byte, 2*testkit.Sector), off); err != nil {
			t.Errorf("a write at %d: %v", off, err)
		}
	}
	same(t, "before", want, image(t, d, "g", "disk", "before"))
	d.Run("unprotect", "--abandon", "g")
	d.Protect("h", "disk")
	if want, err = os.ReadFile(backing); err != nil {
		t.Fatal(err)
	}
	same(t, "the larger one", want, image(t, d, "h", "disk", "latest"))
}
