package timeline

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/sim/story"
	"tidemark/internal/stream"
)

// These tell short histories by hand: what the random ones, which keep every
// rule, do not come across.

var (
	wholeA = block.Range{Len: 64 << 10}
	wholeB = block.Range{Len: 44<<10 + 3*512}
)

func gapOf(p stream.Position, ranges ...block.DiskRange) stream.Record {
	return stream.Record{Kind: stream.KindGap, Position: p, Cause: stream.CauseInitial, Ranges: ranges, Time: int64(p)}
}

func zeroFill(disk int, rank, valid stream.Position, r block.Range) stream.Record {
	return stream.Record{Kind: stream.KindFill, Fill: stream.FillZero, Disk: disk, Position: rank, ValidFrom: valid, Range: r}
}

func settledAt(p stream.Position) stream.Record {
	return stream.Record{Kind: stream.KindSettled, Position: p}
}

func writeOf(p stream.Position, fill byte) stream.Record {
	return stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: p, Range: block.Range{Len: 512}, Payload: slices.Repeat([]byte{fill}, 512), Time: int64(p)}
}

// beginning is a first copy of both disks, settled at position 1.
func beginning() []stream.Record {
	return []stream.Record{gapOf(1, block.DiskRange{Disk: 0, Range: wholeA}, block.DiskRange{Disk: 1, Range: wholeB}), zeroFill(0, 1, 1, wholeA), zeroFill(1, 1, 1, wholeB), settledAt(1)}
}

// told puts records into a vault, a segment each, and loads it.
func told(t testing.TB, records []stream.Record) (*written, *History) {
	t.Helper()
	w := keep(t, records, 1, 1)
	h, err := Load(t.Context(), w.v, "g")
	if err != nil || h.Damage() != nil {
		t.Fatalf("%v, %v", err, h.Damage())
	}
	return w, h
}

// found is what a verification says, a line each.
func found(t *testing.T, w *written) string {
	t.Helper()
	r, err := Verify(t.Context(), w.v, "g", func(int64, int64) {})
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, d := range r.Damage {
		lines = append(lines, d.String())
	}
	return strings.Join(lines, "\n")
}

// TestSettledTooEarly: a mark that names a position before its blocks were
// known does not make a point there, and is found.
func TestSettledTooEarly(t *testing.T) {
	records := append(beginning()[:1], writeOf(2, 1), writeOf(3, 2), zeroFill(0, 1, 3, wholeA), zeroFill(1, 1, 1, wholeB), settledAt(1), writeOf(4, 3))
	w, h := told(t, records)
	if got := h.Stretches(); !slices.Equal(got, []Stretch{{First: 3, Last: 4}}) {
		t.Errorf("stretches %v", got)
	}
	if got := found(t, w); !strings.Contains(got, "a stretch begins at 1, before all its blocks were known at 3") {
		t.Errorf("found: %s", got)
	}
}

// TestSettledTooSoon: a mark while a block is unknown is found.
func TestSettledTooSoon(t *testing.T) {
	records := []stream.Record{gapOf(1, block.DiskRange{Disk: 0, Range: wholeA}), zeroFill(0, 1, 1, block.Range{Len: 8 << 10}), settledAt(1)}
	w, _ := told(t, records)
	if got := found(t, w); !strings.Contains(got, "disk a, bytes 8192+57344") || !strings.Contains(got, "57344 bytes are unknown where a stretch begins; spoils points from seq:1") {
		t.Errorf("found: %s", got)
	}
}

// TestEmptyStretch: a mark that names a position that a gap cuts off makes no stretch.
func TestEmptyStretch(t *testing.T) {
	records := append(beginning()[:3], settledAt(2), gapOf(2, block.DiskRange{Disk: 0, Range: wholeA}), zeroFill(0, 2, 2, wholeA), settledAt(2), writeOf(3, 1))
	_, h := told(t, records)
	if got := h.Stretches(); !slices.Equal(got, []Stretch{{First: 2, Last: 3}}) {
		t.Errorf("stretches %v", got)
	}
	if _, err := h.Resolve(stream.Spec{Position: 1}); !errors.Is(err, ErrInsideGap) {
		t.Errorf("position 1: %v", err)
	}
}

// TestLaterFillWins: of two fills of one rank the one that was appended later
// holds, and either is above the write of their rank.
func TestLaterFillWins(t *testing.T) {
	data := func(fill byte) stream.Record {
		return stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Position: 2, ValidFrom: 2, Range: block.Range{Len: 512}, Payload: slices.Repeat([]byte{fill}, 512)}
	}
	records := append(beginning()[:1], writeOf(2, 1), data(7), data(8), zeroFill(0, 1, 1, wholeA), zeroFill(1, 1, 1, wholeB), settledAt(2))
	_, h := told(t, records)
	v, err := h.View(t.Context(), 0, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if got := read(t, v)[0]; got != 8 {
		t.Errorf("the first byte is %d", got)
	}
}

func preparedAt(p stream.Position, name string) stream.Record {
	return stream.Record{Kind: stream.KindPrepared, Position: p, Time: int64(p), Name: name}
}

func verdictOn(p stream.Position, commit bool) stream.Record {
	return stream.Record{Kind: stream.KindVerdict, Position: p, Commit: commit}
}

// TestTwoPhases: a prepared mark is a bookmark once its commit follows, in its own
// place, whatever came in between, and never without.
func TestTwoPhases(t *testing.T) {
	records := append(beginning(), preparedAt(2, "first"), preparedAt(3, "second"), preparedAt(4, "open"), writeOf(5, 1),
		stream.Record{Kind: stream.KindBookmark, Position: 6, Time: 6, Name: "plain"}, verdictOn(3, false), preparedAt(7, "second"),
		gapOf(8, block.DiskRange{Range: wholeA}), verdictOn(2, true), verdictOn(7, true))
	w, h := told(t, records)
	var names []string
	for _, p := range h.Points() {
		if p.Bookmark != "" {
			names = append(names, fmt.Sprint(p.Bookmark, " ", p.Position))
		}
	}
	if want := []string{"first 2", "plain 6", "second 7"}; !slices.Equal(names, want) {
		t.Errorf("bookmarks %q, want %q", names, want)
	}
	if u := h.Undecided(); len(u) != 1 || u[0].Bookmark != "open" || u[0].Position != 4 {
		t.Errorf("undecided: %+v", u)
	}
	if _, err := h.Resolve(stream.Spec{Bookmark: "open"}); !errors.Is(err, ErrNoPoint) {
		t.Errorf("a prepared mark is offered: %v", err)
	}
	if p, err := h.Resolve(stream.Spec{Bookmark: "first"}); err != nil || p.Position != 2 {
		t.Errorf("the committed one: %+v, %v", p, err)
	}
	if got := found(t, w); got != "" {
		t.Errorf("found: %s", got)
	}
}

// TestVerifyFindsBrokenRules: histories whose every checksum fits and that
// nobody may have written.
func TestVerifyFindsBrokenRules(t *testing.T) {
	for _, c := range []struct {
		name    string
		records []stream.Record
		want    string
	}{
		{"a position twice", append(beginning(), writeOf(2, 1), writeOf(2, 2)), "position 2 comes after 2"},
		{"a position left out", append(beginning(), writeOf(2, 1), writeOf(4, 2)), "position 4 comes after 2"},
		{"a fill that reaches into the stretch before", append(beginning(), writeOf(2, 1), gapOf(3, block.DiskRange{Range: wholeA}), zeroFill(0, 2, 3, wholeA), settledAt(3)),
			"a fill of rank 2 reaches into the stretch that ended at 2"},
		{"a verdict on nothing", append(beginning(), writeOf(2, 1), verdictOn(2, true)), "a verdict on position 2, where no prepared mark waits for one"},
		{"two verdicts", append(beginning(), preparedAt(2, "x"), verdictOn(2, false), verdictOn(2, true)), "a verdict on position 2, where"},
		{"a fill where nothing is unknown", append(beginning(), writeOf(2, 1), zeroFill(0, 2, 2, wholeA)), "a fill of rank 2 where nothing is unknown"},
	} {
		w := keep(t, c.records, 1, 1)
		if got := found(t, w); !strings.Contains(got, c.want) {
			t.Errorf("%s: found %q, want %q", c.name, got, c.want)
		}
	}
	sound := keep(t, append(beginning(), writeOf(2, 1), writeOf(3, 2)), 1, 1)
	if got := found(t, sound); got != "" {
		t.Errorf("a sound one: %s", got)
	}
}

// spoilPayload damages a segment's payload, some bytes before its end.
func spoilPayload(t *testing.T, w *written, sequence uint64, before int) {
	t.Helper()
	path := objectPath(t, w, sequence)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-256-1-before] ^= 1 // the footer follows
	rewrite(t, path, b)
}

func objectPath(t *testing.T, w *written, sequence uint64) string {
	t.Helper()
	refs, err := w.v.Segments(t.Context(), "g")
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(w.v.Dir(), segments, refs[sequence-1].Name)
}

// TestDamagedPayload: reading what is damaged names group, disk, range and
// object, and the newest point that does not need it; what lies elsewhere is
// read, and points at which it is covered are whole.
func TestDamagedPayload(t *testing.T) {
	at := func(r stream.Record, off int64) stream.Record {
		r.Range.Off = off
		return r
	}
	records := append(beginning(), writeOf(2, 1), at(writeOf(3, 2), 8192), writeOf(4, 3), at(writeOf(5, 4), 8192))
	w := keep(t, records, 1, 1)
	spoilPayload(t, w, 6, 0) // that of position 3
	h, err := Load(t.Context(), w.v, "g")
	if err != nil || h.Damage() != nil {
		t.Fatalf("%v, %v", err, h.Damage())
	}
	v, err := h.View(t.Context(), 0, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	buf := make([]byte, 512)
	if _, err := v.ReadAt(buf, 0); err != nil || buf[0] != 3 {
		t.Errorf("beside the damage: %d, %v", buf[0], err)
	}
	var damaged *DamagedError
	_, err = v.ReadAt(buf, 8192)
	if !errors.As(err, &damaged) || damaged.From != 3 || damaged.Newest != 2 {
		t.Fatalf("the damage: %v", err)
	}
	for _, want := range []string{"group g", "disk a", "bytes 8192+512", "object 0000000000000006-", "newest sound point is seq:2"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	for p, sound := range map[stream.Position]bool{2: true, 3: false, 4: false, 5: true} {
		v, err := h.View(t.Context(), 0, p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.ReadAt(make([]byte, v.Size()), 0); (err == nil) != sound {
			t.Errorf("position %d: %v", p, err)
		}
		v.Close()
	}
	if got := found(t, w); !strings.Contains(got, "disk a, bytes 8192+512") || !strings.Contains(got, "spoils points from seq:3 to seq:5") || strings.Contains(got, "\n") {
		t.Errorf("found: %s", got)
	}
}

// TestNewestSoundPoint: one frame has the payload of several records, and the
// point that is named needs none of them, whichever was read.
func TestNewestSoundPoint(t *testing.T) {
	late := writeOf(3, 2)
	late.Range.Off = 8192
	w := keep(t, append(beginning(), writeOf(2, 1), late), 1, 1<<30)
	spoilPayload(t, w, 1, 0)
	h, err := Load(t.Context(), w.v, "g")
	if err != nil {
		t.Fatal(err)
	}
	v, err := h.View(t.Context(), 0, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	var damaged *DamagedError
	if _, err := v.ReadAt(make([]byte, 512), 8192); !errors.As(err, &damaged) || damaged.Newest != 1 {
		t.Errorf("the content of position 2 is gone as well: %v", err)
	}
}

// TestTimeOfDamage: a time at or behind the last that is known may mean what is
// lost, and gives no older point.
func TestTimeOfDamage(t *testing.T) {
	w := keep(t, append(beginning(), writeOf(2, 1), writeOf(3, 2), writeOf(4, 3)), 1, 1)
	if err := os.Remove(objectPath(t, w, 7)); err != nil { // with position 4
		t.Fatal(err)
	}
	h, err := Load(t.Context(), w.v, "g")
	if err != nil {
		t.Fatal(err)
	}
	for at, sound := range map[int64]bool{2: true, 3: false, 4: false, 100: false} {
		var damaged *DamagedError
		p, err := h.Resolve(stream.Spec{Time: time.Unix(0, at)})
		if sound && (err != nil || p.Position != 2) || !sound && (!errors.As(err, &damaged) || damaged.Newest != 3) {
			t.Errorf("time %d: %v, %v", at, p, err)
		}
	}
}

// TestOpeningReadsNoData: where not one payload is whole the points are known
// all the same, and a view opens.
func TestOpeningReadsNoData(t *testing.T) {
	w := keep(t, append(beginning(), writeOf(2, 1), writeOf(3, 2), writeOf(4, 3)), 1, 1)
	for sequence := uint64(5); sequence <= 7; sequence++ {
		spoilPayload(t, w, sequence, 0)
	}
	h, err := Load(t.Context(), w.v, "g")
	if err != nil || h.Damage() != nil || !slices.Equal(h.Stretches(), []Stretch{{First: 1, Last: 4}}) {
		t.Fatalf("%v, %v, %v", err, h.Damage(), h.Stretches())
	}
	v, err := h.View(t.Context(), 0, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if _, err := v.ReadAt(make([]byte, 512), 0); !errors.Is(err, segment.ErrDamaged) {
		t.Errorf("reading: %v", err)
	}
}

// TestOnlyTheDamagedFrame: of the records of a segment only those are named
// whose payload lies in the damaged frame.
func TestOnlyTheDamagedFrame(t *testing.T) {
	old := sizes
	sizes[0] = 192 << 10
	defer func() { sizes = old }()
	s := story.New(1)
	whole := block.Range{Len: sizes[0]}
	records := []stream.Record{gapOf(1, block.DiskRange{Range: whole}), zeroFill(0, 1, 1, whole), settledAt(1)}
	for p := range stream.Position(3) {
		r := writeOf(2+p, 0)
		r.Range = block.Range{Off: int64(p) * segment.FrameSize, Len: segment.FrameSize}
		r.Payload = s.Payload(segment.FrameSize)
		records = append(records, r)
	}
	w := keep(t, records, 1, 1<<30)          // one segment
	spoilPayload(t, w, 1, segment.FrameSize) // of three the second
	if got := found(t, w); !strings.Contains(got, "disk a, bytes 65536+65536") || !strings.Contains(got, "from seq:3 to seq:4") || strings.Contains(got, "\n") {
		t.Errorf("found: %s", got)
	}
}

// TestDamageInsideAGap: where the mark that ends a gap is lost, the positions of
// the gap are damaged, not merely inside it.
func TestDamageInsideAGap(t *testing.T) {
	records := append(beginning(), writeOf(2, 1), gapOf(3, block.DiskRange{Range: wholeA}), writeOf(4, 1), zeroFill(0, 3, 3, wholeA), settledAt(3), writeOf(5, 1))
	w := keep(t, records, 1, 1)
	if err := os.Truncate(objectPath(t, w, 9), 100); err != nil { // with the mark
		t.Fatal(err)
	}
	h, err := Load(t.Context(), w.v, "g")
	if err != nil {
		t.Fatal(err)
	}
	for p := range stream.Position(5) {
		var damaged *DamagedError
		_, err := h.Resolve(stream.Spec{Position: p + 1})
		if p+1 <= 2 && err != nil || p+1 > 2 && (!errors.As(err, &damaged) || damaged.Newest != 2) {
			t.Errorf("position %d: %v", p+1, err)
		}
	}
	if got := found(t, w); !strings.Contains(got, "spoils points from seq:3 to seq:5") {
		t.Errorf("found: %s", got)
	}
}
