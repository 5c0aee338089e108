package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/backing"
	"tidemark/internal/dm"
	"tidemark/internal/freeze"
	"tidemark/internal/splice"
)

// The guard of a splice is a small process that outlives the daemon. Where that
// is gone for longer than a bound, the guard gives the volume its own table back.
//
// It cannot just swap the table: to suspend the volume the kernel waits for the
// requests that the dead server held, and they would wait for ever. So the guard
// becomes their server for a moment, without any filter: it recovers the front
// over the lower device, the held requests end, and then the table is swapped in
// order. It needs nothing from the disk for that: memory and descriptors are its
// own from the beginning.

// guardTime bounds each step of giving back.
const guardTime = 30 * time.Second

// guardConfig is what a guard is started with.
type guardConfig struct {
	Spec     Spec          `json:"spec"`
	StateDir string        `json:"state"`
	Bound    time.Duration `json:"bound"`
}

// guard is a guard seen from the daemon.
type guard struct {
	cmd *exec.Cmd
	in  io.WriteCloser
}

// startGuard begins to guard a spliced device.
func (s *Server) startGuard(d *Device) error {
	if len(s.env.Guard) == 0 || d.spec.GiveBack == 0 {
		return nil
	}
	conf, err := json.Marshal(guardConfig{d.spec, s.env.StateDir, d.spec.GiveBack})
	if err != nil {
		return err
	}
	cmd := exec.Command(s.env.Guard[0], append(s.env.Guard[1:], string(conf))...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fmt.Errorf("starting the guard of %s: %w", d.spec.Name, err)
	}
	armed := make([]byte, 1)
	if _, err := io.ReadFull(out, armed); err != nil {
		return errors.Join(fmt.Errorf("the guard of %s ended before it was armed: %w", d.spec.Name, err), in.Close(), cmd.Wait())
	}
	d.guard = &guard{cmd, in}
	return nil
}

// dismiss ends a guard that is not needed any more.
func (g *guard) dismiss() error {
	if g == nil {
		return nil
	}
	_, err := g.in.Write([]byte{'q'})
	return errors.Join(err, g.in.Close(), g.cmd.Wait())
}

// GuardMain is the life of a guard: its argument is its configuration, its input
// a pipe from the daemon.
func GuardMain(text string) error {
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	var conf guardConfig
	if err := json.Unmarshal([]byte(text), &conf); err != nil || conf.Spec.Splice == nil {
		return errors.New("this is started by the daemon, not by hand")
	}
	freeze.LeaveControlGroup()
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // refused in some containers
	lock, err := os.OpenFile(filepath.Join(conf.StateDir, "lock"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	c, err := dm.Open()
	if err != nil {
		return err
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return err
	}
	if _, err := os.Stdout.Write([]byte{'a'}); err != nil {
		return err
	}
	word := make([]byte, 1)
	if n, _ := os.Stdin.Read(word); n == 1 {
		return nil // dismissed
	}
	time.Sleep(conf.Bound)
	// The daemon holds this lock as long as it lives: whoever has it now has the device too.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil
	}
	err = giveBack(c, conf)
	if err != nil { // the kernel's log is in memory
		if f, openErr := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); openErr == nil {
			fmt.Fprintf(f, "<3>tidemark: giving the volume %s back: %v\n", conf.Spec.Splice.Name, err)
		}
	}
	return err
}

// giveBack serves what was held, swaps the table back, and leaves word of it.
func giveBack(c *dm.Control, conf guardConfig) error {
	sp, spec := conf.Spec.Splice, conf.Spec
	if err := sp.Check(c); errors.Is(err, splice.ErrReplaced) {
		return nil // it does not lead to us any more
	}
	lower, err := backing.Open(spec.Backing, backing.Options{})
	if err != nil {
		return err
	}
	defer lower.Close()
	ctx, cancel := context.WithTimeout(context.Background(), guardTime)
	defer cancel()
	quiet := slog.New(slog.DiscardHandler)
	f := newFronts(&Env{StateDir: conf.StateDir, Log: quiet})[spec.Front]
	if f == nil {
		return fmt.Errorf("%q: %w", spec.Front, ErrFront)
	}
	served, err := f.serve(ctx, spec, shown{dev: lower, limits: lower.Limits()}, nil)
	if err != nil {
		return err
	}
	if err := sp.Out(c, false); err != nil {
		return errors.Join(err, served.pause(ctx))
	}
	err = errors.Join(served.remove(ctx), lower.Flush(), lower.Close(), sp.Remove(c))
	s := &Server{folder: filepath.Join(conf.StateDir, "devices")}
	return errors.Join(err, s.save(record{Spec: spec, Made: true, GivenBack: time.Now()}))
}
