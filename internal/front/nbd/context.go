package nbd

import (
	"errors"
	"slices"
	"strings"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/block"
)

// contextsMax bounds the metadata contexts that one client can have.
const contextsMax = 64

// statusMax bounds the extents of one context in one answer.
const statusMax = 4096

// descriptor is one extent of an answer: how long, and what it is.
type descriptor struct{ length, state uint32 }

// metaContext is something that is known of each byte of an export.
type metaContext struct {
	id       uint32
	name     string
	describe func(r block.Range, most int) ([]descriptor, error)
}

// contextsOf are all that an export has.
func contextsOf(e Export) []metaContext {
	all := []metaContext{{name: nbd.BaseAllocation, describe: e.allocation}}
	if e.Bitmaps != nil {
		for _, b := range e.Bitmaps() {
			all = append(all, metaContext{name: nbd.QemuDirtyBitmap + b.Name, describe: b.describe})
		}
	}
	return all
}

// asked says whether a client's query names a context. When it only asks what
// there is, the beginning up to a colon stands for all that begin so.
func asked(query, name string, list bool) bool {
	return query == name || list && strings.HasSuffix(query, ":") && strings.HasPrefix(name, query)
}

// meta answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (c *connection) meta(opt uint32, data []byte) error {
	list := opt == nbd.OptListMeta
	if !list {
		c.contexts = nil // also where it fails
	}
	if !c.structured {
		return c.reply(opt, nbd.RepErrInvalid, "ask for structured replies first")
	}
	name, queries, ok := metaQueries(data)
	if !ok {
		return c.reply(opt, nbd.RepErrInvalid, "the option's lengths do not fit")
	}
	e, err := c.server.find(name)
	if err != nil {
		return c.reply(opt, nbd.RepErrUnknown, err.Error())
	}
	var found []metaContext
	for _, m := range contextsOf(e) {
		if list && len(queries) == 0 || slices.ContainsFunc(queries, func(q string) bool { return asked(q, m.name, list) }) {
			found = append(found, m)
		}
	}
	if !list && len(found) > contextsMax {
		return c.reply(opt, nbd.RepErrTooBig, "too many contexts")
	}
	for i := range found {
		if !list { // in a list the number means nothing
			found[i].id = uint32(i + 1)
		}
		if err := c.reply(opt, nbd.RepMetaContext, found[i].id, found[i].name); err != nil {
			return err
		}
	}
	if !list {
		c.contexts, c.metaFor = found, e.Name
	}
	return c.reply(opt, nbd.RepAck)
}

func metaQueries(data []byte) (name string, queries []string, ok bool) {
	name, rest, ok := str(data)
	if !ok || len(rest) < 4 {
		return "", nil, false
	}
	n := be.Uint32(rest)
	rest = rest[4:]
	for range n {
		var q string
		if q, rest, ok = str(rest); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(rest) == 0
}

// extents gives what is known of a range; all data where nothing is.
func (e Export) extents(r block.Range) ([]block.Extent, error) {
	if m, ok := e.Device.(block.Mapper); ok {
		return m.Extents(r)
	}
	return []block.Extent{{Range: r, State: block.Data}}, nil
}

// zero says whether an extent reads as zeroes.
func (e Export) zero(s block.State) bool {
	return s == block.Zero || s == block.Undefined && e.UndefinedReadsZero
}

// allocation is base:allocation: data, holes that read as zeroes, and holes.
func (e Export) allocation(r block.Range, most int) ([]descriptor, error) {
	extents, err := e.extents(r)
	if err != nil {
		return nil, err
	}
	var out []descriptor
	for _, x := range extents {
		state := uint32(nbd.StateHole)
		switch {
		case e.zero(x.State):
			state |= nbd.StateZero
		case x.State == block.Data:
			state = 0
		}
		if out = join(out, descriptor{uint32(x.Len), state}); len(out) > most {
			return out[:most], nil
		}
	}
	return out, nil
}

var errRun = errors.New("a change map gave a run out of its bounds")

func (b Bitmap) describe(r block.Range, most int) ([]descriptor, error) {
	var out []descriptor
	for !r.Empty() {
		n, changed, err := b.Map.Run(r)
		if err != nil {
			return nil, err
		}
		if n < 1 || n > r.Len {
			return nil, errRun
		}
		state := uint32(0)
		if changed {
			state = nbd.StateDirty
		}
		if out = join(out, descriptor{uint32(n), state}); len(out) > most {
			return out[:most], nil
		}
		r.Off, r.Len = r.Off+n, r.Len-n
	}
	return out, nil
}

// join adds a descriptor, to the last one where both say the same.
func join(out []descriptor, d descriptor) []descriptor {
	if n := len(out); n > 0 && out[n-1].state == d.state {
		out[n-1].length += d.length
		return out
	}
	return append(out, d)
}
