"""A group of commands whose failed file operations are one line, like every other user error."""

from typing import Any

from typer.core import TyperGroup

from phi4.data.files.atomic_files import file_error


class FileErrorsGroup(TyperGroup):
    """Commands that read and write files of the user.

    Whatever the operating system refuses reaches `main` as a `DataError`, or as a `DiskFullError`
    where there is no room, and so ends with that error's exit code and without a traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the asked command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of the output went away: no error of a file
            raise
        except OSError as error:
            raise file_error(error) from error
