package nbd

// The kernel's NBD client as it is commanded through generic netlink
// (linux/nbd-netlink.h). Attributes are in the machine's byte order; times are in seconds.
const (
	Family        = "nbd"
	FamilyVersion = 1

	GenlConnect     = 1
	GenlDisconnect  = 2
	GenlReconfigure = 3

	AttrIndex           = 1  // u32
	AttrSizeBytes       = 2  // u64
	AttrBlockSizeBytes  = 3  // u64
	AttrTimeout         = 4  // u64
	AttrServerFlags     = 5  // u64, the transmission flags
	AttrClientFlags     = 6  // u64
	AttrSockets         = 7  // nested: AttrSocketItem of AttrSocketFD
	AttrDeadConnTimeout = 8  // u64
	AttrBackend         = 10 // string

	AttrSocketItem = 1
	AttrSocketFD   = 1 // u32
)
