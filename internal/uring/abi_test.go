package uring

import (
	"testing"
	"unsafe"

	"tidemark/internal/testkit"
)

// TestLayoutAgainstHeader asks the C compiler what the kernel's own header says.
func TestLayoutAgainstHeader(t *testing.T) {
	var q SQE
	var p params
	var a getEventsArg
	var pr probe
	testkit.CFacts(t, []testkit.CFact{
		{Expr: "sizeof(struct io_uring_sqe)", Want: unsafe.Sizeof(q)}, {Expr: "sizeof(struct io_uring_cqe)", Want: unsafe.Sizeof(CQE{})},
		{Expr: "sizeof(struct io_uring_params)", Want: unsafe.Sizeof(p)}, {Expr: "sizeof(struct io_uring_getevents_arg)", Want: unsafe.Sizeof(a)},
		{Expr: "sizeof(struct io_uring_probe)", Want: unsafe.Offsetof(pr.ops)}, {Expr: "sizeof(struct io_uring_probe_op)", Want: unsafe.Sizeof(probeOp{})},
		{Expr: "offsetof(struct io_uring_sqe, fd)", Want: unsafe.Offsetof(q.FD)}, {Expr: "offsetof(struct io_uring_sqe, off)", Want: unsafe.Offsetof(q.Off)},
		{Expr: "offsetof(struct io_uring_sqe, cmd_op)", Want: unsafe.Offsetof(q.Off)}, {Expr: "offsetof(struct io_uring_sqe, addr)", Want: unsafe.Offsetof(q.Addr)},
		{Expr: "offsetof(struct io_uring_sqe, len)", Want: unsafe.Offsetof(q.Len)}, {Expr: "offsetof(struct io_uring_sqe, rw_flags)", Want: unsafe.Offsetof(q.OpFlags)},
		{Expr: "offsetof(struct io_uring_sqe, user_data)", Want: unsafe.Offsetof(q.UserData)}, {Expr: "offsetof(struct io_uring_sqe, buf_index)", Want: unsafe.Offsetof(q.BufIndex)},
		{Expr: "offsetof(struct io_uring_sqe, cmd)", Want: unsafe.Offsetof(q.Addr3)}, {Expr: "offsetof(struct io_uring_sqe, cmd)", Want: cmdOffset},
		{Expr: "offsetof(struct io_uring_params, features)", Want: unsafe.Offsetof(p.features)},
		{Expr: "offsetof(struct io_uring_params, sq_off)", Want: unsafe.Offsetof(p.sq)}, {Expr: "offsetof(struct io_uring_params, cq_off)", Want: unsafe.Offsetof(p.cq)},
		{Expr: "offsetof(struct io_sqring_offsets, array)", Want: unsafe.Offsetof(p.sq.array)}, {Expr: "offsetof(struct io_cqring_offsets, cqes)", Want: unsafe.Offsetof(p.cq.cqes)},
		{Expr: "offsetof(struct io_uring_getevents_arg, ts)", Want: unsafe.Offsetof(a.ts)},
		{Expr: "IORING_OP_NOP", Want: uintptr(OpNop)}, {Expr: "IORING_OP_FSYNC", Want: uintptr(OpFsync)}, {Expr: "IORING_OP_READ_FIXED", Want: uintptr(OpReadFixed)},
		{Expr: "IORING_OP_WRITE_FIXED", Want: uintptr(OpWriteFixed)}, {Expr: "IORING_OP_FALLOCATE", Want: uintptr(OpFallocate)},
		{Expr: "IORING_OP_READ", Want: uintptr(OpRead)}, {Expr: "IORING_OP_WRITE", Want: uintptr(OpWrite)}, {Expr: "IORING_OP_URING_CMD", Want: uintptr(OpURingCmd)},
		{Expr: "IORING_SETUP_CQSIZE", Want: setupCQSize}, {Expr: "IORING_SETUP_CLAMP", Want: setupClamp}, {Expr: "IORING_SETUP_COOP_TASKRUN", Want: setupCoopTaskrun},
		{Expr: "IORING_SETUP_SQE128", Want: setupSQE128}, {Expr: "IORING_SETUP_SINGLE_ISSUER", Want: setupSingleIssuer},
		{Expr: "IORING_FEAT_SINGLE_MMAP", Want: featSingleMmap}, {Expr: "IORING_FEAT_NODROP", Want: featNoDrop}, {Expr: "IORING_FEAT_EXT_ARG", Want: featExtArg},
		{Expr: "IORING_ENTER_GETEVENTS", Want: enterGetEvents}, {Expr: "IORING_ENTER_EXT_ARG", Want: enterExtArg},
		{Expr: "IORING_REGISTER_BUFFERS", Want: registerBuffers}, {Expr: "IORING_UNREGISTER_BUFFERS", Want: unregisterBuffers},
		{Expr: "IORING_REGISTER_FILES", Want: registerFiles}, {Expr: "IORING_REGISTER_PROBE", Want: registerProbe},
		{Expr: "IORING_OFF_SQ_RING", Want: offSQRing}, {Expr: "IORING_OFF_SQES", Want: offSQEs}, {Expr: "IOSQE_FIXED_FILE", Want: sqeFixedFile},
		{Expr: "IOSQE_IO_LINK", Want: sqeLink}, {Expr: "IOSQE_IO_HARDLINK", Want: sqeHardLink},
		{Expr: "IORING_REGISTER_BUFFERS2", Want: registerBuffers2}, {Expr: "IORING_RSRC_REGISTER_SPARSE", Want: rsrcSparse}, {Expr: "sizeof(struct io_uring_rsrc_register)", Want: unsafe.Sizeof(rsrcRegister{})},
		{Expr: "IORING_FSYNC_DATASYNC", Want: fsyncDataOnly}, {Expr: "IO_URING_OP_SUPPORTED", Want: opSupported},
	}, "linux/io_uring.h")
}
