/* What the clients of /dev/blksnap share: one ioctl a function, and checks. */
#ifndef BLKSNAP_CLIENT_H
#define BLKSNAP_CLIENT_H
#include <assert.h>
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
#include <sys/sysmacros.h>
#include <unistd.h>
#include "blksnap.h"

#define MIB (1 << 20)
#define BLOCK 4096
#define AREA (8 * MIB) /* of a device that is looked at */

static int ctl, bad;

#define CHECK(what)                                                                                                \
	do {                                                                                                       \
		if (!(what)) {                                                                                     \
			printf("line %d: %s (errno %d %s)\n", __LINE__, #what, errno, strerror(errno));            \
			bad = 1;                                                                                   \
		}                                                                                                  \
	} while (0)
#define MUST(what)                          \
	do {                                \
		CHECK(what);                \
		if (bad)                    \
			exit(1);            \
	} while (0)
#define FAILS(call, with)            \
	do {                         \
		errno = 0;           \
		CHECK((call) == -1); \
		CHECK(errno == (with)); \
	} while (0)

static inline struct blk_snap_dev number(const char *path)
{
	struct stat st;
	MUST(!stat(path, &st) && S_ISBLK(st.st_mode));
	return (struct blk_snap_dev){ .mj = major(st.st_rdev), .mn = minor(st.st_rdev) };
}

static const struct blk_snap_dev nowhere = { .mj = 4095, .mn = 77 };

static inline void *block(void)
{
	void *p = aligned_alloc(BLOCK, AREA);
	MUST(p);
	return p;
}

static inline void fill(const char *path, off_t at, size_t n, int with)
{
	char *b = block();
	int fd = open(path, O_RDWR | O_DIRECT | O_SYNC);
	MUST(fd >= 0);
	memset(b, with, n);
	MUST(pwrite(fd, b, n, at) == (ssize_t)n);
	close(fd);
	free(b);
}

/* holds says whether n bytes of a device are all of one value. */
static inline int holds(const char *path, off_t at, size_t n, int with)
{
	unsigned char *b = block();
	int fd = open(path, O_RDONLY | O_DIRECT), same = 0;
	if (fd >= 0 && pread(fd, b, n, at) == (ssize_t)n) {
		same = 1;
		for (size_t i = 0; i < n && same; i++)
			same = b[i] == (unsigned char)with;
	}
	if (fd >= 0)
		close(fd);
	free(b);
	return same;
}

static inline struct blk_snap_uuid create(const struct blk_snap_dev *devs, int n)
{
	struct blk_snap_snapshot_create c = { .count = n, .dev_id_array = (void *)devs };
	MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &c));
	return c.id;
}

static inline int append(struct blk_snap_uuid id, struct blk_snap_dev dev, uint64_t sector, uint64_t count)
{
	struct blk_snap_block_range r = { sector, count };
	struct blk_snap_snapshot_append_storage a = { .id = id, .dev_id = dev, .count = 1, .ranges = &r };
	return ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &a);
}

static inline int event(struct blk_snap_uuid id, int ms, struct blk_snap_snapshot_event *e)
{
	memset(e, 0xaa, sizeof(*e));
	e->id = id;
	e->timeout_ms = ms;
	return ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT, e);
}

static inline void image_path(struct blk_snap_dev dev, char *path)
{
	sprintf(path, "/dev/" BLK_SNAP_IMAGE_NAME "%u", dev.mn);
}

static inline int tracked(struct blk_snap_cbt_info *info, int max)
{
	struct blk_snap_tracker_collect c = { .count = max, .cbt_info_array = info };
	if (ioctl(ctl, IOCTL_BLK_SNAP_TRACKER_COLLECT, &c))
		return -1;
	return c.count;
}

static inline int snapshots(struct blk_snap_uuid *ids, int max)
{
	struct blk_snap_snapshot_collect c = { .count = max, .ids = ids };
	if (ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT, &c))
		return -1;
	return c.count;
}

static inline int destroy(struct blk_snap_uuid id)
{
	return ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, &(struct blk_snap_snapshot_destroy){ id });
}

static inline int take(struct blk_snap_uuid id)
{
	return ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_TAKE, &(struct blk_snap_snapshot_take){ id });
}

static inline void image_of(struct blk_snap_uuid id, struct blk_snap_dev of, char *path)
{
	struct blk_snap_image_info info[4];
	struct blk_snap_snapshot_collect_images c = { .id = id, .count = 4, .image_info_array = info };
	MUST(!ioctl(ctl, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &c));
	for (unsigned i = 0; i < c.count; i++)
		if (!memcmp(&info[i].orig_dev_id, &of, sizeof(of)))
			image_path(info[i].image_dev_id, path);
}

static inline void print(struct blk_snap_uuid id)
{
	for (int i = 0; i < 16; i++)
		printf("%02x", id.b[i]);
	printf("\n");
}

static inline struct blk_snap_uuid parse(const char *s)
{
	struct blk_snap_uuid id = {};
	for (int i = 0; i < 16; i++)
		sscanf(s + 2 * i, "%2hhx", &id.b[i]);
	return id;
}

#endif
