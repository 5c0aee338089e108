package testkit

import (
	"testing"

	"go.uber.org/goleak"
)

// NoLeaks fails the test where goroutines that it started outlive it. Call it
// first: what is called first is checked last.
func NoLeaks(t testing.TB) {
	t.Helper()
	already := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		if !t.Failed() { // a failed test may well have left some
			goleak.VerifyNone(t, already)
		}
	})
}
