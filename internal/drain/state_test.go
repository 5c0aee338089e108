package drain

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"tidemark/internal/sim"
)

func sampleState() *state {
	return &state{group: testGroup, number: 12, disk: allDisks, most: 8 << 20, ranges: true, stage: filling, at: 1 << 40, time: 1_700_000_000_000_000_001,
		place: place{Sequence: 77, Entry: 5}, until: 80, next: 1, off: 4096, told: 79, mixed: 1<<40 + 7, asked: true}
}

// TestStateGolden pins the format of a consumer's file.
func TestStateGolden(t *testing.T) {
	disk := sim.New(1)
	f := file{fs: disk, path: "/c.consumer"}
	first := *sampleState()
	first.number, first.disk = 11, 1
	if err := errors.Join(f.create(&first), f.save(sampleState()), f.note(15)); err != nil {
		t.Fatal(err)
	}
	have, err := disk.ReadFile("/c.consumer")
	if err != nil {
		t.Fatal(err)
	}
	const name = "testdata/version-1.consumer"
	if want, err := os.ReadFile(name); err != nil || !bytes.Equal(want, have) {
		t.Errorf("the format has changed: %v; %s", err, name)
	}
	got, noted, err := (&file{fs: disk, path: "/c.consumer"}).load()
	if err != nil || noted != 15 || !reflect.DeepEqual(&got, sampleState()) {
		t.Errorf("read %+v, noted %d, %v", got, noted, err)
	}
}

// TestStateCrashes: cut at every step of making a consumer and of its commits, it
// is as acknowledged, or as tried; never anything else, and never damaged.
func TestStateCrashes(t *testing.T) {
	for seed := range sim.Seeds(20) {
		for at := 1; at < 60; at++ {
			disk := sim.New(seed)
			if err := errors.Join(disk.MkdirAll("/d", 0o700), disk.SyncDir("/")); err != nil {
				t.Fatal(err)
			}
			disk.CrashAt(at)
			f, v := file{fs: disk, path: "/d/c"}, *sampleState()
			v.number = 0
			made := f.create(&v) == nil
			acked, tried := uint64(0), uint64(0)
			for n := uint64(1); made && n < 8; n++ {
				v.number, tried = n, n
				if f.note(n+1) != nil || f.save(&v) != nil {
					break
				}
				acked = n
			}
			crashed := disk.Crashed()
			after := disk.Crash()
			got, _, err := (&file{fs: after, path: "/d/c"}).load()
			switch {
			case !made && errors.Is(err, os.ErrNotExist):
			case err != nil:
				t.Fatalf("seed %d, crash at %d: %v\n%s", seed, at, err, after.History())
			case got.number < acked || got.number > tried:
				t.Fatalf("seed %d, crash at %d: %d batches are committed, %d were acknowledged and %d tried\n%s", seed, at, got.number, acked, tried, after.History())
			}
			if !crashed {
				break
			}
		}
	}
}

// TestStateFails: a commit that fails is not done, or done; the next one is.
func TestStateFails(t *testing.T) {
	for n := range 4 {
		disk, bad := sim.New(uint64(n)), errors.New("no")
		f, v := file{fs: disk, path: "/c"}, *sampleState()
		if err := f.create(&v); err != nil {
			t.Fatal(err)
		}
		disk.Fail(n+1, 1, bad)
		v.number = 13
		failed := f.save(&v)
		v.number = 14
		if err := f.save(&v); err != nil {
			if failed != nil {
				t.Fatal(err)
			}
			if err := f.save(&v); err != nil {
				t.Fatal(err)
			}
		}
		if got, _, err := (&file{fs: disk.Crash(), path: "/c"}).load(); err != nil || got.number != 14 {
			t.Errorf("failure %d: committed %d, %v", n, got.number, err)
		}
	}
}

// TestDamagedState: a consumer whose state is damaged is refused by name, and can be removed.
func TestDamagedState(t *testing.T) {
	c := newReplica(t, 3, Options{})
	c.in.more(100)
	if more, err := c.take(0); !more || err != nil {
		t.Fatal(more, err)
	}
	c.g.Close()
	path := "/state/drain/c.consumer"
	f, err := c.fs.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{50, slotEvery + 50} {
		if _, err := f.WriteAt([]byte{0xff, 0xfe, 0xfd}, at); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	if err := c.open(); err != nil {
		t.Fatal(err)
	}
	_, err = c.g.Next(t.Context(), "c", 0)
	if !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "consumer c") || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "drain rm") {
		t.Errorf("next says %v", err)
	}
	if err := c.g.Make(t.Context(), "c", Options{}); !errors.Is(err, ErrState) {
		t.Errorf("it was made anew over the damaged one: %v", err)
	}
	if list := c.g.List(); len(list) != 1 || list[0].Err == nil {
		t.Errorf("listed as %+v", list)
	}
	if err := c.g.Remove(t.Context(), "c", false); !errors.Is(err, ErrState) {
		t.Errorf("removed without force: %v", err)
	}
	if err := c.g.Remove(t.Context(), "c", true); err != nil {
		t.Error(err)
	}
	if err := c.g.Make(t.Context(), "c", Options{}); err != nil {
		t.Error(err)
	}
}

// FuzzState: no file makes the decoder panic, and what it takes stands there as
// it would be written.
func FuzzState(f *testing.F) {
	f.Add(sampleState().encode(9))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		v, turn, ok := decode(b)
		if !ok {
			return
		}
		again, turnAgain, ok := decode(v.encode(turn))
		if !ok || turnAgain != turn || !reflect.DeepEqual(v, again) {
			t.Errorf("%+v became %+v", v, again)
		}
		decodeNote(append(b, make([]byte, noteSize)...)[:noteSize])
	})
}
