# SPDX-License-Identifier: Apache-2.0
"""The reference Bucket, its clients and the demonstration. Nothing here is imported by the agent."""
