package disk

import (
	"testing"
	"time"
)

// TestHanging: a disk that does not answer is waited for once, and asked again when it does.
func TestHanging(t *testing.T) {
	var h hung
	answer, reads := make(chan []byte), make(chan string, 10)
	read := func(node string) []byte {
		reads <- node
		if node == "hangs" {
			return <-answer
		}
		return []byte(node)
	}
	if got := h.within(time.Minute, "sound", read); string(got) != "sound" {
		t.Errorf("%q", got)
	}
	if got := h.within(20*time.Millisecond, "hangs", read); got != nil {
		t.Errorf("%q of a disk that hangs", got)
	}
	if got := h.within(time.Minute, "hangs", read); got != nil || len(reads) != 2 {
		t.Errorf("%q, after %d reads: it was asked again", got, len(reads))
	}
	if got := h.within(time.Minute, "sound", read); string(got) != "sound" {
		t.Errorf("%q beside one that hangs", got)
	}
	answer <- nil
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, known := h.nodes.Load("hangs"); !known {
			break
		}
		if time.Now().After(end) {
			t.Fatal("it has answered, and is taken for dead")
		}
	}
	go func() { answer <- []byte("back") }()
	if got := h.within(time.Minute, "hangs", read); string(got) != "back" {
		t.Errorf("%q of a disk that is back", got)
	}
}
