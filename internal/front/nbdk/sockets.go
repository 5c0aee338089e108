package nbdk

import (
	"os"

	"golang.org/x/sys/unix"
)

// pairs makes connected sockets: one end for us, one for the kernel, which
// keeps its own hold on it.
func pairs(n int) (ours, theirs []*os.File, err error) {
	for range n {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			closeAll(ours)
			closeAll(theirs)
			return nil, nil, err
		}
		ours = append(ours, os.NewFile(uintptr(fds[0]), "nbd server"))
		theirs = append(theirs, os.NewFile(uintptr(fds[1]), "nbd kernel"))
	}
	return ours, theirs, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// held says whether the other end of a socket is open, that is, whether the
// kernel has kept it.
func held(f *os.File) bool {
	p := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN | unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(p, 0)
		if err == unix.EINTR {
			continue
		}
		return err == nil && (n == 0 || p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) == 0)
	}
}
