# SPDX-License-Identifier: Apache-2.0
"""Counts what the agent knows of digests: finished requests by where the time of their hashing comes from, by how the computed
digest compares with the declared one, and by what said that it does not fit.

Only requests on artifacts count, as in the `bucket.*` metrics. One thread observes, another may read the dicts: it copies
them, which is atomic under the interpreter's lock.
"""

from __future__ import annotations

from bucketprobe.catalog import ARTIFACT_OPERATIONS, COMPARED, MISMATCH_SOURCES, UNKNOWN
from bucketprobe.model import DIGEST_SOURCES, Request


class IntegritySink:
    """`requests` by source of the time, `compared` by match, mismatch or unknown (only those that declare a digest), `mismatches` by
    source: all there from the start, at 0. `accepted`: how many of the mismatches were answered with success. All are the fields of
    the same names of `catalog.DigestHealth`."""

    __slots__ = ("accepted", "compared", "mismatches", "requests")

    def __init__(self) -> None:
        self.requests: dict[str, int] = dict.fromkeys(DIGEST_SOURCES, 0)
        self.compared: dict[str, int] = dict.fromkeys(COMPARED, 0)
        self.mismatches: dict[str, int] = dict.fromkeys(MISMATCH_SOURCES, 0)
        self.accepted = 0

    def observe(self, request: Request) -> None:
        """Count one finished request."""
        if request.operation not in ARTIFACT_OPERATIONS:
            return
        digest = request.digest
        self.requests[digest.source] += 1
        if digest.declared is not None:
            self.compared[digest.result or UNKNOWN] += 1
        if digest.mismatch is not None:
            self.mismatches[digest.mismatch] += 1
            self.accepted += request.status is not None and 200 <= request.status < 300
