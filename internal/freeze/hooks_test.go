package freeze_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/freeze"
	"tidemark/internal/testkit"
)

// hookDir makes hooks that note their calls, then run the given lines of shell.
func hookDir(t *testing.T, bodies map[string]string) (dir string, calls func() string) {
	t.Helper()
	dir = t.TempDir()
	said := filepath.Join(t.TempDir(), "calls")
	for name, body := range bodies {
		script := "#!/bin/sh\necho " + name + " $1 >>" + said + "\n" + body + "\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir, func() string {
		b, _ := os.ReadFile(said)
		return strings.Join(strings.Split(strings.TrimSpace(string(b)), "\n"), ", ")
	}
}

func TestHooks(t *testing.T) {
	mnt := mounted(t, "ext4")
	dir, calls := hookDir(t, map[string]string{"20-b": "", "10-a": "", "30-c~": "", ".hidden": ""})
	if err := os.WriteFile(dir+"/15-not-executable", []byte("#!/bin/false\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := freezeNow(t, freeze.Request{Mounts: []string{mnt}, HookDir: dir})
	if got := calls(); got != "10-a freeze, 20-b freeze" || f.Hooks() != 2 {
		t.Errorf("%d hooks: %s", f.Hooks(), got)
	}
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	if got, want := calls(), "10-a freeze, 20-b freeze, 20-b thaw, 10-a thaw"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestHookFails(t *testing.T) {
	testkit.NoLeaks(t)
	mnt := mounted(t, "ext4")
	dir, calls := hookDir(t, map[string]string{"1": "", "2": "[ $1 = thaw ] || { echo no such database; exit 3; }", "3": ""})
	_, err := freeze.Freeze(t.Context(), freeze.Request{Mounts: []string{mnt}, HookDir: dir})
	if !errors.Is(err, freeze.ErrHook) || !strings.Contains(err.Error(), "no such database") {
		t.Errorf("%v", err)
	}
	if isFrozen(t, mnt) {
		t.Error("frozen all the same")
	}
	if got, want := calls(), "1 freeze, 2 freeze, 2 thaw, 1 thaw"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if _, err := freeze.Freeze(t.Context(), freeze.Request{Mounts: []string{mnt}, HookDir: dir + "/absent"}); !errors.Is(err, freeze.ErrHook) {
		t.Errorf("no folder of hooks: %v", err)
	}
}

// TestHookHangs: it is killed together with what it started.
func TestHookHangs(t *testing.T) {
	testkit.NoLeaks(t)
	mnt := mounted(t, "ext4")
	pid := filepath.Join(t.TempDir(), "pid")
	dir, calls := hookDir(t, map[string]string{"1": "[ $1 = thaw ] && exit 0\nsleep 600 &\necho $! >" + pid + "\nwait"})
	_, err := freeze.Freeze(t.Context(), freeze.Request{Mounts: []string{mnt}, HookDir: dir, HookTimeout: 300 * time.Millisecond})
	if !errors.Is(err, freeze.ErrHook) || !strings.Contains(err.Error(), "killed after") || isFrozen(t, mnt) {
		t.Errorf("%v", err)
	}
	if got, want := calls(), "1 freeze, 1 thaw"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	b, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "its child is gone", 5*time.Second, func() bool {
		status, err := os.ReadFile("/proc/" + strings.TrimSpace(string(b)) + "/stat")
		return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || strings.Contains(string(status), ") Z ")
	})
}
