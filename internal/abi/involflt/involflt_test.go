package involflt

import (
	"path/filepath"
	"testing"
	"unsafe"

	"tidemark/internal/testkit"
)

// TestAgainstHeader asks the C compiler for the numbers, sizes and offsets, once
// as our header makes them and once as they were measured at the driver's.
func TestAgainstHeader(t *testing.T) {
	header, err := filepath.Abs("testdata/involflt.h")
	if err != nil {
		t.Fatal(err)
	}
	var facts []testkit.CFact
	is := func(name string, measured, ours uintptr) {
		if measured != ours {
			t.Errorf("%s is %#x, measured %#x", name, ours, measured)
		}
		facts = append(facts, testkit.CFact{Expr: name, Want: measured})
	}
	command := func(name string, measured, ours uintptr) { is("IOCTL_INMAGE_"+name, measured, ours) }
	size := func(name string, measured uintptr, v any) { is("sizeof("+name+")", measured, uintptr(Size(v))) }
	at := func(of, field string, measured, ours uintptr) { is("offsetof("+of+", "+field+")", measured, ours) }

	command("STOP_FILTERING_DEVICE", 0x4080fe00, StopFiltering)
	command("PROCESS_START_NOTIFY", 0x4004fe02, ProcessStart)
	command("SERVICE_SHUTDOWN_NOTIFY", 0x4004fe03, ServiceStart)
	command("GET_DIRTY_BLOCKS_TRANS", 0xc080fe04, GetDirtyBlocks)
	command("COMMIT_DIRTY_BLOCKS_TRANS", 0x4090fe05, CommitDirtyBlocks)
	command("WAIT_FOR_DB", 0x4084fe08, WaitForBlocksOld)
	command("CLEAR_DIFFERENTIALS", 0x4080fe09, ClearDifferentials)
	command("UNSTACK_ALL", 0x0000fe0b, UnstackAll)
	command("WAKEUP_ALL_THREADS", 0x0000fe0e, WakeupAllThreads)
	command("GET_DB_NOTIFY_THRESHOLD", 0xc084fe0f, NotifyThreshold)
	command("RESYNC_START_NOTIFICATION", 0xc090fe11, ResyncStart)
	command("RESYNC_END_NOTIFICATION", 0xc090fe12, ResyncEnd)
	command("GET_DRIVER_VERSION", 0xc010fe13, DriverVersion)
	command("GET_GLOBAL_STATS", 0x0000fe19, GlobalStats)
	command("GET_VOLUME_STATS", 0x0000fe1a, VolumeStats)
	command("GET_PROTECTED_VOLUME_LIST", 0x0000fe1b, ProtectedVolumes)
	command("START_FILTERING_DEVICE_V2", 0x5120fe1f, StartFiltering)
	command("GET_ADDITIONAL_VOLUME_STATS", 0xc098fe2b, AdditionalStats)
	command("FREEZE_VOLUME", 0x4038fe31, FreezeVolume)
	command("TAG_VOLUME_V2", 0xc048fe32, TagVolume)
	command("THAW_VOLUME", 0x4038fe33, ThawVolume)
	command("IOBARRIER_TAG_VOLUME", 0xc048fe34, BarrierTag)
	command("CREATE_BARRIER_ALL", 0xc02cfe35, CreateBarrier)
	command("REMOVE_BARRIER_ALL", 0xc028fe36, RemoveBarrier)
	command("TAG_COMMIT_V2", 0xc028fe37, TagCommit)
	command("WAIT_FOR_DB_V2", 0x4084fe42, WaitForBlocks)
	command("GET_DIRTY_BLOCKS_TRANS_V2", 0xdff0fe48, GetDirtyBlocksV2)

	var d DeviceInfo
	size("inm_dev_info_t", 4640, d)
	at("inm_dev_info_t", "d_guid", 4, unsafe.Offsetof(d.Device))
	at("inm_dev_info_t", "d_mnt_pt", 260, unsafe.Offsetof(d.MountPoint))
	at("inm_dev_info_t", "d_nblks", 4360, unsafe.Offsetof(d.Blocks))
	at("inm_dev_info_t", "d_bsize", 4368, unsafe.Offsetof(d.BlockSize))
	at("inm_dev_info_t", "d_flags", 4376, unsafe.Offsetof(d.Flags))
	at("inm_dev_info_t", "d_pname", 4384, unsafe.Offsetof(d.Persistent))
	var b DirtyBlock
	size("UDIRTY_BLOCK_V2", 8176, b)
	block := func(field string, measured, ours uintptr) { at("UDIRTY_BLOCK_V2", field, measured, ours) }
	block("uHdr.Hdr.uliTransactionID", 0, unsafe.Offsetof(b.Transaction))
	block("uHdr.Hdr.ulicbChanges", 8, unsafe.Offsetof(b.ChangeBytes))
	block("uHdr.Hdr.cChanges", 16, unsafe.Offsetof(b.Changes))
	block("uHdr.Hdr.ulTotalChangesPending", 20, unsafe.Offsetof(b.ChangesPending))
	block("uHdr.Hdr.ulicbTotalChangesPending", 24, unsafe.Offsetof(b.BytesPending))
	block("uHdr.Hdr.ulFlags", 32, unsafe.Offsetof(b.Flags))
	block("uHdr.Hdr.ulSequenceIDforSplitIO", 36, unsafe.Offsetof(b.Split))
	block("uHdr.Hdr.ulBufferSize", 40, unsafe.Offsetof(b.BufferSize))
	block("uHdr.Hdr.usMaxNumberOfBuffers", 44, unsafe.Offsetof(b.BuffersMax))
	block("uHdr.Hdr.usNumberOfBuffers", 46, unsafe.Offsetof(b.Buffers))
	block("uHdr.Hdr.ulcbChangesInStream", 48, unsafe.Offsetof(b.StreamBytes))
	block("uHdr.Hdr.ppBufferArray", 56, unsafe.Offsetof(b.BufferArray))
	block("uHdr.Hdr.ulcbBufferArraySize", 64, unsafe.Offsetof(b.BufferArraySize))
	block("uHdr.Hdr.ulOutOfSyncCount", 72, unsafe.Offsetof(b.ResyncCount))
	block("uHdr.Hdr.ErrorStringForResync", 80, unsafe.Offsetof(b.ResyncText))
	block("uHdr.Hdr.ulOutOfSyncErrorCode", 208, unsafe.Offsetof(b.ResyncCode))
	block("uHdr.Hdr.liOutOfSyncTimeStamp", 216, unsafe.Offsetof(b.ResyncTime))
	block("uHdr.Hdr.ullPrevEndSequenceNumber", 224, unsafe.Offsetof(b.PrevSequence))
	block("uHdr.Hdr.ullPrevEndTimeStamp", 232, unsafe.Offsetof(b.PrevTime))
	block("uHdr.Hdr.ulPrevSequenceIDforSplitIO", 240, unsafe.Offsetof(b.PrevSplit))
	block("uHdr.Hdr.eWOState", 244, unsafe.Offsetof(b.WriteOrder))
	block("uTagList", 512, unsafe.Offsetof(b.Tags))
	block("ChangeOffsetArray", 4096, unsafe.Offsetof(b.Offsets))
	block("ChangeLengthArray", 5728, unsafe.Offsetof(b.Lengths))
	block("TimeDeltaArray", 6544, unsafe.Offsetof(b.TimeDeltas))
	block("SequenceNumberDeltaArray", 7360, unsafe.Offsetof(b.SequenceDeltas))

	size("VOLUME_GUID", 128, Name{})
	size("COMMIT_TRANSACTION", 144, Transaction{})
	at("COMMIT_TRANSACTION", "ulTransactionID", 128, unsafe.Offsetof(Transaction{}.ID))
	at("COMMIT_TRANSACTION", "ulFlags", 136, unsafe.Offsetof(Transaction{}.Flags))
	size("WAIT_FOR_DB_NOTIFY", 132, Wait{})
	at("WAIT_FOR_DB_NOTIFY", "Seconds", 128, unsafe.Offsetof(Wait{}.Seconds))
	size("get_db_thres_t", 132, Threshold{})
	size("volume_info_t", 264, VolumeInfo{})
	at("volume_info_t", "vol_name", 8, unsafe.Offsetof(VolumeInfo{}.Device))
	size("tag_names_t", 258, Tag{})
	var f Freeze
	size("freeze_info_t", 56, f)
	at("freeze_info_t", "timeout", 4, unsafe.Offsetof(f.Timeout))
	at("freeze_info_t", "vol_info", 8, unsafe.Offsetof(f.Array))
	at("freeze_info_t", "tag_guid", 16, unsafe.Offsetof(f.GUID))
	size("thaw_info_t", 56, Thaw{})
	at("thaw_info_t", "vol_info", 8, unsafe.Offsetof(Thaw{}.Array))
	at("thaw_info_t", "tag_guid", 16, unsafe.Offsetof(Thaw{}.GUID))
	var g TagInfo
	size("tag_info_t_v2", 72, g)
	at("tag_info_t_v2", "nr_vols", 4, unsafe.Offsetof(g.Volumes))
	at("tag_info_t_v2", "nr_tags", 8, unsafe.Offsetof(g.Tags))
	at("tag_info_t_v2", "timeout", 12, unsafe.Offsetof(g.Timeout))
	at("tag_info_t_v2", "tag_guid", 16, unsafe.Offsetof(g.GUID))
	at("tag_info_t_v2", "vol_info", 56, unsafe.Offsetof(g.Array))
	at("tag_info_t_v2", "tag_names", 64, unsafe.Offsetof(g.TagArray))
	size("flt_barrier_create_t", 44, Barrier{})
	at("flt_barrier_create_t", "fbc_timeout_ms", 36, unsafe.Offsetof(Barrier{}.Timeout))
	at("flt_barrier_create_t", "fbc_flags", 40, unsafe.Offsetof(Barrier{}.Flags))
	size("flt_barrier_remove_t", 40, BarrierEnd{})
	size("flt_tag_commit_t", 40, TagVerdict{})
	at("flt_tag_commit_t", "ftc_flags", 36, unsafe.Offsetof(TagVerdict{}.Verdict))
	size("VOLUME_STATS", 144, Stats{})
	at("VOLUME_STATS", "bufp", 128, unsafe.Offsetof(Stats{}.Buffer))
	at("VOLUME_STATS", "buf_len", 136, unsafe.Offsetof(Stats{}.Length))
	size("GET_VOLUME_LIST", 16, List{})
	at("GET_VOLUME_LIST", "buf_len", 8, unsafe.Offsetof(List{}.Length))
	size("VOLUME_STATS_ADDITIONAL_INFO", 152, Additional{})
	size("RESYNC_START_V2", 144, Resync{})
	size("DRIVER_VERSION", 16, Version{})
	size("TIME_STAMP_TAG_V2", 24, [24]byte{})
	testkit.CFacts(t, append(facts, testkit.CFact{Expr: "sizeof(inm_dev_info_compat_t)", Want: 4384}), header)
}
