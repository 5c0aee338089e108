package disk

import (
	"context"
	"errors"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Event is something that happened to a watched disk.
type Event struct {
	Name    string   // kernel name, as it was when the watch began
	Changed []string // what, as Changed says it
	Removed bool     // the disk is gone; the watch of it ends
	Now     *Info    // the disk as it is; nil where it is gone
}

// PollEvery is how often a watched disk is looked at without being told to.
const PollEvery = time.Second

// Watch looks at disks until ctx ends, and calls fn, one call at a time, for
// each change: at once where the kernel tells of it, else within PollEvery.
// It returns nil when ctx ends or no disk is left.
func Watch(ctx context.Context, disks []*Info, fn func(Event)) error {
	last := map[string]*Info{}
	for _, d := range disks {
		last[d.Name] = d
	}
	hint := make(chan struct{}, 1)
	listening := make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	defer func() { cancel(); <-listening }()
	go func() { // "uevents": ends with ctx
		defer close(listening)
		listen(ctx, hint)
	}()
	tick := time.NewTicker(PollEvery)
	defer tick.Stop()
	for len(last) > 0 {
		for name, old := range last {
			e, ok := look(old)
			switch {
			case !ok:
				continue
			case e.Removed:
				delete(last, name)
			default:
				last[name] = e.Now
			}
			fn(e)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-hint:
		case <-tick.C:
		}
	}
	return nil
}

// look compares a disk with what it was; ok says that there is something to tell.
func look(old *Info) (Event, bool) {
	now, err := old.again()
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Event{}, false // seen again at the next look
	}
	if err != nil {
		return Event{Name: old.Name, Changed: Changed(old, nil), Removed: true}, true
	}
	what := Changed(old, now)
	return Event{Name: old.Name, Changed: what, Now: now}, len(what) > 0
}

// listen passes on that something happened to some block device. Where the
// kernel does not let us listen, polling has to do.
func listen(ctx context.Context, hint chan<- struct{}) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}) != nil {
		return
	}
	// So that the end of ctx is noticed.
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000})
	buf := make([]byte, 16<<10)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		// ENOBUFS: told of more than fits, so something happened.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		if err == nil && !ofBlock(buf[:n]) {
			continue
		}
		select {
		case hint <- struct{}{}:
		default: // one is waiting
		}
	}
}

// ofBlock says whether a message of the kernel is about a block device.
func ofBlock(msg []byte) bool {
	for field := range strings.SplitSeq(string(msg), "\x00") {
		if field == "SUBSYSTEM=block" {
			return true
		}
	}
	return false
}
