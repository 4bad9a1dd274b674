/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Drives probes/include/http1.h as on_frame and on_chunk of probes/socket.bpf.c do, without a kernel, for test_framing.py.
 *
 * What the kernel's half decides besides is left out: slots, events, connections that were met in the middle.
 * Built once as a shared library, and once with -DFUZZ under the sanitizers as a program that reads streams from a file.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;

#include "http1.h"

#define CHUNKS 16

enum { MARK_HEAD, MARK_INTERIM, MARK_END, MARK_UPGRADE, MARK_LOST };

/* What was found, and where in the stream: after how many of its bytes. */
struct mark {
	__u64 at;
	__u64 entity;
	__u32 what;
	__u32 status;
};

struct framing {
	struct http1 d;
	__u64 at; /* bytes of the stream that were taken */
	__u32 response;
	__u32 answered; /* final responses so far */
	__u32 marks;
	__u32 wrong; /* a rule of the interface was broken: always 0 */
};

static __u32 mark(struct framing *f, struct mark *out, __u32 what)
{
	out[f->marks].at = f->at;
	out[f->marks].entity = f->d.entity;
	out[f->marks].what = what;
	out[f->marks].status = f->d.response ? f->d.status : 0;
	return ++f->marks;
}

/* One step over a window that is a block of its own, so that a sanitizer sees any byte read past its end. */
static __u32 step(struct framing *f, const unsigned char *bytes, __u64 left, __u32 size, struct http1_step *s,
		  void (*walk)(volatile struct http1 *, const unsigned char *, volatile struct http1_step *))
{
	__u32 n = left > size ? size : left;
	unsigned char *window = malloc(n);

	memcpy(window, bytes, n);
	s->n = n;
	s->used = ~0u;
	s->result = ~0u;
	walk(&f->d, window, s);
	free(window);
	if (s->n > n || s->used > n || s->result > HTTP1_MALFORMED || (s->result == HTTP1_MORE && !s->used))
		f->wrong = 1;
	f->at += s->used;
	return s->result;
}

static void walk_head(volatile struct http1 *d, const unsigned char *window, volatile struct http1_step *s)
{
	http1_head(d, window, s);
}

static void walk_chunk(volatile struct http1 *d, const unsigned char *window, volatile struct http1_step *s)
{
	http1_chunk(d, window, s);
}

static void lose(struct framing *f, struct mark *out)
{
	mark(f, out, MARK_LOST);
	f->d.mode = HTTP1_LOST;
}

static void finish(struct framing *f, struct mark *out)
{
	mark(f, out, MARK_END);
	f->answered++;
	http1_next(&f->d);
}

void framing_start(struct framing *f, __u32 response)
{
	memset(f, 0, sizeof(*f));
	http1_next(&f->d);
	f->d.response = response;
	f->response = response;
}

/*
 * The bytes of one call. `methods`: of the requests that the responses answer, H(EAD), C(ONNECT) or another, a NUL after the
 * last; unused for requests. `limit`: how many programs may run for one call, 0 for any number. `out` has room for as many
 * marks as the call has bytes, and two.
 */
__u32 framing_feed(struct framing *f, const unsigned char *bytes, __u64 total, const char *methods, __u32 limit, struct mark *out)
{
	struct http1 *d = &f->d;
	struct http1_step s;
	__u64 begin = f->at, offset, n;
	__u32 ran = 0, i, result;
	char method;

	f->marks = 0;
	while ((offset = f->at - begin) < total && d->mode != HTTP1_LOST) {
		if (limit && ran++ == limit) {
			lose(f, out);
			break;
		}
		if (d->mode == HTTP1_BODY || d->mode == HTTP1_UNTIL_CLOSE) {
			n = http1_skip(d, total - offset);
			if (n > total - offset)
				f->wrong = 1;
			f->at += n;
			if (d->mode == HTTP1_BODY && !d->left)
				finish(f, out);
			continue;
		}
		if (d->mode != HTTP1_HEAD) {
			for (i = 0; i < CHUNKS; i++) {
				if (d->mode == HTTP1_CHUNK_DATA)
					f->at += http1_skip(d, total - (f->at - begin));
				offset = f->at - begin;
				if (offset >= total)
					break;
				result = step(f, bytes + offset, total - offset, HTTP1_LINE, &s, walk_chunk);
				if (result == HTTP1_MALFORMED)
					lose(f, out);
				if (result == HTTP1_DONE)
					finish(f, out);
				if (result != HTTP1_MORE)
					break;
			}
			continue;
		}
		result = step(f, bytes + offset, total - offset, HTTP1_WINDOW, &s, walk_head);
		if (result == HTTP1_MALFORMED || (result == HTTP1_DONE && !http1_usable(d))) {
			lose(f, out);
			break;
		}
		if (result != HTTP1_DONE)
			continue;
		method = f->response && f->answered < strlen(methods) ? methods[f->answered] : 0;
		if (f->response && d->status < 200 && d->status != 101) {
			mark(f, out, MARK_INTERIM);
			http1_next(d);
			continue;
		}
		mark(f, out, MARK_HEAD);
		if (f->response && (d->status == 101 || (method == 'C' && d->status < 300))) {
			mark(f, out, MARK_UPGRADE);
			d->mode = HTTP1_LOST;
			break;
		}
		if (!http1_body(d, method == 'H'))
			finish(f, out);
	}
	return f->marks;
}

/* The stream ended: so does a response that only the close delimits. */
__u32 framing_close(struct framing *f, struct mark *out)
{
	f->marks = 0;
	if (f->d.mode == HTTP1_UNTIL_CLOSE)
		finish(f, out);
	return f->marks;
}

#ifdef FUZZ
/* Reads records of {u32 length, u32 response, u32 longest call} and as many bytes; prints how many there were. */
int main(int argc, char **argv)
{
	FILE *in = argc == 2 ? fopen(argv[1], "rb") : 0;
	__u32 head[3], count = 0;

	while (in && fread(head, sizeof(head), 1, in) == 1) {
		unsigned char *bytes = malloc(head[0]);
		struct mark *out = malloc((head[0] + 2ULL) * sizeof(*out));
		struct framing f;
		__u64 at, n;

		if (fread(bytes, 1, head[0], in) != head[0])
			return 2;
		framing_start(&f, head[1]);
		for (at = 0; at < head[0]; at += n) {
			n = head[0] - at < head[2] ? head[0] - at : head[2];
			framing_feed(&f, bytes + at, n, "PHC", 0, out);
			if (f.wrong || f.at > at + n || (f.at < at + n && f.d.mode != HTTP1_LOST))
				return 3;
		}
		framing_close(&f, out);
		free(out);
		free(bytes);
		count++;
	}
	printf("%u\n", count);
	return 0;
}
#endif
