/* involflt_walk DEV OTHER: every command of /dev/involflt, right and wrong. DEV is of 8 MiB and may be filtered, OTHER has a
 * file system that is mounted. What comes of DEV comes as it is written here: nobody else writes to it. */
#include "involflt_client.h"
#include <limits.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>

static char *room; /* two pages, and behind them what nobody may touch */
enum { PAGE = 4096, ROOM = 3 * PAGE };

static void unfiltered(const char *dev)
{
	static const unsigned long unknown[] = { 0x5601, _IO(FLT_IOCTL, 10), _IO(FLT_IOCTL, 79), _IOW(FLT_IOCTL, 0, int), _IOR(FLT_IOCTL, 72, UDIRTY_BLOCK_V2), 0xc080fe21 };
	int fd = control();
	UDIRTY_BLOCK_V2 b;
	WAIT_FOR_DB_NOTIFY w = { .Seconds = 60 };
	VOLUME_GUID g = { 0 };
	for (unsigned i = 0; i < sizeof(unknown) / sizeof(*unknown); i++)
		FAILS(ioctl(fd, unknown[i], room), EINVAL);
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b), EINVAL);
	FAILS(commit_id(fd, 1), EINVAL);
	FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w), EINVAL);
	strcpy(w.VolumeGUID, "/dev/nothing");
	FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB, &w), EINVAL);
	FAILS(ioctl(fd, IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g), EINVAL);
	strcpy(g.guid, "/dev/nothing");
	FAILS(ioctl(fd, IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g), ENODEV);
	CHECK(!ioctl(fd, IOCTL_INMAGE_CLEAR_DIFFERENTIALS, &g));
	memset(&g, 'x', sizeof(g)); /* has no end */
	FAILS(ioctl(fd, IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g), EINVAL);
	FAILS(filter(fd, "/dev/nothing"), ENODEV);
	FAILS(filter(fd, "/dev/null"), EINVAL);
	FAILS(filter_as(fd, 1, dev, "name"), EINVAL);
	FAILS(filter_as(fd, 0, dev, "name"), EINVAL);
	FAILS(filter_as(fd, 2, dev, "a/name"), EINVAL);
	FAILS(filter_as(fd, 2, "", "name"), EINVAL);
	CHECK(!ioctl(fd, IOCTL_INMAGE_UNSTACK_ALL));
	CHECK(!ioctl(fd, IOCTL_INMAGE_WAKEUP_ALL_THREADS));
	flt_barrier_create_t barrier = { .fbc_timeout_ms = 300 };
	FAILS(ioctl(fd, IOCTL_INMAGE_CREATE_BARRIER_ALL, &barrier), ENODEV);
	close(fd);
	FAILS(ioctl(fd, IOCTL_INMAGE_WAKEUP_ALL_THREADS), EBADF);
}

/* leases: one holder each, until the last copy of its descriptor is closed. */
static void leases(void)
{
	static const unsigned long both[] = { IOCTL_INMAGE_PROCESS_START_NOTIFY, IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY };
	uint32_t flags = 0;
	for (int i = 0; i < 2; i++) {
		int fd = control(), fd2 = control(), copy = dup(fd);
		CHECK(!ioctl(fd, both[i], &flags));
		FAILS(ioctl(fd, both[i], &flags), EINVAL);
		FAILS(ioctl(fd2, both[i], &flags), EINVAL);
		CHECK(!ioctl(fd2, both[!i], &flags)); /* the other one is free */
		close(fd);
		FAILS(ioctl(fd2, both[i], &flags), EINVAL);
		close(copy);
		CHECK(!ioctl(fd2, both[i], &flags));
		close(fd2);
	}
}

/* pointers: each command that takes one gets none, one to nothing, one to what ends too early, and one that no address can be. */
static void pointers(int fd)
{
	static const unsigned long commands[] = { WITH_POINTERS };
	char *nowhere[] = { NULL, room + ROOM, room + ROOM - 3, (char *)-1L, (char *)LONG_MIN, (char *)0x7ffffffffffff000 };
	for (unsigned i = 0; i < sizeof(commands) / sizeof(*commands); i++) {
		for (unsigned j = 0; j < sizeof(nowhere) / sizeof(*nowhere); j++)
			FAILS(ioctl(fd, commands[i], nowhere[j]), EFAULT);
		if (bad) {
			printf("command %#lx\n", commands[i]);
			exit(1);
		}
	}
}

/* starts: the disk is filtered, under one name; what is read is 4640 bytes, whatever the command's number says. */
static void starts(int fd, const char *dev)
{
	inm_dev_info_t *i = (void *)(room + ROOM - sizeof(*i));
	char link[] = "/tmp/involflt-XXXXXX";
	MUST(!filter(fd, dev));
	FAILS(filter_as(fd, 2, dev, "another"), EINVAL);
	memset(i, 0, sizeof(*i));
	i->d_type = 2;
	strcpy(i->d_guid, dev); /* no persistent name: the one that clients make */
	CHECK(!ioctl(fd, IOCTL_INMAGE_START_FILTERING_DEVICE_V2, i));
	memmove(room + ROOM - sizeof(inm_dev_info_compat_t), i, sizeof(inm_dev_info_compat_t));
	FAILS(ioctl(fd, IOCTL_INMAGE_START_FILTERING_DEVICE_V2, room + ROOM - sizeof(inm_dev_info_compat_t)), EFAULT);
	MUST(mkstemp(link) >= 0 && !unlink(link) && !symlink(dev, link)); /* another path of the same device */
	i = (void *)(room + 1);
	memset(i, 0, sizeof(*i));
	i->d_type = 2;
	strcpy(i->d_guid, link);
	strcpy(i->d_pname, "another");
	FAILS(ioctl(fd, IOCTL_INMAGE_START_FILTERING_DEVICE_V2, i), EINVAL);
	unlink(link);
}

static void statistics(int fd, const char *dev)
{
	char text[8192];
	VOLUME_STATS v = { .bufp = text, .buf_len = 100 };
	VOLUME_STATS_ADDITIONAL_INFO a = { 0 };
	GET_VOLUME_LIST l = { 0 };
	DRIVER_VERSION version;
	get_db_thres_t th = { 0 };
	RESYNC_START_V2 r = { 0 };
	memset(text, 0xee, sizeof(text));
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_GLOBAL_STATS, text) && text[4095] == 0 && (unsigned char)text[4096] == 0xee && strstr(text, "Protected Volumes"));
	memset(text, 0xee, sizeof(text));
	strcpy(v.guid.guid, dev);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v) && text[99] == 0 && (unsigned char)text[100] == 0xee);
	v.buf_len = 0xffffffff;
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v) && text[4095] == 0 && (unsigned char)text[4096] == 0xee);
	v.buf_len = 0, v.bufp = NULL;
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v));
	v.buf_len = PAGE, v.bufp = room + ROOM - PAGE + 1;
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v), EFAULT);
	v.bufp = room + ROOM - PAGE;
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v));
	memset(v.guid.guid, 0, sizeof(v.guid.guid)); /* by its persistent name */
	for (int i = 0; dev[i]; i++)
		v.guid.guid[i] = dev[i] == '/' ? '_' : dev[i];
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v) && strstr(v.bufp, dev));
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_GLOBAL_STATS, room + ROOM - PAGE + 1), EFAULT);
	for (int known = 0; known < 2; known++) {
		const char *name = known ? dev : "/dev/nothing";
		int e = known ? 0 : ENODEV;
		strcpy(v.guid.guid, name), strcpy(a.VolumeGuid.guid, name), strcpy(th.VolumeGUID, name), strcpy(r.VolumeGUID, name);
		CHECK((ioctl(fd, IOCTL_INMAGE_GET_VOLUME_STATS, &v) ? errno : 0) == e);
		CHECK((ioctl(fd, IOCTL_INMAGE_GET_ADDITIONAL_VOLUME_STATS, &a) ? errno : 0) == e);
		CHECK((ioctl(fd, IOCTL_INMAGE_GET_DB_NOTIFY_THRESHOLD, &th) ? errno : 0) == e);
		CHECK((ioctl(fd, IOCTL_INMAGE_RESYNC_START_NOTIFICATION, &r) ? errno : 0) == e);
		CHECK(!known || r.TimeInHundNanoSeconds > 1ULL << 50);
		CHECK((ioctl(fd, IOCTL_INMAGE_RESYNC_END_NOTIFICATION, &r) ? errno : 0) == e);
	}
	CHECK(a.ullDriverCurrentTimeStamp / 10000000 - time(NULL) + 10 < 20 && a.ullTotalChangesPending == 0);
	CHECK(th.threshold == 4 << 20);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DRIVER_VERSION, &version) && version.driver[0] == 2);

	FAILS(ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l), EAGAIN);
	CHECK(l.bufp == NULL && l.buf_len > 40960);
	l.bufp = malloc(l.buf_len);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l) && strstr(l.bufp, dev));
	uint32_t exactly = strlen(l.bufp) + 1;
	l.bufp = room + ROOM - exactly, l.buf_len = exactly;
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l) && strstr(l.bufp, dev));
	l.buf_len = 0xffffffff;
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l));
	l.bufp++;
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l), EFAULT);
	l.buf_len = exactly - 1;
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l), EAGAIN);
}

struct getter {
	int fd;
	uint64_t id;
	int differs, committed;
	pthread_t t;
};

static void *gets(void *p)
{
	struct getter *g = p;
	UDIRTY_BLOCK_V2 b;
	for (int i = 0; i < 10; i++)
		if (ioctl(g->fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b) || b.uHdr.Hdr.uliTransactionID != g->id)
			g->differs = 1;
	return NULL;
}

static void *commits(void *p)
{
	struct getter *g = p;
	g->committed = commit_id(g->fd, g->id) ? -errno : 1;
	return NULL;
}

/* by_threads has several of them on one descriptor. It gives how many could commit. */
static int by_threads(int fd, uint64_t id, void *(*does)(void *))
{
	struct getter g[4];
	int n = 0;
	for (int i = 0; i < 4; i++) {
		g[i] = (struct getter){ .fd = fd, .id = id };
		MUST(!pthread_create(&g[i].t, NULL, does, &g[i]));
	}
	for (int i = 0; i < 4; i++) {
		MUST(!pthread_join(g[i].t, NULL));
		CHECK(!g[i].differs && (g[i].committed >= 0 || g[i].committed == -EFAULT));
		n += g[i].committed == 1;
	}
	return n;
}

/* dies: a process gets a block, as the drainer or as anybody, and is killed. */
static uint64_t dies(const char *dev, int drainer)
{
	int said[2];
	uint64_t id = 0;
	MUST(!pipe(said));
	pid_t child = fork();
	if (child == 0) {
		int fd = control(), lease = control();
		UDIRTY_BLOCK_V2 b;
		uint32_t flags = 0;
		MUST(!drainer || !ioctl(lease, IOCTL_INMAGE_PROCESS_START_NOTIFY, &flags));
		MUST(!filter(fd, dev));
		block(fd, &b);
		MUST(write(said[1], &b.uHdr.Hdr.uliTransactionID, 8) == 8);
		pause();
	}
	close(said[1]);
	MUST(child > 0 && read(said[0], &id, 8) == 8);
	close(said[0]);
	MUST(!kill(child, SIGKILL) && waitpid(child, NULL, 0) == child);
	return id;
}

/* blocks: the same one until it is committed, and only with its number. */
static void blocks(int fd, const char *dev)
{
	UDIRTY_BLOCK_V2 b, again, *at;
	VOLUME_GUID g = { 0 };
	char file[1792] = "";
	uint32_t flags = 0;
	strcpy(g.guid, dev);
	writes(dev, 0, PAGE);
	block(fd, &b);
	uint64_t id = b.uHdr.Hdr.uliTransactionID;
	CHECK(b.uHdr.Hdr.cChanges == 1 && b.uHdr.Hdr.ulicbChanges == PAGE && b.uHdr.Hdr.eWOState == 3 && b.uHdr.Hdr.ulFlags == UDIRTY_BLOCK_FLAG_DATA_FILE);
	CHECK(b.uHdr.Hdr.ulTotalChangesPending == 0 && b.uHdr.Hdr.ulicbTotalChangesPending == 0);
	memcpy(file, b.uTagList.DataFile.FileName, b.uTagList.DataFile.usLength);
	CHECK(!access(file, R_OK));
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS, &again) && !memcmp(&again, &b, sizeof(b)));
	by_threads(fd, id, gets);
	at = (void *)(room + ROOM - sizeof(b)); /* to the last byte, and not beyond */
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, at) && !memcmp(at, &b, sizeof(b)));
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, room + 1) && !memcmp(room + 1, &b, sizeof(b)));
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, (char *)at + 1), EFAULT);
	MUST(!mprotect(room, ROOM, PROT_READ)); /* it can be read only */
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, room), EFAULT);
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_GLOBAL_STATS, room), EFAULT);
	MUST(!mprotect(room, ROOM, PROT_READ | PROT_WRITE));
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &again) && !memcmp(&again, &b, sizeof(b)));
	FAILS(commit_id(fd, id + 1), EFAULT);
	FAILS(commit_id(fd, id - 1), EFAULT);
	FAILS(commit_id(fd, 0), EFAULT);
	FAILS(commit_id(fd, -1), EFAULT);
	CHECK(!access(file, R_OK));
	CHECK(by_threads(fd, id, commits) == 1);
	FAILS(access(file, F_OK), ENOENT);
	FAILS(commit_id(fd, id), EFAULT);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &again) && empty(&again) && again.uHdr.Hdr.uliTransactionID != id);
	CHECK(!commit_id(fd, 123456)); /* there was nothing: any number does */

	writes(dev, PAGE, PAGE); /* who got a block has closed its descriptor: it is still out */
	id = dies(dev, 0);
	CHECK(!commit_id(fd, id));
	writes(dev, 2 * PAGE, PAGE); /* the drainer has died: it is out no more, and comes again */
	id = dies(dev, 1);
	FAILS(commit_id(fd, id), EFAULT);
	int lease = control();
	CHECK(!ioctl(lease, IOCTL_INMAGE_PROCESS_START_NOTIFY, &flags));
	block(fd, &b);
	CHECK(b.uHdr.Hdr.uliTransactionID == id && b.uHdr.Hdr.cChanges == 1);
	close(lease);
	FAILS(commit_id(fd, id), EFAULT);
	block(fd, &b);
	CHECK(b.uHdr.Hdr.uliTransactionID == id);

	memcpy(file, b.uTagList.DataFile.FileName, b.uTagList.DataFile.usLength); /* what was out when all was dropped */
	CHECK(!ioctl(fd, IOCTL_INMAGE_CLEAR_DIFFERENTIALS, &g));
	FAILS(access(file, F_OK), ENOENT);
	FAILS(commit_id(fd, id + 1), EFAULT);
	CHECK(!commit_id(fd, id));
	FAILS(commit_id(fd, id), EFAULT);
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b) && empty(&b) && b.uHdr.Hdr.uliTransactionID == 1);
	drained(fd);
}

static void rings(int sig) { (void)sig; }

static void waiters(int fd, const char *dev)
{
	struct waiter w;
	UDIRTY_BLOCK_V2 b;
	int fd2 = control(), copy;
	MUST(!filter(fd2, dev));
	wait_in_thread(&w, fd, dev); /* a thread waits on the descriptor on which another one works */
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b) && empty(&b));
	CHECK(!w.done);
	wake(&w, fd2);
	CHECK(w.result == -1 && w.err == ETIMEDOUT);

	wait_in_thread(&w, fd2, dev); /* or that is closed meanwhile */
	close(fd2);
	FAILS(ioctl(fd2, IOCTL_INMAGE_WAKEUP_ALL_THREADS), EBADF);
	CHECK(!w.done);
	wake(&w, fd);
	CHECK(w.result == -1 && w.err == ETIMEDOUT);

	w = (struct waiter){ 0 };
	strcpy(w.w.VolumeGUID, "/dev/nothing");
	FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w.w), EINVAL);
	FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB, &w.w), EINVAL);
	strcpy(w.w.VolumeGUID, dev);
	for (int i = 0; i < 3; i++) {
		w.w.Seconds = (int[]){ 0, -5, INT_MIN }[i];
		FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w.w), ETIMEDOUT);
		FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB, &w.w), ETIMEDOUT);
	}
	struct sigaction act = { .sa_handler = rings };
	struct itimerval soon = { .it_interval = { 0, 100000 }, .it_value = { 0, 100000 } }, never = { 0 };
	w.w.Seconds = INT_MAX;
	MUST(!sigaction(SIGALRM, &act, NULL) && !setitimer(ITIMER_REAL, &soon, NULL));
	FAILS(ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w.w), ETIMEDOUT); /* a signal */
	MUST(!setitimer(ITIMER_REAL, &never, NULL));

	writes(dev, 0, 512); /* little: 0 at the end of the time */
	block(fd, &b);
	w.w.Seconds = 1;
	CHECK(!ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w.w));
	drained(fd);
	writes(dev, 0, 5 << 20); /* enough: at once */
	w.w.Seconds = INT_MAX;
	CHECK(!ioctl(fd, IOCTL_INMAGE_WAIT_FOR_DB, &w.w));
	copy = dup(fd);
	CHECK(!ioctl(copy, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w.w));
	close(copy);
	drained(fd);
}

static struct {
	volume_info_t v[2];
	tag_names_t n[2];
	tag_info_t_v2 t;
	flt_barrier_create_t create;
	flt_barrier_remove_t remove;
	flt_tag_commit_t verdict;
	freeze_info_t freeze;
	thaw_info_t thaw;
} p;

/* anew has p ask for what is right, of DEV and OTHER. */
static void anew(const char *dev, const char *other)
{
	memset(&p, 0, sizeof(p));
	strcpy(p.v[0].vol_name, dev);
	strcpy(p.v[1].vol_name, other);
	p.n[0].tag_len = p.n[1].tag_len = 3;
	strcpy(p.n[0].tag_name, "abc");
	strcpy(p.n[1].tag_name, "def");
	p.t = (tag_info_t_v2){ .nr_vols = 1, .nr_tags = 1, .timeout = 60000, .vol_info = p.v, .tag_names = p.n };
	p.create.fbc_timeout_ms = 300;
	p.verdict.ftc_flags = 1;
	p.freeze = (freeze_info_t){ .nr_vols = 1, .timeout = 60000, .vol_info = &p.v[1] };
	p.thaw = (thaw_info_t){ .nr_vols = 1, .vol_info = &p.v[1] };
	char *all[] = { p.t.tag_guid, p.create.fbc_guid, p.remove.fbr_guid, p.verdict.ftc_guid, p.freeze.tag_guid, p.thaw.tag_guid };
	for (unsigned i = 0; i < sizeof(all) / sizeof(*all); i++)
		memcpy(all[i], guid, GUID_LEN);
}

#define TAG() once(IOCTL_INMAGE_TAG_VOLUME_V2, &p.t)
#define BARRIER_TAG() once(IOCTL_INMAGE_IOBARRIER_TAG_VOLUME, &p.t)
#define VERDICT() once(IOCTL_INMAGE_TAG_COMMIT_V2, &p.verdict)
#define CREATE() once(IOCTL_INMAGE_CREATE_BARRIER_ALL, &p.create)
#define REMOVE() once(IOCTL_INMAGE_REMOVE_BARRIER_ALL, &p.remove)
#define FREEZE() once(IOCTL_INMAGE_FREEZE_VOLUME, &p.freeze)
#define THAW() once(IOCTL_INMAGE_THAW_VOLUME, &p.thaw)

/* tags: what is wrong in itself, and whom a tag reaches. The disk is in order. It gives how many it has got. */
static int tags(const char *dev, const char *other)
{
	static tag_names_t many[441];
	const int counts[] = { 0, -1, INT_MIN, INT_MAX, 1 << 30, 1025 };
	int got = 0;
	for (unsigned i = 0; i < sizeof(counts) / sizeof(*counts); i++) {
		anew(dev, other);
		p.t.nr_tags = counts[i];
		FAILS(TAG(), EINVAL);
		FAILS(BARRIER_TAG(), EINVAL);
		p.t.nr_tags = 1, p.t.nr_vols = counts[i];
		FAILS(TAG(), EINVAL);
		FAILS(BARRIER_TAG(), EINVAL);
		p.freeze.nr_vols = p.thaw.nr_vols = counts[i];
		FAILS(FREEZE(), EINVAL);
		FAILS(THAW(), EINVAL);
	}
	for (int wrong = 0; wrong < 10; wrong++) {
		anew(dev, other);
		int e = EINVAL;
		switch (wrong) {
		case 0: p.n[0].tag_len = 257, e = EPERM; break;
		case 1: p.n[0].tag_len = 0xffff, e = EPERM; break;
		case 2: p.t.tag_names = (void *)(room + ROOM - sizeof(tag_names_t) + 1), e = EFAULT; break;
		case 3: p.t.vol_info = (void *)(room + ROOM - sizeof(volume_info_t) + 1), e = EFAULT; break;
		case 4: p.t.vol_info = NULL, e = EFAULT; break;
		case 5: p.t.timeout = 0; break;
		case 6: p.t.timeout = 60001; break;
		case 7: p.t.timeout = -1; break;
		case 8: p.t.flags = 4; break; /* without a barrier */
		case 9: p.t.vol_info = &p.v[1], e = EPERM; break; /* is not filtered */
		}
		FAILS(TAG(), e);
	}
	CHECK(p.v[1].status == 2);
	FAILS(BARRIER_TAG(), EPERM);
	p.t.timeout = -1;
	FAILS(BARRIER_TAG(), EINVAL);
	anew(dev, other);
	p.t.vol_info = (void *)room; /* whose status cannot be told */
	memcpy(room, p.v, sizeof(p.v));
	MUST(!mprotect(room, ROOM, PROT_READ));
	FAILS(TAG(), EFAULT);
	FAILS(BARRIER_TAG(), EFAULT);
	p.freeze.vol_info = (void *)(room + sizeof(p.v[0]));
	FAILS(FREEZE(), EFAULT);
	MUST(!mprotect(room, ROOM, PROT_READ | PROT_WRITE));
	anew(dev, other);
	p.t.tag_names = many, p.t.nr_tags = 441; /* more than a block has room for */
	FAILS(BARRIER_TAG(), EINVAL);
	p.t.nr_tags = 13; /* of 256 bytes each: 13 are the most */
	for (int i = 0; i < 14; i++)
		many[i].tag_len = 256;
	CHECK(!BARRIER_TAG() && ++got);
	p.t.nr_tags = 14;
	FAILS(BARRIER_TAG(), EINVAL);
	FAILS(VERDICT(), EINVAL); /* none of them waits for one */

	anew(dev, other);
	p.t.flags = 4, p.t.timeout = 0;
	CHECK(BARRIER_TAG() == 0 && ++got);
	anew(dev, other);
	p.t.nr_vols = p.t.nr_tags = 2, p.t.timeout = 0;
	CHECK(BARRIER_TAG() == 1 && ++got && p.v[0].status == 0 && p.v[1].status == 2);
	p.t.timeout = 60000, p.v[0].flags = 1; /* waits for the verdict */
	CHECK(BARRIER_TAG() == 1 && p.v[0].status == 0);
	FAILS(BARRIER_TAG(), EAGAIN);
	CHECK(!VERDICT() && ++got);
	FAILS(VERDICT(), EINVAL);
	return got;
}

/* points: what may follow what. */
static int points(int fd, const char *dev, const char *other)
{
	UDIRTY_BLOCK_V2 b;
	char text[4096];
	int got = 0;
	anew(dev, other);
	p.t.nr_vols = 2;
	CHECK(TAG() == 1 && p.v[1].status == 2);
	FAILS(TAG(), EINVAL); /* tagged already */
	FAILS(CREATE(), EAGAIN);
	FAILS(FREEZE(), EAGAIN);
	FAILS(BARRIER_TAG(), EAGAIN);
	FAILS(REMOVE(), EINVAL);
	FAILS(THAW(), EINVAL);
	p.verdict.ftc_guid[0] ^= 1;
	FAILS(VERDICT(), EINVAL);
	p.verdict.ftc_guid[0] ^= 1, p.verdict.ftc_flags = 2;
	FAILS(VERDICT(), EINVAL);
	for (int i = 0; ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b) == 0; i++) { /* it is not handed out before its verdict */
		MUST(i < 3000 && (empty(&b) || !is_tag(&b)));
		if (!empty(&b))
			MUST(!commit_id(fd, b.uHdr.Hdr.uliTransactionID));
		usleep(20000);
	}
	MUST(errno == EAGAIN);
	p.verdict.ftc_flags = 0;
	CHECK(!VERDICT()); /* revoked */
	FAILS(VERDICT(), EINVAL);

	for (int i = 0; i < 4; i++) {
		p.create.fbc_timeout_ms = (int[]){ 0, -1, 301, INT_MAX }[i];
		FAILS(CREATE(), EINVAL);
	}
	anew(dev, other);
	CHECK(!CREATE());
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_GLOBAL_STATS, text)); /* they answer under it */
	p.remove.fbr_guid[35] ^= 1;
	FAILS(REMOVE(), EINVAL);
	p.remove.fbr_guid[35] ^= 1;
	CHECK(!REMOVE() || errno == EINVAL); /* a slow machine: it has gone by itself */
	FAILS(REMOVE(), EINVAL);
	for (int i = 0;; i++) { /* a tag under it counts when it was there until it was removed */
		anew(dev, other);
		MUST(i < 100 && !CREATE());
		p.t.flags = 4;
		int r = TAG();
		CHECK(!r || errno == EAGAIN || errno == EINVAL);
		FAILS(VERDICT(), EINVAL);
		if (REMOVE() || r) {
			FAILS(VERDICT(), EINVAL);
			continue;
		}
		CHECK(!VERDICT() && ++got);
		break;
	}
	CHECK(!CREATE());
	sleep(1); /* it goes by itself */
	FAILS(REMOVE(), EINVAL);

	CHECK(!FREEZE() && p.v[1].status == 0);
	FAILS(FREEZE(), EPERM); /* it is frozen already */
	CHECK(p.v[1].status == 1);
	p.freeze.tag_guid[0] ^= 1, p.thaw.tag_guid[0] ^= 1;
	FAILS(FREEZE(), EINVAL);
	FAILS(THAW(), EINVAL);
	p.freeze.tag_guid[0] ^= 1, p.thaw.tag_guid[0] ^= 1;
	FAILS(CREATE(), EAGAIN);
	p.t.tag_guid[0] ^= 1, p.t.flags = 0;
	FAILS(TAG(), EINVAL);
	p.t.tag_guid[0] ^= 1, p.t.flags = 4;
	FAILS(TAG(), EINVAL); /* all disks: only under a barrier */
	p.thaw.vol_info = p.v; /* one that is not frozen, and one that is */
	p.thaw.nr_vols = 2;
	FAILS(THAW(), EPERM);
	CHECK(p.v[0].status == 1 && p.v[1].status == 0);
	p.thaw.nr_vols = 1, p.thaw.vol_info = &p.v[1];
	FAILS(THAW(), EINVAL);
	p.freeze.vol_info = p.v, p.freeze.nr_vols = 2; /* nothing of DEV is mounted: the other one stays frozen */
	FAILS(FREEZE(), EPERM);
	CHECK(p.v[0].status == 1 && p.v[1].status == 0);
	CHECK(!THAW());
	p.freeze.vol_info = &p.v[1], p.freeze.nr_vols = 1, p.freeze.timeout = 3000;
	CHECK(!FREEZE());
	for (int i = 0; CREATE(); i++) { /* the time thaws it */
		MUST(i < 600 && errno == EAGAIN);
		usleep(100000);
	}
	FAILS(THAW(), EINVAL);
	CHECK(!REMOVE() || errno == EINVAL);
	for (int i = 0; i < 4; i++) {
		p.freeze.timeout = (int[]){ 0, -1, 60001, INT_MAX }[i];
		FAILS(FREEZE(), EINVAL);
	}
	return got;
}

/* stops: what the others see of it; and that disks can be filtered again. */
static void stops(int fd, const char *dev, const char *other)
{
	struct waiter w;
	UDIRTY_BLOCK_V2 b;
	VOLUME_GUID g = { 0 };
	char text[4096] = "";
	GET_VOLUME_LIST l = { .bufp = text, .buf_len = sizeof(text) };
	int fd2 = control();
	MUST(!filter(fd2, dev));
	MUST(!filter(fd2, other)); /* it stays bound to the first */
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l) && strstr(text, dev) && strstr(text, other));
	wait_in_thread(&w, fd2, other);
	MUST(!pthread_join(w.t, NULL));
	CHECK(w.result == -1 && w.err == EINVAL);
	writes(dev, 0, PAGE);
	block(fd2, &b);
	uint64_t id = b.uHdr.Hdr.uliTransactionID;
	wait_in_thread(&w, fd2, dev);
	CHECK(!w.done);
	strcpy(g.guid, dev);
	CHECK(!ioctl(fd, IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g));
	MUST(!pthread_join(w.t, NULL));
	CHECK(w.result == -1 && w.err == EBUSY);
	FAILS(ioctl(fd, IOCTL_INMAGE_STOP_FILTERING_DEVICE, &g), ENODEV);
	FAILS(ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b), EINVAL);
	FAILS(ioctl(fd2, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b), EBUSY);
	FAILS(ioctl(fd2, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w.w), EBUSY);
	CHECK(!commit_id(fd2, id)); /* that block was out */
	FAILS(commit_id(fd2, id), EBUSY);
	MUST(!filter(fd2, dev)); /* binds it anew */
	CHECK(!ioctl(fd2, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b) || errno == EAGAIN);
	CHECK(!ioctl(fd, IOCTL_INMAGE_UNSTACK_ALL));
	CHECK(!ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l) && text[0] == 0);
	FAILS(ioctl(fd2, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &b), EBUSY);
	close(fd2);
}

int main(int argc, char **argv)
{
	room = mmap(NULL, 2 * ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (argc != 3 || room == MAP_FAILED || mprotect(room + ROOM, ROOM, PROT_NONE))
		return 99;
	const char *dev = argv[1], *other = argv[2];
	unfiltered(dev);
	leases();
	int fd = control();
	starts(fd, dev);
	pointers(fd);
	MUST(!bad);
	drained(fd);
	statistics(fd, dev);
	blocks(fd, dev);
	waiters(fd, dev);
	MUST(!bad);
	int got = tags(dev, other);
	CHECK(drained(fd) == got);
	got = points(fd, dev, other);
	CHECK(drained(fd) == got);
	stops(fd, dev, other);
	return bad;
}
