package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/control/api"
	"tidemark/internal/testkit"
)

// running is a daemon in this process that protects nothing.
type running struct {
	Config
	end   context.CancelFunc
	ended chan error
}

// start runs a daemon until the test ends, and waits until it answers.
func start(t *testing.T, cfg Config) *running {
	t.Helper()
	if cfg.StateDir == "" {
		cfg.StateDir = filepath.Join(t.TempDir(), "state")
	}
	if cfg.Socket == "" {
		cfg.Socket = filepath.Join(t.TempDir(), "socket")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	ctx, end := context.WithCancel(context.Background())
	r := &running{Config: cfg, end: end, ended: make(chan error, 1)}
	go func() { r.ended <- Run(ctx, cfg) }()
	t.Cleanup(func() { _ = r.stop() })
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		_, err := api.Dial(cfg.Socket).Status(t.Context())
		if err == nil {
			return r
		}
		select {
		case err := <-r.ended:
			t.Fatalf("it ended: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not answer: %v", err)
		}
	}
}

func (r *running) stop() error {
	r.end()
	err := <-r.ended
	r.ended <- nil // for the next call
	return err
}

// held says whether somebody has the right to a state folder.
func held(t *testing.T, state string) bool {
	t.Helper()
	f, err := os.Open(filepath.Join(state, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// onMessage is a log that calls a function for each message.
type onMessage struct {
	slog.Handler
	call func(string)
}

func (h onMessage) Enabled(context.Context, slog.Level) bool { return true }

func (h onMessage) Handle(_ context.Context, r slog.Record) error {
	h.call(r.Message)
	return nil
}

// TestShutdownOrder: the socket goes first, the state folder last, and systemd is told in between.
func TestShutdownOrder(t *testing.T) {
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", notify.LocalAddr().String())
	told := func() string {
		b := make([]byte, 256)
		if err := notify.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := notify.Read(b)
		if err != nil {
			t.Errorf("systemd was told nothing: %v", err)
		}
		return string(b[:n])
	}
	state, socket := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "socket")
	stopping := false
	r := start(t, Config{StateDir: state, Socket: socket, Log: slog.New(onMessage{call: func(message string) {
		if !strings.Contains(message, "stopping") {
			return
		}
		stopping = true
		if got := told(); got != "STOPPING=1" {
			t.Errorf("systemd was told %q, want STOPPING=1", got)
		}
		if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is still there while the groups stop: %v", err)
		}
		if !held(t, state) {
			t.Error("the state folder was let go before the groups had stopped")
		}
	}})})
	if got := told(); got != "READY=1" {
		t.Errorf("systemd was told %q, want READY=1", got)
	}
	if err := r.stop(); err != nil || !stopping {
		t.Errorf("ended with %v; said that it is stopping: %t", err, stopping)
	}
	if held(t, state) {
		t.Error("the state folder is still held")
	}
}

// TestRequestUnderWay: a client that never ends its request is given a moment,
// and does not keep the daemon from ending.
func TestRequestUnderWay(t *testing.T) {
	t.Parallel() // it takes that moment
	r := start(t, Config{})
	idle, err := net.Dial("unix", r.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if _, err := io.WriteString(idle, "POST /v1/groups HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(idle).ReadString('\n')
	if err != nil || !strings.Contains(line, "100 Continue") {
		t.Fatalf("%q, %v: the request is not under way", line, err)
	}
	if err := r.stop(); err != nil {
		t.Errorf("ended with %v", err)
	}
}

// TestLockThatOutlivesItsDaemon: what a killed daemon was just starting has its
// lock for a moment longer. The next daemon waits for that.
func TestLockThatOutlivesItsDaemon(t *testing.T) {
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	f, err := os.Create(filepath.Join(state, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fmt.Fprintf(f, "(process %d, which answers at /nowhere)\n", gone.Process.Pid)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	go func() {
		time.Sleep(300 * time.Millisecond)
		f.Close()
	}()
	got, err := openState(state, "/here")
	if err != nil {
		t.Fatal(err)
	}
	got.Close()
}

// TestOneDaemonAStateFolder: the second is told who has it, and changes nothing.
func TestOneDaemonAStateFolder(t *testing.T) {
	r := start(t, Config{})
	socket := filepath.Join(t.TempDir(), "socket")
	err := Run(t.Context(), Config{StateDir: r.StateDir, Socket: socket, Log: r.Log})
	if !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), r.Socket) || !strings.Contains(err.Error(), "process ") {
		t.Errorf("the same state folder: %v, want ErrRunning with process and socket", err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the second made its socket: %v", err)
	}
	state := filepath.Join(t.TempDir(), "state")
	err = Run(t.Context(), Config{StateDir: state, Socket: r.Socket, Log: r.Log})
	if !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), r.Socket) {
		t.Errorf("the same socket: %v, want ErrRunning with the socket", err)
	}
	if _, err := api.Dial(r.Socket).Status(t.Context()); err != nil {
		t.Errorf("the first no longer answers: %v", err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	start(t, Config{StateDir: r.StateDir, Socket: r.Socket})
}

// TestSocket: for the owner alone, whatever the umask; a stale one is replaced,
// anything else in its place is not touched.
func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	defer unix.Umask(unix.Umask(0))
	start(t, Config{Socket: path})
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: want mode 0600", st.Mode(), err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), Config{StateDir: filepath.Join(t.TempDir(), "state"), Socket: file, Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, ErrSocket) {
		t.Errorf("a file in the socket's place: %v, want ErrSocket", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("the file now holds %q, %v", b, err)
	}
}

// TestStateInMemory: a state folder on a tmpfs is accepted, and said to be one.
func TestStateInMemory(t *testing.T) {
	testkit.Need(t, "tmpfs")
	memory, err := os.MkdirTemp("/dev/shm", "tidemark-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(memory) })
	r := start(t, Config{StateDir: filepath.Join(memory, "state")})
	st, err := api.Dial(r.Socket).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range st.Conditions {
		if c.Code == "state-in-memory" {
			return
		}
	}
	t.Errorf("no condition says that the state is in memory: %+v", st.Conditions)
}

// TestDamagedGroup: one group's configuration that cannot be read is said, and
// keeps neither the daemon nor the other groups from working.
func TestDamagedGroup(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	if err := os.MkdirAll(filepath.Join(state, "groups", "bad"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(state, "groups", "bad", "group.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, Config{StateDir: state})
	st, err := api.Dial(r.Socket).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var subjects []string
	for _, c := range st.Conditions {
		if c.Code == "group-unreadable" {
			subjects = append(subjects, c.Subject)
		}
	}
	if !slices.Equal(subjects, []string{"bad"}) {
		t.Errorf("conditions %+v, want group-unreadable of bad", st.Conditions)
	}
}

// TestInstance: it is kept, and one that cannot be read is not replaced: the
// taps that it names would be nobody's.
func TestInstance(t *testing.T) {
	dir := t.TempDir()
	first, err := instanceID(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := instanceID(dir); err != nil || again != first {
		t.Errorf("%q, %v, want %q again", again, err, first)
	}
	path := filepath.Join(dir, "instance")
	for _, text := range []string{"", "half", "ABCDEF0123456789", first + first} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if id, err := instanceID(dir); !errors.Is(err, ErrState) {
			t.Errorf("%q: %q, %v, want ErrState", text, id, err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != text {
			t.Errorf("%q was replaced by %q", text, b)
		}
	}
}
