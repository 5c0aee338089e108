package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/dm"
	"tidemark/internal/freeze"
	"tidemark/internal/health"
	"tidemark/internal/splice"
)

// The guard of a splice is a small process that outlives the daemon. When that
// is gone for longer than a bound, the guard gives the volume its own table back.
//
//	armed ──daemon gone──▶ waiting ──bound over──▶ giving back ──▶ end
//	  │                       └──another daemon────────┴──▶ end
//	  └──dismissed──▶ end
//
// It and the next daemon never both serve the device: see splice.Claim.

// GuardVerb is the first argument with which this program is started as a
// guard: main has to call GuardMain before anything else then.
const GuardVerb = "splice-guard"

// DefaultGiveBack is after how long without a daemon a volume is given back.
// It is below the two minutes after which the kernel calls a waiting task hung.
const DefaultGiveBack = time.Minute

const (
	guardReady = 30 * time.Second // for a guard to be armed, on a busy machine
	guardLook  = 200 * time.Millisecond
	guardAgain = 5 * time.Second // before a guard that was ended by others is started again
)

// guardConfig is what a guard is started with. There is no secret in it.
type guardConfig struct {
	Name   string        `json:"name"`
	State  string        `json:"state"`
	Splice splice.Splice `json:"splice"`
	Bound  time.Duration `json:"bound"`
	Daemon int           `json:"daemon"` // its process
}

// guard is a guard seen from the daemon.
type guard struct {
	in    io.WriteCloser
	ended chan struct{}
}

// guardFor starts a guard and waits until it is armed; nil where the user wants none.
func (s *Server) guardFor(spec Spec) (*guard, error) {
	if spec.GiveBack == 0 || len(s.env.Guard) == 0 {
		return nil, nil
	}
	conf, err := json.Marshal(guardConfig{spec.Name, s.env.StateDir, *spec.Splice, spec.GiveBack, os.Getpid()})
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(s.env.Guard[0], append(s.env.Guard[1:], GuardVerb, string(conf))...)
	cmd.Args[0], cmd.Env, cmd.Dir = "tidemark", []string{}, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the guard of %s: %w", spec.Name, err)
	}
	g := &guard{in: in, ended: make(chan struct{})}
	word := make([]byte, 256) // "armed", or why not
	late := time.AfterFunc(guardReady, func() { _ = cmd.Process.Kill() })
	n, _ := out.Read(word)
	late.Stop()
	go func() { // ends with the guard
		_ = cmd.Wait() // how it ended is seen from whether it was dismissed
		close(g.ended)
	}()
	if said := string(word[:n]); said != guardArmed {
		_ = in.Close()
		return nil, fmt.Errorf("the guard of %s cannot be armed: %s", spec.Name, said)
	}
	return g, nil
}

const guardArmed = "armed"

// dismiss ends a guard that is not needed any more, and waits for its end.
func (g *guard) dismiss() {
	if g == nil {
		return
	}
	_, _ = g.in.Write([]byte{guardEnd}) // fails where it has ended
	_ = g.in.Close()
	<-g.ended
}

// release has a guard take over though the daemon lives: it cannot serve the device.
func (g *guard) release() {
	_, _ = g.in.Write([]byte{guardGo})
	_ = g.in.Close()
}

// What a guard is told. The end of its input says that the daemon is gone.
const (
	guardEnd = 'q'
	guardGo  = 'g'
)

// guard has a spliced device guarded, from before its volume leads to it.
func (s *Server) guard(d *Device) error {
	g, err := s.guardFor(d.spec)
	if err != nil || g == nil {
		return err
	}
	d.set(func() { d.guard = g })
	s.watching.Go(func() { s.keepGuard(d, g) })
	return nil
}

// unguard ends the guard of a device that leads to no volume any more.
func (d *Device) unguard() {
	var g *guard
	d.set(func() { g, d.guard = d.guard, nil })
	g.dismiss()
}

// keepGuard starts another guard where somebody has ended one.
func (s *Server) keepGuard(d *Device, g *guard) {
	for {
		select {
		case <-s.watch0.Done():
			return
		case <-g.ended:
		}
		select {
		case <-s.watch0.Done():
			return
		case <-time.After(guardAgain):
		}
		if !d.guardedBy(g, g) {
			return // it was dismissed
		}
		again, err := s.guardFor(d.now().spec)
		if err != nil {
			s.unguarded(d, err)
			continue
		}
		d.health.Clear("splice-unguarded", d.now().spec.Name)
		if !d.guardedBy(g, again) {
			again.dismiss()
			return
		}
		g = again
	}
}

// guardedBy puts another guard in a guard's place, where that is still the device's.
func (d *Device) guardedBy(g, again *guard) (still bool) {
	d.set(func() {
		if still = d.guard == g; still {
			d.guard = again
		}
	})
	return still
}

func (s *Server) unguarded(d *Device, err error) {
	d.health.Raise(health.Condition{Code: "splice-unguarded", Severity: health.Warning, Subject: d.spec.Name,
		Detail: "There is no guard that gives the volume its table back when the daemon is gone: " + err.Error() + ".",
		Remedy: "Mend what it names, and start the daemon again."})
}

// IsGuard says whether this process was started as a guard.
func IsGuard() bool { return len(os.Args) == 3 && os.Args[1] == GuardVerb }

// GuardMain is the life of a guard; its result is the exit code. Its input is a
// pipe from the daemon, its output says that it is armed, or why not.
func GuardMain() int {
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2)
	var conf guardConfig
	if err := json.Unmarshal([]byte(os.Args[2]), &conf); err != nil {
		fmt.Fprint(os.Stdout, "the daemon starts it, not a user: ", err)
		return 2
	}
	b, err := arm(conf)
	if err != nil {
		fmt.Fprint(os.Stdout, err)
		return 1
	}
	if _, err := fmt.Fprint(os.Stdout, guardArmed); err != nil {
		return 1
	}
	word := make([]byte, 1)
	switch n, _ := os.Stdin.Read(word); {
	case n == 0: // as it ends, the daemon lets go of its claim: that is not another's
		awaitEnd(b.daemon)
	case word[0] != guardGo:
		return 0 // dismissed
	}
	for end := time.Now().Add(conf.Bound); time.Now().Before(end); time.Sleep(guardLook) {
		if b.claim.Contested() {
			return 0 // another daemon has it
		}
	}
	b.run(context.Background())
	return 0
}

// awaitEnd waits for the end of a process.
func awaitEnd(pidfd int) {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(p, -1); n == 1 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// arm does all that could need anything from a file system, before the daemon is gone.
func arm(conf guardConfig) (*giveBack, error) {
	freeze.LeaveControlGroup()
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // refused in some containers
	daemon, err := unix.PidfdOpen(conf.Daemon, 0)
	if err != nil || os.Getppid() != conf.Daemon {
		return nil, errors.Join(errors.New("the daemon has ended"), err)
	}
	claim, err := splice.OpenClaim(&conf.Splice)
	if err == nil {
		err = claim.Guard()
	}
	if err != nil {
		return nil, err
	}
	c, err := dm.Open()
	if err != nil {
		return nil, err
	}
	// All of the program now: it may lie on a disk that waits for us by then.
	if err := splice.LockMemory(); err != nil {
		return nil, fmt.Errorf("locking its memory: %w", err)
	}
	kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		kmsg = nil // not in every container
	}
	return &giveBack{daemon: daemon, splice: &conf.Splice, control: c, claim: claim, kmsg: kmsg,
		record: func() error { return recordGivenBack(conf) }}, nil
}

// recordGivenBack leaves word for the next daemon. The volume works by now, so
// this may wait for disks.
func recordGivenBack(conf guardConfig) error {
	s := &Server{folder: filepath.Join(conf.State, "devices")}
	r, err := s.load(conf.Name)
	if err != nil {
		return err
	}
	r.GivenBack = time.Now()
	return s.save(r)
}
