/* SPDX-License-Identifier: GPL-2.0 */
/* Rendered from bucketprobe/abi.py by `python -m bucketprobe.abi`; do not edit. */
#ifndef BUCKETPROBE_ABI_H
#define BUCKETPROBE_ABI_H

#define PATH_BYTES 1024
#define HEAD_BYTES 256
#define PRINT_BYTES 32
#define PRINT_UNKNOWN 255
#define TOKEN_BYTES 512
#define TOKEN_WINDOW 6
#define TOKEN_BITS 4096
#define TOKEN_WRITE 4096
#define DIGEST_BYTES 64

enum { /* Kind */
	EV_HEAD = 1,
	EV_END = 2,
	EV_OPEN = 3,
	EV_FILE = 4,
	EV_PATH = 5,
	EV_PROCESS = 6,
	EV_UNKNOWN_FD = 7,
	EV_TOKENS = 8,
	EV_BODY = 9,
	EV_MAP = 10,
	EV_DIGEST = 11,
};

enum { /* Direction */
	DIR_REQUEST = 0,
	DIR_RESPONSE = 1,
};

enum { /* EndOutcome */
	END_COMPLETE = 0,
	END_CLIENT_CLOSED = 1,
	END_SERVER_CLOSED = 2,
	END_UNOBSERVED = 3,
};

enum { /* RequestFlag */
	RF_INTERLEAVED = 1,
	RF_MOVED = 2,
	RF_OLD = 4,
	RF_PIPELINED = 8,
	RF_QUEUE_SEEN = 16,
};

enum { /* FileUse */
	USE_ONE = 0,
	USE_MANY = 1,
	USE_READ = 2,
};

enum { /* FileFlag */
	FF_RIDS = 1,
	FF_TIDS = 2,
	FF_SAME_CALL = 4,
	FF_MANY = 8,
	FF_CONTINUES = 16,
	FF_KEYS = 64,
	FF_DRAINED = 128,
	FF_ALONE = 32,
};

enum { /* PathCall */
	PC_RENAME = 1,
	PC_LINK = 2,
	PC_UNLINK = 3,
	PC_MKDIR = 4,
	PC_CHDIR = 5,
	PC_TRUNCATE = 6,
};

enum { /* ProcessChange */
	PR_LISTEN = 1,
	PR_FORK = 2,
	PR_EXEC = 3,
	PR_EXIT = 4,
	PR_URING = 5,
};

enum { /* Runtime */
	RT_NONE = 0,
	RT_GO = 1,
	RT_GO_CGO = 2,
	RT_CPYTHON = 3,
};

enum { /* FileKind */
	FD_UNKNOWN = 0,
	FD_FILE = 1,
	FD_SOCKET = 2,
	FD_OTHER = 3,
};

enum { /* Stat */
	ST_BEGUN = 0,
	ST_COMPLETE = 1,
	ST_CLIENT_CLOSED = 2,
	ST_SERVER_CLOSED = 3,
	ST_UNOBSERVED = 4,
	ST_CONNECTIONS = 5,
	ST_CONNECTIONS_CLOSED = 6,
	ST_CONNECTIONS_OLD = 7,
	ST_INTERIM_RESPONSES = 8,
	ST_UPGRADES = 9,
	ST_ACCEPTED = 10,
	ST_QUEUED = 11,
	ST_DEQUEUED = 12,
	ST_URING = 13,
	ST_RING_HEAD = 16,
	ST_RING_END = 17,
	ST_RING_FILE = 18,
	ST_RING_PROCESS = 19,
	ST_MAP_CONNECTIONS = 20,
	ST_MAP_THREADS = 21,
	ST_MAP_FILES = 22,
	ST_MAP_FDS = 23,
	ST_HEAD_UNREADABLE = 24,
	ST_HEAD_MALFORMED = 25,
	ST_HEAD_INCOMPLETE = 26,
	ST_CHUNK_MALFORMED = 27,
	ST_CHUNK_TOO_MANY = 28,
	ST_PIPELINE_FULL = 29,
	ST_UNSOLICITED = 30,
	ST_CALL_UNSUPPORTED = 31,
	ST_VECTOR_TOO_LONG = 32,
	ST_FD_UNRESOLVED = 33,
	ST_CONNECTION_REPLACED = 34,
	ST_PATH_CUT = 35,
	ST_TLS = 36,
	ST_RING_TOKENS = 37,
	ST_RING_BODY = 38,
	ST_RING_DIGEST = 39,
};

enum { /* Port */
	PORT_CONFIGURED = 1,
	PORT_SERVED = 2,
};

enum { /* Config */
	CFG_HEAD_BYTES = 0,
	CFG_WATCH_EXEC = 1,
	CFG_SECRET = 2,
	CFG_SECRET_2 = 3,
	CFG_LOST_FILES = 4,
};

enum { /* Handler */
	H_NONE = 0,
	H_RECEIVE = 1,
	H_SEND = 2,
	H_SYNC = 3,
	H_CHANGE = 4,
	H_DUP = 5,
	H_ON_DESCRIPTOR = 5,
	H_TRANSFER = 6,
	H_ACCEPT = 7,
	H_OPEN = 8,
	H_CLOSE = 9,
	H_PATH = 10,
	H_WAIT = 11,
	H_FILE = 12,
	H_FRAME = 13,
	H_CHUNK = 14,
	H_FINISH = 15,
	H_TOKENS = 16,
	H_BODY = 17,
	H_MAP = 18,
	H_URING = 19,
	H_PRINT = 20,
};

enum { /* maps */
	MAP_EVENTS = 1000,
	MAP_STATS = 1001,
	MAP_HANDLERS = 1002,
	MAP_CALLS = 1003,
	MAP_TARGETS = 1004,
	MAP_CONFIG = 1005,
	MAP_LAYOUTS = 1006,
	MAP_PORTS = 1007,
	MAP_THREADS = 1008,
	MAP_CONNS = 1009,
	MAP_FDS = 1010,
	MAP_WORK = 1011,
	MAP_SCRATCH = 1012,
	MAP_HASHING = 1013,
	MAP_HASHES = 1014,
};

#define NR_read 0
#define NR_pread64 17
#define NR_readv 19
#define NR_recvfrom 45
#define NR_recvmsg 47
#define NR_preadv 295
#define NR_preadv2 327
#define NR_recvmmsg 299
#define NR_write 1
#define NR_pwrite64 18
#define NR_writev 20
#define NR_sendto 44
#define NR_sendmsg 46
#define NR_pwritev 296
#define NR_pwritev2 328
#define NR_sendmmsg 307
#define NR_sendfile 40
#define NR_splice 275
#define NR_copy_file_range 326
#define NR_accept 43
#define NR_accept4 288
#define NR_open 2
#define NR_creat 85
#define NR_openat 257
#define NR_openat2 437
#define NR_close 3
#define NR_close_range 436
#define NR_fsync 74
#define NR_fdatasync 75
#define NR_sync_file_range 277
#define NR_ftruncate 77
#define NR_fallocate 285
#define NR_rename 82
#define NR_renameat 264
#define NR_renameat2 316
#define NR_link 86
#define NR_linkat 265
#define NR_unlink 87
#define NR_unlinkat 263
#define NR_rmdir 84
#define NR_mkdir 83
#define NR_mkdirat 258
#define NR_chdir 80
#define NR_fchdir 81
#define NR_truncate 76
#define NR_dup 32
#define NR_dup2 33
#define NR_dup3 292
#define NR_fcntl 72
#define NR_mmap 9
#define NR_io_uring_setup 425
#define NR_io_uring_enter 426
#define NR_poll 7
#define NR_select 23
#define NR_epoll_wait 232
#define NR_pselect6 270
#define NR_ppoll 271
#define NR_epoll_pwait 281
#define NR_epoll_pwait2 441

struct bp_header {
	__u8 kind;
	__u8 what;
	__u16 n;
	__u32 tgid;
	__u64 ts;
	__u64 rid;
};
_Static_assert(sizeof(struct bp_header) == 24, "bp_header");
_Static_assert(__builtin_offsetof(struct bp_header, kind) == 0, "bp_header.kind");
_Static_assert(__builtin_offsetof(struct bp_header, what) == 1, "bp_header.what");
_Static_assert(__builtin_offsetof(struct bp_header, n) == 2, "bp_header.n");
_Static_assert(__builtin_offsetof(struct bp_header, tgid) == 4, "bp_header.tgid");
_Static_assert(__builtin_offsetof(struct bp_header, ts) == 8, "bp_header.ts");
_Static_assert(__builtin_offsetof(struct bp_header, rid) == 16, "bp_header.rid");

struct bp_head_event {
	struct bp_header h;
	__u64 conn;
	__u64 key;
	__u32 tid;
	__u32 last;
	__u32 status;
	__u32 lost_files;
};
_Static_assert(sizeof(struct bp_head_event) == 56, "bp_head_event");
_Static_assert(__builtin_offsetof(struct bp_head_event, h) == 0, "bp_head_event.h");
_Static_assert(__builtin_offsetof(struct bp_head_event, conn) == 24, "bp_head_event.conn");
_Static_assert(__builtin_offsetof(struct bp_head_event, key) == 32, "bp_head_event.key");
_Static_assert(__builtin_offsetof(struct bp_head_event, tid) == 40, "bp_head_event.tid");
_Static_assert(__builtin_offsetof(struct bp_head_event, last) == 44, "bp_head_event.last");
_Static_assert(__builtin_offsetof(struct bp_head_event, status) == 48, "bp_head_event.status");
_Static_assert(__builtin_offsetof(struct bp_head_event, lost_files) == 52, "bp_head_event.lost_files");

struct bp_end_event {
	struct bp_header h;
	__u64 conn;
	__u64 start_ns;
	__u64 end_ns;
	__u64 established_ns;
	__u64 accept_ns;
	__u64 first_read_ns;
	__u64 bytes_in;
	__u64 bytes_out;
	__u64 recv_ns;
	__u64 send_ns;
	__u64 wait_rx_ns;
	__u64 wait_tx_ns;
	__u64 runqueue_ns;
	__u64 received_ns;
	__u64 answered_ns;
	__u64 client_ns;
	__u64 client_out_ns;
	__u64 server_ns;
	__u64 print_in;
	__u64 print_out;
	__u64 key;
	__u64 gap_ns;
	__u64 gap_bytes;
	__u64 hash_ns;
	__u32 printed_in;
	__u32 printed_out;
	__u32 sequence;
	__u32 tid;
	__u32 recv_calls;
	__u32 send_calls;
	__u32 status;
	__u32 flags;
	__u32 lost;
	__u32 framed;
	__u32 lost_files;
	__u32 gaps;
	__u32 hash_calls;
	__u32 pad;
};
_Static_assert(sizeof(struct bp_end_event) == 272, "bp_end_event");
_Static_assert(__builtin_offsetof(struct bp_end_event, h) == 0, "bp_end_event.h");
_Static_assert(__builtin_offsetof(struct bp_end_event, conn) == 24, "bp_end_event.conn");
_Static_assert(__builtin_offsetof(struct bp_end_event, start_ns) == 32, "bp_end_event.start_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, end_ns) == 40, "bp_end_event.end_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, established_ns) == 48, "bp_end_event.established_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, accept_ns) == 56, "bp_end_event.accept_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, first_read_ns) == 64, "bp_end_event.first_read_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, bytes_in) == 72, "bp_end_event.bytes_in");
_Static_assert(__builtin_offsetof(struct bp_end_event, bytes_out) == 80, "bp_end_event.bytes_out");
_Static_assert(__builtin_offsetof(struct bp_end_event, recv_ns) == 88, "bp_end_event.recv_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, send_ns) == 96, "bp_end_event.send_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, wait_rx_ns) == 104, "bp_end_event.wait_rx_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, wait_tx_ns) == 112, "bp_end_event.wait_tx_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, runqueue_ns) == 120, "bp_end_event.runqueue_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, received_ns) == 128, "bp_end_event.received_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, answered_ns) == 136, "bp_end_event.answered_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, client_ns) == 144, "bp_end_event.client_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, client_out_ns) == 152, "bp_end_event.client_out_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, server_ns) == 160, "bp_end_event.server_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, print_in) == 168, "bp_end_event.print_in");
_Static_assert(__builtin_offsetof(struct bp_end_event, print_out) == 176, "bp_end_event.print_out");
_Static_assert(__builtin_offsetof(struct bp_end_event, key) == 184, "bp_end_event.key");
_Static_assert(__builtin_offsetof(struct bp_end_event, gap_ns) == 192, "bp_end_event.gap_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, gap_bytes) == 200, "bp_end_event.gap_bytes");
_Static_assert(__builtin_offsetof(struct bp_end_event, hash_ns) == 208, "bp_end_event.hash_ns");
_Static_assert(__builtin_offsetof(struct bp_end_event, printed_in) == 216, "bp_end_event.printed_in");
_Static_assert(__builtin_offsetof(struct bp_end_event, printed_out) == 220, "bp_end_event.printed_out");
_Static_assert(__builtin_offsetof(struct bp_end_event, sequence) == 224, "bp_end_event.sequence");
_Static_assert(__builtin_offsetof(struct bp_end_event, tid) == 228, "bp_end_event.tid");
_Static_assert(__builtin_offsetof(struct bp_end_event, recv_calls) == 232, "bp_end_event.recv_calls");
_Static_assert(__builtin_offsetof(struct bp_end_event, send_calls) == 236, "bp_end_event.send_calls");
_Static_assert(__builtin_offsetof(struct bp_end_event, status) == 240, "bp_end_event.status");
_Static_assert(__builtin_offsetof(struct bp_end_event, flags) == 244, "bp_end_event.flags");
_Static_assert(__builtin_offsetof(struct bp_end_event, lost) == 248, "bp_end_event.lost");
_Static_assert(__builtin_offsetof(struct bp_end_event, framed) == 252, "bp_end_event.framed");
_Static_assert(__builtin_offsetof(struct bp_end_event, lost_files) == 256, "bp_end_event.lost_files");
_Static_assert(__builtin_offsetof(struct bp_end_event, gaps) == 260, "bp_end_event.gaps");
_Static_assert(__builtin_offsetof(struct bp_end_event, hash_calls) == 264, "bp_end_event.hash_calls");
_Static_assert(__builtin_offsetof(struct bp_end_event, pad) == 268, "bp_end_event.pad");

struct bp_open_event {
	struct bp_header h;
	__u64 gen;
	__u64 ns;
	__u64 key;
	__u64 dirgen;
	__u32 tid;
	__s32 fd;
	__u32 flags;
	__s32 dirfd;
};
_Static_assert(sizeof(struct bp_open_event) == 72, "bp_open_event");
_Static_assert(__builtin_offsetof(struct bp_open_event, h) == 0, "bp_open_event.h");
_Static_assert(__builtin_offsetof(struct bp_open_event, gen) == 24, "bp_open_event.gen");
_Static_assert(__builtin_offsetof(struct bp_open_event, ns) == 32, "bp_open_event.ns");
_Static_assert(__builtin_offsetof(struct bp_open_event, key) == 40, "bp_open_event.key");
_Static_assert(__builtin_offsetof(struct bp_open_event, dirgen) == 48, "bp_open_event.dirgen");
_Static_assert(__builtin_offsetof(struct bp_open_event, tid) == 56, "bp_open_event.tid");
_Static_assert(__builtin_offsetof(struct bp_open_event, fd) == 60, "bp_open_event.fd");
_Static_assert(__builtin_offsetof(struct bp_open_event, flags) == 64, "bp_open_event.flags");
_Static_assert(__builtin_offsetof(struct bp_open_event, dirfd) == 68, "bp_open_event.dirfd");

struct bp_file_event {
	struct bp_header h;
	__u64 gen;
	__u64 write_bytes;
	__u64 read_bytes;
	__u64 write_ns;
	__u64 read_ns;
	__u64 sync_ns;
	__u64 other_ns;
	__u64 first_ns;
	__u64 last_ns;
	__u64 data_ns;
	__u64 key;
	__u64 print;
	__u32 printed;
	__u32 flags;
	__u32 tid;
	__u32 write_calls;
	__u32 read_calls;
	__u32 syncs;
	__u32 others;
	__u32 pad;
};
_Static_assert(sizeof(struct bp_file_event) == 152, "bp_file_event");
_Static_assert(__builtin_offsetof(struct bp_file_event, h) == 0, "bp_file_event.h");
_Static_assert(__builtin_offsetof(struct bp_file_event, gen) == 24, "bp_file_event.gen");
_Static_assert(__builtin_offsetof(struct bp_file_event, write_bytes) == 32, "bp_file_event.write_bytes");
_Static_assert(__builtin_offsetof(struct bp_file_event, read_bytes) == 40, "bp_file_event.read_bytes");
_Static_assert(__builtin_offsetof(struct bp_file_event, write_ns) == 48, "bp_file_event.write_ns");
_Static_assert(__builtin_offsetof(struct bp_file_event, read_ns) == 56, "bp_file_event.read_ns");
_Static_assert(__builtin_offsetof(struct bp_file_event, sync_ns) == 64, "bp_file_event.sync_ns");
_Static_assert(__builtin_offsetof(struct bp_file_event, other_ns) == 72, "bp_file_event.other_ns");
_Static_assert(__builtin_offsetof(struct bp_file_event, first_ns) == 80, "bp_file_event.first_ns");
_Static_assert(__builtin_offsetof(struct bp_file_event, last_ns) == 88, "bp_file_event.last_ns");
_Static_assert(__builtin_offsetof(struct bp_file_event, data_ns) == 96, "bp_file_event.data_ns");
_Static_assert(__builtin_offsetof(struct bp_file_event, key) == 104, "bp_file_event.key");
_Static_assert(__builtin_offsetof(struct bp_file_event, print) == 112, "bp_file_event.print");
_Static_assert(__builtin_offsetof(struct bp_file_event, printed) == 120, "bp_file_event.printed");
_Static_assert(__builtin_offsetof(struct bp_file_event, flags) == 124, "bp_file_event.flags");
_Static_assert(__builtin_offsetof(struct bp_file_event, tid) == 128, "bp_file_event.tid");
_Static_assert(__builtin_offsetof(struct bp_file_event, write_calls) == 132, "bp_file_event.write_calls");
_Static_assert(__builtin_offsetof(struct bp_file_event, read_calls) == 136, "bp_file_event.read_calls");
_Static_assert(__builtin_offsetof(struct bp_file_event, syncs) == 140, "bp_file_event.syncs");
_Static_assert(__builtin_offsetof(struct bp_file_event, others) == 144, "bp_file_event.others");
_Static_assert(__builtin_offsetof(struct bp_file_event, pad) == 148, "bp_file_event.pad");

struct bp_path_event {
	struct bp_header h;
	__u64 ns;
	__u64 key;
	__u64 dirgen;
	__u64 dirgen2;
	__u32 tid;
	__u32 n2;
	__s32 dirfd;
	__s32 dirfd2;
	__u32 file_flags;
	__u32 pad;
};
_Static_assert(sizeof(struct bp_path_event) == 80, "bp_path_event");
_Static_assert(__builtin_offsetof(struct bp_path_event, h) == 0, "bp_path_event.h");
_Static_assert(__builtin_offsetof(struct bp_path_event, ns) == 24, "bp_path_event.ns");
_Static_assert(__builtin_offsetof(struct bp_path_event, key) == 32, "bp_path_event.key");
_Static_assert(__builtin_offsetof(struct bp_path_event, dirgen) == 40, "bp_path_event.dirgen");
_Static_assert(__builtin_offsetof(struct bp_path_event, dirgen2) == 48, "bp_path_event.dirgen2");
_Static_assert(__builtin_offsetof(struct bp_path_event, tid) == 56, "bp_path_event.tid");
_Static_assert(__builtin_offsetof(struct bp_path_event, n2) == 60, "bp_path_event.n2");
_Static_assert(__builtin_offsetof(struct bp_path_event, dirfd) == 64, "bp_path_event.dirfd");
_Static_assert(__builtin_offsetof(struct bp_path_event, dirfd2) == 68, "bp_path_event.dirfd2");
_Static_assert(__builtin_offsetof(struct bp_path_event, file_flags) == 72, "bp_path_event.file_flags");
_Static_assert(__builtin_offsetof(struct bp_path_event, pad) == 76, "bp_path_event.pad");

struct bp_process_event {
	struct bp_header h;
	__u32 other;
	__u32 pad;
};
_Static_assert(sizeof(struct bp_process_event) == 32, "bp_process_event");
_Static_assert(__builtin_offsetof(struct bp_process_event, h) == 0, "bp_process_event.h");
_Static_assert(__builtin_offsetof(struct bp_process_event, other) == 24, "bp_process_event.other");
_Static_assert(__builtin_offsetof(struct bp_process_event, pad) == 28, "bp_process_event.pad");

struct bp_unknown_fd_event {
	struct bp_header h;
	__u64 gen;
	__s32 fd;
	__u32 pad;
};
_Static_assert(sizeof(struct bp_unknown_fd_event) == 40, "bp_unknown_fd_event");
_Static_assert(__builtin_offsetof(struct bp_unknown_fd_event, h) == 0, "bp_unknown_fd_event.h");
_Static_assert(__builtin_offsetof(struct bp_unknown_fd_event, gen) == 24, "bp_unknown_fd_event.gen");
_Static_assert(__builtin_offsetof(struct bp_unknown_fd_event, fd) == 32, "bp_unknown_fd_event.fd");
_Static_assert(__builtin_offsetof(struct bp_unknown_fd_event, pad) == 36, "bp_unknown_fd_event.pad");

struct bp_tokens_event {
	struct bp_header h;
	__u64 gen;
	__u64 key;
	__u32 tid;
	__u32 size;
};
_Static_assert(sizeof(struct bp_tokens_event) == 48, "bp_tokens_event");
_Static_assert(__builtin_offsetof(struct bp_tokens_event, h) == 0, "bp_tokens_event.h");
_Static_assert(__builtin_offsetof(struct bp_tokens_event, gen) == 24, "bp_tokens_event.gen");
_Static_assert(__builtin_offsetof(struct bp_tokens_event, key) == 32, "bp_tokens_event.key");
_Static_assert(__builtin_offsetof(struct bp_tokens_event, tid) == 40, "bp_tokens_event.tid");
_Static_assert(__builtin_offsetof(struct bp_tokens_event, size) == 44, "bp_tokens_event.size");

struct bp_body_event {
	struct bp_header h;
	__u64 print;
	__u64 bytes;
	__u32 printed;
	__u32 pad;
};
_Static_assert(sizeof(struct bp_body_event) == 48, "bp_body_event");
_Static_assert(__builtin_offsetof(struct bp_body_event, h) == 0, "bp_body_event.h");
_Static_assert(__builtin_offsetof(struct bp_body_event, print) == 24, "bp_body_event.print");
_Static_assert(__builtin_offsetof(struct bp_body_event, bytes) == 32, "bp_body_event.bytes");
_Static_assert(__builtin_offsetof(struct bp_body_event, printed) == 40, "bp_body_event.printed");
_Static_assert(__builtin_offsetof(struct bp_body_event, pad) == 44, "bp_body_event.pad");

struct bp_map_event {
	struct bp_header h;
	__u64 gen;
	__u64 size;
	__u32 prot;
	__u32 flags;
};
_Static_assert(sizeof(struct bp_map_event) == 48, "bp_map_event");
_Static_assert(__builtin_offsetof(struct bp_map_event, h) == 0, "bp_map_event.h");
_Static_assert(__builtin_offsetof(struct bp_map_event, gen) == 24, "bp_map_event.gen");
_Static_assert(__builtin_offsetof(struct bp_map_event, size) == 32, "bp_map_event.size");
_Static_assert(__builtin_offsetof(struct bp_map_event, prot) == 40, "bp_map_event.prot");
_Static_assert(__builtin_offsetof(struct bp_map_event, flags) == 44, "bp_map_event.flags");

struct bp_digest_event {
	struct bp_header h;
	__u64 bytes;
	__u64 ns;
	__u64 timed_bytes;
	__u64 key;
	__u64 read;
	__u64 wrote;
	__u64 ran_ns;
	__u32 tid;
	__u32 calls;
	__u32 algorithm;
	__u32 pad;
};
_Static_assert(sizeof(struct bp_digest_event) == 96, "bp_digest_event");
_Static_assert(__builtin_offsetof(struct bp_digest_event, h) == 0, "bp_digest_event.h");
_Static_assert(__builtin_offsetof(struct bp_digest_event, bytes) == 24, "bp_digest_event.bytes");
_Static_assert(__builtin_offsetof(struct bp_digest_event, ns) == 32, "bp_digest_event.ns");
_Static_assert(__builtin_offsetof(struct bp_digest_event, timed_bytes) == 40, "bp_digest_event.timed_bytes");
_Static_assert(__builtin_offsetof(struct bp_digest_event, key) == 48, "bp_digest_event.key");
_Static_assert(__builtin_offsetof(struct bp_digest_event, read) == 56, "bp_digest_event.read");
_Static_assert(__builtin_offsetof(struct bp_digest_event, wrote) == 64, "bp_digest_event.wrote");
_Static_assert(__builtin_offsetof(struct bp_digest_event, ran_ns) == 72, "bp_digest_event.ran_ns");
_Static_assert(__builtin_offsetof(struct bp_digest_event, tid) == 80, "bp_digest_event.tid");
_Static_assert(__builtin_offsetof(struct bp_digest_event, calls) == 84, "bp_digest_event.calls");
_Static_assert(__builtin_offsetof(struct bp_digest_event, algorithm) == 88, "bp_digest_event.algorithm");
_Static_assert(__builtin_offsetof(struct bp_digest_event, pad) == 92, "bp_digest_event.pad");

struct bp_fd_entry {
	__u64 object;
	__u32 kind;
	__u8 not_served;
	__u8 shared;
	__u8 many;
	__u8 pad;
};
_Static_assert(sizeof(struct bp_fd_entry) == 16, "bp_fd_entry");
_Static_assert(__builtin_offsetof(struct bp_fd_entry, object) == 0, "bp_fd_entry.object");
_Static_assert(__builtin_offsetof(struct bp_fd_entry, kind) == 8, "bp_fd_entry.kind");
_Static_assert(__builtin_offsetof(struct bp_fd_entry, not_served) == 12, "bp_fd_entry.not_served");
_Static_assert(__builtin_offsetof(struct bp_fd_entry, shared) == 13, "bp_fd_entry.shared");
_Static_assert(__builtin_offsetof(struct bp_fd_entry, many) == 14, "bp_fd_entry.many");
_Static_assert(__builtin_offsetof(struct bp_fd_entry, pad) == 15, "bp_fd_entry.pad");

struct bp_layout_entry {
	__u32 slot;
	__u32 member;
};
_Static_assert(sizeof(struct bp_layout_entry) == 8, "bp_layout_entry");
_Static_assert(__builtin_offsetof(struct bp_layout_entry, slot) == 0, "bp_layout_entry.slot");
_Static_assert(__builtin_offsetof(struct bp_layout_entry, member) == 4, "bp_layout_entry.member");

struct bp_hashing_entry {
	__u64 calls;
	__u64 bytes;
	__u64 ns;
	__u64 copies;
	__u64 digests;
	__u64 bytes_hashed;
	__u32 algorithm;
	__u32 keeps;
	__u8 value[64];
};
_Static_assert(sizeof(struct bp_hashing_entry) == 120, "bp_hashing_entry");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, calls) == 0, "bp_hashing_entry.calls");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, bytes) == 8, "bp_hashing_entry.bytes");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, ns) == 16, "bp_hashing_entry.ns");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, copies) == 24, "bp_hashing_entry.copies");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, digests) == 32, "bp_hashing_entry.digests");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, bytes_hashed) == 40, "bp_hashing_entry.bytes_hashed");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, algorithm) == 48, "bp_hashing_entry.algorithm");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, keeps) == 52, "bp_hashing_entry.keeps");
_Static_assert(__builtin_offsetof(struct bp_hashing_entry, value) == 56, "bp_hashing_entry.value");

#endif
