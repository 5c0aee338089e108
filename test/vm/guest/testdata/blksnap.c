/* A client of /dev/blksnap, written against the interface's own header:
 *
 *   blksnap walk A B STORAGE FOREIGN   every command, right and wrong
 *   blksnap hold A STORAGE             takes a snapshot and prints its id
 *   blksnap wait ID                    waits for an event of it for a minute
 *   blksnap end ID                     destroys it
 *   blksnap clean all                  destroys all
 *
 * A and B are devices that may be snapshotted, of at least 16 MiB; STORAGE is a device for
 * difference storage of at least 64 MiB, FOREIGN one that may not be snapshotted. */
#define _GNU_SOURCE
#include "blksnap_client.h"

static void service(void)
{
	struct blk_snap_version v = { 9, 9, 9, 9 };
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_VERSION, &v));
	CHECK(v.major == 1 && !v.minor && !v.revision && !v.build);
	char other[64];
	FAILS(ioctl(ctl, 0x40285620, other), ENOTTY);
	FAILS(ioctl(ctl, _IO('V', 99), 0), ENOTTY);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_VERSION, 0), ENODATA);
	char *readonly = mmap(0, BLOCK, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_VERSION, readonly), ENODATA);
	munmap(readonly, BLOCK);
	char *page = mmap(0, 2 * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(page + BLOCK, BLOCK);
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_VERSION, page + BLOCK - sizeof(v)));
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_VERSION, page + BLOCK - sizeof(v) + 1), ENODATA);
	munmap(page, BLOCK);
}

static void untracked(struct blk_snap_dev a, struct blk_snap_dev foreign)
{
	uint8_t byte;
	struct blk_snap_tracker_remove r = { a };
	struct blk_snap_block_range range = { 0, 8 };
	struct blk_snap_tracker_read_cbt_bitmap m = { .dev_id = a, .length = 1, .buff = &byte };
	struct blk_snap_tracker_mark_dirty_blocks d = { .dev_id = nowhere, .count = 1, .dirty_blocks_array = &range };
	CHECK(tracked(0, 0) == 0);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m), ENODATA);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &r), ENODATA);
	m.dev_id = r.dev_id = foreign;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m), ENODATA);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &r), ENODATA);
	m.dev_id = r.dev_id = nowhere;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m), ENXIO);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &r), ENXIO);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS, &d), ENXIO);
	d.dev_id = foreign;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS, &d), ENODEV);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, (void *)16), ENODATA);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_COLLECT, (void *)16), ENODATA);
}

static void creating(struct blk_snap_dev a, struct blk_snap_dev b, struct blk_snap_dev foreign)
{
	struct blk_snap_dev twice[] = { a, b, a }, gone[] = { a, nowhere }, not_ours[] = { foreign };
	struct blk_snap_snapshot_create c = { .count = 3, .dev_id_array = twice };
	struct blk_snap_snapshot_event e;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), EINVAL);
	c = (struct blk_snap_snapshot_create){ .count = 2, .dev_id_array = gone };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), ENXIO);
	c = (struct blk_snap_snapshot_create){ .count = 1, .dev_id_array = not_ours };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), EOPNOTSUPP);
	c = (struct blk_snap_snapshot_create){ .count = 1, .dev_id_array = (void *)8 };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), ENODATA);
	c = (struct blk_snap_snapshot_create){ .count = 0xffffffff, .dev_id_array = twice };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), ENOMEM);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, 0), ENODATA);
	CHECK(snapshots(0, 0) == 0); /* none of these left anything */

	struct blk_snap_uuid empty = create(0, 0), none = { { 1, 2, 3 } }, ids[4];
	CHECK(snapshots(0, 0) == 1 && snapshots(ids, 4) == 1 && !memcmp(&ids[0], &empty, sizeof(empty)));
	FAILS(take(empty), ENODEV);
	CHECK(!destroy(empty));
	FAILS(destroy(empty), ENODEV);
	FAILS(take(none), ESRCH);
	FAILS(append(none, a, 0, 8), ESRCH);
	FAILS(event(none, 10, &e), ESRCH);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, 0), ENODATA);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_TAKE, 0), ENODATA);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT, 0), EINVAL);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, 0), EINVAL);

	/* The first event asks for storage; a snapshot without any cannot be taken, and is gone then. */
	struct blk_snap_uuid id = create((struct blk_snap_dev[]){ a, b }, 2);
	struct blk_snap_event_low_free_space low;
	CHECK(!event(id, 0, &e) && e.code == blk_snap_event_code_low_free_space && e.time_label > 0);
	memcpy(&low, e.data, sizeof(low));
	CHECK(low.requested_nr_sect == 2097152 && e.data[sizeof(low)] == 0);
	FAILS(event(id, 20, &e), ENOENT);
	FAILS(take(id), EFAULT);
	FAILS(destroy(id), ENODEV);
	CHECK(snapshots(0, 0) == 0);
}

static void *waiter(void *id)
{
	struct blk_snap_snapshot_event e;
	return (void *)(long)(event(*(struct blk_snap_uuid *)id, 60000, &e) ? errno : 0);
}

static void holding(const char *pa, const char *pb, struct blk_snap_dev storage)
{
	struct blk_snap_dev a = number(pa), b = number(pb);
	struct blk_snap_snapshot_event e;
	fill(pa, 0, AREA, 'a');
	fill(pb, 0, AREA, 'b');
	struct blk_snap_uuid id = create((struct blk_snap_dev[]){ a, b }, 2);
	struct blk_snap_image_info info[2] = {};
	struct blk_snap_snapshot_collect_images c = { .id = id, .count = 2, .image_info_array = info };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &c), ENODEV);
	FAILS(append(id, nowhere, 0, 2048), ENXIO);
	FAILS(append(id, storage, 1, 2048), EINVAL);
	FAILS(append(id, storage, 0, 1ull << 60), EINVAL);
	FAILS(append(id, storage, ~0ull - 7, 8), EINVAL);
	struct blk_snap_snapshot_append_storage huge = { .id = id, .dev_id = storage, .count = 0xffffffff, .ranges = (void *)8 };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &huge), ENOMEM);
	huge.count = 3;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &huge), EINVAL);
	MUST(!append(id, storage, 0, 16 * MIB / 512));
	MUST(!append(id, storage, 20 * MIB / 512, 12 * MIB / 512));
	MUST(!take(id));
	FAILS(take(id), EALREADY);

	/* Images. */
	c = (struct blk_snap_snapshot_collect_images){ .id = id };
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &c) && c.count == 2);
	c = (struct blk_snap_snapshot_collect_images){ .id = id, .count = 1, .image_info_array = info };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &c), ENODATA);
	CHECK(c.count == 2 && info[0].image_dev_id.mj == 0);
	c.count = 2;
	c.image_info_array = (void *)8;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &c), ENODATA);
	char ia[64] = "", ib[64] = "";
	image_of(id, a, ia);
	image_of(id, b, ib);
	CHECK(strcmp(ia, ib) && !access("/dev/" BLK_SNAP_IMAGE_NAME "0", F_OK));
	CHECK(holds(ia, 0, AREA, 'a') && holds(ib, 0, AREA, 'b'));
	fill(pa, 0, MIB, 'A');
	fill(pb, 3 * MIB + BLOCK, BLOCK, 'B');
	CHECK(holds(ia, 0, AREA, 'a') && holds(ib, 0, AREA, 'b') && holds(pa, 0, MIB, 'A') && holds(pb, 3 * MIB, BLOCK, 'b'));
	fill(ia, 5 * MIB, BLOCK, 'i'); /* private */
	CHECK(holds(ia, 5 * MIB, BLOCK, 'i') && holds(pa, 5 * MIB, BLOCK, 'a'));

	/* Change tracking. */
	struct blk_snap_cbt_info t[2];
	FAILS(tracked(t, 1), ENOBUFS);
	MUST(tracked(t, 2) == 2);
	struct blk_snap_cbt_info ta = memcmp(&t[0].dev_id, &a, sizeof(a)) ? t[1] : t[0];
	CHECK(ta.blk_size >= 4096 && ta.blk_count == (ta.device_capacity + ta.blk_size - 1) / ta.blk_size && ta.snap_number >= 1);
	uint8_t *map = calloc(1, ta.blk_count + 8);
	struct blk_snap_tracker_read_cbt_bitmap m = { .dev_id = a, .length = ta.blk_count + 8, .buff = map };
	CHECK(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m) == (int)ta.blk_count);
	CHECK(map[0] == ta.snap_number && map[ta.blk_count - 1] == 0 && map[ta.blk_count] == 0);
	m.length = 3;
	m.offset = 1;
	CHECK(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m) == 3);
	m.offset = ta.blk_count;
	CHECK(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m) == 0);
	m.offset++;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m), EINVAL);
	m.offset = 0;
	m.buff = (void *)8;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m), ENODATA);
	struct blk_snap_block_range dirty[] = { { ta.device_capacity / 512 - 1, 1 }, { ta.device_capacity / 512, 1 } };
	struct blk_snap_tracker_mark_dirty_blocks d = { .dev_id = a, .count = 2, .dirty_blocks_array = dirty };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS, &d), EINVAL);
	m.buff = map;
	m.length = ta.blk_count;
	CHECK(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m) == (int)ta.blk_count && map[ta.blk_count - 1] == 0);
	d.count = 1;
	d.dev_id = number(ia); /* an image stands for its device */
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS, &d));
	CHECK(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m) == (int)ta.blk_count && map[ta.blk_count - 1] == ta.snap_number);
	struct blk_snap_tracker_remove r = { a };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &r), EBUSY);
	CHECK(!event(id, 0, &e)); /* of its making */
	while (!event(id, 300, &e)) /* less was given than it asks for */
		CHECK(e.code == blk_snap_event_code_low_free_space);

	/* Destroyed with an image open, and somebody waiting on the same descriptor. */
	pthread_t w;
	void *why;
	int image = open(ia, O_RDONLY | O_DIRECT);
	MUST(image >= 0 && !pthread_create(&w, 0, waiter, &id));
	usleep(300000);
	CHECK(!destroy(id));
	CHECK(!pthread_join(w, &why) && (long)why == ESRCH);
	char *buf = block();
	CHECK(pread(image, buf, BLOCK, 0) <= 0); /* an error, or the end of what is no device any more */
	free(buf);
	close(image);
	CHECK(access(ia, F_OK) && access(ib, F_OK) && access("/dev/" BLK_SNAP_IMAGE_NAME "0", F_OK));
	m.length = 1;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m), EPERM);

	/* What changed since: exactly the blocks that were written. */
	fill(pa, 6 * MIB, BLOCK, 'z');
	id = create(&a, 1);
	MUST(!append(id, storage, 0, 16 * MIB / 512) && !take(id));
	MUST(tracked(t, 2) == 2);
	struct blk_snap_cbt_info now = memcmp(&t[0].dev_id, &a, sizeof(a)) ? t[1] : t[0];
	CHECK(!memcmp(&now.generation_id, &ta.generation_id, 16) && now.snap_number == ta.snap_number + 1);
	m.length = ta.blk_count;
	CHECK(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m) == (int)ta.blk_count);
	for (uint64_t i = 0; i < ta.blk_count; i++) {
		uint64_t off = i * ta.blk_size;
		int wrote = off < MIB || off == 6 * MIB || off == 5 * MIB || i == ta.blk_count - 1; /* 5 MiB: the image was written there */
		if (off == 5 * MIB)
			continue;
		if ((map[i] > ta.snap_number || (i == ta.blk_count - 1 && map[i] >= ta.snap_number)) != wrote) {
			printf("block %llu has number %d of %d\n", (unsigned long long)i, map[i], now.snap_number);
			bad = 1;
			break;
		}
	}
	CHECK(!destroy(id));
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &r));
	CHECK(tracked(t, 2) == 1);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &r), ENODATA);
	free(map);
}

/* More is overwritten than the storage holds: the device goes on, the image does not. */
static void overflow(const char *pa, struct blk_snap_dev storage)
{
	struct blk_snap_dev a = number(pa);
	struct blk_snap_snapshot_event e;
	struct blk_snap_uuid id = create(&a, 1);
	char image[64] = "";
	MUST(!event(id, 1000, &e)); /* of its making */
	MUST(!append(id, storage, 0, 2 * MIB / 512) && !take(id));
	image_of(id, a, image);
	fill(pa, 0, AREA, 'o');
	CHECK(holds(pa, 0, AREA, 'o'));
	struct blk_snap_event_corrupted c = {};
	int low = 0;
	while (!event(id, 20000, &e)) {
		if (e.code == blk_snap_event_code_low_free_space) {
			low++;
			continue;
		}
		memcpy(&c, e.data, sizeof(c));
		break;
	}
	CHECK(low > 0 && c.err_code == ENOSPC && !memcmp(&c.orig_dev_id, &a, sizeof(a)));
	CHECK(!holds(image, 0, BLOCK, 'a') && !holds(image, 0, BLOCK, 'o'));
	char *buf = block();
	int fd = open(image, O_RDWR | O_DIRECT);
	CHECK(fd >= 0 && pread(fd, buf, BLOCK, 0) < 0 && (errno == ENOSPC || errno == EIO)); /* EIO: the kernel's NBD knows no other */
	CHECK(pwrite(fd, buf, BLOCK, 0) < 0);
	close(fd);
	free(buf);
	while (!event(id, 300, &e)) /* once for a device */
		CHECK(e.code == blk_snap_event_code_low_free_space);
	CHECK(!destroy(id));
}

int main(int argc, char **argv)
{
	ctl = open(BLK_SNAP_CTL, O_RDWR);
	if (ctl < 0 || argc < 3) {
		perror(BLK_SNAP_CTL);
		return 1;
	}
	if (!strcmp(argv[1], "wait")) {
		struct blk_snap_snapshot_event e;
		while (!event(parse(argv[2]), 60000, &e))
			;
		return errno;
	}
	if (!strcmp(argv[1], "end"))
		return destroy(parse(argv[2])) ? errno : 0;
	if (!strcmp(argv[1], "clean")) {
		struct blk_snap_uuid ids[8];
		for (int n = snapshots(ids, 8); n > 0; n--)
			MUST(!destroy(ids[n - 1]));
		return bad;
	}
	if (!strcmp(argv[1], "hold")) {
		struct blk_snap_dev a = number(argv[2]);
		struct blk_snap_uuid id = create(&a, 1);
		MUST(!append(id, number(argv[3]), 0, 16 * MIB / 512) && !take(id));
		print(id);
		return 0;
	}
	service();
	untracked(number(argv[2]), number(argv[5]));
	creating(number(argv[2]), number(argv[3]), number(argv[5]));
	holding(argv[2], argv[3], number(argv[4]));
	overflow(argv[2], number(argv[4]));
	return bad;
}
