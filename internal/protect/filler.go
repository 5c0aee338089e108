package protect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"tidemark/internal/block"
	"tidemark/internal/fill"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

const (
	jobBytes    = 1 << 20 // read at a time while filling
	jobsAtOnce  = 8       // jobs handed out and not yet appended
	fillWorkers = 2
	grain       = 16 << 10 // zeroes and sameness are found in pieces of this size
)

// piece is a part of a filled job in one state.
type piece struct {
	r    block.Range
	op   stream.FillOp
	data []byte
}

// reading is one job on its way through a worker.
type reading struct {
	job    fill.Job
	buf    []byte // aligned for O_DIRECT
	pieces []piece
	end    source.Place // the ring's producer after the read
	err    error
}

// filler reads gaps from the disks. Only the session's goroutine calls start and
// retire; the workers end when jobs is closed.
type filler struct {
	jobs    chan *reading
	results chan *reading
	out     map[fill.ID]*reading // handed out, by job
	free    []*reading
	limit   *rate.Limiter
	disks   []reader
	names   []string
	bases   []block.Device // what the vault holds from before the gap, by disk; nil where nothing does
	base    stream.Position
	scratch chan []byte
	end     func() source.Place
	pause   time.Time // nothing is handed out before: a disk that fails is not asked all the time
}

// failedPause is how long a failed read keeps the next ones waiting.
const failedPause = time.Second

func newFiller(disks []reader, names []string, bytesPerSecond int64, end func() source.Place) *filler {
	f := &filler{
		jobs: make(chan *reading, jobsAtOnce), results: make(chan *reading, jobsAtOnce), out: map[fill.ID]*reading{},
		limit: rate.NewLimiter(rate.Limit(bytesPerSecond), jobBytes*2), disks: disks, names: names, bases: make([]block.Device, len(disks)),
		scratch: make(chan []byte, fillWorkers), end: end,
	}
	for range jobsAtOnce {
		f.free = append(f.free, &reading{})
	}
	for range fillWorkers {
		f.scratch <- make([]byte, jobBytes)
	}
	return f
}

// work serves jobs until the channel is closed.
func (f *filler) work(ctx context.Context) {
	for r := range f.jobs {
		r.err = f.read(ctx, r)
		r.end = f.end()
		f.results <- r
	}
}

func (f *filler) read(ctx context.Context, r *reading) error {
	n := int(r.job.Range.Len)
	if err := f.limit.WaitN(ctx, min(n, f.limit.Burst())); err != nil {
		return err
	}
	if cap(r.buf) < n {
		r.buf = aligned(max(n, jobBytes))
	}
	r.buf = r.buf[:n]
	if _, err := f.disks[r.job.Disk].ReadAt(r.buf, r.job.Range.Off); err != nil {
		return fmt.Errorf("reading %s at %s: %w", f.names[r.job.Disk], r.job.Range, err)
	}
	return f.classify(r)
}

// classify cuts what was read into runs of zeroes, of what the vault knows already, and of data.
func (f *filler) classify(r *reading) error {
	r.pieces = r.pieces[:0]
	var known []byte
	if base := f.bases[r.job.Disk]; base != nil {
		scratch := <-f.scratch
		defer func() { f.scratch <- scratch }()
		if len(scratch) >= len(r.buf) {
			known = scratch[:len(r.buf)]
			if _, err := base.ReadAt(known, r.job.Range.Off); err != nil {
				known = nil // a base that cannot be read saves nothing, and spoils nothing
			}
		}
	}
	for at := 0; at < len(r.buf); at += grain {
		part := r.buf[at:min(at+grain, len(r.buf))]
		op := stream.FillData
		switch {
		case known != nil && bytes.Equal(part, known[at:at+len(part)]):
			op = stream.FillSame
		case isZero(part):
			op = stream.FillZero
		}
		where := block.Range{Off: r.job.Range.Off + int64(at), Len: int64(len(part))}
		if last := len(r.pieces) - 1; last >= 0 && r.pieces[last].op == op {
			r.pieces[last].r.Len += where.Len
			r.pieces[last].data = r.pieces[last].data[:len(r.pieces[last].data)+len(part)]
			continue
		}
		r.pieces = append(r.pieces, piece{r: where, op: op, data: part})
	}
	return nil
}

// isZero compares with itself shifted by one byte, which the runtime does with wide instructions.
func isZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[:len(b)-1], b[1:])
}

// aligned allocates n bytes at a page boundary, as O_DIRECT wants them.
func aligned(n int) []byte {
	page := unix.Getpagesize()
	b := make([]byte, n+page)
	skip := (page - int(uintptr(unsafe.Pointer(&b[0]))%uintptr(page))) % page
	return b[skip : skip+n : skip+n]
}

// dispatch hands out as many jobs as there are free readings.
func (s *session) dispatch() {
	for len(s.filler.free) > 0 && !time.Now().Before(s.filler.pause) {
		job, ok := s.engine.Next(jobBytes)
		if !ok {
			return
		}
		last := len(s.filler.free) - 1
		r := s.filler.free[last]
		s.filler.free = s.filler.free[:last]
		r.job, r.err = job, nil
		s.filler.out[job.ID] = r
		s.filler.jobs <- r // has room for every reading
	}
}

// collect takes finished reads without waiting.
func (s *session) collect() {
	for {
		select {
		case r := <-s.filler.results:
			if r.err != nil {
				s.readFailed(r)
				s.engine.Failed(r.job.ID)
				s.retire(r)
				s.filler.pause = time.Now().Add(failedPause)
				continue
			}
			s.engine.Done(r.job.ID, fill.Place(r.end))
		default:
			return
		}
	}
}

func (s *session) retire(r *reading) {
	delete(s.filler.out, r.job.ID)
	s.filler.free = append(s.filler.free, r)
}

// appendFill puts a fill that the engine released into the stream, cut to what
// of its job was not dropped again meanwhile.
func (s *session) appendFill(f fill.Result) error {
	rec := stream.Record{Kind: stream.KindFill, Disk: f.Disk, Position: f.Rank, ValidFrom: f.ValidFrom, Time: s.now()}
	if f.Known {
		rec.Fill, rec.Range = stream.FillKnown, f.Range
		return s.append(&rec)
	}
	r := s.filler.out[f.ID]
	if r == nil {
		return fmt.Errorf("fill of job %d that nobody read", f.ID)
	}
	for _, p := range r.pieces {
		cut := p.r.Intersect(f.Range)
		if cut.Empty() {
			continue
		}
		rec.Fill, rec.Range, rec.Payload, rec.Base = p.op, cut, nil, 0
		switch p.op {
		case stream.FillData:
			from := cut.Off - p.r.Off
			rec.Payload = p.data[from : from+cut.Len]
		case stream.FillSame:
			rec.Base = s.filler.base
		}
		if err := s.append(&rec); err != nil {
			return err
		}
	}
	return nil
}

// settle lets go of what the gap was compared with, unless somebody still reads
// what was dropped again meanwhile: then the next gap, or the end, does it.
func (f *filler) settle() {
	if len(f.out) == 0 {
		_ = f.closeBases() // read-only files
	}
}

func (f *filler) closeBases() error {
	var errs []error
	for i, b := range f.bases {
		if c, ok := b.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
		f.bases[i] = nil
	}
	return errors.Join(errs...)
}
