// SPDX-License-Identifier: GPL-2.0
/*
 * Digests, by uprobes in whatever computes them: when a call of the hash function begins and ends, and what came out. The bytes
 * that go in are never read. Attached by pid (see providers.py for where); these programs may be preempted, so nothing here is
 * kept per CPU, and sums are added to with a lock.
 */
#include "probe.h"

struct pt_regs {
	__u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
}; /* its layout is part of the user ABI */

#define NID_MD5 4
#define NID_SHA1 64
#define NID_SHA256 672
#define NID_SHA384 673
#define NID_SHA512 674

/* OpenSSL 3: members of struct evp_md_ctx_st; a struct evp_md_st begins with the algorithm's number. A self-test checks them. */
#define EVP_CTX_DIGEST 8
#define EVP_CTX_STATE 56
/* HACL*'s streaming state is two pointers and the number of bytes. */
#define HACL_BYTES 16
/* Go's sha256.digest: h [8]uint32, x [64]byte, nx int, len uint64, is224 bool */
#define GO_UNHASHED 96
#define GO_BYTES 104
#define GO_IS_224 112
#define GO_FINAL (1ULL << 32) /* a key that is of a digest being finished, not of calls */

INLINE struct bp_hashing_entry *hashing(void)
{
	__u32 tgid = pid_tgid() >> 32;

	return map_lookup(MAP(HASHING), &tgid);
}

/* A call of the hash function begins: on this state, for so many bytes. */
INLINE int begin(__u64 state, __u64 bytes)
{
	struct thread *t = thread_made();

	if (!t)
		return 0;
	t->hash_ctx = state;
	t->hash_bytes = bytes;
	t->hash_delay = run_delay();
	t->hash_sleeps = kernel_word(current_task() + OFF_TASK_SLEEPS);
	t->hash_ns = ktime_ns();
	return 0;
}

/*
 * ... and ends. It was on a CPU whenever it did not wait for one, unless it slept: hashing has no reason to, but while probes are put
 * on and taken off a probed thread may wait for the lock on its memory. That such a call is missing shows in the bytes.
 */
INLINE int end(struct thread *t)
{
	__u64 now = ktime_ns();
	struct bp_hashing_entry *sums = hashing();
	struct hash_key key = { pid_tgid() >> 32 };
	struct hash *h, fresh = {};
	__u64 ns;

	if (!t->hash_ns || !sums)
		return 0;
	ns = now - t->hash_ns - (run_delay() - t->hash_delay);
	t->hash_ns = 0;
	__sync_fetch_and_add(&sums->calls, 1);
	if ((__s64)ns < 0 || t->hash_sleeps != kernel_word(current_task() + OFF_TASK_SLEEPS))
		return 0;
	__sync_fetch_and_add(&sums->bytes, t->hash_bytes);
	__sync_fetch_and_add(&sums->ns, ns);
	t->hashed_ns += ns;
	t->hashes++;
	key.ctx = t->hash_ctx;
	h = map_lookup(MAP(HASHES), &key);
	if (h && !h->done) {
		h->ns += ns;
		h->bytes += t->hash_bytes;
		h->calls++;
		return 0;
	}
	fresh.ns = ns;
	fresh.bytes = t->hash_bytes;
	fresh.calls = 1;
	map_update(MAP(HASHES), &key, &fresh, 0);
	return 0;
}

/* EVP_DigestUpdate(state, bytes, length); of HACL*, the like */
int digest_update(struct pt_regs *ctx)
{
	return begin(ctx->di, ctx->dx);
}

int digest_updated(struct pt_regs *ctx)
{
	struct thread *t = thread();

	return t ? end(t) : 0;
}

/* A hash function without symbols: of how many bytes it is called for, nothing is known. */
int block_begin(struct pt_regs *ctx)
{
	return begin(0, 0);
}

/* EVP_MD_CTX_copy_ex(to, from): CPython finishes a copy. */
int digest_copied(struct pt_regs *ctx)
{
	struct hash_key from = { pid_tgid() >> 32, ctx->si }, to = { pid_tgid() >> 32, ctx->di };
	struct hash *h = map_lookup(MAP(HASHES), &from), copy = {};
	struct bp_hashing_entry *sums = hashing();

	if (sums)
		__sync_fetch_and_add(&sums->copies, 1);
	if (!h)
		return 0;
	copy.ns = h->ns;
	copy.bytes = h->bytes;
	copy.calls = h->calls;
	copy.of = h->of ? h->of : from.ctx;
	map_update(MAP(HASHES), &to, &copy, 0);
	return 0;
}

INLINE __u32 user_half(__u64 address)
{
	return user_word(address);
}

INLINE __u32 size_of(__u32 algorithm)
{
	switch (algorithm) {
	case NID_MD5:
		return 16;
	case NID_SHA1:
		return 20;
	case NID_SHA256:
		return 32;
	case NID_SHA384:
		return 48;
	case NID_SHA512:
		return 64;
	}
	return 0;
}

/* EVP_DigestFinal_ex(state, value, length) begins. */
int digest_final(struct pt_regs *ctx)
{
	struct thread *t = thread_made();
	__u64 state;

	if (!t)
		return 0;
	t->final_algorithm = user_half(user_word(ctx->di + EVP_CTX_DIGEST));
	t->final_to = size_of(t->final_algorithm) ? ctx->si : 0;
	if (!t->final_to)
		return 0;
	state = user_word(ctx->di + EVP_CTX_STATE);
	t->final_ctx = ctx->di;
	/* The state begins with the value so far, and goes on with the number of bits. */
	if (t->final_algorithm == NID_SHA384 || t->final_algorithm == NID_SHA512)
		t->final_bytes = user_word(state + 64) >> 3;
	else
		t->final_bytes = user_word(state + size_of(t->final_algorithm)) >> 3;
	return 0;
}

/* HACL*'s digest_256(state, value) begins. */
int hacl_final(struct pt_regs *ctx)
{
	struct thread *t = thread_made();

	if (!t)
		return 0;
	t->final_algorithm = NID_SHA256;
	t->final_to = ctx->si;
	t->final_ctx = ctx->di;
	t->final_bytes = user_word(ctx->di + HACL_BYTES);
	return 0;
}

/* A digest's value is there. `ctx`: of the state whose calls were timed. */
INLINE int finished(struct thread *t, __u64 key, __u64 ctx, __u64 bytes, __u32 algorithm, __u64 value)
{
	__u32 tgid = pid_tgid() >> 32, size = size_of(algorithm);
	struct hash_key of = { tgid, ctx };
	struct bp_hashing_entry *sums = hashing();
	struct {
		struct bp_digest_event e;
		unsigned char value[DIGEST_BYTES];
	} x = {};
	struct hash *h;

	BOUND(size, 127);
	if (!sums || !size || size > DIGEST_BYTES || read_user(x.value, size, (void *)value))
		return 0;
	__sync_fetch_and_add(&sums->digests, 1);
	h = map_lookup(MAP(HASHES), &of);
	if (h && !h->done) {
		x.e.ns = h->ns;
		x.e.timed_bytes = h->bytes;
		x.e.calls = h->calls;
		h->done = 1;
		if (h->of) {
			of.ctx = h->of;
			h = map_lookup(MAP(HASHES), &of);
			if (h)
				h->done = 1;
		}
	}
	if (sums->keeps) {
		read_kernel(sums->value, sizeof(sums->value), x.value);
		sums->bytes_hashed = bytes;
		sums->algorithm = algorithm;
	}
	if (!is_target(tgid))
		return 0; /* a self-test's */
	x.e.h.kind = EV_DIGEST;
	x.e.h.what = alone(t);
	x.e.h.n = size;
	x.e.h.tgid = tgid;
	x.e.h.ts = ktime_ns();
	x.e.h.rid = t->rid;
	x.e.bytes = bytes;
	x.e.key = key;
	x.e.read = t->read;
	x.e.wrote = t->wrote;
	x.e.ran_ns = on_cpu();
	x.e.tid = pid_tgid();
	x.e.algorithm = algorithm;
	emit(&x, sizeof(x), ST_RING_DIGEST);
	return 0;
}

int digest_finished(struct pt_regs *ctx)
{
	struct thread *t = thread();
	__u64 to;

	if (!t || !t->final_to)
		return 0;
	to = t->final_to;
	t->final_to = 0;
	return finished(t, alone(t) ? 0 : task_key(t), t->final_ctx, t->final_bytes, t->final_algorithm, to);
}

/*
 * Go: a goroutine may go on elsewhere at any moment, so that what is known of it is kept by its g, which is in R14. What it hashed
 * is added up by g, too: it finishes a copy of its digest on the stack.
 */
int go_begin(struct pt_regs *ctx)
{
	return begin(ctx->r14, ctx->cx);
}

/* The same where the function takes its arguments on the stack (before Go 1.24): the digest, the data and its length. */
int go_begin_stack(struct pt_regs *ctx)
{
	return begin(ctx->r14, user_word(ctx->sp + 16));
}

int go_end(struct pt_regs *ctx)
{
	struct thread *t = thread();

	return t && t->hash_ctx == ctx->r14 ? end(t) : 0;
}

/* (*digest).checkSum begins, in whose receiver is how many bytes were hashed; it says itself if it is one. */
int go_check(struct pt_regs *ctx)
{
	struct hash_key key = { pid_tgid() >> 32 | GO_FINAL, ctx->r14 };
	struct hash noted = {};

	noted.bytes = user_word(ctx->ax + GO_BYTES);
	if (user_word(ctx->ax + GO_UNHASHED) != (noted.bytes & 63) || user_word(ctx->ax + GO_IS_224) & 255)
		return 0;
	map_update(MAP(HASHES), &key, &noted, 0);
	return 0;
}

/* ... and has ended: its value is on top of the stack. */
int go_sum(struct pt_regs *ctx)
{
	struct hash_key key = { pid_tgid() >> 32 | GO_FINAL, ctx->r14 };
	struct hash *noted = map_lookup(MAP(HASHES), &key);
	struct thread *t = thread_made();
	__u64 bytes;

	if (!noted || !t)
		return 0;
	bytes = noted->bytes;
	map_delete(MAP(HASHES), &key);
	return finished(t, ctx->r14, ctx->r14, bytes, NID_SHA256, ctx->sp);
}
