"""The errors a user can meet.

One family: the command line prints any `Phi4Error` as a single line and exits with 2. Every message
says what was asked, what is true, and what to change.
"""


class Phi4Error(Exception):
    """Base of all errors that a user can mend."""


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
