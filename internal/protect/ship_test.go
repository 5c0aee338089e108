package protect

import (
	"testing"
	"time"
)

// TestOnTheWay: a segment that reached the vault before the session noted it is
// durable all the same. With nothing written afterwards nobody would say so again.
func TestOnTheWay(t *testing.T) {
	var w onTheWay
	now := time.Now()
	w.push(1, now, 10)
	if durable, oldest := w.state(); durable != 0 || oldest.IsZero() {
		t.Fatalf("on the way: %d, %v", durable, oldest)
	}
	w.arrived(1)
	w.arrived(2) // the shipper was faster
	w.push(2, now, 20)
	if durable, oldest := w.state(); durable != 20 || !oldest.IsZero() {
		t.Fatalf("arrived before it was noted: %d, %v", durable, oldest)
	}
	w.push(3, now, 30)
	if durable, oldest := w.state(); durable != 20 || oldest.IsZero() {
		t.Fatalf("the next one: %d, %v", durable, oldest)
	}
}
