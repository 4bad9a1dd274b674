# SPDX-License-Identifier: Apache-2.0
"""Counts how sure the agent is of what it says: finished requests by label, by evidence, and by what limited them.

Only requests on artifacts count, as in the `bucket.*` metrics. One thread observes, another may read the dicts: it copies
them, which is atomic under the interpreter's lock.
"""

from __future__ import annotations

from bucketprobe.catalog import ARTIFACT_OPERATIONS, LIMITS, UNKNOWN
from bucketprobe.model import EVIDENCE, LABELS, Request


class AttributionSink:
    """`labelled` by label, `evidence` by name (a request counts in each that decided part of its file work), `limited_by`
    by client, server, storage or unknown: all there from the start, at 0."""

    __slots__ = ("evidence", "labelled", "limited_by")

    def __init__(self) -> None:
        self.labelled: dict[str, int] = dict.fromkeys(LABELS, 0)
        self.evidence: dict[str, int] = dict.fromkeys(EVIDENCE, 0)
        self.limited_by: dict[str, int] = dict.fromkeys(LIMITS, 0)

    def observe(self, request: Request) -> None:
        """Count one finished request."""
        if request.operation not in ARTIFACT_OPERATIONS:
            return
        self.labelled[request.attribution.label] += 1
        for name in request.attribution.evidence:
            self.evidence[name] = self.evidence.get(name, 0) + 1
        self.limited_by[request.limited_by or UNKNOWN] += 1
