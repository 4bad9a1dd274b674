// SPDX-License-Identifier: GPL-2.0
/* Processes: children of a target are targets from their first instruction; ends are cleaned up after. */
#include "probe.h"

/* sched:sched_process_fork(parent, child), in the parent's context */
int process_fork(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 parent = pid_tgid() >> 32;
	__u32 child = kernel_half(ctx->args[1] + OFF_TASK_TGID);
	struct bp_layout_entry *layout;
	unsigned char *byte;
	__u32 i, size, target;

	if (child == parent)
		return 0; /* a thread */
	byte = target_byte(child);
	if (!byte)
		return 0;
	target = is_target(parent);
	if (!target) {
		*byte = 0; /* the number of a target that is gone */
		return 0;
	}
	*byte = target;
	layout = map_lookup(MAP(LAYOUTS), &parent);
	if (layout && map_update(MAP(LAYOUTS), &child, layout, 0))
		*byte = 1;
	emit_process(PR_FORK, child, parent);
	size = fds_size();
#pragma clang loop unroll(disable)
	for (i = 0; i < FDS_AT_ONCE; i++) {
		__u64 key = fd_key(parent, i);
		struct bp_fd_entry *f;

		if (i >= size)
			break;
		f = map_lookup(MAP(FDS), &key);
		if (!f)
			continue;
		f->shared = 1;
		fd_set(child, i, f->object, f->kind, 1, f->many);
	}
	return 0;
}

/* sched:sched_process_exec(task, old_pid, bprm) */
int process_exec(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32, before = ctx->args[1];

	if (is_target(tgid)) {
		unsigned char *byte = target_byte(tgid);

		if (byte)
			*byte = 1; /* what runs in it is to be found out again */
		map_delete(MAP(LAYOUTS), &tgid);
		fds_forget(tgid, 0, ~0U); /* those that close on exec are gone without a close; the others are looked up again */
		if (before != tgid)
			map_delete(MAP(THREADS), &before); /* the thread that called has the leader's number now */
	} else if (!config(CFG_WATCH_EXEC)) {
		return 0;
	}
	emit_process(PR_EXEC, tgid, 0);
	return 0;
}

/* sched:sched_process_exit(task), in the task's own context */
int process_exit(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 id = pid_tgid();
	__u32 tgid = id >> 32, tid = id, i, size;
	struct thread *t;

	if (!is_target(tgid))
		return 0;
	t = map_lookup(MAP(THREADS), &tid);
	if (t) {
		work_flush(t);
		map_delete(MAP(THREADS), &tid);
	}
	if (kernel_half(kernel_word(current_task() + OFF_TASK_SIGNAL) + OFF_SIGNAL_LIVE))
		return 0; /* other threads go on */
	map_delete(MAP(LAYOUTS), &tgid);
	size = fds_size();
#pragma clang loop unroll(disable)
	for (i = 0; i < FDS_AT_ONCE; i++) {
		__u64 key = fd_key(tgid, i);
		struct bp_fd_entry *f;

		if (i >= size)
			break;
		f = map_lookup(MAP(FDS), &key);
		if (!f)
			continue;
		if (f->kind == FD_FILE)
			work_emit(0, f->object, 0, !f->shared);
		map_delete(MAP(FDS), &key);
	}
	emit_process(PR_EXIT, tgid, 0);
	return 0;
}
