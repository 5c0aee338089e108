package protect

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

// Stats counts what a group did since this daemon began. It outlives the group's
// sessions. Who counts allocates nothing and waits for nobody; all methods may be
// called concurrently.
type Stats struct {
	disks    []diskCounts
	gaps     [gapCauses]atomic.Uint64 // opened, by stream.Cause
	widened  atomic.Uint64
	made     [2]atomic.Uint64 // bookmarks, by kind of barrier: cut, held
	refused  atomic.Uint64
	dropped  atomic.Uint64
	durable  latencies // from capture to the spool
	vaulted  latencies // from capture to the vault
	drained  latencies // from capture to a consumer's commit
	churn    churn
	moves    [modesMax][modesMax][movesMax]atomic.Uint64
	mu       sync.Mutex // of what follows
	mode     int
	since    time.Time
	spent    [modesMax]time.Duration
	gapSince time.Time // zero: none is open
	inGaps   time.Duration
	last     LastMark
	sealed   []parcelled // not in the vault yet, oldest first
}

// parcelled is a segment on its way.
type parcelled struct {
	sequence uint64
	captured time.Time // its oldest write
	bytes    int64
	disks    []share // what it has of each
}

// share is what a segment has of one disk.
type share struct {
	bytes  uint64 // of writes' content
	oldest int64  // time of the oldest write, in nanoseconds since 1970; 0: none
}

type diskCounts struct {
	writes, bytes    atomic.Uint64 // with their content
	zeroes, discards atomic.Uint64 // bytes
	sizes            [SizeBuckets]atomic.Uint64
	gaps             atomic.Uint64
	churn            churn
	open             atomic.Uint64 // bytes of writes' content in the segment under construction
	oldest           atomic.Int64  // time of the oldest write in that; 0: none
}

const gapCauses = 8

// SizeBuckets is how many sizes of writes are told apart: up to 512 bytes, 1 KiB,
// 2 KiB and so on, each twice the one before, up to 8 MiB; the last holds what is larger.
const SizeBuckets = 16

// SizeBound is the largest write of a bucket in bytes; 0 of the last.
func SizeBound(bucket int) int64 {
	if bucket >= SizeBuckets-1 {
		return 0
	}
	return 512 << bucket
}

func sizeBucket(n int64) int {
	if n <= 512 {
		return 0
	}
	return min(bits.Len64(uint64(n-1))-9, SizeBuckets-1)
}

func newStats(disks int) *Stats {
	return &Stats{disks: make([]diskCounts, disks), since: time.Now(), mode: modeOffline}
}

// wrote counts one captured write, of a time in nanoseconds since 1970.
func (s *Stats) wrote(r *source.Record, now int64) {
	if s == nil {
		return
	}
	d, n := &s.disks[r.Disk], uint64(r.Range.Len)
	if d.oldest.Load() == 0 {
		d.oldest.Store(now)
	}
	switch r.Op {
	case block.OpWrite:
		d.bytes.Add(n)
		d.open.Add(n)
		d.churn.add(now/int64(time.Second), n)
		s.churn.add(now/int64(time.Second), n)
	case block.OpZeroes:
		d.zeroes.Add(n)
	default:
		d.discards.Add(n)
	}
	d.writes.Add(1)
	d.sizes[sizeBucket(r.Range.Len)].Add(1)
}

// begun notes that the segment under construction is empty: what was in it is
// taken from the ring once more, or lost with it.
func (s *Stats) begun() {
	if s == nil {
		return
	}
	for i := range s.disks {
		s.disks[i].open.Store(0)
		s.disks[i].oldest.Store(0)
	}
}

// stored notes that a segment is in the spool.
func (s *Stats) stored(sequence uint64, captured time.Time, bytes int64) {
	if s == nil {
		return
	}
	s.durable.observe(time.Since(captured))
	p := parcelled{sequence, captured, bytes, make([]share, len(s.disks))}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.disks {
		p.disks[i] = share{s.disks[i].open.Swap(0), s.disks[i].oldest.Swap(0)}
	}
	s.sealed = append(s.sealed, p)
}

// pending is what of a disk is captured and not in the vault; s.mu is held.
func (s *Stats) pending(disk int, now time.Time) (bytes uint64, age time.Duration) {
	d := &s.disks[disk]
	bytes, oldest := d.open.Load(), d.oldest.Load()
	for i := range s.sealed {
		p := s.sealed[len(s.sealed)-1-i].disks[disk]
		if bytes += p.bytes; p.oldest != 0 {
			oldest = p.oldest
		}
	}
	if oldest != 0 {
		age = max(0, now.Sub(time.Unix(0, oldest)))
	}
	return bytes, age
}

// arrived notes that the vault holds everything up to a segment.
func (s *Stats) arrived(sequence uint64) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.sealed) > 0 && s.sealed[0].sequence <= sequence {
		s.vaulted.observe(time.Since(s.sealed[0].captured))
		s.sealed = s.sealed[1:]
	}
}

// Numbers of modes, for tables.
const (
	modeData = iota
	modeMetadata
	modeBitmap
	modeOffline
	modesMax
)

var modeNames = [modesMax]Mode{ModeData, ModeMetadata, ModeBitmap, "offline"}

func modeNumber(m Mode) int {
	for i, n := range modeNames {
		if n == m {
			return i
		}
	}
	return modeOffline
}

// Why a mode was left.
const (
	moveOpened  = int(evSettled) + 1 + iota // the group was opened
	moveOffline                             // the group went offline
	movesMax
)

var moveNames = [movesMax]string{"payload-lost", "range-lost", "settled", "opened", "offline"}

// moved notes a change of the mode.
func (s *Stats) moved(to Mode, why int) {
	if s == nil {
		return
	}
	n := modeNumber(to)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n == s.mode {
		return
	}
	now := time.Now()
	s.spent[s.mode] += now.Sub(s.since)
	s.moves[s.mode][n][why].Add(1)
	s.mode, s.since = n, now
}

// gap notes one that was opened or became wider, over ranges.
func (s *Stats) gap(cause stream.Cause, opened bool, ranges []block.DiskRange) {
	if s == nil {
		return
	}
	touched := make([]bool, len(s.disks))
	for _, r := range ranges {
		touched[r.Disk] = true
	}
	for i, is := range touched {
		if is {
			s.disks[i].gaps.Add(1)
		}
	}
	if !opened {
		s.widened.Add(1)
		return
	}
	s.gaps[int(cause)%gapCauses].Add(1)
	s.unknown()
}

// unknown notes that a gap is open, be it an earlier session's.
func (s *Stats) unknown() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gapSince.IsZero() {
		s.gapSince = time.Now()
	}
}

// known notes that no gap is open.
func (s *Stats) known() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.gapSince.IsZero() {
		s.inGaps += time.Since(s.gapSince)
		s.gapSince = time.Time{}
	}
}

// LastMark is the newest bookmark that was put.
type LastMark struct {
	Name    string
	Time    time.Time
	Barrier Barrier
	Held    time.Duration // that new writes waited
}

// put notes a bookmark.
func (s *Stats) put(m LastMark) {
	if s == nil {
		return
	}
	kind := 0
	if m.Barrier == BarrierHeld {
		kind = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.Name != "" && m.Name == s.last.Name {
		return // names are a group's once: a commit that reached it again
	}
	s.made[kind].Add(1)
	s.last = m
}

// refuse and drop note one that could not be put, and a mark that was revoked.
func (s *Stats) refuse() {
	if s != nil {
		s.refused.Add(1)
	}
}

func (s *Stats) drop() {
	if s != nil {
		s.dropped.Add(1)
	}
}

// Drained notes that a consumer has committed a batch whose newest record was captured at a time.
func (s *Stats) Drained(captured time.Time) {
	if s != nil {
		s.drained.observe(time.Since(captured))
	}
}

// latencyBounds are the upper ends of the classes of a latency.
var latencyBounds = [...]time.Duration{time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second,
	10 * time.Second, 30 * time.Second, time.Minute, 5 * time.Minute}

// latencies counts durations by class.
type latencies struct {
	classes [len(latencyBounds) + 1]atomic.Uint64
	sum     atomic.Int64
	newest  atomic.Int64
}

func (l *latencies) observe(d time.Duration) {
	d = max(d, 0)
	class := len(latencyBounds)
	for i, b := range latencyBounds {
		if d <= b {
			class = i
			break
		}
	}
	l.classes[class].Add(1)
	l.sum.Add(int64(d))
	l.newest.Store(int64(d))
}

// Latency is how long something took, over all times it did.
type Latency struct {
	Bounds []time.Duration // upper ends of the classes, but the last, which has none
	Counts []uint64        // of each class
	Sum    time.Duration
	Newest time.Duration
}

func (l *latencies) read() Latency {
	out := Latency{Bounds: latencyBounds[:], Sum: time.Duration(l.sum.Load()), Newest: time.Duration(l.newest.Load())}
	for i := range l.classes {
		out.Counts = append(out.Counts, l.classes[i].Load())
	}
	return out
}

// churnSeconds is over how long the churn is an average.
const churnSeconds = 60

// churn counts bytes by the second.
type churn struct {
	mu    sync.Mutex
	bytes [churnSeconds]uint64
	at    int64 // the newest second
	peak  uint64
}

func (c *churn) add(now int64, n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn(now)
	b := &c.bytes[c.at%churnSeconds]
	*b += n
	c.peak = max(c.peak, *b)
}

// turn clears the seconds between the newest and now; a clock that went back stays in the newest.
func (c *churn) turn(now int64) {
	for k := max(c.at, now-churnSeconds) + 1; k <= now; k++ {
		c.bytes[k%churnSeconds] = 0
	}
	c.at = max(c.at, now)
}

// read gives bytes a second, over the last minute and in its busiest second so far.
func (c *churn) read(now time.Time) (average float64, peak uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn(now.Unix())
	var sum uint64
	for _, n := range c.bytes {
		sum += n
	}
	return float64(sum) / churnSeconds, c.peak
}

// Figures are the counts of a group at one moment. Times are sums since the daemon began.
type Figures struct {
	Churn       float64 // bytes a second, over the last minute
	ChurnPeak   uint64  // bytes in one second, the most there were
	Disks       []DiskFigures
	Gaps        map[string]uint64 // opened, by cause
	GapsWidened uint64
	InGaps      time.Duration // with no new points
	InMode      map[Mode]time.Duration
	Moves       []Move
	Made        map[Barrier]uint64
	Refused     uint64
	Dropped     uint64
	Last        LastMark
	OnTheWay    int64 // bytes of segments that are not in the vault
	Durable     Latency
	Vaulted     Latency
	Drained     Latency
}

// DiskFigures are those of one disk.
type DiskFigures struct {
	Writes, Bytes, Zeroes, Discards uint64
	Sizes                           []uint64      // of writes, by SizeBound
	Gaps                            uint64        // that were opened over blocks of it, or became wider by them
	Churn                           float64       // bytes a second, over the last minute
	ChurnPeak                       uint64        // bytes in one second, the most there were
	Pending                         uint64        // bytes of writes' content that are captured and not in the vault
	Age                             time.Duration // of the oldest write that is not in the vault
}

// Move is how often one mode followed another for a reason.
type Move struct {
	From, To Mode
	Cause    string
	Count    uint64
}

// Figures reads all counts.
func (s *Stats) Figures() Figures {
	now := time.Now()
	f := Figures{Gaps: map[string]uint64{}, InMode: map[Mode]time.Duration{}, Made: map[Barrier]uint64{BarrierCut: s.made[0].Load(), BarrierHeld: s.made[1].Load()},
		GapsWidened: s.widened.Load(), Refused: s.refused.Load(), Dropped: s.dropped.Load(), Durable: s.durable.read(), Vaulted: s.vaulted.read(), Drained: s.drained.read()}
	f.Churn, f.ChurnPeak = s.churn.read(now)
	for i := range s.disks {
		f.Disks = append(f.Disks, s.disks[i].read(now))
	}
	for cause := stream.CauseInitial; cause <= stream.CauseMetadata; cause++ {
		f.Gaps[cause.String()] = s.gaps[cause].Load()
	}
	for from := range s.moves {
		for to := range s.moves[from] {
			for why := range s.moves[from][to] {
				if n := s.moves[from][to][why].Load(); n > 0 {
					f.Moves = append(f.Moves, Move{modeNames[from], modeNames[to], moveNames[why], n})
				}
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range f.Disks {
		f.Disks[i].Pending, f.Disks[i].Age = s.pending(i, now)
	}
	for i, d := range s.spent {
		if i == s.mode {
			d += now.Sub(s.since)
		}
		f.InMode[modeNames[i]] = d
	}
	f.InGaps, f.Last = s.inGaps, s.last
	for _, p := range s.sealed {
		f.OnTheWay += p.bytes
	}
	if !s.gapSince.IsZero() {
		f.InGaps += now.Sub(s.gapSince)
	}
	return f
}

// read gives the counts of a disk, but for what is pending.
func (d *diskCounts) read(now time.Time) DiskFigures {
	out := DiskFigures{Writes: d.writes.Load(), Bytes: d.bytes.Load(), Zeroes: d.zeroes.Load(), Discards: d.discards.Load(), Gaps: d.gaps.Load()}
	for k := range d.sizes {
		out.Sizes = append(out.Sizes, d.sizes[k].Load())
	}
	out.Churn, out.ChurnPeak = d.churn.read(now)
	return out
}
