package uring

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"tidemark/internal/testkit"
)

// TestLayoutAgainstHeader asks the C compiler what the kernel's own header says.
func TestLayoutAgainstHeader(t *testing.T) {
	testkit.Need(t, "gcc")
	var q SQE
	var p params
	var a getEventsArg
	var pr probe
	facts := []struct {
		c    string
		want uintptr
	}{
		{"sizeof(struct io_uring_sqe)", unsafe.Sizeof(q)}, {"sizeof(struct io_uring_cqe)", unsafe.Sizeof(CQE{})},
		{"sizeof(struct io_uring_params)", unsafe.Sizeof(p)}, {"sizeof(struct io_uring_getevents_arg)", unsafe.Sizeof(a)},
		{"sizeof(struct io_uring_probe)", unsafe.Offsetof(pr.ops)}, {"sizeof(struct io_uring_probe_op)", unsafe.Sizeof(probeOp{})},
		{"offsetof(struct io_uring_sqe, fd)", unsafe.Offsetof(q.FD)}, {"offsetof(struct io_uring_sqe, off)", unsafe.Offsetof(q.Off)},
		{"offsetof(struct io_uring_sqe, cmd_op)", unsafe.Offsetof(q.Off)}, {"offsetof(struct io_uring_sqe, addr)", unsafe.Offsetof(q.Addr)},
		{"offsetof(struct io_uring_sqe, len)", unsafe.Offsetof(q.Len)}, {"offsetof(struct io_uring_sqe, rw_flags)", unsafe.Offsetof(q.OpFlags)},
		{"offsetof(struct io_uring_sqe, user_data)", unsafe.Offsetof(q.UserData)}, {"offsetof(struct io_uring_sqe, buf_index)", unsafe.Offsetof(q.BufIndex)},
		{"offsetof(struct io_uring_sqe, cmd)", unsafe.Offsetof(q.Addr3)}, {"offsetof(struct io_uring_sqe, cmd)", cmdOffset},
		{"offsetof(struct io_uring_params, features)", unsafe.Offsetof(p.features)},
		{"offsetof(struct io_uring_params, sq_off)", unsafe.Offsetof(p.sq)}, {"offsetof(struct io_uring_params, cq_off)", unsafe.Offsetof(p.cq)},
		{"offsetof(struct io_sqring_offsets, array)", unsafe.Offsetof(p.sq.array)}, {"offsetof(struct io_cqring_offsets, cqes)", unsafe.Offsetof(p.cq.cqes)},
		{"offsetof(struct io_uring_getevents_arg, ts)", unsafe.Offsetof(a.ts)},
		{"IORING_OP_NOP", uintptr(OpNop)}, {"IORING_OP_FSYNC", uintptr(OpFsync)}, {"IORING_OP_READ_FIXED", uintptr(OpReadFixed)},
		{"IORING_OP_WRITE_FIXED", uintptr(OpWriteFixed)}, {"IORING_OP_FALLOCATE", uintptr(OpFallocate)},
		{"IORING_OP_READ", uintptr(OpRead)}, {"IORING_OP_WRITE", uintptr(OpWrite)}, {"IORING_OP_URING_CMD", uintptr(OpURingCmd)},
		{"IORING_SETUP_CQSIZE", setupCQSize}, {"IORING_SETUP_CLAMP", setupClamp}, {"IORING_SETUP_COOP_TASKRUN", setupCoopTaskrun},
		{"IORING_SETUP_SQE128", setupSQE128}, {"IORING_SETUP_SINGLE_ISSUER", setupSingleIssuer},
		{"IORING_FEAT_SINGLE_MMAP", featSingleMmap}, {"IORING_FEAT_NODROP", featNoDrop}, {"IORING_FEAT_EXT_ARG", featExtArg},
		{"IORING_ENTER_GETEVENTS", enterGetEvents}, {"IORING_ENTER_EXT_ARG", enterExtArg},
		{"IORING_REGISTER_BUFFERS", registerBuffers}, {"IORING_UNREGISTER_BUFFERS", unregisterBuffers},
		{"IORING_REGISTER_FILES", registerFiles}, {"IORING_REGISTER_PROBE", registerProbe},
		{"IORING_OFF_SQ_RING", offSQRing}, {"IORING_OFF_SQES", offSQEs}, {"IOSQE_FIXED_FILE", sqeFixedFile},
		{"IORING_FSYNC_DATASYNC", fsyncDataOnly}, {"IO_URING_OP_SUPPORTED", opSupported},
	}
	var c strings.Builder
	c.WriteString("#include <stddef.h>\n#include <linux/io_uring.h>\n")
	for _, f := range facts {
		fmt.Fprintf(&c, "_Static_assert(%s == %d, %q);\n", f.c, f.want, f.c)
	}
	src := filepath.Join(t.TempDir(), "facts.c")
	if err := os.WriteFile(src, []byte(c.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-fsyntax-only", src).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
