package vfs

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestUncached: whatever the sizes, the file holds just what was written.
func TestUncached(t *testing.T) {
	dirs := []string{t.TempDir()}
	if d, err := os.MkdirTemp("/dev/shm", "tidemark-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(d) })
		dirs = append(dirs, d)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for _, dir := range dirs {
		for _, size := range []int{0, 1, 4095, 4096, 4097, directBuffer - 1, directBuffer, directBuffer + 1, 3*directBuffer + 12345} {
			name := filepath.Join(dir, "f")
			f, err := OS{}.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|Uncached, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, size)
			for i := range want {
				want[i] = byte(rng.Uint32())
			}
			for rest := want; len(rest) > 0; {
				n := 1 + rng.IntN(len(rest))
				k, err := f.Write(rest[:n])
				if k != n || err != nil {
					t.Fatal(k, err)
				}
				rest = rest[n:]
			}
			if err := errors.Join(f.Sync(), f.Close()); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(name)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes in %s: %d are there, %v", size, dir, len(got), err)
			}
		}
	}
}
