package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"tidemark/internal/control/api"
)

// printStats is what a group did since the daemon began.
func printStats(out io.Writer, g api.Group) {
	s := &g.Stats
	fmt.Fprintln(out, "  since the daemon began:")
	fmt.Fprintf(out, "    churn      %s/s over the last minute, %s in the busiest second\n", formatSize(int64(s.ChurnBytesPerSecond)), formatSize(int64(s.ChurnPeakBytesPerSecond)))
	fmt.Fprintf(out, "    pending    %s, the oldest %.1f s old\n", formatSize(s.PendingBytes), s.PendingSeconds)
	fmt.Fprintf(out, "    modes      %s\n", modesText(s))
	fmt.Fprintf(out, "    gaps       %s; %s without new points\n", gapsText(s), seconds(s.GapSeconds))
	fmt.Fprintf(out, "    bookmarks  %d put by a cut, %d with writes held, %d refused, %d dropped%s\n", s.Bookmarks.Cut, s.Bookmarks.Held, s.Bookmarks.Refused, s.Bookmarks.Dropped, lastText(s.LastBookmark))
	for _, l := range []struct {
		what string
		api.Latency
	}{{"durable", s.Durable}, {"in vault", s.Vault}, {"drained", s.Drained}} {
		if text := latencyText(l.Latency); text != "" {
			fmt.Fprintf(out, "    %-10s %s of its capture\n", l.what, text)
		}
	}
	printDisks(out, g.Disks)
	printSizes(out, g.Disks)
}

// printDisks tells what each disk takes and lacks.
func printDisks(out io.Writer, disks []api.Disk) {
	var rows []table.Row
	for _, d := range disks {
		rows = append(rows, table.Row{d.Name, formatSize(int64(d.ChurnBytesPerSecond)) + "/s", formatSize(int64(d.ChurnPeakBytesPerSecond)),
			formatSize(int64(d.PendingBytes)), fmt.Sprintf("%.1f s", d.PendingSeconds), d.Gaps})
	}
	printTable(out, table.Row{"disk", "churn", "busiest second", "pending", "oldest", "gaps"}, rows)
}

// printTotals is what all groups did together since the daemon began.
func printTotals(out io.Writer, t *api.Totals) {
	fmt.Fprintf(out, "all groups: churn %s/s; pending %s, the oldest %.1f s old; %d gaps; bookmarks %d put, %d refused, %d dropped\n",
		formatSize(int64(t.ChurnBytesPerSecond)), formatSize(t.PendingBytes), t.PendingSeconds, t.Gaps, t.Bookmarks.Cut+t.Bookmarks.Held, t.Bookmarks.Refused, t.Bookmarks.Dropped)
}

func seconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(time.Second).String()
}

func modesText(s *api.GroupStats) string {
	var parts []string
	for _, m := range []api.Mode{api.ModeData, api.ModeMetadata, api.ModeBitmap, "offline"} {
		if n := s.ModeSeconds[m]; n >= 1 || n > 0 && m == api.ModeData {
			parts = append(parts, fmt.Sprintf("%s %s", m, seconds(n)))
		}
	}
	for _, m := range s.ModeMoves {
		parts = append(parts, fmt.Sprintf("%d × %s to %s (%s)", m.Count, m.From, m.To, m.Cause))
	}
	return strings.Join(parts, ", ")
}

func gapsText(s *api.GroupStats) string {
	var parts []string
	for cause, n := range s.Gaps {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, cause))
		}
	}
	if len(parts) == 0 {
		return "none"
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

func lastText(l *api.LastBookmark) string {
	if l == nil {
		return ""
	}
	return fmt.Sprintf("; the last was %s, barrier %s", l.Name, l.Barrier)
}

// latencyText tells the middle and the slow end of a histogram, by its classes.
func latencyText(l api.Latency) string {
	var all uint64
	for _, n := range l.Counts {
		all += n
	}
	if all == 0 {
		return ""
	}
	return fmt.Sprintf("half within %s, 99%% within %s", within(l, all, 0.5), within(l, all, 0.99))
}

// within is the upper end of the class that a part of all lies below.
func within(l api.Latency, all uint64, part float64) string {
	var sum uint64
	for i, n := range l.Counts {
		if sum += n; float64(sum) >= part*float64(all) && i < len(l.BoundsSeconds) {
			return time.Duration(l.BoundsSeconds[i] * float64(time.Second)).String()
		}
	}
	return "more than " + time.Duration(l.BoundsSeconds[len(l.BoundsSeconds)-1]*float64(time.Second)).String()
}

// printSizes tells how large the writes of each disk were.
func printSizes(out io.Writer, disks []api.Disk) {
	heads := table.Row{"writes of at most"}
	for _, d := range disks {
		heads = append(heads, d.Name)
	}
	var rows []table.Row
	for class := range sizeClasses(disks) {
		row, any := table.Row{sizeClass(class, sizeClasses(disks))}, false
		for _, d := range disks {
			row, any = append(row, d.WriteSizes[class]), any || d.WriteSizes[class] > 0
		}
		if any {
			rows = append(rows, row)
		}
	}
	if len(rows) > 0 {
		printTable(out, heads, rows)
	}
}

func sizeClasses(disks []api.Disk) int {
	if len(disks) == 0 {
		return 0
	}
	return len(disks[0].WriteSizes)
}

func sizeClass(class, of int) string {
	if class == of-1 {
		return "more"
	}
	return formatSize(512 << class)
}
