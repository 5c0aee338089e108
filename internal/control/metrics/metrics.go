// Package metrics tells a daemon's status in the form that Prometheus reads. It
// keeps no numbers of its own: each scrape asks for a status and translates it.
// docs/metrics.md lists what there is.
package metrics

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"tidemark/internal/control/api"
)

var (
	// ErrAddress: nothing may be answered there.
	ErrAddress = errors.New("not an address for metrics")
	// ErrTaken: somebody else has it.
	ErrTaken = errors.New("the address for metrics is taken")
	// ErrListen: the system does not let us answer there.
	ErrListen = errors.New("metrics cannot be told there")
)

// answerWithin bounds how long a scrape waits for the status.
const answerWithin = 10 * time.Second

// Handler answers scrapes.
func Handler(status func(context.Context) (api.Status, error)) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(&collector{status})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 2 * answerWithin}))
	return mux
}

// Listen opens an address: the path of a unix socket, which only this user may
// open, or HOST:PORT of this machine alone. Others are refused: what is told has the
// names of disks, and nobody is asked who they are. Errors: ErrAddress, ErrTaken, ErrListen.
func Listen(address string) (net.Listener, error) {
	if err := Check(address); err != nil {
		return nil, err
	}
	if strings.HasPrefix(address, "/") {
		return listenUnix(address)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, unheard(address, err)
	}
	return l, nil
}

// Check refuses what is no address for metrics, and changes nothing. ErrAddress.
func Check(address string) error {
	if strings.HasPrefix(address, "/") {
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("--metrics %s: %w: %w\n  Want HOST:PORT of this machine alone, or the absolute path of a unix socket", address, ErrAddress, err)
	}
	if ip, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !ip.IsLoopback()) {
		return fmt.Errorf("--metrics %s: %w: it is not of this machine alone\n  Want 127.0.0.1:PORT, [::1]:PORT, or the path of a unix socket", address, ErrAddress)
	}
	return nil
}

// unheard says why nothing can be told at an address.
func unheard(address string, err error) error {
	var port *net.AddrError
	var lookup *net.DNSError
	is := ErrListen
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		is = ErrTaken
	case errors.As(err, &port), errors.As(err, &lookup), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL):
		is = ErrAddress // its port, or too long for a socket
	}
	return fmt.Errorf("--metrics %s: %w: %w\n  Name another with --metrics, or end what has it", address, is, err)
}

func listenUnix(path string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("--metrics %s: %w: a file that is no socket is there\n  Name another with --metrics", path, ErrTaken)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, unheard(path, unix.EADDRINUSE)
		}
		if err := os.Remove(path); err != nil {
			return nil, unheard(path, err)
		}
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, unheard(path, err)
	}
	return l, nil
}

// collector makes metrics of a status.
type collector struct {
	status func(context.Context) (api.Status, error)
}

// Describe tells every metric that there may be.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range described {
		out <- d.desc
	}
}

// Collect asks for a status. Without one nothing but "up 0" is told.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	t := teller{out}
	st, err := c.status(ctx)
	if err != nil {
		t.gauge("up", 0)
		return
	}
	t.gauge("up", 1)
	t.gauge("build_info", 1, st.Version)
	for _, cond := range st.Conditions {
		t.gauge("condition", 1, "", cond.Code, cond.Subject, string(cond.Severity))
	}
	for i := range st.Groups {
		t.group(&st.Groups[i], st.Totals.WriteSizeBounds)
	}
}

// teller sends metrics by their names of described.
type teller struct{ out chan<- prometheus.Metric }

func (t teller) gauge(name string, v float64, labels ...string) {
	t.out <- prometheus.MustNewConstMetric(byName[name], prometheus.GaugeValue, v, labels...)
}

func (t teller) count(name string, v float64, labels ...string) {
	t.out <- prometheus.MustNewConstMetric(byName[name], prometheus.CounterValue, v, labels...)
}

func (t teller) latency(name string, l api.Latency, labels ...string) {
	buckets, sum := map[float64]uint64{}, uint64(0)
	for i, n := range l.Counts {
		sum += n
		if i < len(l.BoundsSeconds) {
			buckets[l.BoundsSeconds[i]] = sum
		}
	}
	t.out <- prometheus.MustNewConstHistogram(byName[name], sum, l.SumSeconds, buckets, labels...)
}

func (t teller) group(g *api.Group, bounds []int64) {
	s := &g.Stats
	for _, state := range []api.State{api.Filling, api.Protected, api.Degraded, api.Offline} {
		t.gauge("group_state", truth(g.State == state), g.Name, string(state))
	}
	for m, seconds := range s.ModeSeconds {
		t.gauge("group_mode", truth(g.Mode == m && g.State != api.Offline || m == "offline" && g.State == api.Offline), g.Name, string(m))
		t.count("group_mode_seconds_total", seconds, g.Name, string(m))
	}
	for _, m := range s.ModeMoves {
		t.count("group_mode_moves_total", float64(m.Count), g.Name, string(m.From), string(m.To), m.Cause)
	}
	t.gauge("group_pending_bytes", float64(s.PendingBytes), g.Name)
	t.gauge("group_pending_seconds", s.PendingSeconds, g.Name)
	t.gauge("group_ring_bytes", float64(g.RingBytes), g.Name)
	t.gauge("group_ring_used_bytes", float64(g.RingUsedBytes), g.Name)
	t.gauge("group_spool_bytes", float64(g.SpoolBytes), g.Name)
	t.gauge("group_churn_bytes_per_second", s.ChurnBytesPerSecond, g.Name)
	t.gauge("group_churn_peak_bytes_per_second", float64(s.ChurnPeakBytesPerSecond), g.Name)
	t.gauge("group_captured_position", float64(g.CapturedPosition), g.Name)
	t.gauge("group_durable_position", float64(g.DurablePosition), g.Name)
	for cause, n := range s.Gaps {
		t.count("group_gaps_total", float64(n), g.Name, cause)
	}
	t.count("group_gap_seconds_total", s.GapSeconds, g.Name)
	for what, n := range map[string]uint64{"cut": s.Bookmarks.Cut, "held": s.Bookmarks.Held, "refused": s.Bookmarks.Refused, "dropped": s.Bookmarks.Dropped} {
		t.count("group_bookmarks_total", float64(n), g.Name, what)
	}
	t.latency("group_durable_seconds", s.Durable, g.Name)
	t.latency("group_vault_seconds", s.Vault, g.Name)
	t.latency("group_drained_seconds", s.Drained, g.Name)
	for _, c := range g.Conditions {
		t.gauge("condition", 1, g.Name, c.Code, c.Subject, string(c.Severity))
	}
	for i := range g.Disks {
		t.disk(g.Name, &g.Disks[i], bounds)
	}
	for i := range g.Consumers {
		t.consumer(g.Name, &g.Consumers[i])
	}
}

// consumer tells of one that is damaged nothing else: it is not known.
func (t teller) consumer(group string, c *api.Consumer) {
	t.gauge("consumer_damaged", truth(c.Error != ""), group, c.Name)
	if c.Error != "" {
		return
	}
	t.gauge("consumer_behind_positions", float64(c.Behind), group, c.Name)
	if c.PendingBytes != nil {
		t.gauge("consumer_pending_bytes", float64(*c.PendingBytes), group, c.Name)
	}
	t.gauge("consumer_lag_seconds", c.LagSeconds, group, c.Name)
	t.gauge("consumer_outstanding_batches", float64(c.Outstanding), group, c.Name)
	t.gauge("consumer_needs_fill", truth(c.NeedsFill), group, c.Name)
}

func (t teller) disk(group string, d *api.Disk, bounds []int64) {
	t.gauge("disk_size_bytes", float64(d.SizeBytes), group, d.Name)
	t.gauge("disk_gap_bytes", float64(d.GapBytes), group, d.Name)
	t.gauge("disk_churn_bytes_per_second", d.ChurnBytesPerSecond, group, d.Name)
	t.gauge("disk_churn_peak_bytes_per_second", float64(d.ChurnPeakBytesPerSecond), group, d.Name)
	t.gauge("disk_pending_bytes", float64(d.PendingBytes), group, d.Name)
	t.gauge("disk_pending_seconds", d.PendingSeconds, group, d.Name)
	t.count("disk_gaps_total", float64(d.Gaps), group, d.Name)
	t.count("disk_lost_writes_total", float64(d.LostWrites), group, d.Name)
	t.count("disk_failed_writes_total", float64(d.FailedWrites), group, d.Name)
	for what, n := range map[string]uint64{"write": d.TakenBytes, "zeroes": d.ZeroedBytes, "discard": d.DiscardedBytes} {
		t.count("disk_bytes_total", float64(n), group, d.Name, what)
	}
	buckets, sum := map[float64]uint64{}, uint64(0)
	for i, n := range d.WriteSizes {
		sum += n
		if i < len(bounds) {
			buckets[float64(bounds[i])] = sum
		}
	}
	t.out <- prometheus.MustNewConstHistogram(byName["disk_write_size_bytes"], sum, float64(d.TakenBytes+d.ZeroedBytes+d.DiscardedBytes), buckets, group, d.Name)
}

func truth(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
