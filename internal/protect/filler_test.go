package protect

import (
	"os"
	"path/filepath"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/fill"
	"tidemark/internal/source"
)

// noisyBase notes when it is read, which is after the disk is.
type noisyBase struct {
	block.Device
	read *bool
}

func (b noisyBase) ReadAt(p []byte, _ int64) (int, error) {
	*b.read = true
	return len(p), nil
}

// TestEndIsAfterTheRead: what a read may have seen ends at the ring's producer
// after the read, not before it: the fill is not true from any earlier place.
func TestEndIsAfterTheRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, jobBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	read := false
	f := newFiller([]reader{disk}, []string{"disk"}, 1<<30, func() source.Place {
		if read {
			return 2
		}
		return 1
	})
	f.bases[0] = noisyBase{read: &read}
	r := &reading{job: fill.Job{ID: 1, Range: block.Range{Len: jobBytes}}}
	f.jobs <- r
	close(f.jobs)
	f.work(t.Context())
	if r.err != nil || r.end != 2 {
		t.Errorf("the read's end is place %d: %v", r.end, r.err)
	}
}
