//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* Finds out how a struct page's address leads to the memory behind it: "look"
 * notes the page of a write to a scratch disk, "peek" reads an address that the
 * daemon guesses, "fetch" a whole page at one. Loaded for a moment when a tap
 * starts. */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "layout.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

volatile const __u32 scratch_dev = 0;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sight);
} seen SEC(".maps");

struct fetched {
	__u8 b[PAGE];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fetched);
} fetched SEC(".maps");

SEC("tp_btf/block_bio_queue") int BPF_PROG(look, struct bio *bio)
{
	struct {
		__u64 page;
		__u32 len, off;
	} v = {};
	__u32 zero = 0;
	struct sight *s = bpf_map_lookup_elem(&seen, &zero);
	if (!s || (bio->bi_opf & 0xff) != 1 || !bio->bi_iter.bi_size || bio->bi_bdev->bd_dev != scratch_dev)
		return 0;
	__u64 vecs = (__u64)bio->bi_io_vec, index = bio->bi_iter.bi_idx;
	PLAIN(vecs);
	if (bpf_probe_read_kernel(&v, sizeof(v), (void *)(vecs + index * sizeof(v))))
		return 0;
	s->offset = v.off + bio->bi_iter.bi_bvec_done;
	s->length = v.len;
	s->task = bpf_get_current_task();
	s->page = v.page;
	return 0;
}

SEC("syscall") int peek(struct peek *p)
{
	__u64 v[2] = {};
	long err = bpf_probe_read_kernel(v, sizeof(v), (void *)p->addr);
	p->out[0] = v[0];
	p->out[1] = v[1];
	return err ? 1 : 0;
}

SEC("syscall") int fetch(struct peek *p)
{
	__u32 zero = 0;
	struct fetched *f = bpf_map_lookup_elem(&fetched, &zero);
	if (!f)
		return 1;
	return bpf_probe_read_kernel(f->b, PAGE, (void *)p->addr) ? 1 : 0;
}
