package serve

import (
	"sync"

	"golang.org/x/sys/unix"
)

// lockMemory keeps what this process uses, and will use, in memory: a server
// that is paged out to the device that it serves never comes back. Pages are
// locked as they are touched, so that what Go merely reserves costs nothing.
var lockMemory = sync.OnceValue(func() error {
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
})
