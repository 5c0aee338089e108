package stream

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// ErrBadPoint is wrapped by the errors of ParseSpec.
var ErrBadPoint = errors.New("not a point")

// Spec is how people name a point: exactly one field is set.
type Spec struct {
	Latest   bool
	Position Position // "seq:N"
	Time     time.Time
	Bookmark string
}

// ParseSpec reads "latest", "seq:N", an RFC 3339 time, or a bookmark's name.
func ParseSpec(s string) (Spec, error) {
	if s == "latest" {
		return Spec{Latest: true}, nil
	}
	if n, ok := strings.CutPrefix(s, "seq:"); ok {
		p, err := strconv.ParseUint(n, 10, 64)
		if err != nil || p == 0 {
			return Spec{}, fmt.Errorf("%q: want seq:N with N from 1: %w", s, ErrBadPoint)
		}
		return Spec{Position: Position(p)}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		if t.Unix() <= 0 {
			return Spec{}, fmt.Errorf("%q: want a time after 1970: %w", s, ErrBadPoint)
		}
		return Spec{Time: t}, nil
	}
	if err := CheckBookmarkName(s); err != nil {
		return Spec{}, fmt.Errorf("%w: want latest, seq:N, an RFC 3339 time or a bookmark's name (%w)", err, ErrBadPoint)
	}
	return Spec{Bookmark: s}, nil
}

func reservedForm(s string) string {
	if s == "latest" {
		return `the point "latest"`
	}
	if strings.HasPrefix(s, "seq:") {
		return "a position"
	}
	if _, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return "a time"
	}
	return ""
}

func (s Spec) String() string {
	switch {
	case s.Latest:
		return "latest"
	case s.Position != 0:
		return "seq:" + strconv.FormatUint(uint64(s.Position), 10)
	case !s.Time.IsZero():
		return s.Time.Format(time.RFC3339Nano)
	}
	return s.Bookmark
}
