// SPDX-License-Identifier: GPL-2.0
/* Every system call's entry and exit: the target filter first, then the handler of the call. */
#include "probe.h"

struct registers {
	__u64 r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax;
}; /* struct pt_regs from r14 on; its layout is part of the user ABI */

/* The thread's entry with the call's number and arguments in it. 0: no room. */
INLINE struct thread *entered(__u32 call, __u64 nr, struct registers *regs)
{
	struct thread *t = thread_made();

	if (!t)
		return 0;
	t->a0 = regs->di;
	t->a1 = regs->si;
	t->a2 = regs->dx;
	t->a3 = regs->r10;
	t->a4 = regs->r8;
	t->r14 = regs->r14;
	t->nr = nr;
	t->call = call;
	t->entered = 1;
	t->enter_ns = ktime_ns();
	return t;
}

/*
 * A gap is what a thread that has one request does between reading a piece of its body and reading or writing the next: there
 * are its digests. Other calls that it makes meanwhile are not in it.
 */
INLINE void gap_enter(struct thread *t, __u32 call)
{
	__u64 now = on_cpu(), ns = now - t->gap_from;

	if (call != H_RECEIVE && call != H_SEND) {
		t->gap_pause = now;
		return;
	}
	t->gap_from = 0;
	if (t->gap_cpu != cpu_id() || (__s64)ns < 0)
		return;
	t->gap_ns += ns;
	t->gap_bytes += t->gap_piece;
	t->gaps++;
}

/* What its thread read or wrote last tells of what a digest is. Short reads of files are metadata's: a row, a page. */
INLINE void transferred(struct thread *t, long bytes)
{
	if (bytes <= 0)
		return;
	if (t->call == H_SEND) {
		if (t->kind == FD_FILE)
			t->wrote = t->object;
		return;
	}
	if (t->kind != FD_SOCKET && (t->kind != FD_FILE || bytes <= TOKEN_WRITE))
		return;
	t->read = t->kind == FD_FILE ? t->object : 0;
	if (alone(t)) {
		t->gap_piece = bytes;
		t->gap_cpu = cpu_id();
		t->gap_from = on_cpu();
	}
}

int sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 nr = ctx->args[1], target = is_target(pid_tgid() >> 32);
	struct registers regs;
	struct thread *t;
	__u32 *call;
	__u64 delay;

	if (!target)
		return 0;
	call = map_lookup(MAP(CALLS), &nr);
	if (!call || !*call)
		return 0;
	if (read_kernel(&regs, sizeof(regs), (void *)(ctx->args[0] + 8)))
		return 0;
	t = entered(*call, nr, &regs);
	if (!t)
		return 0;
	t->runtime = target >> 1;
	if (t->runtime == RT_GO || t->runtime == RT_GO_CGO)
		t->loop = 1; /* goroutines change threads as they like */
	delay = run_delay();
	if (t->rid)
		t->runqueue_ns += delay - t->run_delay;
	t->run_delay = delay;
	if (t->gap_from)
		gap_enter(t, *call);
	if (*call == H_CLOSE)
		tail_call(ctx, MAP(HANDLERS), H_CLOSE); /* before the number can be used again */
	return 0;
}

/* A call ended that closed a descriptor of a file. */
INLINE void closed(struct thread *t)
{
	__u32 many = by_many(t, t->closing_many, t->closing);
	__u64 gen = t->closing, actor = actor_of(t, many);
	struct work *w = work_of(t, gen, actor, flags_of(t, many));

	if (w)
		w->other_ns += t->took;
	if (actor)
		work_emit(t, gen, 0, 0);
	work_emit(t, gen, actor, t->closing_last);
	t->closing = 0;
}

int sys_exit(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 id = pid_tgid();
	__u32 tid = id;
	struct thread *t;
	__u64 delay;
	__u32 call;

	if (!is_target(id >> 32))
		return 0;
	t = map_lookup(MAP(THREADS), &tid);
	if (!t) {
		/* The thread was in this call when it became a target: blocked in a read, say, that brings a request. */
		struct registers regs;
		__u32 nr, *handler;

		if (read_kernel(&regs, sizeof(regs), (void *)(ctx->args[0] + 8)))
			return 0;
		nr = regs.orig_ax;
		handler = map_lookup(MAP(CALLS), &nr);
		if (!handler || !*handler || *handler == H_CLOSE)
			return 0;
		t = entered(*handler, nr, &regs);
		if (!t)
			return 0;
		t->run_delay = run_delay();
	}
	if (!t->entered)
		return 0;
	call = t->call;
	t->entered = 0;
	delay = run_delay();
	t->delayed = delay - t->run_delay;
	t->run_delay = delay;
	t->exit_ns = ktime_ns();
	t->took = t->exit_ns - t->enter_ns;
	if (t->gap_from)
		t->gap_from += on_cpu() - t->gap_pause;
	if (call != H_WAIT)
		t->key = alone(t) ? 0 : task_key(t); /* what a thread does alone is its request's */
	if (call == H_CLOSE) {
		if (t->closing)
			closed(t);
		return 0;
	}
	if (call <= H_ON_DESCRIPTOR) {
		struct bp_fd_entry *f = fd_of(id >> 32, t->a0);

		if (!f)
			return 0;
		t->kind = f->kind;
		t->object = f->object;
		t->many = f->many;
		if (call == H_RECEIVE || call == H_SEND)
			transferred(t, ctx->args[1]);
		if (call != H_DUP) {
			if (t->kind == FD_FILE) {
				call = H_FILE;
			} else if (t->kind != FD_SOCKET || call > H_SEND) {
				if (call == H_SEND)
					work_flush(t); /* a pool's thread tells by a pipe or an eventfd that a piece of work is done */
				return 0;
			}
		}
	}
	tail_call(ctx, MAP(HANDLERS), call);
	return 0;
}

/* For the loader, which makes the maps: never run. */
int size_thread(void *ctx) { return sizeof(struct thread); }
int size_conn(void *ctx) { return sizeof(struct conn); }
int size_work(void *ctx) { return sizeof(struct work); }
int size_hash(void *ctx) { return sizeof(struct hash); }
int size_scratch(void *ctx) { return sizeof(struct scratch); }
