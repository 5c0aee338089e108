package vault

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

func sealedFile(t *testing.T, dir string, sequence uint64, mark string) (string, segment.Summary) {
	t.Helper()
	b := segment.NewBuilder(1 << 12)
	r := stream.Record{Kind: stream.KindBookmark, Position: stream.Position(sequence), Name: mark}
	if err := b.Append(&r); err != nil {
		t.Fatal(err)
	}
	s, err := b.Seal(segment.Header{Group: "g", Sequence: sequence, Disks: []segment.Disk{{Name: "d", Size: 4096, SectorSize: 512, BlockSize: 4096}}}, segment.State{Last: stream.Position(sequence)})
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := s.WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, mark)
	if err := os.WriteFile(path, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, s.Summary
}

func create(t *testing.T) *Vault {
	t.Helper()
	v, err := Create(t.Context(), filepath.Join(t.TempDir(), "a", "vault"))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestWhatIsAVault(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(t.Context(), dir); !errors.Is(err, ErrNotVault) {
		t.Errorf("an empty folder opened: %v", err)
	}
	if _, err := Open(t.Context(), filepath.Join(dir, "absent")); !errors.Is(err, ErrNotVault) {
		t.Errorf("an absent folder opened: %v", err)
	}
	if _, err := Open(t.Context(), "s3://bucket"); !errors.Is(err, ErrScheme) {
		t.Errorf("another scheme: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "letter.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(t.Context(), dir); !errors.Is(err, ErrNotVault) || !strings.Contains(err.Error(), "letter.txt") {
		t.Errorf("a folder with somebody's files: %v", err)
	}
	v := create(t)
	for _, where := range []string{v.Dir(), "file://" + v.Dir()} {
		if _, err := Create(t.Context(), where); err != nil {
			t.Errorf("an existing vault %s: %v", where, err)
		}
	}
	if err := os.WriteFile(filepath.Join(v.Dir(), markerName), []byte(`{"version":1,"crc32c":7}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), v.Dir()); !errors.Is(err, segment.ErrDamaged) {
		t.Errorf("a damaged marker: %v", err)
	}
}

func TestPutKeepsHistory(t *testing.T) {
	v, dir := create(t), t.TempDir()
	l, err := v.Lock(t.Context(), "g", Holder{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	one, s1 := sealedFile(t, dir, 1, "one")
	two, s2 := sealedFile(t, dir, 2, "two")
	other, so := sealedFile(t, dir, 1, "eno")
	three, s3 := sealedFile(t, dir, 4, "four")
	if err := v.Put(t.Context(), l, two, s2); !errors.Is(err, ErrConflict) {
		t.Errorf("the second first: %v", err)
	}
	for range 2 {
		if err := v.Put(t.Context(), l, one, s1); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Put(t.Context(), l, other, so); !errors.Is(err, ErrConflict) {
		t.Errorf("another first segment: %v", err)
	}
	if err := v.Put(t.Context(), l, three, s3); !errors.Is(err, ErrConflict) {
		t.Errorf("a hole: %v", err)
	}
	if err := v.Put(t.Context(), l, two, s2); err != nil {
		t.Fatal(err)
	}
	// What a killed writer leaves is no object, and is replaced.
	if err := os.WriteFile(filepath.Join(v.segments("g"), "0000000000000003-0000000000000003-0000000000000003.seg"+temporary), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	third, st := sealedFile(t, dir, 3, "third")
	if err := v.Put(t.Context(), l, third, st); err != nil {
		t.Fatal(err)
	}
	refs, err := v.Segments(t.Context(), "g")
	if err != nil || len(refs) != 3 {
		t.Fatalf("%v, %v", refs, err)
	}
	for _, r := range refs {
		o, err := v.OpenSegment(t.Context(), "g", r)
		if err != nil {
			t.Fatal(err)
		}
		o.Close()
	}
}

func TestNames(t *testing.T) {
	v := create(t)
	for _, name := range []string{"", "..", ".x", "a/b", "a b", strings.Repeat("x", 65)} {
		if _, err := v.Lock(t.Context(), name, Holder{}); !errors.Is(err, ErrName) {
			t.Errorf("group %q: %v", name, err)
		}
	}
}

// TestLockHolder is run as a child: it takes the lock and waits to be killed.
func TestLockHolder(t *testing.T) {
	dir := os.Getenv("VAULT_LOCK")
	if dir == "" {
		return // only as a child
	}
	v, err := Open(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Lock(context.Background(), "g", Holder{PID: os.Getpid(), Host: "h"}); err != nil {
		t.Fatal(err)
	}
	os.Stdout.WriteString("locked\n")
	select {}
}

func TestLockIsFreeAfterKill(t *testing.T) {
	v := create(t)
	cmd := exec.Command(os.Args[0], "-test.run", "TestLockHolder")
	cmd.Env = append(os.Environ(), "VAULT_LOCK="+v.Dir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "locked\n" {
		t.Fatal(line, err)
	}
	var held *HeldError
	if _, err := v.Lock(t.Context(), "g", Holder{}); !errors.As(err, &held) || held.Holder.PID != cmd.Process.Pid {
		t.Fatalf("a second writer: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed: that is the error
	l, err := v.Lock(t.Context(), "g", Holder{})
	if err != nil {
		t.Fatalf("after the kill: %v", err)
	}
	l.Unlock()
}
