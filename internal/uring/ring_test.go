package uring

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
)

func newRing(t testing.TB, c Config) *Ring {
	t.Helper()
	testkit.Need(t, "uring")
	r, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// all waits for n completions and gives their results by user data.
func all(t *testing.T, r *Ring, n int) map[uint64]int32 {
	t.Helper()
	got := map[uint64]int32{}
	for len(got) < n {
		if err := r.SubmitFor(1, 10*time.Second); err != nil {
			t.Fatalf("after %d of %d: %v", len(got), n, err)
		}
		for c, ok := r.Reap(); ok; c, ok = r.Reap() {
			if _, twice := got[c.UserData]; twice {
				t.Fatalf("%d completed twice", c.UserData)
			}
			got[c.UserData] = c.Res
		}
	}
	return got
}

func TestProbe(t *testing.T) {
	testkit.Need(t, "uring")
	if err := Probe(OpRead, OpWrite, OpReadFixed, OpWriteFixed, OpFsync, OpFallocate, OpNop); err != nil {
		t.Error(err)
	}
	if err := Probe(OpRead, 254); !errors.Is(err, ErrUnavailable) {
		t.Errorf("an operation that no kernel has: %v", err)
	}
}

// TestFile: writes, reads, with registered buffers and files, fsync and
// fallocate do what the system calls of their names do.
func TestFile(t *testing.T) {
	for _, c := range []Config{{Entries: 8}, {Entries: 8, Big: true}, {Entries: 8, OneThread: true}} {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		r := newRing(t, c)
		f, err := os.Create(filepath.Join(t.TempDir(), "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		mem, err := Memory(3 * 4096)
		if err != nil {
			t.Fatal(err)
		}
		defer Free(mem)
		a, b, back := mem[:4096], mem[4096:8192], mem[8192:]
		fill(a, 1)
		fill(b, 2)
		if err := errors.Join(r.RegisterBuffers([][]byte{mem}), r.RegisterFiles([]int{int(f.Fd())})); err != nil {
			t.Fatal(err)
		}
		r.Next().Write(int(f.Fd()), a, 0, false, 1)
		q := r.Next()
		q.Write(0, b, 8192, true, 2)
		q.Fixed(0)
		q.FixedFile()
		if r.Pending() != 2 {
			t.Errorf("%d pending", r.Pending())
		}
		if got := all(t, r, 2); got[1] != 4096 || got[2] != 4096 {
			t.Fatal(got)
		}
		r.Next().Fsync(int(f.Fd()), true, 3)
		r.Next().Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096, 4)
		q = r.Next()
		q.Read(int(f.Fd()), back, 8192, 5)
		q.Fixed(0)
		r.Next().Read(-1, back, 0, 6)
		if got := all(t, r, 4); got[3] != 0 || got[5] != 4096 || got[6] != -int32(unix.EBADF) || got[4] != 0 && got[4] != -int32(unix.EOPNOTSUPP) {
			t.Fatal(got)
		}
		if !bytes.Equal(back, b) {
			t.Error("what was read is not what was written")
		}
		want := append(append(bytes.Clone(a), make([]byte, 4096)...), b...)
		got, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		if clear(want[:4096]); !bytes.Equal(got, want) && !bytes.Equal(got[:4096], a) { // a file system without holes
			t.Error("the file holds something else")
		}
		if err := r.UnregisterBuffers(); err != nil {
			t.Error(err)
		}
	}
}

func fill(p []byte, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	for i := range p {
		p[i] = byte(rnd.Uint32())
	}
}

// TestManyRounds: the rings wrap many times at random fill levels, also where
// completions wait unreaped, and every submission completes exactly once.
func TestManyRounds(t *testing.T) {
	r := newRing(t, Config{Entries: 8, Completions: 32})
	rnd := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	next, done := uint64(0), map[uint64]bool{}
	reap := func() {
		for c, ok := r.Reap(); ok; c, ok = r.Reap() {
			if c.UserData >= next || done[c.UserData] || c.Res != 0 {
				t.Fatalf("completion %+v, %d submitted", c, next)
			}
			done[c.UserData] = true
		}
	}
	for range 5000 {
		for range rnd.IntN(9) {
			q := r.Next()
			if q == nil {
				break
			}
			q.Nop(next)
			next++
		}
		if rnd.IntN(3) > 0 {
			if err := r.Submit(0); err != nil {
				t.Fatal(err)
			}
		}
		if rnd.IntN(4) == 0 {
			reap()
		}
	}
	for len(done) < int(next) {
		if err := r.SubmitFor(1, 10*time.Second); err != nil {
			t.Fatalf("%d of %d: %v", len(done), next, err)
		}
		reap()
	}
	if err := r.SubmitFor(1, time.Millisecond); !errors.Is(err, ErrTimeout) {
		t.Errorf("waiting for nothing: %v", err)
	}
}

// TestFull: a ring that is full says so, and has room again after Submit.
func TestFull(t *testing.T) {
	r := newRing(t, Config{Entries: 4})
	n := 0
	for q := r.Next(); q != nil; q = r.Next() {
		q.Nop(uint64(n))
		n++
	}
	if n != 4 {
		t.Fatalf("%d entries", n)
	}
	if err := r.Submit(4); err != nil {
		t.Fatal(err)
	}
	if r.Next() == nil {
		t.Error("no room after Submit")
	}
	r.Next().Nop(4)
}

func TestNoAllocation(t *testing.T) {
	r := newRing(t, Config{Entries: 8})
	if n := testing.AllocsPerRun(100, func() {
		r.Next().Nop(1)
		if err := r.Submit(1); err != nil {
			t.Fatal(err)
		}
		if _, ok := r.Reap(); !ok {
			t.Fatal("nothing to reap")
		}
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// TestTwoSides: one goroutine submits while another reaps.
func TestTwoSides(t *testing.T) {
	r := newRing(t, Config{Entries: 4})
	const n = 2000
	done := make(chan error, 1)
	go func() {
		for next := uint64(0); next < n; {
			if err := r.Wait(1); err != nil {
				done <- err
				return
			}
			for c, ok := r.Reap(); ok; c, ok = r.Reap() {
				next += c.UserData
			}
		}
		done <- nil
	}()
	for range n {
		r.Next().Nop(1)
		if err := r.Submit(0); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestEntriesAreClean: nothing of what an entry asked for is left when it is used again.
func TestEntriesAreClean(t *testing.T) {
	r := newRing(t, Config{Entries: 1})
	for range 3 {
		q := r.Next()
		if *q != (SQE{}) {
			t.Fatalf("%+v", *q)
		}
		*q = SQE{Opcode: OpNop, UserData: 7, Addr3: 9, BufIndex: 3}
		if err := r.Submit(1); err != nil {
			t.Fatal(err)
		}
		if _, ok := r.Reap(); !ok {
			t.Fatal("nothing completed")
		}
	}
}

// TestLinks: what follows a failure is cancelled, or done all the same; a place of a
// table in which no driver has put anything is no memory.
func TestLinks(t *testing.T) {
	r := newRing(t, Config{Entries: 4})
	if err := r.RegisterTable(1); err != nil {
		t.Fatal(err)
	}
	results := func(n int) []int32 {
		t.Helper()
		res := make([]int32, n)
		for left := n; left > 0; {
			if err := r.SubmitFor(1, 10*time.Second); err != nil {
				t.Fatal(err)
			}
			for c, ok := r.Reap(); ok; c, ok = r.Reap() {
				res[c.UserData] = c.Res
				left--
			}
		}
		return res
	}
	for _, always := range []bool{false, true} {
		q, want := r.Next(), -int32(unix.ECANCELED)
		q.Read(-1, make([]byte, 512), 0, 0) // seen when it is done, not when it is taken in, which breaks every link
		if q.Link(); always {
			q.LinkAlways()
			want = 0
		}
		r.Next().Nop(1)
		if res := results(2); res[0] != -int32(unix.EBADF) || res[1] != want {
			t.Errorf("always %v: %v", always, res)
		}
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r.Next().WriteBuffer(int(f.Fd()), 0, 4096, 0, 0)
	if res := results(1); res[0] != -int32(unix.EFAULT) {
		t.Errorf("an empty place: %v", res)
	}
}
