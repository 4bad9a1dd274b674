/* SPDX-License-Identifier: GPL-2.0 */
/*
 * HTTP/1.x message framing of one direction of a connection (RFC 9112), a byte at a time, so that a head may be split anywhere.
 *
 * Pure: it takes bytes and keeps a `struct http1`. The same text runs in the kernel and, built by the host's compiler, in the
 * tests against an independent parser. It learns only what framing needs (length, chunked, status, HEAD); what a head says
 * besides is for user space. Lenient where servers are: bare LF, empty lines before a head, a status line with no reason.
 */
#ifndef BUCKETPROBE_HTTP1_H
#define BUCKETPROBE_HTTP1_H

#define HTTP1_WINDOW 256 /* bytes looked at in one step; the verifier walks each of them */
#define HTTP1_LINE 24    /* the same for chunk-size lines */

enum http1_mode {
	HTTP1_HEAD,        /* in a head, or between messages while `head` is 0 */
	HTTP1_BODY,        /* `left` bytes of a body of known length */
	HTTP1_CHUNK_SIZE,  /* in a chunk-size line, or the line end before it */
	HTTP1_CHUNK_DATA,  /* `left` bytes of a chunk */
	HTTP1_TRAILER,     /* in the lines after the last chunk */
	HTTP1_UNTIL_CLOSE, /* a response body that the close delimits */
	HTTP1_LOST,        /* framing is lost, or this is not HTTP/1.x */
};

enum http1_result { HTTP1_MORE, HTTP1_DONE, HTTP1_MALFORMED };

/*
 * One step's input and outcome. It and the state are in memory (hence volatile), also where a register would do: to the
 * verifier every round of a loop then begins alike, and it walks each round once, not once for each way to it.
 */
struct http1_step {
	__u32 n;      /* bytes to look at; set to 0 when the step is over */
	__u32 used;   /* how many of them belonged to it */
	__u32 result; /* enum http1_result */
	__u32 pad;
};

enum http1_flags {
	HTTP1_HAS_LENGTH = 1,
	HTTP1_CHUNKED = 2,
};

/* Where in a head: those from HTTP1_NUMBER on count digits. */
enum http1_state {
	HTTP1_TOKEN,  /* the first word of the first line */
	HTTP1_REST,   /* the rest of the first line */
	HTTP1_NAME,   /* a header's name */
	HTTP1_VALUE,  /* a value that does not matter */
	HTTP1_CODING, /* Transfer-Encoding's value */
	HTTP1_NUMBER, /* Content-Length's value */
	HTTP1_SECOND, /* the second word of the first line: a response's status */
};

struct http1 {
	__u64 left;   /* bytes still to come of a body or chunk */
	__u64 entity; /* entity bytes of the current message so far, framing taken off */
	__u64 hash;   /* of the current line so far */
	__u64 tail;   /* the last eight bytes, no blanks, of the line or of what follows its last comma, lower case */
	__u64 first;  /* the end of the first word, lower case: method or version */
	__u64 value;  /* number so far */
	__u64 length; /* Content-Length */
	__u32 head;   /* bytes of the current head so far */
	__u32 line;   /* bytes of the current line so far, line end not counted */
	__u32 bad;    /* not 0: a length that is no number, or two that differ */
	__u32 digits; /* all ones once the number has a digit */
	__u32 over;   /* all ones once a blank follows its digits */
	__u32 sized;  /* all ones once there is a length */
	__u16 status; /* of the response */
	__u8 mode, state, flags;
	__u8 response; /* 1 in the direction of the responses */
	__u16 pad;
};

#define HTTP1_SEED 0xcbf29ce484222325ULL
#define HTTP1_STEP(h, c) (((h) ^ (c)) * 0x100000001b3ULL) /* FNV-1a */
#define HTTP1_CONTENT_LENGTH 0xbbec6267611e62a5ULL    /* the hash of "content-length:" */
#define HTTP1_TRANSFER_ENCODING 0xbd820109c5a0a562ULL /* the hash of "transfer-encoding:" */
#define HTTP1_SEVEN 0xffffffffffffffULL              /* seven bytes of a tail */
#define HTTP1_VERSION 0x687474702f312eULL              /* "http/1." */
#define HTTP1_LAST_CODING 0x6368756e6b6564ULL          /* "chunked" */
#define HTTP1_METHOD_HEAD 0x68656164ULL                 /* "head" */
#define HTTP1_METHOD_CONNECT 0x636f6e6e656374ULL       /* "connect" */

static inline __attribute__((always_inline)) void http1_next(struct http1 *d)
{
	d->mode = HTTP1_HEAD;
	d->state = HTTP1_TOKEN;
	d->flags = 0;
	d->head = 0;
	d->line = 0;
	d->value = 0;
	d->bad = 0;
	d->digits = 0;
	d->over = 0;
	d->sized = 0;
	d->tail = 0;
	d->first = 0;
	d->length = 0;
	d->entity = 0;
	d->left = 0;
	d->status = 0;
	d->hash = HTTP1_SEED;
}

static inline __attribute__((always_inline)) void http1_stop(volatile struct http1_step *step, __u32 used, __u32 result)
{
	step->used = used;
	step->result = result;
	step->n = 0;
}

/*
 * Walks step->n (at most HTTP1_WINDOW) bytes of a head.
 * HTTP1_DONE at the blank line; HTTP1_MALFORMED where the first line is not one of HTTP/1.x.
 */
static inline __attribute__((always_inline)) void http1_head(volatile struct http1 *d, const unsigned char *win,
							      volatile struct http1_step *step)
{
	__u32 i;

	step->used = step->n;
	step->result = HTTP1_MORE;
#pragma clang loop unroll(disable)
	for (i = 0; i < HTTP1_WINDOW; i++) {
		__u32 c, low, ink;
		__s32 comma;

		if (i >= step->n)
			break;
		c = win[i];
		if (c == '\r')
			continue;
		if (c == '\n') {
			__u32 state = d->state;

			if (state == HTTP1_TOKEN) {
				if (!d->line)
					continue; /* RFC 9112 2.2: empty lines before the first one */
				http1_stop(step, i + 1, HTTP1_MALFORMED);
			} else if (state == HTTP1_REST || state == HTTP1_SECOND) {
				if (state == HTTP1_SECOND)
					d->status = d->value; /* no reason phrase */
				if (((d->response ? d->first : d->tail) >> 8 & HTTP1_SEVEN) != HTTP1_VERSION)
					http1_stop(step, i + 1, HTTP1_MALFORMED);
			} else if (state == HTTP1_NUMBER) {
				/* Masks, not branches: the verifier walks each branch in every round. */
				d->bad |= ~d->digits | (d->sized & ((d->length ^ d->value) | (d->length ^ d->value) >> 32));
				d->sized = ~0U;
				d->length = d->value;
				d->flags |= HTTP1_HAS_LENGTH;
			} else if (state == HTTP1_CODING) {
				d->flags &= ~HTTP1_CHUNKED; /* of several lines the last one counts */
				if (d->tail == HTTP1_LAST_CODING)
					d->flags |= HTTP1_CHUNKED;
			} else if (!d->line) {
				http1_stop(step, i + 1, HTTP1_DONE);
			}
			d->state = HTTP1_NAME;
			d->hash = HTTP1_SEED;
			d->line = 0;
			continue;
		}
		low = c | 0x20;
		ink = (__s32)(0x20 - c) >> 31; /* all ones, or 0 for a blank */
		d->line++;
		d->hash = HTTP1_STEP(d->hash, low);
		comma = (__s32)((c ^ ',') - 1) >> 31; /* all ones for a comma: of a list of codings the last one counts */
		d->tail = (d->tail << (8 & ink) | (low & ink)) & ~(__s64)comma;
		if (d->state >= HTTP1_NUMBER) {
			if (c - '0' < 10) {
				d->bad |= d->over | (d->value >> 60 & -(d->state & 1)); /* NUMBER is odd, SECOND even */
				d->digits = ~0U;
				d->value = d->value * 10 + (c - '0');
			} else if (d->state == HTTP1_SECOND) {
				if (d->value || ink) { /* else a second blank before it */
					d->status = d->value;
					d->state = HTTP1_REST;
				}
			} else {
				d->bad |= ink;
				d->over = d->digits;
			}
		} else if (d->state == HTTP1_NAME) {
			if (c == ':') {
				d->value = 0;
				d->digits = 0;
				d->over = 0;
				d->tail = 0;
				d->state = HTTP1_VALUE;
				if (d->hash == HTTP1_CONTENT_LENGTH)
					d->state = HTTP1_NUMBER;
				if (d->hash == HTTP1_TRANSFER_ENCODING)
					d->state = HTTP1_CODING;
			}
		} else if (d->state == HTTP1_TOKEN) {
			if (c == ' ') {
				d->first = d->tail;
				d->state = HTTP1_SECOND;
			} else if (c - 0x21 > 0x5d) {
				http1_stop(step, i, HTTP1_MALFORMED); /* no token: TLS, say */
			}
		}
	}
	d->head += step->used;
}

/* Whether the first word is a method of RFC 9110 or 5789: to be asked where a head may as well be a piece of a body. */
static inline __attribute__((always_inline)) int http1_known_method(struct http1 *d)
{
	__u64 word = d->first; /* below: get, put, head, post, patch, delete, options, trace, connect */

	return word == 0x676574ULL || word == 0x707574ULL || word == HTTP1_METHOD_HEAD || word == 0x706f7374ULL || word == 0x7061746368ULL ||
	       word == 0x64656c657465ULL || word == 0x6f7074696f6e73ULL || word == 0x7472616365ULL || word == HTTP1_METHOD_CONNECT;
}

/* Whether a complete head says how its message is framed: its length is a number and its status has three digits. */
static inline __attribute__((always_inline)) int http1_usable(struct http1 *d)
{
	return !d->bad && (!d->response || d->status - 100U < 900);
}

/*
 * After a head: sets the mode in which the message goes on. Returns 1 where a body follows, 0 where the message ends here
 * (the caller then calls http1_next). `head_request`: the request that this answers was HEAD. RFC 9112 6.3.
 */
static inline __attribute__((always_inline)) int http1_body(struct http1 *d, __u32 head_request)
{
	if (d->response && (head_request || d->status < 200 || d->status == 204 || d->status == 304))
		return 0;
	d->line = 0;
	d->value = 0;
	d->state = 0;
	if (d->flags & HTTP1_CHUNKED) {
		d->mode = HTTP1_CHUNK_SIZE;
		return 1;
	}
	if (d->flags & HTTP1_HAS_LENGTH) {
		d->mode = HTTP1_BODY;
		d->left = d->length;
		return d->length != 0;
	}
	if (!d->response)
		return 0;
	d->mode = HTTP1_UNTIL_CLOSE;
	return 1;
}

/* Takes up to n bytes of a body or chunk without looking at them; returns how many. `left` tells whether it ended. */
static inline __attribute__((always_inline)) __u64 http1_skip(struct http1 *d, __u64 n)
{
	if (d->mode != HTTP1_UNTIL_CLOSE) {
		if (n > d->left)
			n = d->left;
		d->left -= n;
		if (!d->left && d->mode == HTTP1_CHUNK_DATA)
			d->mode = HTTP1_CHUNK_SIZE;
	}
	d->entity += n;
	return n;
}

/*
 * Walks step->n (at most HTTP1_LINE) bytes of chunk framing: the line end after a chunk, the size line, the trailer.
 * HTTP1_MORE with mode HTTP1_CHUNK_DATA where a chunk follows; HTTP1_DONE at the end of the message.
 */
static inline __attribute__((always_inline)) void http1_chunk(volatile struct http1 *d, const unsigned char *win,
							       volatile struct http1_step *step)
{
	__u32 i;

	step->used = step->n;
	step->result = HTTP1_MORE;
#pragma clang loop unroll(disable)
	for (i = 0; i < HTTP1_LINE; i++) {
		__u32 c, digit;

		if (i >= step->n)
			break;
		c = win[i];
		if (c == '\r')
			continue;
		if (c == '\n') {
			if (d->mode == HTTP1_TRAILER) {
				if (!d->line) {
					http1_stop(step, i + 1, HTTP1_DONE);
				}
			} else if (d->line) {
				d->left = d->value;
				d->mode = d->value ? HTTP1_CHUNK_DATA : HTTP1_TRAILER;
			}
			d->line = 0;
			d->value = 0;
			d->state = 0;
			if (d->mode == HTTP1_CHUNK_DATA)
				http1_stop(step, i + 1, HTTP1_MORE);
			continue;
		}
		d->line++;
		if (d->mode == HTTP1_TRAILER || d->state)
			continue; /* a trailer field, or a chunk extension */
		digit = c - '0';
		if (digit > 9) {
			digit = (c | 0x20) - 'a' + 10;
			if (digit < 10 || digit > 15) {
				if (d->line == 1)
					http1_stop(step, i, HTTP1_MALFORMED);
				d->state = 1;
				continue;
			}
		}
		if (d->value >> 60)
			http1_stop(step, i, HTTP1_MALFORMED);
		d->value = d->value << 4 | digit;
	}
}

#endif
