package overlay

import "tidemark/internal/block"

// extentsMax bounds one answer of Extents.
const extentsMax = 1024

// Extents are the device's where nothing was written; else data, or zeroes where
// those were written or content was discarded. At most 1024 of them.
func (o *Overlay) Extents(r block.Range) ([]block.Extent, error) {
	if err := block.CheckBounds(r, o.size); err != nil {
		return nil, err
	}
	if r.Empty() {
		return []block.Extent{{Range: r}}, nil
	}
	defer o.locks.read(r)()
	var out []block.Extent
	for at := r.Off; at < r.End() && len(out) < extentsMax; {
		to, s := o.states.run(at, r.End())
		part := block.Range{Off: at, Len: to - at}
		switch {
		case s == zero:
			out = join(out, block.Extent{Range: part, State: block.Zero})
		case s == scratch || o.mapper == nil:
			out = join(out, block.Extent{Range: part, State: block.Data})
		default:
			extents, err := o.mapper.Extents(part)
			if err != nil {
				return nil, err
			}
			for _, e := range extents {
				out = join(out, e)
				to = e.End() // the device may have more than it told of
			}
		}
		at = to
	}
	return out[:min(len(out), extentsMax)], nil
}

// join appends e, as part of the last extent where that has the same state.
func join(out []block.Extent, e block.Extent) []block.Extent {
	if n := len(out); n > 0 && out[n-1].State == e.State {
		out[n-1].Len += e.Len
		return out
	}
	return append(out, e)
}
