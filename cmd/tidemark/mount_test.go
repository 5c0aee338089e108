package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/stream"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
	"tidemark/internal/timeline"
)

// imaged is a vault with a disk as a power cut would have left it while a file
// system was mounted, with a synced file on it.
func imaged(t *testing.T, kind string, size int64) *told {
	t.Helper()
	d := testkit.NewDisk(t, size)
	testkit.Mkfs(t, d.Path, kind)
	dir := testkit.Mount(t, d.Path)
	if err := os.WriteFile(filepath.Join(dir, "letter"), []byte("dear reader"), 0o600); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "sync", "-f", dir)
	image, err := os.ReadFile(d.File)
	if err != nil {
		t.Fatal(err)
	}
	w := tell(t, size)
	rank := w.gap(block.Range{Len: size})
	const piece = 256 << 10
	for off := int64(0); off < size; off += piece {
		p := image[off : off+piece]
		if len(bytes.Trim(p, "\x00")) > 0 {
			w.fill(rank, off, p)
			continue
		}
		w.add(stream.Record{Kind: stream.KindFill, Fill: stream.FillZero, Position: rank, ValidFrom: rank, Range: block.Range{Off: off, Len: piece}})
	}
	w.add(stream.Record{Kind: stream.KindSettled, Position: rank})
	w.put()
	return w
}

// content is every file of a vault.
func (w *told) content() map[string]string {
	w.t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(w.v.Dir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		out[path] = string(b)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// servers are the processes that serve mounts of this test's vault.
func (w *told) servers() (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range all {
		var pid int
		fmt.Sscanf(path, "/proc/%d/", &pid)
		if b, err := os.ReadFile(path); err != nil || !bytes.Contains(b, []byte("mount-serve")) {
			continue // it has ended, or is another's
		}
		if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || dir != program.Binary(w.t) {
			continue
		}
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			if to, _ := os.Readlink(fd); strings.HasPrefix(to, w.dir+"/") {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// TestMountVerb: the tree is there with the journal replayed, umount ends it
// all, also after the serving process was killed, and the vault stays as it is.
func TestMountVerb(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse")
	for kind, size := range map[string]int64{"ext4": 32 << 20, "xfs": 320 << 20} {
		t.Run(kind, func(t *testing.T) {
			w := imaged(t, kind, size)
			before := w.content()
			for _, kill := range []bool{false, true} {
				mountOnce(t, w, kill)
			}
			for path, b := range w.content() {
				if before[path] != b {
					t.Errorf("%s was changed", path)
				}
			}
		})
	}
}

func mountOnce(t *testing.T, w *told, kill bool) {
	t.Helper()
	dir, scratch := t.TempDir(), filepath.Join(w.dir, "scratch")
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		t.Fatal(err)
	}
	code, out, errs := verb(t, "mount", "--vault", w.v.Dir(), "g", "--at", "latest", "--scratch", scratch, dir)
	if code != exitOK || !strings.Contains(out, "umount ends it") {
		t.Fatalf("code %d, %s%s", code, out, errs)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // mostly unmounted
	if b, err := os.ReadFile(filepath.Join(dir, "letter")); err != nil || string(b) != "dear reader" {
		t.Errorf("the file: %q, %v", b, err)
	}
	pids := w.servers()
	if len(pids) != 1 {
		t.Fatalf("serving processes: %v", pids)
	}
	if kill {
		if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Run(t, "timeout", "60", "umount", dir)
	program.Eventually(t, time.Minute, "the serving process gone", func() error {
		if err := unix.Kill(pids[0], 0); err == nil {
			return fmt.Errorf("process %d is there", pids[0])
		}
		return nil
	})
	if left, err := os.ReadDir(scratch); err != nil || len(left) > 0 {
		t.Errorf("left in the scratch folder: %v, %v", left, err)
	}
}

// TestVerifyVerb: damage has its exit code, and is named by group, disk, range
// and points; points that do not need it are restored, the others refused.
func TestVerifyVerb(t *testing.T) {
	w := tell(t, 1<<20)
	content := w.firstCopy()
	w.put()
	w.write(64<<10, bytes.Repeat([]byte{9}, 8192))
	w.put()
	w.add(stream.Record{Kind: stream.KindBookmark, Name: "last"})
	w.put()
	if code, out, errs := verb(t, "verify", "--vault", w.v.Dir()); code != exitOK || !strings.Contains(out, "all sound") {
		t.Fatalf("sound: code %d, %s%s", code, out, errs)
	}
	refs, err := w.v.Segments(t.Context(), "g")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(w.v.Dir(), "groups/g/segments/L00", refs[1].Name)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-256-1] ^= 1 // the last of the payload, before the footer
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs := verb(t, "verify", "--vault", w.v.Dir(), "g")
	for _, want := range []string{"Group g: ", "disk d, bytes 65536+8192", "spoils points from seq:2 to seq:3"} {
		if code != exitDamaged || !strings.Contains(out, want) {
			t.Errorf("code %d; %q is not in %s%s", code, want, out, errs)
		}
	}
	var report struct{ Groups []timeline.Report }
	code, out, _ = verb(t, "verify", "--vault", w.v.Dir(), "--json")
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != exitDamaged || len(report.Groups) != 1 || len(report.Groups[0].Damage) != 1 ||
		report.Groups[0].Damage[0].Disk != "d" || report.Groups[0].Damage[0].Range != (block.Range{Off: 64 << 10, Len: 8192}) {
		t.Errorf("code %d, %v, %s", code, err, out)
	}
	to := filepath.Join(w.dir, "disk")
	code, _, errs = verb(t, "restore", "--vault", w.v.Dir(), "g", "--at", "latest", "--to", to)
	if code != exitDamaged || !strings.Contains(errs, "the newest sound point is seq:1") {
		t.Errorf("latest: code %d, %s", code, errs)
	}
	if left, _ := filepath.Glob(to + "*"); len(left) > 0 {
		t.Errorf("it failed, and left %v", left)
	}
	if code, _, errs := verb(t, "restore", "--vault", w.v.Dir(), "g", "--at", "seq:1", "--to", to); code != exitOK {
		t.Errorf("seq:1: code %d, %s", code, errs)
	}
	holds(t, to, content)
}
