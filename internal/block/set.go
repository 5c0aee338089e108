package block

import (
	"slices"
	"sort"
)

// Set is a set of bytes, kept as sorted ranges that neither overlap nor touch.
// The zero value is empty. It is used by one goroutine.
type Set struct {
	ranges []Range
}

// span gives the indexes of the ranges that overlap or touch r.
func (s *Set) span(r Range) (i, j int) {
	i = sort.Search(len(s.ranges), func(i int) bool { return s.ranges[i].End() >= r.Off })
	for j = i; j < len(s.ranges) && s.ranges[j].Off <= r.End(); j++ {
	}
	return i, j
}

// Add puts r into the set.
func (s *Set) Add(r Range) {
	if r.Empty() {
		return
	}
	i, j := s.span(r)
	if i < j {
		off, end := min(r.Off, s.ranges[i].Off), max(r.End(), s.ranges[j-1].End())
		r = Range{Off: off, Len: end - off}
	}
	s.ranges = slices.Replace(s.ranges, i, j, r)
}

// Remove takes r out of the set.
func (s *Set) Remove(r Range) {
	if r.Empty() {
		return
	}
	i, j := s.span(r)
	var keep []Range
	for _, o := range s.ranges[i:j] {
		if o.Off < r.Off {
			keep = append(keep, Range{Off: o.Off, Len: min(o.End(), r.Off) - o.Off})
		}
		if o.End() > r.End() {
			off := max(o.Off, r.End())
			keep = append(keep, Range{Off: off, Len: o.End() - off})
		}
	}
	s.ranges = slices.Replace(s.ranges, i, j, keep...)
}

// Ranges are the set's ranges in order; they are not to be changed.
func (s *Set) Ranges() []Range { return s.ranges }

// Bytes is how many bytes are in the set.
func (s *Set) Bytes() int64 {
	var n int64
	for _, r := range s.ranges {
		n += r.Len
	}
	return n
}
