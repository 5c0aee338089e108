package daemon

import (
	"log/slog"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// BecomeFlusher makes the whole process one that the kernel does not wait for
// when it wants memory (PR_SET_IO_FLUSHER): the server of a device must not
// depend on writes to that device. It is an attribute of a thread, inherited by
// those that it makes; so the thread that gets it starts the program anew, once,
// with the same arguments, and the new program's threads all have it. Where it
// is not permitted, as in containers, or where the kernel has none, nothing happens.
func BecomeFlusher(log *slog.Logger) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if on, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0); err != nil || on == 1 {
		return
	}
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return
	}
	if err := unix.Exec("/proc/self/exe", os.Args, os.Environ()); err != nil {
		log.Warn("the daemon could not be started anew as an I/O flusher", "error", err)
	}
}
