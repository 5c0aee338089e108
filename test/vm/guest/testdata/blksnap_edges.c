/* What a client of /dev/blksnap can do wrong, or at the same time as others:
 *
 *   blksnap_edges A B STORAGE MOUNTED
 *
 * A and B are devices that may be snapshotted, A with a change map of more than
 * 128 KiB and without a snapshot ever; STORAGE is for difference storage, of at least 64 MiB; MOUNTED is a disk that somebody uses. */
#define _GNU_SOURCE
#include "blksnap_client.h"
#include <linux/fs.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>

#define THREADS 4
#define NUMBER_OF_CALLS 30

static struct blk_snap_dev a, b, storage;
static const char *pa;

/* ends gives n bytes that are followed by what nobody may touch. */
static void *ends(size_t n)
{
	size_t whole = (n + BLOCK - 1) / BLOCK * BLOCK;
	char *p = mmap(0, whole + BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(p != MAP_FAILED && !mprotect(p + whole, BLOCK, PROT_NONE));
	return p + whole - n;
}

static void *read_only(const void *what, size_t n)
{
	void *p = mmap(0, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(p != MAP_FAILED);
	memcpy(p, what, n);
	MUST(!mprotect(p, BLOCK, PROT_READ));
	return p;
}

static int mark(struct blk_snap_dev dev, struct blk_snap_block_range *r, unsigned n)
{
	struct blk_snap_tracker_mark_dirty_blocks d = { .dev_id = dev, .count = n, .dirty_blocks_array = r };
	return ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS, &d);
}

static int read_map(struct blk_snap_dev dev, void *to, uint32_t offset, uint32_t length)
{
	struct blk_snap_tracker_read_cbt_bitmap m = { .dev_id = dev, .offset = offset, .length = length, .buff = to };
	return ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m);
}

static struct blk_snap_cbt_info info_of(struct blk_snap_dev dev)
{
	struct blk_snap_cbt_info t[2];
	int n = tracked(t, 2);
	MUST(n > 0);
	return memcmp(&t[0].dev_id, &dev, sizeof(dev)) ? t[n - 1] : t[0];
}

static void numbers(void)
{
	char small[4];
	FAILS(ioctl(ctl, _IOW('V', 0, small), small), ENOTTY); /* another size is another command */
	FAILS(ioctl(ctl, _IOR('V', 0, struct blk_snap_version), small), ENOTTY);
	FAILS(ioctl(ctl, _IOW('V', 12, struct blk_snap_version), small), ENOTTY);
	FAILS(ioctl(ctl, 0x40185621, small), ENOTTY);
	FAILS(ioctl(ctl, 0x40185622, small), ENOTTY);
	FAILS(read(ctl, small, 1), EINVAL);
	FAILS(write(ctl, small, 1), EINVAL);
	CHECK(mmap(0, BLOCK, PROT_READ, MAP_SHARED, ctl, 0) == MAP_FAILED);
}

/* Nothing is made, marked or lost where the answer cannot be given. */
static void pointers(void)
{
	struct blk_snap_dev both[] = { a, b }, *last = ends(sizeof(both));
	struct blk_snap_snapshot_create c = { .count = 2, .dev_id_array = both };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, read_only(&c, sizeof(c))), ENODATA);
	memcpy(last, both, sizeof(both));
	c.dev_id_array = last + 1; /* one of them, and what nobody may read */
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), ENODATA);
	c.dev_id_array = (void *)(uintptr_t)-8;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), ENODATA);
	c.dev_id_array = (void *)0xffff888000000000; /* the kernel's */
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), ENODATA);
	c.count = 4097;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), ENOMEM);
	CHECK(snapshots(0, 0) == 0 && tracked(0, 0) == 0);

	struct blk_snap_block_range r = { 0, 8 };
	FAILS(mark(a, &r, 1), ENODEV); /* it is ours, and nobody tracks it */
	FAILS(read_map(a, &r, 0, 1), ENODATA);

	struct blk_snap_uuid id = create(last, 2), other = create(&b, 1);
	struct blk_snap_snapshot_event e = { .id = id, .timeout_ms = 20 };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT, read_only(&e, sizeof(e))), EINVAL);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT, (char *)ends(sizeof(e)) + 1), EINVAL);
	CHECK(!event(id, 0, &e) && e.code == blk_snap_event_code_low_free_space);
	FAILS(event(id, 0, &e), ENOENT);
	CHECK(!event(other, 0, &e) && !memcmp(&e.id, &other, sizeof(other)));

	struct blk_snap_uuid ids[2];
	FAILS(snapshots(ids, 1), ENODATA);
	struct blk_snap_snapshot_collect all = { .count = 1, .ids = ids };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT, &all), ENODATA);
	CHECK(all.count == 2);
	all.ids = (void *)((struct blk_snap_uuid *)ends(sizeof(ids)) + 1);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT, &all), ENODATA);
	CHECK(snapshots(ids, 0xffffffff) == 2 && memcmp(&ids[0], &ids[1], sizeof(ids[0])));
	struct blk_snap_cbt_info *t = ends(2 * sizeof(*t));
	CHECK(tracked(t, 2) == 2);
	FAILS(tracked(t + 1, 2), ENODATA);
	CHECK(t[0].snap_number == 0 && t[0].blk_size >= 4096 && t[0].device_capacity > 0);
	FAILS(read_map(a, &r, 0, 1), EPERM); /* it is not taken yet */
	FAILS(take((struct blk_snap_uuid){ { 9 } }), ESRCH);
	struct blk_snap_tracker_remove remove = { b };
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &remove)); /* none of them is taken */
	CHECK(!destroy(other) && !destroy(id) && tracked(0, 0) == 1);
}

/* Where difference storage may lie, and in what pieces. */
static struct blk_snap_uuid storages(const char *mounted)
{
	struct blk_snap_uuid id = create(&a, 1);
	struct blk_snap_block_range r[] = { { 16, 15 }, { 40, 0 }, { 64, 2048 } };
	struct blk_snap_snapshot_append_storage s = { .id = id, .dev_id = storage, .ranges = r };
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &s)); /* none */
	s.count = 2;
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &s)); /* too little for anything: not used */
	CHECK(!append(id, storage, 64, 7));
	FAILS(take(id), EFAULT);
	id = s.id = create(&a, 1);
	s.count = 3;
	MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &s)); /* less than a page at an end is not used */
	FAILS(append(id, storage, 72, 2048), EINVAL); /* it is, already */
	s.ranges = (struct blk_snap_block_range[]){ { 8192, 2048 }, { 9216, 2048 } };
	s.count = 2;
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &s), EINVAL);
	FAILS(append(id, storage, 8196, 2048), EINVAL);
	FAILS(append(id, number(mounted), 0, 2048), EBUSY);
	FAILS(append(id, a, info_of(a).device_capacity / 512, 2048), EINVAL);
	s.ranges = (void *)((struct blk_snap_block_range *)ends(2 * sizeof(r[0])) + 1);
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &s), EINVAL);
	MUST(!append(id, a, info_of(a).device_capacity / 1024 & ~7ull, 16 * MIB / 512)); /* as a file on the device itself has */
	MUST(!append(id, storage, 8192, 16 * MIB / 512));
	return id;
}

static void rings(int sig) { (void)sig; }

static void *hammer(void *arg)
{
	uint8_t *bytes = malloc(300 << 10);
	for (int i = 0; i < NUMBER_OF_CALLS; i++) {
		struct blk_snap_version v = {};
		struct blk_snap_uuid ids[4];
		struct blk_snap_snapshot_collect c = { .count = 4, .ids = ids };
		int n = info_of(a).blk_count;
		CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_VERSION, &v) && v.major == 1);
		CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT, &c) && c.count == 1 && !memcmp(&ids[0], arg, sizeof(ids[0])));
		int length = n < 300 << 10 ? n : 300 << 10;
		memset(bytes, 0xee, length);
		CHECK(read_map(a, bytes, 0, length) == length && !memchr(bytes, 0xee, length));
	}
	free(bytes);
	return 0;
}

static void *waiter(void *id)
{
	struct blk_snap_snapshot_event e;
	while (!event(*(struct blk_snap_uuid *)id, 60000, &e))
		;
	return (void *)(long)errno;
}

/* Many callers at once, on one descriptor, on its copies and on closed ones. */
static void together(struct blk_snap_uuid id)
{
	pthread_t t[THREADS], w;
	void *why;
	MUST(!pthread_create(&w, 0, waiter, &id));
	for (int i = 0; i < THREADS; i++)
		MUST(!pthread_create(&t[i], 0, hammer, &id));
	for (int i = 0; i < THREADS; i++)
		pthread_join(t[i], 0);
	pid_t child = fork();
	if (!child) { /* its memory is another one */
		struct blk_snap_version v = {};
		_exit(ioctl(ctl, IOCTL_BLK_SNAP_VERSION, &v) || v.major != 1);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && !status);
	if (!(child = fork())) {
		if (setresuid(65534, 65534, 65534))
			_exit(9);
		int fd = open(BLK_SNAP_CTL, O_RDWR), saved = errno;
		_exit(fd < 0 && saved == EACCES ? 0 : 1);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);

	int before = ctl;
	ctl = open(BLK_SNAP_CTL, O_RDWR);
	MUST(ctl >= 0 && !close(before)); /* under whoever waits on it */
	FAILS(ioctl(before, IOCTL_BLK_SNAP_VERSION, &w), EBADF);
	usleep(100000);
	CHECK(!destroy(id));
	CHECK(!pthread_join(w, &why) && (long)why == ESRCH);
}

/* What an image is, and what counts as a change. */
static void image(struct blk_snap_uuid id)
{
	char path[64] = "";
	struct blk_snap_cbt_info t = info_of(a);
	uint8_t *map = ends(t.blk_count), one;
	CHECK(t.blk_count > 128 << 10 && t.snap_number == 1);
	image_of(id, a, path);
	uint64_t size = 0, same = 0;
	int fd = open(path, O_RDWR | O_DIRECT), origin = open(pa, O_RDWR | O_DIRECT), value;
	MUST(fd >= 0 && origin >= 0);
	CHECK(!ioctl(fd, BLKGETSIZE64, &size) && size == t.device_capacity && !ioctl(origin, BLKGETSIZE64, &same) && same == size);
	CHECK(!ioctl(fd, BLKSSZGET, &value) && value == 512 && !ioctl(fd, BLKROGET, &value) && value == 0);
	char *buf = block();
	CHECK(pread(fd, buf, 512, 512) == 512 && pread(origin, buf, 512, 512) == 512);

	CHECK(read_map(a, map, 0, t.blk_count) == (int)t.blk_count); /* more than a request of CUSE can hold */
	FAILS(read_map(a, map + 1, 0, t.blk_count), ENODATA);
	CHECK(read_map(a, map, t.blk_count - 1, 0xffffffff) == 1 && read_map(a, map, 0, 0) == 0 && read_map(a, 0, 7, 0) == 0);
	FAILS(read_map(a, read_only(buf, 16), 0, 16), ENODATA);
	FAILS(read_map(number(path), map, 0, 16), ENODATA); /* an image has no map */

	struct blk_snap_dev of_image = number(path);
	struct blk_snap_snapshot_create c = { .count = 1, .dev_id_array = &of_image };
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c), EOPNOTSUPP);
	FAILS(append(id, of_image, 0, 2048), EINVAL);
	CHECK(snapshots(0, 0) == 1);

	/* A write to the image shows at once, as it differs from a backup of it. */
	const uint64_t sector = MIB / 512;
	memset(buf, 'i', BLOCK);
	CHECK(pwrite(fd, buf, BLOCK, 9 * MIB) == BLOCK && read_map(a, &one, 9 * sector * 512 / t.blk_size, 1) == 1 && one == 1);
	struct blk_snap_block_range r[] = { { 10 * sector, 1 }, { 11 * sector, 0 }, { ~0ull - 1, 2 } };
	FAILS(mark(a, r, 3), EINVAL);
	CHECK(read_map(a, &one, 10 * sector * 512 / t.blk_size, 1) == 1 && one == 0); /* all or none */
	CHECK(!mark(a, r, 2) && !mark(a, 0, 0));
	CHECK(read_map(a, &one, 10 * sector * 512 / t.blk_size, 1) == 1 && one == 1);
	FAILS(mark(a, r, 0x100001), ENOMEM);
	FAILS(mark(a, (void *)8, 1), ENODATA);

	/* A discard is a change, a flush is none. */
	uint64_t range[] = { 12 * MIB, MIB };
	CHECK(!ioctl(origin, BLKDISCARD, range) && !fsync(origin));
	uint64_t of_ours = (t.device_capacity / 1024 & ~7ull) * 512;
	fill(pa, 0, AREA, 'n'); /* old content goes to the device itself, below its own snapshot */
	CHECK(holds(path, 0, AREA, 0));
	CHECK(!destroy(id) && !close(fd));
	id = create(&a, 1);
	MUST(!append(id, storage, 0, 16 * MIB / 512) && !take(id));
	CHECK(read_map(a, map, 0, t.blk_count) == (int)t.blk_count && info_of(a).snap_number == 2);
	CHECK(map[0] == 2 && map[AREA / t.blk_size - 1] == 2 && map[AREA / t.blk_size] == 0 && map[12 * MIB / t.blk_size] == 2 && map[13 * MIB / t.blk_size - 1] == 2);
	CHECK(map[13 * MIB / t.blk_size] == 0 && map[of_ours / t.blk_size] != 0 && map[t.blk_count - 1] == 0);
	free(buf);
	close(origin);
	together(id);
}

int main(int argc, char **argv)
{
	ctl = open(BLK_SNAP_CTL, O_RDWR);
	if (ctl < 0 || argc != 5) {
		perror(BLK_SNAP_CTL);
		return 1;
	}
	pa = argv[1];
	a = number(pa), b = number(argv[2]), storage = number(argv[3]);
	numbers();
	pointers();
	struct blk_snap_uuid id = storages(argv[4]);

	/* Signals end a wait, and nothing else: half a snapshot would be left. */
	struct sigaction act = { .sa_handler = rings };
	struct itimerval often = { .it_interval = { 0, 3000 }, .it_value = { 0, 3000 } }, never = {};
	struct blk_snap_snapshot_event e;
	MUST(!sigaction(SIGALRM, &act, 0) && !setitimer(ITIMER_REAL, &often, 0));
	int r;
	while (!(r = event(id, 60000, &e)))
		;
	CHECK(r == -1 && errno == EINTR);
	CHECK(!take(id) && !access("/dev/" BLK_SNAP_IMAGE_NAME "0", F_OK));
	MUST(!setitimer(ITIMER_REAL, &never, 0));
	if (bad)
		return bad;
	image(id);
	CHECK(snapshots(0, 0) == 0);
	struct blk_snap_tracker_remove remove = { a };
	CHECK(!ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &remove));
	FAILS(ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_REMOVE, &remove), ENODATA);
	CHECK(tracked(0, 0) == 0);
	return bad;
}
