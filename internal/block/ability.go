package block

// FUAWriter is a Device that can make a single write stable. WriteFUA returns
// when p is on stable storage; it says nothing of other writes. A Device
// without it gets WriteAt and Flush.
type FUAWriter interface {
	WriteFUA(p []byte, off int64) (int, error)
}

// Limits are what a front passes on to whoever uses a device. Sizes are bytes;
// 0 is "not known" or, for Discard, "not offered".
type Limits struct {
	LogicalBlock  int64 // smallest unit of I/O: a power of two from 512; 0 is 512
	PhysicalBlock int64 // what the disk writes without reading first; 0 is LogicalBlock
	MinIO, OptIO  int64 // preferred sizes of I/O
	Discard       int64 // granularity of discards; those of less may be ignored
	MaxDiscard    int64 // longest discard
	MaxZeroes     int64 // longest WriteZeroes
	ReadOnly      bool
	Rotational    bool
	Volatile      bool // completed writes are stable only after Flush
}

// Limiter is a Device that knows its limits. The size in blocks, not the
// limits, may change while the device is in use.
type Limiter interface {
	Limits() Limits
}

// Load is the data of one read or write that lies where only the kernel sees it.
// It is used by one goroutine at a time.
type Load interface {
	// Data brings it into this process, Range.Len bytes: of a write what is to be
	// written, of a read the memory to fill, which is taken back when the request has ended.
	Data() ([]byte, error)
	// Carry has the kernel move it, without a copy, from or to byte off of a file.
	// On any error nothing is lost by doing the same through Data.
	Carry(fd int, off int64) error
}

// Mover is a Device that takes a read or write with its Load, so that the data
// need not pass through this process. Move does what ReadAt, WriteAt and, with
// fua, WriteFUA do, whole or with an error.
type Mover interface {
	Move(op Op, r Range, fua bool, l Load) error
}
