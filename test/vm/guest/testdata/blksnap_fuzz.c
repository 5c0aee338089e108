/* blksnap_fuzz SEED ROUNDS STORAGE FOREIGN DEV...: commands with arguments that are
 * random, or right but for a few bytes, or end where nobody may read or write. None may crash
 * the daemon or hang, and one that fails has changed nothing: not the snapshots, their images and
 * nodes, the trackers or their maps. */
#define _GNU_SOURCE
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <unistd.h>
#include "blksnap.h"

#define SNAPSHOTS 64
#define DEVICES 4
#define MUST(what)                                                                                      \
	do {                                                                                            \
		if (!(what)) {                                                                          \
			printf("line %d: %s (errno %d %s)\n", __LINE__, #what, errno, strerror(errno)); \
			exit(3);                                                                        \
		}                                                                                       \
	} while (0)

static uint64_t seed;
static volatile unsigned long now; /* the command that is under way, or was last */
static volatile int may_wait;
static int ctl;
static struct blk_snap_dev storage, known[DEVICES + 3]; /* foreign, one that is not there, an image */
static int nknown, ndevs;

static uint64_t next(void)
{
	seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
	return seed;
}

static void rings(int sig)
{
	(void)sig;
	if (!may_wait) {
		static const char text[] = "a command hangs\n";
		(void)!write(1, text, sizeof(text) - 1);
		_exit(2);
	}
}

static void clock_set(int ms)
{
	struct itimerval t = { .it_interval = { ms / 1000, ms % 1000 * 1000 }, .it_value = { ms / 1000, ms % 1000 * 1000 } };
	setitimer(ITIMER_REAL, &t, NULL);
}

/* state is what a command that fails must not change. */
struct state {
	struct blk_snap_uuid ids[SNAPSHOTS];
	unsigned n, images, nodes, trackers;
	struct blk_snap_image_info info[SNAPSHOTS];
	struct blk_snap_cbt_info tracker[DEVICES];
	uint64_t node; /* a sum over their names and numbers */
	int length[DEVICES];
	uint8_t map[DEVICES][8192];
};

static int order(const void *a, const void *b) { return memcmp(a, b, sizeof(struct blk_snap_uuid)); }

static void look(struct state *s)
{
	struct blk_snap_snapshot_collect c = { .count = SNAPSHOTS, .ids = s->ids };
	struct blk_snap_tracker_collect t = { .count = DEVICES, .cbt_info_array = s->tracker };
	memset(s, 0, sizeof(*s));
	MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT, &c));
	s->n = c.count;
	qsort(s->ids, s->n, sizeof(s->ids[0]), order);
	for (unsigned i = 0; i < s->n; i++) {
		struct blk_snap_snapshot_collect_images m = { .id = s->ids[i], .count = SNAPSHOTS - s->images, .image_info_array = s->info + s->images };
		if (ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &m))
			MUST(errno == ENODEV); /* not taken */
		else
			s->images += m.count;
	}
	known[nknown - 1] = s->images ? s->info[next() % s->images].image_dev_id : known[0];
	MUST(!ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_COLLECT, &t));
	s->trackers = t.count;
	for (unsigned i = 0; i < s->trackers; i++) {
		struct blk_snap_tracker_read_cbt_bitmap m = { .dev_id = s->tracker[i].dev_id, .length = sizeof(s->map[i]), .buff = s->map[i] };
		s->length[i] = ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m);
	}
	DIR *dir = opendir("/dev");
	MUST(dir);
	for (struct dirent *e; (e = readdir(dir));) {
		struct stat st;
		if (strncmp(e->d_name, BLK_SNAP_IMAGE_NAME, strlen(BLK_SNAP_IMAGE_NAME)) || fstatat(dirfd(dir), e->d_name, &st, 0))
			continue;
		s->nodes++;
		uint64_t sum = st.st_rdev;
		for (const char *p = e->d_name; *p; p++)
			sum = sum * 31 + *p;
		s->node += sum;
	}
	closedir(dir);
}

/* prepared makes one that is taken and one that is not, where there is none. */
static void prepared(struct state *s)
{
	if (s->n > 3) {
		for (unsigned i = 0; i < s->n; i++)
			MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, &s->ids[i]));
		look(s);
	}
	if (s->images && s->n > 1)
		return;
	struct blk_snap_snapshot_create c = { .count = ndevs, .dev_id_array = known };
	struct blk_snap_block_range r = { next() % 64 * 16384, 16384 };
	MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c));
	struct blk_snap_snapshot_append_storage a = { .id = c.id, .dev_id = storage, .count = 1, .ranges = &r };
	if (!s->images) {
		while (ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &a)) {
			MUST(errno == EINVAL); /* there is storage already */
			r.sector_offset = next() % 64 * 16384;
		}
		MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_TAKE, &c.id));
	}
	look(s);
	prepared(s);
}

static const unsigned long commands[] = {
	IOCTL_BLK_SNAP_VERSION, IOCTL_BLK_SNAP_TRACKER_REMOVE, IOCTL_BLK_SNAP_TRACKER_COLLECT, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP,
	IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE,
	IOCTL_BLK_SNAP_SNAPSHOT_TAKE, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT,
};

/* argument fills pages before the end of what can be read, and gives an address in them:
 * words, with the names of what there is in places where structures have them. */
static char *argument(char *room, size_t size, const struct state *s)
{
	size_t at = next() % 3 ? next() % 512 * 8 : next() % 3 ? size - next() % 64 : next() % size;
	for (size_t i = 0; i < size; i += 8) {
		uint64_t v = next();
		switch (next() % 6) {
		case 0: v = 0; break;
		case 1: v = v % 64 * 8; break;
		case 2: v = (uint64_t)(room + v % size / 8 * 8); break;
		case 3: v &= 0xffffffff; break;
		case 4: v = v % 4 << 32 | next() % 4; break;
		}
		memcpy(room + i, &v, 8);
	}
	for (int i = next() % 4; i > 0; i--) {
		size_t to = (next() % 2 ? at : next() % (size / 2)) + (next() % 3) * 8;
		if (to + 64 > size)
			continue;
		if (next() % 2)
			memcpy(room + to, &known[next() % nknown], sizeof(known[0]));
		else if (s->n)
			memcpy(room + to, &s->ids[next() % s->n], 16);
	}
	return room + at;
}

static struct blk_snap_dev number(const char *path)
{
	struct stat st;
	MUST(!stat(path, &st) && S_ISBLK(st.st_mode));
	return (struct blk_snap_dev){ .mj = major(st.st_rdev), .mn = minor(st.st_rdev) };
}

int main(int argc, char **argv)
{
	static struct state before, after;
	const size_t size = 16384;
	struct sigaction act = { .sa_handler = rings }; /* calls end with it */
	setvbuf(stdout, NULL, _IOLBF, 0);
	MUST(argc > 5 && argc <= 5 + DEVICES);
	seed = strtoull(argv[1], NULL, 0) | 1;
	storage = number(argv[3]);
	for (; ndevs < argc - 5; ndevs++)
		known[ndevs] = number(argv[5 + ndevs]);
	known[ndevs] = number(argv[4]);
	known[ndevs + 1] = (struct blk_snap_dev){ 4095, 77 };
	nknown = ndevs + 3;
	ctl = open(BLK_SNAP_CTL, O_RDWR | O_CLOEXEC);
	int other = open(BLK_SNAP_CTL, O_RDWR | O_CLOEXEC), failed = 0, done = 0;
	char *room = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(ctl >= 0 && other >= 0 && room != MAP_FAILED && !mprotect(room + size, size, PROT_NONE) && !sigaction(SIGALRM, &act, NULL));
	clock_set(60000);
	look(&before);
	for (long i = atol(argv[2]); i > 0; i--) {
		unsigned long cmd = commands[next() % (sizeof(commands) / sizeof(*commands))];
		if (next() % 16 == 0)
			cmd = _IOC(next() % 4, next() % 2 ? BLK_SNAP : 0x80 | next() % 128, next() % 80, next() % 8192);
		prepared(&before);
		if (next() % 8 == 0)
			MUST(!mprotect(room, size, PROT_READ | PROT_WRITE));
		char *arg = argument(room, size, &before);
		int shut = next() % 8 == 0; /* it can be read, and not be written */
		now = cmd;
		may_wait = cmd == IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT;
		MUST(!shut || !mprotect(room, size, PROT_READ));
		clock_set(may_wait ? 10 : 60000);
		int r = ioctl(next() % 4 ? ctl : other, cmd, arg), err = r < 0 ? errno : 0;
		clock_set(60000); /* first: it may ring once more */
		may_wait = 0;
		MUST(!shut || !mprotect(room, size, PROT_READ | PROT_WRITE));
		if (r < -1 || (r > 0 && cmd != IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP) || err == ENOTCONN || err == ECONNABORTED || err == EIO || (err == EINTR && cmd != IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT)) {
			printf("command %#lx returns %d, errno %d; %ld are left\n", cmd, r, err, i);
			return 1;
		}
		look(&after);
		int gone = cmd == IOCTL_BLK_SNAP_SNAPSHOT_TAKE && err == EFAULT; /* one without storage, as the module does */
		if (err && !gone && memcmp(&before, &after, sizeof(before))) {
			printf("command %#lx fails with errno %d, and something is another; %ld are left\n", cmd, err, i);
			return 1;
		}
		failed += err != 0, done += !err;
		before = after;
	}
	for (unsigned i = 0; i < before.n; i++)
		MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, &before.ids[i]));
	printf("%d failed, %d did something\n", failed, done);
	return !failed || !done;
}
