// SPDX-License-Identifier: GPL-2.0
/* File work, summed per file generation and request. Which files are storage and which are metadata is for user space. */
#include "probe.h"

#define O_CREAT_WRONLY_TRUNC 01101
#define F_DUPFD 0
#define F_DUPFD_CLOEXEC 1030
#define AT_FDCWD (-100)
#define O_ACCMODE 03
#define O_EXCL 0200
#define O_TRUNC 01000
#define O_DIRECTORY 0200000
#define O_TMPFILE 020000000
#define MAP_ANONYMOUS 0x20

/* The generation of a directory that a relative path is meant against, or 0. */
INLINE __u64 directory(__u32 tgid, __s32 dirfd)
{
	struct bp_fd_entry *f;

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

/* A file that is written and was neither made nor emptied by this open may be many requests': a database, a log. */
INLINE __u32 use_of(__u32 flags)
{
	if (!(flags & O_ACCMODE))
		return USE_READ;
	return flags & (O_EXCL | O_TRUNC | O_TMPFILE) ? USE_ONE : USE_MANY;
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
	e->h.what = alone(t);
	e->h.tgid = tgid;
	e->h.ts = t->exit_ns;
	e->h.rid = t->rid;
	e->gen = unique();
	e->ns = t->took;
	if (!(e->flags & O_ACCMODE) && (mode_of(file_of(ret)) & S_IFMT) == S_IFDIR)
		e->flags |= O_DIRECTORY; /* one may be opened to be listed without a word of it */
	e->key = t->key;
	e->tid = pid_tgid();
	e->fd = ret;
	fd_set(tgid, ret, e->gen, FD_FILE, 0, use_of(e->flags));
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
	struct bp_fd_entry *f;
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
		t->closing_many = f->many;
		map_delete(MAP(FDS), &key);
		return 0;
	}
	fds_forget(tgid, t->a0, t->a1); /* close_range: servers use it at start, to shed inherited descriptors */
	return 0;
}

INLINE int is_plain(__u32 nr)
{
	return nr == NR_read || nr == NR_write || nr == NR_pread64 || nr == NR_pwrite64;
}

INLINE int is_vectored(__u32 nr)
{
	return nr == NR_readv || nr == NR_writev || nr == NR_preadv || nr == NR_preadv2 || nr == NR_pwritev || nr == NR_pwritev2;
}

/* The first piece of memory that a call on a file read into or wrote from, of the bytes that it moved; 0 where it has none. */
INLINE __u64 memory(struct thread *t, __u64 *length)
{
	struct vector first = {};

	if (is_plain(t->nr))
		return t->a1;
	if (!is_vectored(t->nr))
		return 0;
	read_user(&first, sizeof(first), (void *)t->a1);
	if (*length > first.length)
		*length = first.length;
	return first.base;
}

#define PRINTED_VECTORS 4 /* of a call, in which PRINT_BYTES are looked for */

/* The fingerprint of what a call on a file moved, while it is not of enough. */
INLINE void print_file(struct thread *t, struct work *w, __u64 left)
{
	__u32 i;

	if (is_plain(t->nr)) {
		print_add(&w->print, &w->printed, t->a1, left);
		return;
	}
	if (!is_vectored(t->nr)) {
		w->printed = PRINT_UNKNOWN;
		return;
	}
#pragma clang loop unroll(disable)
	for (i = 0; i < PRINTED_VECTORS; i++) {
		struct vector v = {};

		OPAQUE(i);
		if (i >= PRINTED_VECTORS || !left || w->printed >= PRINT_BYTES)
			break;
		read_user(&v, sizeof(v), (void *)(t->a1 + i * sizeof(v)));
		if (v.length > left)
			v.length = left;
		print_add(&w->print, &w->printed, v.base, v.length);
		left -= v.length;
	}
	if (left && w->printed < PRINT_BYTES)
		w->printed = PRINT_UNKNOWN;
}

/* Bytes went to or from a file. One request's file may have several threads at once: hence the locked additions. */
INLINE void moved(struct thread *t, struct work *w, __u32 read, __u64 bytes)
{
	if (read) {
		__sync_fetch_and_add(&w->read_calls, 1);
		__sync_fetch_and_add(&w->read_bytes, bytes);
		__sync_fetch_and_add(&w->read_ns, t->took);
	} else {
		__sync_fetch_and_add(&w->write_calls, 1);
		__sync_fetch_and_add(&w->write_bytes, bytes);
		__sync_fetch_and_add(&w->write_ns, t->took);
	}
	w->last_ns = t->exit_ns;
	if (bytes)
		w->data_ns = t->exit_ns;
}

/*
 * Work on a file of many requests is sent when its thread answers one, or turns to another, or tells that it is done. Of a thread
 * that does none of this in a way that can be seen, each call is sent by itself, as is that of a goroutine, which may go on elsewhere.
 */
INLINE int at_once(struct thread *t, __u32 many)
{
	return many && (!t->talks || t->runtime == RT_GO || t->runtime == RT_GO_CGO);
}

/* The end of a call that moved bytes of a file which may be anybody's: what is known is sent where no better time will come. */
INLINE void file_done(struct bpf_raw_tracepoint_args *ctx, struct thread *t, struct work *w, __u64 actor, __u32 many)
{
	long ret = ctx->args[1];
	__u32 done = at_once(t, many), small;

	small = t->call == H_SEND && ret >= TOKEN_WINDOW && ret <= TOKEN_WRITE && (many || (w->write_calls == 1 && !(w->flags & FF_CONTINUES)));
	if (!actor && t->call == H_RECEIVE && !ret) {
		w->flags |= FF_DRAINED;
		done = 1;
	}
	OPAQUE(done);
	if (done)
		work_emit(t, t->object, actor, 0);
	if (small && t->runtime != RT_GO)
		tail_call(ctx, MAP(HANDLERS), H_TOKENS);
}

/* read, write, sync, truncate, allocate and their families, on a file; calls that fail did no work */
int on_file(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	long ret = ctx->args[1];
	struct work *w;
	__u32 call, many;
	__u64 actor;

	if (!t || ret < 0)
		return 0;
	many = by_many(t, t->many, t->object);
	actor = actor_of(t, many);
	w = work_of(t, t->object, actor, flags_of(t, many));
	if (!w)
		return 0;
	blend(t, w);
	call = t->call;
	if (call == H_RECEIVE || call == H_SEND) {
		moved(t, w, call == H_RECEIVE, ret);
		if (alone(t))
			return 0; /* no need to find out whose it is */
		if (w->printed < PRINT_BYTES && !(w->flags & FF_CONTINUES) && (call == H_SEND ? !w->read_bytes : !w->write_bytes))
			tail_call(ctx, MAP(HANDLERS), H_PRINT);
		file_done(ctx, t, w, actor, many);
		return 0;
	}
	w->last_ns = t->exit_ns;
	if (call == H_SYNC) {
		__sync_fetch_and_add(&w->syncs, 1);
		__sync_fetch_and_add(&w->sync_ns, t->took);
	} else {
		__sync_fetch_and_add(&w->others, 1);
		__sync_fetch_and_add(&w->other_ns, t->took);
	}
	if (at_once(t, many))
		work_emit(t, t->object, actor, 0);
	return 0;
}

/* The first bytes of a file leave their fingerprint. */
int on_print(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	struct work_key key = {};
	struct work *w;
	__u32 many;

	if (!t)
		return 0;
	many = by_many(t, t->many, t->object);
	key.gen = t->object;
	key.actor = actor_of(t, many);
	w = map_lookup(MAP(WORK), &key);
	if (!w)
		return 0;
	print_file(t, w, ctx->args[1]);
	file_done(ctx, t, w, key.actor, many);
	return 0;
}

/* Pages of a table's rows and of an index's (https://sqlite.org/fileformat2.html#b_tree_pages) */
#define SQLITE_TABLE_LEAF 0x0d
#define SQLITE_INDEX_LEAF 0x0a
#define SQLITE_ROW 192

/*
 * A small write may name the request that it is for: a sidecar, a row of an index. The set of its pieces is sent, keyed and hashed, so
 * that user space can ask whether a name is in it, and no text leaves the kernel. Of a database's page, the newest row is looked at.
 */
int on_tokens(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	struct scratch *x = scratch();
	__u64 length = ctx->args[1], address, window = 0, secret;
	struct bp_tokens_event *e;
	unsigned char page[8] = {};
	__u32 i, n;

	if (!t || !x)
		return 0;
	address = memory(t, &length);
	if (!address || read_user(page, sizeof(page), (void *)address))
		return 0;
	if (length >= 512 && (page[0] == SQLITE_TABLE_LEAF || page[0] == SQLITE_INDEX_LEAF)) {
		__u32 newest = page[5] << 8 | page[6];

		if (newest >= length)
			return 0;
		address += newest;
		length -= newest;
		if (length > SQLITE_ROW)
			length = SQLITE_ROW; /* the next may be another request's */
	}
	n = length < TOKEN_BYTES ? length : TOKEN_BYTES;
	BOUND(n, 2 * TOKEN_BYTES - 1);
	if (n > TOKEN_BYTES || read_user(x->text, n, (void *)address))
		return 0;
	read_kernel(x->tokens.set, sizeof(x->tokens.set), x->zeroes);
	secret = config(CFG_SECRET);
#pragma clang loop unroll(disable)
	for (i = 0; i < TOKEN_BYTES; i++) {
		__u64 hash;

		OPAQUE(i);
		if (i >= n || i >= TOKEN_BYTES)
			break;
		window = (window << 8 | x->text[i]) & ((1ULL << 8 * TOKEN_WINDOW) - 1);
		hash = window * secret;
		hash = (hash ^ hash >> 32) * secret;
		hash >>= 52; /* TOKEN_BITS is 2^12 */
		if (i >= TOKEN_WINDOW - 1)
			x->tokens.set[(hash >> 6) & (TOKEN_BITS / 64 - 1)] |= 1ULL << (hash & 63);
	}
	read_kernel(x->text, sizeof(x->text), x->zeroes);
	e = &x->tokens.e;
	e->h.kind = EV_TOKENS;
	e->h.what = 0;
	e->h.n = sizeof(x->tokens.set);
	e->h.tgid = pid_tgid() >> 32;
	e->h.ts = t->exit_ns;
	e->h.rid = t->rid;
	e->gen = t->object;
	e->key = t->key;
	e->tid = pid_tgid();
	e->size = ctx->args[1];
	emit(&x->tokens, sizeof(x->tokens), ST_RING_TOKENS);
	return 0;
}

/* mmap of a file: what is read or written through it has no calls */
int on_map(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32;
	struct thread *t = thread();
	struct bp_map_event e = {};
	struct bp_fd_entry *f;
	long ret = ctx->args[1];

	if (!t || t->a3 & MAP_ANONYMOUS || (ret < 0 && ret > -4096))
		return 0;
	f = fd_of(tgid, t->a4);
	if (!f || f->kind != FD_FILE)
		return 0;
	e.h.kind = EV_MAP;
	e.h.tgid = tgid;
	e.h.ts = t->exit_ns;
	e.h.rid = t->rid;
	e.gen = f->object;
	e.size = t->a1;
	e.prot = t->a2;
	e.flags = t->a3;
	emit(&e, sizeof(e), ST_RING_PROCESS);
	return 0;
}

/* io_uring: what goes through a ring has no calls; the target is told of once for each ring that it makes */
int on_uring(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	long ret = ctx->args[1];

	if (!t || ret < 0)
		return 0;
	if (t->nr == NR_io_uring_setup)
		emit_process(PR_URING, pid_tgid() >> 32, ret);
	else
		stat_add(ST_URING, ret);
	return 0;
}

/* The request that a connection of the service answers now, or 0. */
INLINE struct slot *answering_on(__u64 sk)
{
	struct conn *c = map_lookup(MAP(CONNS), &sk);
	struct slot *s = c ? &c->q[c->tx_seq & (PIPELINE - 1)] : 0;

	return s && s->rid && s->begun && !s->ended ? s : 0;
}

/*
 * sendfile(out, in, ...), splice(in, _, out, ...), copy_file_range(in, _, out, ...): from one descriptor to another in one call.
 * The call's time goes to a file: written before read, and either before a socket, as the order of the phases has it.
 */
int on_transfer(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32, role, call = 0, many;
	struct thread *t = thread();
	long ret = ctx->args[1];
	__u64 sk = 0, descriptor = 0;
	struct slot *direct = 0;
	struct work *w;
	struct bp_fd_entry *f;

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
				direct = answering_on(sk);
			}
			continue;
		}
		if (f->kind != FD_FILE)
			continue;
		if (direct) {
			if (direct->file && direct->file != f->object)
				work_emit(t, direct->file, direct->rid, 0);
			direct->file = f->object;
			w = work_of(t, f->object, direct->rid, FF_SAME_CALL);
		} else {
			many = by_many(t, f->many, f->object);
			w = work_of(t, f->object, actor_of(t, many), flags_of(t, many));
		}
		if (!w)
			continue;
		if (!direct)
			blend(t, w);
		moved(t, w, role, ret);
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
	struct bp_fd_entry *f;
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
	fd_set(tgid, ret, t->object, t->kind, 1, t->many);
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
	e->key = t->key;
	e->tid = pid_tgid();
	e->file_flags = alone(t);
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
