/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What programs and daemon share. A change here is a new LAYOUT. A daemon adopts
 * pins of an older one back to internal/tap's layoutOldest: as long as nothing
 * changes its meaning, and what is new comes out of reserved fields, whose zero
 * says that there is none. internal/tap holds the same structures in Go, with a
 * test that compares the sizes through BTF. */
#pragma once

#define LAYOUT 4
#define TARGETS_MAX 16	 /* protected ranges of one whole disk */
#define DISKS_MAX 64	 /* disks of a group */
#define INFLIGHT_MAX 65536
#define PAGE 4096
#define NAME_MAX 128
#define RING_KEEP (64 << 10) /* room that payloads leave for bookmarks and ranges; a quarter of a small ring */

enum kind {
	KIND_WRITE = 1,
	KIND_LOST = 2,
	KIND_BOOKMARK = 3,
};

/* One ring record: this, then the payload. */
struct head {
	__u32 kind;
	__u16 disk;
	__u8 op;
	__u8 consistency;
	__u64 sector; /* from the start of the target */
	__u64 bytes;
	__u64 time;  /* CLOCK_MONOTONIC, ns, read before the record's place was reserved */
	__u64 drops; /* the group's counter when the program began */
	__u64 token;
	__u32 payload;
	__u32 reserved;
	__u64 reserved2;
};

struct page_record {
	struct head h;
	__u8 data[PAGE];
};

struct bookmark_record {
	struct head h;
	char name[NAME_MAX];
};

/* Group-wide settings and counters; one element, mapped by the daemon. */
struct state {
	__u64 drops;	/* writes whose place in the stream is a gap */
	__u64 va_base;	/* address of a page = (struct page * << va_shift) + va_base */
	__u32 va_shift;
	__u32 payload;	/* enum below */
	__u32 ends;	/* enum below */
	__u32 change;	/* number written into the change map */
	__u64 payload_max;
	__u64 ring_size;
	__u64 lost_ranges;  /* lost writes that left a range in the ring */
	__u64 inflight_full;
	__u64 remapped; /* a disk of the group may end its bios as another disk's */
	__u32 only;	/* device number, where all targets are on one whole disk; else 0 */
	__u32 nvme;	/* 1 + pass_offset of NVMe commands, where a disk of the group is one; else 0 */
	__u64 admin;	/* NVMe commands of no disk that may have written, number */
	__u64 reserved[5];
};

enum {
	PAYLOAD_NO = 0, /* metadata mode: every write is lost, with its range */
	PAYLOAD_YES = 1,
	PAYLOAD_MAP = 2, /* nothing but the change map */
};

/* Tracking of bios in flight. A program that loses a write goes to ON, the
 * daemon from there to DRAIN, and to OFF when it has emptied the map. */
enum {
	ENDS_OFF = 0,
	ENDS_ON = 1,	/* every bio queued goes into the map; an end that is not in it is a gap */
	ENDS_DRAIN = 2, /* none goes in, those in it still come out */
};

struct target {
	__u64 start; /* sectors, on the whole disk */
	__u64 length;
	__u32 disk;
	__u32 shift; /* sector to block */
	__u64 change; /* first byte in the change map */
	__u64 gap;    /* first 64-bit word in the gap map */
};

struct whole {
	__u64 diskseq;
	__u32 count;
	__u32 bio_based;
	__u32 slot; /* of its counters */
	__u32 passthrough; /* enum below */
	__u32 pass_offset; /* bytes from the end of struct request to the command, or to its pointer */
	__u32 reserved;
	struct target t[TARGETS_MAX];
};

enum {
	PASS_UNKNOWN = 0, /* every outgoing passthrough command may have written */
	PASS_SCSI = 1,	  /* command bytes at pass_offset */
	PASS_NVME = 2,	  /* pointer to the command at pass_offset */
	PASS_NONE = 3,	  /* the driver has no passthrough that writes */
};

/* Counters of one whole disk; bytes unless named otherwise. tracked is counted
 * after traced, tracked_ended before ended: who reads them the other way round
 * sees too many untracked bytes on their way, never too few. */
struct counters {
	__u64 traced;	     /* queued as writes, all of the disk */
	__u64 ended;	     /* completed as writes, all of the disk */
	__u64 writes;	     /* captured, number */
	__u64 bytes;	     /* captured */
	__u64 lost;	     /* number */
	__u64 failed;	     /* number */
	__u64 unknown;	     /* ends of bios that were not in the map, number */
	__u64 foreign;	     /* writes to another disk under this number, number */
	__u64 passthrough;   /* commands that may have written, number */
	__u64 unreadable;    /* payloads that could not be read, number */
	__u64 blind;	     /* ends whose range cannot be told, number */
	__u64 tracked;	     /* of traced: with a place in the map of bios in flight */
	__u64 tracked_ended; /* of ended: those that were in it */
	__u64 level;	     /* (ended - tracked_ended) - (traced - tracked) at rest; the daemon's */
	__u64 level_known;   /* the daemon's */
	__u64 reserved;
};

#define FLIGHT_DROPPED 1

struct flight {
	__u64 place; /* producer position before the record was reserved */
	__u64 sector; /* on the whole disk */
	__s64 left;
	__u32 bytes;
	__u32 whole;
	__u32 flags;
	__u32 reserved;
};

struct mark {
	__u64 token;
	__u64 place; /* out: producer position after it */
	__u32 consistency;
	__u32 length;
	char name[NAME_MAX];
};

struct peek {
	__u64 addr;
	__u64 out[2];
};

/* What the calibration sees of a bio. */
struct sight {
	__u64 page;
	__u64 task;
	__u32 offset;
	__u32 length;
};
