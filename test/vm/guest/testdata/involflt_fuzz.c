/* involflt_fuzz DEV SEED ROUNDS: commands with arguments that are random, or right but for a few bits, or
 * end where nobody may read. None may crash the daemon or hang, and one that fails has changed
 * neither the list of disks nor the block that is out. */
#include "involflt_client.h"
#include <signal.h>
#include <sys/time.h>

static uint64_t seed;
static volatile unsigned long now; /* the command that is under way, or was last */
static volatile int may_wait;

static uint64_t next(void)
{
	seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
	return seed;
}

static void rings(int sig)
{
	(void)sig;
	if (!may_wait) {
		fprintf(stderr, "command %#lx hangs\n", now);
		_exit(2);
	}
}

static void clock_set(int ms)
{
	struct itimerval t = { .it_interval = { ms / 1000, ms % 1000 * 1000 }, .it_value = { ms / 1000, ms % 1000 * 1000 } };
	setitimer(ITIMER_REAL, &t, NULL);
}

struct state {
	int listed, got, err;
	char list[4096];
	UDIRTY_BLOCK_V2 b;
};

static void look(int fd, struct state *s)
{
	GET_VOLUME_LIST l = { .bufp = s->list, .buf_len = sizeof(s->list) };
	memset(s, 0, sizeof(*s));
	s->listed = ioctl(fd, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, &l);
	s->got = ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, &s->b);
	s->err = s->got ? errno : 0;
}

static int out(const struct state *s) { return !s->err && !empty(&s->b); }

/* same compares all of a block that is out, but what is pending behind it. That there is nothing is answered anew each time,
 * and that something waits (for a barrier, for a tag's verdict) ends by itself. */
static int same(const struct state *x, const struct state *y)
{
	const char *a = (void *)&x->b, *b = (void *)&y->b;
	if (x->listed != y->listed || strcmp(x->list, y->list))
		return 0;
	if (!out(x))
		return x->err == y->err || x->err == EAGAIN || y->err == EAGAIN;
	return !y->err && !memcmp(a, b, 20) && !memcmp(a + 32, b + 32, sizeof(x->b) - 32);
}

static const unsigned long commands[] = { WITH_POINTERS, IOCTL_INMAGE_PROCESS_START_NOTIFY, IOCTL_INMAGE_WAKEUP_ALL_THREADS };

/* argument fills a page or two before the end of what can be read, and gives an address in them. */
static char *argument(char *room, size_t size, const char *dev)
{
	for (size_t i = 0; i < size; i += 8) {
		uint64_t v = next();
		switch (next() % 6) {
		case 0: v = 0; break;
		case 1: v %= 512; break;
		case 2: v = (uint64_t)(room + v % size); break;
		case 3: v &= 0xffffffff; break;
		case 4: v = v % 4 << 32 | next() % 4; break;
		}
		memcpy(room + i, &v, 8);
	}
	size_t at = next() % 3 ? next() % 4096 : next() % size;
	for (int i = next() % 4; i > 0; i--) { /* names, and pieces of them */
		size_t to = next() % 2 ? at + next() % 64 / 4 * 4 : next() % (size - 300);
		if (to + 64 < size)
			memcpy(room + to, dev, next() % 3 ? strlen(dev) + 1 : next() % strlen(dev));
	}
	return room + at;
}

/* nearly makes an argument that is right, but for a few bits. It begins at a page, and none follows. */
static char *nearly(unsigned long cmd, char *arg, const char *dev, uint64_t id)
{
	union {
		inm_dev_info_t start;
		COMMIT_TRANSACTION commit;
		WAIT_FOR_DB_NOTIFY wait;
		tag_info_t_v2 tag;
		flt_barrier_create_t barrier;
		flt_tag_commit_t verdict;
		freeze_info_t freeze;
		GET_VOLUME_LIST list;
		VOLUME_STATS stats;
	} *u = (void *)arg;
	volume_info_t *v = (void *)(arg + 1024);
	tag_names_t *n = (void *)(arg + 2048);
	memset(arg, 0, 8192);
	strcpy(arg, dev); /* most begin so */
	switch (cmd) {
	case IOCTL_INMAGE_START_FILTERING_DEVICE_V2:
		memset(arg, 0, 128);
		u->start.d_type = 2;
		strcpy(u->start.d_guid, dev);
		strcpy(u->start.d_pname, "fuzzed");
		break;
	case IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS:
		u->commit.ulTransactionID = id;
		break;
	case IOCTL_INMAGE_WAIT_FOR_DB:
	case IOCTL_INMAGE_WAIT_FOR_DB_V2:
		u->wait.Seconds = next() % 3;
		break;
	case IOCTL_INMAGE_TAG_VOLUME_V2:
	case IOCTL_INMAGE_IOBARRIER_TAG_VOLUME:
		memset(arg, 0, 128);
		u->tag = (tag_info_t_v2){ .flags = next() % 3 ? 0 : 4, .nr_vols = 1, .nr_tags = 1, .timeout = 1 + next() % 100, .vol_info = v, .tag_names = n };
		v->flags = next() % 2;
		strcpy(v->vol_name, dev);
		n->tag_len = next() % 257;
		break;
	case IOCTL_INMAGE_CREATE_BARRIER_ALL:
		memset(arg, 0, 128);
		u->barrier.fbc_timeout_ms = next() % 100;
		break;
	case IOCTL_INMAGE_REMOVE_BARRIER_ALL:
	case IOCTL_INMAGE_TAG_COMMIT_V2:
		memset(arg, 0, 128);
		u->verdict.ftc_flags = next() % 2;
		break;
	case IOCTL_INMAGE_FREEZE_VOLUME:
	case IOCTL_INMAGE_THAW_VOLUME:
		memset(arg, 0, 128);
		u->freeze = (freeze_info_t){ .nr_vols = 1, .timeout = next() % 100, .vol_info = v };
		strcpy(v->vol_name, dev);
		break;
	case IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST:
		u->list = (GET_VOLUME_LIST){ (char *)n, next() % 4096 };
		break;
	case IOCTL_INMAGE_GET_VOLUME_STATS:
		u->stats.bufp = (char *)n, u->stats.buf_len = next() % 4096;
	}
	for (int i = next() % 3; i > 0; i--)
		arg[next() % 2 ? next() % 80 : next() % 4096] ^= 1 << next() % 8;
	return arg;
}

int main(int argc, char **argv)
{
	static struct state before, after;
	const size_t size = 16384;
	struct sigaction act = { .sa_handler = rings }; /* calls end with it */
	int fd = open("/dev/involflt", O_RDWR | O_CLOEXEC), other = open("/dev/involflt", O_RDWR | O_CLOEXEC), failed = 0, compared = 0, committed = 0;
	int disk = open(argv[1], O_RDWR | O_SYNC | O_CLOEXEC);
	char *room = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (argc != 4 || fd < 0 || disk < 0 || other < 0 || room == MAP_FAILED || mprotect(room + size, size, PROT_NONE) || sigaction(SIGALRM, &act, NULL) || filter_as(fd, 2, argv[1], "fuzzed"))
		return 99;
	seed = strtoull(argv[2], NULL, 0) | 1;
	look(fd, &before);
	for (long i = atol(argv[3]); i > 0; i--) {
		unsigned long cmd = commands[next() % (sizeof(commands) / sizeof(*commands))];
		if (next() % 16 == 0) {
			cmd = next() & 0xffffffff;
			if (next() % 2)
				cmd = _IOC(next() % 4, FLT_IOCTL, next() % 80, next() % 8192);
		}
		if (!out(&before) && pwrite(disk, room, 4096, next() % 1024 * 4096) != 4096) /* so that something is, soon */
			return 97;
		if (cmd == IOCTL_INMAGE_UNSTACK_ALL)
			continue;
		if (cmd >> 30 == 0 && _IOC_TYPE(cmd) != FLT_IOCTL) /* not for a file system that is asked on the way */
			continue;
		char *arg = next() % 2 ? argument(room, size, argv[1]) : nearly(cmd, room + size - 8192, argv[1], out(&before) ? before.b.uHdr.Hdr.uliTransactionID : 0);
		if (cmd == IOCTL_INMAGE_STOP_FILTERING_DEVICE && arg + 128 <= room + size && !strcmp(arg, argv[1]) && next() % 8) /* it takes long, and what follows */
			continue;
		now = cmd;
		may_wait = cmd == IOCTL_INMAGE_WAIT_FOR_DB || cmd == IOCTL_INMAGE_WAIT_FOR_DB_V2;
		clock_set(may_wait ? 10 : 60000);
		int who = next() % 4 ? fd : other, r = ioctl(who, cmd, arg), err = r < 0 ? errno : 0;
		clock_set(60000); /* first: it may ring once more */
		may_wait = 0;
		if (r < -1 || r > 1 || err == ENOTCONN || err == ECONNABORTED || err == EIO) {
			printf("command %#lx returns %d, errno %d; %ld are left\n", cmd, r, err, i);
			return 1;
		}
		look(fd, &after);
		if (err && !same(&before, &after)) {
			printf("command %#lx fails with errno %d, and something is another; %ld are left\n", cmd, err, i);
			return 1;
		}
		failed += err != 0, compared += err && out(&before), committed += !err && cmd == IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS;
		if (after.err == EINVAL || after.err == EBUSY) { /* it was stopped */
			if (filter_as(fd, 2, argv[1], "fuzzed"))
				return 98;
			look(fd, &after);
		}
		before = after;
	}
	printf("%d failed, %d of them with a block out; %d blocks were committed\n", failed, compared, committed);
	return !compared;
}
