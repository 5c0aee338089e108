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
