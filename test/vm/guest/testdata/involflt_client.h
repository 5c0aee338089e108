/* What the clients of /dev/involflt have in common. */
#ifndef INVOLFLT_CLIENT_H
#define INVOLFLT_CLIENT_H
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

/* the commands whose argument is a pointer to something */
#define WITH_POINTERS \
	IOCTL_INMAGE_START_FILTERING_DEVICE_V2, IOCTL_INMAGE_STOP_FILTERING_DEVICE, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS, \
	IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS, IOCTL_INMAGE_WAIT_FOR_DB, \
	IOCTL_INMAGE_WAIT_FOR_DB_V2, IOCTL_INMAGE_CLEAR_DIFFERENTIALS, IOCTL_INMAGE_GET_DB_NOTIFY_THRESHOLD, \
	IOCTL_INMAGE_RESYNC_START_NOTIFICATION, IOCTL_INMAGE_RESYNC_END_NOTIFICATION, IOCTL_INMAGE_GET_DRIVER_VERSION, \
	IOCTL_INMAGE_GET_GLOBAL_STATS, IOCTL_INMAGE_GET_VOLUME_STATS, IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST, \
	IOCTL_INMAGE_GET_ADDITIONAL_VOLUME_STATS, IOCTL_INMAGE_FREEZE_VOLUME, IOCTL_INMAGE_TAG_VOLUME_V2, IOCTL_INMAGE_THAW_VOLUME, \
	IOCTL_INMAGE_IOBARRIER_TAG_VOLUME, IOCTL_INMAGE_CREATE_BARRIER_ALL, IOCTL_INMAGE_REMOVE_BARRIER_ALL, \
	IOCTL_INMAGE_TAG_COMMIT_V2, IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY

static const char guid[] = "3f2504e0-4f89-11d3-9a0c-0305e82c3301";

static inline int control(void)
{
	int fd = open("/dev/involflt", O_RDWR | O_CLOEXEC);
	MUST(fd >= 0);
	return fd;
}

/* once opens, sends one command and closes, as the tools do. */
static inline int once(unsigned long cmd, void *arg)
{
	int fd = control(), r = ioctl(fd, cmd, arg), e = errno;
	close(fd);
	errno = e;
	return r;
}

static inline int filter_as(int fd, uint32_t type, const char *dev, const char *name)
{
	inm_dev_info_t i = { .d_type = type, .d_bsize = 512 };
	strcpy(i.d_guid, dev);
	strcpy(i.d_pname, name);
	return ioctl(fd, IOCTL_INMAGE_START_FILTERING_DEVICE_V2, &i);
}

/* filter gives the persistent name that all clients make of the device's. */
static inline int filter(int fd, const char *dev)
{
	char name[256];
	strcpy(name, dev);
	for (char *c = name; *c; c++)
		if (*c == '/')
			*c = '_';
	return filter_as(fd, 2, dev, name);
}

static inline int empty(const UDIRTY_BLOCK_V2 *b) { return !!(b->uHdr.Hdr.ulFlags & UDIRTY_BLOCK_FLAG_TSO_FILE); }

static inline int is_tag(const UDIRTY_BLOCK_V2 *b)
{
	return !b->uHdr.Hdr.cChanges && !(b->uHdr.Hdr.ulFlags & (UDIRTY_BLOCK_FLAG_TSO_FILE | UDIRTY_BLOCK_FLAG_DATA_FILE));
}

static inline int commit_id(int fd, uint64_t id)
{
	COMMIT_TRANSACTION c = { .ulTransactionID = id };
	return ioctl(fd, IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS, &c);
}

/* block waits until something is pending that is no tag. */
static inline void block(int fd, UDIRTY_BLOCK_V2 *b)
{
	for (int i = 0;; i++) {
		MUST(i < 3000);
		if (ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2, b)) {
			MUST(errno == EAGAIN);
		} else if (!empty(b)) {
			if (!is_tag(b))
				return;
			MUST(!commit_id(fd, b->uHdr.Hdr.uliTransactionID));
		}
		usleep(20000);
	}
}

/* drained has what there is committed, until the disk is in order and nothing is pending. It says how many tags there were. */
static inline int drained(int fd)
{
	UDIRTY_BLOCK_V2 b;
	for (int i = 0, tags = 0;; i++) {
		MUST(i < 3000);
		if (!ioctl(fd, IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS, &b)) {
			tags += is_tag(&b);
			MUST(!commit_id(fd, b.uHdr.Hdr.uliTransactionID));
			if (empty(&b) && b.uHdr.Hdr.eWOState == 3)
				return tags;
			if (!empty(&b))
				continue;
		} else {
			MUST(errno == EAGAIN);
		}
		usleep(20000);
	}
}

static inline void writes(const char *dev, off_t at, size_t n)
{
	static unsigned char with;
	char *b = malloc(n);
	int fd = open(dev, O_RDWR | O_SYNC | O_CLOEXEC);
	MUST(b && fd >= 0);
	memset(b, ++with, n);
	MUST(pwrite(fd, b, n, at) == (ssize_t)n);
	close(fd);
	free(b);
}

struct waiter {
	int fd, result, err;
	volatile pid_t tid;
	volatile int done;
	WAIT_FOR_DB_NOTIFY w;
	pthread_t t;
};

static inline void *waits(void *p)
{
	struct waiter *w = p;
	w->tid = gettid();
	w->result = ioctl(w->fd, IOCTL_INMAGE_WAIT_FOR_DB_V2, &w->w);
	w->err = errno;
	w->done = 1;
	return NULL;
}

/* within says whether a thread is in its ioctl. */
static inline int within(struct waiter *w)
{
	char path[64], text[256] = "";
	snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", w->tid);
	int fd = w->tid ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	int n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
	close(fd);
	return n > 0 && strstr(text, "0x4084fe42");
}

/* wait_in_thread returns when the thread waits, or has waited. */
static inline void wait_in_thread(struct waiter *w, int fd, const char *dev)
{
	memset(w, 0, sizeof(*w));
	w->fd = fd, w->w.Seconds = 600;
	strcpy(w->w.VolumeGUID, dev);
	MUST(!pthread_create(&w->t, NULL, waits, w));
	for (int i = 0; !w->done && !within(w); i++) {
		MUST(i < 6000);
		usleep(10000);
	}
}

/* wake wakes it, though it may be only on its way to its wait. */
static inline void wake(struct waiter *w, int fd)
{
	for (int i = 0; !w->done; i++) {
		MUST(i < 600 && !ioctl(fd, IOCTL_INMAGE_WAKEUP_ALL_THREADS));
		usleep(100000);
	}
	MUST(!pthread_join(w->t, NULL));
}
#endif
