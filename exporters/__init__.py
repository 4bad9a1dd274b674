# SPDX-License-Identifier: Apache-2.0
"""Exporters carry results out of the process."""
