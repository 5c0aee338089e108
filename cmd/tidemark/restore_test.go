package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
	"tidemark/internal/vault"
)

// told is a vault with a history of one disk, told by hand.
type told struct {
	t     *testing.T
	dir   string
	disk  segment.Disk
	v     *vault.Vault
	lock  *vault.Lock
	b     *segment.Builder
	prev  segment.Summary
	pos   stream.Position
	clock int64
}

func tell(t *testing.T, size int64) *told {
	t.Helper()
	w := &told{t: t, dir: testkit.Dir(t), disk: segment.Disk{Name: "d", Size: size, SectorSize: 512, BlockSize: 4096}, b: segment.NewBuilder(1 << 20), clock: time.Now().UnixNano()}
	var err error
	if w.v, err = vault.Create(t.Context(), filepath.Join(w.dir, "vault")); err != nil {
		t.Fatal(err)
	}
	if w.lock, err = w.v.Lock(t.Context(), "g", vault.Holder{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.lock.Unlock() })
	return w
}

func (w *told) add(r stream.Record) stream.Position {
	w.t.Helper()
	if r.Kind.TakesPosition() {
		w.pos++
		r.Position = w.pos
	}
	w.clock++
	r.Time = w.clock
	if err := w.b.Append(&r); err != nil {
		w.t.Fatal(err)
	}
	if w.b.Size() > 8<<20 {
		w.put()
	}
	return r.Position
}

// put seals what was told so far and stores it.
func (w *told) put() {
	w.t.Helper()
	s, err := w.b.Seal(segment.Header{Group: "g", Sequence: w.prev.Sequence + 1, Previous: w.prev.Digest, Disks: []segment.Disk{w.disk}}, segment.State{Last: w.pos})
	if err != nil {
		w.t.Fatal(err)
	}
	name := filepath.Join(w.dir, "sealed")
	f, err := os.Create(name)
	if err == nil {
		_, err = s.WriteTo(f)
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		err = errors.Join(w.v.Put(w.t.Context(), w.lock, name, s.Summary), os.Remove(name))
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.prev = s.Summary
	w.b.Reset()
}

func (w *told) gap(ranges ...block.Range) stream.Position {
	var all []block.DiskRange
	for _, r := range ranges {
		all = append(all, block.DiskRange{Range: r})
	}
	return w.add(stream.Record{Kind: stream.KindGap, Cause: stream.CauseOverflow, Ranges: all})
}

func (w *told) fill(rank stream.Position, off int64, p []byte) {
	w.add(stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Position: rank, ValidFrom: w.pos, Range: block.Range{Off: off, Len: int64(len(p))}, Payload: p})
}

func (w *told) write(off int64, p []byte) {
	w.add(stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Range: block.Range{Off: off, Len: int64(len(p))}, Payload: p})
}

// firstCopy fills the whole disk, half with data and half with zeroes, and gives what it holds then.
func (w *told) firstCopy() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	content := make([]byte, w.disk.Size)
	rank := w.gap(block.Range{Len: w.disk.Size})
	const piece = 512 << 10
	for off := int64(0); off < w.disk.Size; off += piece {
		r := block.Range{Off: off, Len: min(piece, w.disk.Size-off)}
		if rng.IntN(2) == 0 {
			w.add(stream.Record{Kind: stream.KindFill, Fill: stream.FillZero, Position: rank, ValidFrom: rank, Range: r})
			continue
		}
		for i := r.Off; i < r.End(); i += 8 { // compresses, so that the test is quick
			content[i] = byte(rng.Uint32())
		}
		w.fill(rank, r.Off, content[r.Off:r.End()])
	}
	w.add(stream.Record{Kind: stream.KindSettled, Position: rank})
	return content
}

// verb runs the real program and gives its exit code and what it says.
func verb(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program.Binary(t), args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// holds compares the beginning of a file or device with what it is to hold.
func holds(t *testing.T, path string, want []byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(f, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s does not hold what the disk held", path)
	}
}

// TestRestoreFuzzy: a point inside a gap is refused, and given with --fuzzy,
// which names exactly what is uncertain.
func TestRestoreFuzzy(t *testing.T) {
	w := tell(t, 1<<20)
	content := w.firstCopy()
	good := w.add(stream.Record{Kind: stream.KindBookmark, Name: "good"})
	lost := []block.Range{{Off: 64 << 10, Len: 8 << 10}, {Off: 512 << 10, Len: 4 << 10}, {Off: 900 << 10, Len: 12 << 10}}
	w.gap(lost...)
	known := bytes.Repeat([]byte{7}, 4096)
	w.write(100<<10, known)
	copy(content[100<<10:], known)
	w.add(stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Position: w.pos, ValidFrom: w.pos, Range: lost[1], Payload: known}) // that one is known again
	copy(content[lost[1].Off:], known)
	w.add(stream.Record{Kind: stream.KindBookmark, Name: "bad"})
	w.put()
	to := filepath.Join(w.dir, "disk")
	args := []string{"restore", "--vault", w.v.Dir(), "g", "--to", to}

	for _, at := range []string{"latest", "bad", fmt.Sprintf("seq:%d", w.pos)} {
		code, out, errs := verb(t, append(args, "--at", at)...)
		if code != exitInsideGap || out != "" || !strings.Contains(errs, fmt.Sprintf("the newest point before it is seq:%d", good)) || !strings.Contains(errs, "--fuzzy") {
			t.Errorf("%s: code %d, %q, %q", at, code, out, errs)
		}
	}
	if left, _ := filepath.Glob(to + "*"); len(left) > 0 {
		t.Errorf("refused, and left %v", left)
	}
	code, out, errs := verb(t, append(args, "--at", "latest", "--fuzzy")...)
	for _, want := range []string{"NOT CONSISTENT", "20480 bytes are uncertain", "bytes 65536 to 73727 ", "bytes 921600 to 933887 "} {
		if code != exitOK || !strings.Contains(out, want) {
			t.Errorf("code %d; %q is not in\n%s%s", code, want, out, errs)
		}
	}
	holds(t, to, content) // where it is uncertain, what was known before

	var r restored
	code, out, errs = verb(t, append(args, "--at", "bad", "--fuzzy", "--json", "--force")...)
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != exitOK || r.Consistent || !slices.Equal(r.Uncertain, []block.Range{lost[0], lost[2]}) {
		t.Errorf("code %d, %v, %+v, %s", code, err, r, errs)
	}
	if !strings.Contains(errs, `"bytes_done":1048576,"bytes_total":1048576,"message_type":"progress"`) {
		t.Errorf("the progress does not end with everything: %s", errs)
	}
	code, out, errs = verb(t, append(args, "--at", "good", "--fuzzy", "--json", "--force")...)
	if r = (restored{}); json.Unmarshal([]byte(out), &r) != nil || code != exitOK || !r.Consistent || r.Uncertain == nil || len(r.Uncertain) != 0 {
		t.Errorf("a consistent point: code %d, %s%s", code, out, errs)
	}
	if _, out, _ := verb(t, append(args, "--at", "good", "--fuzzy", "--force")...); strings.Contains(out, "CONSISTENT") {
		t.Errorf("a consistent point: %s", out)
	}
}

// TestRestoreKilled: killed and interrupted at random moments and called again,
// it goes on where it was and the result is the same.
func TestRestoreKilled(t *testing.T) {
	const size, unit = 512 << 20, 4 << 20
	w := tell(t, size)
	content := w.firstCopy()
	w.put()
	targets := []string{filepath.Join(w.dir, "disk")}
	if os.Geteuid() == 0 {
		d := testkit.NewDisk(t, size)
		targets = []string{filepath.Join(filepath.Dir(d.File), "image"), d.Path} // in memory, both of them
	}
	states := []string{targets[0] + ".tidemark-restore"}
	for _, dev := range targets[1:] {
		states = append(states, "/run/tidemark/restore-"+filepath.Base(dev)+".state")
		t.Cleanup(func() { _ = os.Remove(states[1]) }) // there only where the test has failed
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	resumed := 0
	for i, to := range targets {
		args := []string{"restore", "--vault", w.v.Dir(), "g", "--at", "latest", "--to", to, "--json"}
		for _, c := range []struct {
			batches int64
			signal  syscall.Signal
		}{{0, syscall.SIGKILL}, {1, syscall.SIGKILL}, {2, syscall.SIGINT}} {
			moment := func() bool { return noted(states[i]) >= c.batches*32 }
			code, errs := endAt(t, args, c.signal, moment, time.Duration(rng.IntN(50))*time.Millisecond)
			if c.signal == syscall.SIGINT && code != exitOK && (code != exitInterrupted || !strings.Contains(errs, "the same command goes on where it was")) {
				t.Errorf("interrupted: code %d, %s", code, errs)
			}
		}
		had := noted(states[i])
		if had < 0 { // it was done before it was killed
			holds(t, to, content)
			continue
		}
		code, out, errs := verb(t, args...)
		var r restored
		if err := json.Unmarshal([]byte(out), &r); err != nil || code != exitOK || r.Resumed != had*unit {
			t.Fatalf("%s: %d units were noted: code %d, %v, %d bytes are resumed, %s", to, had, code, err, r.Resumed, errs)
		}
		resumed++
		holds(t, to, content)
		if _, err := os.Stat(states[i]); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the state is left: %v", to, err)
		}
	}
	if resumed == 0 {
		t.Error("every restore was done before it was killed")
	}
	st, err := os.Stat(targets[0])
	if err != nil || st.Size() != size {
		t.Fatal(st, err)
	}
	if used := blocksOf(st) * 512; used > size*2/3 {
		t.Errorf("the file takes %d of %d bytes: it is not sparse", used, size)
	}
}

// endAt starts the program and signals it some time after the moment has come;
// it may have ended by itself by then. A killed one has the code -1.
func endAt(t *testing.T, args []string, signal syscall.Signal, moment func() bool, after time.Duration) (code int, stderr string) {
	t.Helper()
	var errs bytes.Buffer
	cmd := exec.Command(program.Binary(t), args...)
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	defer time.AfterFunc(3*time.Minute, func() { _ = cmd.Process.Kill() }).Stop()
	program.Eventually(t, 3*time.Minute, "the moment to end it", func() error {
		select {
		case <-ended:
			return nil
		default:
		}
		if !moment() {
			return errors.New("it has not got so far")
		}
		return nil
	})
	select {
	case <-ended:
	case <-time.After(after):
	}
	_ = cmd.Process.Signal(signal) // it may have ended
	<-ended
	return cmd.ProcessState.ExitCode(), errs.String()
}

// noted is how many units a state file says are done; -1 where there is none.
func noted(state string) int64 {
	b, err := os.ReadFile(state)
	if err != nil || len(b) < 20 {
		return -1
	}
	head := int64(16+4) + int64(b[12]) + int64(b[13])<<8
	return (int64(len(b)) - head) / 28
}

// blocksOf is how many blocks of 512 bytes a file takes.
func blocksOf(st os.FileInfo) int64 { return st.Sys().(*syscall.Stat_t).Blocks }
