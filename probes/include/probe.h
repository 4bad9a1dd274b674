/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What all probes share: helpers, the state in the maps, the target filter, statistics and the ring.
 *
 * Maps are not BCC's: each is named by a number (MAP_*, from abi.h) that the loader replaces with the descriptor. So BCC only
 * compiles, and one table in user space owns every map's size. Kernel structures are never declared: a member's offset comes
 * from the running kernel's BTF (OFF_*), and is read by bpf_probe_read_kernel.
 *
 * Words: tgid is the process, tid the thread (the kernel's pid). A request's number is its rid, a file generation's its gen.
 */
#ifndef BUCKETPROBE_PROBE_H
#define BUCKETPROBE_PROBE_H

#include "abi.h"
#include "http1.h"

#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_##name))
#define INLINE static inline __attribute__((always_inline))

/* Helpers by number (include/uapi/linux/bpf.h): BCC would parse kallsyms for each textual bpf_probe_read_*. */
static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*map_update)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*map_delete)(void *map, const void *key) = (void *)3;
static __u64 (*ktime_ns)(void) = (void *)5;
static void (*tail_call)(void *ctx, void *map, __u64 index) = (void *)12;
static __u64 (*pid_tgid)(void) = (void *)14;
static __u64 (*current_task)(void) = (void *)35;
static __u32 (*cpu_id)(void) = (void *)8;
static long (*read_user)(void *dst, __u32 size, const void *src) = (void *)112;
static long (*read_kernel)(void *dst, __u32 size, const void *src) = (void *)113;
static long (*read_user_str)(void *dst, __u32 size, const void *src) = (void *)114;
static long (*ring_output)(void *ring, void *data, __u64 size, __u64 flags) = (void *)130;
static __u64 (*ring_query)(void *ring, __u64 what) = (void *)134;

#define RING_NO_WAKEUP 1
#define RING_FORCE_WAKEUP 2
#define NOEXIST 1

/*
 * Hides from clang what it knows of x. The verifiers before Linux 6.8 learn nothing from `r != constant`: they can follow neither
 * a loop that clang counts down to 0 nor a second test that clang derives from the outcome of a first.
 */
#define OPAQUE(x) asm volatile("" : "+r"(x))

/* Keeps clang from dropping a bound that the verifier needs to see. */
#define BOUND(x, mask)         \
	do {                   \
		OPAQUE(x);     \
		(x) &= (mask); \
	} while (0)

#define PIPELINE 16 /* requests that one connection may have outstanding */
#define THREAD_FILES 8
#define VECTORS 16

/* One outstanding request of a connection; free while rid is 0. */
struct slot {
	__u64 rid;
	__u64 start_ns;
	__u64 first_read_ns;
	__u64 recv_ns, send_ns, wait_rx_ns, wait_tx_ns;
	__u64 runqueue_ns; /* in the read that brought it */
	__u64 received_ns, answered_ns;
	__u64 client_ns, client_out_ns, server_ns; /* see bp_end_event */
	__u64 bytes_in;
	__u64 print; /* of its body */
	__u64 file;  /* of which bytes go straight to its socket */
	__u32 recv_calls, send_calls;
	__u32 tid;  /* the last thread that used its socket */
	__u32 lost; /* its events that the ring had no room for */
	__u32 flags;
	__u32 printed;
	__u32 reader; /* the thread that received its head */
	__u8 begun;       /* its head is complete */
	__u8 rx_complete; /* its body is complete */
	__u8 ended;       /* its response is complete before its body was */
	__u8 method;      /* METHOD_HEAD, METHOD_CONNECT or 0 */
};

/* conns: key = the kernel's socket; from established (or first seen) until TCP_CLOSE. */
struct conn {
	__u64 id;
	__u64 established_ns, accept_ns;
	__u64 ready_ns;      /* unread bytes of a next request since then; 0: none */
	__u64 last_ready_ns; /* bytes last became readable */
	__u64 last_tx_ns;
	__u64 read_ns;   /* the last read ended then, */
	__u64 filled_ns; /* and bytes came into the empty queue then */
	__u64 full_ns;   /* there was no room for more of a response since then; 0: there is */
	__u64 print[2];  /* of the bodies under way */
	__u32 printed[2];
	__u32 tgid;
	__u32 rx_seq, tx_seq; /* requests received whole, answered whole */
	__u16 flags;          /* RF_OLD */
	__u8 reset, peer_fin;
	__u8 empty; /* the last read left nothing unread */
	__u8 pad[7];
	__u32 outcome; /* while it is being ended: of its requests, */
	__u64 end_ns;  /* and since when */
	struct http1 dir[2];
	struct slot q[PIPELINE];
};

/* threads: key = tid; from a target thread's first watched call until its exit. */
struct thread {
	__u64 enter_ns, exit_ns, took; /* of the call, ns */
	__u64 a0, a1, a2, a3, a4;
	__u64 r14;
	__u64 key; /* of the task that called */
	__u64 run_delay; /* its runqueue wait up to the last boundary, ns */
	__u64 delayed;   /* ... within the call */
	__u64 sk, rid;   /* the request that it works on */
	__u64 runqueue_ns;
	__u64 closing; /* generation of which this call closes a descriptor */
	__u64 files[THREAD_FILES]; /* of which it sums by itself until its request ends */
	__u32 nfiles;
	__u32 closing_last; /* ... its only one */
	__u32 closing_many;
	__u32 lost;
	__u32 runtime;
	__u32 loop; /* it has had several unfinished requests at once */
	__u32 mine; /* it received the request that it works on */
	__u32 answered; /* requests that it answered */
	__u32 talks;    /* it uses sockets of the service, or tells others by a socket or a pipe when it is done */
	__u32 many; /* of the call's descriptor */
	__u32 nr;
	__u32 call;    /* the handler of the call */
	__u32 entered; /* its exit is to come */
	__u32 kind;    /* of the call's descriptor */
	__u64 object;  /* behind it */
	__u64 read, wrote; /* the files that bytes were last read from (0: a socket) and written to */
	__u64 gap_from, gap_pause; /* when a piece of a body was read, and when a call that is none of a gap's began, by on_cpu() */
	__u64 gap_ns, gap_bytes, gap_piece; /* of all gaps, and how many bytes the last piece had */
	__u64 hash_ns, hash_delay, hash_sleeps; /* the call of a hash function under way: when it began; runqueue wait and sleeps by then, */
	__u64 hash_ctx, hash_bytes; /* on which state, and with so many bytes */
	__u64 final_to, final_ctx, final_bytes; /* the digest under way: where its value is put, from which state, of how many bytes */
	__u32 final_algorithm;
	__u32 gaps, gap_cpu;
	__u32 hashes; /* calls of hash functions for the request that it works on, */
	__u64 hashed_ns; /* and the time in them */
};

/* fds: key = tgid << 32 | fd, value = struct bp_fd_entry; from open, accept, dup or first use until close. */

/*
 * work: key = {gen, actor}; from a file's first call until its close, the end of what it belongs to, or a second. The actor is
 *  - the thread, where it has one request at a time, or the file is many requests': nobody else adds to such a sum;
 *  - the request, where its socket and the file were in one call;
 *  - 0 else: whoever uses the file, which is one request's then, and which one user space finds out.
 */
struct work_key {
	__u64 gen, actor;
};
struct work {
	__u64 write_bytes, read_bytes, write_ns, read_ns, sync_ns, other_ns, first_ns, last_ns, data_ns;
	__u64 rid, key, print;
	__u32 write_calls, read_calls, syncs, others;
	__u32 printed, flags, tid, answered;
};

/*
 * hashes: key = {tgid, state}; the calls on one hash function's state since it, or a copy of it, was made or finished. In an LRU map: a state that
 * is given up says nothing, and one that is forgotten has fewer bytes timed than hashed, which is how user space tells.
 */
struct hash_key {
	__u64 tgid, ctx;
};
struct hash {
	__u64 ns, bytes;
	__u64 of; /* the state that it is a copy of, or a copy's copy */
	__u32 calls;
	__u32 done;
};

struct vector {
	__u64 base, length;
};

/* scratch: of the programs on system calls, whose tail calls share it; preemption is off while they run. */
struct scratch {
	__u64 sk;
	__u64 base; /* the buffer, or 0 where there is none to read */
	__u64 offset, total;
	__u64 enter_ns, now;
	__u32 vectors; /* 0: base is one buffer */
	__u32 dir;
	struct http1_step step;
	struct vector vector[VECTORS];
	struct {
		struct bp_head_event e;
		unsigned char bytes[HEAD_BYTES];
	} head;
	struct {
		struct bp_open_event e;
		char bytes[PATH_BYTES];
	} open;
	struct {
		struct bp_path_event e;
		char bytes[2 * PATH_BYTES];
	} path;
	struct {
		struct bp_tokens_event e;
		__u64 set[TOKEN_BITS / 64];
	} tokens;
	unsigned char text[TOKEN_BYTES]; /* wiped after use */
	struct conn blank; /* stays zero: a new connection is copied from it, */
	struct thread idle; /* and a new thread from this */
	__u64 zeroes[TOKEN_BITS / 64];
};

INLINE void stat_add(__u32 which, __u64 n)
{
	__u64 *value = map_lookup(MAP(STATS), &which);

	if (value)
		*value += n;
}

INLINE __u64 kernel_word(__u64 address)
{
	__u64 value = 0;

	read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

INLINE __u32 kernel_half(__u64 address)
{
	__u32 value = 0;

	read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

INLINE __u32 kernel_short(__u64 address)
{
	__u16 value = 0;

	read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

/* A byte, not a bit, for each tgid: setting one needs no atomic operation. */
INLINE unsigned char *target_byte(__u32 tgid)
{
	__u32 row = tgid >> 6, column = tgid & 63;
	unsigned char *bytes = map_lookup(MAP(TARGETS), &row);

	return bytes ? bytes + column : 0;
}

/* 0, or 1 and what runs in it << 1. */
INLINE __u32 is_target(__u32 tgid)
{
	unsigned char *byte = target_byte(tgid);

	return byte ? *byte : 0;
}

INLINE __u64 config(__u32 which)
{
	__u64 *value = map_lookup(MAP(CONFIG), &which);

	return value ? *value : 0;
}

/* A number that no other request, connection or generation has: time, and the CPU where two have the same. */
INLINE __u64 unique(void)
{
	return ktime_ns() << 8 | (cpu_id() & 255);
}

INLINE __u64 run_delay(void)
{
	return kernel_word(current_task() + OFF_TASK_RUN_DELAY);
}

/* Evidence is lost: whose file work it would have told, nobody knows, so each request that lives now hears of it. */
INLINE void lose_file(void)
{
	__u32 place = CFG_LOST_FILES;
	__u64 *lost = map_lookup(MAP(CONFIG), &place);

	if (lost)
		__sync_fetch_and_add(lost, 1);
}

/* Wakes the reader only where the ring is an eighth full; it looks by itself every so often. Returns 0 or 1 (lost, counted). */
INLINE int emit(void *event, __u64 size, __u32 lost)
{
	__u64 flags = ring_query(MAP(EVENTS), 0) * 8 > ring_query(MAP(EVENTS), 1) ? RING_FORCE_WAKEUP : RING_NO_WAKEUP;

	if (!ring_output(MAP(EVENTS), event, size, flags))
		return 0;
	stat_add(lost, 1);
	if (lost == ST_RING_FILE || lost == ST_RING_HEAD || lost == ST_RING_BODY)
		lose_file();
	return 1;
}

INLINE void emit_process(__u32 what, __u32 tgid, __u32 other)
{
	struct bp_process_event e = {};

	e.h.kind = EV_PROCESS;
	e.h.what = what;
	e.h.tgid = tgid;
	e.h.ts = ktime_ns();
	e.other = other;
	emit(&e, sizeof(e), ST_RING_PROCESS);
}

INLINE struct scratch *scratch(void)
{
	__u32 zero = 0;

	return map_lookup(MAP(SCRATCH), &zero);
}

INLINE struct thread *thread(void)
{
	__u32 tid = pid_tgid();

	return map_lookup(MAP(THREADS), &tid);
}

/* The thread's entry, made where there is none. 0: no room (counted). */
INLINE struct thread *thread_made(void)
{
	struct thread *t = thread();
	struct scratch *x = scratch();
	__u32 tid = pid_tgid();

	if (t || !x)
		return t;
	if (map_update(MAP(THREADS), &tid, &x->idle, NOEXIST)) {
		stat_add(ST_MAP_THREADS, 1);
		return 0;
	}
	return thread();
}

/*
 * A clock that runs while the current thread does, of one CPU: the difference of two readings on the same CPU is the time that the
 * thread was on any. The scheduler's sum is of when exec_start was set, by a clock that every CPU has for itself; the time since
 * then is to be added. Where it set both while they were read, they are read once more.
 */
INLINE __u64 on_cpu(void)
{
	__u64 task = current_task(), start = kernel_word(task + OFF_TASK_EXEC_START);
	__u64 now = ktime_ns(), ran = kernel_word(task + OFF_TASK_RUNTIME);
	__u64 again = kernel_word(task + OFF_TASK_EXEC_START);

	if (again != start) {
		start = again;
		now = ktime_ns();
		ran = kernel_word(task + OFF_TASK_RUNTIME);
	}
	return now + ran - start;
}

INLINE __u64 user_word(__u64 address)
{
	__u64 value = 0;

	read_user(&value, sizeof(value), (void *)address);
	return value;
}

/*
 * The key of the task that the thread runs: Go's g, which is in r14, or under cgo behind the thread's own storage; or CPython's
 * context there, with the thread's number, since other threads run copies. 0 where none is known.
 */
INLINE __u64 task_key(struct thread *t)
{
	__u64 id = pid_tgid(), base, key;
	__u32 tgid = id >> 32;
	struct bp_layout_entry *layout;

	if (!t->runtime)
		return 0;
	if (t->runtime == RT_GO)
		return t->r14;
	layout = map_lookup(MAP(LAYOUTS), &tgid);
	if (!layout)
		return 0;
	base = kernel_word(current_task() + OFF_TASK_FSBASE);
	if (t->runtime == RT_GO_CGO)
		return user_word(user_word(user_word(base - 8) + layout->slot) + layout->member);
	key = user_word(base + layout->slot);
	key = key ? user_word(key + layout->member) : 0;
	return key ? (key >> 4) << 22 | (id & 0x3fffff) : 0;
}

/*
 * Adds bytes to a fingerprint, until it is of PRINT_BYTES. The key is the agent's of this run and known to nobody else; the bytes
 * themselves go nowhere. Where they cannot be read the fingerprint stays unknown.
 */
INLINE void print_add(__u64 *print, __u32 *printed, __u64 address, __u64 length)
{
	unsigned char bytes[PRINT_BYTES] = {};
	__u64 hash = *print, secret = config(CFG_SECRET);
	__u32 n = PRINT_BYTES - *printed, i;

	if (*printed >= PRINT_BYTES)
		return;
	if (length < n)
		n = length;
	BOUND(n, 2 * PRINT_BYTES - 1);
	if (n > PRINT_BYTES)
		return;
	if (!address || read_user(bytes, n, (void *)address)) {
		*printed = PRINT_UNKNOWN;
		return;
	}
	if (!*printed)
		hash = config(CFG_SECRET_2);
#pragma clang loop unroll(disable)
	for (i = 0; i < PRINT_BYTES; i++) {
		OPAQUE(i);
		if (i >= n)
			break;
		hash = (hash ^ bytes[i]) * secret;
		hash ^= hash >> 32;
	}
	*print = hash;
	*printed += n;
}

INLINE __u64 fd_key(__u32 tgid, __u64 fd)
{
	return (__u64)tgid << 32 | (__u32)fd;
}

/* The kernel's file behind a descriptor of the current process, or 0. */
INLINE __u64 file_of(__u32 fd)
{
	__u64 files = kernel_word(current_task() + OFF_TASK_FILES);
	__u64 table = kernel_word(files + OFF_FILES_FDT);

	if (fd >= kernel_half(table + OFF_FDT_MAX))
		return 0;
	return kernel_word(kernel_word(table + OFF_FDT_FD) + 8ULL * fd);
}

#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define S_IFREG 0100000
#define S_IFDIR 0040000

INLINE __u32 mode_of(__u64 file)
{
	return kernel_short(kernel_word(file + OFF_FILE_INODE) + OFF_INODE_MODE);
}

/* What a descriptor is; looked up in the kernel's own table the first time that it is met. */
INLINE struct bp_fd_entry *fd_of(__u32 tgid, __u64 number)
{
	__u64 key = fd_key(tgid, number);
	struct bp_fd_entry *known = map_lookup(MAP(FDS), &key);
	struct bp_fd_entry found = {};
	__u64 file;
	__u32 type;

	if (known)
		return known;
	file = file_of(number);
	if (!file) {
		stat_add(ST_FD_UNRESOLVED, 1);
		return 0;
	}
	type = mode_of(file) & S_IFMT;
	found.kind = FD_OTHER;
	if (type == S_IFSOCK) {
		found.kind = FD_SOCKET;
		found.object = kernel_word(kernel_word(file + OFF_FILE_PRIVATE) + OFF_SOCKET_SK);
	} else if (type == S_IFREG || type == S_IFDIR) {
		struct bp_unknown_fd_event e = {};

		found.kind = FD_FILE;
		found.object = unique();
		found.many = USE_MANY;
		e.h.kind = EV_UNKNOWN_FD;
		e.h.tgid = tgid;
		e.h.ts = ktime_ns();
		e.gen = found.object;
		e.fd = number;
		emit(&e, sizeof(e), ST_RING_PROCESS);
	}
	if (map_update(MAP(FDS), &key, &found, 0))
		stat_add(ST_MAP_FDS, 1);
	return map_lookup(MAP(FDS), &key);
}

/*
 * FF_ALONE where the thread received its request itself and has no other: what it does is that request's. A thread that only
 * answers, or passes bytes on, may work for another one meanwhile.
 */
INLINE __u32 alone(struct thread *t)
{
	return t->rid && t->mine && !t->loop ? FF_ALONE : 0;
}

/* Sends what was summed for one file and actor, and forgets it. `t` may be 0. */
INLINE void work_emit(struct thread *t, __u64 gen, __u64 actor, __u32 closed)
{
	struct work_key key = { gen, actor };
	struct work *w = map_lookup(MAP(WORK), &key);
	struct bp_file_event e = {};

	if (!w)
		return;
	e.h.kind = EV_FILE;
	e.h.what = closed;
	e.h.tgid = pid_tgid() >> 32;
	e.h.ts = ktime_ns();
	e.h.rid = w->rid;
	e.gen = gen;
	e.write_bytes = w->write_bytes;
	e.read_bytes = w->read_bytes;
	e.write_ns = w->write_ns;
	e.read_ns = w->read_ns;
	e.sync_ns = w->sync_ns;
	e.other_ns = w->other_ns;
	e.first_ns = w->first_ns;
	e.last_ns = w->last_ns;
	e.data_ns = w->data_ns;
	e.key = w->key;
	e.print = w->print;
	e.printed = w->printed;
	e.flags = w->flags;
	e.tid = w->tid;
	e.write_calls = w->write_calls;
	e.read_calls = w->read_calls;
	e.syncs = w->syncs;
	e.others = w->others;
	map_delete(MAP(WORK), &key);
	if (emit(&e, sizeof(e), ST_RING_FILE) && t)
		t->lost++;
}

#define FDS_AT_ONCE 256 /* descriptors that one program can walk; the broker sweeps what lies beyond */

/* Forgets the descriptors from first to last. */
INLINE void fds_forget(__u32 tgid, __u32 first, __u32 last)
{
	__u32 i;

#pragma clang loop unroll(disable)
	for (i = 0; i < FDS_AT_ONCE; i++) {
		__u64 key = fd_key(tgid, first + i);

		if (i > last - first)
			break;
		map_delete(MAP(FDS), &key);
	}
}

INLINE void fd_set(__u32 tgid, __u64 number, __u64 object, __u32 kind, __u32 shared, __u32 many)
{
	__u64 key = fd_key(tgid, number);
	struct bp_fd_entry value = {};

	value.object = object;
	value.kind = kind;
	value.shared = shared;
	value.many = many;
	if (map_update(MAP(FDS), &key, &value, 0))
		stat_add(ST_MAP_FDS, 1);
}

/* How many descriptors the current process has room for. */
INLINE __u32 fds_size(void)
{
	__u64 files = kernel_word(current_task() + OFF_TASK_FILES);

	return files ? kernel_half(kernel_word(files + OFF_FILES_FDT) + OFF_FDT_MAX) : FDS_AT_ONCE;
}

#define UNTIED_NS 1000000000ULL /* how long work that belongs to no request is summed before it is sent */
#define KEPT_NS 60000000000ULL /* a file that is open for reading for longer is kept for whoever asks for it next */
#define BURST_NS 20000000ULL	/* calls on a file of many that are further apart are not of one piece */

INLINE __u64 actor_of(struct thread *t, __u32 many)
{
	return many || alone(t) ? (__u32)pid_tgid() : 0;
}

INLINE __u32 flags_of(struct thread *t, __u32 many)
{
	return alone(t) | (many ? FF_MANY : 0);
}

/* Whether many requests may use this file by now. A generation's number is made of the time of its open. */
INLINE __u32 by_many(struct thread *t, __u32 use, __u64 gen)
{
	return use == USE_MANY || (use == USE_READ && t->enter_ns > (gen >> 8) + KEPT_NS);
}

/* Notes that the thread sums for a file by itself; where too many wait, the oldest sum is sent. */
INLINE void work_list(struct thread *t, __u64 gen)
{
	__u32 place = t->nfiles & (THREAD_FILES - 1), i;

#pragma clang loop unroll(disable)
	for (i = 0; i < THREAD_FILES; i++) {
		OPAQUE(i);
		if (i >= t->nfiles)
			break;
		if (t->files[i] == gen)
			return;
	}
	if (t->nfiles >= THREAD_FILES)
		work_emit(t, t->files[place], (__u32)pid_tgid(), 0);
	t->files[place] = gen;
	t->nfiles++;
}

/* The sum to which a call on this file counts, or 0 where there is no room (counted). */
INLINE struct work *work_of(struct thread *t, __u64 gen, __u64 actor, __u32 flags)
{
	struct work_key key = { gen, actor };
	struct work *w = map_lookup(MAP(WORK), &key);
	__u32 tid = pid_tgid(), stale = 0;
	struct work fresh = {};

	if (w && flags & FF_MANY)
		stale = w->key != t->key || t->enter_ns - w->last_ns > BURST_NS;
	else if (w && !actor)
		stale = t->exit_ns - w->first_ns > UNTIED_NS;
	if (stale) {
		work_emit(t, gen, actor, 0);
		flags |= FF_CONTINUES;
		w = 0;
	}
	if (w)
		return w;
	fresh.first_ns = t->enter_ns;
	fresh.rid = flags & FF_SAME_CALL ? actor : t->rid;
	fresh.key = t->key;
	fresh.flags = flags;
	fresh.answered = t->answered;
	fresh.tid = tid;
	if (actor == tid)
		work_list(t, gen);
	if (map_update(MAP(WORK), &key, &fresh, NOEXIST)) {
		w = map_lookup(MAP(WORK), &key); /* another thread was first */
		if (!w) {
			stat_add(ST_MAP_FILES, 1);
			lose_file();
			t->lost++;
		}
		return w;
	}
	return map_lookup(MAP(WORK), &key);
}

/* Notes who else adds to a sum. A close is nobody's: it may come when its request is long over. */
INLINE void blend(struct thread *t, struct work *w)
{
	if (w->rid != t->rid || (!t->loop && w->answered != t->answered))
		w->flags |= FF_RIDS;
	if (w->key != t->key)
		w->flags |= FF_KEYS;
	if (w->tid != (__u32)pid_tgid())
		w->flags |= FF_TIDS;
}

/* Sends all sums that wait for the thread's request, or whatever its work was, to be done. */
INLINE void work_flush(struct thread *t)
{
	__u32 tid = pid_tgid(), i;

	t->talks = 1;
#pragma clang loop unroll(disable)
	for (i = 0; i < THREAD_FILES; i++) {
		if (i >= t->nfiles)
			break;
		work_emit(t, t->files[i], tid, 0);
	}
	t->nfiles = 0;
}

/* The thread works on this request from now on. Two unfinished requests on one thread blur each other's file work: both say so. */
INLINE void bind(struct thread *t, __u64 sk, struct conn *c, struct slot *s)
{
	__u32 tid = pid_tgid();

	if (s->tid && s->tid != tid)
		s->flags |= RF_MOVED;
	s->tid = tid;
	if (t->rid == s->rid)
		return;
	if (t->rid && t->sk != sk) {
		struct conn *other = map_lookup(MAP(CONNS), &t->sk);

		if (other) {
			struct slot *o = &other->q[other->tx_seq & (PIPELINE - 1)];

			if (o->rid == t->rid && o->begun && !o->ended) {
				o->flags |= RF_INTERLEAVED;
				t->loop = 1;
			}
		}
	}
	work_flush(t);
	if (t->loop)
		s->flags |= RF_INTERLEAVED;
	t->sk = sk;
	t->rid = s->rid;
	t->mine = s->reader == tid;
	t->gap_from = 0;
	t->gap_ns = 0;
	t->gap_bytes = 0;
	t->gaps = 0;
	t->hashes = 0;
	t->hashed_ns = 0;
	t->runqueue_ns = 0;
	t->lost = 0;
}

/* Sends the end of a request. `t` is its thread, or 0 where another context ended it. */
INLINE void end_emit(struct conn *c, struct slot *s, struct thread *t, __u32 outcome, __u64 end_ns)
{
	struct bp_end_event e = {};

	e.h.kind = EV_END;
	e.h.what = outcome;
	e.h.tgid = c->tgid;
	e.h.ts = ktime_ns();
	e.h.rid = s->rid;
	e.conn = c->id;
	e.start_ns = s->start_ns;
	e.end_ns = end_ns;
	e.established_ns = c->established_ns;
	e.accept_ns = c->accept_ns;
	e.first_read_ns = s->first_read_ns;
	e.bytes_in = s->rx_complete ? s->bytes_in : c->dir[0].entity;
	e.bytes_out = c->dir[1].entity;
	e.recv_ns = s->recv_ns;
	e.send_ns = s->send_ns;
	e.wait_rx_ns = s->wait_rx_ns;
	e.wait_tx_ns = s->wait_tx_ns;
	e.sequence = c->tx_seq;
	e.tid = s->tid;
	e.recv_calls = s->recv_calls;
	e.send_calls = s->send_calls;
	e.status = c->dir[1].status;
	e.flags = s->flags | c->flags;
	e.lost = s->lost;
	e.runqueue_ns = s->runqueue_ns;
	e.received_ns = s->received_ns;
	e.answered_ns = s->answered_ns;
	e.client_ns = s->client_ns;
	e.client_out_ns = s->client_out_ns;
	e.server_ns = s->server_ns;
	e.print_in = s->rx_complete ? s->print : c->print[0];
	e.printed_in = s->rx_complete ? s->printed : c->printed[0];
	e.print_out = c->print[1];
	e.printed_out = c->printed[1];
	e.lost_files = config(CFG_LOST_FILES);
	e.framed = s->rx_complete || c->dir[0].mode != HTTP1_LOST;
	if (t)
		e.key = t->key;
	if (t && t->rid == s->rid && !t->loop) {
		e.runqueue_ns += t->runqueue_ns;
		e.lost += t->lost;
		e.gap_ns = t->gap_ns;
		e.gap_bytes = t->gap_bytes;
		e.gaps = t->gaps;
		e.hash_ns = t->hashed_ns;
		e.hash_calls = t->hashes;
	}
	stat_add(ST_COMPLETE + outcome, 1);
	emit(&e, sizeof(e), ST_RING_END);
}

#endif
