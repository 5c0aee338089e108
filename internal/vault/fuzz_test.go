package vault

import (
	"bytes"
	"os"
	"testing"
	"time"

	"tidemark/internal/segment"
	"tidemark/internal/sim"
)

// FuzzHolder: no lock's content makes the decoder panic; what it takes is
// exactly what would be written.
func FuzzHolder(f *testing.F) {
	b, err := encodeHolder(Holder{Host: "h", PID: 7, BootID: "b", Instance: "i", Since: time.Unix(1, 0).UTC()})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"holder":{},"crc32c":0}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeHolder(b)
		if err != nil {
			return
		}
		if again, err := encodeHolder(h); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q was taken for %+v, which is %q", b, h, again)
		}
	})
}

// FuzzNames: of all names only those that would be given are taken.
func FuzzNames(f *testing.F) {
	f.Add(refOf(segment.Summary{Sequence: 3, First: 5, State: segment.State{Last: 9}}).Name)
	f.Add(newest{3, 9}.name())
	f.Add("newest-+00000000000003-0000000000000009")
	f.Fuzz(func(t *testing.T, name string) {
		if r, ok := parseRef(name, 0); ok && refOf(segment.Summary{Sequence: r.Sequence, First: r.First, State: segment.State{Last: r.Last}}).Name != name {
			t.Errorf("%q was taken for %+v", name, r)
		}
		if n, ok := parseNewest(name); ok && n.name() != name {
			t.Errorf("%q was taken for %+v", name, n)
		}
	})
}

// FuzzMarker: whatever the marker holds, the vault opens or says why not, and a
// marker that is taken is one that would be written.
func FuzzMarker(f *testing.F) {
	f.Add(newMarker().encode())
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		fsys := sim.New(1)
		if err := fsys.MkdirAll("/vault", 0o700); err != nil {
			t.Fatal(err)
		}
		file, err := fsys.OpenFile("/vault/"+markerName, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.Write(b); err != nil {
			t.Fatal(err)
		}
		v, err := openFolder(t.Context(), fsys, "/vault")
		if err == nil && !bytes.Equal(v.marker.encode(), b) {
			t.Errorf("%q was taken for %+v", b, v.marker)
		}
	})
}
