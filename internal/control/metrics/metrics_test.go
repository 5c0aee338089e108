package metrics

import (
	"context"
	"errors"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/control/api"
	"tidemark/internal/health"
)

func scrape(t *testing.T, st api.Status, err error) string {
	t.Helper()
	server := httptest.NewServer(Handler(func(context.Context) (api.Status, error) { return st, err }))
	defer server.Close()
	answer, failed := server.Client().Get(server.URL + "/metrics")
	if failed != nil {
		t.Fatal(failed)
	}
	defer answer.Body.Close()
	b, _ := io.ReadAll(answer.Body)
	if answer.StatusCode != 200 {
		t.Fatalf("%s: %s", answer.Status, b)
	}
	return string(b)
}

func example() api.Status {
	pending := int64(14)
	latency := api.Latency{BoundsSeconds: []float64{0.5, 1}, Counts: []uint64{2, 3, 4}, SumSeconds: 7}
	return api.Status{Version: "1.2", Totals: api.Totals{WriteSizeBounds: []int64{512, 1024}}, Conditions: []health.Condition{{Code: "not-root", Severity: health.Warning}},
		Groups: []api.Group{{Name: "db", State: api.Protected, Mode: api.ModeData, RingUsedBytes: 5,
			Disks: []api.Disk{{Name: "sdb", TakenBytes: 3000, ZeroedBytes: 72, WriteSizes: []uint64{1, 2, 3},
				Gaps: 6, ChurnBytesPerSecond: 7.5, ChurnPeakBytesPerSecond: 8, PendingBytes: 9, PendingSeconds: 10.5}},
			Consumers: []api.Consumer{{Name: "copy", Behind: 11, PendingBytes: &pending, LagSeconds: 12.5, Outstanding: 13, NeedsFill: true},
				{Name: "new"}, {Name: "bad", Error: "damaged"}},
			Stats: api.GroupStats{PendingSeconds: 2.5, ModeSeconds: map[api.Mode]float64{api.ModeData: 60, "offline": 1}, Gaps: map[string]uint64{"overflow": 2},
				ModeMoves: []api.ModeMove{{From: api.ModeData, To: api.ModeBitmap, Cause: "range-lost", Count: 3}}, Bookmarks: api.BookmarkCounts{Held: 4}, Durable: latency}}}}
}

// TestScrape: the numbers of a status come out under their names.
func TestScrape(t *testing.T) {
	text := scrape(t, example(), nil)
	for _, want := range []string{
		"tidemark_up 1\n", `tidemark_build_info{version="1.2"} 1`,
		`tidemark_condition{code="not-root",group="",severity="warning",subject=""} 1`,
		`tidemark_group_state{group="db",state="protected"} 1`, `tidemark_group_state{group="db",state="offline"} 0`,
		`tidemark_group_mode{group="db",mode="data"} 1`, `tidemark_group_mode{group="db",mode="offline"} 0`,
		`tidemark_group_mode_seconds_total{group="db",mode="data"} 60`,
		`tidemark_group_mode_moves_total{cause="range-lost",from="data",group="db",to="bitmap"} 3`,
		`tidemark_group_pending_seconds{group="db"} 2.5`, `tidemark_group_ring_used_bytes{group="db"} 5`,
		`tidemark_group_gaps_total{cause="overflow",group="db"} 2`, `tidemark_group_bookmarks_total{group="db",outcome="held"} 4`,
		`tidemark_group_durable_seconds_bucket{group="db",le="0.5"} 2`, `tidemark_group_durable_seconds_bucket{group="db",le="1"} 5`,
		`tidemark_group_durable_seconds_bucket{group="db",le="+Inf"} 9`, `tidemark_group_durable_seconds_sum{group="db"} 7`,
		`tidemark_disk_bytes_total{disk="sdb",group="db",op="zeroes"} 72`,
		`tidemark_disk_write_size_bytes_bucket{disk="sdb",group="db",le="1024"} 3`, `tidemark_disk_write_size_bytes_count{disk="sdb",group="db"} 6`,
		`tidemark_disk_gaps_total{disk="sdb",group="db"} 6`, `tidemark_disk_churn_bytes_per_second{disk="sdb",group="db"} 7.5`,
		`tidemark_disk_churn_peak_bytes_per_second{disk="sdb",group="db"} 8`, `tidemark_disk_pending_bytes{disk="sdb",group="db"} 9`,
		`tidemark_disk_pending_seconds{disk="sdb",group="db"} 10.5`,
		`tidemark_consumer_behind_positions{consumer="copy",group="db"} 11`, `tidemark_consumer_pending_bytes{consumer="copy",group="db"} 14`,
		`tidemark_consumer_lag_seconds{consumer="copy",group="db"} 12.5`, `tidemark_consumer_outstanding_batches{consumer="copy",group="db"} 13`,
		`tidemark_consumer_needs_fill{consumer="copy",group="db"} 1`, `tidemark_consumer_needs_fill{consumer="new",group="db"} 0`,
		`tidemark_consumer_damaged{consumer="copy",group="db"} 0`, `tidemark_consumer_damaged{consumer="bad",group="db"} 1`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is not in:\n%s", want, text)
		}
	}
	for _, not := range []string{`tidemark_consumer_pending_bytes{consumer="new"`, `tidemark_consumer_behind_positions{consumer="bad"`} {
		if strings.Contains(text, not) {
			t.Errorf("%s is not known, and in:\n%s", not, text)
		}
	}
}

// TestScrapeWithoutStatus: a daemon that cannot tell says so, and no old numbers.
func TestScrapeWithoutStatus(t *testing.T) {
	text := scrape(t, api.Status{}, errors.New("no"))
	if !strings.Contains(text, "tidemark_up 0\n") || strings.Contains(text, "group") {
		t.Errorf("it says:\n%s", text)
	}
}

// TestDocumented: docs/metrics.md has every metric with its labels and meaning.
func TestDocumented(t *testing.T) {
	b, err := os.ReadFile("../../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range described {
		labels := "none"
		if len(d.labels) > 0 {
			labels = "`" + strings.Join(d.labels, "`, `") + "`"
		}
		if row := "| `" + prefix + d.name + "` | " + labels + " | " + d.help + " |\n"; !strings.Contains(string(b), row) {
			t.Errorf("docs/metrics.md lacks the row\n%s", row)
		}
	}
	if rows := strings.Count(string(b), "\n| `"+prefix); rows != len(described) {
		t.Errorf("docs/metrics.md has %d rows for %d metrics", rows, len(described))
	}
}

// TestListen: nothing but this machine alone hears of the metrics.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics")
	for range 2 { // what a killed daemon left is replaced
		l, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", st.Mode(), err)
		}
		if _, err := Listen(path); !errors.Is(err, ErrTaken) {
			t.Errorf("while somebody answers there: %v", err)
		}
		l.Close()
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Listen(path); !errors.Is(err, ErrTaken) {
			t.Errorf("over a file: %v", err)
		}
		os.Remove(path)
	}
	for _, address := range []string{"0.0.0.0:0", ":9464", "[::]:1", "example.org:1", "127.0.0.1", "metrics", "10.0.0.1:9", "127.0.0.1:70000", "localhost:no-such-service", "/" + strings.Repeat("x", 200)} {
		if l, err := Listen(address); !errors.Is(err, ErrAddress) {
			t.Errorf("%s: %v", address, err)
			if l != nil {
				l.Close()
			}
		}
	}
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for address, want := range map[string]error{l.Addr().String(): ErrTaken, filepath.Join(path, "none", "socket"): ErrListen} {
		_, err := Listen(address)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), "--metrics "+address) {
			t.Errorf("%s: %v", address, err)
		}
	}
}
