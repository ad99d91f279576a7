"""The exception hierarchy for errors that a user can correct, and their exit codes.

The command line prints a `Phi4Error` without a traceback, one line per broken rule, and exits with
its exit code. Every line states what was given, what is required, and how to fix it. The exit codes
are part of the public interface; docs/faults.md lists them with the action that a launcher should
take.
"""

from typing import ClassVar

REQUEUE_EXIT_CODE = 5
"""A run saved and stopped on request; the same command resumes it."""


class Phi4Error(Exception):
    """Base of all errors that a user can correct."""

    exit_code: ClassVar[int] = 2


def error_text(kind: str, message: str) -> str:
    """What a user sees of an error: `kind: line` for every line of its message.

    Args:
        kind: class name of the error.
        message: one line, or one per broken rule.
    """
    return "\n".join(f"{kind}: {line}" for line in message.splitlines() or [""])


class UsageError(Phi4Error):
    """A command line with an unknown command or option, or a value that an option does not take."""


class ConfigError(Phi4Error):
    """A recipe or an override is wrong."""


class LayoutError(ConfigError):
    """A parallel layout does not fit the model, the batch or the machines."""


class DataError(Phi4Error):
    """A token file, a source or a document is missing, damaged or of an unexpected format."""


class TokenizerError(DataError):
    """A tokenizer's rank file is missing, has the wrong hash, or an id is out of range."""


class CheckpointError(Phi4Error):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""


class PlatformError(Phi4Error):
    """This machine lacks something, or a dependency has an unsupported version."""


class WorkerError(Phi4Error):
    """A worker process died; the message carries the failing rank and its traceback."""


class SamplerError(Phi4Error):
    """A model could not answer a request: its endpoint is unreachable, refuses, or sends an invalid
    reply."""

    def __init__(self, message: str, request_id: int) -> None:
        super().__init__(message)
        self.request_id = request_id


class TrackingError(Phi4Error):
    """A tracking server is unreachable or rejects a request; training never ends because of it."""


class OwnershipError(Phi4Error):
    """Another process owns the run directory, or took it over while this run was active."""

    exit_code = 3


class DiskFullError(Phi4Error):
    """The disk or the quota has too little space for the data to be written."""

    exit_code = 4


class DivergedError(Phi4Error):
    """Loss or gradients were bad more often than the recipe allows."""

    exit_code = 6


class NotFiniteError(DivergedError):
    """Weights that are about to be saved contain NaN or infinity."""


class HungError(Phi4Error):
    """A rank stopped responding, or no rank makes progress; the message names it."""

    exit_code = 7


class CorruptionError(Phi4Error):
    """Replicated values differ across ranks, or repeating a step gave different results."""

    exit_code = 8
