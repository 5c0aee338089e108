package fill

import (
	"slices"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

type job struct {
	Job
	began stream.Position
	end   Place
}

// Next gives the next range to read, at most max bytes (at least one block) and
// contiguous; false: nothing may be read now. The disks take turns, each is swept
// from front to back. The read must begin after Next returned; Done or Failed
// must follow.
func (e *Engine) Next(max int64) (Job, bool) {
	for range e.disks {
		i := e.turn
		e.turn = (e.turn + 1) % len(e.disks)
		d := &e.disks[i]
		if d.bytes == 0 || d.noneAt == e.version {
			continue
		}
		if a, b := e.sweep(d, max); a < b {
			return e.begin(i, a, b), true
		}
		d.noneAt = e.version
	}
	return Job{}, false
}

// sweep finds what to read next, from the cursor on and then once from the front.
func (e *Engine) sweep(d *diskState, limit int64) (int64, int64) {
	limit = max(limit&^(d.BlockSize-1), d.BlockSize)
	if a, b := e.search(d, d.cursor, d.Size, limit); a < b {
		return a, b
	}
	return e.search(d, 0, d.cursor, limit)
}

func (e *Engine) search(d *diskState, from, to, limit int64) (a, b int64) {
	i, j := d.find(from)
	for ; i < len(d.nodes) && d.nodes[i].first < to; i, j = i+1, 0 {
		if a == b && !e.passed(d.nodes[i].idle) {
			continue
		}
		for _, p := range d.nodes[i].pieces[j:] {
			if a < b && (p.off != b || !e.eligible(p)) {
				return a, b
			}
			if !e.eligible(p) {
				continue
			}
			if p.off >= to {
				return a, b
			}
			if a == b {
				if a, b = d.clear(max(p.off, from), min(p.end, to)); a >= b {
					a, b = 0, 0
					continue
				}
			} else if _, end := d.clear(b, p.end); end == p.end && firstClear(d, b) {
				b = end
			} else {
				return a, b
			}
			if b-a >= limit {
				return a, a + limit
			}
			if b < p.end {
				return a, b // a lost write in flight begins here
			}
		}
	}
	return a, b
}

func firstClear(d *diskState, at int64) bool {
	a, _ := d.clear(at, d.Size)
	return a == at
}

func (e *Engine) passed(last Place) bool {
	return last != Held && (last <= e.rank.place || e.fault == faultNoLastDrop)
}

// eligible: nobody fills it yet, the low-water mark has passed its last drop,
// and the bios in flight were looked at since then. Equal places alone do not
// say that: the ring stands still where all writes are lost.
func (e *Engine) eligible(p piece) bool {
	return p.owner == 0 && e.passed(p.last) && (p.scan < e.scans || e.fault == faultOldScan)
}

func (e *Engine) begin(disk int, a, b int64) Job {
	e.lastID++
	d := &e.disks[disk]
	with := e.scratch[:0]
	d.each(a, b, func(p piece) bool {
		p.owner = e.lastID
		with = append(with, p)
		return true
	})
	e.splice(d, a, b, with)
	d.cursor = b
	j := &job{Job: Job{ID: e.lastID, Disk: disk, Range: block.Range{Off: a, Len: b - a}, Rank: e.rank.position}, began: e.reader().position}
	if e.fault == faultRankAtReader {
		j.Rank = e.reader().position
	}
	e.jobs[j.ID] = j
	return j.Job
}

// Done says that a job's range was read, and that the producer was at end after the read.
func (e *Engine) Done(id ID, end Place) {
	j := e.jobs[id]
	if j == nil {
		return
	}
	delete(e.jobs, id)
	j.end = end
	e.waiting = append(e.waiting, j)
}

// Failed gives a job up: its range is unknown as before and will come up again.
func (e *Engine) Failed(id ID) {
	j := e.jobs[id]
	if j == nil {
		return
	}
	delete(e.jobs, id)
	e.version++
	d := &e.disks[j.Disk]
	with := e.scratch[:0]
	d.each(j.Range.Off, j.Range.End(), func(p piece) bool {
		if p.owner == id {
			p.owner = 0
		}
		with = append(with, p)
		return true
	})
	e.splice(d, j.Range.Off, j.Range.End(), with)
}

// Ready gives the fills that may be appended to the stream now; append them in
// this order. Each is given once, and its blocks are known from then on. The
// slice is valid until the next call.
func (e *Engine) Ready() []Result {
	e.out = e.out[:0]
	n := 0
	for n < len(e.known) && e.known[n].place < e.low {
		k := e.known[n]
		e.close(Result{Disk: k.disk, Rank: k.position, ValidFrom: k.position, Known: true}, k.id, k.r)
		n++
	}
	e.known = slices.Delete(e.known, 0, n)
	reader := e.reader().place
	e.waiting = slices.DeleteFunc(e.waiting, func(j *job) bool {
		if reader < j.end && e.fault != faultValidAtRead {
			return false
		}
		first := len(e.out)
		e.close(Result{ID: j.ID, Disk: j.Disk, Rank: j.Rank, ValidFrom: e.validFrom(j)}, j.ID, j.Range)
		if len(e.out) == first {
			e.out = append(e.out, Result{ID: j.ID, Disk: j.Disk, Range: block.Range{Off: j.Range.Off}, Rank: j.Rank})
		}
		e.out[len(e.out)-1].Last = true
		return true
	})
	return e.out
}

func (e *Engine) validFrom(j *job) stream.Position {
	if e.fault == faultValidAtRead {
		return j.began
	}
	return max(j.Rank, e.positionAt(j.end))
}

// close makes known what owner still holds of r, and gives a result for each run of it.
func (e *Engine) close(as Result, owner ID, r block.Range) {
	d := &e.disks[as.Disk]
	first := len(e.out)
	with := e.scratch[:0]
	d.each(r.Off, r.End(), func(p piece) bool {
		if p.owner != owner {
			with = append(with, p)
			return true
		}
		e.from = max(e.from, as.ValidFrom)
		if n := len(e.out); n > first && e.out[n-1].Range.End() == p.off {
			e.out[n-1].Range.Len += p.end - p.off
			return true
		}
		as.Range = block.Range{Off: p.off, Len: p.end - p.off}
		e.out = append(e.out, as)
		return true
	})
	if len(e.out) > first {
		e.splice(d, r.Off, r.End(), with)
	}
}
