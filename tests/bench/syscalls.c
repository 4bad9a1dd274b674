// SPDX-License-Identifier: Apache-2.0
/* Times system calls in a tight loop. Reads lines "KIND CALLS ROUNDS", answers each with the ns per call of the fastest round.
 * KIND is n (write(2) of a byte to /dev/null), p (getppid(2)) or t (write(2) and read(2) of a byte on a loopback TCP connection). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int sink, sender = -1, receiver;

static void connect_pair(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t size = sizeof(address);
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);

	sender = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&address, &size) || connect(sender, (struct sockaddr *)&address, size) ||
	    (receiver = accept(listener, 0, 0)) < 0 || setsockopt(sender, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		err(1, "loopback");
	close(listener);
}

static void loop(char kind, long calls)
{
	char byte = 0;

	if (kind == 'n')
		while (calls--)
			if (write(sink, &byte, 1) != 1)
				err(1, "write");
	if (kind == 'p')
		while (calls--)
			syscall(SYS_getppid); /* not getppid(): a libc may remember */
	if (kind == 't')
		for (; calls > 0; calls -= 2)
			if (write(sender, &byte, 1) != 1 || read(receiver, &byte, 1) != 1)
				err(1, "loopback");
}

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(void)
{
	char kind;
	long calls;
	int rounds;

	sink = open("/dev/null", O_WRONLY);
	while (scanf(" %c %ld %d", &kind, &calls, &rounds) == 3) {
		double best = 0;

		if (kind == 't' && sender < 0)
			connect_pair();
		for (int i = 0; i < rounds; i++) {
			double begin = now_ns(), ns;

			loop(kind, calls);
			ns = (now_ns() - begin) / calls;
			if (!i || ns < best)
				best = ns;
		}
		printf("%.3f\n", best);
		fflush(stdout);
	}
	return 0;
}
