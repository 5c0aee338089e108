package live

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/control/api"
	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestNoGroups: a daemon with nothing to do says so, and that is no failure.
func TestNoGroups(t *testing.T) {
	d := program.New(t)
	var st map[string]any
	if err := json.Unmarshal([]byte(d.Run("status", "--json")), &st); err != nil {
		t.Fatal(err)
	}
	if groups, ok := st["groups"].([]any); !ok || len(groups) != 0 {
		t.Errorf("groups are %v, want an empty array", st["groups"])
	}
}

// TestPositions: what status calls captured covers every write that has ended;
// an idle group is durable to there, stays so, and writes nothing.
func TestPositions(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		s := newSteady(t, rng, "", "")
		last := s.d.Settle("g").Captured
		for range 4 {
			n := uint64(1 + rng.IntN(40))
			for range n {
				s.writeAt(s.anywhere(testkit.Sector), testkit.Sector)
			}
			if g := s.d.Group("g"); g.Captured != last+n {
				t.Fatalf("captured position %d after %d writes from %d on", g.Captured, n, last)
			}
			last += n
			last += s.atOnce(last)
			if g := s.d.Settle("g"); g.Durable != last || g.Lag != 0 {
				t.Errorf("durable position %d, lag %v, of an idle group at %d", g.Durable, g.Lag, last)
			}
		}
		files := vaultFiles(t, s.d)
		program.Eventually(t, patience, "three seals could have been", func() error {
			if g := s.d.Group("g"); g.Captured != last || g.Durable != last {
				t.Fatalf("an idle group went from %d to %d, durable %d", last, g.Captured, g.Durable)
			}
			return since(t, s.d, 3*time.Second)
		})
		if now := vaultFiles(t, s.d); !slices.Equal(files, now) {
			t.Errorf("an idle group wrote to its vault: %d files, were %d", len(now), len(files))
		}
	})
}

// atOnce asks the daemon for its position right after each of some writes, in
// less time than it lets pass between two looks at the ring. It gives their number.
func (s *steady) atOnce(last uint64) uint64 {
	s.t.Helper()
	client := api.Dial(filepath.Join(s.d.Dir, "socket"))
	const n = 20
	for i := range uint64(n) {
		s.writeAt(s.anywhere(testkit.Sector), testkit.Sector)
		st, err := client.Status(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		if at := uint64(st.Groups[0].CapturedPosition); at != last+i+1 {
			s.t.Fatalf("captured position %d right after write %d", at, last+i+1)
		}
	}
	return n
}

// since says whether the newest segment of a vault is older than an age.
func since(t *testing.T, d *program.Daemon, age time.Duration) error {
	t.Helper()
	st, err := os.Stat(newestSegment(t, d))
	if err != nil {
		t.Fatal(err)
	}
	if time.Since(st.ModTime()) < age {
		return program.ErrNotYet
	}
	return nil
}

// newestSegment is the file of a vault's newest segment: their names are in order.
func newestSegment(t *testing.T, d *program.Daemon) string {
	t.Helper()
	segments := slices.DeleteFunc(vaultFiles(t, d), func(f string) bool { return filepath.Ext(f) != ".seg" })
	if len(segments) == 0 {
		t.Fatalf("no segments in %s", d.Vault)
	}
	return slices.Max(segments)
}

// TestPoints: the array is as it was promised, and all that it has can be restored.
func TestPoints(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		s := newSteady(t, rng, "", "")
		s.write(mib)
		s.bookmark("one")
		s.write(mib)
		s.d.Settle("g")
		var raw []map[string]any
		if err := json.Unmarshal([]byte(s.d.Run("points", "--vault", s.d.Vault, "g", "--json")), &raw); err != nil {
			t.Fatal(err)
		}
		for _, p := range raw {
			for _, field := range []string{"position", "time", "bookmark", "consistency", "stretch"} {
				if _, ok := p[field]; !ok {
					t.Errorf("%v lacks %s", p, field)
				}
			}
		}
		var before time.Time
		for _, p := range s.d.Points("g") {
			at, err := time.Parse(time.RFC3339Nano, p.Time)
			if err != nil || at.Before(before) {
				t.Errorf("time %s after %v: %v", p.Time, before, err)
			}
			before = at
			want := image(t, s.d, "g", "", seq(p.Position))
			if p.Bookmark != "" {
				same(t, "at bookmark "+p.Bookmark, s.marks[p.Bookmark], want)
				same(t, "at the time of "+p.Bookmark, want, image(t, s.d, "g", "", p.Time))
			}
		}
		same(t, "latest", content(t, s.path), image(t, s.d, "g", "", "latest"))
		end := s.d.Group("g").Captured
		s.d.Refused(exitNotFound, "restore", "--vault", s.d.Vault, "g", "--at", seq(end+1), "--to", s.d.Dir+"/never")
		s.d.Refused(exitNotFound, "restore", "--vault", s.d.Vault, "g", "--at", "no-such-mark", "--to", s.d.Dir+"/never")
		if _, err := os.Stat(s.d.Dir + "/never"); err == nil {
			t.Error("a refused restore left a file behind")
		}
	})
}

// TestLatestIsNeverOlder: with the newest object damaged, cut short or gone
// there is no latest. The newest sound point is named, and can be had.
func TestLatestIsNeverOlder(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		s := newSteady(t, rng, "", "")
		s.write(mib)
		s.bookmark("sound")
		s.d.Settle("g")
		s.write(mib)
		s.d.Settle("g")
		s.d.Stop()
		newest := newestSegment(t, s.d)
		whole, err := os.ReadFile(newest)
		if err != nil {
			t.Fatal(err)
		}
		for what, spoilt := range map[string][]byte{
			"a byte":         flipped(whole, rng.IntN(len(whole))),
			"its last bytes": flipped(whole, len(whole)-1-rng.IntN(64)),
			"its end":        whole[:rng.IntN(len(whole))],
			"all of it":      nil,
		} {
			if err := os.Remove(newest); err != nil { // others may link to it
				t.Fatal(err)
			}
			if spoilt != nil {
				if err := os.WriteFile(newest, spoilt, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s.noLatest(what)
			if err := os.WriteFile(newest, whole, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		same(t, "latest, mended", content(t, s.path), image(t, s.d, "g", "", "latest"))
	})
}

// noLatest sees what is said of a vault whose newest segment has lost something.
func (s *steady) noLatest(what string) {
	s.t.Helper()
	to := filepath.Join(s.d.Dir, "never")
	text := s.d.Refused(exitDamaged, "restore", "--vault", s.d.Vault, "g", "--at", "latest", "--to", to)
	if _, err := os.Stat(to); err == nil {
		s.t.Errorf("without %s: a refused restore left a file behind", what)
	}
	named := regexp.MustCompile(`seq:(\d+)`).FindString(text)
	if named == "" {
		s.t.Fatalf("without %s no sound point is named: %s", what, text)
	}
	image(s.t, s.d, "g", "", named)
	same(s.t, "at sound, without "+what, s.marks["sound"], image(s.t, s.d, "g", "", "sound"))
	if text := s.d.Refused(exitDamaged, "verify", "--vault", s.d.Vault, "g"); !strings.Contains(text, "Group g") || !strings.Contains(text, "spoils") {
		s.t.Errorf("verify does not name the group and what is spoiled without %s: %s", what, text)
	}
}

// flipped is a copy of b with another bit in one byte.
func flipped(b []byte, at int) []byte {
	b = slices.Clone(b)
	b[at] ^= 1 << (at % 8)
	return b
}

// TestRestoreRefuses: what must not be overwritten is not, whoever insists.
func TestRestoreRefuses(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	free := testkit.NewDisk(t, steadyDisk)
	small := testkit.NewDisk(t, steadyDisk-4096)
	mounted := testkit.NewDisk(t, 2*steadyDisk)
	testkit.Mkfs(t, mounted.Path, "ext4")
	testkit.Mount(t, mounted.Path)
	below := testkit.NewDisk(t, steadyDisk)
	above, err := loop.Attach(below.Path, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { above.Close(); _ = loop.Detach(above.Path) })
	s := newSteady(t, rng, "", "")
	s.d.Settle("g")
	try := func(exit int, to string, args ...string) {
		t.Helper()
		was := content(t, to)
		s.d.Refused(exit, append([]string{"restore", "--vault", s.d.Vault, "g", "--at", "before", "--to", to}, args...)...)
		same(t, to+" after a refusal", was, content(t, to))
	}
	always := func(exit int, to string) {
		t.Helper()
		try(exit, to)
		try(exit, to, "--force")
	}
	always(exitInUse, mounted.Path)
	always(exitInUse, below.Path)
	always(exitInUse, s.path)
	always(exitRefused, small.Path)
	s.d.Kill()
	always(exitInUse, s.path) // by the pins alone
	s.d.Start()
	s.d.Await("g", "taken over", online)
	s.d.Run("restore", "--vault", s.d.Vault, "g", "--at", "before", "--to", free.Path)
	same(t, "restored", s.marks["before"], content(t, free.Path))
	s.write(mib)
	s.bookmark("later")
	s.d.Settle("g")
	later := []string{"restore", "--vault", s.d.Vault, "g", "--at", "later", "--to", free.Path}
	s.d.Refused(exitRefused, later...)
	same(t, "not empty", s.marks["before"], content(t, free.Path))
	s.d.Run(append(later, "--force")...)
	same(t, "forced", s.marks["later"], content(t, free.Path))
	s.d.Run("unprotect", "g")
	s.d.Run("restore", "--vault", s.d.Vault, "g", "--at", "before", "--to", s.path, "--force")
	same(t, "the disk itself, not protected any more", s.marks["before"], content(t, s.path))
}

// TestPinsOfADiskThatIsGone: a tap that was left behind says nothing about the
// disk that has its number now.
func TestPinsOfADiskThatIsGone(t *testing.T) {
	s := newSteady(t, rand.New(rand.NewPCG(3, 4)), "", "")
	s.d.Settle("g")
	s.d.Kill()
	s.file.Close()
	file := filepath.Join(filepath.Dir(s.backing), "other")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, steadyDisk); err != nil {
		t.Fatal(err)
	}
	swap(t, s.path, file)
	s.d.Run("restore", "--vault", s.d.Vault, "g", "--at", "before", "--to", s.path)
	same(t, "restored", s.marks["before"], content(t, s.path))
}

// swap detaches a loop device and gives its number to another file, also where
// somebody else is quicker at first.
func swap(t *testing.T, path, file string) {
	t.Helper()
	if err := loop.Detach(path); err != nil {
		t.Fatal(err)
	}
	program.Eventually(t, patience, path+" is free", func() error {
		info, err := loop.Status(path)
		if err == nil {
			return &os.PathError{Op: "attach", Path: info.Backing, Err: unix.EBUSY}
		}
		testkit.Run(t, "losetup", path, file)
		return nil
	})
	t.Cleanup(func() {
		if info, err := loop.Status(path); err == nil && info.Backing == file {
			_ = loop.Detach(path)
		}
	})
}
