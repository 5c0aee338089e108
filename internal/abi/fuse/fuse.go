// Package fuse is the part of the kernel's FUSE interface that a character
// device in user space (CUSE) needs: numbers and structures, as
// include/uapi/linux/fuse.h has them, protocol 7.12 and later. All of it is in
// the machine's byte order.
package fuse

// Protocol version that is answered. A kernel with a later minor number speaks this one too.
const (
	Major = 7
	Minor = 31
)

// Opcodes of requests that the kernel sends to a character device's server.
const (
	OpOpen      = 14
	OpRead      = 15
	OpWrite     = 16
	OpRelease   = 18
	OpInterrupt = 36
	OpIoctl     = 39
	OpPoll      = 40
	OpCuseInit  = 4096
)

const (
	CuseUnrestrictedIoctl = 1 << 0 // of CuseInit: ioctls whose numbers do not tell their sizes
	IoctlCompat           = 1 << 0 // of IoctlIn: a 32-bit program's
	IoctlUnrestricted     = 1 << 1
	Ioctl32Bit            = 1 << 3
	MinReadBuffer         = 8192 // bytes that a read of requests must have room for
	NotifyReply           = 0    // unique of what is no answer
)

// InHeader stands before every request.
type InHeader struct {
	Len, Opcode   uint32
	Unique        uint64
	NodeID        uint64
	UID, GID, PID uint32 // of the caller; PID is a thread's, 0 where it has none in the server's name space
	ExtLen        uint16 // in units of 8 bytes, after the arguments; 0 before protocol 7.38
	_             uint16
}

// OutHeader stands before every answer. Error is 0 or a negative errno.
type OutHeader struct {
	Len    uint32
	Error  int32
	Unique uint64
}

// CuseInitIn is the first request.
type CuseInitIn struct {
	Major, Minor uint32
	_            uint32
	Flags        uint32
}

// CuseInitOut answers it, followed by "DEVNAME=name" and a zero byte.
type CuseInitOut struct {
	Major, Minor       uint32
	_                  uint32
	Flags              uint32
	MaxRead, MaxWrite  uint32
	DevMajor, DevMinor uint32 // 0 0: the kernel chooses
	_                  [10]uint32
}

// OpenIn is the argument of OpOpen.
type OpenIn struct{ Flags, OpenFlags uint32 }

// OpenOut answers it. Handle comes back in every request on the descriptor.
type OpenOut struct {
	Handle    uint64
	Flags     uint32
	BackingID int32
}

// ReleaseIn is the argument of OpRelease.
type ReleaseIn struct {
	Handle              uint64
	Flags, ReleaseFlags uint32
	LockOwner           uint64
}

// InterruptIn names a request whose caller has got a signal.
type InterruptIn struct{ Unique uint64 }

// IoctlIn is the argument of OpIoctl.
type IoctlIn struct {
	Handle          uint64
	Flags, Cmd      uint32
	Arg             uint64
	InSize, OutSize uint32
}

// IoctlOut answers it. Result is what ioctl returns: not negative, or a negative errno.
type IoctlOut struct {
	Result        int32
	Flags         uint32
	InVec, OutVec uint32
}
