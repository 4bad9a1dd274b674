# SPDX-License-Identifier: Apache-2.0
"""bucketprobe: sees from outside, by eBPF, where each request to an artifact store spent its time."""

from importlib.metadata import version

__version__ = version("bucketprobe")
