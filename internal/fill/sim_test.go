package fill

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
)

// coverage counts what the seeds met.
type coverage struct {
	Points, Stretches int
	Data, Known       int // fills
	Pieces, Voided    int // jobs that came back in pieces, and with nothing left
	Crashes           int
	Redropped         int // gaps while one was open
}

// play runs one seed: some hundred steps of writers, disk and daemon in an order
// chosen by the seed, then silence, until the engine has settled.
func play(seed uint64, f fault, o ownerFault, met *coverage) (err error) {
	defer func() {
		if p := recover(); p != nil && (f != faultNone || o != ownerRight) {
			err = fmt.Errorf("panic: %v", p)
		} else if p != nil {
			panic(fmt.Sprintf("seed %d: %v", seed, p))
		}
	}()
	rng := rand.New(rand.NewPCG(seed, 1))
	k := newKernel(rng, o)
	k.met, k.missFails = met, o == ownerTrustsMissed
	d := &daemon{k: k, fault: f, owner: o, lazy: rng.IntN(2) == 0}
	d.start()
	crashes := []int{0, 0, 400, 60}[rng.IntN(4)]
	busy := 1 + rng.IntN(4)
	depth := 1 + rng.IntN(5)
	calm := 0.0
	for range 200 + rng.IntN(1000) {
		k.now++
		if rng.IntN(25) == 0 { // now the one side stalls, now the other
			busy = 1 + rng.IntN(12)>>rng.IntN(4)
		}
		if rng.IntN(120) == 0 { // storm and calm
			k.dropRate, calm = calm, k.dropRate
		}
		switch n := rng.IntN(3 + busy); {
		case n == 0 && len(k.active) < depth:
			k.newBio()
		case n <= busy/2+1:
			k.step()
		default:
			d.step()
		}
		if crashes > 0 && rng.IntN(crashes) == 0 {
			if err := k.checkStream(d.stream, d.position); err != nil {
				return err
			}
			met.Crashes++
			d.start()
		}
		if d.violation != "" {
			return fmt.Errorf("%s", d.violation)
		}
	}
	return finish(k, d)
}

// finish lets the writers stop and the engine settle.
func finish(k *kernel, d *daemon) error {
	k.quiet = true
	for range 20000 {
		k.now++
		if len(k.active) > 0 && k.rng.IntN(2) == 0 {
			k.step()
			continue
		}
		if len(k.active) == 0 {
			clear(k.inflight) // pointers of missed ends are queued again some day
		}
		d.step()
		if len(k.active) == 0 && !d.gapOpen && d.next == len(k.ring) && k.drops == d.seen {
			if err := k.checkStream(d.stream, d.position); err != nil {
				return err
			}
			return k.checkQuiet(d)
		}
		if d.violation != "" {
			return fmt.Errorf("%s", d.violation)
		}
	}
	return fmt.Errorf("does not settle: unknown %v, reader %d, low %d, producer %d, drops %d of %d",
		d.e.Unknown(0), d.place, d.e.low, k.producer, d.seen, k.drops)
}

func (k *kernel) checkQuiet(d *daemon) error {
	if k.overlap {
		return nil
	}
	last := contentAt(d.stream, k.disks, d.position)
	for i := range last {
		if !slices.Equal(last[i], k.content[i]) {
			return fmt.Errorf("at rest disk %d holds %v and the stream %v", i, k.content[i], last[i])
		}
	}
	return nil
}

func seeds(t *testing.T, n uint64) (first, count uint64) {
	if s := os.Getenv("TIDEMARK_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("TIDEMARK_SEED=%s: %v", s, err)
		}
		return v, 1
	}
	if s := os.Getenv("TIDEMARK_SEEDS"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("TIDEMARK_SEEDS=%s: %v", s, err)
		}
		return 1, v
	}
	return 1, n
}

func TestSimulation(t *testing.T) {
	first, count := seeds(t, 10000)
	var met coverage
	for seed := first; seed < first+count; seed++ {
		if err := play(seed, faultNone, ownerRight, &met); err != nil {
			t.Fatalf("seed %d: %v\nreplay: TIDEMARK_SEED=%d go test ./internal/fill -run 'TestSimulation$'", seed, err, seed)
		}
	}
	t.Logf("%d seeds: %+v", count, met)
	if v := []int{met.Points, met.Stretches, met.Data, met.Known, met.Pieces, met.Voided, met.Crashes, met.Redropped}; count >= 5000 && slices.Min(v) < 10 {
		t.Errorf("the simulation hardly meets something that it is meant to try: %+v", met)
	}
}

// TestSimulationHasPower breaks each rule in turn: a simulation that does not notice proves nothing.
func TestSimulationHasPower(t *testing.T) {
	type broken struct {
		name  string
		fault fault
		owner ownerFault
	}
	for _, b := range []broken{
		{"rank without low-water mark", faultRankAtReader, 0},
		{"valid from the beginning of the read", faultValidAtRead, 0},
		{"no waiting for the last drop", faultNoLastDrop, 0},
		{"lost writes in flight ignored", faultIgnoreDropped, 0},
		{"look in flight from before the drop", faultOldScan, 0},
		{"reopened blocks kept", faultKeepReopened, 0},
		{"captured write older than the drop", faultKnownAnyPlace, 0},
		{"older position at an equal place", faultOldestMark, 0},
		{"settled without a look at the counter", 0, ownerBlindSettle},
		{"all bits cleared", 0, ownerClearsAll},
		{"place noted before the clearing", 0, ownerNotesEarly},
		{"producer noted before the read", 0, ownerEndsEarly},
		{"scan from before the clearing", 0, ownerScansEarly},
		{"scan's place noted after it", 0, ownerProducerLate},
		{"bits cleared before the gap is durable", 0, ownerClearsUndurable},
		{"missed end taken for a good one", 0, ownerTrustsMissed},
		{"tracking ended too early", 0, ownerEndsOff},
	} {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			for seed := uint64(1); seed <= 200000; seed++ {
				if err := play(seed, b.fault, b.owner, &coverage{}); err != nil {
					t.Logf("seed %d: %v", seed, err)
					return
				}
			}
			t.Error("not noticed")
		})
	}
}
