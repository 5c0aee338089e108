package live

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"tidemark/internal/control/api"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestStatistics: what a status tells of writes and bookmarks is what was done,
// and a scrape tells the same.
func TestStatistics(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		dir := testkit.Dir(t)
		socket := filepath.Join(dir, "metrics")
		m := newMarked(t, rng, true, "--metrics", socket)
		var sizes [2][]int64
		for i, f := range m.c.disks {
			for range 5 {
				n := int64(512) << rng.IntN(5)
				if _, err := f.WriteAt(aligned(t, int(n)), rng.Int64N(8)<<20); err != nil {
					t.Fatal(err)
				}
				sizes[i] = append(sizes[i], n)
			}
		}
		m.d.Run("bookmark", "ga", "alone")
		m.d.Run("bookmark", "ga", "gb", "both")
		m.d.Run("bookmark", "--prepare", "ga", "gb", "taken-back")
		m.d.Refused(exitInUse, "bookmark", "ga", "gb", "taken-back") // its name is taken
		m.d.Run("bookmark", "--revoke", "taken-back")
		m.d.Refused(exitInUse, "bookmark", "ga", "alone")
		m.drainAll("ga")
		var st api.Status
		program.Eventually(t, patience, "all is in the vault", func() error {
			if err := json.Unmarshal([]byte(m.d.Run("status", "--json")), &st); err != nil {
				t.Fatal(err)
			}
			for _, g := range st.Groups {
				if durable, vault := all(g.Stats.Durable), all(g.Stats.Vault); g.Stats.PendingBytes > 0 || durable == 0 || vault != durable || len(st.Groups) != 2 {
					return fmt.Errorf("group %s: %d bytes pending, %d segments in the spool, %d in the vault", g.Name, g.Stats.PendingBytes, durable, vault)
				}
			}
			return nil
		})
		for i, g := range st.Groups {
			d := g.Disks[0]
			want := make([]uint64, len(d.WriteSizes))
			var bytes uint64
			for _, n := range sizes[i] {
				bytes += uint64(n)
				for class := range want {
					if n == 512<<class {
						want[class]++
					}
				}
			}
			if d.Gaps != 1 || d.PendingBytes != 0 || d.PendingSeconds != 0 || d.ChurnPeakBytesPerSecond == 0 || d.ChurnPeakBytesPerSecond > bytes {
				t.Errorf("group %s: its disk %+v", g.Name, d)
			}
			if d.TakenWrites != 5 || d.TakenBytes != bytes {
				t.Errorf("group %s: %d writes of %d bytes, want 5 of %d", g.Name, d.TakenWrites, d.TakenBytes, bytes)
			}
			for class := range want {
				if d.WriteSizes[class] != want[class] {
					t.Errorf("group %s: %v writes by size, want %v", g.Name, d.WriteSizes, want)
					break
				}
			}
			if g.Stats.Gaps["initial"] != 1 || g.Stats.ModeSeconds[api.ModeData] <= 0 {
				t.Errorf("group %s: %+v", g.Name, g.Stats)
			}
		}
		if a, b := st.Groups[0].Stats.Bookmarks, st.Groups[1].Stats.Bookmarks; a != (api.BookmarkCounts{Cut: 2, Refused: 2, Dropped: 1}) || b != (api.BookmarkCounts{Held: 1, Refused: 1, Dropped: 1}) {
			t.Errorf("bookmarks %+v and %+v", a, b)
		}
		if l := st.Groups[1].Stats.LastBookmark; l == nil || l.Name != "both" || l.Barrier != "held" || l.HeldSeconds <= 0 {
			t.Errorf("the last bookmark: %+v", l)
		}
		if a, b := all(st.Groups[0].Stats.Drained), all(st.Groups[1].Stats.Drained); a == 0 || b != 0 {
			t.Errorf("%d batches of ga were drained, %d of gb, which has no consumer", a, b)
		}
		if st.Totals.Bookmarks != (api.BookmarkCounts{Cut: 2, Held: 1, Refused: 3, Dropped: 2}) || st.Totals.Gaps != 2 || st.Totals.ChurnBytesPerSecond <= 0 {
			t.Errorf("totals %+v", st.Totals)
		}
		text := m.d.Run("status", "gb")
		for _, want := range []string{"0 put by a cut, 1 with writes held, 1 refused, 1 dropped; the last was both, barrier held", "1 initial", "WRITES OF AT MOST", "BUSIEST SECOND", "durable    half within"} {
			if !strings.Contains(text, want) {
				t.Errorf("%q is not in\n%s", want, text)
			}
		}
		if text := m.d.Run("status"); !strings.Contains(text, "2 gaps; bookmarks 3 put, 3 refused, 2 dropped") {
			t.Errorf("the totals are not in\n%s", text)
		}
		text = scrape(t, socket)
		for _, want := range []string{`tidemark_group_bookmarks_total{group="gb",outcome="held"} 1`, `tidemark_group_state{group="ga",state="protected"} 1`, `tidemark_disk_write_size_bytes_count{disk="served",group="gb"} 5`,
			`tidemark_disk_pending_bytes{disk="served",group="gb"} 0`, `tidemark_disk_gaps_total{disk="served",group="gb"} 1`,
			`tidemark_consumer_behind_positions{consumer="c",group="ga"} 0`, `tidemark_consumer_needs_fill{consumer="c",group="ga"} 0`} {
			if !strings.Contains(text, want) {
				t.Errorf("%s is not in\n%s", want, text)
			}
		}
		program.Eventually(t, patience, "what is pending for the consumer is counted", func() error {
			if !strings.Contains(scrape(t, socket), `tidemark_consumer_pending_bytes{consumer="c",group="ga"} 0`) {
				return program.ErrNotYet
			}
			return nil
		})
		m.d.Kill()
		m.d.Start() // over the socket that is left
		if text := scrape(t, socket); !strings.Contains(text, "tidemark_up 1") {
			t.Error(text)
		}
		m.d.Stop()
		if _, err := os.Stat(socket); err == nil {
			t.Error("the socket is left behind")
		}
		m.d.Start()
	})
}

// drainAll commits a consumer's batches up to the newest.
func (m *marked) drainAll(group string) {
	m.t.Helper()
	for n := 1; ; n++ {
		if _, err := m.d.Verb("drain", "next", group, "c", "--to", filepath.Join(m.d.Dir, "batch")); err != nil {
			if e := (*program.Error)(nil); n == 1 || !errors.As(err, &e) || e.Exit != exitNothing {
				m.t.Fatal(err)
			}
			return
		}
		m.d.Run("drain", "commit", group, "c", strconv.Itoa(n))
	}
}

const exitNothing = 12

func all(l api.Latency) (n uint64) {
	for _, c := range l.Counts {
		n += c
	}
	return n
}

// scrape reads the metrics at a unix socket.
func scrape(t *testing.T, socket string) string {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	answer, err := c.Get("http://tidemark/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v: %s", answer.Status, err, b)
	}
	return string(b)
}
