// Package nbd is the NBD protocol as data: numbers and fixed structures, as the
// protocol's public specification (doc/proto.md of the NBD project) gives them.
// Everything on the wire is big-endian.
package nbd

// Greeting and negotiation.
const (
	Magic          = 0x4e42444d41474943 // "NBDMAGIC"
	OptionMagic    = 0x49484156454f5054 // "IHAVEOPT"
	OptReplyMagic  = 0x0003e889045565a9
	FlagFixed      = 1 << 0 // handshake flags, both sides
	FlagNoZeroes   = 1 << 1
	OptExportName  = 1
	OptAbort       = 2
	OptList        = 3
	OptStartTLS    = 5
	OptInfo        = 6
	OptGo          = 7
	OptStructured  = 8
	OptListMeta    = 9
	OptSetMeta     = 10
	RepAck         = 1
	RepServer      = 2
	RepInfo        = 3
	RepMetaContext = 4
	RepErrUnsup    = 1<<31 + 1
	RepErrPolicy   = 1<<31 + 2
	RepErrInvalid  = 1<<31 + 3
	RepErrTLSReqd  = 1<<31 + 5
	RepErrUnknown  = 1<<31 + 6
	RepErrTooBig   = 1<<31 + 9
	InfoExport     = 0
	InfoName       = 1
	InfoDesc       = 2
	InfoBlockSize  = 3
)

// Transmission flags of an export.
const (
	HasFlags        = 1 << 0
	ReadOnly        = 1 << 1
	SendFlush       = 1 << 2
	SendFUA         = 1 << 3
	SendTrim        = 1 << 5
	SendWriteZeroes = 1 << 6
	SendDF          = 1 << 7
	CanMultiConn    = 1 << 8
	SendCache       = 1 << 10
	SendFastZero    = 1 << 11
)

// Requests and replies.
const (
	RequestMagic     = 0x25609513
	SimpleMagic      = 0x67446698
	StructuredMagic  = 0x668e33ef
	CmdRead          = 0
	CmdWrite         = 1
	CmdDisc          = 2
	CmdFlush         = 3
	CmdTrim          = 4
	CmdCache         = 5
	CmdWriteZeroes   = 6
	CmdBlockStatus   = 7
	CmdFlagFUA       = 1 << 0
	CmdFlagNoHole    = 1 << 1
	CmdFlagDF        = 1 << 2
	CmdFlagReqOne    = 1 << 3
	CmdFlagFastZero  = 1 << 4
	ReplyFlagDone    = 1 << 0
	ReplyNone        = 0
	ReplyOffsetData  = 1
	ReplyOffsetHole  = 2
	ReplyBlockStatus = 5
	ReplyError       = 1<<15 + 1
	StateHole        = 1 << 0
	StateZero        = 1 << 1
	StateDirty       = 1 << 0 // of a qemu:dirty-bitmap
	RequestSize      = 28
)

// Errors on the wire.
const (
	EPERM     = 1
	EIO       = 5
	ENOMEM    = 12
	EINVAL    = 22
	ENOSPC    = 28
	EOVERFLOW = 75
	ENOTSUP   = 95
	ESHUTDOWN = 108
)

// Names of metadata contexts: the allocation of an export, and what comes
// before the name of a change map.
const (
	BaseAllocation  = "base:allocation"
	QemuDirtyBitmap = "qemu:dirty-bitmap:"
)
