// SPDX-License-Identifier: GPL-2.0
/*
 * Connections and requests. A request is a place on a connection, and a connection is the kernel's socket: dup, fork, passing
 * and reuse of descriptors change nothing. Heads are followed byte by byte; bodies are counted and never read.
 */
#include "probe.h"

#define AF_INET 2
#define AF_INET6 10
#define TCP_ESTABLISHED 1
#define TCP_SYN_RECV 3
#define TCP_FIN_WAIT1 4
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8
#define TCP_LAST_ACK 9
#define TCP_LISTEN 10
#define METHOD_HEAD 1
#define METHOD_CONNECT 2
#define EAGAIN 11
#define TLS_HANDSHAKE 22 /* RFC 8446, 5.1: the first record's type, and the first byte of its version */
#define TLS_MAJOR 3
#define MSG_PEEK 2
#define MSG_ERRQUEUE 0x2000

INLINE struct conn *conn_new(__u64 sk, __u32 tgid, __u64 established_ns, __u32 flags)
{
	struct scratch *x = scratch();
	struct conn *c;

	if (!x)
		return 0;
	if (map_update(MAP(CONNS), &sk, &x->blank, NOEXIST)) {
		stat_add(ST_MAP_CONNECTIONS, 1);
		return 0;
	}
	c = map_lookup(MAP(CONNS), &sk);
	if (!c)
		return 0;
	c->id = unique();
	c->established_ns = established_ns;
	c->tgid = tgid;
	c->flags = flags;
	http1_next(&c->dir[0]);
	http1_next(&c->dir[1]);
	c->dir[1].response = 1;
	stat_add(ST_CONNECTIONS, 1);
	return c;
}

/* The connection of the service behind the call's descriptor, or 0. One that is older than the agent is met here. */
INLINE struct conn *conn_of(struct thread *t, __u32 tgid)
{
	__u64 sk = t->object, key = fd_key(tgid, t->a0);
	struct conn *c = map_lookup(MAP(CONNS), &sk);
	__u32 port, family, state;
	struct bp_fd_entry *f;

	if (c)
		return c;
	f = map_lookup(MAP(FDS), &key);
	if (f && f->not_served)
		return 0;
	port = kernel_short(sk + OFF_SOCK_NUM);
	family = kernel_short(sk + OFF_SOCK_FAMILY);
	state = kernel_short(sk + OFF_SOCK_STATE) & 255;
	if ((family == AF_INET || family == AF_INET6) && (state == TCP_ESTABLISHED || state == TCP_CLOSE_WAIT) &&
	    map_lookup(MAP(PORTS), &port)) {
		stat_add(ST_CONNECTIONS_OLD, 1);
		return conn_new(sk, tgid, 0, RF_OLD);
	}
	if (f)
		f->not_served = 1;
	return 0;
}

/* Opens the slot of the request whose first bytes are being read now. */
INLINE void slot_open(struct conn *c, struct slot *s, __u64 enter_ns, __u64 now)
{
	__u64 ready = c->ready_ns ? c->ready_ns : c->last_ready_ns;

	s->rid = unique();
	s->start_ns = now;
	if (ready) {
		s->flags |= RF_QUEUE_SEEN;
		s->start_ns = ready;
		/* A first request that lay there before the server accepted waited from the start on: the accept queue is its queue. */
		if (!c->rx_seq && c->established_ns && (!c->accept_ns || ready <= c->accept_ns))
			s->start_ns = c->established_ns;
	}
	s->first_read_ns = enter_ns > s->start_ns ? enter_ns : s->start_ns;
	c->ready_ns = 0;
}

INLINE void slot_free(struct slot *s)
{
	s->rid = 0;
	s->start_ns = 0;
	s->first_read_ns = 0;
	s->recv_ns = 0;
	s->send_ns = 0;
	s->wait_rx_ns = 0;
	s->wait_tx_ns = 0;
	s->runqueue_ns = 0;
	s->received_ns = 0;
	s->answered_ns = 0;
	s->client_ns = 0;
	s->client_out_ns = 0;
	s->server_ns = 0;
	s->print = 0;
	s->printed = 0;
	s->file = 0;
	s->reader = 0;
	s->bytes_in = 0;
	s->recv_calls = 0;
	s->send_calls = 0;
	s->tid = 0;
	s->lost = 0;
	s->flags = 0;
	s->begun = 0;
	s->rx_complete = 0;
	s->ended = 0;
	s->method = 0;
}

INLINE struct slot *receiving(struct conn *c)
{
	return &c->q[c->rx_seq & (PIPELINE - 1)];
}

INLINE struct slot *answering(struct conn *c)
{
	return &c->q[c->tx_seq & (PIPELINE - 1)];
}

/* The request at the front of the connection, if the server can be working on it. */
INLINE struct slot *current(struct conn *c)
{
	struct slot *s = answering(c);

	if (!s->rid || s->ended)
		s = 0;
	OPAQUE(s);
	return s;
}

INLINE void lose(struct conn *c, __u32 dir, __u32 why)
{
	c->dir[dir & 1].mode = HTTP1_LOST;
	stat_add(why, 1);
}

/* Points the scratch cursor at the buffer (or vector) of a call that moved `total` bytes. */
INLINE void cursor(struct scratch *x, struct thread *t, __u32 dir, __u64 total)
{
	__u32 nr = t->nr;
	__u64 vector = 0, count = 0;

	x->sk = t->object;
	x->dir = dir;
	x->offset = 0;
	x->total = total;
	x->enter_ns = t->enter_ns;
	x->now = t->exit_ns;
	x->vectors = 0;
	x->base = t->a1;
	if (nr == NR_sendfile || nr == NR_splice) {
		x->base = 0;
	} else if (nr == NR_readv || nr == NR_writev || nr == NR_preadv || nr == NR_preadv2 || nr == NR_pwritev ||
		   nr == NR_pwritev2) {
		vector = t->a1;
		count = t->a2;
	} else if (nr == NR_recvmsg || nr == NR_sendmsg) {
		struct {
			__u64 iov, iovlen;
		} message = {};

		read_user(&message, sizeof(message), (void *)(t->a1 + 16)); /* struct msghdr: msg_iov, msg_iovlen */
		vector = message.iov;
		count = message.iovlen;
	}
	if (!vector)
		return;
	if (count > VECTORS)
		count = VECTORS;
	x->base = 0;
	BOUND(count, 31);
	if (count <= VECTORS && !read_user(x->vector, count * sizeof(struct vector), (void *)vector))
		x->vectors = count;
}

/* Forgets what the last step saw: behind the end of a head or of a chunk's size lie the first bytes of a body. */
INLINE void wipe(struct scratch *x)
{
	read_kernel(x->head.bytes, sizeof(x->head.bytes), &x->blank);
}

/* Where the byte at the cursor lies, and how many follow it there. 0: it cannot be seen. */
INLINE __u64 locate(struct scratch *x, __u64 *left)
{
	__u64 offset = x->offset;
	__u32 i;

	*left = x->total - offset;
	if (!x->vectors)
		return x->base ? x->base + offset : 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < VECTORS; i++) {
		__u64 length;

		OPAQUE(i);
		if (i >= x->vectors)
			break;
		length = x->vector[i].length;
		if (offset < length) {
			if (*left > length - offset)
				*left = length - offset;
			return x->vector[i].base + offset;
		}
		offset -= length;
	}
	stat_add(ST_VECTOR_TOO_LONG, 1);
	return 0;
}

/*
 * A read ended: what the request waited for since the one before it. While the queue was empty the client had not sent yet; from
 * when bytes came until the read began they lay unread.
 */
INLINE void waited(struct conn *c, struct slot *s, struct thread *t, int first)
{
	__u64 since = c->read_ns, filled = c->filled_ns, enter = t->enter_ns, exit = t->exit_ns;

	if (first) {
		if (s->flags & RF_QUEUE_SEEN && enter > s->start_ns)
			s->server_ns += enter - s->start_ns;
	} else if (s->rid && !s->rx_complete) {
		if (enter < since)
			enter = since;
		if (c->empty || filled > exit)
			filled = exit; /* nobody said that bytes came: they came in this call */
		else if (filled < since)
			filled = since; /* the read before left some */
		s->client_ns += filled - since;
		s->client_out_ns += (filled < enter ? filled : enter) - since;
		if (enter > filled)
			s->server_ns += enter - filled;
	}
	c->read_ns = exit;
	c->empty = kernel_half(t->object + OFF_TCP_RCV_NXT) == kernel_half(t->object + OFF_TCP_COPIED);
}

/* read, recv and their families, on a socket; splice from one */
int on_receive(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32;
	struct thread *t = thread();
	struct scratch *x = scratch();
	long ret = ctx->args[1];
	struct conn *c;
	struct slot *s;
	int first;

	if (!t || !x)
		return 0;
	if ((t->nr == NR_recvfrom && t->a3 & (MSG_PEEK | MSG_ERRQUEUE)) || (t->nr == NR_recvmsg && t->a2 & (MSG_PEEK | MSG_ERRQUEUE)))
		return 0;
	c = conn_of(t, tgid);
	if (!c)
		return 0;
	s = receiving(c);
	if (ret <= 0) {
		if (s->begun && !s->rx_complete) {
			s->recv_ns += t->took;
			s->recv_calls++;
			waited(c, s, t, 0);
		}
		return 0;
	}
	if (t->nr == NR_recvmmsg) {
		lose(c, 0, ST_CALL_UNSUPPORTED);
		return 0;
	}
	c->tgid = tgid;
	first = !s->rid && c->dir[0].mode == HTTP1_HEAD;
	if (first)
		slot_open(c, s, t->enter_ns, t->exit_ns);
	waited(c, s, t, first);
	if (s->rid) {
		__u64 took = t->exit_ns - s->start_ns;

		if (took > t->took) {
			took = t->took;
		} else if (first) {
			/* The thread slept in this read until the request came. Its wait for a CPU since then is not the network's. */
			s->runqueue_ns = t->delayed < took ? t->delayed : took;
			took -= s->runqueue_ns;
		}
		s->recv_ns += took;
		s->recv_calls++;
	}
	s = current(c);
	if (s && s->begun)
		bind(t, t->object, c, s);
	if (c->dir[0].mode == HTTP1_LOST)
		return 0;
	if (c->dir[0].mode == HTTP1_BODY && c->dir[0].left > ret && c->printed[0] >= PRINT_BYTES) {
		http1_skip(&c->dir[0], ret);
		return 0;
	}
	cursor(x, t, 0, ret);
	tail_call(ctx, MAP(HANDLERS), c->dir[0].mode == HTTP1_BODY ? H_BODY : H_FRAME);
	return 0;
}

/* The kernel took less than it was given: there was no room for more. */
INLINE int cut_short(struct thread *t, long taken)
{
	__u32 nr = t->nr;
	struct vector only = {};

	if (nr == NR_write || nr == NR_sendto)
		return taken < (long)t->a2;
	if (nr == NR_sendfile)
		return taken < (long)t->a3;
	if (nr == NR_writev && t->a2 == 1 && !read_user(&only, sizeof(only), (void *)t->a1))
		return taken < (long)only.length;
	return 0;
}

/* write, send and their families, on a socket; sendfile and splice to one */
int on_send(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	struct scratch *x = scratch();
	long ret = ctx->args[1];
	struct conn *c;
	struct slot *s;

	if (!t || !x)
		return 0;
	c = conn_of(t, pid_tgid() >> 32);
	if (!c) {
		work_flush(t); /* a pool's thread tells by a socket of the loop's that a piece of work is done */
		return 0;
	}
	if (t->nr == NR_sendmmsg) {
		lose(c, 1, ST_CALL_UNSUPPORTED);
		return 0;
	}
	s = current(c);
	if (!s || !s->begun) {
		if (ret > 0 && !(c->flags & RF_OLD) && c->dir[1].mode != HTTP1_LOST)
			stat_add(ST_UNSOLICITED, 1);
		return 0;
	}
	bind(t, t->object, c, s);
	s->send_calls++;
	s->send_ns += t->took;
	if (c->full_ns && c->full_ns < t->enter_ns)
		s->wait_tx_ns += t->enter_ns - c->full_ns;
	c->full_ns = ret == -EAGAIN || (ret > 0 && cut_short(t, ret)) ? t->exit_ns : 0;
	if (ret <= 0)
		return 0;
	c->last_tx_ns = t->exit_ns;
	if (c->dir[1].mode == HTTP1_LOST)
		return 0;
	if ((c->dir[1].mode == HTTP1_BODY && c->dir[1].left > ret && c->printed[1] >= PRINT_BYTES) || c->dir[1].mode == HTTP1_UNTIL_CLOSE) {
		http1_skip(&c->dir[1], ret);
		return 0;
	}
	cursor(x, t, 1, ret);
	tail_call(ctx, MAP(HANDLERS), c->dir[1].mode == HTTP1_BODY ? H_BODY : H_FRAME);
	return 0;
}

int on_accept(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = pid_tgid() >> 32, family;
	long ret = ctx->args[1];
	__u64 now = ktime_ns(), file, sk;
	struct conn *c;

	if (ret < 0)
		return 0;
	file = file_of(ret);
	if (!file)
		return 0;
	sk = kernel_word(kernel_word(file + OFF_FILE_PRIVATE) + OFF_SOCKET_SK);
	fd_set(tgid, ret, sk, FD_SOCKET, 0, 0);
	family = kernel_short(sk + OFF_SOCK_FAMILY);
	if (family != AF_INET && family != AF_INET6)
		return 0;
	stat_add(ST_ACCEPTED, 1);
	c = map_lookup(MAP(CONNS), &sk);
	if (!c)
		c = conn_new(sk, tgid, 0, 0);
	if (!c)
		return 0;
	if (c->established_ns && !c->accept_ns)
		stat_add(ST_DEQUEUED, 1);
	c->accept_ns = now;
	c->tgid = tgid;
	return 0;
}

/* poll, select, epoll: a thread that waits while its request's body is to come */
int on_wait(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread *t = thread();
	struct conn *c;
	struct slot *s;
	__u64 took;

	if (!t || !t->rid)
		return 0;
	c = map_lookup(MAP(CONNS), &t->sk);
	if (!c)
		return 0;
	s = answering(c);
	if (s->rid != t->rid || !s->rid)
		return 0;
	took = ktime_ns() - t->enter_ns;
	if (!s->rx_complete && !t->loop)
		s->wait_rx_ns += took;
	return 0;
}

/* The fingerprint of a body's next bytes at the cursor, while it is not of enough. */
INLINE void print_body(struct scratch *x, struct conn *c, __u32 dir)
{
	__u64 left, address, all = x->total - x->offset;

	if (c->printed[dir] >= PRINT_BYTES)
		return;
	if (all > c->dir[dir].left && c->dir[dir].mode != HTTP1_UNTIL_CLOSE)
		all = c->dir[dir].left;
	address = locate(x, &left);
	if (left > all)
		left = all;
	print_add(&c->print[dir], &c->printed[dir], address, left);
	if (c->printed[dir] < PRINT_BYTES && left < all)
		c->printed[dir] = PRINT_UNKNOWN; /* it goes on in the call's next vector */
}

/* A request's body is complete, or it has none. */
INLINE void received(struct conn *c, struct slot *s, __u64 now)
{
	s->bytes_in = c->dir[0].entity;
	s->rx_complete = 1;
	s->received_ns = now;
	s->print = c->print[0];
	s->printed = c->printed[0];
	if (s->bytes_in) {
		struct bp_body_event e = {};

		e.h.kind = EV_BODY;
		e.h.tgid = c->tgid;
		e.h.ts = now;
		e.h.rid = s->rid;
		e.bytes = s->bytes_in;
		e.print = s->print;
		e.printed = s->printed;
		emit(&e, sizeof(e), ST_RING_BODY);
	}
	c->ready_ns = 0; /* bytes of this one that came while its slot was being opened, on another CPU */
	http1_next(&c->dir[0]);
	c->rx_seq++;
	if (s->ended)
		slot_free(s);
	if (c->rx_seq - c->tx_seq >= PIPELINE && c->rx_seq != c->tx_seq)
		lose(c, 0, ST_PIPELINE_FULL);
}

/* One step through the bytes that a call moved: a body's rest, or a window of a head. Calls itself for the next. */
int on_frame(struct bpf_raw_tracepoint_args *ctx)
{
	struct scratch *x = scratch();
	__u32 dir, n, used = 0, met, first_line, tls;
	__u64 address, left, sk;
	struct thread *t;
	struct conn *c;
	struct http1 *d;
	struct slot *s, *front;
	int result;

	if (!x || x->offset >= x->total)
		return 0;
	sk = x->sk;
	c = map_lookup(MAP(CONNS), &sk);
	if (!c)
		return 0;
	dir = x->dir & 1;
	d = &c->dir[dir];
	if (d->mode == HTTP1_LOST)
		return 0;
	if (d->mode != HTTP1_HEAD) {
		tail_call(ctx, MAP(HANDLERS), d->mode == HTTP1_BODY || d->mode == HTTP1_UNTIL_CLOSE ? H_BODY : H_CHUNK);
		lose(c, dir, ST_HEAD_UNREADABLE);
		return 0;
	}
	t = thread();
	s = dir ? answering(c) : receiving(c);
	if (!dir && !s->rid)
		slot_open(c, s, x->enter_ns, x->now);
	if (dir && (!s->begun || s->ended))
		return 0;
	address = locate(x, &left);
	n = left > HTTP1_WINDOW ? HTTP1_WINDOW : left;
	BOUND(n, 2 * HTTP1_WINDOW - 1);
	if (n > HTTP1_WINDOW)
		return 0;
	if (!address || read_user(x->head.bytes, n, (void *)address)) {
		lose(c, dir, ST_HEAD_UNREADABLE);
		return 0;
	}
	x->step.n = n;
	http1_head(d, x->head.bytes, &x->step);
	result = ((volatile struct http1_step *)&x->step)->result;
	used = ((volatile struct http1_step *)&x->step)->used;
	x->offset += used;
	tls = !dir && d->head == used && x->head.bytes[0] == TLS_HANDSHAKE && x->head.bytes[1] == TLS_MAJOR;
	/* On a connection that was met in the middle this may be the rest of a body, until a whole request line says otherwise. */
	met = !dir && c->flags & RF_OLD && !c->rx_seq && !s->begun;
	first_line = d->state < HTTP1_NAME || d->state == HTTP1_SECOND;
	if (result == HTTP1_MALFORMED || (result == HTTP1_DONE && !http1_usable(d)) || (met && !first_line && !http1_known_method(d))) {
		wipe(x);
		if (!dir)
			slot_free(s);
		if (tls)
			stat_add(ST_TLS, 1);
		if (met) {
			http1_next(d); /* look again at the next read */
			return 0;
		}
		lose(c, dir, ST_HEAD_MALFORMED);
		return 0;
	}
	if (!dir && result == HTTP1_MORE && d->state == HTTP1_TOKEN && !d->line) {
		http1_next(d); /* nothing but empty lines so far, such as follow an old client's POST: no request yet */
		slot_free(s);
		goto more;
	}
	if (d->head - used >= config(CFG_HEAD_BYTES))
		used = 0; /* enough of it has been sent */
	if (met && first_line)
		used = 0;
	if (used || result == HTTP1_DONE) {
		struct bp_head_event *e = &x->head.e;
		__u32 size = used;

		e->h.kind = EV_HEAD;
		e->h.what = dir;
		e->h.n = used;
		e->h.tgid = c->tgid;
		e->h.ts = x->now;
		e->h.rid = s->rid;
		e->conn = c->id;
		e->key = t ? t->key : 0;
		e->tid = pid_tgid();
		e->lost_files = config(CFG_LOST_FILES);
		e->last = result == HTTP1_DONE;
		e->status = d->status;
		BOUND(size, 2 * HEAD_BYTES - 1);
		if (size <= HEAD_BYTES)
			s->lost += emit(&x->head, sizeof(*e) + size, ST_RING_HEAD);
	}
	if (result != HTTP1_DONE)
		goto more;
	wipe(x);
	c->printed[dir] = 0;
	c->print[dir] = 0;
	if (!dir) {
		s->begun = 1;
		s->reader = pid_tgid();
		s->method = d->first == HTTP1_METHOD_HEAD ? METHOD_HEAD : d->first == HTTP1_METHOD_CONNECT ? METHOD_CONNECT : 0;
		if (c->rx_seq != c->tx_seq)
			s->flags |= RF_PIPELINED;
		stat_add(ST_BEGUN, 1);
		front = current(c);
		if (t && front)
			bind(t, sk, c, front);
	} else if (d->status < 200) {
		if (d->status == 101) {
			stat_add(ST_UPGRADES, 1);
			c->dir[0].mode = HTTP1_LOST;
			goto finish;
		}
		stat_add(ST_INTERIM_RESPONSES, 1);
		http1_next(d);
		goto more;
	} else if (s->method == METHOD_CONNECT && d->status < 300) {
		stat_add(ST_UPGRADES, 1);
		c->dir[0].mode = HTTP1_LOST;
		goto finish;
	}
	if (dir)
		s->answered_ns = x->enter_ns;
	if (http1_body(d, dir && s->method == METHOD_HEAD))
		goto more;
	if (dir)
		goto finish;
	received(c, receiving(c), x->now);
more:
	if (x->offset >= x->total)
		return 0;
	tail_call(ctx, MAP(HANDLERS), H_FRAME);
	/* The kernel allows 33 in a row: a longer head, or more messages in one call, cannot be followed. */
	lose(c, dir, ST_HEAD_UNREADABLE);
	return 0;
finish:
	tail_call(ctx, MAP(HANDLERS), H_FINISH);
	lose(c, dir, ST_HEAD_UNREADABLE);
	return 0;
}

/* A body's bytes, which are counted; the first of them leave their fingerprint. */
int on_body(struct bpf_raw_tracepoint_args *ctx)
{
	struct scratch *x = scratch();
	struct conn *c;
	struct http1 *d;
	__u32 dir;
	__u64 sk;

	if (!x || x->offset >= x->total)
		return 0;
	sk = x->sk;
	c = map_lookup(MAP(CONNS), &sk);
	if (!c)
		return 0;
	dir = x->dir & 1;
	d = &c->dir[dir];
	print_body(x, c, dir);
	x->offset += http1_skip(d, x->total - x->offset);
	if (d->mode == HTTP1_UNTIL_CLOSE || d->left)
		return 0;
	if (dir) {
		tail_call(ctx, MAP(HANDLERS), H_FINISH);
	} else {
		received(c, receiving(c), x->now);
		if (x->offset >= x->total)
			return 0;
		tail_call(ctx, MAP(HANDLERS), H_FRAME);
	}
	lose(c, dir, ST_HEAD_UNREADABLE); /* the kernel allows 33 in a row */
	return 0;
}

#define CHUNKS 8 /* framing steps of one program; with its calls to itself, some 260 chunks in one system call */

int on_chunk(struct bpf_raw_tracepoint_args *ctx)
{
	struct scratch *x = scratch();
	struct conn *c;
	struct http1 *d;
	__u32 i, dir;
	__u64 sk;

	if (!x)
		return 0;
	sk = x->sk;
	c = map_lookup(MAP(CONNS), &sk);
	if (!c)
		return 0;
	dir = x->dir & 1;
	d = &c->dir[dir];
#pragma clang loop unroll(disable)
	for (i = 0; i < CHUNKS; i++) {
		__u64 address, left;
		int result;
		__u32 n;

		if (d->mode == HTTP1_CHUNK_DATA) {
			print_body(x, c, dir);
			x->offset += http1_skip(d, x->total - x->offset);
		}
		if (x->offset >= x->total)
			return 0;
		address = locate(x, &left);
		n = left > HTTP1_LINE ? HTTP1_LINE : left;
		BOUND(n, 31);
		if (n > HTTP1_LINE)
			return 0;
		if (!address || read_user(x->head.bytes, n, (void *)address)) {
			lose(c, dir, ST_HEAD_UNREADABLE);
			return 0;
		}
		x->step.n = n;
		http1_chunk(d, x->head.bytes, &x->step);
		result = ((volatile struct http1_step *)&x->step)->result;
		x->offset += ((volatile struct http1_step *)&x->step)->used;
		wipe(x);
		if (result == HTTP1_MALFORMED) {
			lose(c, dir, ST_CHUNK_MALFORMED);
			return 0;
		}
		if (result == HTTP1_DONE) {
			if (dir) {
				tail_call(ctx, MAP(HANDLERS), H_FINISH);
			} else {
				received(c, receiving(c), x->now);
				if (x->offset >= x->total)
					return 0;
				tail_call(ctx, MAP(HANDLERS), H_FRAME);
			}
			lose(c, dir, ST_CHUNK_TOO_MANY);
			return 0;
		}
	}
	tail_call(ctx, MAP(HANDLERS), H_CHUNK);
	lose(c, dir, ST_CHUNK_TOO_MANY); /* the kernel allows 33 in a row */
	return 0;
}

/* The final response is with the kernel, whole. */
int on_finish(struct bpf_raw_tracepoint_args *ctx)
{
	struct scratch *x = scratch();
	struct thread *t = thread();
	struct conn *c;
	struct slot *s;
	__u64 sk;

	if (!x || !t)
		return 0;
	sk = x->sk;
	c = map_lookup(MAP(CONNS), &sk);
	if (!c)
		return 0;
	s = answering(c);
	work_flush(t);
	t->answered++;
	if (s->file)
		work_emit(t, s->file, s->rid, 0);
	c->full_ns = 0;
	end_emit(c, s, t, END_COMPLETE, x->now);
	if (t->rid == s->rid)
		t->rid = 0;
	s->ended = 1;
	if (s->rx_complete)
		slot_free(s);
	c->tx_seq++;
	http1_next(&c->dir[1]);
	s = current(c);
	if (s && s->begun)
		bind(t, sk, c, s); /* the next one came in the same read: no other call will tell */
	else if (c->dir[0].mode == HTTP1_LOST)
		c->dir[1].mode = HTTP1_LOST; /* another protocol from here on */
	if (x->offset < x->total) {
		tail_call(ctx, MAP(HANDLERS), H_FRAME);
		lose(c, 1, ST_HEAD_UNREADABLE);
	}
	return 0;
}

/*
 * Ends what is unfinished on a connection that goes away, as c->outcome and c->end_ns say; only the request at its front can be
 * complete by that. They are read from memory in each round, so that the verifier walks one round, not each of them.
 */
INLINE void abandon(volatile struct conn *v)
{
	struct conn *c = (struct conn *)v;
	struct slot *s = answering(c);
	struct thread *t = thread(); /* of the server, if it is what closes; in softirq, of whoever was interrupted */
	__u32 i;

	if (c->dir[0].head && c->dir[0].mode == HTTP1_HEAD) {
		stat_add(ST_HEAD_INCOMPLETE, 1);
		http1_next(&c->dir[0]);
	}
	if (t && (!t->rid || t->rid != s->rid))
		t = 0;
	if (t)
		work_flush(t);
#pragma clang loop unroll(disable)
	for (i = 0; i < PIPELINE; i++) {
		s = answering(c);
		if (!s->rid)
			break;
		if (s->file)
			work_emit(t, s->file, s->rid, 0);
		if (s->begun && !s->ended)
			end_emit(c, s, t, v->outcome, v->end_ns);
		if (v->outcome == END_COMPLETE)
			v->outcome = END_CLIENT_CLOSED;
		slot_free(s);
		c->tx_seq++;
		http1_next(&c->dir[1]);
	}
	if (t)
		t->rid = 0;
}

/* A passive open is done: a connection, if it is to a port that a target serves. */
INLINE int established(__u64 sk, __u64 now)
{
	__u32 port = kernel_short(sk + OFF_SOCK_NUM);

	if (map_lookup(MAP(PORTS), &port) && conn_new(sk, 0, now, 0))
		stat_add(ST_QUEUED, 1);
	return 0;
}

/* sock:inet_sock_set_state(sk, old, new): a connection's life, whoever holds descriptors of it. In any context. */
int sock_state(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0], now = ktime_ns();
	__u32 old = ctx->args[1], new = ctx->args[2], port, *served;
	struct conn *c = map_lookup(MAP(CONNS), &sk);
	__u32 gone = new == TCP_CLOSE;

	if (new == TCP_LISTEN) {
		__u32 tgid = pid_tgid() >> 32, value;
		unsigned char *byte;

		port = kernel_short(sk + OFF_SOCK_NUM);
		served = map_lookup(MAP(PORTS), &port);
		byte = target_byte(tgid);
		if (!byte || !(*byte || (served && *served & PORT_CONFIGURED)))
			return 0;
		*byte = 1;
		value = PORT_SERVED | (served ? *served : 0);
		map_update(MAP(PORTS), &port, &value, 0);
		emit_process(PR_LISTEN, tgid, port);
		return 0;
	}
	if (!c)
		return new == TCP_ESTABLISHED && old == TCP_SYN_RECV ? established(sk, now) : 0;
	if (new == TCP_CLOSE_WAIT) {
		c->peer_fin = 1;
		return 0;
	}
	c->end_ns = now;
	if (new == TCP_ESTABLISHED) {
		stat_add(ST_CONNECTION_REPLACED, 1); /* the socket's memory is another connection's, and its close was not seen */
		c->outcome = END_UNOBSERVED;
		gone = 1;
	} else if (new == TCP_FIN_WAIT1 || new == TCP_LAST_ACK || new == TCP_CLOSE) {
		/* Half a response on a connection whose framing was lost is not known to be incomplete. */
		c->outcome = c->dir[1].mode == HTTP1_LOST ? END_UNOBSERVED : c->reset || c->peer_fin ? END_CLIENT_CLOSED : END_SERVER_CLOSED;
		if (c->dir[1].mode == HTTP1_UNTIL_CLOSE && !c->reset) {
			c->outcome = END_COMPLETE; /* the close is the end of such a response */
			c->end_ns = c->last_tx_ns;
		}
	} else {
		return 0;
	}
	abandon(c);
	if (!gone)
		return 0;
	stat_add(ST_CONNECTIONS_CLOSED, 1);
	if (c->established_ns && !c->accept_ns)
		stat_add(ST_DEQUEUED, 1);
	map_delete(MAP(CONNS), &sk);
	return new == TCP_ESTABLISHED ? established(sk, now) : 0;
}

/* tcp:tcp_receive_reset(sk): the peer broke the connection off */
int sock_reset(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0];
	struct conn *c = map_lookup(MAP(CONNS), &sk);

	if (c)
		c->reset = 1;
	return 0;
}

INLINE void readable(struct conn *c)
{
	c->last_ready_ns = ktime_ns();
	if (!c->ready_ns && !receiving(c)->rid)
		c->ready_ns = c->last_ready_ns;
	if (c->empty) {
		c->empty = 0;
		c->filled_ns = c->last_ready_ns;
	}
}

/* sock:sk_data_ready(sk): bytes became readable, in softirq */
int sock_ready(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0];
	struct conn *c = map_lookup(MAP(CONNS), &sk);

	if (c)
		readable(c);
	return 0;
}

/*
 * tcp:tcp_probe(sk, skb): a segment came on an established connection; in the place of sk_data_ready, which is younger than
 * Linux 6.1. It makes bytes readable if it begins no later than the next byte that is due, and ends behind it.
 */
int sock_segment(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 sk = ctx->args[0];
	struct conn *c = map_lookup(MAP(CONNS), &sk);
	struct {
		__u32 seq, end;
	} segment = {}; /* struct tcp_skb_cb begins with them */
	__u32 due;

	if (!c)
		return 0;
	due = kernel_half(sk + OFF_TCP_RCV_NXT);
	read_kernel(&segment, sizeof(segment), (void *)(ctx->args[1] + OFF_SKB_CB));
	if ((__s32)(segment.seq - due) <= 0 && (__s32)(segment.end - due) > 0)
		readable(c);
	return 0;
}
