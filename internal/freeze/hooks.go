package freeze

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// hooks are the executables of a folder in the style of qemu-ga's
// fsfreeze-hook.d, called with "freeze" in the order of their names and with
// "thaw" in the reverse of it.
type hooks struct {
	dir     string
	more    []string      // folders; each is gone through after those before
	timeout time.Duration // of each call
	started []string      // whose freeze was begun: they get a thaw
	ran     []string      // whose freeze succeeded
}

// leftBehind are endings of names that editors and package managers leave.
var leftBehind = []string{"~", ".bak", ".orig", ".rpmnew", ".rpmorig", ".rpmsave", ".sample", ".swp"}

func (h *hooks) list() ([]string, error) {
	var out []string
	for _, dir := range append([]string{h.dir}, h.more...) {
		found, err := listFolder(dir)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

func listFolder(dir string) ([]string, error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil {
		return nil, fmt.Errorf("%w: folder of hooks: %w", ErrHook, err)
	}
	var out []string
	for _, e := range entries {
		name := e.Name()
		skip := strings.HasPrefix(name, ".") || strings.Contains(name, ".dpkg-") ||
			slices.ContainsFunc(leftBehind, func(end string) bool { return strings.HasSuffix(name, end) })
		st, err := os.Stat(filepath.Join(dir, name))
		if skip || err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
			continue
		}
		out = append(out, filepath.Join(dir, name))
	}
	return out, nil
}

// freeze stops at the first hook that fails; thaw is then due all the same.
func (h *hooks) freeze(ctx context.Context) error {
	paths, err := h.list()
	if err != nil {
		return err
	}
	for _, p := range paths {
		h.started = append(h.started, p)
		if err := h.run(ctx, p, "freeze"); err != nil {
			return err
		}
		h.ran = append(h.ran, p)
	}
	return nil
}

// thaw calls every hook whose freeze was begun, also one that failed: it may
// have done half of its work. It goes on after an error.
func (h *hooks) thaw() error {
	var errs []error
	for _, p := range slices.Backward(h.started) {
		errs = append(errs, h.run(context.Background(), p, "thaw"))
	}
	h.started = nil
	return errors.Join(errs...)
}

// run calls one hook; when its time is over it is killed with all its children.
func (h *hooks) run(ctx context.Context, path, verb string) error {
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	said := &tail{}
	cmd := exec.CommandContext(ctx, path, verb)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for children that live on and keep the pipe
	err := cmd.Run()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("killed after %v", h.timeout)
	}
	return fmt.Errorf("%w: %s %s: %w%s", ErrHook, path, verb, err, said)
}

// tail keeps the end of what a hook says, within a bound.
type tail struct{ b []byte }

const tailMax = 2 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - tailMax; n > 0 {
		t.b = slices.Delete(t.b, 0, n)
	}
	return len(p), nil
}

func (t *tail) String() string {
	if s := bytes.TrimSpace(t.b); len(s) > 0 {
		return ": " + string(s)
	}
	return ""
}
