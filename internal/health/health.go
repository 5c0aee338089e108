// Package health names the degraded states that Tidemark can be in, so that
// daemon, command line and API say the same sentence and the same remedy.
package health

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// Severity orders conditions.
type Severity string

const (
	Info    Severity = "info"    // worth knowing, nothing to do
	Warning Severity = "warning" // protection is weaker than asked
	Error   Severity = "error"   // protection is not given
)

// Condition is one named state. Code is stable, in kebab case, and documented
// in docs/operating.md; Detail is the sentence for people; Remedy says what to do.
type Condition struct {
	Code     string    `json:"code"`
	Severity Severity  `json:"severity"`
	Subject  string    `json:"subject,omitempty"` // disk or group that it is about
	Detail   string    `json:"detail"`
	Remedy   string    `json:"remedy,omitempty"`
	Since    time.Time `json:"since,omitzero"`
}

// Set holds the conditions in force. The zero value is ready; all methods may be called concurrently.
type Set struct {
	mu sync.Mutex
	m  map[[2]string]Condition
}

// Raise puts c in force, keeping Since where the same code and subject stand already.
func (s *Set) Raise(c Condition) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := [2]string{c.Code, c.Subject}
	if old, ok := s.m[key]; ok {
		c.Since = old.Since
	} else if c.Since.IsZero() {
		c.Since = time.Now()
	}
	if s.m == nil {
		s.m = make(map[[2]string]Condition)
	}
	s.m[key] = c
}

// Clear takes the condition with this code and subject out of force.
func (s *Set) Clear(code, subject string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, [2]string{code, subject})
}

// List is a copy of what is in force, oldest first.
func (s *Set) List() []Condition {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Condition, 0, len(s.m))
	for _, c := range s.m {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Condition) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Code, b.Code), cmp.Compare(a.Subject, b.Subject))
	})
	return out
}
