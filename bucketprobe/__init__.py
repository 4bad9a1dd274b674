# SPDX-License-Identifier: Apache-2.0
"""bucketprobe: sees from outside, by eBPF, where each request to an artifact store spent its time."""

__version__ = "0.1.0"
