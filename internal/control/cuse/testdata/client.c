/* A client of the device in cuse_test.go. It shares no code with the server. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define SUM 0x40085600u
#define FILL 0x80015601u
#define ERRNO 0x5602u
#define WAIT 0x5603u
#define PANIC 0x5604u
#define VALUE 0x5605u
#define KILL 0x5606u

struct sum {
	uint32_t n, pad;
	uint64_t *numbers, sum;
};
struct fill {
	void *to;
	uint64_t n;
	uint8_t with;
};

static int bad;
static const char *path;

#define CHECK(what)                                                                        \
	do {                                                                               \
		if (!(what)) {                                                             \
			printf("line %d: %s (errno %d %s)\n", __LINE__, #what, errno, strerror(errno)); \
			bad = 1;                                                           \
		}                                                                          \
	} while (0)
#define FAILS(call, with)                          \
	do {                                       \
		errno = 0;                         \
		CHECK((call) == -1);               \
		CHECK(errno == (with));            \
	} while (0)

static void memory(int fd)
{
	long page = sysconf(_SC_PAGESIZE);
	static uint64_t numbers[100000];
	uint64_t want = 0;
	for (int i = 0; i < 100000; i++)
		want += numbers[i] = i * 7919ull;
	struct sum s = { .n = 100000, .pad = 42, .numbers = numbers };
	CHECK(ioctl(fd, SUM, &s) == 1); /* 800,000 bytes: above what CUSE itself carries */
	CHECK(s.sum == want && s.n == 100000 && s.pad == 42 && s.numbers == numbers);
	s = (struct sum){ .n = 0, .numbers = 0, .sum = 9 };
	CHECK(ioctl(fd, SUM, &s) == 1 && s.sum == 0);
	s = (struct sum){ .n = 1, .numbers = (void *)8 };
	FAILS(ioctl(fd, SUM, &s), ENODATA);
	s = (struct sum){ .n = 0xffffffff, .numbers = numbers };
	FAILS(ioctl(fd, SUM, &s), E2BIG);
	FAILS(ioctl(fd, SUM, 0), EFAULT);
	FAILS(ioctl(fd, SUM, (void *)-1L), EFAULT);
	FAILS(ioctl(fd, SUM, (void *)0x7fffffffffffL), EFAULT);
	FAILS(ioctl(fd, SUM, (void *)0x8000000000000000UL), EFAULT);

	/* A structure that ends in the last byte of a page, with nothing after it. */
	char *m = mmap(0, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(m != MAP_FAILED);
	CHECK(!munmap(m + 2 * page, page));
	struct sum *edge = (struct sum *)(m + 2 * page - sizeof(*edge));
	*edge = (struct sum){ .n = 3, .numbers = numbers };
	CHECK(ioctl(fd, SUM, edge) == 1 && edge->sum == 3 * 7919);
	FAILS(ioctl(fd, SUM, (char *)edge + 8), EFAULT);
	/* Not aligned. */
	memcpy(m + 1, &(struct sum){ .n = 2, .numbers = numbers }, sizeof(s));
	CHECK(ioctl(fd, SUM, m + 1) == 1);

	/* What may not be written is not, and what may not be read neither. */
	CHECK(!mprotect(m, page, PROT_READ));
	CHECK(((struct sum *)(m + 64))->n == 0);
	FAILS(ioctl(fd, SUM, m + 64), EFAULT);
	struct fill f = { .to = m, .n = 1, .with = 1 };
	FAILS(ioctl(fd, FILL, &f), EFAULT);
	f = (struct fill){ .to = m + page - 1, .n = 2, .with = 9 };
	FAILS(ioctl(fd, FILL, &f), EFAULT);
	CHECK(m[page - 1] == 0 && m[page] != 9);
	CHECK(!mprotect(m, page, PROT_NONE));
	FAILS(ioctl(fd, SUM, m + 64), EFAULT);
	f = (struct fill){ .to = "constant", .n = 1, .with = 1 };
	FAILS(ioctl(fd, FILL, &f), EFAULT);

	/* Big answers, into memory that was never touched. */
	size_t n = 24 << 20;
	unsigned char *big = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	f = (struct fill){ .to = big + 1, .n = n - 2, .with = 0xa5 };
	CHECK(ioctl(fd, FILL, &f) == 0);
	CHECK(big[0] == 0 && big[1] == 0xa5 && big[n / 2] == 0xa5 && big[n - 2] == 0xa5 && big[n - 1] == 0);
	munmap(big, n);
	munmap(m, 2 * page);
}

static void errors(int fd)
{
	static const int some[] = { EPERM, ENOENT, EINTR, EIO, ENODATA, EALREADY, ENOTTY, ESRCH, ERANGE };
	for (unsigned i = 0; i < sizeof(some) / sizeof(*some); i++)
		FAILS(ioctl(fd, ERRNO, (long)some[i]), some[i]);
	FAILS(ioctl(fd, PANIC, 0), EIO);
	FAILS(ioctl(fd, 0x1234, 0), ENOTTY);
	FAILS(ioctl(fd, 0xffffffffu, -1L), ENOTTY);
	CHECK(ioctl(fd, VALUE, 0L) == 0);
	CHECK(ioctl(fd, VALUE, 123456L) == 123456);
	char c;
	FAILS(read(fd, &c, 1), EINVAL);
	FAILS(write(fd, &c, 1), EINVAL);
	CHECK(mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == ENODEV);
}

static void *waiter(void *fd)
{
	return (void *)(long)(ioctl((int)(long)fd, WAIT, 0) == -1 ? errno : 0);
}

static void *worker(void *fd)
{
	for (long i = 0; i < 300; i++)
		if (ioctl((int)(long)fd, VALUE, i) != i)
			return (void *)1;
	return 0;
}

static void nothing(int sig) { (void)sig; }

/* Many at a time on one descriptor, one of them waiting; a signal gets it out. */
static void threads(int fd)
{
	pthread_t w, t[8];
	void *r;
	struct sigaction a = { .sa_handler = nothing };
	sigaction(SIGUSR1, &a, 0);
	CHECK(!pthread_create(&w, 0, waiter, (void *)(long)fd));
	for (int i = 0; i < 8; i++)
		CHECK(!pthread_create(&t[i], 0, worker, (void *)(long)fd));
	for (int i = 0; i < 8; i++) {
		CHECK(!pthread_join(t[i], &r));
		CHECK(!r);
	}
	usleep(200000);
	CHECK(!pthread_kill(w, SIGUSR1));
	CHECK(!pthread_join(w, &r));
	CHECK((long)r == EINTR);
}

/* Descriptors that are inherited live until the last copy is closed; others may not open it. */
static void descriptors(int fd)
{
	pid_t child = fork();
	if (!child)
		_exit(ioctl(fd, VALUE, 7L) == 7 ? 0 : 1);
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	int copy = dup(fd);
	close(fd);
	CHECK(ioctl(copy, VALUE, 8L) == 8);
	close(copy);
	FAILS(ioctl(copy, VALUE, 8L), EBADF);
	child = fork();
	if (!child) {
		CHECK(!chmod(path, 0666));
		if (setuid(65534))
			_exit(2);
		_exit(open(path, O_RDWR) == -1 && errno == EACCES ? 0 : 1);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(!chmod(path, 0600));
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	path = argv[2];
	int fd = open(path, O_RDWR);
	if (fd < 0) {
		perror("open");
		return 1;
	}
	if (!strcmp(argv[1], "wait")) {
		char byte;
		int r = ioctl(fd, !strcmp(argv[3], "kill") ? KILL : WAIT, &byte);
		return r == -1 ? 0 : 1; /* the device has gone */
	}
	memory(fd);
	errors(fd);
	threads(fd);
	descriptors(fd);
	return bad;
}
