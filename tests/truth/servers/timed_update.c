// SPDX-License-Identifier: Apache-2.0
//
// One call of libcrypto's EVP_DigestUpdate, timed by wall clock and by the CPU time of the thread: for digest_bucket.py, by ctypes,
// which gives up the interpreter's lock meanwhile as hashlib does. What the lock costs is outside of the two clocks.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <time.h>

struct taken {
	int64_t wall_ns;
	int64_t cpu_ns;
};

static int64_t read_clock(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int timed_update(int (*update)(void *, const void *, size_t), void *context, const void *data, size_t size, struct taken *taken)
{
	int64_t cpu_ns = read_clock(CLOCK_THREAD_CPUTIME_ID);
	int64_t wall_ns = read_clock(CLOCK_MONOTONIC);
	int done = update(context, data, size);

	taken->wall_ns = read_clock(CLOCK_MONOTONIC) - wall_ns;
	taken->cpu_ns = read_clock(CLOCK_THREAD_CPUTIME_ID) - cpu_ns;
	return done;
}
