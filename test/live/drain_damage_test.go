package live

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/client"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// follower is a consumer with its copy.
type follower struct {
	*client.Consumer
	t    *testing.T
	name string
	copy []byte
}

func newFollower(t *testing.T, d *program.Daemon, name string, size int64) *follower {
	f := &follower{client.Dial(filepath.Join(d.Dir, "socket")).Consumer("g", name, client.Options{}), t, name, make([]byte, size)}
	f.all(client.ErrNothing)
	return f
}

// all applies and commits until next fails, as it should, and gives how many batches came.
func (f *follower) all(end error) (n int) {
	f.t.Helper()
	for {
		b, err := f.Next(f.t.Context(), 0)
		if err != nil {
			if !errors.Is(err, end) {
				f.t.Fatalf("consumer %s: %v, want %v", f.name, err, end)
			}
			return n
		}
		for _, r := range b.Records {
			if clear(f.copy[r.Offset : r.Offset+r.Length]); r.Payload != nil {
				copy(f.copy[r.Offset:], r.Payload)
			}
		}
		if err := f.Commit(f.t.Context(), b.Number); err != nil {
			f.t.Fatal(err)
		}
		n++
	}
}

// TestDrainDamagedSegment: a segment in the vault that a byte of a payload is
// changed in stops the consumers that come to it, by its name, and gives nothing
// of it; the others and the group go on. Past it leads a fill that needs nothing
// of it, a clear that skips, or the segment as it was.
func TestDrainDamagedSegment(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		disk := testkit.NewDisk(t, 8*mib)
		d := program.New(t)
		d.Protect("g", "--seal-every", "50ms", disk.Path)
		f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 64<<10)
		write := func(off int64) {
			t.Helper()
			for i := range buf {
				buf[i] = byte(rng.Uint32()) // which no compression makes smaller
			}
			if _, err := f.WriteAt(buf, off); err != nil {
				t.Fatal(err)
			}
			d.Settle("g")
		}
		waits, fills, skips, ahead := newFollower(t, d, "waits", 8*mib), newFollower(t, d, "fills", 8*mib), newFollower(t, d, "skips", 8*mib), newFollower(t, d, "ahead", 8*mib)

		write(mib)
		had := vaultFiles(t, d)
		write(2 * mib)
		bad, whole := largest(t, slices.DeleteFunc(vaultFiles(t, d), func(f string) bool { return slices.Contains(had, f) }))
		write(3 * mib) // with it the spool lets go of the one before
		ahead.all(client.ErrNothing)
		replace(t, bad, flipped(whole, len(whole)/2))

		front := bytes.Clone(ahead.copy)
		clear(front[2*mib:])
		for _, c := range []*follower{waits, fills, skips} {
			c.all(client.ErrDamaged)
			same(t, "the copy of consumer "+c.name+" in front of the damaged segment", front, c.copy)
		}
		d.Restart()
		d.Await("g", "online", online)
		to := filepath.Join(d.Dir, "never")
		text := d.Refused(exitDamaged, "drain", "next", "g", "waits", "--to", to)
		if !regexp.MustCompile(`consumer waits: segment \d+`).MatchString(text) {
			t.Errorf("the segment is not named: %s", text)
		}
		if b, err := os.ReadFile(to); err == nil && len(b) > 0 {
			t.Errorf("a batch that could not be made left %d bytes", len(b))
		}
		program.Eventually(t, patience, "two writes are pending for waits, none for ahead", func() error {
			if c, o := consumerOf(t, d, "g", "waits"), consumerOf(t, d, "g", "ahead"); c.pending() != 128<<10 || o.pending() != 0 {
				return fmt.Errorf("%d and %d bytes are", c.pending(), o.pending())
			}
			return nil
		})

		write(4 * mib)
		ahead.all(client.ErrNothing)
		same(t, "the copy of the consumer behind it", content(t, disk.Path), ahead.copy)

		d.Run("drain", "clear", "g", "skips", "--skip")
		skips.copy = bytes.Clone(ahead.copy)
		if n := skips.all(client.ErrNothing); n != 0 {
			t.Errorf("%d batches came behind a clear that skips", n)
		}
		if c := consumerOf(t, d, "g", "skips"); c.NeedsFill || c.Cleared || c.Behind != 0 {
			t.Errorf("after a clear that skips: %+v", c)
		}
		d.Run("drain", "clear", "g", "fills")
		if n := fills.all(client.ErrDamaged); n != 0 {
			t.Errorf("%d batches of a fill that needs the damaged segment came", n)
		}
		write(2 * mib) // what the damaged segment holds is not needed any more
		d.Run("drain", "clear", "g", "fills")
		fills.all(client.ErrNothing)
		same(t, "the copy that was filled past it", content(t, disk.Path), fills.copy)
		skips.all(client.ErrNothing)
		same(t, "the copy that skipped it", content(t, disk.Path), skips.copy)

		waits.all(client.ErrDamaged)
		replace(t, bad, whole)
		waits.all(client.ErrNothing)
		same(t, "the copy that waited", content(t, disk.Path), waits.copy)
		if g := d.Group("g"); g.State != "protected" {
			t.Errorf("the group is %s: %+v", g.State, g.Conditions)
		}
	})
}

// largest is the largest of some files, and its content.
func largest(t *testing.T, files []string) (path string, content []byte) {
	t.Helper()
	for _, f := range files {
		if b, err := os.ReadFile(f); err != nil {
			t.Fatal(err)
		} else if strings.HasSuffix(f, ".seg") && len(b) > len(content) {
			path, content = f, b
		}
	}
	if path == "" {
		t.Fatalf("no segment in %q", files)
	}
	return path, content
}

// replace puts another file in the place of one that others may link to.
func replace(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := errors.Join(os.Remove(path), os.WriteFile(path, content, 0o600)); err != nil {
		t.Fatal(err)
	}
}
