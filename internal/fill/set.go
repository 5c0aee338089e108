package fill

import (
	"slices"
	"sort"
)

// piece is a run of unknown blocks that share one fate. Offsets are bytes, at
// block boundaries or the disk's end.
type piece struct {
	off, end int64
	last     Place  // no write before it, but possibly every one after it, is known to be captured
	scan     uint64 // scans delivered when last was set: one more must come before a read
	owner    ID     // the job or captured write that will close it; 0: nobody yet
}

// node is a run of neighbouring pieces, never empty.
type node struct {
	first  int64 // off of the first piece
	idle   Place // least last among the pieces without owner; Held where there is none below it
	pieces []piece
}

const (
	nodeMax = 64 // pieces of a node; a fuller one is cut into halves
	nodeMin = 16 // neighbours that have less than this together are joined
)

// set is the unknown pieces of one disk, sorted, without overlap: two levels of
// slices, so that a million pieces stay compact and an edit moves a few KiB.
type set struct {
	nodes []node
	bytes int64
	count int
	mid   []piece // scratch of splice
}

// find gives the node and index of the first piece that ends after off.
// Past the last piece the node is len(s.nodes).
func (s *set) find(off int64) (int, int) {
	i := sort.Search(len(s.nodes), func(i int) bool { return s.nodes[i].first > off }) - 1
	if i < 0 {
		return 0, 0
	}
	p := s.nodes[i].pieces
	j := sort.Search(len(p), func(j int) bool { return p[j].end > off })
	if j == len(p) {
		return i + 1, 0
	}
	return i, j
}

// each calls fn with every piece in [a, b), cut to it, until fn returns false. fn must not edit the set.
func (s *set) each(a, b int64, fn func(p piece) bool) {
	i, j := s.find(a)
	for ; i < len(s.nodes); i, j = i+1, 0 {
		for _, p := range s.nodes[i].pieces[j:] {
			if p.off >= b {
				return
			}
			p.off, p.end = max(p.off, a), min(p.end, b)
			if !fn(p) {
				return
			}
		}
	}
}

// splice replaces all that is in [a, b) by the pieces of with, which are sorted and lie in it.
func (s *set) splice(a, b int64, with []piece) {
	i, _ := s.find(a)
	if i > 0 && i == len(s.nodes) {
		i-- // past the last piece: add to the last node
	}
	s.mid = s.mid[:0]
	k, placed := i, false
	for ; k < len(s.nodes); k++ {
		n := &s.nodes[k]
		if n.first >= b && k > i {
			break
		}
		for _, p := range n.pieces {
			s.bytes -= p.end - p.off
			s.count--
			if p.off < a {
				s.push(piece{p.off, min(p.end, a), p.last, p.scan, p.owner})
			}
			if p.end > b {
				s.place(with, &placed)
				s.push(piece{max(p.off, b), p.end, p.last, p.scan, p.owner})
			}
		}
	}
	s.place(with, &placed)
	s.rebuild(i, k)
}

func (s *set) place(with []piece, placed *bool) {
	if *placed {
		return
	}
	*placed = true
	for _, p := range with {
		s.push(p)
	}
}

// push appends to the scratch, joining neighbours that share their fate.
func (s *set) push(p piece) {
	s.bytes += p.end - p.off
	if n := len(s.mid); n > 0 {
		if q := &s.mid[n-1]; q.end == p.off && q.last == p.last && q.scan == p.scan && q.owner == p.owner {
			q.end = p.end
			return
		}
	}
	s.count++
	s.mid = append(s.mid, p)
}

// rebuild makes the scratch the content of nodes i to k-1.
func (s *set) rebuild(i, k int) {
	if k-i == 1 && len(s.mid) > 0 && len(s.mid) <= nodeMax { // the common case
		n := &s.nodes[i]
		n.pieces = append(n.pieces[:0], s.mid...)
		n.weigh()
		s.join(i)
		return
	}
	var fresh []node
	for left := s.mid; len(left) > 0; {
		size := len(left)
		if size > nodeMax {
			size = nodeMax / 2
		}
		n := node{pieces: slices.Clone(left[:size])}
		n.weigh()
		fresh = append(fresh, n)
		left = left[size:]
	}
	s.nodes = slices.Replace(s.nodes, i, k, fresh...)
	s.join(i)
}

// join makes one node of i and the next where both are small, so that holes do
// not leave the set in crumbs.
func (s *set) join(i int) {
	if i+1 >= len(s.nodes) || len(s.nodes[i].pieces)+len(s.nodes[i+1].pieces) > nodeMin {
		return
	}
	n := &s.nodes[i]
	n.pieces = append(n.pieces, s.nodes[i+1].pieces...)
	n.weigh()
	s.nodes = slices.Delete(s.nodes, i+1, i+2)
}

func (n *node) weigh() {
	n.first, n.idle = n.pieces[0].off, Held
	for _, p := range n.pieces {
		if p.owner == 0 {
			n.idle = min(n.idle, p.last)
		}
	}
}
