package freeze

import (
	"bufio"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// WatchdogVerb is the first argument with which this program is started as a
// watchdog: main has to call WatchdogMain before anything else then.
const WatchdogVerb = "freeze-watchdog"

// Descriptors that the watchdog is started with.
const (
	fdSocket = 3
	fdFlag   = 4
	fdMounts = 5 // the first of them
)

// IsWatchdog says whether this process was started as a watchdog.
func IsWatchdog() bool { return len(os.Args) == 4 && os.Args[1] == WatchdogVerb }

// WatchdogMain is the life of the watchdog; its result is the exit code.
func WatchdogMain() int {
	count, err1 := strconv.Atoi(os.Args[2])
	limit, err2 := time.ParseDuration(os.Args[3])
	if err1 != nil || err2 != nil || count < 0 || count > mountsMax {
		return 2
	}
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2)
	w := &watchdog{limit: limit, state: make([]fsState, count), results: make(chan result, 2*count+1)}
	w.send(message{op: opReady, errno: w.arm()})
	w.loop(w.commands())
	return 0
}

// fsState is where one file system is. Only the loop changes it:
//
//	idle ─freeze─▶ freezing ─ok─▶ frozen ─end─▶ thawing ─▶ idle
//	                  └─failed─▶ idle
//	                  └─ok, but ending─▶ thawing
type fsState uint8

const (
	idle fsState = iota
	freezing
	frozen
	thawing
)

type result struct {
	index int
	thaw  bool
	errno unix.Errno
}

type watchdog struct {
	limit   time.Duration
	flag    flag
	state   []fsState
	ending  bool
	results chan result // room for all there can be: no sender waits
}

// arm does all that could need anything from a file system, before one is frozen.
func (w *watchdog) arm() unix.Errno {
	LeaveControlGroup()
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // refused in some containers
	_ = unix.Chdir("/")
	f, err := mapFlag(fdFlag)
	if err != nil {
		return unix.EIO
	}
	w.flag = f
	debug.SetGCPercent(-1) // it lives for seconds
	if _, _, errno := unix.Syscall(unix.SYS_MLOCKALL, unix.MCL_CURRENT|unix.MCL_FUTURE, 0, 0); errno != 0 {
		return errno
	}
	return 0
}

// commands passes on what the caller says; closed when the caller is gone. The
// reader ends with the process.
func (w *watchdog) commands() <-chan message {
	out := make(chan message)
	go func() { // "caller"
		defer close(out)
		buf := make([]byte, messageSize+1)
		for {
			n, err := unix.Read(fdSocket, buf)
			if err == unix.EINTR {
				continue
			}
			m, ok := decode(buf[:max(n, 0)])
			if err != nil || !ok {
				return
			}
			out <- m
		}
	}()
	return out
}

// loop ends when all that was frozen is thawed.
func (w *watchdog) loop(commands <-chan message) {
	var over <-chan time.Time // from the first freeze on
	for !w.ending || slices.ContainsFunc(w.state, func(s fsState) bool { return s != idle }) {
		select {
		case m, ok := <-commands:
			switch {
			case !ok:
				commands = nil
				w.end(true)
			case m.op == opThaw:
				w.end(false)
			case m.op == opFreeze && !w.ending && int(m.index) < len(w.state):
				if over == nil {
					over = time.After(w.limit)
				}
				w.freeze(int(m.index))
			}
		case <-over:
			over = nil
			w.end(true)
		case r := <-w.results:
			w.apply(r)
		}
	}
	w.send(message{op: opEnd})
}

// call makes an ioctl on a thread of its own, which may wait as long as it likes.
func (w *watchdog) call(i int, req uintptr) {
	go func() {
		w.results <- result{i, req == fiThaw, ioctl(fdMounts+i, req)}
	}()
}

func (w *watchdog) freeze(i int) {
	if w.state[i] == idle {
		w.state[i] = freezing
		w.call(i, fiFreeze)
	}
}

func (w *watchdog) apply(r result) {
	switch {
	case r.thaw:
		w.state[r.index] = idle
		w.send(message{opThaw, uint16(r.index), r.errno})
		return
	case r.errno != 0:
		w.state[r.index] = idle
	case w.ending: // it came too late
		w.thaw(r.index)
		r.errno = unix.ETIMEDOUT
	default:
		w.state[r.index] = frozen
	}
	w.send(message{opFreeze, uint16(r.index), r.errno})
}

func (w *watchdog) thaw(i int) {
	w.state[i] = thawing
	w.call(i, fiThaw)
}

// end thaws the outer ones first, but none waits for another: a thaw that
// hangs must not keep the rest frozen.
func (w *watchdog) end(unasked bool) {
	if w.ending {
		return
	}
	w.ending = true
	if unasked && w.flag.word != nil {
		w.flag.raise() // before the first thaw
	}
	for i, s := range slices.Backward(w.state) {
		if s == frozen {
			w.thaw(i)
		}
	}
}

// send does not wait: the caller may be gone or not reading.
func (w *watchdog) send(m message) {
	_ = unix.Sendto(fdSocket, m.encode(), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil)
}

// LeaveControlGroup moves this process out of the group by which a service
// manager would kill it together with the caller. Where that is not allowed
// the watchdog still outlives a crash of the caller.
func LeaveControlGroup() {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		sep := slices.Index(fields, "-")
		if sep < 5 || len(fields) < sep+4 {
			continue
		}
		options := strings.Split(fields[sep+3], ",")
		if fields[sep+1] == "cgroup2" || fields[sep+1] == "cgroup" && slices.Contains(options, "name=systemd") {
			_ = os.WriteFile(filepath.Join(fields[4], "cgroup.procs"), []byte("0"), 0)
		}
	}
}
