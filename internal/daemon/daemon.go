// Package daemon is the process: it opens what there is, lets the groups work,
// answers on its socket, and shuts down in order. It wires; the logic is in the
// packages that it wires.
package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"tidemark/internal/control/api"
	"tidemark/internal/control/metrics"
	"tidemark/internal/health"
	"tidemark/internal/protect"
	"tidemark/internal/serve"
	"tidemark/internal/vault"
	"tidemark/internal/vfs"
)

// Config is what a daemon is started with.
type Config struct {
	StateDir string
	Socket   string
	Version  string
	Log      *slog.Logger
	// DeviceHelper is the command line of a process that calls serve.HelperMain.
	DeviceHelper []string
	// SpliceGuard is the command line of a process that calls serve.GuardMain.
	SpliceGuard []string
	// Nodes is the folder of the served devices' names; "" is /dev/tidemark.
	Nodes string
	// Stop asks the daemon to end. It is refused while served devices are open, unless Force.
	Stop <-chan os.Signal
	// Compat names control devices of other systems that it answers, of Compat.
	Compat []string
	// CompatVault is the vault of the groups that /dev/involflt makes for disks that are in none; empty: it makes none.
	CompatVault string
	Force       bool
	// Step is told before each step of a mark over groups, by name; nil: nobody is. It is for tests.
	Step func(step string)
	// Metrics is where it answers Prometheus; "": nowhere.
	Metrics string
}

// What keeps a daemon from starting.
var (
	ErrRunning = errors.New("another daemon is running")
	ErrState   = errors.New("the state folder cannot be used")
	ErrSocket  = errors.New("the socket cannot be made")
)

// Run runs the daemon until ctx ends. It shuts down in this order:
//  1. the socket goes, so that nobody asks for anything new; who waits for a batch
//     is told, and requests under way get a moment (shutdownMax), then they are cut off; the control devices of
//     other systems go likewise;
//  2. the served devices stop: those whose front can do so let requests wait;
//  3. the groups stop, all at once, each after what its ring holds is durable in
//     the spool; their taps stay and go on capturing;
//  4. the rings of served devices are let go; they stay for the next daemon;
//  5. the state folder is let go, last: whoever takes it over finds nobody at work.
func Run(ctx context.Context, cfg Config) (err error) {
	if cfg.StateDir, err = filepath.Abs(cfg.StateDir); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	if cfg.Socket, err = filepath.Abs(cfg.Socket); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if err := cfg.checkCompat(); err != nil {
		return err
	}
	if cfg.Metrics != "" {
		if err := metrics.Check(cfg.Metrics); err != nil {
			return err
		}
	}
	lock, err := openState(cfg.StateDir, cfg.Socket)
	if err != nil {
		return err
	}
	defer lock.Close()
	instance, err := instanceID(cfg.StateDir)
	if err != nil {
		return err
	}
	host, _ := os.Hostname() // only told to people
	svc := &service{version: cfg.Version, groups: map[string]*protect.Group{}, env: &protect.Env{
		StateDir: cfg.StateDir, Instance: instance, Log: cfg.Log,
		Holder: vault.Holder{Host: host, PID: os.Getpid(), Instance: instance, Since: time.Now()},
	}}
	svc.checkState()
	if err := svc.openMarks(cfg.Step); err != nil {
		return err
	}
	listener, err := listen(cfg.Socket) // before the groups: a daemon that cannot be asked leaves their vaults alone
	if err != nil {
		return err
	}
	defer listener.Close()
	tellMetrics, endMetrics, err := svc.openMetrics(cfg.Metrics)
	if err != nil {
		return err
	}
	defer endMetrics()
	if err := svc.open(); err != nil {
		return err
	}
	if svc.devices, err = serve.Open(ctx, &serve.Env{StateDir: cfg.StateDir, Nodes: cfg.Nodes, Helper: cfg.DeviceHelper, Guard: cfg.SpliceGuard, Log: cfg.Log, Taken: svc.takenByGroup, Captures: svc.captures()}); err != nil {
		return err
	}
	defer svc.closeDevices()
	defer svc.stop()
	svc.start() // when their served devices are there
	tellMetrics()
	defer svc.stopDevices()
	stopCompat := svc.startCompat(ctx, &cfg)
	defer stopCompat()
	server := &http.Server{Handler: api.Handler(svc), ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(cfg.Log.Handler(), slog.LevelWarn)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	cfg.Log.Info("tidemark is ready", "socket", cfg.Socket, "state", cfg.StateDir, "instance", instance)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // not under systemd: nothing to tell
	select {
	case err = <-served:
	case <-svc.mayStop(ctx, cfg):
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	end, cancel := context.WithTimeout(context.Background(), shutdownMax)
	defer cancel()
	svc.closeAllConsumers() // who waits for a batch would wait for ever
	if server.Shutdown(end) != nil {
		server.Close()
	}
	cfg.Log.Info("tidemark is stopping; capture goes on in the kernel", "groups", len(svc.list()))
	return err
}

// shutdownMax is how long requests under way may take when the daemon ends.
const shutdownMax = 5 * time.Second

// openState makes the state folder and takes the right to it, noting for others who has it.
func openState(dir, socket string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Join(dir, "groups"), 0o700); err != nil {
		return nil, unusable(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, unusable(err)
	}
	if who, err := takeState(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("the state folder %s is in use: %w%s\n  End that one, or give this one another --state and --socket", dir, ErrRunning, strings.TrimRight(" "+who, " \n"))
	}
	if err = f.Truncate(0); err == nil {
		_, err = fmt.Fprintf(f, "(process %d, which answers at %s)\n", os.Getpid(), socket)
	}
	if err != nil {
		f.Close()
		return nil, unusable(err)
	}
	return f, nil
}

// inheritedMax bounds the wait for what a killed daemon was just starting.
const inheritedMax = 5 * time.Second

// takeState locks the state folder, or says who has it. Of a daemon that was
// killed while it started another program, that program's process has the lock
// until it has become that program: it is waited for.
func takeState(f *os.File) (who string, err error) {
	for deadline := time.Now().Add(inheritedMax); ; time.Sleep(20 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return "", nil
		}
		note, _ := io.ReadAll(io.NewSectionReader(f, 0, 4096)) // nothing yet: it is just starting
		if !ended(string(note)) || time.Now().After(deadline) {
			return string(note), err
		}
	}
}

// ended says that the process of a note is gone.
func ended(note string) bool {
	var pid int
	if n, _ := fmt.Sscanf(note, "(process %d,", &pid); n != 1 || pid < 2 {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

// unusable says what to do about a state folder that cannot be written to.
func unusable(err error) error {
	remedy := "Give a folder that can be written to with --state."
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		remedy = "Make room there, or give another folder with --state."
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		remedy = "Run as root, or give a folder of your own with --state (without root no disk can be tapped)."
	}
	return fmt.Errorf("%w: %w\n  %s", ErrState, err, remedy)
}

// instanceID names this daemon's pins; it is kept in the state folder.
func instanceID(dir string) (string, error) {
	path := filepath.Join(dir, "instance")
	b, err := os.ReadFile(path)
	if err == nil {
		if id := strings.TrimSpace(string(b)); len(id) == 16 && strings.Trim(id, "0123456789abcdef") == "" {
			return id, nil
		}
		return "", fmt.Errorf("%w: %s is damaged\n  Remove it if no tap of this daemon is pinned (tidemark doctor lists them)", ErrState, path)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", unusable(err)
	}
	var raw [8]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return "", err
	}
	id := hex.EncodeToString(raw[:])
	if err := vfs.WriteWhole(vfs.OS{}, path, []byte(id+"\n")); err != nil {
		return "", unusable(err)
	}
	return id, nil
}

// listen replaces a socket that nobody answers on any more.
func listen(path string) (net.Listener, error) {
	const remedy = "Name another with --socket."
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("%w: %w\n  %s", ErrSocket, err, remedy)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("%w: %s is there and is no socket\n  %s", ErrSocket, path, remedy)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("%w and answers at %s\n  %s", ErrRunning, path, remedy)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("%w: %w\n  %s", ErrSocket, err, remedy)
		}
	}
	if len(path) >= len(unix.RawSockaddrUnix{}.Path) {
		return nil, fmt.Errorf("%w: %s has %d bytes, and a socket's name at most %d\n  %s", ErrSocket, path, len(path), len(unix.RawSockaddrUnix{}.Path)-1, remedy)
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w\n  %s", ErrSocket, err, remedy)
	}
	return l, nil
}

// checkState raises what is wrong with where and as whom the daemon runs.
func (s *service) checkState() {
	if os.Geteuid() != 0 {
		s.health.Raise(health.Condition{Code: "not-root", Severity: health.Warning, Detail: "The daemon does not run as root: it can tap no disk.",
			Remedy: "Start it as root."})
	}
	var st unix.Statfs_t
	if unix.Statfs(s.env.StateDir, &st) == nil && st.Type == unix.TMPFS_MAGIC {
		s.health.Raise(health.Condition{Code: "state-in-memory", Severity: health.Warning, Detail: "The state folder " + s.env.StateDir + " is in memory: groups and what waits for the vault are forgotten by a reboot.",
			Remedy: "Give a folder on a disk with --state."})
	}
}
