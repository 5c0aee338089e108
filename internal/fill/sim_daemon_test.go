package fill

import (
	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// ownerFault breaks one of the owner's duties (package comment).
type ownerFault uint8

const (
	ownerRight           ownerFault = iota
	ownerBlindSettle                // settle without a look at the drop counter
	ownerClearsAll                  // clear more bits than were copied
	ownerNotesEarly                 // the producer's place from before the bits were cleared
	ownerEndsEarly                  // the producer's place from before the read
	ownerScansEarly                 // a scan that began before the bits were cleared
	ownerProducerLate               // the scan's own place noted after it
	ownerClearsUndurable            // clear the bits before the gap record is durable
	ownerTrustsMissed               // take a missed end for a good one
	ownerEndsOff                    // stop tracking while untracked bios are on their way
)

// entry is a record of the simulated stream.
type entry struct {
	kind      stream.Kind
	position  stream.Position
	validFrom stream.Position
	b         *bio // writes
	fill      stream.FillOp
	disk      int
	off, end  int
	data      []int
	ranges    []block.DiskRange
}

type reading struct {
	job   Job
	data  []int
	todo  []int // sectors to read, in the order of reading
	end   Place
	noted bool
	done  bool
	early Place
}

// durable is what a seal stores beside the records.
type durable struct {
	records  int
	place    Place
	position stream.Position
	seen     uint64
}

// daemon reads the ring and drives the engine. All but its stream's durable part dies in a crash.
type daemon struct {
	k         *kernel
	e         *Engine
	fault     fault
	owner     ownerFault
	stream    []entry
	sealed    durable
	position  stream.Position
	place     Place
	next      int // of the ring
	seen      uint64
	gapOpen   bool
	todo      []func()
	readings  []*reading
	kept      map[ID]*reading
	stalled   int
	lazy      bool // looks at drops during a gap only when it must
	violation string
}

func (d *daemon) start() {
	d.stream = d.stream[:d.sealed.records]
	d.position, d.place, d.seen = d.sealed.position, d.sealed.place, d.sealed.seen
	d.todo, d.readings, d.kept = nil, nil, map[ID]*reading{}
	d.e = New(d.k.disks)
	d.e.fault = d.fault
	if d.k.rng.IntN(4) == 0 {
		d.e.max = bounds{marks: 6, pieces: 3, known: 2}
	}
	d.next = 0
	for d.next < len(d.k.ring) && d.k.ring[d.next].place < d.place {
		d.next++
	}
	unknown, open := unknownOf(d.stream, d.k.disks)
	d.gapOpen = open
	if len(d.stream) == 0 { // the first copy
		for i, disk := range d.k.disks {
			unknown = append(unknown, block.DiskRange{Disk: i, Range: block.Range{Len: disk.Size}})
		}
		d.position++
		d.append(entry{kind: stream.KindGap, position: d.position, ranges: unknown})
		d.gapOpen = true
		d.seal()
	}
	if d.gapOpen {
		d.k.ends = true
		d.e.Open(unknown, d.k.producer)
	}
	d.e.Checkpoint(d.place, d.position)
}

func (d *daemon) append(r entry) { d.stream = append(d.stream, r) }

func (d *daemon) seal() {
	d.sealed = durable{len(d.stream), d.place, d.position, d.seen}
	d.k.consumer = d.place
}

// step does one small thing of the session, or of a worker.
func (d *daemon) step() {
	rng := d.k.rng
	if len(d.readings) > 0 && rng.IntN(2) == 0 {
		d.readSome(d.readings[rng.IntN(len(d.readings))])
		return
	}
	if d.stalled > 0 {
		d.stalled--
		return
	}
	if len(d.todo) > 0 {
		if rng.IntN(12) == 0 { // the session loses its processor between two steps
			d.stalled = rng.IntN(40)
		}
		next := d.todo[0]
		d.todo = d.todo[1:]
		next()
		return
	}
	switch rng.IntN(10) {
	case 0, 1, 2:
		for range 1 + rng.IntN(4) {
			d.then(d.take)
		}
		d.then(func() { d.e.Checkpoint(d.place, d.position) })
	case 3:
		if d.k.drops != d.seen {
			d.look()
		}
	case 4:
		d.scan()
	case 5:
		if len(d.kept) < 3 {
			d.dispatch()
		}
	case 6:
		d.collect()
	case 7:
		for _, r := range d.e.Ready() {
			d.fill(r)
		}
	case 8:
		d.settle()
	case 9:
		d.seal()
	}
}

func (d *daemon) then(f ...func()) { d.todo = append(d.todo, f...) }

// take reads one ring record; where it tells of a drop not yet seen, the gap comes first.
func (d *daemon) take() {
	if d.next == len(d.k.ring) || d.k.ring[d.next].busy {
		return
	}
	r := d.k.ring[d.next]
	if r.drops > d.seen && !(d.gapOpen && d.lazy) {
		d.todo = nil // the walk ends here and begins again after the look
		d.look()
		return
	}
	d.next++
	d.place = r.end
	d.position++
	d.append(entry{kind: stream.KindWrite, position: d.position, b: r.b})
	d.e.Captured(r.b.disk, block.Range{Off: int64(r.b.off), Len: int64(r.b.n)}, r.place, d.position)
}

// look copies the gap bits, opens a gap over them, and clears them once it is durable.
func (d *daemon) look() {
	var drops uint64
	var ranges []block.DiskRange
	var early, place Place
	seal, clear := d.seal, func() {
		if d.owner == ownerClearsAll {
			ranges = nil
			for i := range d.k.disks {
				ranges = append(ranges, d.k.peek(i)...)
			}
		}
		d.clear(ranges)
	}
	if d.owner == ownerClearsUndurable {
		seal, clear = clear, seal
	}
	d.then(func() { drops = d.k.drops })
	for i := range d.k.disks {
		d.then(func() { ranges = append(ranges, d.k.peek(i)...) })
	}
	d.then(func() {
		d.seen = max(d.seen, drops)
		if len(ranges) == 0 {
			d.e.Checkpoint(d.place, d.position)
			return
		}
		copied := append([]block.DiskRange(nil), ranges...)
		if d.gapOpen {
			d.k.met.Redropped++
		}
		d.gapOpen, d.k.ends = true, true
		d.e.Checkpoint(d.place, d.position)
		d.position++
		d.append(entry{kind: stream.KindGap, position: d.position, ranges: copied})
		d.e.Open(copied, Held)
		d.e.Checkpoint(d.place, d.position)
		early = d.k.producer
		var low Place
		var lost []block.DiskRange
		d.then(seal)
		if d.owner == ownerScansEarly {
			d.then(func() { low, lost = d.lookAround() })
		}
		d.then(clear, func() { place = d.k.producer }, func() {
			if d.owner == ownerNotesEarly {
				place = early
			}
			d.e.Cleared(copied, place)
			if d.owner == ownerScansEarly {
				d.e.Scanned(low, lost)
			}
		})
	})
}

func (d *daemon) clear(ranges []block.DiskRange) {
	for _, r := range ranges {
		d.k.bits[r.Disk][r.Off/d.k.disks[r.Disk].BlockSize] = false
	}
}

func (d *daemon) lookAround() (Place, []block.DiskRange) {
	low := d.k.producer
	lost := d.half(&low, 0)
	return low, append(lost, d.half(&low, 1)...)
}

// half looks at one half of the map of bios in flight.
func (d *daemon) half(low *Place, odd int) []block.DiskRange {
	var lost []block.DiskRange
	for key := range 12 {
		f := d.k.inflight[key]
		if f == nil || key%2 != odd {
			continue
		}
		*low = min(*low, f.place)
		if f.dropped {
			lost = append(lost, block.DiskRange{Disk: f.disk, Range: block.Range{Off: int64(f.off), Len: int64(f.n)}})
		}
	}
	return lost
}

func (d *daemon) scan() {
	var low Place
	var lost []block.DiskRange
	d.then(func() { low = d.k.producer },
		func() { lost = append(lost, d.half(&low, 0)...) },
		func() { lost = append(lost, d.half(&low, 1)...) },
		func() {
			if d.owner == ownerProducerLate {
				low = d.k.producer
				d.half(&low, 0)
			}
			d.e.Scanned(low, lost)
		})
}

func (d *daemon) dispatch() {
	j, ok := d.e.Next(int64(1 + d.k.rng.IntN(24)))
	if !ok {
		return
	}
	r := &reading{job: j, data: make([]int, j.Range.Len), todo: d.k.rng.Perm(int(j.Range.Len)), early: d.k.producer}
	d.readings = append(d.readings, r)
	d.kept[j.ID] = r
}

func (d *daemon) readSome(r *reading) {
	switch {
	case len(r.todo) > 0:
		s := r.todo[0]
		r.todo = r.todo[1:]
		r.data[s] = d.k.content[r.job.Disk][int(r.job.Range.Off)+s]
	case !r.noted:
		r.noted, r.end = true, d.k.producer
		if d.owner == ownerEndsEarly {
			r.end = r.early
		}
	default:
		r.done = true
	}
}

func (d *daemon) collect() {
	left := d.readings[:0]
	for _, r := range d.readings {
		switch {
		case !r.done:
			left = append(left, r)
		case d.k.rng.IntN(10) == 0:
			d.e.Failed(r.job.ID)
			delete(d.kept, r.job.ID)
		default:
			d.e.Done(r.job.ID, r.end)
		}
	}
	d.readings = left
}

func (d *daemon) fill(f Result) {
	r := entry{kind: stream.KindFill, position: f.Rank, validFrom: f.ValidFrom, disk: f.Disk, off: int(f.Range.Off), end: int(f.Range.End())}
	if f.Known {
		r.fill = stream.FillKnown
		d.k.met.Known++
		d.append(r)
		return
	}
	job := d.kept[f.ID]
	if job == nil {
		d.violation = "a result of a job that is over"
		return
	}
	switch {
	case f.Range.Empty():
		d.k.met.Voided++
	case f.Last:
		d.k.met.Data++
	default:
		d.k.met.Pieces++
	}
	if !f.Range.Empty() {
		r.fill = stream.FillData
		r.data = job.data[f.Range.Off-job.job.Range.Off:][:f.Range.Len]
		d.append(r)
	}
	if f.Last {
		delete(d.kept, f.ID)
	}
}

func (d *daemon) settle() {
	if d.k.drops != d.seen && d.owner != ownerBlindSettle {
		if d.gapOpen {
			d.look()
		}
		return
	}
	if from, ok := d.e.Settled(); ok {
		d.append(entry{kind: stream.KindSettled, position: from})
		d.gapOpen = false
		return
	}
	if !d.gapOpen && d.k.ends && (d.owner == ownerEndsOff || !d.k.untracked()) {
		d.k.ends = false
		clear(d.k.inflight)
	}
}
