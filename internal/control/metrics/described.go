package metrics

import "github.com/prometheus/client_golang/prometheus"

// prefix is before every name.
const prefix = "tidemark_"

// described are all metrics; docs/metrics.md has the same, and a test holds them together.
var described = []description{
	describe("up", "1 where the daemon told its status"),
	describe("build_info", "always 1", "version"),
	describe("condition", "1 for each health condition that is raised; no group: the daemon's own", "group", "code", "subject", "severity"),
	describe("group_state", "1 for the state that the group is in", "group", "state"),
	describe("group_mode", "1 for the mode that the group is in, or offline", "group", "mode"),
	describe("group_mode_seconds_total", "time in each mode", "group", "mode"),
	describe("group_mode_moves_total", "how often one mode followed another, and why", "group", "from", "to", "cause"),
	describe("group_pending_bytes", "captured and not in the vault", "group"),
	describe("group_pending_seconds", "age of the oldest that is captured and not in the vault: the RPO", "group"),
	describe("group_ring_bytes", "size of the ring", "group"),
	describe("group_ring_used_bytes", "of the ring, not durable yet", "group"),
	describe("group_spool_bytes", "size of the spool", "group"),
	describe("group_churn_bytes_per_second", "written, over the last minute", "group"),
	describe("group_churn_peak_bytes_per_second", "written in the busiest second", "group"),
	describe("group_captured_position", "newest position that was captured", "group"),
	describe("group_durable_position", "newest position that the vault can give back", "group"),
	describe("group_gaps_total", "gaps that were opened, by cause", "group", "cause"),
	describe("group_gap_seconds_total", "time with no new points, as a gap was open", "group"),
	describe("group_bookmarks_total", "bookmarks put (cut: no writer held; held: new writes waited), refused, and dropped (prepared and revoked)", "group", "outcome"),
	describe("group_durable_seconds", "from the capture of a segment's oldest write to the spool", "group"),
	describe("group_vault_seconds", "from the capture of a segment's oldest write to the vault", "group"),
	describe("group_drained_seconds", "from the capture of a batch's newest record to its commit by a consumer of the drain", "group"),
	describe("disk_size_bytes", "size of the disk", "group", "disk"),
	describe("disk_gap_bytes", "of the disk, not known to the history", "group", "disk"),
	describe("disk_churn_bytes_per_second", "written, over the last minute", "group", "disk"),
	describe("disk_churn_peak_bytes_per_second", "written in the busiest second", "group", "disk"),
	describe("disk_pending_bytes", "content of writes that is captured and not in the vault", "group", "disk"),
	describe("disk_pending_seconds", "age of the oldest write that is captured and not in the vault", "group", "disk"),
	describe("disk_gaps_total", "gaps that were opened over blocks of the disk, or became wider by them", "group", "disk"),
	describe("disk_lost_writes_total", "writes that are gaps, since the capture began", "group", "disk"),
	describe("disk_failed_writes_total", "writes that ended in an error, since the capture began", "group", "disk"),
	describe("disk_bytes_total", "bytes written, zeroed and discarded", "group", "disk", "op"),
	describe("disk_write_size_bytes", "sizes of the writes", "group", "disk"),
	describe("consumer_behind_positions", "positions that are sealed and that the consumer has not committed", "group", "consumer"),
	describe("consumer_pending_bytes", "content of writes that is sealed and that the consumer has not committed; none while that is not known", "group", "consumer"),
	describe("consumer_lag_seconds", "from the newest record that the consumer has committed to the newest sealed one", "group", "consumer"),
	describe("consumer_outstanding_batches", "given to the consumer and not committed", "group", "consumer"),
	describe("consumer_needs_fill", "1 where what the consumer's copy lacks comes as a fill", "group", "consumer"),
	describe("consumer_damaged", "1 where the consumer's state is damaged, and it gets nothing", "group", "consumer"),
}

type description struct {
	name, help string
	labels     []string
	desc       *prometheus.Desc
}

func describe(name, help string, labels ...string) description {
	return description{name, help, labels, prometheus.NewDesc(prefix+name, help, labels, nil)}
}

var byName = func() map[string]*prometheus.Desc {
	out := map[string]*prometheus.Desc{}
	for _, d := range described {
		out[d.name] = d.desc
	}
	return out
}()
