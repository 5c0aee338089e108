package fill

import (
	"slices"
	"sort"

	"tidemark/internal/block"
)

// span is a run of unknown bytes with the place before which its last drop lies.
type span struct {
	off, end int64
	drop     Place
}

// set is a sorted list of spans that do not overlap; neighbours that touch have
// different drops.
type set struct {
	spans []span
}

// search is the index of the first span that ends after off.
func (s *set) search(off int64) int {
	return sort.Search(len(s.spans), func(i int) bool { return s.spans[i].end > off })
}

// replace puts with in place of whatever overlaps r, keeping what sticks out.
func (s *set) replace(r block.Range, with ...span) {
	i := s.search(r.Off)
	j := i
	for j < len(s.spans) && s.spans[j].off < r.End() {
		j++
	}
	var parts []span
	if i < j && s.spans[i].off < r.Off {
		parts = append(parts, span{s.spans[i].off, r.Off, s.spans[i].drop})
	}
	parts = append(parts, with...)
	if i < j && s.spans[j-1].end > r.End() {
		parts = append(parts, span{r.End(), s.spans[j-1].end, s.spans[j-1].drop})
	}
	if i > 0 { // so that neighbours can be joined
		i--
		parts = append([]span{s.spans[i]}, parts...)
	}
	if j < len(s.spans) {
		parts = append(parts, s.spans[j])
		j++
	}
	joined := parts[:0]
	for _, p := range parts {
		if n := len(joined); n > 0 && joined[n-1].end == p.off && joined[n-1].drop == p.drop {
			joined[n-1].end = p.end
			continue
		}
		joined = append(joined, p)
	}
	s.spans = slices.Replace(s.spans, i, j, joined...)
}

// add makes r unknown with at least this drop.
func (s *set) add(r block.Range, drop Place) {
	if r.Empty() {
		return
	}
	s.replace(r, s.over(r, func(p Place) Place { return max(p, drop) }, drop)...)
}

// over gives r as spans: f of the drop where something is unknown already, otherwise fresh.
func (s *set) over(r block.Range, f func(Place) Place, fresh Place) []span {
	var out []span
	at := r.Off
	for _, p := range s.within(r) {
		if p.off > at {
			out = append(out, span{at, p.off, fresh})
		}
		out = append(out, span{p.off, p.end, f(p.drop)})
		at = p.end
	}
	if at < r.End() {
		out = append(out, span{at, r.End(), fresh})
	}
	return out
}

// within gives copies of the spans inside r, cut to it.
func (s *set) within(r block.Range) []span {
	var out []span
	for i := s.search(r.Off); i < len(s.spans) && s.spans[i].off < r.End(); i++ {
		p := s.spans[i]
		out = append(out, span{max(p.off, r.Off), min(p.end, r.End()), p.drop})
	}
	return out
}

// setDrop changes the drop of what is unknown in r.
func (s *set) setDrop(r block.Range, drop Place) {
	for _, p := range s.within(r) {
		s.replace(block.Range{Off: p.off, Len: p.end - p.off}, span{p.off, p.end, drop})
	}
}

// take makes known, and returns, the parts of r whose last drop lies at or before low.
func (s *set) take(r block.Range, low Place) []block.Range {
	var out []block.Range
	for _, p := range s.within(r) {
		if p.drop > low {
			continue
		}
		cut := block.Range{Off: p.off, Len: p.end - p.off}
		s.replace(cut)
		out = append(out, cut)
	}
	return out
}

func (s *set) bytes() int64 {
	var n int64
	for _, p := range s.spans {
		n += p.end - p.off
	}
	return n
}
