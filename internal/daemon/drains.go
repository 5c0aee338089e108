package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"tidemark/internal/control/api"
	"tidemark/internal/drain"
	"tidemark/internal/health"
	"tidemark/internal/protect"
	"tidemark/internal/segment"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
)

// sealedStream is a group's stream as its consumers see it.
type sealedStream struct{ *protect.Sealed }

func (s sealedStream) Open(ctx context.Context, n uint64) (*segment.File, error) {
	f, err := s.Sealed.Open(ctx, n)
	if errors.Is(err, protect.ErrNotSealed) {
		err = fmt.Errorf("%w: %w", drain.ErrNotSealed, err)
	}
	return f, err
}

// openConsumers finds the consumers of a group. s.mu is held, or nobody else knows of s yet.
func (s *service) openConsumers(g *protect.Group) {
	cfg := g.Config()
	c := drain.Config{Dir: filepath.Join(s.env.StateDir, "groups", cfg.Name, "drain"), Group: cfg.Name, ID: cfg.ID,
		Source: func() (drain.Source, error) {
			sealed, err := g.Sealed()
			return sealedStream{sealed}, err
		},
		Committed: g.Stats().Drained}
	for _, d := range cfg.Disks {
		c.Disks = append(c.Disks, drain.Disk{Name: d.Name, Size: d.Size, SectorSize: d.SectorSize})
	}
	all, err := drain.Open(c)
	if err != nil {
		s.health.Raise(health.Condition{Code: "consumers-unreadable", Severity: health.Error, Subject: cfg.Name,
			Detail: "The group's consumers cannot be read, and get nothing: " + err.Error(), Remedy: "Make " + c.Dir + " readable and start the daemon again."})
		return
	}
	if s.drains == nil {
		s.drains = map[string]*consumers{}
	}
	s.drains[cfg.Name] = &consumers{Group: all, batches: make(chan struct{}, batchesMax)}
}

// consumers are those of a group.
type consumers struct {
	*drain.Group
	batches chan struct{} // holds one for each batch that is made or on its way
}

// batchesMax bounds those of one group.
const batchesMax = 4

// consumers are a group's.
func (s *service) consumers(group string) (*consumers, error) {
	if _, err := s.find(group); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.drains[group]; d != nil {
		return d, nil
	}
	return nil, &api.Error{Code: api.CodeUnreachable, Message: fmt.Sprintf("the consumers of group %s are not to be had now", group), Remedy: "tidemark status tells why."}
}

// closeConsumers ends a group's consumers, and whoever waits for something.
func (s *service) closeConsumers(group string) {
	s.mu.Lock()
	d := s.drains[group]
	delete(s.drains, group)
	s.mu.Unlock()
	if d != nil {
		d.Close()
	}
}

func (s *service) closeAllConsumers() {
	for _, g := range s.list() {
		s.closeConsumers(g.Config().Name)
	}
}

func (s *service) DrainNext(ctx context.Context, group, consumer string, r api.DrainRequest) (io.ReadCloser, error) {
	d, err := s.consumers(group)
	if err != nil {
		return nil, err
	}
	if r.Batches < 0 || r.Batches > api.BatchesMax {
		return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%d batches in one answer: want at most %d", r.Batches, api.BatchesMax)}
	}
	f, err := flowing(ctx, d.batches, r.Batches, func(ctx context.Context, after uint64) (*drain.Batch, error) {
		r := r
		if after != 0 {
			r.After = after
		}
		return s.nextBatch(ctx, d.Group, group, consumer, r)
	})
	if err != nil {
		return nil, coded(err)
	}
	return f, nil
}

func (s *service) nextBatch(ctx context.Context, d *drain.Group, group, consumer string, r api.DrainRequest) (*drain.Batch, error) {
	if r.After != 0 && !d.Has(consumer) { // none is made to be refused
		return d.Next(ctx, consumer, r.After)
	}
	o := drain.Options{Disk: r.Disk, BatchBytes: r.BatchBytes, Ranges: r.Ranges}
	if !d.Has(consumer) && r.From != "" && r.From != "empty" {
		var err error
		if o.From, err = s.startAt(ctx, group, r.From); err != nil {
			return nil, err
		}
	}
	if err := d.Make(ctx, consumer, o); err != nil {
		return nil, err
	}
	return d.Next(ctx, consumer, r.After)
}

// startAt finds the point that a consumer's copy is.
func (s *service) startAt(ctx context.Context, group, point string) (drain.Start, error) {
	spec, err := stream.ParseSpec(point)
	if err != nil {
		return drain.Start{}, err
	}
	g, err := s.find(group)
	if err != nil {
		return drain.Start{}, err
	}
	sealed, err := g.Sealed()
	if err != nil {
		return drain.Start{}, err
	}
	p, sequence, err := sealed.Point(ctx, spec)
	return drain.Start{Position: p.Position, Time: p.Time.UnixNano(), Sequence: sequence}, err
}

func (s *service) DrainCommit(ctx context.Context, group, consumer string, r api.DrainCommit) error {
	d, err := s.consumers(group)
	if err == nil {
		err = d.Commit(ctx, consumer, r.Number)
	}
	return coded(err)
}

func (s *service) DrainWait(ctx context.Context, group, consumer string, r api.DrainWait) (api.DrainPending, error) {
	d, err := s.consumers(group)
	if err != nil {
		return api.DrainPending{}, err
	}
	patience := time.Duration(r.TimeoutMillis) * time.Millisecond
	if r.TimeoutMillis < 0 || r.TimeoutMillis > api.WaitMax.Milliseconds() || r.Bytes < 0 || r.Bytes > drain.WaitBytesMax {
		return api.DrainPending{}, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("a wait of %s for %d bytes: want at most %s and %d bytes", patience, r.Bytes, api.WaitMax, int64(drain.WaitBytesMax))}
	}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	p, woken, err := d.Wait(limited, consumer, r.After, r.Bytes)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return api.DrainPending{}, api.Wrap(api.CodeNothing, fmt.Errorf("group %s, consumer %s: not so much was pending within %s", group, consumer, patience), "")
	}
	return api.DrainPending{Batches: p.Batches, Bytes: p.Bytes, Bookmark: p.Bookmark, Woken: woken}, coded(err)
}

func (s *service) DrainClear(_ context.Context, group, consumer string, r api.DrainClear) error {
	d, err := s.consumers(group)
	if err == nil {
		err = d.Clear(consumer, r.Skip)
	}
	return coded(err)
}

func (s *service) DrainWake(_ context.Context, group string) error {
	d, err := s.consumers(group)
	if err == nil {
		d.Wake()
	}
	return err
}

func (s *service) Consumers(ctx context.Context, group string) ([]api.Consumer, error) {
	if _, err := s.find(group); err != nil {
		return nil, err
	}
	return s.consumersOf(ctx, group), nil
}

// countTime is how long status waits until what is pending is counted.
const countTime = 200 * time.Millisecond

// consumersOf is what status says of a group's consumers.
func (s *service) consumersOf(ctx context.Context, group string) []api.Consumer {
	s.mu.Lock()
	d := s.drains[group]
	s.mu.Unlock()
	out := []api.Consumer{}
	if d == nil {
		return out
	}
	limited, cancel := context.WithTimeout(ctx, countTime)
	defer cancel()
	pending := d.Count(limited)
	for _, c := range d.List() {
		a := api.Consumer{Name: c.Name, Disk: c.Disk, BatchBytes: c.BatchBytes, Ranges: c.Ranges, Committed: c.Committed, Outstanding: c.Outstanding,
			Position: c.Position, NeedsFill: c.Filling, Cleared: c.Cleared, Behind: c.Behind, LagSeconds: c.Lag.Seconds()}
		if n, ok := pending[c.Name]; ok && !c.Filling {
			a.PendingBytes = &n
		}
		if c.Err != nil {
			a.Error = c.Err.Error()
		}
		out = append(out, a)
	}
	return out
}

// conditionsOf says what of a group's consumers somebody should know.
func conditionsOf(group string, all []api.Consumer) (out []health.Condition) {
	for _, c := range all {
		switch {
		case c.Error != "":
			out = append(out, health.Condition{Code: "consumer-damaged", Severity: health.Error, Subject: group, Detail: c.Error,
				Remedy: "Remove the consumer (drain rm --force), and begin anew with a copy that is a point, or empty."})
		case c.Cleared:
			out = append(out, health.Condition{Code: "consumer-needs-fill", Severity: health.Info, Subject: group,
				Detail: fmt.Sprintf("What was pending for consumer %s was cleared: its copy is not right until it has had a fill.", c.Name), Remedy: "Nothing: the fill is its next batch."})
		}
	}
	return out
}

// sealWithin bounds how long it takes until what was captured is sealed: with a
// full spool it would be for ever.
const sealWithin = 10 * time.Second

// seal has everything that was captured before the call come to a group's
// consumers: what is not sealed would not count as pending, and be lost to them.
func (s *service) seal(ctx context.Context, group string) error {
	g, err := s.find(group)
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeoutCause(ctx, sealWithin, spool.ErrFull)
	defer cancel()
	if err = g.Seal(limited); limited.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("group %s: %w: what was captured cannot be handed to its consumers", group, context.Cause(limited))
	}
	return err
}

// drained is drain.ErrPending where a consumer of the group has not got everything
// that was captured before the call.
func (s *service) drained(ctx context.Context, d *consumers, group string) error {
	if len(d.List()) == 0 {
		return nil
	}
	if err := d.Drained(ctx); err != nil { // so that it is said at once
		return err
	}
	if err := s.seal(ctx, group); err != nil {
		return err
	}
	return d.Drained(ctx)
}

func (s *service) RemoveConsumer(ctx context.Context, group, consumer string, force bool) error {
	d, err := s.consumers(group)
	if err == nil && !force && d.Has(consumer) {
		err = s.seal(ctx, group)
	}
	if err == nil {
		err = d.Remove(ctx, consumer, force)
	}
	return coded(err)
}
