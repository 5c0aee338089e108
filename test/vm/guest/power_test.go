//go:build guest

package guest

import (
	"bytes"
	"encoding/json"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestPowerCut is begun by the host's test of its name, once before and once after
// the power was cut, over disks that then lost what was not flushed.
func TestPowerCut(t *testing.T) {
	switch os.Getenv("TIDEMARK_POWER") {
	case "before":
		beforeCut(t)
	case "after":
		afterCut(t)
	}
}

const (
	powerDir   = "/power"   // where the disk with the state folder is mounted
	powerNotes = "/results" // what the host keeps
	powerHalf  = 8 << 20    // bytes of the device for each of the two writers
)

// noted is what the second start must know of the first.
type noted struct {
	Durable    []string // snapshots
	Quick      string   // one that is not durable
	Generation string
}

// powerDaemon mounts the state folder's disk and starts a daemon that has it there.
func powerDaemon(t *testing.T) *program.Daemon {
	t.Helper()
	if err := os.MkdirAll(powerDir, 0o700); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "mount", bySerial(t, "vd*", "serial", "state"), powerDir)
	d := program.Serving(t)
	d.Stop()
	d.State = filepath.Join(powerDir, "state")
	d.Start()
	return d
}

// beforeCut writes under durable snapshots, and one that is not, until it is no more. What it has
// flushed it notes.
func beforeCut(t *testing.T) {
	fronts()
	testkit.Run(t, "mkfs.ext4", "-q", bySerial(t, "vd*", "serial", "state"))
	d := powerDaemon(t)
	node := strings.TrimSpace(d.Run("device", "create", "--backing", bySerial(t, "vd*", "serial", "data"), "--name", "data"))
	all, buf := openRaw(t, node), aligned(t, 1<<20)
	for off := int64(0); off < all.size; off += int64(len(buf)) {
		testkit.Fill(buf, 0, off, 1)
		if _, err := all.file.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := all.file.Sync(); err != nil {
		t.Fatal(err)
	}
	take := func(args ...string) string {
		id := strings.TrimSpace(d.Run(append([]string{"snapshot", "create", "--chunk", "16K", "data"}, args...)...))
		d.Run("snapshot", "take", id)
		return id
	}
	n := noted{Generation: generation(t, d)}
	n.Durable = []string{take("--durable", "--storage", powerDir+"/durable:24M"), take("--durable", "--storage", bySerial(t, "vd*", "serial", "store"))}
	n.Quick = take("--storage", powerDir+"/quick:24M")
	text, err := json.Marshal(n)
	if err != nil {
		t.Fatal(err)
	}
	note(t, "noted", text)

	ends, flushed := make(chan error), make(chan bool, 1<<10)
	for w := range 2 {
		own := openRaw(t, node)
		notes, err := os.OpenFile(fmt.Sprintf("%s/flushed-%d", powerNotes, w), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		buf, rng := aligned(t, 32<<10), mrand.New(mrand.NewPCG(uint64(time.Now().UnixNano()), uint64(w)))
		go func() { ends <- own.firstWrites(buf, int64(w)*powerHalf, rng, notes, flushed) }()
	}
	for range 40 {
		select {
		case <-flushed:
		case err := <-ends:
			t.Fatal(err)
		case <-time.After(2 * time.Minute):
			t.Fatal("no write ends")
		}
	}
	note(t, "cut", nil)
	t.Fatalf("the power is still there: %v", <-ends)
}

// note leaves a file for the host, and for the next start.
func note(t *testing.T, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(powerNotes, name), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// firstWrites writes to one half of the device for ever, and notes what it has flushed.
func (r *raw) firstWrites(buf []byte, from int64, rng *mrand.Rand, notes *os.File, flushed chan<- bool) error {
	var lines bytes.Buffer
	for seq := uint64(2); ; seq++ {
		n := int64(testkit.Sector) * (1 + rng.Int64N(int64(len(buf)/testkit.Sector)))
		off := from + rng.Int64N((powerHalf-n)/testkit.Sector+1)*testkit.Sector
		testkit.Fill(buf[:n], 0, off, seq)
		if _, err := r.file.WriteAt(buf[:n], off); err != nil {
			return err
		}
		fmt.Fprintln(&lines, off, n, seq)
		if rng.IntN(6) > 0 {
			continue
		}
		if err := r.file.Sync(); err != nil {
			return err
		}
		if _, err := lines.WriteTo(notes); err != nil {
			return err
		}
		select {
		case flushed <- true:
		default:
		}
	}
}

// afterCut: the durable snapshots are byte for byte what was there at the take, the other one
// is spoiled and says why, the device has all that was flushed, and its change map
// does not claim to know what the cut took.
func afterCut(t *testing.T) {
	fronts()
	text, err := os.ReadFile(powerNotes + "/noted")
	if err != nil {
		t.Fatal(err)
	}
	var n noted
	if err := json.Unmarshal(text, &n); err != nil {
		t.Fatal(err)
	}
	d := powerDaemon(t)
	var all []struct {
		ID, State string
		Devices   []struct{ Spoiled string }
	}
	text = []byte(d.Run("snapshot", "ls", "--json"))
	if err := json.Unmarshal(text, &all); err != nil || len(all) != 3 {
		t.Fatalf("snapshots: %v in %s", err, text)
	}
	for _, s := range all {
		want := map[bool]string{true: "taken", false: "spoiled"}[slices.Contains(n.Durable, s.ID)]
		if s.State != want || want == "spoiled" && s.ID != n.Quick {
			t.Errorf("after the cut it is to be %s: %+v", want, s)
		}
	}
	if events := d.Run("snapshot", "events", n.Quick); !strings.Contains(events, "corrupt") || !strings.Contains(events, "not durable") {
		t.Errorf("events of what was spoiled: %s", events)
	}
	if said := d.Run("status"); !strings.Contains(said, n.Quick) || !strings.Contains(said, "not durable") {
		t.Errorf("status does not name what was spoiled: %s", said)
	}
	image := func(id string) *raw {
		line := strings.Fields(d.Run("snapshot", "images", id))
		if len(line) != 2 {
			t.Fatalf("images: %q", line)
		}
		return openRaw(t, line[1])
	}
	asTaken := func(id, when string) {
		t.Helper()
		r := image(id)
		defer r.file.Close()
		seqs, err := testkit.Check(r.content(), 0, 0)
		if at := slices.IndexFunc(seqs, func(s uint64) bool { return s != 1 }); err != nil || at >= 0 {
			t.Errorf("%s, the image of %s: %v, sector %d is of a later write", when, id, err, at)
		}
	}
	for _, id := range n.Durable {
		asTaken(id, "after the cut")
	}
	device := openRaw(t, "/dev/tidemark/data")
	seqs, err := testkit.Check(device.content(), 0, 0)
	if err != nil {
		t.Error(err)
	}
	flushed := 0
	for w := range 2 {
		text, err := os.ReadFile(fmt.Sprintf("%s/flushed-%d", powerNotes, w))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			var off, length int64
			var seq uint64
			if _, err := fmt.Sscan(line, &off, &length, &seq); err != nil || !strings.HasSuffix(line, "\n") {
				break // the cut came while it was noted
			}
			for at := off / testkit.Sector; at < (off+length)/testkit.Sector; at++ {
				if seqs[at] < seq {
					t.Fatalf("sector %d was flushed as write %d, and is of write %d", at, seq, seqs[at])
				}
			}
			flushed++
		}
	}
	if flushed < 40 {
		t.Errorf("only %d writes were flushed: nothing was shown", flushed)
	}
	if generation(t, d) == n.Generation {
		t.Error("the change map goes on though the cut took what nobody knows")
	}
	if err := device.scribble(aligned(t, 128<<10), 40, seed(t)); err != nil {
		t.Error(err)
	}
	device.file.Close()
	for _, id := range append(n.Durable, n.Quick) {
		if id != n.Quick {
			asTaken(id, "after further writes")
		}
		d.Run("snapshot", "destroy", id)
	}
	d.Run("device", "rm", "data")
	d.Stop()
	testkit.Run(t, "umount", powerDir)
	testkit.Run(t, "e2fsck", "-fn", bySerial(t, "vd*", "serial", "state"))
}
