# SPDX-License-Identifier: Apache-2.0
"""Sinks give a finished request its meaning: counts and histograms, records, captures."""
