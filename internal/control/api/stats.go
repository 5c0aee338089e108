package api

import (
	"time"
)

// GroupStats counts what a group did since the daemon began. A session that starts
// anew goes on counting; a daemon that does begins at zero.
type GroupStats struct {
	ChurnBytesPerSecond     float64           `json:"churn_bytes_per_second"`      // written, over the last minute
	ChurnPeakBytesPerSecond uint64            `json:"churn_peak_bytes_per_second"` // in the busiest second
	PendingBytes            int64             `json:"pending_bytes"`               // captured and not in the vault
	PendingSeconds          float64           `json:"pending_seconds"`             // age of the oldest of it: the RPO
	ModeSeconds             map[Mode]float64  `json:"mode_seconds"`                // "offline" too
	ModeMoves               []ModeMove        `json:"mode_moves"`
	Gaps                    map[string]uint64 `json:"gaps"` // opened, by cause
	GapsWidened             uint64            `json:"gaps_widened"`
	GapSeconds              float64           `json:"gap_seconds"` // with no new points
	Bookmarks               BookmarkCounts    `json:"bookmarks"`
	LastBookmark            *LastBookmark     `json:"last_bookmark,omitempty"`
	Durable                 Latency           `json:"latency_durable"` // from capture to the spool
	Vault                   Latency           `json:"latency_vault"`   // from capture to the vault
	Drained                 Latency           `json:"latency_drained"` // from capture to a consumer's commit
}

// ModeMove is how often one mode followed another for a reason.
type ModeMove struct {
	From  Mode   `json:"from"`
	To    Mode   `json:"to"`
	Cause string `json:"cause"`
	Count uint64 `json:"count"`
}

// BookmarkCounts says what became of bookmarks.
type BookmarkCounts struct {
	Cut     uint64 `json:"cut"`     // put with no writer held
	Held    uint64 `json:"held"`    // put while new writes waited
	Refused uint64 `json:"refused"` // could not be put
	Dropped uint64 `json:"dropped"` // prepared and revoked, be it by time or by a restart
}

// LastBookmark is the newest that was put.
type LastBookmark struct {
	Name        string    `json:"bookmark"`
	Time        time.Time `json:"time"`
	Barrier     string    `json:"barrier"`
	HeldSeconds float64   `json:"held_seconds"` // that new writes waited
}

// Latency is a histogram: Counts[i] are those of at most BoundsSeconds[i], the
// last count those above all bounds.
type Latency struct {
	BoundsSeconds []float64 `json:"bounds_seconds"`
	Counts        []uint64  `json:"counts"`
	SumSeconds    float64   `json:"sum_seconds"`
	NewestSeconds float64   `json:"newest_seconds"`
}

// Totals are the sums over all groups.
type Totals struct {
	Writes              uint64         `json:"writes"`
	WrittenBytes        uint64         `json:"written_bytes"`
	LostWrites          uint64         `json:"lost_writes"`
	Gaps                uint64         `json:"gaps"`        // opened
	GapSeconds          float64        `json:"gap_seconds"` // the worst group's
	ChurnBytesPerSecond float64        `json:"churn_bytes_per_second"`
	PendingBytes        int64          `json:"pending_bytes"`
	PendingSeconds      float64        `json:"pending_seconds"` // the worst group's
	Bookmarks           BookmarkCounts `json:"bookmarks"`
	WriteSizes          []uint64       `json:"write_sizes"`       // of writes, by class
	WriteSizeBounds     []int64        `json:"write_size_bounds"` // the largest of each class in bytes, but of the last, which has none
}
