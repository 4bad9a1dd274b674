# SPDX-License-Identifier: Apache-2.0
"""Which operation of the Bucket v1 contract a request is, and which artifact it names.

The shape of the path decides the operation, the contract's forms decide the names: a PUT with a forbidden bucket id is
still a write, which the server answers with 400, but its bucket id is None. So nothing that a client made up reaches a
record or a label unless the contract allows it as a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from bucketprobe.http1 import MAX_PATH
from bucketprobe.model import Operation

ARTIFACT = "/v1/{bucket_id}/{artifact_id}"
VERSIONS = "/v1/{bucket_id}/{artifact_id}/versions"

_ID = re.compile(rb"[A-Za-z0-9._-]{1,255}")
_VERSION = re.compile(r'[^/\\:*?"<>|]{1,100}')


@dataclass(slots=True, frozen=True)
class Route:
    """`template` is `ARTIFACT`, `VERSIONS` or, for `other`, None. Names that are absent or not of their form are None."""

    operation: Operation
    template: str | None = None
    bucket_id: str | None = None
    artifact_id: str | None = None
    version: str | None = None


_OTHER = Route("other")


def classify(method: str, path: str, query: Mapping[str, str], artifact_version: str | None = None) -> Route:
    """The route of a request as `http1.RequestHead` gives it; `artifact_version` is its X-Artifact-Version header.

    `path` is still percent-encoded and is decoded once, after it was split, as the forms allow no slash. A path that
    was cut may have had any shape, so it is `other`.
    """
    segments = path.split("/")
    if len(path) >= MAX_PATH or segments[:2] != ["", "v1"] or not all(segments[2:]):
        return _OTHER
    names = segments[2:]
    if len(names) == 3 and names[2] == "versions" and method == "GET":
        return Route("list", VERSIONS, _identifier(names[0]), _identifier(names[1]))
    operation = _operation(method, query) if len(names) == 2 else None
    if operation is None:
        return _OTHER
    version = artifact_version if operation == "write" else query.get("version")
    return Route(operation, ARTIFACT, _identifier(names[0]), _identifier(names[1]), _version(version))


def _operation(method: str, query: Mapping[str, str]) -> Operation | None:
    if method == "PUT":
        return "write"
    if method == "HEAD":
        return "metadata"
    if method == "GET":
        # Clients in Python send `True`.
        return "metadata" if query.get("metadata_only", "").lower() == "true" else "read"
    return None


def _identifier(segment: str) -> str | None:
    decoded = unquote_to_bytes(segment)
    return decoded.decode("ascii") if _ID.fullmatch(decoded) else None


def _version(text: str | None) -> str | None:
    return text if text is not None and _VERSION.fullmatch(text) and text.isprintable() else None
