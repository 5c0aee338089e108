//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* The tap: sees every write to the disks of one group, puts it into the group's
 * ring with its payload or, where that cannot be, leaves a gap bit for each
 * block it touches. ARCHITECTURE.md tells the life of a write; the order of the
 * steps here is what docs/decisions/gap-and-fill.md relies on:
 *
 *   queue:  in flight -> change map -> ring record
 *   lost:   in flight (dropped) -> gap bits -> drop counter -> range record
 *   failed: gap bits -> drop counter
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "layout.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define OP_MASK 0xff
#define OP_WRITE 1
#define OP_DISCARD 3
#define OP_SECURE_ERASE 5
#define OP_WRITE_ZEROES 9
#define OP_DRV_IN 34
#define OP_DRV_OUT 35

/* Numbers of internal/block. */
#define BLOCK_WRITE 1
#define BLOCK_ZEROES 2
#define BLOCK_DISCARD 3

struct map_page {
	__u8 b[PAGE];
};

struct word_page {
	__u64 w[PAGE / 8];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, DISKS_MAX);
	__type(key, __u32);
	__type(value, struct whole);
} targets SEC(".maps");

/* The one of a group with one disk: most groups, and no hashing. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct whole);
} only SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DISKS_MAX);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct counters);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct map_page);
} change SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct word_page);
} gaps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, INFLIGHT_MAX);
	__type(key, __u64);
	__type(value, struct flight);
} inflight SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 << 10);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct map_page);
} scratch SEC(".maps");

/* The attached programs only jump through a table, so that an upgrade replaces
 * what they do without a moment in which nothing is attached. A table belongs
 * to one tracepoint: the kernel refuses to mix them. */
#define STUB(name, tracepoint)                                \
	struct {                                              \
		__uint(type, BPF_MAP_TYPE_PROG_ARRAY);        \
		__uint(max_entries, 1);                       \
		__type(key, __u32);                           \
		__type(value, __u32);                         \
	} to_##name SEC(".maps");                             \
	SEC("tp_btf/" #tracepoint) int stub_##name(void *ctx) \
	{                                                     \
		bpf_tail_call(ctx, &to_##name, 0);            \
		return 0;                                     \
	}

STUB(queue, block_bio_queue)
STUB(rq_complete, block_rq_complete)
STUB(bio_complete, block_bio_complete)
STUB(rq_issue, block_rq_issue)

static __always_inline struct state *get_state(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&state, &zero);
}

static __always_inline struct whole *get_whole(struct state *st, __u32 dev)
{
	__u32 zero = 0;
	if (!st->only)
		return bpf_map_lookup_elem(&targets, &dev);
	return st->only == dev ? bpf_map_lookup_elem(&only, &zero) : 0;
}

static __always_inline struct counters *get_counts(struct whole *w)
{
	__u32 slot = w->slot;
	return bpf_map_lookup_elem(&counts, &slot);
}

static __always_inline bool is_write(__u32 op)
{
	return op == OP_WRITE || op == OP_DISCARD || op == OP_SECURE_ERASE || op == OP_WRITE_ZEROES;
}

/* ---- change map and gap bits -------------------------------------------- */

/* A run of blocks. The loops take eight bytes or a word of bits at a step: a
 * discard can span a million blocks, and its submitter waits. */
struct run {
	__u64 at, end;
	__u32 number; /* for the change map */
};

static long change_step(__u32 i, struct run *r)
{
	__u32 page = r->at / PAGE, off = r->at & (PAGE - 1);
	if (r->at >= r->end)
		return 1;
	struct map_page *p = bpf_map_lookup_elem(&change, &page);
	if (!p)
		return 1;
	if (!(off & 7) && r->end - r->at >= 8) {
		*(__u64 *)&p->b[off & (PAGE - 8)] = (r->number & 0xff) * 0x0101010101010101ULL;
		r->at += 8;
	} else {
		p->b[off & (PAGE - 1)] = r->number;
		r->at++;
	}
	return 0;
}

/* mark_changed marks blocks first to last of t. */
static __always_inline void mark_changed(struct target *t, __u64 first, __u64 last, __u32 number)
{
	struct run r = { .at = t->change + first, .end = t->change + last + 1, .number = number };
	if (first == last)
		change_step(0, &r);
	else
		bpf_loop((last - first) / 8 + 15, change_step, &r, 0);
}

static long gap_step(__u32 i, struct run *r)
{
	__u64 word = r->at / 64, shift = r->at & 63, n = 64 - shift;
	__u32 page = word / (PAGE / 8);
	if (r->at >= r->end)
		return 1;
	if (n > r->end - r->at)
		n = r->end - r->at;
	struct word_page *p = bpf_map_lookup_elem(&gaps, &page);
	if (!p)
		return 1;
	__sync_fetch_and_or(&p->w[word & (PAGE / 8 - 1)], (~0ULL >> ((64 - n) & 63)) << shift);
	r->at += n;
	return 0;
}

/* set_gap marks the part of [sector, sector+count) that lies in t, as changed
 * and as a gap. It says whether there was one. */
static __always_inline bool set_gap(struct target *t, __u64 sector, __u64 count, __u32 number)
{
	__u64 from = sector > t->start ? sector : t->start;
	__u64 end = sector + count, tend = t->start + t->length;
	if (end > tend)
		end = tend;
	if (from >= end)
		return false;
	__u64 first = (from - t->start) >> t->shift, last = (end - 1 - t->start) >> t->shift;
	mark_changed(t, first, last, number);
	struct run r = { .at = t->gap * 64 + first, .end = t->gap * 64 + last + 1 };
	bpf_loop((last - first) / 64 + 2, gap_step, &r, 0);
	return true;
}

struct spread {
	struct whole *w;
	__u64 sector, count;
	__u32 hit;
	__u32 number;
};

static long spread_step(__u32 i, struct spread *s)
{
	struct whole *w = s->w;
	if (i >= TARGETS_MAX || i >= w->count)
		return 1;
	if (set_gap(&w->t[i], s->sector, s->count, s->number))
		s->hit++;
	return 0;
}

/* gap_all marks a range of the whole disk in every target that it meets, then counts
 * the drop. The counter comes last: who reads it may rely on the bits. Not static:
 * the verifier looks through such a function once and not at every call. */
__noinline int gap_all(__u32 dev, __u64 sector, __u64 count)
{
	struct state *st = get_state();
	if (!st)
		return 0;
	struct whole *w = get_whole(st, dev);
	if (!w)
		return 0;
	struct spread s = { .w = w, .sector = sector, .count = count, .number = st->change };
	bpf_loop(TARGETS_MAX, spread_step, &s, 0);
	if (s.hit)
		__sync_fetch_and_add(&st->drops, 1);
	return s.hit;
}

/* ---- a bio is queued ----------------------------------------------------- */

/* As in the kernel; its layout has been this since 2001 and is checked at start (internal/tap/kernel.go). */
struct vec {
	__u64 page;
	__u32 len;
	__u32 off;
};

struct walk {
	struct bpf_dynptr ptr;
	__u64 vecs;
	__u64 base;
	__u32 shift;
	__u32 index, done, left, out;
};

static long copy_step(__u32 i, struct walk *w)
{
	struct vec v;
	__u32 n, left = w->left;
	void *to;
	__u64 va;

	if (!left)
		return 1;
	if (bpf_probe_read_kernel(&v, sizeof(v), (void *)(w->vecs + (__u64)w->index * sizeof(v))))
		return 1;
	if (v.len <= w->done)
		return 1; /* an empty vector: nothing that we understand */
	va = (v.page << w->shift) + w->base + v.off + w->done;
	n = v.len - w->done;
	if (n > left)
		n = left;
	if (n >= PAGE) {
		n = PAGE;
		to = bpf_dynptr_data(&w->ptr, w->out, PAGE);
		if (!to || bpf_probe_read_kernel(to, PAGE, (void *)va))
			return 1;
	} else if (n >= 512) {
		n = 512;
		to = bpf_dynptr_data(&w->ptr, w->out, 512);
		if (!to || bpf_probe_read_kernel(to, 512, (void *)va))
			return 1;
	} else {
		__u32 zero = 0;
		to = bpf_map_lookup_elem(&scratch, &zero);
		if (!to)
			return 1;
		asm volatile("" : "+r"(n)); /* the verifier must see the mask */
		n &= 511;
		if (bpf_probe_read_kernel(to, n, (void *)va))
			return 1;
		if (bpf_dynptr_write(&w->ptr, w->out, to, n, 0))
			return 1;
	}
	w->out += n;
	w->left = left - n;
	w->done += n;
	if (w->done >= v.len) {
		w->index++;
		w->done = 0;
	}
	return 0;
}

/* A record's time is read before its place in the ring is reserved. So one whose
 * time is after an instant has its place after that instant, too, and so have all
 * behind it: what internal/protect/cut.go cuts several rings by. */
static __always_inline void fill_head(struct head *h, __u32 kind, struct target *t, __u32 op, __u64 sector, __u32 bytes, __u64 drops, __u64 now)
{
	h->kind = kind;
	h->disk = t->disk;
	h->op = op;
	h->consistency = 0;
	h->sector = sector - t->start;
	h->bytes = bytes;
	h->time = now;
	h->drops = drops;
	h->token = 0;
	h->payload = 0;
	h->reserved = 0;
	h->reserved2 = 0;
}

/* room says whether the ring takes a record of n bytes and still keeps what is
 * set aside. Another CPU may take it meanwhile: then the reserve fails. */
static __always_inline bool room(struct state *st, __u64 n, __u64 keep)
{
	if (keep > st->ring_size / 4)
		keep = st->ring_size / 4;
	return bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA) + n + 8 + keep <= st->ring_size;
}

enum { CAPTURED, NO_ROOM, UNREADABLE };

/* put_bare: a write without payload (zeroes, discard), or a lost one's range. */
static __always_inline int put_bare(struct target *t, __u32 kind, __u32 op, __u64 sector, __u32 bytes, __u64 drops)
{
	__u64 now = bpf_ktime_get_ns();
	struct head *h = bpf_ringbuf_reserve(&ring, sizeof(*h), 0);
	if (!h)
		return NO_ROOM;
	fill_head(h, kind, t, op, sector, bytes, drops, now);
	bpf_ringbuf_submit(h, BPF_RB_NO_WAKEUP);
	return CAPTURED;
}

/* put_page: the common case, one whole page. */
static __always_inline int put_page(struct state *st, struct target *t, __u64 sector, __u64 drops, __u64 va)
{
	__u64 now = bpf_ktime_get_ns();
	struct page_record *r = bpf_ringbuf_reserve(&ring, sizeof(*r), 0);
	if (!r)
		return NO_ROOM;
	fill_head(&r->h, KIND_WRITE, t, BLOCK_WRITE, sector, PAGE, drops, now);
	r->h.payload = PAGE;
	if (bpf_probe_read_kernel(r->data, PAGE, (void *)va)) {
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		return UNREADABLE;
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return CAPTURED;
}

static __always_inline int put_payload(struct state *st, struct target *t, struct bio *bio, __u64 sector, __u32 bytes, __u64 drops)
{
	struct walk w = {};
	struct head h = {};
	int result = CAPTURED;

	w.vecs = (__u64)bio->bi_io_vec;
	PLAIN(w.vecs);
	w.index = bio->bi_iter.bi_idx;
	w.done = bio->bi_iter.bi_bvec_done;
	w.base = st->va_base;
	w.shift = st->va_shift & 63;
	if (bytes == PAGE) {
		struct vec v;
		if (bpf_probe_read_kernel(&v, sizeof(v), (void *)(w.vecs + (__u64)w.index * sizeof(v))))
			return UNREADABLE;
		if (v.len >= PAGE && w.done <= v.len - PAGE)
			return put_page(st, t, sector, drops, (v.page << w.shift) + w.base + v.off + w.done);
	}
	__u64 now = bpf_ktime_get_ns();
	if (bpf_ringbuf_reserve_dynptr(&ring, sizeof(h) + bytes, 0, &w.ptr)) {
		bpf_ringbuf_discard_dynptr(&w.ptr, BPF_RB_NO_WAKEUP);
		return NO_ROOM;
	}
	w.left = bytes;
	w.out = sizeof(h);
	/* Each of at most 256 vectors can end in one piece below 512 bytes. */
	bpf_loop((bytes >> 9) * 2 + 256, copy_step, &w, 0);
	if (w.left) {
		bpf_ringbuf_discard_dynptr(&w.ptr, BPF_RB_NO_WAKEUP);
		return UNREADABLE;
	}
	fill_head(&h, KIND_WRITE, t, BLOCK_WRITE, sector, bytes, drops, now);
	h.payload = bytes;
	bpf_dynptr_write(&w.ptr, 0, &h, sizeof(h), 0);
	bpf_ringbuf_submit_dynptr(&w.ptr, BPF_RB_NO_WAKEUP);
	return result;
}

static __always_inline __u32 block_op(__u32 op)
{
	if (op == OP_WRITE)
		return BLOCK_WRITE;
	return op == OP_WRITE_ZEROES ? BLOCK_ZEROES : BLOCK_DISCARD;
}

static __always_inline int capture(struct state *st, struct target *t, struct bio *bio, __u32 op, __u64 sector, __u32 bytes, __u64 drops)
{
	if (op != OP_WRITE)
		return room(st, sizeof(struct head), RING_KEEP) ? put_bare(t, KIND_WRITE, block_op(op), sector, bytes, drops) : NO_ROOM;
	if (st->payload != PAYLOAD_YES)
		return UNREADABLE;
	if (bytes > st->payload_max || !room(st, sizeof(struct head) + bytes, RING_KEEP))
		return NO_ROOM;
	return put_payload(st, t, bio, sector, bytes, drops);
}

/* track puts a bio into the map of those in flight, in place of an older one
 * under its address: that one has ended. */
static __always_inline bool track(struct state *st, __u64 key, __u32 dev, __u64 sector, __u32 bytes, __u64 place, __u32 flags)
{
	struct flight f = { .place = place, .sector = sector, .left = bytes, .bytes = bytes, .whole = dev, .flags = flags };
	if (!bpf_map_update_elem(&inflight, &key, &f, BPF_ANY))
		return true;
	__sync_fetch_and_add(&st->inflight_full, 1); /* its end will be unknown, and a gap */
	return false;
}

struct find {
	struct whole *w;
	__u64 sector, end;
	__u32 at;
	__u32 met;
};

static long find_step(__u32 i, struct find *f)
{
	struct whole *w = f->w;
	if (i >= TARGETS_MAX || i >= w->count)
		return 1;
	struct target *t = &w->t[i];
	if (f->sector < t->start + t->length && t->start < f->end) {
		f->at = i;
		f->met++;
	}
	return 0;
}

SEC("tp_btf/block_bio_queue") int BPF_PROG(queue, struct bio *bio)
{
	__u32 op = bio->bi_opf & OP_MASK, bytes = bio->bi_iter.bi_size;
	if (!is_write(op) || !bytes)
		return 0;
	struct state *st = get_state();
	if (!st)
		return 0;
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	__u32 dev = disk->part0->bd_dev;
	struct whole *w = get_whole(st, dev);
	if (!w)
		return 0;
	struct counters *c = get_counts(w);
	if (!c)
		return 0;
	__u64 drops = *(volatile __u64 *)&st->drops;
	if (disk->diskseq != w->diskseq) {
		__sync_fetch_and_add(&c->foreign, 1);
		return 0;
	}
	__sync_fetch_and_add(&c->traced, bytes);
	__u64 sector = bio->bi_iter.bi_sector, count = bytes >> 9;
	struct find f = { .w = w, .sector = sector, .end = sector + count };
	if (w->count == 1)
		find_step(0, &f);
	else
		bpf_loop(TARGETS_MAX, find_step, &f, 0);
	bool map_only = st->payload == PAYLOAD_MAP;
	bool tracked = !map_only && (st->ends == ENDS_ON || w->bio_based);
	__u64 place = 0;
	if (tracked) {
		place = bpf_ringbuf_query(&ring, BPF_RB_PROD_POS);
		tracked = track(st, (__u64)bio, dev, sector, bytes, place, 0);
		if (tracked)
			__sync_fetch_and_add(&c->tracked, bytes);
	}
	if (!f.met || f.at >= TARGETS_MAX)
		return 0;
	struct target *t = &w->t[f.at];
	bool inside = f.met == 1 && sector >= t->start && sector + count <= t->start + t->length;
	int result = NO_ROOM;
	if (inside) {
		mark_changed(t, (sector - t->start) >> t->shift, (sector + count - 1 - t->start) >> t->shift, st->change);
		if (map_only)
			return 0;
		result = capture(st, t, bio, op, sector, bytes, drops);
	}
	if (result == CAPTURED) {
		__sync_fetch_and_add(&c->writes, 1);
		__sync_fetch_and_add(&c->bytes, bytes);
		return 0;
	}
	if (!map_only) {
		st->ends = ENDS_ON;
		if (!place)
			place = bpf_ringbuf_query(&ring, BPF_RB_PROD_POS);
		if (track(st, (__u64)bio, dev, sector, bytes, place, FLIGHT_DROPPED) && !tracked)
			__sync_fetch_and_add(&c->tracked, bytes);
	}
	__sync_fetch_and_add(&c->lost, 1);
	if (result == UNREADABLE)
		__sync_fetch_and_add(&c->unreadable, 1);
	gap_all(dev, sector, count);
	if (inside && room(st, sizeof(struct head), RING_KEEP / 2) &&
	    put_bare(t, KIND_LOST, block_op(op), sector, bytes, drops + 1) == CAPTURED)
		__sync_fetch_and_add(&st->lost_ranges, 1);
	return 0;
}

/* ---- a bio ends ---------------------------------------------------------- */

/* holds says whether sectors of a disk are part of what f was queued with. A
 * bio's bi_private is its parent where it was split; a file system chains bios
 * to their successors by the same field, and those are other sectors. */
static __always_inline bool holds(struct flight *f, __u32 dev, __u64 sector, __u64 count)
{
	return f->whole == dev && sector >= f->sector && sector + count <= f->sector + (f->bytes >> 9);
}

/* ended takes n bytes off a bio in flight; false: it is not in the map. */
static __always_inline bool ended(__u64 key, __u32 dev, __u64 sector, __u32 n)
{
	struct flight *f = bpf_map_lookup_elem(&inflight, &key);
	if (!f || !holds(f, dev, sector, n >> 9))
		return false;
	__s64 left = __sync_fetch_and_add(&f->left, -(__s64)n);
	if (left <= (__s64)n)
		bpf_map_delete_elem(&inflight, &key);
	return true;
}

/* Of a request: its bios' sectors, those that were not in the map, as one range
 * that holds them all (a merged discard has several), and how many bytes that was. */
struct ends {
	struct bio *bio;
	__u32 left, dev;
	bool look;
	__u64 from, end;
	__u64 old_from, old_end, old;
};

static long end_step(__u32 i, struct ends *e)
{
	struct bio *bio = e->bio;
	if (!bio || !e->left)
		return 1;
	__u64 sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
	__u32 n = BPF_CORE_READ(bio, bi_iter.bi_size);
	if (n > e->left)
		n = e->left;
	e->left -= n;
	__u64 end = sector + (n >> 9);
	if (sector < e->from)
		e->from = sector;
	if (end > e->end)
		e->end = end;
	if (e->look && !ended((__u64)bio, e->dev, sector, n) && !ended((__u64)BPF_CORE_READ(bio, bi_private), e->dev, sector, n)) {
		e->old += n;
		if (sector < e->old_from)
			e->old_from = sector;
		if (end > e->old_end)
			e->old_end = end;
	}
	e->bio = BPF_CORE_READ(bio, bi_next);
	return 0;
}

/* Some bio-based drivers (NVMe with several paths, md without statistics) hand
 * the very bio on to a disk below, and it ends there. */
struct below {
	struct bio *bio;
	__u32 left;
	__u8 error;
};

static long below_step(__u32 i, struct below *e)
{
	struct bio *bio = e->bio;
	if (!bio || !e->left)
		return 1;
	__u32 n = BPF_CORE_READ(bio, bi_iter.bi_size);
	if (n > e->left)
		n = e->left;
	e->left -= n;
	__u64 key = (__u64)bio;
	struct flight *f = bpf_map_lookup_elem(&inflight, &key);
	if (!f) { /* split below: the same sectors, where only the path differs */
		__u64 sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
		key = (__u64)BPF_CORE_READ(bio, bi_private);
		f = bpf_map_lookup_elem(&inflight, &key);
		if (f && !holds(f, f->whole, sector, n >> 9))
			f = 0;
	}
	if (f) {
		__u32 dev = f->whole;
		__u64 sector = f->sector, count = f->bytes >> 9;
		if (__sync_fetch_and_add(&f->left, -(__s64)n) <= (__s64)n)
			bpf_map_delete_elem(&inflight, &key);
		if (e->error)
			gap_all(dev, sector, count);
	}
	e->bio = BPF_CORE_READ(bio, bi_next);
	return 0;
}

#define BIOS_MAX (1 << 16) /* of one request */

SEC("tp_btf/block_rq_complete") int BPF_PROG(rq_complete, struct request *rq, __u8 error, unsigned int bytes)
{
	if (!is_write(rq->cmd_flags & OP_MASK) || !bytes)
		return 0;
	struct gendisk *disk = rq->q->disk;
	struct state *st = get_state();
	if (!disk || !st)
		return 0;
	__u32 dev = disk->part0->bd_dev;
	struct whole *w = get_whole(st, dev);
	if (!w) {
		struct below b = { .bio = rq->bio, .left = bytes, .error = error };
		if (st->remapped)
			bpf_loop(BIOS_MAX, below_step, &b, 0);
		return 0;
	}
	if (disk->diskseq != w->diskseq)
		return 0;
	struct counters *c = get_counts(w);
	if (!c)
		return 0;
	__u32 ends = st->ends;
	struct ends e = { .bio = rq->bio, .left = bytes, .dev = dev, .look = ends != ENDS_OFF, .from = ~0ULL, .old_from = ~0ULL };
	if (error || e.look)
		bpf_loop(BIOS_MAX, end_step, &e, 0);
	if (error) {
		__u64 from = rq->__sector, end = from + (bytes >> 9);
		if (e.end > end)
			end = e.end;
		if (e.from < from)
			from = e.from;
		if (gap_all(dev, from, end - from))
			__sync_fetch_and_add(&c->failed, 1);
	}
	if (ends == ENDS_ON && e.old && gap_all(dev, e.old_from, e.old_end - e.old_from))
		__sync_fetch_and_add(&c->unknown, 1);
	if (e.look && e.old < bytes)
		__sync_fetch_and_add(&c->tracked_ended, bytes - e.old);
	__sync_fetch_and_add(&c->ended, bytes);
	return 0;
}

/* Bio-based drivers end every bio here; on other disks only those come that
 * ended before they became requests. */
SEC("tp_btf/block_bio_complete") int BPF_PROG(bio_complete, struct request_queue *q, struct bio *bio)
{
	__u32 op = bio->bi_opf & OP_MASK;
	if (!is_write(op))
		return 0;
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	__u32 dev = disk->part0->bd_dev;
	struct state *st = get_state();
	if (!st)
		return 0;
	struct whole *w = get_whole(st, dev);
	if (!w || disk->diskseq != w->diskseq)
		return 0;
	if (op == OP_WRITE && !bio->bi_io_vec)
		return 0; /* a flush without data, which was not counted when it was queued */
	struct counters *c = get_counts(w);
	if (!c)
		return 0;
	__u64 key = (__u64)bio, sector = bio->bi_iter.bi_sector;
	__u32 bytes = bio->bi_iter.bi_size, ends = st->ends;
	__u8 status = bio->bi_status;
	struct flight *f = 0;
	bool old = true;
	if (ends != ENDS_OFF || w->bio_based) {
		/* Where it was advanced to its end, only the end of its range is known. */
		f = bpf_map_lookup_elem(&inflight, &key);
		if (f && holds(f, dev, sector, bytes >> 9)) {
			sector = f->sector;
			bytes = f->bytes;
			bpf_map_delete_elem(&inflight, &key);
			old = false;
		} else {
			key = (__u64)BPF_CORE_READ(bio, bi_private);
			f = bpf_map_lookup_elem(&inflight, &key);
			if (f && holds(f, dev, sector, bytes >> 9) && (bytes || sector > f->sector)) {
				/* A child. On a bio-based disk its parent ends here too, with its status. */
				if (w->bio_based)
					return 0;
				old = false;
				if (bytes) {
					ended(key, dev, sector, bytes);
				} else {
					sector = f->sector;
					bytes = f->bytes;
					bpf_map_delete_elem(&inflight, &key);
				}
			}
		}
	}
	if (!old)
		__sync_fetch_and_add(&c->tracked_ended, bytes);
	__sync_fetch_and_add(&c->ended, bytes);
	if (old) {
		if (!bytes && (status || ends == ENDS_ON || w->bio_based))
			__sync_fetch_and_add(&c->blind, 1);
	}
	if (status) {
		if (gap_all(dev, sector, bytes >> 9))
			__sync_fetch_and_add(&c->failed, 1);
	} else if (old && (ends == ENDS_ON || w->bio_based) && gap_all(dev, sector, bytes >> 9)) {
		__sync_fetch_and_add(&c->unknown, 1);
	}
	return 0;
}

/* ---- commands that are not bios ------------------------------------------- */

static __always_inline bool scsi_harmless(__u8 op)
{
	switch (op) {
	case 0x00: /* test unit ready */
	case 0x03: /* request sense */
	case 0x08: case 0x28: case 0x88: case 0xa8: /* read */
	case 0x12: /* inquiry */
	case 0x1a: case 0x5a: /* mode sense */
	case 0x1b: /* start stop */
	case 0x1e: /* prevent removal */
	case 0x25: case 0x9e: /* read capacity and kin */
	case 0x2f: case 0x8f: /* verify */
	case 0x35: case 0x91: /* synchronize cache */
	case 0x4d: /* log sense */
	case 0x5e: case 0x5f: /* persistent reserve */
	case 0xa0: /* report luns */
	case 0xa3: /* maintenance in */
		return true;
	}
	return false;
}

/* ATA commands inside SCSI ones, as tools for disk health send them. */
static __always_inline bool ata_harmless(__u8 op)
{
	switch (op) {
	case 0x2f: case 0x47: /* read log */
	case 0xa1: case 0xec: /* identify */
	case 0xb0: /* SMART */
	case 0xe0: case 0xe1: case 0xe2: case 0xe3: case 0xe5: case 0xe6: /* power */
	case 0xe7: case 0xea: /* flush cache */
	case 0xef: /* set features */
		return true;
	}
	return false;
}

static __always_inline bool nvme_harmless(__u8 op)
{
	switch (op) {
	case 0x00: /* flush */
	case 0x02: /* read */
	case 0x05: /* compare */
	case 0x0c: /* verify */
	case 0x0d: case 0x0e: case 0x11: case 0x15: /* reservations */
		return true;
	}
	return false;
}

static __always_inline bool nvme_admin_harmless(__u8 op)
{
	switch (op) {
	case 0x00: case 0x01: case 0x04: case 0x05: /* queues made and deleted */
	case 0x02: /* get log page */
	case 0x06: /* identify */
	case 0x08: /* abort */
	case 0x09: case 0x0a: /* features */
	case 0x0c: /* asynchronous event */
	case 0x10: case 0x11: /* firmware */
	case 0x14: /* self-test */
	case 0x18: /* keep alive */
	case 0x7c: /* doorbells */
		return true;
	}
	return false;
}

/* nvme_code gives the code of a request's NVMe command; false: it cannot be read. */
static __always_inline bool nvme_code(struct request *rq, __u32 offset, __u8 *code)
{
	__u64 cmd = 0, at = (__u64)rq + bpf_core_type_size(struct request) + offset;
	return !bpf_probe_read_kernel(&cmd, sizeof(cmd), (void *)at) && !bpf_probe_read_kernel(code, 1, (void *)cmd);
}

#define DISK_HIDDEN 2 /* GENHD_FL_HIDDEN */

/* An NVMe controller's own commands go through a queue without a disk, those of
 * a disk with several paths through the hidden disk of a path. Which disk they
 * mean is not told: they count for every NVMe disk of the group. */
static __always_inline void issued_beside(struct state *st, struct request *rq, struct gendisk *disk)
{
	__u8 code = 0;
	if (!st->nvme || (disk && !(disk->flags & DISK_HIDDEN)))
		return;
	if (!nvme_code(rq, st->nvme - 1, &code))
		return; /* another driver's */
	if (!(disk ? nvme_harmless(code) : nvme_admin_harmless(code)))
		__sync_fetch_and_add(&st->admin, 1);
}

SEC("tp_btf/block_rq_issue") int BPF_PROG(rq_issue, struct request *rq)
{
	__u32 op = rq->cmd_flags & OP_MASK;
	if (op != OP_DRV_IN && op != OP_DRV_OUT)
		return 0;
	struct state *st = get_state();
	if (!st)
		return 0;
	struct gendisk *disk = rq->q->disk;
	struct whole *w = disk ? get_whole(st, disk->part0->bd_dev) : 0;
	if (!w) {
		issued_beside(st, rq, disk);
		return 0;
	}
	struct counters *c = get_counts(w);
	if (!c || w->passthrough == PASS_NONE)
		return 0;
	__u8 code = 0, cdb[16];
	if (w->passthrough == PASS_SCSI) {
		__u64 at = (__u64)rq + bpf_core_type_size(struct request) + w->pass_offset;
		if (!bpf_probe_read_kernel(cdb, sizeof(cdb), (void *)at) &&
		    (scsi_harmless(cdb[0]) || (cdb[0] == 0x85 && ata_harmless(cdb[14])) || (cdb[0] == 0xa1 && ata_harmless(cdb[9]))))
			return 0;
	} else if (w->passthrough == PASS_NVME) {
		if (nvme_code(rq, w->pass_offset, &code) && nvme_harmless(code))
			return 0;
	} else if (op == OP_DRV_IN) {
		return 0;
	}
	__sync_fetch_and_add(&c->passthrough, 1);
	return 0;
}

/* ---- called by the daemon ------------------------------------------------- */

SEC("syscall") int bookmark(struct mark *m)
{
	struct state *st = get_state();
	if (!st)
		return 2;
	__u64 drops = *(volatile __u64 *)&st->drops;
	__u64 now = bpf_ktime_get_ns();
	struct bookmark_record *r = bpf_ringbuf_reserve(&ring, sizeof(*r), 0);
	if (!r)
		return 1;
	__builtin_memset(&r->h, 0, sizeof(r->h));
	r->h.kind = KIND_BOOKMARK;
	r->h.consistency = m->consistency;
	r->h.time = now;
	r->h.drops = drops;
	r->h.token = m->token;
	r->h.payload = m->length;
	__builtin_memcpy(r->name, m->name, sizeof(r->name));
	m->place = bpf_ringbuf_query(&ring, BPF_RB_PROD_POS);
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
}
