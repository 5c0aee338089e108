package involflt

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"time"

	"tidemark/internal/abi/involflt"
)

// text answers with statistics in a client's buffer, NULs behind them.
func text(m memory, addr uint64, length int, s string) error {
	b := make([]byte, min(length, involflt.StatsBytes))
	if n := copy(b, s); n > 0 && n == len(b) {
		b[n-1] = 0
	}
	return put(m, addr, b)
}

// globalStats always fills its 4096 bytes.
func (s *Server) globalStats(ctx context.Context, arg uint64, m memory) error {
	disks := s.all()
	var pending, changes int64
	inOrder, uncounted := 0, 0
	for _, d := range disks {
		p, err := d.pending(ctx)
		if err != nil {
			uncounted++
		}
		pending, changes = pending+p.Bytes, changes+p.Changes
		if d.inOrder() {
			inOrder++
		}
	}
	s.mu.Lock()
	service, drainer, services := s.service != nil, s.drainer != nil, s.services
	s.mu.Unlock()
	var b strings.Builder
	line := func(name string, v any) { fmt.Fprintf(&b, "%-28s: %v\n", name, v) }
	line("Driver", "Tidemark, in user space")
	line("Driver Version", fmt.Sprintf("%d.%d.%d.%d", version.Driver[0], version.Driver[1], version.Driver[2], version.Driver[3]))
	line("Service", map[bool]string{true: "running", false: "not running"}[service])
	line("Service Starts", services)
	line("Drainer", map[bool]string{true: "running", false: "not running"}[drainer])
	line("Protected Volumes", len(disks))
	line("Volumes In Write Order", inOrder)
	line("Pending Changes", changes)
	line("Pending Bytes", pending)
	if uncounted > 0 {
		line("Pending Not All Counted", fmt.Sprintf("of %d volumes", uncounted))
	}
	line("Consistency Point", map[bool]string{true: "barrier", false: "none, or without a barrier"}[s.held()])
	line("Data File Folder", s.files.dir)
	line("Up Seconds", int64(time.Since(s.began).Seconds()))
	return text(m, arg, involflt.StatsBytes, b.String())
}

var orders = map[uint32]string{involflt.OrderUnknown: "not known", involflt.OrderBitmap: "bitmap", involflt.OrderMetadata: "metadata", involflt.OrderData: "data"}

func (s *Server) volumeStats(ctx context.Context, arg uint64, m memory) error {
	var in involflt.Stats
	if err := get(m, arg, &in); err != nil {
		return err
	}
	name, _ := in.Device.String()
	d := s.find(name)
	if d == nil {
		return syscall.ENODEV
	}
	st := d.queue.State()
	p, err := d.pending(ctx)
	d.mu.Lock()
	c := d.count
	d.mu.Unlock()
	var b strings.Builder
	line := func(name string, v any) { fmt.Fprintf(&b, "%-28s: %v\n", name, v) }
	line("Volume", d.device)
	line("Persistent Name", d.name)
	line("Filtering", "enabled")
	line("Write Order State", orders[st.Order])
	line("Resync Required", fmt.Sprintf("%d %s", st.Resync.Count, st.Resync.Text))
	line("Pending Changes", p.Changes)
	line("Pending Bytes", p.Bytes)
	if err != nil {
		line("Pending Not All Counted", err)
	}
	line("Oldest Pending Time Stamp", p.Oldest)
	line("Committed Blocks", c.Blocks)
	line("Committed Changes", c.Changes)
	line("Committed Bytes", c.Bytes)
	line("Committed Copies", c.Copies)
	line("Committed Metadata Blocks", c.Ranges)
	line("Committed Tags", c.Tags)
	line("Tags Dropped", c.TagsLost)
	line("Empty Answers", c.Empty)
	line("Refused Commits", c.Failed)
	line("Clear Differentials", c.Clears)
	for _, t := range []struct {
		name string
		at   time.Time
	}{{"Last Block Given", c.Given}, {"Last Commit", c.Committed}, {"Last Clear", c.Cleared}} {
		if !t.at.IsZero() {
			line(t.name, t.at.UTC().Format(time.RFC3339))
		}
	}
	return text(m, in.Buffer, int(min(in.Length, involflt.StatsBytes)), b.String())
}

// additional tells the age of what is pending: how much would be lost with the machine.
func (s *Server) additional(ctx context.Context, arg uint64, m memory) error {
	d, err := s.named(arg, m)
	if err != nil {
		return err
	}
	if d == nil {
		return syscall.ENODEV
	}
	var in involflt.Additional
	if err := get(m, arg, &in); err != nil {
		return err
	}
	p, err := d.pending(ctx)
	if err != nil {
		s.trouble("what is pending cannot be counted", "device", d.device, "error", err)
		return err
	}
	in.Pending, in.Oldest, in.Now = uint64(p.Bytes), p.Oldest, stampOf(time.Now())
	if in.Oldest == 0 {
		in.Oldest = in.Now // nothing is pending
	}
	return put(m, arg, in)
}
