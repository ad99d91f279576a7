"""The errors a user can meet.

One family: the command line prints any `Phi4Error` as a single line and exits with its exit code.
Every message says what was asked, what is true, and what to change. The codes are part of the
interface; docs/faults.md lists them with what a launcher should do.
"""

from typing import ClassVar

REQUEUE_EXIT_CODE = 5
"""A run that saved and stopped because it was told to: the same command goes on from there."""


class Phi4Error(Exception):
    """Base of all errors that a user can correct."""

    exit_code: ClassVar[int] = 2


class ConfigError(Phi4Error):
    """A recipe or an override is wrong."""


class LayoutError(ConfigError):
    """A parallel layout does not fit the model, the batch or the machines."""


class DataError(Phi4Error):
    """A token file, a source or a document is missing, damaged or foreign."""


class TokenizerError(DataError):
    """Tokenizer ranks are missing, have the wrong hash, or an id is out of range."""


class CheckpointError(Phi4Error):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""


class PlatformError(Phi4Error):
    """This machine lacks something, or a dependency has an unsupported version."""


class WorkerError(Phi4Error):
    """A worker process died; the message carries the guilty rank and its traceback."""


class SamplerError(Phi4Error):
    """A model could not answer a request: its endpoint is gone, refuses, or answers nonsense."""

    def __init__(self, message: str, request_id: int) -> None:
        super().__init__(message)
        self.request_id = request_id


class TrackingError(Phi4Error):
    """A tracking server refuses what it is asked, or is not there; training never ends by it."""


class OwnershipError(Phi4Error):
    """Another process owns the run directory, or took it over while this one was running."""

    exit_code = 3


class DiskFullError(Phi4Error):
    """The disk or the quota has too little space for what is to be written."""

    exit_code = 4


class DivergedError(Phi4Error):
    """The loss or the gradients went wrong more often than the recipe allows."""

    exit_code = 6


class NotFiniteError(DivergedError):
    """Weights that would be saved hold NaN or infinity."""


class HungError(Phi4Error):
    """A rank stopped, or no rank goes on; names it."""

    exit_code = 7


class CorruptionError(Phi4Error):
    """Ranks that must hold the same numbers do not, or the same step gave two results."""

    exit_code = 8
