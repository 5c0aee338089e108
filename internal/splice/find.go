package splice

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"tidemark/internal/dm"
)

// Find gives the splices that the kernel has, whoever made them. Where Upper is
// "" the volume does not lead to a served device: only the lower device is left.
func Find(c *dm.Control) ([]*Splice, error) {
	names, err := filepath.Glob("/sys/block/dm-*/dm/name")
	if err != nil {
		return nil, err
	}
	var out []*Splice
	for _, path := range names {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // gone by now
		}
		if s, err := found(c, strings.TrimSpace(string(text))); err != nil {
			return nil, err
		} else if s != nil {
			out = append(out, s)
		}
	}
	return out, nil
}

// found is the splice whose lower device has a name; nil: it is none.
func found(c *dm.Control, name string) (*Splice, error) {
	s := &Splice{Lower: name}
	if _, err := fmt.Sscanf(name, lowerPrefix+"%d-%d", &s.Major, &s.Minor); err != nil {
		return nil, nil
	}
	lower, info, err := c.Table(dm.Named(name))
	if errors.Is(err, dm.ErrAbsent) || err == nil && !strings.HasPrefix(info.UUID, uuidPrefix) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s.Original, s.Sectors = lower.Digest(), lower.Sectors()
	now, info, err := c.Table(s.id())
	if errors.Is(err, dm.ErrAbsent) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	s.Name, s.UUID = info.Name, info.UUID
	if len(now) == 1 && now[0].Type == "linear" && now[0].Length == s.Sectors {
		if upper, ok := strings.CutSuffix(now[0].Params, " 0"); ok && served(upper) {
			s.Upper = upper
		}
	}
	return s, nil
}

// served: a device, as major:minor, is of a kind that processes serve.
func served(dev string) bool {
	link, err := os.Readlink("/sys/dev/block/" + dev)
	base := filepath.Base(link)
	return err == nil && (strings.HasPrefix(base, "ublkb") || strings.HasPrefix(base, "nbd"))
}
