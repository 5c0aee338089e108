package segment

import "io"

// File is an opened segment with what is to be closed after its last use.
type File struct {
	*Segment
	io.Closer
}

// Place is where a record stands in a group's stream: the n-th of a segment.
type Place struct {
	Sequence uint64 // of the segment
	Entry    int
}
