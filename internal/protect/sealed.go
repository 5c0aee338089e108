package protect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"tidemark/internal/segment"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// ErrNotSealed: the stream has no segment of this sequence yet.
var ErrNotSealed = errors.New("not sealed yet")

// Sealed is a group's stream as far as it is durable, wherever its segments lie:
// in the spool or, what that has let go of, in the vault. It holds neither back.
// It ends with the group's session; its methods may be called concurrently.
type Sealed struct{ s *session }

// Sealed gives the stream. ErrOffline: the group is not open.
func (g *Group) Sealed() (*Sealed, error) {
	if s := g.current(); s != nil {
		return &Sealed{s}, nil
	}
	return nil, g.offlineError()
}

// Newest is the newest segment; false: there is none here yet.
func (x *Sealed) Newest() (segment.Summary, bool) { return x.s.spool.Last() }

// Changed is closed at the next segment, or when the session ends.
func (x *Sealed) Changed() <-chan struct{} { return x.s.spool.Changed() }

// Open opens a segment. ErrNotSealed, or an error that names the segment and
// wraps segment.ErrDamaged or vault.ErrUnreachable.
func (x *Sealed) Open(ctx context.Context, sequence uint64) (*segment.File, error) {
	if newest, ok := x.Newest(); !ok || sequence > newest.Sequence {
		return nil, fmt.Errorf("segment %d: %w", sequence, ErrNotSealed)
	}
	item, ok, err := x.s.spool.At(sequence)
	if err != nil {
		return nil, err
	}
	if ok {
		f, err := openItem(item)
		if !errors.Is(err, fs.ErrNotExist) { // else it has just gone to the vault
			return f, err
		}
	}
	ref, err := x.s.stored.find(ctx, x.s.vault, x.s.cfg.Name, sequence)
	if err != nil {
		return nil, err
	}
	o, err := x.s.vault.OpenSegment(ctx, x.s.cfg.Name, ref)
	if err != nil {
		return nil, err
	}
	return &segment.File{Segment: o.Segment, Closer: o}, nil
}

func openItem(item spool.Item) (*segment.File, error) {
	f, err := item.Open()
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err == nil {
		var s *segment.Segment
		if s, err = segment.Open(f, size); err == nil {
			return &segment.File{Segment: s, Closer: f}, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("spool segment %d, file %s: %w", item.Sequence, item.Path, err), f.Close())
}

// refs know how segments in the vault are called: what was put there lately,
// and what the vault lists where somebody asks for older ones.
type refs struct {
	mu     sync.Mutex
	lately []vault.Ref // in order
	listed []vault.Ref // in order
}

// latelyMax is how many segments that went to the vault are known without a listing.
const latelyMax = 1 << 12

// put notes a segment that the vault has now.
func (r *refs) put(s segment.Summary) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lately) >= latelyMax { // who searches has the slice of before
		r.lately = slices.Clone(r.lately[latelyMax/2:])
	}
	r.lately = append(r.lately, vault.RefOf(s))
}

func (r *refs) find(ctx context.Context, v *vault.Vault, group string, sequence uint64) (vault.Ref, error) {
	for range 2 {
		r.mu.Lock()
		known := [...][]vault.Ref{r.lately, r.listed}
		r.mu.Unlock()
		for _, all := range known {
			i, ok := slices.BinarySearchFunc(all, sequence, func(a vault.Ref, n uint64) int { return cmp.Compare(a.Sequence, n) })
			if ok {
				return all[i], nil
			}
		}
		listed, err := v.Segments(ctx, group)
		if err != nil {
			return vault.Ref{}, err
		}
		r.mu.Lock()
		r.listed = listed
		r.mu.Unlock()
	}
	return vault.Ref{}, fmt.Errorf("segment %d of group %s is neither in the spool nor in the vault: %w", sequence, group, segment.ErrDamaged)
}

// Point finds a point of the vault's history, and the segment that its position
// lies in. Errors are those of timeline.
func (x *Sealed) Point(ctx context.Context, spec stream.Spec) (timeline.Point, uint64, error) {
	h, err := timeline.Load(ctx, x.s.vault, x.s.cfg.Name)
	if err != nil {
		return timeline.Point{}, 0, err
	}
	p, err := h.Resolve(spec)
	if err != nil {
		return timeline.Point{}, 0, err
	}
	all, err := x.s.vault.Segments(ctx, x.s.cfg.Name)
	if err != nil {
		return timeline.Point{}, 0, err
	}
	for _, r := range all {
		if r.First <= p.Position && p.Position <= r.Last {
			return p, r.Sequence, nil
		}
	}
	return timeline.Point{}, 0, fmt.Errorf("no segment holds position %d: %w", p.Position, segment.ErrDamaged)
}
