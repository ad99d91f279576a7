"""A loader that reads the next step's batches while the present step is trained.

Nobody sees that: what it serves, the states it tells and where it refuses are those of `Loader`.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from phi4.data.stream.batch import Batch
from phi4.data.stream.loader import Loader


class ReadAheadLoader(Loader):
    """See the module. Arguments and errors are those of `Loader`."""

    _ahead: "_Ahead | None" = None

    def go_to(self, state: dict[str, Any] | None) -> None:
        """See `Loader.go_to`."""
        self._stop()
        super().go_to(state)

    def next_step(self, **sizes: int) -> list[Batch]:
        """See `Loader.next_step`; an error of a step is raised when that step is asked for."""
        make = partial(super().next_step, **sizes)
        if self._ahead is not None and self._ahead.sizes == sizes:
            ahead, self._ahead = self._ahead, None
            batches = ahead.result()
        else:
            self._stop()
            batches = make()
        self._ahead = _Ahead(sizes, super().state(), make)
        return batches

    def skip(self, num_rows: int) -> None:
        """See `Loader.skip`."""
        self._stop()
        super().skip(num_rows)

    def require_epochs(self, num_rows: int) -> None:
        """See `Loader.require_epochs`."""
        self._stop()
        super().require_epochs(num_rows)

    def state(self) -> dict[str, Any]:
        """See `Loader.state`: of what was served, not of what is read ahead."""
        return super().state() if self._ahead is None else self._ahead.before

    def row(self, index: int) -> Batch:
        """See `Loader.row`."""
        self._stop()
        return super().row(index)

    def describe_row(self, index: int) -> list[str]:
        """See `Loader.describe_row`."""
        self._stop()
        return super().describe_row(index)

    def _stop(self) -> None:
        """Wait for what is read ahead, and take it back."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.wait()
            super().go_to(ahead.before)


class _Ahead:
    """A step that a thread makes.

    Args:
        sizes: what it was made for.
        before: state of the loader before it.
        make: makes its batches, and moves the loader.
    """

    def __init__(
        self, sizes: dict[str, int], before: dict[str, Any], make: Callable[[], list[Batch]]
    ) -> None:
        self.sizes, self.before = sizes, before
        self._made: Future[list[Batch]] = Future()
        # A daemon, because a run that ends does not wait for a file system that hangs.
        threading.Thread(target=self._run, args=(make,), name="read ahead", daemon=True).start()

    def result(self) -> list[Batch]:
        """The batches, or the error of making them, raised."""
        return self._made.result()

    def wait(self) -> None:
        """Until they are made, well or not."""
        self._made.exception()

    def _run(self, make: Callable[[], list[Batch]]) -> None:
        try:
            self._made.set_result(make())
        except BaseException as error:  # raised where the step is asked for
            self._made.set_exception(error)
