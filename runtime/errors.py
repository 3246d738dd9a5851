# SPDX-License-Identifier: Apache-2.0
"""Errors of the runtime; each message is a sentence that says what was wrong, where, and what to do."""

from __future__ import annotations


class RuntimeFailure(Exception):
    """Base of every error the runtime raises on purpose."""


class ArtifactError(RuntimeFailure):
    """A file of the artifact is missing, malformed, or not the file that was written."""


class DeviceError(RuntimeFailure):
    """The artifact cannot run on this machine's processor or GPU, or the GPU reported an error."""


class ContextError(RuntimeFailure):
    """A prompt does not fit into the model's context or into the KV cache."""


class RequestError(RuntimeFailure):
    """A generation setting is outside what it can be."""


class LogitsError(RuntimeFailure):
    """The model computed NaN or infinite logits."""
