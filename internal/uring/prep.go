package uring

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read reads into p from byte off of a file; off -1 is for files without places.
func (q *SQE) Read(fd int, p []byte, off int64, data uint64) {
	q.io(OpRead, fd, p, off, data)
}

// Write writes p at byte off of a file. With stable it is on stable storage
// when it completes (FUA on a disk that has it).
func (q *SQE) Write(fd int, p []byte, off int64, stable bool, data uint64) {
	q.io(OpWrite, fd, p, off, data)
	if stable {
		q.OpFlags = unix.RWF_DSYNC
	}
}

// Fixed turns a Read or Write into one through registered buffer i, in which
// its memory must lie.
func (q *SQE) Fixed(i int) {
	switch q.Opcode {
	case OpRead:
		q.Opcode = OpReadFixed
	case OpWrite:
		q.Opcode = OpWriteFixed
	}
	q.BufIndex = uint16(i)
}

// ReadBuffer and WriteBuffer read and write n bytes at byte off of a file, from
// and to the beginning of registered buffer i, which need not be memory of this process.
func (q *SQE) ReadBuffer(fd, i, n int, off int64, data uint64) {
	q.Opcode, q.FD, q.BufIndex, q.Len, q.Off, q.UserData = OpReadFixed, int32(fd), uint16(i), uint32(n), uint64(off), data
}

// WriteBuffer is as ReadBuffer is.
func (q *SQE) WriteBuffer(fd, i, n int, off int64, data uint64) {
	q.ReadBuffer(fd, i, n, off, data)
	q.Opcode = OpWriteFixed
}

// Link has the next entry wait for this one, and be cancelled (ECANCELED) where
// this one fails or is short.
func (q *SQE) Link() { q.Flags |= sqeLink }

// LinkAlways is Link for a next one that is done also where this one fails.
func (q *SQE) LinkAlways() { q.Flags |= sqeHardLink }

// FixedFile says that the file is a number of RegisterFiles, not a descriptor.
func (q *SQE) FixedFile() { q.Flags |= sqeFixedFile }

func (q *SQE) io(op Op, fd int, p []byte, off int64, data uint64) {
	q.Opcode, q.FD, q.Off, q.UserData = op, int32(fd), uint64(off), data
	q.Addr, q.Len = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), uint32(len(p))
}

// Fsync makes what a file holds stable; dataOnly leaves out its times.
func (q *SQE) Fsync(fd int, dataOnly bool, data uint64) {
	q.Opcode, q.FD, q.UserData = OpFsync, int32(fd), data
	if dataOnly {
		q.OpFlags = fsyncDataOnly
	}
}

// Fallocate is fallocate(2) with a mode of unix.FALLOC_FL_*.
func (q *SQE) Fallocate(fd int, mode uint32, off, n int64, data uint64) {
	q.Opcode, q.FD, q.Off, q.Addr, q.Len, q.UserData = OpFallocate, int32(fd), uint64(off), uint64(n), mode, data
}

// Nop completes at once.
func (q *SQE) Nop(data uint64) { q.Opcode, q.UserData = OpNop, data }

// Cmd asks the driver behind fd for a command of its own, and gives the place
// for its payload: CmdSize bytes, of a big ring's entry BigCmdSize.
func (q *SQE) Cmd(fd int, op uint32, data uint64) unsafe.Pointer {
	q.Opcode, q.FD, q.Off, q.UserData = OpURingCmd, int32(fd), uint64(op), data
	return unsafe.Pointer(&q.Addr3)
}
