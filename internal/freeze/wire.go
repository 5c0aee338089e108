package freeze

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ioctls of <linux/fs.h>: _IOWR('X', 119, int) and the next.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// op is what a message is about.
type op uint8

const (
	opReady  op = 'R' // from the watchdog: armed, nothing will be opened or started any more; errno says why not
	opFreeze op = 'F' // to it: freeze this one; from it: what came of it
	opThaw   op = 'T' // to it: thaw all that is frozen; from it: what came of one
	opEnd    op = 'E' // from it: all is thawed
)

// message is one packet between caller and watchdog.
type message struct {
	op    op
	index uint16
	errno unix.Errno
}

const messageSize = 8

func (m message) encode() []byte {
	b := make([]byte, messageSize)
	b[0] = byte(m.op)
	binary.LittleEndian.PutUint16(b[2:], m.index)
	binary.LittleEndian.PutUint32(b[4:], uint32(m.errno))
	return b
}

func decode(b []byte) (message, bool) {
	if len(b) != messageSize {
		return message{}, false
	}
	return message{op(b[0]), binary.LittleEndian.Uint16(b[2:]), unix.Errno(binary.LittleEndian.Uint32(b[4:]))}, true
}

// flag is a word in memory that caller and watchdog share: not 0 since the
// moment before the first thaw that the caller did not ask for.
type flag struct {
	mem  []byte
	word *uint32
}

func mapFlag(fd int) (flag, error) {
	mem, err := unix.Mmap(fd, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return flag{}, err
	}
	return flag{mem, (*uint32)(unsafe.Pointer(&mem[0]))}, nil
}

func (f flag) raise()   { atomic.StoreUint32(f.word, 1) }
func (f flag) up() bool { return f.word != nil && atomic.LoadUint32(f.word) != 0 }

func (f *flag) unmap() {
	if f.mem != nil {
		_ = unix.Munmap(f.mem) // it is a whole mapping of ours
	}
	*f = flag{}
}

func ioctl(fd int, req uintptr) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, 0)
	return errno
}
