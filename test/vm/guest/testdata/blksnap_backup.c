/* A backup client of /dev/blksnap, as an agent for image backups works:
 *
 *   blksnap_backup FOLDER STORAGE FROM FIRST END DEV...
 *
 * It snapshots all devices together, and brings FOLDER/0.copy and so on up to
 * what the images are: all of it, or only the blocks that changed since the number and generation
 * noted beside the copy. Then it compares byte by byte, notes, and destroys the snapshot with the images open.
 *
 * Difference storage is STORAGE from FROM on, in MiB: up to FIRST as soon as it is asked
 * for, then what is asked for, up to END.
 *
 * It says what it does in lines, and goes on from "taken" and "copied" when it is
 * given one. A daemon that goes away in between is waited for. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "blksnap.h"

#define PIECE (1 << 20)
#define DEVICES 8

#define MUST(what)                                                                                      \
	do {                                                                                            \
		if (!(what)) {                                                                          \
			printf("line %d: %s (errno %d %s)\n", __LINE__, #what, errno, strerror(errno)); \
			exit(1);                                                                        \
		}                                                                                       \
	} while (0)

struct device {
	struct blk_snap_dev dev;
	struct blk_snap_cbt_info tracked;
	int image, copy;
	off_t size;
	volatile int spoiled; /* errno of the event */
};

static const char *folder;
static struct device devices[DEVICES];
static int ndevices;
static struct blk_snap_dev storage;
static uint64_t at, first, end; /* of the storage, sectors */
static struct blk_snap_uuid id;
static volatile int asked;

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static volatile int ctl = -1;

/* again opens the control device once more where it is still the one that is known to be gone. */
static void again(int gone)
{
	pthread_mutex_lock(&opening);
	for (int i = 0; ctl == gone; i++) {
		int fd = open(BLK_SNAP_CTL, O_RDWR | O_CLOEXEC);
		MUST(fd >= 0 || i < 6000);
		if (fd >= 0)
			ctl = fd; /* the other one stays open: somebody may be in it */
		else
			usleep(10000);
	}
	pthread_mutex_unlock(&opening);
}

static int call(unsigned long cmd, void *arg)
{
	for (;;) {
		int fd = ctl, r = ioctl(fd, cmd, arg);
		if (r >= 0 || (errno != ENOTCONN && errno != ECONNABORTED))
			return r;
		again(fd);
	}
}

static void append(uint64_t sectors)
{
	struct blk_snap_block_range ranges[2];
	struct blk_snap_snapshot_append_storage a = { .id = id, .dev_id = storage, .count = 2, .ranges = ranges };
	sectors &= ~15ull;
	if (sectors > end - at)
		sectors = end - at;
	if (!sectors)
		return;
	/* As the extents of a file are: more than one, and not in their order. */
	ranges[0] = (struct blk_snap_block_range){ at + sectors / 2, sectors / 2 };
	ranges[1] = (struct blk_snap_block_range){ at, sectors / 2 };
	MUST(!call(IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, &a));
	at += sectors;
}

static void *events(void *given)
{
	struct blk_snap_snapshot_event e;
	for (;;) {
		e = (struct blk_snap_snapshot_event){ .id = id, .timeout_ms = 500 };
		if (call(IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT, &e)) {
			if (errno == ESRCH)
				return NULL; /* destroyed */
			MUST(errno == ENOENT || errno == EINTR);
			continue;
		}
		MUST(!memcmp(&e.id, &id, sizeof(id)) && e.time_label > 0);
		if (e.code == blk_snap_event_code_low_free_space) {
			struct blk_snap_event_low_free_space low;
			memcpy(&low, e.data, sizeof(low));
			MUST(low.requested_nr_sect > 0);
			if (!asked++) {
				MUST(low.requested_nr_sect == 2097152);
				append(first);
				sem_post(given);
			} else
				append(low.requested_nr_sect);
			continue;
		}
		struct blk_snap_event_corrupted c;
		memcpy(&c, e.data, sizeof(c));
		MUST(e.code == blk_snap_event_code_corrupted && c.err_code > 0);
		int i = 0;
		while (i < ndevices && memcmp(&devices[i].dev, &c.orig_dev_id, sizeof(c.orig_dev_id)))
			i++;
		MUST(i < ndevices && !devices[i].spoiled);
		devices[i].spoiled = c.err_code;
	}
}

static struct blk_snap_dev number(const char *path)
{
	struct stat st;
	MUST(!stat(path, &st) && S_ISBLK(st.st_mode));
	return (struct blk_snap_dev){ .mj = major(st.st_rdev), .mn = minor(st.st_rdev) };
}

/* images opens them, by the name that has their minor number. */
static void images(void)
{
	struct blk_snap_image_info info[DEVICES];
	struct blk_snap_snapshot_collect_images c = { .id = id };
	char path[64];
	MUST(!access("/dev/" BLK_SNAP_IMAGE_NAME "0", F_OK)); /* before anything more is asked */
	MUST(!call(IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &c) && c.count == (unsigned)ndevices);
	c.image_info_array = info;
	MUST(!call(IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, &c));
	for (int i = 0; i < ndevices; i++) {
		int k = 0;
		while (k < ndevices && memcmp(&info[k].orig_dev_id, &devices[i].dev, sizeof(devices[i].dev)))
			k++;
		MUST(k < ndevices);
		sprintf(path, "/dev/" BLK_SNAP_IMAGE_NAME "%u", info[k].image_dev_id.mn);
		struct blk_snap_dev really = number(path);
		MUST(!memcmp(&really, &info[k].image_dev_id, sizeof(really)));
		devices[i].image = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
		MUST(devices[i].image >= 0);
		devices[i].size = lseek(devices[i].image, 0, SEEK_END);
		printf("image %s\n", path);
	}
}

static void tracked(void)
{
	struct blk_snap_tracker_collect c = {};
	MUST(!call(IOCTL_BLK_SNAP_TRACKER_COLLECT, &c) && c.count >= (unsigned)ndevices);
	c.cbt_info_array = calloc(c.count, sizeof(*c.cbt_info_array));
	MUST(!call(IOCTL_BLK_SNAP_TRACKER_COLLECT, &c));
	for (int i = 0; i < ndevices; i++) {
		unsigned k = 0;
		while (k < c.count && memcmp(&c.cbt_info_array[k].dev_id, &devices[i].dev, sizeof(devices[i].dev)))
			k++;
		MUST(k < c.count);
		devices[i].tracked = c.cbt_info_array[k];
		MUST(devices[i].tracked.device_capacity == (uint64_t)devices[i].size);
	}
	free(c.cbt_info_array);
}

/* map reads a change map, piece by piece and at once. */
static uint8_t *map(struct device *d)
{
	uint32_t n = d->tracked.blk_count;
	uint8_t *pieces = malloc(n + 1), *whole = malloc(n);
	struct blk_snap_tracker_read_cbt_bitmap m = { .dev_id = d->dev, .length = 1000 };
	while (m.offset < n) {
		m.buff = pieces + m.offset;
		int r = call(IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m);
		MUST(r > 0 && (r == 1000 || m.offset + r == n));
		m.offset += r;
	}
	m = (struct blk_snap_tracker_read_cbt_bitmap){ .dev_id = d->dev, .length = n, .buff = whole };
	MUST(call(IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, &m) == (int)n && !memcmp(whole, pieces, n));
	free(pieces);
	return whole;
}

static char *buffer(void)
{
	char *b = aligned_alloc(4096, PIECE);
	MUST(b);
	return b;
}

/* part is a read of an image. A spoiled one cannot be read; 0: it is. */
static int part(struct device *d, char *b, off_t off, size_t n)
{
	ssize_t r = pread(d->image, b, n, off);
	if (r == (ssize_t)n)
		return 1;
	int why = errno;
	for (int i = 0; i < 1000 && !d->spoiled; i++)
		usleep(10000); /* the event is on its way */
	errno = why;
	MUST(r < 0 && (errno == ENOSPC || errno == EIO) && d->spoiled == ENOSPC);
	return 0;
}

struct note {
	struct blk_snap_uuid generation;
	unsigned number;
};

/* backup brings a copy up to the image; 0: the image is spoiled. */
static int backup(int i)
{
	struct device *d = &devices[i];
	char name[4096], *b = buffer(), *c = buffer();
	struct note was = {}, now = { d->tracked.generation_id, d->tracked.snap_number };
	snprintf(name, sizeof(name), "%s/%d.copy", folder, i);
	d->copy = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	MUST(d->copy >= 0 && !ftruncate(d->copy, d->size));
	snprintf(name, sizeof(name), "%s/%d.note", folder, i);
	int note = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	MUST(note >= 0);
	int some = read(note, &was, sizeof(was)) == sizeof(was) && !memcmp(&was.generation, &now.generation, sizeof(now.generation));
	off_t copied = 0, step = PIECE;
	uint8_t *m = NULL;
	if (some) {
		MUST(was.number > 0 && was.number <= now.number);
		m = map(d);
		step = d->tracked.blk_size;
		MUST(step <= PIECE);
	}
	int sound = 1;
	for (off_t off = 0; off < d->size && sound; off += step) {
		if (some && m[off / step] <= was.number)
			continue;
		size_t n = off + step > d->size ? d->size - off : step;
		sound = part(d, b, off, n);
		MUST(!sound || pwrite(d->copy, b, n, off) == (ssize_t)n);
		copied += n;
	}
	for (off_t off = 0; off < d->size && sound; off += PIECE) { /* while writers go on */
		size_t n = off + PIECE > d->size ? d->size - off : PIECE;
		MUST(pread(d->copy, c, n, off) == (ssize_t)n);
		sound = part(d, b, off, n);
		if (sound && memcmp(b, c, n)) {
			for (size_t k = 0; k < n; k += 4096)
				if (memcmp(b + k, c + k, n - k < 4096 ? n - k : 4096)) {
					printf("copy %d is not the image at %lld (of %s, number %u, %u before)\n", i, (long long)off + (long long)k, some ? "some" : "all", now.number, was.number);
					exit(1);
				}
		}
	}
	if (sound) {
		MUST(!fsync(d->copy) && pwrite(note, &now, sizeof(now), 0) == sizeof(now));
		printf("backup %d %s %lld %lld\n", i, some ? "incremental" : "full", (long long)copied, (long long)d->size);
	} else
		printf("backup %d spoiled\n", i);
	close(note);
	close(d->copy);
	free(b), free(c), free(m);
	return sound;
}

static void wait_for_line(void)
{
	char line[16];
	MUST(fgets(line, sizeof(line), stdin));
}

int main(int argc, char **argv)
{
	struct blk_snap_dev devs[DEVICES];
	sem_t given;
	pthread_t listener;
	setvbuf(stdout, NULL, _IOLBF, 0);
	MUST(argc > 6 && argc <= 6 + DEVICES);
	folder = argv[1];
	storage = number(argv[2]);
	at = strtoull(argv[3], NULL, 0) * 2048, first = strtoull(argv[4], NULL, 0) * 2048 - at, end = strtoull(argv[5], NULL, 0) * 2048;
	for (; ndevices < argc - 6; ndevices++)
		devs[ndevices] = devices[ndevices].dev = number(argv[6 + ndevices]);
	ctl = open(BLK_SNAP_CTL, O_RDWR | O_CLOEXEC);
	struct blk_snap_version v;
	MUST(ctl >= 0 && !call(IOCTL_BLK_SNAP_VERSION, &v) && v.major == 1);
	struct blk_snap_snapshot_create create = { .count = ndevices, .dev_id_array = devs };
	MUST(!call(IOCTL_BLK_SNAP_SNAPSHOT_CREATE, &create));
	id = create.id;
	MUST(!sem_init(&given, 0, 0) && !pthread_create(&listener, NULL, events, &given));
	while (sem_wait(&given))
		;
	MUST(!call(IOCTL_BLK_SNAP_SNAPSHOT_TAKE, &(struct blk_snap_snapshot_take){ id }));
	images();
	printf("taken ");
	for (int i = 0; i < 16; i++)
		printf("%02x", id.b[i]);
	printf("\n");
	wait_for_line();
	tracked();
	for (int i = 0; i < ndevices; i++)
		backup(i);
	printf("copied after %d requests for storage\n", asked);
	wait_for_line();
	MUST(!call(IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, &(struct blk_snap_snapshot_destroy){ id }));
	MUST(!pthread_join(listener, NULL));
	char *b = buffer();
	for (int i = 0; i < ndevices; i++) {
		MUST(pread(devices[i].image, b, 4096, 0) <= 0);
		close(devices[i].image);
	}
	printf("destroyed\n");
	return 0;
}
