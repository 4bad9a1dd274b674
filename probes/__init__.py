# SPDX-License-Identifier: Apache-2.0
"""BPF C by stem (GPL-2.0) and the Python half of each probe."""
