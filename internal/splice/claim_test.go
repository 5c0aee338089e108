package splice

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"tidemark/internal/testkit"
)

func claimOf(t *testing.T, s *Splice) *Claim {
	t.Helper()
	c, err := OpenClaim(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestClaim: one has it at a time; who wants it is seen by who has it, and gets
// it when that one gives it up; a guard that stands by hinders nobody.
func TestClaim(t *testing.T) {
	testkit.Need(t, "root")
	s := &Splice{Major: 1 << 11, Minor: uint32(os.Getpid())} // no device has this number
	t.Cleanup(func() { _ = os.Remove(claimPath(s)) })
	daemon, guard, doctor := claimOf(t, s), claimOf(t, s), claimOf(t, s)
	if !doctor.Left() {
		t.Error("nobody has it, and it is not left")
	}
	if err := guard.Guard(); err != nil {
		t.Fatal(err)
	}
	if doctor.Left() || guard.Contested() {
		t.Errorf("with a guard standing by: left %v, contested %v", doctor.Left(), guard.Contested())
	}
	if err := guard.Try(); err != nil {
		t.Fatal(err)
	}
	if err := daemon.Try(); !errors.Is(err, ErrClaimed) || guard.Contested() {
		t.Errorf("%v; contested %v", err, guard.Contested())
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := daemon.Take(short); !errors.Is(err, ErrClaimed) {
		t.Error(err)
	}
	taken := make(chan error)
	go func() { taken <- daemon.Take(t.Context()) }()
	for !guard.Contested() {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-taken:
		t.Fatalf("two have it (%v)", err)
	default:
	}
	guard.Close()
	if err := <-taken; err != nil {
		t.Fatal(err)
	}
	if doctor.Left() || daemon.Contested() || !doctor.Contested() {
		t.Errorf("left %v, contested %v and %v", doctor.Left(), daemon.Contested(), doctor.Contested())
	}
	daemon.Close()
	if !doctor.Left() {
		t.Error("it was given up, and is not left")
	}
}
