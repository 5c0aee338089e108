package ublk

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

// TestAgainstHeader asks the C compiler what the kernel's own header says.
// What an older header does not know is left out.
func TestAgainstHeader(t *testing.T) {
	testkit.Need(t, "gcc")
	var c CtrlCmd
	var i DevInfo
	var o IOCmd
	var d Desc
	var p Params
	facts := []struct {
		c    string
		want uintptr
	}{
		{"sizeof(struct ublksrv_ctrl_cmd)", unsafe.Sizeof(c)}, {"offsetof(struct ublksrv_ctrl_cmd, addr)", unsafe.Offsetof(c.Addr)},
		{"offsetof(struct ublksrv_ctrl_cmd, data)", unsafe.Offsetof(c.Data)}, {"offsetof(struct ublksrv_ctrl_cmd, len)", unsafe.Offsetof(c.Len)},
		{"sizeof(struct ublksrv_ctrl_dev_info)", unsafe.Sizeof(i)}, {"offsetof(struct ublksrv_ctrl_dev_info, max_io_buf_bytes)", unsafe.Offsetof(i.MaxIOBytes)},
		{"offsetof(struct ublksrv_ctrl_dev_info, ublksrv_pid)", unsafe.Offsetof(i.ServerPID)}, {"offsetof(struct ublksrv_ctrl_dev_info, flags)", unsafe.Offsetof(i.Flags)},
		{"offsetof(struct ublksrv_ctrl_dev_info, ublksrv_flags)", unsafe.Offsetof(i.ServerFlags)},
		{"sizeof(struct ublksrv_io_cmd)", unsafe.Sizeof(o)}, {"offsetof(struct ublksrv_io_cmd, addr)", unsafe.Offsetof(o.Addr)},
		{"sizeof(struct ublksrv_io_desc)", unsafe.Sizeof(d)}, {"offsetof(struct ublksrv_io_desc, start_sector)", unsafe.Offsetof(d.StartSector)},
		{"offsetof(struct ublk_params, basic)", unsafe.Offsetof(p.Attrs)}, {"offsetof(struct ublk_params, basic.max_sectors)", unsafe.Offsetof(p.MaxSectors)},
		{"offsetof(struct ublk_params, basic.dev_sectors)", unsafe.Offsetof(p.DevSectors)}, {"offsetof(struct ublk_params, discard)", unsafe.Offsetof(p.DiscardAlignment)},
		{"offsetof(struct ublk_params, basic.io_min_shift)", unsafe.Offsetof(p.IOMinShift)}, {"offsetof(struct ublk_params, discard.max_discard_segments)", unsafe.Offsetof(p.MaxDiscardSegments)},
		{"UBLK_PARAM_TYPE_BASIC", ParamBasic}, {"UBLK_PARAM_TYPE_DISCARD", ParamDiscard},
		{"UBLK_ATTR_READ_ONLY", AttrReadOnly}, {"UBLK_ATTR_ROTATIONAL", AttrRotational}, {"UBLK_ATTR_VOLATILE_CACHE", AttrVolatileCache}, {"UBLK_ATTR_FUA", AttrFUA},
		{"UBLK_IO_OP_READ", OpRead}, {"UBLK_IO_OP_WRITE", OpWrite}, {"UBLK_IO_OP_FLUSH", OpFlush}, {"UBLK_IO_OP_DISCARD", OpDiscard},
		{"UBLK_IO_OP_WRITE_ZEROES", OpWriteZeroes}, {"UBLK_IO_F_FUA", flagFUA}, {"UBLK_MAX_QUEUE_DEPTH", MaxQueueDepth}, {"UBLKSRV_IO_BUF_OFFSET", BufOffset},
		{"-UBLK_IO_RES_ABORT", -ResAbort}, {"UBLK_IO_RES_OK", ResOK},
		{"UBLK_S_DEV_DEAD", StateDead}, {"UBLK_S_DEV_LIVE", StateLive}, {"UBLK_S_DEV_QUIESCED", StateQuiesced},
		{"UBLK_F_USER_RECOVERY", FlagUserRecovery}, {"UBLK_F_USER_RECOVERY_REISSUE", FlagUserRecoveryReissue},
		{"UBLK_CMD_ADD_DEV", CmdAddDev}, {"UBLK_CMD_DEL_DEV", CmdDelDev}, {"UBLK_CMD_START_DEV", CmdStartDev}, {"UBLK_CMD_STOP_DEV", CmdStopDev},
		{"UBLK_CMD_SET_PARAMS", CmdSetParams}, {"UBLK_CMD_GET_PARAMS", CmdGetParams}, {"UBLK_CMD_GET_DEV_INFO", CmdGetDevInfo},
		{"UBLK_CMD_START_USER_RECOVERY", CmdStartUserRecovery}, {"UBLK_CMD_END_USER_RECOVERY", CmdEndUserRecovery},
		{"UBLK_IO_FETCH_REQ", IOFetch}, {"UBLK_IO_COMMIT_AND_FETCH_REQ", IOCommitAndFetch},
	}
	later := []struct { // macros that newer headers have
		c    string
		want uintptr
	}{
		{"UBLK_TAG_OFF", TagOffset}, {"UBLK_QID_OFF", QueueOffset},
		{"UBLK_F_CMD_IOCTL_ENCODE", FlagIoctlEncode}, {"UBLK_F_USER_COPY", FlagUserCopy}, {"UBLK_F_UPDATE_SIZE", FlagUpdateSize}, {"UBLK_S_DEV_FAIL_IO", StateFailIO},
		{"UBLK_U_CMD_GET_DEV_INFO", enc(CmdGetDevInfo)}, {"UBLK_U_CMD_ADD_DEV", enc(CmdAddDev)}, {"UBLK_U_CMD_DEL_DEV", enc(CmdDelDev)},
		{"UBLK_U_CMD_START_DEV", enc(CmdStartDev)}, {"UBLK_U_CMD_STOP_DEV", enc(CmdStopDev)}, {"UBLK_U_CMD_SET_PARAMS", enc(CmdSetParams)},
		{"UBLK_U_CMD_GET_PARAMS", enc(CmdGetParams)}, {"UBLK_U_CMD_START_USER_RECOVERY", enc(CmdStartUserRecovery)},
		{"UBLK_U_CMD_END_USER_RECOVERY", enc(CmdEndUserRecovery)}, {"UBLK_U_CMD_GET_FEATURES", enc(CmdGetFeatures)},
		{"UBLK_U_CMD_DEL_DEV_ASYNC", enc(CmdDelDevAsync)}, {"UBLK_U_CMD_UPDATE_SIZE", enc(CmdUpdateSize)},
		{"UBLK_U_IO_FETCH_REQ", enc(IOFetch)}, {"UBLK_U_IO_COMMIT_AND_FETCH_REQ", enc(IOCommitAndFetch)},
	}
	var src strings.Builder
	src.WriteString("#include <stddef.h>\n#include <linux/types.h>\n#include <errno.h>\n#include <sys/ioctl.h>\n#include <linux/ublk_cmd.h>\n")
	for _, f := range facts {
		fmt.Fprintf(&src, "_Static_assert(%s == %d, %q);\n", f.c, f.want, f.c)
	}
	for _, f := range later {
		fmt.Fprintf(&src, "#ifdef %s\n_Static_assert(%[1]s == %d, %[1]q);\n#endif\n", f.c, f.want)
	}
	path := filepath.Join(t.TempDir(), "facts.c")
	if err := os.WriteFile(path, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-fsyntax-only", path}
	if dir := os.Getenv("TIDEMARK_KERNEL_HEADERS"); dir != "" { // newer ones than the system's
		args = append(args, "-I", dir)
	}
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func enc(nr uint32) uintptr { return uintptr(Encode(nr)) }
