# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on: each message is a sentence that says what was wrong, where, and what to do."""

from __future__ import annotations


class GptqCompileError(Exception):
    """Base of every error this project raises on purpose; the command line prints it and exits with 2."""


class ConfigError(GptqCompileError):
    """A setting is outside what the method or the kernels define."""


class ModelError(GptqCompileError):
    """The input model is incomplete, corrupt or cannot be traced."""


class CalibrationError(GptqCompileError):
    """The calibration data is empty or unusable."""


class PassError(GptqCompileError):
    """A pass met a graph it cannot handle; names the pass, the op and the module path."""


class NoKernelError(GptqCompileError):
    """No registered kernel implements a case; the message lists every kernel's refusal.

    Attributes:
        refused: (kernel, reason) of each kernel of the op; empty if the target has none.
    """

    def __init__(self, message: str, refused: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.refused = refused


class BuildError(GptqCompileError):
    """The machine-code compiler is missing or failed."""


class OutputError(GptqCompileError):
    """The output folder exists, is not writable, or the disk is full."""
