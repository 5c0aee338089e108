package vault

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vfs"
)

// sealed gives the bytes of a segment with one bookmark, behind another.
func sealed(t testing.TB, prev segment.Summary, mark string) ([]byte, segment.Summary) {
	t.Helper()
	sequence := prev.Sequence + 1
	b := segment.NewBuilder(1 << 12)
	r := stream.Record{Kind: stream.KindBookmark, Position: stream.Position(sequence), Name: mark}
	if err := b.Append(&r); err != nil {
		t.Fatal(err)
	}
	s, err := b.Seal(segment.Header{Group: "g", Sequence: sequence, Previous: prev.Digest, Disks: []segment.Disk{{Name: "d", Size: 4096, SectorSize: 512, BlockSize: 4096}}}, segment.State{Last: stream.Position(sequence)})
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := s.WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), s.Summary
}

func sealedFile(t testing.TB, dir string, prev segment.Summary, mark string) (string, segment.Summary) {
	t.Helper()
	b, sum := sealed(t, prev, mark)
	path := filepath.Join(dir, mark)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, sum
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

// noRoom is a file system on which folders can still be made, and no files.
type noRoom struct{ vfs.FS }

func (noRoom) OpenFile(name string, _ int, _ fs.FileMode) (vfs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: unix.ENOSPC}
}

// TestNothingStaysOfAVaultThatCouldNotBe: not the folders that were made for it, and all others.
func TestNothingStaysOfAVaultThatCouldNotBe(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.Mkdir(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, where := range []string{filepath.Join(dir, "a/b/c"), empty} {
		if _, err := createFolder(t.Context(), noRoom{vfs.OS{}}, where); !errors.Is(err, ErrUnreachable) || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", where, err)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "empty" {
		t.Errorf("left behind: %v %v", left, err)
	}
	nowhere := filepath.Join(dir, "nowhere")
	if err := os.Symlink(filepath.Join(dir, "none"), nowhere); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(t.Context(), nowhere); !errors.Is(err, ErrNotVault) || !strings.Contains(err.Error(), nowhere) {
		t.Errorf("a link that leads nowhere: %v", err)
	}
}

func TestPutKeepsHistory(t *testing.T) {
	v, dir := create(t), t.TempDir()
	l, err := v.Lock(t.Context(), "g", Holder{})
	if err != nil {
		t.Fatal(err)
	}
	one, s1 := sealedFile(t, dir, segment.Summary{}, "one")
	two, s2 := sealedFile(t, dir, s1, "two")
	other, so := sealedFile(t, dir, segment.Summary{}, "another")
	behindOther, sbo := sealedFile(t, dir, so, "behind another")
	three, s3 := sealedFile(t, dir, s2, "third")
	four, s4 := sealedFile(t, dir, s3, "four")
	put := func(what, path string, sum segment.Summary, want error) {
		t.Helper()
		if err := v.Put(t.Context(), l, path, sum); !errors.Is(err, want) {
			t.Fatalf("%s: %v, want %v", what, err, want)
		}
	}
	put("the second first", two, s2, ErrConflict)
	put("the first", one, s1, nil)
	put("the first again", one, s1, nil)
	put("another first segment", other, so, ErrConflict)
	put("a hole", three, s3, ErrConflict)
	put("a second behind another first", behindOther, sbo, ErrConflict)
	put("a summary of another", two, s1, ErrConflict)
	put("the second", two, s2, nil)
	// What a killed writer leaves is no object, and goes with the next writer.
	left := filepath.Join(v.Dir(), segmentsOf("g"), "0000000000000003-0000000000000003-0000000000000003.seg.1-1"+temporary)
	if err := os.WriteFile(left, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := v.Put(t.Context(), l, three, s3); !errors.Is(err, ErrUnlocked) {
		t.Errorf("without the lock: %v", err)
	}
	if l, err = v.Lock(t.Context(), "g", Holder{}); err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	put("a hole after opening again", four, s4, ErrConflict)
	put("the third", three, s3, nil)
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a killed writer's file is still there: %v", err)
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
