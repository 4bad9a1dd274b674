# SPDX-License-Identifier: Apache-2.0
"""The clients of bucketprobe.demo.load for a plain WebDAV store under the paths of Bucket v1: no digests, no metadata.

    python tests/truth/dav_load.py --port 8080 --connections 32 --requests 10000 --log client.jsonl

Options and log are those of bucketprobe.demo.load, but for `--curl-every`, which there is not. A first upload gets 201, the
same again 204, a read 200, and a read of what is not there 404.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from bucketprobe.demo import load
from bucketprobe.errors import BucketprobeError, UsageError

#: What is asked, and how often in a hundred.
WRITES = {"put": 94, "put_again": 6}
READS = {"get": 95, "get_missing": 5}
AGAIN = 204


class DavPlanner(load.Planner):
    """Decides what one thread asks next of a store that overwrites and checks nothing."""

    def next(self) -> load.Plan:
        if not self._stored:
            return self._put("put")
        if self._random.random() < self._options.put_share:
            return self._put(self._choose(WRITES))
        return self._get(self._choose(READS), self._random.choice(self._stored))

    def _upload(self, kind: str, path: str, version: str, content: load.Content, expected: int) -> load.Plan:
        return super()._upload(kind, path, version, content, AGAIN if kind == "put_again" else expected)


class DavClient(load.Client):
    """One keep-alive connection."""

    def _finish(self, sock: socket.socket, plan: load.Plan, status: int, headers: dict[bytes, bytes], outcome: load.Outcome) -> bool:
        # RFC 9110 section 8.6: a 204 must not say that it is empty.
        return super()._finish(sock, plan, status, {b"content-length": b"0", **headers}, outcome)


class DavTeam(load.Team):
    """The threads of one process."""

    def _work(self, index: int) -> None:
        name = f"{self._run_id}-{self._process}-{index}"
        planner = DavPlanner(self._options, self._block, name, f"{self._options.seed}/{self._process}/{index}")
        client, log = DavClient(self._options, self._block), load.Log(self._options.log)
        with contextlib.closing(client), contextlib.closing(log):
            for number in self._turns(index):
                plan = planner.next()
                request_id = f"{name}-{number}"
                outcome = client.exchange(plan, request_id)
                if plan.stores is not None and outcome.status == plan.expected_status:
                    planner.stored(plan.stores)
                self._tallies[index].add(plan, plan.kind, outcome)
                log.write(load.log_record(request_id, plan, plan.kind, outcome))
                if outcome.status is None:
                    self._stop.wait(load.PACE_S)


def run_team(options: load.LoadOptions, run_id: str, process: int) -> load.Tally:
    return DavTeam(options, run_id, process).run(lambda _: None)


def run(options: load.LoadOptions) -> load.LoadResult:
    """Do it. Raises UsageError where the options cannot be carried out."""
    if options.curl_every is not None:
        raise UsageError("this load has no curl; leave out --curl-every")
    load.check(options)
    run_id = os.urandom(4).hex()
    if options.processes == 1:
        return load.result(run_team(options, run_id, 0))
    total = load.Tally()
    # Not forked: the caller may have threads.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for tally in pool.map(run_team, *zip(*((options, run_id, index) for index in range(options.processes)), strict=True)):
            total.merge(tally)
    return load.result(total)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every answer was the expected one; 1: some were not; 2: the call was wrong; 130: interrupted."""
    options, as_json = load.parse_options(arguments)
    try:
        outcome = run(options)
    except BucketprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(json.dumps(outcome.record()) if as_json else load.table(outcome))
    return 0 if outcome.clean else 1


if __name__ == "__main__":
    sys.exit(main())
