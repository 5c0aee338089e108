package fuse

import (
	"testing"
	"unsafe"

	"tidemark/internal/testkit"
)

// TestAgainstHeader asks the C compiler what the kernel's own header says.
func TestAgainstHeader(t *testing.T) {
	var h InHeader
	var c CuseInitOut
	var o OpenOut
	var r ReleaseIn
	var i IoctlIn
	var q IoctlOut
	testkit.CFacts(t, []testkit.CFact{
		{Expr: "FUSE_OPEN", Want: OpOpen}, {Expr: "FUSE_READ", Want: OpRead}, {Expr: "FUSE_WRITE", Want: OpWrite}, {Expr: "FUSE_RELEASE", Want: OpRelease}, {Expr: "FUSE_INTERRUPT", Want: OpInterrupt},
		{Expr: "FUSE_IOCTL", Want: OpIoctl}, {Expr: "FUSE_POLL", Want: OpPoll}, {Expr: "CUSE_INIT", Want: OpCuseInit}, {Expr: "FUSE_MIN_READ_BUFFER", Want: MinReadBuffer},
		{Expr: "CUSE_UNRESTRICTED_IOCTL", Want: CuseUnrestrictedIoctl}, {Expr: "FUSE_IOCTL_COMPAT", Want: IoctlCompat}, {Expr: "FUSE_IOCTL_UNRESTRICTED", Want: IoctlUnrestricted}, {Expr: "FUSE_IOCTL_32BIT", Want: Ioctl32Bit},
		{Expr: "sizeof(struct fuse_in_header)", Want: unsafe.Sizeof(h)}, {Expr: "offsetof(struct fuse_in_header, unique)", Want: unsafe.Offsetof(h.Unique)},
		{Expr: "offsetof(struct fuse_in_header, uid)", Want: unsafe.Offsetof(h.UID)}, {Expr: "offsetof(struct fuse_in_header, pid)", Want: unsafe.Offsetof(h.PID)},
		{Expr: "sizeof(struct fuse_out_header)", Want: unsafe.Sizeof(OutHeader{})}, {Expr: "offsetof(struct fuse_out_header, unique)", Want: unsafe.Offsetof(OutHeader{}.Unique)},
		{Expr: "sizeof(struct cuse_init_in)", Want: unsafe.Sizeof(CuseInitIn{})}, {Expr: "offsetof(struct cuse_init_in, flags)", Want: unsafe.Offsetof(CuseInitIn{}.Flags)},
		{Expr: "sizeof(struct cuse_init_out)", Want: unsafe.Sizeof(c)}, {Expr: "offsetof(struct cuse_init_out, max_read)", Want: unsafe.Offsetof(c.MaxRead)},
		{Expr: "offsetof(struct cuse_init_out, dev_major)", Want: unsafe.Offsetof(c.DevMajor)},
		{Expr: "sizeof(struct fuse_open_in)", Want: unsafe.Sizeof(OpenIn{})},
		{Expr: "sizeof(struct fuse_open_out)", Want: unsafe.Sizeof(o)}, {Expr: "offsetof(struct fuse_open_out, fh)", Want: unsafe.Offsetof(o.Handle)},
		{Expr: "sizeof(struct fuse_release_in)", Want: unsafe.Sizeof(r)}, {Expr: "offsetof(struct fuse_release_in, fh)", Want: unsafe.Offsetof(r.Handle)},
		{Expr: "sizeof(struct fuse_interrupt_in)", Want: unsafe.Sizeof(InterruptIn{})},
		{Expr: "sizeof(struct fuse_ioctl_in)", Want: unsafe.Sizeof(i)}, {Expr: "offsetof(struct fuse_ioctl_in, cmd)", Want: unsafe.Offsetof(i.Cmd)}, {Expr: "offsetof(struct fuse_ioctl_in, arg)", Want: unsafe.Offsetof(i.Arg)},
		{Expr: "sizeof(struct fuse_ioctl_out)", Want: unsafe.Sizeof(q)}, {Expr: "offsetof(struct fuse_ioctl_out, flags)", Want: unsafe.Offsetof(q.Flags)},
	}, "linux/fuse.h")
}
