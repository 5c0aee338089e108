package ublk

import (
	"testing"
	"unsafe"

	"tidemark/internal/testkit"
)

// TestAgainstHeader asks the C compiler what the kernel's own header says.
// What an older header does not know is left out.
func TestAgainstHeader(t *testing.T) {
	var c CtrlCmd
	var i DevInfo
	var o IOCmd
	var d Desc
	var p Params
	facts := []testkit.CFact{
		{Expr: "sizeof(struct ublksrv_ctrl_cmd)", Want: unsafe.Sizeof(c)}, {Expr: "offsetof(struct ublksrv_ctrl_cmd, addr)", Want: unsafe.Offsetof(c.Addr)},
		{Expr: "offsetof(struct ublksrv_ctrl_cmd, data)", Want: unsafe.Offsetof(c.Data)}, {Expr: "offsetof(struct ublksrv_ctrl_cmd, len)", Want: unsafe.Offsetof(c.Len)},
		{Expr: "sizeof(struct ublksrv_ctrl_dev_info)", Want: unsafe.Sizeof(i)}, {Expr: "offsetof(struct ublksrv_ctrl_dev_info, max_io_buf_bytes)", Want: unsafe.Offsetof(i.MaxIOBytes)},
		{Expr: "offsetof(struct ublksrv_ctrl_dev_info, ublksrv_pid)", Want: unsafe.Offsetof(i.ServerPID)}, {Expr: "offsetof(struct ublksrv_ctrl_dev_info, flags)", Want: unsafe.Offsetof(i.Flags)},
		{Expr: "offsetof(struct ublksrv_ctrl_dev_info, ublksrv_flags)", Want: unsafe.Offsetof(i.ServerFlags)},
		{Expr: "sizeof(struct ublksrv_io_cmd)", Want: unsafe.Sizeof(o)}, {Expr: "offsetof(struct ublksrv_io_cmd, addr)", Want: unsafe.Offsetof(o.Addr)},
		{Expr: "sizeof(struct ublksrv_io_desc)", Want: unsafe.Sizeof(d)}, {Expr: "offsetof(struct ublksrv_io_desc, start_sector)", Want: unsafe.Offsetof(d.StartSector)},
		{Expr: "offsetof(struct ublk_params, basic)", Want: unsafe.Offsetof(p.Attrs)}, {Expr: "offsetof(struct ublk_params, basic.max_sectors)", Want: unsafe.Offsetof(p.MaxSectors)},
		{Expr: "offsetof(struct ublk_params, basic.dev_sectors)", Want: unsafe.Offsetof(p.DevSectors)}, {Expr: "offsetof(struct ublk_params, discard)", Want: unsafe.Offsetof(p.DiscardAlignment)},
		{Expr: "offsetof(struct ublk_params, basic.io_min_shift)", Want: unsafe.Offsetof(p.IOMinShift)}, {Expr: "offsetof(struct ublk_params, discard.max_discard_segments)", Want: unsafe.Offsetof(p.MaxDiscardSegments)},
		{Expr: "UBLK_PARAM_TYPE_BASIC", Want: ParamBasic}, {Expr: "UBLK_PARAM_TYPE_DISCARD", Want: ParamDiscard},
		{Expr: "UBLK_ATTR_READ_ONLY", Want: AttrReadOnly}, {Expr: "UBLK_ATTR_ROTATIONAL", Want: AttrRotational}, {Expr: "UBLK_ATTR_VOLATILE_CACHE", Want: AttrVolatileCache}, {Expr: "UBLK_ATTR_FUA", Want: AttrFUA},
		{Expr: "UBLK_IO_OP_READ", Want: OpRead}, {Expr: "UBLK_IO_OP_WRITE", Want: OpWrite}, {Expr: "UBLK_IO_OP_FLUSH", Want: OpFlush}, {Expr: "UBLK_IO_OP_DISCARD", Want: OpDiscard},
		{Expr: "UBLK_IO_OP_WRITE_ZEROES", Want: OpWriteZeroes}, {Expr: "UBLK_IO_F_FUA", Want: flagFUA}, {Expr: "UBLK_MAX_QUEUE_DEPTH", Want: MaxQueueDepth}, {Expr: "UBLKSRV_IO_BUF_OFFSET", Want: BufOffset},
		{Expr: "-UBLK_IO_RES_ABORT", Want: -ResAbort}, {Expr: "UBLK_IO_RES_OK", Want: ResOK},
		{Expr: "UBLK_S_DEV_DEAD", Want: StateDead}, {Expr: "UBLK_S_DEV_LIVE", Want: StateLive}, {Expr: "UBLK_S_DEV_QUIESCED", Want: StateQuiesced},
		{Expr: "UBLK_F_SUPPORT_ZERO_COPY", Want: FlagZeroCopy}, {Expr: "UBLK_F_USER_RECOVERY", Want: FlagUserRecovery}, {Expr: "UBLK_F_USER_RECOVERY_REISSUE", Want: FlagUserRecoveryReissue},
		{Expr: "UBLK_CMD_ADD_DEV", Want: CmdAddDev}, {Expr: "UBLK_CMD_DEL_DEV", Want: CmdDelDev}, {Expr: "UBLK_CMD_START_DEV", Want: CmdStartDev}, {Expr: "UBLK_CMD_STOP_DEV", Want: CmdStopDev},
		{Expr: "UBLK_CMD_SET_PARAMS", Want: CmdSetParams}, {Expr: "UBLK_CMD_GET_PARAMS", Want: CmdGetParams}, {Expr: "UBLK_CMD_GET_DEV_INFO", Want: CmdGetDevInfo},
		{Expr: "UBLK_CMD_START_USER_RECOVERY", Want: CmdStartUserRecovery}, {Expr: "UBLK_CMD_END_USER_RECOVERY", Want: CmdEndUserRecovery},
		{Expr: "UBLK_IO_FETCH_REQ", Want: IOFetch}, {Expr: "UBLK_IO_COMMIT_AND_FETCH_REQ", Want: IOCommitAndFetch},
	}
	later := []testkit.CFact{ // macros that newer headers have
		{Expr: "UBLK_TAG_OFF", Want: TagOffset}, {Expr: "UBLK_QID_OFF", Want: QueueOffset},
		{Expr: "UBLK_F_CMD_IOCTL_ENCODE", Want: FlagIoctlEncode}, {Expr: "UBLK_F_USER_COPY", Want: FlagUserCopy}, {Expr: "UBLK_F_UPDATE_SIZE", Want: FlagUpdateSize},
		{Expr: "UBLK_U_IO_REGISTER_IO_BUF", Want: enc(IORegisterBuf)}, {Expr: "UBLK_U_IO_UNREGISTER_IO_BUF", Want: enc(IOUnregisterBuf)}, {Expr: "UBLK_F_BUF_REG_OFF_DAEMON", Want: FlagRegisterAnywhere},
		{Expr: "UBLK_S_DEV_FAIL_IO", Want: StateFailIO},
		{Expr: "UBLK_U_CMD_GET_DEV_INFO", Want: enc(CmdGetDevInfo)}, {Expr: "UBLK_U_CMD_ADD_DEV", Want: enc(CmdAddDev)}, {Expr: "UBLK_U_CMD_DEL_DEV", Want: enc(CmdDelDev)},
		{Expr: "UBLK_U_CMD_START_DEV", Want: enc(CmdStartDev)}, {Expr: "UBLK_U_CMD_STOP_DEV", Want: enc(CmdStopDev)}, {Expr: "UBLK_U_CMD_SET_PARAMS", Want: enc(CmdSetParams)},
		{Expr: "UBLK_U_CMD_GET_PARAMS", Want: enc(CmdGetParams)}, {Expr: "UBLK_U_CMD_START_USER_RECOVERY", Want: enc(CmdStartUserRecovery)},
		{Expr: "UBLK_U_CMD_END_USER_RECOVERY", Want: enc(CmdEndUserRecovery)}, {Expr: "UBLK_U_CMD_GET_FEATURES", Want: enc(CmdGetFeatures)},
		{Expr: "UBLK_U_CMD_DEL_DEV_ASYNC", Want: enc(CmdDelDevAsync)}, {Expr: "UBLK_U_CMD_UPDATE_SIZE", Want: enc(CmdUpdateSize)},
		{Expr: "UBLK_U_IO_FETCH_REQ", Want: enc(IOFetch)}, {Expr: "UBLK_U_IO_COMMIT_AND_FETCH_REQ", Want: enc(IOCommitAndFetch)},
	}
	for _, f := range later {
		f.If = f.Expr
		facts = append(facts, f)
	}
	testkit.CFacts(t, facts, "linux/ublk_cmd.h")
}

func enc(nr uint32) uintptr { return uintptr(Encode(nr)) }
