package spool

import (
	"bytes"
	"testing"
)

// FuzzCursor: no file makes the decoder panic, and the slot that it chooses is
// one that stands in the file as it would be written.
func FuzzCursor(f *testing.F) {
	two := make([]byte, 2*slotEvery)
	copy(two, slot{turn: 4, next: 9}.encode())
	copy(two[slotEvery:], slot{turn: 5, next: 10}.encode())
	f.Add(two)
	f.Add(two[:100])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, ok := decodeCursor(b); ok && !bytes.Contains(b, v.encode()) {
			t.Errorf("%+v does not stand in the file", v)
		}
	})
}
