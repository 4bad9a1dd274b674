# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as one tree.

    BucketprobeError            exit code 1: something failed while running
    ├── UsageError              exit code 2: the call or the configuration is wrong
    │   └── ConfigError         names the file, the key and the remedy
    ├── EnvironmentLack         exit code 2: kernel, privilege or package is missing
    └── AgentBusy               exit code 3: another agent already runs on this host

Every message is one sentence that names the remedy; the command line prints it and nothing else.
"""

from __future__ import annotations


class BucketprobeError(Exception):
    """Base of all errors that are reported to a person. `exit_code` is the process's."""

    exit_code = 1


class UsageError(BucketprobeError):
    """The call cannot be carried out as it was written."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration file cannot be used."""


class EnvironmentLack(BucketprobeError):
    """The host lacks something that the agent cannot do without."""

    exit_code = 2


class AgentBusy(BucketprobeError):
    """Another agent already runs on this host."""

    exit_code = 3
