package doctor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tidemark/internal/dm"
	"tidemark/internal/serve"
	"tidemark/internal/splice"
)

// Codes of the Fixes of splices that neither a daemon nor a guard has.
const (
	CodeLeftSplice = "left-splice" // a volume waits for a server
	CodeLeftLower  = "left-lower"  // a device that nothing leads to
)

// giveBackMax bounds a Fix that has requests done which may have waited long.
const giveBackMax = time.Minute

// SpliceFixes lists what can be done about splices that neither a daemon nor a
// guard has; nothing is done before Apply.
func SpliceFixes() ([]Fix, error) {
	c, err := dm.Open()
	if errors.Is(err, dm.ErrNoMapper) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	all, err := splice.Find(c)
	if err != nil {
		return nil, fmt.Errorf("splices: %w", err)
	}
	var out []Fix
	for _, s := range all {
		left, err := isLeft(s)
		if err != nil {
			return nil, err
		}
		switch {
		case !left:
		case s.Upper == "":
			out = append(out, Fix{Code: CodeLeftLower, Subject: s.Lower, Action: "remove the mapped device " + s.Lower + ", to which nothing leads any more",
				apply: func() error { return removeLower(s) }})
		default:
			out = append(out, Fix{Code: CodeLeftSplice, Subject: s.Name,
				Action: fmt.Sprintf("give the volume %s its own table back: neither a daemon nor a guard serves what lies under it, and its requests wait (or start its daemon again, which loses nothing)", s.Name),
				apply: func() error {
					ctx, cancel := context.WithTimeout(context.Background(), giveBackMax)
					defer cancel()
					return serve.GiveBack(ctx, s)
				}})
		}
	}
	return out, nil
}

func isLeft(s *splice.Splice) (bool, error) {
	claim, err := splice.OpenClaim(s)
	if err != nil {
		return false, err
	}
	defer claim.Close()
	return claim.Left(), nil
}

func removeLower(s *splice.Splice) error {
	if left, err := isLeft(s); err != nil || !left {
		return errors.Join(err, splice.ErrClaimed)
	}
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	return s.Remove(c)
}
