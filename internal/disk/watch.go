package disk

import (
	"context"
	"errors"
	"os"
	"strconv"
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
		Listen(ctx, func(Uevent) {
			select {
			case hint <- struct{}{}:
			default: // one is waiting
			}
		})
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

// Uevent is what the kernel tells of a block device.
type Uevent struct {
	Name    string // kernel name; empty: some were missed, of any device
	Action  string // "add", "remove", "change" and others
	Resized bool   // its size changed, perhaps back to what it was by now
	// Resumed: device-mapper put a table of it in use, one that it had or another. Nothing
	// else tells of a table that was another one for a while (docs/kernel-notes.md).
	Resumed bool
	Seq     uint64 // its number among all events of the kernel; see Told
}

// Told is the number of the newest event that the kernel has sent: what it tells
// from now on has a higher one. 0: that cannot be had here.
func Told() uint64 {
	text, err := os.ReadFile("/sys/kernel/uevent_seqnum")
	if err != nil {
		return 0
	}
	seq, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0
	}
	return seq
}

// heldBytes is room for some thousand events that nobody has read yet: of those that do
// not fit is only known that they were.
const heldBytes = 8 << 20

// Listen calls fn for every event of a block device until ctx ends. It returns
// at once where the kernel does not let us listen: polling has to do then.
func Listen(ctx context.Context, fn func(Uevent)) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}) != nil {
		return
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, heldBytes) // without privileges it is what it is
	// So that the end of ctx is noticed.
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000})
	buf := make([]byte, 16<<10)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS): // told of more than fits
			fn(Uevent{})
		case err != nil:
			return
		default:
			if e, ok := parseUevent(buf[:n]); ok {
				fn(e)
			}
		}
	}
}

// parseUevent reads a message of the kernel; not ok: it is not about a block device.
func parseUevent(msg []byte) (e Uevent, ok bool) {
	of := "" // whom else but device-mapper's resume it is of
	for field := range strings.SplitSeq(string(msg), "\x00") {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "SUBSYSTEM":
			ok = value == "block"
		case "ACTION":
			e.Action = value
		case "DEVNAME":
			e.Name = strings.ReplaceAll(strings.TrimPrefix(value, "/dev/"), "/", "!")
		case "RESIZE":
			e.Resized = value == "1"
		case "SEQNUM":
			e.Seq, _ = strconv.ParseUint(value, 10, 64)
		case "SYNTH_UUID", "DM_ACTION", "DISK_RO", "DISK_MEDIA_CHANGE", "DISK_EJECT_REQUEST": // asked for by udev, a path, and so on
			of = key
		}
	}
	e.Resumed = strings.HasPrefix(e.Name, "dm-") && e.Action == "change" && of == ""
	return e, ok
}
