package vfs

import (
	"os"

	"golang.org/x/sys/unix"
)

// Allocate gives a file room for n bytes from off on, and makes it longer where
// that lies behind its end. Before Linux 6.9 a signal, as the runtime sends them
// to its own threads, interrupts a tmpfs in it (EINTR, and nothing is allocated):
// it begins again.
func Allocate(f *os.File, off, n int64) error {
	for {
		if err := unix.Fallocate(int(f.Fd()), 0, off, n); err != unix.EINTR {
			return err
		}
	}
}
