package uring

import "unsafe"

// Op is an operation of the kernel's enum io_uring_op.
type Op uint8

// The operations that this package knows how to ask for.
const (
	OpNop        Op = 0
	OpFsync      Op = 3
	OpReadFixed  Op = 4
	OpWriteFixed Op = 5
	OpFallocate  Op = 17
	OpRead       Op = 22
	OpWrite      Op = 23
	OpURingCmd   Op = 46
)

// Flags of Config and of a submission.
const (
	setupCQSize       = 1 << 3
	setupClamp        = 1 << 4
	setupCoopTaskrun  = 1 << 8
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1
	featExtArg     = 1 << 8

	enterGetEvents = 1 << 0
	enterExtArg    = 1 << 3

	registerBuffers   = 0
	unregisterBuffers = 1
	registerFiles     = 2
	registerProbe     = 8
	registerBuffers2  = 15

	rsrcSparse = 1 << 0

	offSQRing = 0
	offSQEs   = 0x10000000

	sqeFixedFile = 1 << 0
	sqeLink      = 1 << 2
	sqeHardLink  = 1 << 3
	// fsyncDataOnly leaves out metadata that is not needed to read the data back.
	fsyncDataOnly = 1 << 0

	opSupported = 1 << 0
)

// SQE is the kernel's struct io_uring_sqe, one submission. The unions that
// matter here: Off also holds the opcode of a URING_CMD, Addr3 begins its
// payload, which goes on behind the structure in a ring of big entries.
type SQE struct {
	Opcode   Op
	Flags    uint8
	IOPrio   uint16
	FD       int32
	Off      uint64
	Addr     uint64
	Len      uint32
	OpFlags  uint32
	UserData uint64
	BufIndex uint16
	_        uint16
	_        int32
	Addr3    uint64
	_        uint64
}

const (
	sqeSize    = 64
	bigSQESize = 128
	cmdOffset  = 48
	// CmdSize and BigCmdSize are the bytes for a URING_CMD's payload in an
	// ordinary and in a big entry.
	CmdSize    = sqeSize - cmdOffset
	BigCmdSize = bigSQESize - cmdOffset
)

// CQE is the kernel's struct io_uring_cqe, one completion. Res is what the
// system call of the same name would give, an error as negative errno.
type CQE struct {
	UserData uint64
	Res      int32
	Flags    uint32
}

type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
	_                                                           uint64
}

type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
	_                                                           uint64
}

type params struct {
	sqEntries, cqEntries, flags, _, _, features, _ uint32
	_                                              [3]uint32
	sq                                             sqOffsets
	cq                                             cqOffsets
}

type getEventsArg struct {
	_, _, _ uint32
	_       uint32
	ts      uint64
}

type probeOp struct {
	op, _ uint8
	flags uint16
	_     uint32
}

type probe struct {
	lastOp, opsLen uint8
	_              uint16
	_              [3]uint32
	ops            [256]probeOp
}

type rsrcRegister struct {
	nr, flags uint32
	_         [3]uint64
}

// What the layouts above must be; a mistake does not compile.
var (
	_ [sqeSize]byte = [unsafe.Sizeof(SQE{})]byte{}
	_ [16]byte      = [unsafe.Sizeof(CQE{})]byte{}
	_ [120]byte     = [unsafe.Sizeof(params{})]byte{}
	_ [24]byte      = [unsafe.Sizeof(getEventsArg{})]byte{}
	_ [32]byte      = [unsafe.Sizeof(rsrcRegister{})]byte{}
)
