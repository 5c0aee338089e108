/* A client of /dev/involflt, in C:
 *
 *   involflt replicate {DEV COPY}... drains each DEV into its COPY, in threads of one process; prints "tag NAME DEV NUMBER HASH" at each
 *                                    tag, NUMBER being the first of COPY then and HASH of all of it, and "copies DEV" when everything
 *                                    that was there has come; ends with the tag "end"; outlives the daemon. A tag that was not
 *                                    committed comes again, and is printed again
 *   involflt point DEV NAME          freezes DEV, prints that line of DEV, tags, thaws, commits; each with a descriptor of its own
 *   involflt tag DEV NAME            tags all disks at once, and prints that line of DEV
 *   involflt prepare DEV NAME        tags DEV, and gives no verdict
 *   involflt barrier DEV NAME        has all writes of DEV held, tags all disks, lets go, commits; prints "tag NAME DEV NUMBER"
 *   involflt lapse                   has them held until the time is over
 *   involflt outlive DEV             prints "ready" and has the daemon killed and started before it gets a line
 *   involflt wait DEV                waits for a minute
 *   involflt stop DEV                filters it no more
 *
 * The exit code is 2 where a disk cannot be tagged just now. */
#include "involflt_client.h"

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

/* number is what a disk begins with. */
static uint64_t number(const char *path)
{
	uint64_t n, *b = aligned_alloc(4096, 4096);
	int fd = open(path, O_RDONLY | O_DIRECT);
	MUST(b && fd >= 0 && pread(fd, b, 4096, 0) == 4096);
	close(fd);
	n = *b;
	free(b);
	return n;
}

/* print tells of a tag, and what a disk or its copy is then. */
static void print(const void *name, int length, const char *dev, const char *of)
{
	unsigned long long n = number(of), h = hash(of);
	printf("tag %.*s %s %llu %016llx\n", length, (const char *)name, dev, n, h);
	fflush(stdout);
}

/* what a drainer knows of the blocks that it has had */
struct drain {
	const char *dev, *copy;
	uint64_t time, seq; /* end of the last one */
	int out;
	int told, ended;
	pthread_t thread;
};

static uint32_t u32(const unsigned char *b) { uint32_t v; memcpy(&v, b, 4); return v; }
static uint64_t u64(const unsigned char *b) { uint64_t v; memcpy(&v, b, 8); return v; }

/* apply writes a stream into the copy. */
static void apply(struct drain *d, UDIRTY_BLOCK_V2 *b)
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
static void tagged(struct drain *d, UDIRTY_BLOCK_V2 *b)
{
	unsigned char *t = (void *)&b->uTagList;
	MUST(u32(t) == 0x04000001 && u64(t + 16) == u64(t + 40) && u64(t + 24) == u64(t + 48) && u32(t + 60) == 2);
	MUST(b->uHdr.Hdr.eWOState == 3 && u64(t + 24) >= d->time);
	t += 64; /* one user record: header of 4 bytes, length, text */
	MUST((u32(t) & 0xffff) == 5);
	int n = t[4] | t[5] << 8;
	fsync(d->out);
	print(t + 6, n, d->dev, d->copy);
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
static int step(struct drain *d, int fd)
{
	WAIT_FOR_DB_NOTIFY w = { .Seconds = 1 };
	UDIRTY_BLOCK_V2 b;
	strcpy(w.VolumeGUID, d->dev);
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
		printf("copies %s\n", d->dev);
		fflush(stdout);
	}
	if (f & UDIRTY_BLOCK_FLAG_DATA_FILE)
		apply(d, &b);
	else if (f & UDIRTY_BLOCK_FLAG_TSO_FILE)
		MUST(b.uHdr.Hdr.cChanges == 0);
	else if (b.uHdr.Hdr.cChanges == 0)
		tagged(d, &b);
	else
		MUST(order == 2); /* ranges: copies of them will follow */
	return commit(fd, &b);
}

static int away(void)
{
	return errno == ENOTCONN || errno == ECONNABORTED || errno == ENOENT || errno == ENXIO || errno == ENODEV;
}

/* leases has this process be the drainer and the service, of which there is one each. */
static int leases(void)
{
	static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
	static int lease[2] = { -1, -1 };
	const unsigned long commands[] = { IOCTL_INMAGE_PROCESS_START_NOTIFY, IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY };
	DRIVER_VERSION v;
	uint32_t flags = 3;
	int r = 0, e = 0;
	pthread_mutex_lock(&one);
	if (lease[0] < 0 || ioctl(lease[0], IOCTL_INMAGE_GET_DRIVER_VERSION, &v)) {
		for (int i = 0; i < 2; i++) {
			close(lease[i]);
			lease[i] = open("/dev/involflt", O_RDWR | O_CLOEXEC);
			if (lease[i] < 0 || ioctl(lease[i], commands[i], &flags))
				r = -1, e = errno;
		}
	}
	if (r) {
		close(lease[0]);
		lease[0] = -1;
	}
	pthread_mutex_unlock(&one);
	errno = e;
	return r;
}

static void *drains(void *p)
{
	struct drain *d = p;
	MUST((d->out = open(d->copy, O_RDWR)) >= 0);
	while (!d->ended) {
		int fd = open("/dev/involflt", O_RDWR | O_CLOEXEC);
		d->time = d->seq = 0; /* what was a part of a larger batch comes again from that one's beginning */
		if (fd < 0 || leases() || filter(fd, d->dev)) {
			MUST(away());
			usleep(10000);
		}
		else
			while (!d->ended)
				if (step(d, fd)) {
					MUST(away());
					break;
				}
		close(fd);
	}
	MUST(!fsync(d->out));
	return NULL;
}

static int replicate(int n, char **pairs)
{
	struct drain d[8] = { 0 };
	MUST(n % 2 == 0 && n <= 16);
	for (int i = 0; i < n / 2; i++) {
		d[i].dev = pairs[2 * i], d[i].copy = pairs[2 * i + 1];
		MUST(!pthread_create(&d[i].thread, NULL, drains, &d[i]));
	}
	for (int i = 0; i < n / 2; i++)
		MUST(!pthread_join(d[i].thread, NULL));
	return bad;
}

/* tag_info is of one tag; with flags 4 it is for all disks. */
static tag_info_t_v2 tag_info(volume_info_t *v, tag_names_t *n, const char *dev, const char *name, int flags, int timeout)
{
	tag_info_t_v2 t = { .flags = flags, .nr_vols = 1, .nr_tags = 1, .timeout = timeout, .vol_info = v, .tag_names = n };
	memset(v, 0, sizeof(*v));
	memset(n, 0, sizeof(*n));
	strcpy(v->vol_name, dev);
	strcpy(n->tag_name, name);
	n->tag_len = strlen(name);
	memcpy(t.tag_guid, guid, GUID_LEN);
	return t;
}

static int refused(int r, int e)
{
	printf("no tag: %d %s\n", r, strerror(e));
	return 2;
}

static int tag(const char *dev, const char *name)
{
	volume_info_t v;
	tag_names_t n;
	tag_info_t_v2 t = tag_info(&v, &n, dev, name, 4, 0);
	unsigned long long first = number(dev), h = hash(dev);
	int r = once(IOCTL_INMAGE_IOBARRIER_TAG_VOLUME, &t);
	if (r)
		return refused(r, errno);
	printf("tag %s %s %llu %016llx\n", name, dev, first, h);
	return bad;
}

static int prepare(const char *dev, const char *name)
{
	volume_info_t v;
	tag_names_t n;
	tag_info_t_v2 t = tag_info(&v, &n, dev, name, 0, 60000);
	int r = once(IOCTL_INMAGE_TAG_VOLUME_V2, &t);
	return r ? refused(r, errno) : v.status;
}

static int verdict(uint32_t commit)
{
	flt_tag_commit_t c = { .ftc_flags = commit };
	memcpy(c.ftc_guid, guid, GUID_LEN);
	return once(IOCTL_INMAGE_TAG_COMMIT_V2, &c);
}

static int point(const char *dev, const char *name)
{
	volume_info_t v = { .status = 99 };
	freeze_info_t f = { .nr_vols = 1, .timeout = 60000, .vol_info = &v };
	thaw_info_t th = { .nr_vols = 1, .vol_info = &v };
	tag_names_t n;
	memcpy(f.tag_guid, guid, GUID_LEN);
	memcpy(th.tag_guid, guid, GUID_LEN);
	strcpy(v.vol_name, dev);
	MUST(!once(IOCTL_INMAGE_FREEZE_VOLUME, &f) && v.status == 0);
	unsigned long long first = number(dev), h = hash(dev);
	tag_info_t_v2 t = tag_info(&v, &n, dev, name, 0, 50000);
	int r = once(IOCTL_INMAGE_TAG_VOLUME_V2, &t), e = errno;
	FAILS(verdict(1), EINVAL); /* still frozen */
	MUST(!once(IOCTL_INMAGE_THAW_VOLUME, &th) && v.status == 0);
	if (r)
		return refused(r, e);
	MUST(!verdict(1));
	printf("tag %s %s %llu %016llx\n", name, dev, first, h);
	return bad;
}

static int hold(void)
{
	flt_barrier_create_t b = { .fbc_timeout_ms = 300 };
	memcpy(b.fbc_guid, guid, GUID_LEN);
	return once(IOCTL_INMAGE_CREATE_BARRIER_ALL, &b);
}

static int let_go(void)
{
	flt_barrier_remove_t b = { .fbr_flags = 0 };
	memcpy(b.fbr_guid, guid, GUID_LEN);
	return once(IOCTL_INMAGE_REMOVE_BARRIER_ALL, &b);
}

/* barrier: where REMOVE_BARRIER succeeds the barrier was up until then, and nothing may have passed. */
static int barrier(const char *dev, const char *name)
{
	volume_info_t v;
	tag_names_t n;
	tag_info_t_v2 t = tag_info(&v, &n, dev, name, 4, 60000);
	if (hold())
		return refused(-1, errno);
	uint64_t first = number(dev);
	usleep(50000);
	int r = once(IOCTL_INMAGE_TAG_VOLUME_V2, &t), e = errno;
	FAILS(verdict(1), EINVAL); /* under the barrier, or when its time is over */
	uint64_t later = number(dev);
	if (let_go()) { /* a slow machine: its time was over, and the tag is revoked */
		e = errno;
		FAILS(verdict(1), EINVAL);
		return bad ? 1 : refused(r, e);
	}
	CHECK(first == later);
	if (r)
		return bad ? 1 : refused(r, e);
	CHECK(!verdict(1));
	printf("tag %s %s %llu\n", name, dev, (unsigned long long)first);
	return bad;
}

static int lapse(void)
{
	if (hold())
		return refused(-1, errno);
	sleep(1);
	FAILS(let_go(), EINVAL);
	return bad;
}

/* outlive: what a descriptor meets whose daemon is killed, and what the next one finds with the next daemon. */
static int outlive(const char *dev)
{
	int fd = control(), idle = control();
	UDIRTY_BLOCK_V2 b, again;
	struct waiter w;
	MUST(!filter(fd, dev));
	drained(fd);
	writes(dev, 8192, 4096);
	block(fd, &b);
	MUST(prepare(dev, "lost") == 0);
	wait_in_thread(&w, fd, dev);
	CHECK(!w.done);
	printf("ready\n");
	fflush(stdout);
	MUST(getchar() == '\n');
	MUST(!pthread_join(w.t, NULL));
	errno = w.err;
	CHECK(w.result == -1 && away());
	CHECK(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &again) == -1 && away());
	CHECK(ioctl(idle, IOCTL_INMAGE_WAKEUP_ALL_THREADS) == -1 && away());
	CHECK(!close(fd) && !close(idle));
	fd = control();
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &again), EINVAL);
	FAILS(verdict(1), EINVAL);
	MUST(!filter(fd, dev));
	block(fd, &again);
	CHECK(again.uHdr.Hdr.cChanges == b.uHdr.Hdr.cChanges && again.uHdr.Hdr.ulicbChanges == b.uHdr.Hdr.ulicbChanges);
	CHECK(!memcmp(again.uTagList.DataFile.FileName, b.uTagList.DataFile.FileName, b.uTagList.DataFile.usLength));
	MUST(!commit_id(fd, again.uHdr.Hdr.uliTransactionID));
	CHECK(drained(fd) == 0); /* revoked */
	return bad;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	if (argc >= 4 && !strcmp(what, "replicate"))
		return replicate(argc - 2, argv + 2);
	if (argc == 4 && !strcmp(what, "tag"))
		return tag(argv[2], argv[3]);
	if (argc == 4 && !strcmp(what, "point"))
		return point(argv[2], argv[3]);
	if (argc == 4 && !strcmp(what, "prepare"))
		return prepare(argv[2], argv[3]);
	if (argc == 4 && !strcmp(what, "barrier"))
		return barrier(argv[2], argv[3]);
	if (!strcmp(what, "lapse"))
		return lapse();
	if (argc == 3 && !strcmp(what, "outlive"))
		return outlive(argv[2]);
	if (argc == 3 && !strcmp(what, "wait")) {
		int fd = control();
		WAIT_FOR_DB_NOTIFY w = { .Seconds = 60 };
		strcpy(w.VolumeGUID, argv[2]);
		return filter(fd, argv[2]) || ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w) ? errno : 0;
	}
	if (argc == 3 && !strcmp(what, "stop")) {
		VOLUME_GUID g = { 0 };
		strcpy(g.guid, argv[2]);
		return once(IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g) ? errno : 0;
	}
	return 99;
}
