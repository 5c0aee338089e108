package vault

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"gocloud.dev/blob"
	"gocloud.dev/blob/memblob"

	"tidemark/internal/segment"
	"tidemark/internal/vfs"
)

// TestAnyBucket: a vault behaves the same in a local folder and in a bucket
// that is none.
func TestAnyBucket(t *testing.T) {
	memory := memblob.OpenBucket(nil)
	defer memory.Close()
	local := newFolder(vfs.OS{}, filepath.Join(t.TempDir(), "vault"))
	if err := os.Mkdir(local.root, 0o700); err != nil {
		t.Fatal(err)
	}
	opened := func(where string) func() (*Vault, error) {
		return func() (*Vault, error) { return Open(t.Context(), where) }
	}
	for name, c := range map[string]struct {
		create, open func() (*Vault, error)
	}{
		"memory": {func() (*Vault, error) { return CreateBucket(t.Context(), memory, "mem") }, func() (*Vault, error) { return OpenBucket(t.Context(), memory, "mem") }},
		"folder": {func() (*Vault, error) { return Create(t.Context(), local.root) }, opened(local.root)},
		"folder as any bucket": {
			func() (*Vault, error) {
				return CreateBucket(t.Context(), blob.NewBucket(newFolder(vfs.OS{}, local.root+"2")), "any")
			},
			func() (*Vault, error) {
				return OpenBucket(t.Context(), blob.NewBucket(newFolder(vfs.OS{}, local.root+"2")), "any")
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.MkdirAll(local.root+"2", 0o700); err != nil {
				t.Fatal(err)
			}
			anyBucket(t, c.create, c.open)
		})
	}
	full := memblob.OpenBucket(nil)
	defer full.Close()
	if err := full.WriteAll(t.Context(), "letter", []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := CreateBucket(t.Context(), full, "mem"); !errors.Is(err, ErrNotVault) {
		t.Errorf("a bucket with somebody's objects: %v", err)
	}
}

func anyBucket(t *testing.T, create, open func() (*Vault, error)) {
	if _, err := open(); !errors.Is(err, ErrNotVault) {
		t.Fatalf("before: %v", err)
	}
	v, err := create()
	if err != nil {
		t.Fatal(err)
	}
	l, err := v.Lock(t.Context(), "g", Holder{PID: 7})
	if err != nil {
		t.Fatal(err)
	}
	var held *HeldError
	if _, err := v.Lock(t.Context(), "g", Holder{}); !errors.As(err, &held) || held.Holder.PID != 7 {
		t.Errorf("a second writer: %v", err)
	}
	var sums []segment.Summary
	prev := segment.Summary{}
	for _, mark := range []string{"one", "two", "three"} {
		path, sum := sealedFile(t, t.TempDir(), prev, mark)
		for range 2 {
			if err := v.Put(t.Context(), l, path, sum); err != nil {
				t.Fatal(err)
			}
		}
		sums, prev = append(sums, sum), sum
	}
	path, sum := sealedFile(t, t.TempDir(), sums[0], "another two")
	if err := v.Put(t.Context(), l, path, sum); !errors.Is(err, ErrConflict) {
		t.Errorf("another second segment: %v", err)
	}
	if err := l.Unlock(); err != nil {
		t.Fatal(err)
	}
	if v, err = open(); err != nil {
		t.Fatal(err)
	}
	groups, err := v.Groups(t.Context())
	refs, strays, listErr := v.Contents(t.Context(), "g")
	if err != nil || listErr != nil || len(groups) != 1 || len(refs) != 3 || len(strays) != 0 {
		t.Fatalf("groups %v, %v; segments %v, %v, %v", groups, err, refs, strays, listErr)
	}
	for i, r := range refs {
		o, err := v.OpenSegment(t.Context(), "g", r)
		if err != nil || o.Summary() != sums[i] {
			t.Fatalf("segment %d: %v", i+1, err)
		}
		p, c, err := v.Payloads(t.Context(), "g", r)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := p.ReadAt(make([]byte, 8), 0); n != 8 || err != nil && !errors.Is(err, io.EOF) {
			t.Errorf("segment %d: %d bytes, %v", i+1, n, err)
		}
		if err := errors.Join(o.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	}
	gone := refs[1]
	gone.Name = refOf(segment.Summary{Sequence: 9}).Name
	if _, err := v.OpenSegment(t.Context(), "g", gone); !errors.Is(err, segment.ErrDamaged) {
		t.Errorf("an object that is not there: %v", err)
	}
	if _, _, err := v.Payloads(t.Context(), "g", gone); !errors.Is(err, segment.ErrDamaged) {
		t.Errorf("payloads of an object that is not there: %v", err)
	}
	if _, err := v.Segments(t.Context(), "h"); !errors.Is(err, ErrNoGroup) {
		t.Errorf("another group: %v", err)
	}
}
