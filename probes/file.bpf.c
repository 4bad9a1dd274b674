// SPDX-License-Identifier: GPL-2.0
/* File work, summed per file generation and request. Which files are storage and which are metadata is for user space. */
#include "probe.h"

#define O_CREAT_WRONLY_TRUNC 01101
#define F_DUPFD 0
#define F_DUPFD_CLOEXEC 1030
#define AT_FDCWD (-100)

/* The generation of a directory that a relative path is meant against, or 0. */
INLINE __u64 directory(__u32 tgid, __s32 dirfd)
{
	struct fd *f;

	if (dirfd < 0)
		return 0;
	f = fd_of(tgid, dirfd);
	return f && f->kind == FD_FILE ? f->object : 0;
}

/* Reads a path (and counts its NUL off); 0 where it cannot be read. */
INLINE __u32 path_read(char *into, __u64 from)
{
	long n = read_user_str(into, PATH_BYTES, (void *)from);

	if (n == PATH_BYTES)
		stat_add(ST_PATH_CUT, 1);
	return n > 1 ? n - 1 : 0;
}

int on_open(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32, n;
	struct thread *t = thread();
	struct scratch *x = scratch();
	long ret = ctx->args[1];
	struct bp_open_event *e;
	__u64 path;

	if (!t || !x || ret < 0)
		return 0;
	e = &x->open.e;
	path = t->a1;
	e->dirfd = t->a0;
	e->flags = t->a2;
	if (t->nr == NR_open || t->nr == NR_creat) {
		path = t->a0;
		e->dirfd = AT_FDCWD;
		e->flags = t->nr == NR_creat ? O_CREAT_WRONLY_TRUNC : t->a1;
	} else if (t->nr == NR_openat2) {
		__u64 flags = 0;

		read_user(&flags, sizeof(flags), (void *)t->a2); /* struct open_how begins with them */
		e->flags = flags;
	}
	e->h.kind = EV_OPEN;
	e->h.what = 0;
	e->h.tgid = tgid;
	e->h.ts = t->exit_ns;
	e->h.rid = t->rid;
	e->gen = unique();
	e->ns = t->took;
	e->tid = pid_tgid();
	e->fd = ret;
	fd_set(tgid, ret, e->gen, FD_FILE, 0);
	n = path_read(x->open.bytes, path);
	e->h.n = n;
	e->dirgen = n && x->open.bytes[0] != '/' ? directory(tgid, e->dirfd) : 0;
	BOUND(n, 2 * PATH_BYTES - 1);
	if (n <= PATH_BYTES)
		t->lost += emit(e, sizeof(*e) + n, ST_RING_FILE);
	return 0;
}

/* At the entry of close: the number may be another file's before the call returns. */
int on_close(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32;
	struct thread *t = thread();
	struct fd *f;
	__u64 key;

	if (!t)
		return 0;
	t->closing = 0;
	if (t->nr == NR_close) {
		key = fd_key(tgid, t->a0);
		f = map_lookup(MAP(FDS), &key);
		if (!f)
			return 0;
		if (f->kind == FD_FILE)
			t->closing = f->object;
		t->closing_last = !f->shared;
		map_delete(MAP(FDS), &key);
		return 0;
	}
	fds_forget(tgid, t->a0, t->a1); /* close_range: servers use it at start, to shed inherited descriptors */
	return 0;
}

/* read, write, sync, truncate, allocate and their families, on a file; calls that fail did no work */
int on_file(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	long ret = ctx->args[1];
	struct work *w;
	__u32 call;

	if (!t || ret < 0)
		return 0;
	w = work_of(t, t->object);
	if (!w)
		return 0;
	call = t->call;
	if (call == H_RECEIVE) {
		w->read_calls++;
		w->read_bytes += ret;
		w->read_ns += t->took;
	} else if (call == H_SEND) {
		w->write_calls++;
		w->write_bytes += ret;
		w->write_ns += t->took;
	} else if (call == H_SYNC) {
		w->syncs++;
		w->sync_ns += t->took;
	} else {
		w->others++;
		w->other_ns += t->took;
	}
	return 0;
}

/*
 * sendfile(out, in, ...), splice(in, _, out, ...), copy_file_range(in, _, out, ...): from one descriptor to another in one call.
 * The call's time goes to a file: written before read, and either before a socket, as the order of the phases has it.
 */
int on_transfer(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32, role, call = 0;
	struct thread *t = thread();
	long ret = ctx->args[1];
	__u64 sk = 0, descriptor = 0;
	struct work *w;
	struct fd *f;

	if (!t || ret < 0)
		return 0;
#pragma clang loop unroll(disable)
	for (role = 0; role < 2; role++) { /* 0: out, 1: in */
		__u64 number = role ? t->a0 : t->a2;

		if (t->nr == NR_sendfile)
			number = role ? t->a1 : t->a0;
		f = fd_of(tgid, number);
		if (!f)
			continue;
		if (f->kind == FD_SOCKET) {
			if (!call) {
				call = role ? H_RECEIVE : H_SEND;
				sk = f->object;
				descriptor = number;
			}
			continue;
		}
		if (f->kind != FD_FILE)
			continue;
		w = work_of(t, f->object);
		if (!w)
			continue;
		if (role) {
			w->read_calls++;
			w->read_bytes += ret;
			w->read_ns += t->took;
		} else {
			w->write_calls++;
			w->write_bytes += ret;
			w->write_ns += t->took;
		}
		t->took = 0;
	}
	if (!call)
		return 0;
	t->object = sk;
	t->a0 = descriptor;
	tail_call(ctx, MAP(HANDLERS), call);
	return 0;
}

int on_dup(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32;
	struct thread *t = thread();
	long ret = ctx->args[1];
	struct fd *f;
	__u64 key;

	if (!t || ret < 0)
		return 0;
	if (t->nr == NR_fcntl && t->a1 != F_DUPFD && t->a1 != F_DUPFD_CLOEXEC)
		return 0;
	key = fd_key(tgid, t->a0);
	f = map_lookup(MAP(FDS), &key);
	if (!f)
		return 0;
	f->shared = 1;
	fd_set(tgid, ret, t->object, t->kind, 1);
	return 0;
}

/* Calls on paths: rename, link, unlink, mkdir, chdir, truncate and their *at forms */
int on_path(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	struct scratch *x = scratch();
	struct bp_path_event *e;
	__u64 first, second = 0;
	__u32 tgid = pid_tgid() >> 32, nr, n, n2 = 0, what;

	if (!t || !x || (long)ctx->args[1] < 0)
		return 0;
	nr = t->nr;
	e = &x->path.e;
	e->dirfd = AT_FDCWD;
	e->dirfd2 = AT_FDCWD;
	first = t->a0;
	if (nr == NR_renameat || nr == NR_renameat2 || nr == NR_linkat) {
		e->dirfd = t->a0;
		first = t->a1;
		e->dirfd2 = t->a2;
		second = t->a3;
		what = nr == NR_linkat ? PC_LINK : PC_RENAME;
	} else if (nr == NR_rename || nr == NR_link) {
		second = t->a1;
		what = nr == NR_link ? PC_LINK : PC_RENAME;
	} else if (nr == NR_unlinkat || nr == NR_mkdirat) {
		e->dirfd = t->a0;
		first = t->a1;
		what = nr == NR_mkdirat ? PC_MKDIR : PC_UNLINK;
	} else if (nr == NR_mkdir) {
		what = PC_MKDIR;
	} else if (nr == NR_chdir) {
		what = PC_CHDIR;
	} else if (nr == NR_fchdir) {
		e->dirfd = t->a0;
		first = 0;
		what = PC_CHDIR;
	} else if (nr == NR_truncate) {
		what = PC_TRUNCATE;
	} else {
		what = PC_UNLINK;
	}
	e->h.kind = EV_PATH;
	e->h.what = what;
	e->h.tgid = tgid;
	e->h.ts = t->exit_ns;
	e->h.rid = t->rid;
	e->ns = t->took;
	e->tid = pid_tgid();
	n = first ? path_read(x->path.bytes, first) : 0;
	BOUND(n, PATH_BYTES - 1);
	if (second) {
		n2 = path_read(x->path.bytes + n, second);
		BOUND(n2, PATH_BYTES - 1);
	}
	e->h.n = n;
	e->n2 = n2;
	e->dirgen = directory(tgid, e->dirfd);
	e->dirgen2 = second ? directory(tgid, e->dirfd2) : 0;
	t->lost += emit(e, sizeof(*e) + n + n2, ST_RING_FILE);
	return 0;
}
