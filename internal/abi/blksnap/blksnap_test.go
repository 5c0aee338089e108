package blksnap

import (
	"bytes"
	"path/filepath"
	"testing"
	"unsafe"

	"tidemark/internal/testkit"
)

// TestAgainstHeader asks the C compiler what the interface's own header says.
func TestAgainstHeader(t *testing.T) {
	header, err := filepath.Abs("testdata/blksnap.h")
	if err != nil {
		t.Fatal(err)
	}
	size := func(name string, n int) testkit.CFact {
		return testkit.CFact{Expr: "sizeof(struct blk_snap_" + name + ")", Want: uintptr(n)}
	}
	at := func(of, field string, n uintptr) testkit.CFact {
		return testkit.CFact{Expr: "offsetof(struct blk_snap_" + of + ", " + field + ")", Want: n}
	}
	is := func(name string, n uintptr) testkit.CFact { return testkit.CFact{Expr: name, Want: n} }
	var i TrackerInfo
	var c Create
	var a Append
	var m Images
	var e Event
	var r ReadMapArg
	var d MarkDirtyArg
	testkit.CFacts(t, []testkit.CFact{
		is("IOCTL_BLK_SNAP_VERSION", Version), is("IOCTL_BLK_SNAP_TRACKER_REMOVE", TrackerRemove), is("IOCTL_BLK_SNAP_TRACKER_COLLECT", TrackerCollect),
		is("IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP", ReadMap), is("IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS", MarkDirty),
		is("IOCTL_BLK_SNAP_SNAPSHOT_CREATE", SnapshotCreate), is("IOCTL_BLK_SNAP_SNAPSHOT_DESTROY", SnapshotDestroy),
		is("IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE", AppendStorage), is("IOCTL_BLK_SNAP_SNAPSHOT_TAKE", SnapshotTake),
		is("IOCTL_BLK_SNAP_SNAPSHOT_COLLECT", SnapshotCollect), is("IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES", CollectImages),
		is("IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT", SnapshotWaitEvent),
		is("blk_snap_event_code_low_free_space", EventLowFreeSpace), is("blk_snap_event_code_corrupted", EventCorrupted),
		size("version", Size(VersionInfo{})), size("dev", Size(Dev{})), size("tracker_remove", Size(Dev{})), size("uuid", Size(ID{})), size("block_range", Size(Range{})),
		size("cbt_info", Size(i)), at("cbt_info", "blk_size", unsafe.Offsetof(i.BlockSize)), at("cbt_info", "device_capacity", unsafe.Offsetof(i.Capacity)),
		at("cbt_info", "blk_count", unsafe.Offsetof(i.Blocks)), at("cbt_info", "generation_id", unsafe.Offsetof(i.Generation)), at("cbt_info", "snap_number", unsafe.Offsetof(i.Number)),
		size("tracker_collect", Size(Collect{})), at("tracker_collect", "cbt_info_array", unsafe.Offsetof(Collect{}.Array)),
		size("tracker_read_cbt_bitmap", Size(r)), at("tracker_read_cbt_bitmap", "offset", unsafe.Offsetof(r.Offset)), at("tracker_read_cbt_bitmap", "length", unsafe.Offsetof(r.Length)),
		at("tracker_read_cbt_bitmap", "buff", unsafe.Offsetof(r.Buffer)),
		size("tracker_mark_dirty_blocks", Size(d)), at("tracker_mark_dirty_blocks", "count", unsafe.Offsetof(d.Count)), at("tracker_mark_dirty_blocks", "dirty_blocks_array", unsafe.Offsetof(d.Array)),
		size("snapshot_create", Size(c)), at("snapshot_create", "dev_id_array", unsafe.Offsetof(c.Array)), at("snapshot_create", "id", unsafe.Offsetof(c.ID)),
		size("snapshot_append_storage", Size(a)), at("snapshot_append_storage", "dev_id", unsafe.Offsetof(a.Dev)), at("snapshot_append_storage", "count", unsafe.Offsetof(a.Count)),
		at("snapshot_append_storage", "ranges", unsafe.Offsetof(a.Array)),
		size("snapshot_destroy", Size(ID{})), size("snapshot_take", Size(ID{})),
		size("snapshot_collect", Size(Collect{})), at("snapshot_collect", "ids", unsafe.Offsetof(Collect{}.Array)),
		size("image_info", Size(ImageInfo{})), at("image_info", "image_dev_id", unsafe.Offsetof(ImageInfo{}.Image)),
		size("snapshot_collect_images", Size(m)), at("snapshot_collect_images", "count", unsafe.Offsetof(m.Count)), at("snapshot_collect_images", "image_info_array", unsafe.Offsetof(m.Array)),
		size("snapshot_event", Size(e)), at("snapshot_event", "timeout_ms", unsafe.Offsetof(e.TimeoutMs)), at("snapshot_event", "code", unsafe.Offsetof(e.Code)),
		at("snapshot_event", "time_label", unsafe.Offsetof(e.Time)), at("snapshot_event", "data", unsafe.Offsetof(e.Data)),
		size("event_low_free_space", Size(LowFreeSpace{})), size("event_corrupted", Size(Corrupted{})), at("event_corrupted", "err_code", unsafe.Offsetof(Corrupted{}.Error)),
	}, "assert.h", header)
}

// TestBytes: what is encoded comes back, with zeroes where the compiler pads.
func TestBytes(t *testing.T) {
	in := TrackerInfo{Dev: Dev{259, 3}, BlockSize: 4096, Capacity: 1 << 40, Blocks: 7, Generation: [16]byte{1, 15: 2}, Number: 200}
	b := Bytes(in)
	var out TrackerInfo
	if err := Decode(b, &out); err != nil || out != in {
		t.Errorf("%+v, %v", out, err)
	}
	if len(b) != 48 || !bytes.Equal(b[12:16], make([]byte, 4)) || !bytes.Equal(b[45:], make([]byte, 3)) {
		t.Errorf("% x", b)
	}
	if err := Decode(b[:47], &out); err == nil {
		t.Error("a byte is missing, and nobody saw it")
	}
}
