package program

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"
)

// Status is what tests look at in `status --json`.
type Status struct {
	Groups     []Group     `json:"groups"`
	Conditions []Condition `json:"conditions"`
}

// Group is one group in `status --json`.
type Group struct {
	Name       string      `json:"name"`
	State      string      `json:"state"`
	Mode       string      `json:"mode"`
	Since      uint64      `json:"consistent_since"`
	Captured   uint64      `json:"captured_position"`
	Durable    uint64      `json:"durable_position"`
	Lag        float64     `json:"lag_seconds"`
	Disks      []Disk      `json:"disks"`
	Conditions []Condition `json:"conditions"`
}

// Disk is one disk of a group in `status --json`.
type Disk struct {
	Name     string `json:"name"`
	Device   string `json:"device"`
	Size     int64  `json:"size_bytes"`
	Gap      int64  `json:"gap_bytes"`
	Identity string `json:"identity"`
	Writes   uint64 `json:"writes"`
	Lost     uint64 `json:"lost_writes"`
	Failed   uint64 `json:"failed_writes"`
}

// Condition is a health condition.
type Condition struct {
	Code    string `json:"code"`
	Subject string `json:"subject"`
	Detail  string `json:"detail"`
	Remedy  string `json:"remedy"`
}

// Gap is how many bytes of a group the history does not know.
func (g *Group) Gap() (n int64) {
	for _, d := range g.Disks {
		n += d.Gap
	}
	return n
}

// Has tells whether a condition is raised.
func (g *Group) Has(code string) bool {
	for _, c := range g.Conditions {
		if c.Code == code {
			return true
		}
	}
	return false
}

// Status asks the daemon.
func (d *Daemon) Status() Status {
	d.t.Helper()
	var s Status
	text := d.Run("status", "--json")
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		d.t.Fatalf("%v in %s", err, text)
	}
	return s
}

// Group is one group's status.
func (d *Daemon) Group(name string) Group {
	d.t.Helper()
	for _, g := range d.Status().Groups {
		if g.Name == name {
			return g
		}
	}
	d.t.Fatalf("no group %s in status", name)
	return Group{}
}

// Settle waits until a group is consistent and all of it is in the vault.
func (d *Daemon) Settle(group string) Group {
	d.t.Helper()
	return d.Await(group, "consistent and durable", func(g *Group) bool {
		return g.Since > 0 && g.Gap() == 0 && g.Captured == g.Durable && g.State == "protected"
	})
}

// Await waits until a group's status is as wanted.
func (d *Daemon) Await(group, what string, ok func(*Group) bool) Group {
	d.t.Helper()
	var g Group
	d.awaiting = what
	Eventually(d.t, 2*time.Minute, "group "+group+" is "+what, func() error {
		if g = d.Group(group); !ok(&g) {
			return fmt.Errorf("it is %+v", g)
		}
		return nil
	})
	d.awaiting = ""
	return g
}

// ErrNotYet is for checks of Eventually that have no more to say.
var ErrNotYet = errors.New("not yet")

// Eventually calls check until it gives nil, and ends the test when that takes
// longer than atMost. Between calls it waits for twice as long as one takes: where
// starting a program is slow, asking must not be most of what is done.
func Eventually(t testing.TB, atMost time.Duration, what string, check func() error) {
	t.Helper()
	for deadline := time.Now().Add(atMost); ; {
		begun := time.Now()
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not in %v: %s: %v", atMost, what, err)
		}
		time.Sleep(min(max(2*time.Since(begun), 50*time.Millisecond), time.Second))
	}
}
