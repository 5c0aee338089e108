package protect

import (
	"context"
	"encoding/hex"
	"iter"

	"tidemark/internal/block"
)

// ChangeMap is a copy of what the tap has marked of one disk since it began.
type ChangeMap struct {
	Disk       string
	Size       int64 // bytes
	BlockSize  int64
	Generation string // another tap, another one
	changed    []byte
}

// ChangeMaps copies the change maps of the group's disks, of which served ones have none here. ErrOffline: there is no tap.
func (g *Group) ChangeMaps(ctx context.Context) (out []ChangeMap, err error) {
	s := g.current()
	if s == nil {
		return nil, g.offlineError()
	}
	marked, ok := s.source.(interface {
		ChangeMap(disk int) (numbers []byte, blockSize int64)
	})
	if !ok {
		return nil, nil // served devices have maps of their own
	}
	err = s.ask(ctx, func() error {
		ident := s.source.Identity()
		for i, d := range s.cfg.Disks {
			numbers, size := marked.ChangeMap(i)
			out = append(out, ChangeMap{d.Name, d.Size, size, hex.EncodeToString(ident[:]), append([]byte(nil), numbers...)})
		}
		return nil
	})
	return out, err
}

// Ranges yields what changed, whole blocks cut to the disk.
func (m ChangeMap) Ranges() iter.Seq[block.Range] {
	return func(yield func(block.Range) bool) {
		for i := 0; i < len(m.changed); i++ {
			from := i
			for i < len(m.changed) && m.changed[i] != 0 {
				i++
			}
			off := int64(from) * m.BlockSize
			if i > from && !yield(block.Range{Off: off, Len: min(int64(i)*m.BlockSize, m.Size) - off}) {
				return
			}
		}
	}
}
