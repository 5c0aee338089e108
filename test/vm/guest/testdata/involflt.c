/* A client of /dev/involflt, in C:
 *
 *   involflt walk DEV OTHER          every command, right and wrong; DEV may be filtered, OTHER has a file system that is mounted
 *   involflt replicate DEV COPY      drains DEV into COPY; prints "tag NAME HASH" at each tag, HASH being of COPY then, and
 *                                    "copies" when everything that was there has come; ends with the tag "end"; outlives the daemon.
 *                                    A tag that was not committed comes again, and is printed again
 *   involflt point DEV NAME          freezes DEV, prints "tag NAME HASH" of DEV, tags, thaws, commits; each with a descriptor of its own
 *   involflt tag DEV NAME            tags all disks at once, and prints that of DEV
 *   involflt wait DEV                waits for a minute
 *   involflt stop DEV                filters it no more */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "involflt.h"

static int bad;

#define CHECK(what)                                                                                     \
	do {                                                                                            \
		if (!(what)) {                                                                          \
			printf("line %d: %s (errno %d %s)\n", __LINE__, #what, errno, strerror(errno)); \
			fflush(stdout);                                                                 \
			bad = 1;                                                                        \
		}                                                                                       \
	} while (0)
#define MUST(what)               \
	do {                     \
		CHECK(what);     \
		if (bad)         \
			exit(1); \
	} while (0)
#define FAILS(call, with)               \
	do {                            \
		errno = 0;              \
		CHECK((call) == -1);    \
		CHECK(errno == (with)); \
	} while (0)

static const char guid[] = "3f2504e0-4f89-11d3-9a0c-0305e82c3301";

static int control(void)
{
	int fd = open("/dev/involflt", O_RDWR | O_CLOEXEC);
	MUST(fd >= 0);
	return fd;
}

/* once opens, sends one command and closes, as the tools do. */
static int once(unsigned long cmd, void *arg)
{
	int fd = control(), r = ioctl(fd, cmd, arg), e = errno;
	close(fd);
	errno = e;
	return r;
}

static int filter(int fd, const char *dev)
{
	inm_dev_info_t i = { .d_type = 2, .d_bsize = 512 };
	strcpy(i.d_guid, dev);
	strcpy(i.d_pname, dev);
	for (char *c = i.d_pname; *c; c++)
		if (*c == '/')
			*c = '_';
	return ioctl(fd, IOCTL_INMAGE_START_FILTERING_DEVICE_V2, &i);
}

static uint64_t hash(const char *path)
{
	const size_t piece = 1 << 20;
	unsigned char *b = aligned_alloc(4096, piece);
	int fd = open(path, O_RDONLY | O_DIRECT);
	uint64_t h = 14695981039346656037ULL;
	ssize_t n;
	MUST(b && fd >= 0);
	while ((n = read(fd, b, piece)) > 0)
		for (ssize_t i = 0; i < n; i += 8)
			h = (h ^ *(uint64_t *)(b + i)) * 1099511628211ULL;
	MUST(n == 0);
	close(fd);
	free(b);
	return h;
}

/* what the drainer knows of the blocks that it has had */
struct drained {
	uint64_t time, seq; /* end of the last one */
	int out;
	int told, ended;
};

static uint32_t u32(const unsigned char *b) { uint32_t v; memcpy(&v, b, 4); return v; }
static uint64_t u64(const unsigned char *b) { uint64_t v; memcpy(&v, b, 8); return v; }

/* apply writes a stream into the copy. */
static void apply(struct drained *d, UDIRTY_BLOCK_V2 *b)
{
	char name[1792] = "";
	MUST(b->uTagList.DataFile.usLength < sizeof(name));
	memcpy(name, b->uTagList.DataFile.FileName, b->uTagList.DataFile.usLength);
	int fd = open(name, O_RDONLY);
	struct stat st;
	MUST(fd >= 0 && !fstat(fd, &st) && st.st_size == b->uHdr.Hdr.ulcbChangesInStream && !(st.st_mode & 077));
	unsigned char *s = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0), *p = s;
	MUST(s != MAP_FAILED && !memcmp(p, "DRTLSVD1", 8) && !memcmp(p += 4 + 12 + 128, "TFV2", 4));
	uint64_t seq = u64(p + 16), at = u64(p + 24), changes = 0, bytes = 0;
	MUST(at >= d->time && (at > d->time || seq >= d->seq));
	p += 12 + 20;
	MUST(!memcmp(p, "LODC", 4));
	unsigned char *end = p + 12 + 8 + u64(p + 12);
	MUST(end + 32 == s + st.st_size);
	for (p += 20; p < end; changes++) {
		MUST(!memcmp(p, "DDV2", 4));
		uint32_t len = u32(p + 12);
		uint64_t off = u64(p + 16), cseq = seq + u32(p + 24), ctime = at + u32(p + 28);
		MUST(ctime >= d->time && (ctime > d->time || cseq >= d->seq));
		d->time = ctime, d->seq = cseq;
		MUST(pwrite(d->out, p + 32, len, off) == (ssize_t)len);
		p += 32 + len, bytes += len;
	}
	MUST(p == end && !memcmp(p, "TLV2", 4) && u64(p + 16) == d->seq && u64(p + 24) == d->time);
	MUST(changes == b->uHdr.Hdr.cChanges && bytes == b->uHdr.Hdr.ulicbChanges);
	munmap(s, st.st_size);
	close(fd);
}

/* tagged prints a tag and what the copy is then. */
static void tagged(struct drained *d, UDIRTY_BLOCK_V2 *b, const char *copy)
{
	unsigned char *t = (void *)&b->uTagList;
	MUST(u32(t) == 0x04000001 && u64(t + 16) == u64(t + 40) && u64(t + 24) == u64(t + 48) && u32(t + 60) == 2);
	MUST(b->uHdr.Hdr.eWOState == 3 && u64(t + 24) >= d->time);
	t += 64; /* one user record: header of 4 bytes, length, text */
	MUST((u32(t) & 0xffff) == 5);
	int n = t[4] | t[5] << 8;
	fsync(d->out);
	printf("tag %.*s %016llx\n", n, t + 6, (unsigned long long)hash(copy));
	fflush(stdout);
	d->ended = n == 3 && !memcmp(t + 6, "end", 3);
}

static int commit(int fd, const UDIRTY_BLOCK_V2 *b)
{
	uint64_t id = b->uHdr.Hdr.uliTransactionID;
	COMMIT_TRANSACTION c = { .ulTransactionID = id + 1000 };
	UDIRTY_BLOCK_V2 again;
	if (id % 3 == 0 && !(b->uHdr.Hdr.ulFlags & UDIRTY_BLOCK_FLAG_TSO_FILE)) { /* a wrong number changes nothing */
		if (!ioctl(fd, IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS, &c) || errno != EFAULT || ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS, &again))
			return -1;
		MUST(again.uHdr.Hdr.uliTransactionID == id && again.uHdr.Hdr.cChanges == b->uHdr.Hdr.cChanges);
	}
	c.ulTransactionID = id;
	return ioctl(fd, IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS, &c);
}

/* step hands one block over. -1: the daemon has gone, or errno says what is wrong. */
static int step(struct drained *d, int fd, const char *dev, const char *copy)
{
	WAIT_FOR_DB_NOTIFY w = { .Seconds = 1 };
	UDIRTY_BLOCK_V2 b;
	strcpy(w.VolumeGUID, dev);
	if (ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w) && errno != ETIMEDOUT && errno != EAGAIN)
		return -1;
	memset(&b, 0xaa, sizeof(b));
	if (ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b)) {
		if (errno != EAGAIN) /* a tag waits for its verdict */
			return -1;
		usleep(10000);
		return 0;
	}
	uint32_t f = b.uHdr.Hdr.ulFlags, order = b.uHdr.Hdr.eWOState;
	MUST(!(f & (UDIRTY_BLOCK_FLAG_SVD_STREAM | UDIRTY_BLOCK_FLAG_VOLUME_RESYNC_REQUIRED)));
	if (order == 3 && !d->told) {
		d->told = 1;
		printf("copies\n");
		fflush(stdout);
	}
	if (f & UDIRTY_BLOCK_FLAG_DATA_FILE)
		apply(d, &b);
	else if (f & UDIRTY_BLOCK_FLAG_TSO_FILE)
		MUST(b.uHdr.Hdr.cChanges == 0);
	else if (b.uHdr.Hdr.cChanges == 0)
		tagged(d, &b, copy);
	else
		MUST(order == 2); /* ranges: copies of them will follow */
	return commit(fd, &b);
}

static int away(void)
{
	return errno == ENOTCONN || errno == ECONNABORTED || errno == ENOENT || errno == ENXIO || errno == ENODEV;
}

static int replicate(const char *dev, const char *copy)
{
	struct drained d = { .out = open(copy, O_RDWR) };
	MUST(d.out >= 0);
	while (!d.ended) {
		int fd[3] = { -1, -1, -1 }; /* drainer, lease of drainers, lease of the service */
		uint32_t flags = 3;
		for (int i = 0; i < 3; i++) {
			while ((fd[i] = open("/dev/involflt", O_RDWR | O_CLOEXEC)) < 0) {
				MUST(away());
				usleep(10000);
			}
		}
		d.time = d.seq = 0; /* what was a part of a larger batch comes again from that one's beginning */
		if (ioctl(fd[2], IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY, &flags) || ioctl(fd[1], IOCTL_INMAGE_PROCESS_START_NOTIFY, &flags) || filter(fd[0], dev))
			MUST(away());
		else
			while (!d.ended)
				if (step(&d, fd[0], dev, copy)) {
					MUST(away());
					break;
				}
		for (int i = 0; i < 3; i++)
			close(fd[i]);
	}
	return fsync(d.out) || bad;
}

static int tag(const char *dev, const char *name)
{
	volume_info_t v = { 0 };
	tag_names_t n = { .tag_len = strlen(name) };
	tag_info_t_v2 t = { .flags = 4, .nr_tags = 1, .tag_names = &n, .vol_info = &v };
	strcpy(n.tag_name, name);
	memcpy(t.tag_guid, guid, GUID_LEN);
	uint64_t h = hash(dev);
	int r = once(IOCTL_INMAGE_IOBARRIER_TAG_VOLUME, &t);
	if (r) {
		printf("no tag: %d %s\n", r, strerror(errno));
		return 2;
	}
	printf("tag %s %016llx\n", name, (unsigned long long)h);
	return bad;
}

static int point(const char *dev, const char *name)
{
	volume_info_t v = { .status = 99 };
	freeze_info_t f = { .nr_vols = 1, .timeout = 60000, .vol_info = &v };
	thaw_info_t th = { .nr_vols = 1, .vol_info = &v };
	tag_names_t n = { .tag_len = strlen(name) };
	tag_info_t_v2 t = { .nr_vols = 1, .nr_tags = 1, .timeout = 50000, .vol_info = &v, .tag_names = &n };
	flt_tag_commit_t c = { .ftc_flags = 1 };
	strcpy(v.vol_name, dev);
	strcpy(n.tag_name, name);
	memcpy(f.tag_guid, guid, GUID_LEN);
	memcpy(th.tag_guid, guid, GUID_LEN);
	memcpy(t.tag_guid, guid, GUID_LEN);
	memcpy(c.ftc_guid, guid, GUID_LEN);
	MUST(!once(IOCTL_INMAGE_FREEZE_VOLUME, &f) && v.status == 0);
	uint64_t h = hash(dev);
	int r = once(IOCTL_INMAGE_TAG_VOLUME_V2, &t), e = errno, status = v.status;
	FAILS(once(IOCTL_INMAGE_TAG_COMMIT_V2, &c), EINVAL); /* still frozen */
	MUST(!once(IOCTL_INMAGE_THAW_VOLUME, &th) && v.status == 0);
	if (r) {
		printf("no tag: %d %s, status %d\n", r, strerror(e), status);
		return 2;
	}
	MUST(!once(IOCTL_INMAGE_TAG_COMMIT_V2, &c));
	printf("tag %s %016llx\n", name, (unsigned long long)h);
	return bad;
}

struct waiter {
	int fd, result, err;
	WAIT_FOR_DB_NOTIFY w;
};

static void *waits(void *p)
{
	struct waiter *w = p;
	w->result = ioctl(w->fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w->w);
	w->err = errno;
	return NULL;
}

/* pointers: each command that takes one gets none, one to nothing, and one to what ends too early */
static void pointers(int fd)
{
	static const unsigned long commands[] = {
		IOCTL_INMAGE_START_FILTERING_DEVICE_V2, IOCTL_INMAGE_STOP_FILTERING_DEVICE, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS,
		IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS, IOCTL_INMAGE_WAIT_FOR_DB, IOCTL_INMAGE_WAIT_FOR_DB_V2,
		IOCTL_INMAGE_CLEAR_DIFFERENTIALS, IOCTL_INMAGE_GET_DB_NOTIFY_THRESHOLD, IOCTL_INMAGE_RESYNC_START_NOTIFICATION,
		IOCTL_INMAGE_RESYNC_END_NOTIFICATION, IOCTL_INMAGE_GET_DRIVER_VERSION, IOCTL_INMAGE_GET_GLOBAL_STATS, IOCTL_INMAGE_GET_VOLUME_STATS,
		IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, IOCTL_INMAGE_GET_ADDITIONAL_VOLUME_STATS, IOCTL_INMAGE_FREEZE_VOLUME, IOCTL_INMAGE_TAG_VOLUME_V2,
		IOCTL_INMAGE_THAW_VOLUME, IOCTL_INMAGE_IOBARRIER_TAG_VOLUME, IOCTL_INMAGE_CREATE_BARRIER_ALL, IOCTL_INMAGE_REMOVE_BARRIER_ALL,
		IOCTL_INMAGE_TAG_COMMIT_V2, IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY,
	};
	char *two = mmap(NULL, 16384, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(two != MAP_FAILED && !mprotect(two + 8192, 8192, PROT_NONE));
	for (unsigned i = 0; i < sizeof(commands) / sizeof(*commands); i++) {
		FAILS(ioctl(fd, commands[i], NULL), EFAULT);
		FAILS(ioctl(fd, commands[i], two + 8192), EFAULT);
		FAILS(ioctl(fd, commands[i], two + 8192 - 3), EFAULT);
		if (bad) {
			printf("command %#lx\n", commands[i]);
			exit(1);
		}
	}
}

static void statistics(int fd, const char *dev)
{
	char text[8192];
	VOLUME_STATS v = { .bufp = text, .buf_len = 100 };
	VOLUME_STATS_ADDITIONAL_INFO a = { 0 };
	GET_VOLUME_LIST l = { 0 };
	DRIVER_VERSION version;
	get_db_thres_t th = { 0 };
	memset(text, 0xee, sizeof(text));
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_GLOBAL_STATS, text) && text[4095] == 0 && (unsigned char)text[4096] == 0xee && strstr(text, "Protected Volumes"));
	memset(text, 0xee, sizeof(text));
	strcpy(v.guid.guid, dev);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v) && text[99] == 0 && (unsigned char)text[100] == 0xee);
	strcpy(v.guid.guid, "/dev/nothing");
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v), ENODEV);
	strcpy(a.VolumeGuid.guid, dev);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_ADDITIONAL_VOLUME_STATS, &a) && a.ullDriverCurrentTimeStamp / 10000000 - time(NULL) + 10 < 20);
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l), EAGAIN);
	CHECK(l.bufp == NULL && l.buf_len > 40960);
	l.bufp = malloc(l.buf_len);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l) && strstr(l.bufp, dev));
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DRIVER_VERSION, &version) && version.driver[0] == 2);
	strcpy(th.VolumeGUID, dev);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DB_NOTIFY_THRESHOLD, &th) && th.threshold == 4 << 20);
}

/* points: what may follow what. The disk is in order. */
static void points(const char *dev, const char *other)
{
	flt_barrier_create_t bc = { .fbc_timeout_ms = 300 };
	flt_barrier_remove_t br = { .fbr_flags = 0 };
	flt_tag_commit_t c = { .ftc_flags = 0 };
	volume_info_t v[2] = { 0 };
	tag_names_t n = { .tag_len = 3, .tag_name = "abc" };
	tag_info_t_v2 t = { .flags = 4, .nr_tags = 1, .tag_names = &n, .vol_info = v };
	memcpy(bc.fbc_guid, guid, GUID_LEN);
	memcpy(br.fbr_guid, guid, GUID_LEN);
	memcpy(c.ftc_guid, guid, GUID_LEN);
	memcpy(t.tag_guid, guid, GUID_LEN);
	strcpy(v[0].vol_name, dev);
	strcpy(v[1].vol_name, other);
	CHECK(once(IOCTL_INMAGE_IOBARRIER_TAG_VOLUME, &t) == 0);
	t.flags = 0, t.nr_vols = 2;
	CHECK(once(IOCTL_INMAGE_IOBARRIER_TAG_VOLUME, &t) == 1 && v[0].status == 0 && v[1].status == 2);
	t.timeout = 60000;
	CHECK(once(IOCTL_INMAGE_TAG_VOLUME_V2, &t) == 1 && v[1].status == 2);
	FAILS(once(IOCTL_INMAGE_CREATE_BARRIER_ALL, &bc), EAGAIN);
	CHECK(!once(IOCTL_INMAGE_TAG_COMMIT_V2, &c)); /* revoked */
	FAILS(once(IOCTL_INMAGE_TAG_COMMIT_V2, &c), EINVAL);
	CHECK(!once(IOCTL_INMAGE_CREATE_BARRIER_ALL, &bc));
	CHECK(!once(IOCTL_INMAGE_REMOVE_BARRIER_ALL, &br) || errno == EINVAL); /* a slow machine: it has gone by itself */
	FAILS(once(IOCTL_INMAGE_REMOVE_BARRIER_ALL, &br), EINVAL);
	CHECK(!once(IOCTL_INMAGE_CREATE_BARRIER_ALL, &bc));
	sleep(1); /* it goes by itself */
	FAILS(once(IOCTL_INMAGE_REMOVE_BARRIER_ALL, &br), EINVAL);
	bc.fbc_timeout_ms = 301;
	FAILS(once(IOCTL_INMAGE_CREATE_BARRIER_ALL, &bc), EINVAL);

	freeze_info_t f = { .nr_vols = 1, .timeout = 60000, .vol_info = &v[1] };
	thaw_info_t th = { .nr_vols = 1, .vol_info = &v[1] };
	memcpy(f.tag_guid, guid, GUID_LEN);
	memcpy(th.tag_guid, guid, GUID_LEN);
	CHECK(!once(IOCTL_INMAGE_FREEZE_VOLUME, &f) && v[1].status == 0);
	FAILS(once(IOCTL_INMAGE_FREEZE_VOLUME, &f), EPERM); /* it is frozen already */
	CHECK(v[1].status == 1);
	CHECK(!once(IOCTL_INMAGE_THAW_VOLUME, &th) && v[1].status == 0);
	f.timeout = 8000;
	CHECK(!once(IOCTL_INMAGE_FREEZE_VOLUME, &f));
	sleep(10);
	FAILS(once(IOCTL_INMAGE_THAW_VOLUME, &th), EINVAL); /* the time thawed it */
	f.timeout = 60001;
	FAILS(once(IOCTL_INMAGE_FREEZE_VOLUME, &f), EINVAL);
	f.timeout = 1, f.nr_vols = 1 << 30;
	FAILS(once(IOCTL_INMAGE_FREEZE_VOLUME, &f), EINVAL);
}

static int walk(const char *dev, const char *other)
{
	int fd = control(), fd2 = control(), lease = control();
	UDIRTY_BLOCK_V2 b;
	VOLUME_GUID g = { 0 };
	uint32_t flags = 0;
	FAILS(ioctl(fd, 0x5601, NULL), EINVAL);
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b), EINVAL);
	strcpy(g.guid, "/dev/nothing");
	FAILS(ioctl(fd, IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g), ENODEV);
	CHECK(!ioctl(fd, IOCTL_INMAGE_CLEAR_DIFFERENTIALS, &g));
	FAILS(filter(fd, "/dev/nothing"), ENODEV);
	FAILS(filter(fd, "/dev/null"), EINVAL);
	CHECK(!ioctl(lease, IOCTL_INMAGE_PROCESS_START_NOTIFY, &flags));
	FAILS(ioctl(fd2, IOCTL_INMAGE_PROCESS_START_NOTIFY, &flags), EINVAL);
	CHECK(!ioctl(fd2, IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY, &flags));
	FAILS(ioctl(lease, IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY, &flags), EINVAL);
	MUST(!filter(fd, dev));
	MUST(!filter(fd, dev));
	pointers(fd);
	MUST(!bad);
	for (int i = 0;; i++) { /* drain what there is, until the disk is in order */
		COMMIT_TRANSACTION c = { 0 };
		MUST(i < 3000);
		if (ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS, &b) == 0) {
			c.ulTransactionID = b.uHdr.Hdr.uliTransactionID;
			MUST(!ioctl(fd, IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS, &c));
			if (b.uHdr.Hdr.ulFlags & UDIRTY_BLOCK_FLAG_TSO_FILE && b.uHdr.Hdr.eWOState == 3)
				break;
		}
		usleep(20000);
	}
	statistics(fd, dev);
	RESYNC_START_V2 r = { 0 };
	strcpy(r.VolumeGUID, dev);
	CHECK(!ioctl(fd, IOCTL_INMAGE_RESYNC_START_NOTIFICATION, &r) && r.TimeInHundNanoSeconds > 1ULL << 50);
	CHECK(!ioctl(fd, IOCTL_INMAGE_RESYNC_END_NOTIFICATION, &r));
	points(dev, other);

	/* a thread waits on the descriptor on which another one works */
	struct waiter w = { .fd = fd, .w.Seconds = 60 };
	pthread_t t;
	int tags = 0;
	for (int i = 0; tags < 2; i++) {
		COMMIT_TRANSACTION c = { 0 };
		MUST(i < 500);
		MUST(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b) || errno == EAGAIN);
		tags += !b.uHdr.Hdr.ulFlags && !b.uHdr.Hdr.cChanges;
		c.ulTransactionID = b.uHdr.Hdr.uliTransactionID;
		CHECK(!ioctl(fd, IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS, &c));
		usleep(20000);
	}
	strcpy(w.w.VolumeGUID, dev);
	MUST(!pthread_create(&t, NULL, waits, &w));
	usleep(300000);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b) && b.uHdr.Hdr.ulFlags & UDIRTY_BLOCK_FLAG_TSO_FILE);
	CHECK(!ioctl(fd2, IOCTL_INMAGE_WAKEUP_ALL_THREADS));
	MUST(!pthread_join(t, NULL));
	CHECK(w.result == -1 && w.err == ETIMEDOUT);
	strcpy(w.w.VolumeGUID, "/dev/nothing");
	FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w.w), EINVAL);
	FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB, &w.w), EINVAL);

	MUST(!filter(fd2, dev));
	strcpy(g.guid, dev);
	CHECK(!ioctl(fd, IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g));
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b), EINVAL);
	FAILS(ioctl(fd2, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b), EBUSY);
	CHECK(!ioctl(fd, IOCTL_INMAGE_UNSTACK_ALL));
	return bad;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "walk"))
		return walk(argv[2], argv[3]);
	if (argc == 4 && !strcmp(argv[1], "replicate"))
		return replicate(argv[2], argv[3]);
	if (argc == 4 && !strcmp(argv[1], "tag"))
		return tag(argv[2], argv[3]);
	if (argc == 4 && !strcmp(argv[1], "point"))
		return point(argv[2], argv[3]);
	if (argc == 3 && !strcmp(argv[1], "wait")) {
		int fd = control();
		WAIT_FOR_DB_NOTIFY w = { .Seconds = 60 };
		strcpy(w.VolumeGUID, argv[2]);
		return filter(fd, argv[2]) || ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w) ? errno : 0;
	}
	if (argc == 3 && !strcmp(argv[1], "stop")) {
		VOLUME_GUID g = { 0 };
		strcpy(g.guid, argv[2]);
		return once(IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g) ? errno : 0;
	}
	return 99;
}
