"""A loader that prefetches the next step's batches while the current step is trained.

Prefetching is invisible to callers: batches, states and errors are those of `Loader`.
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
        """See `Loader.state`; excludes prefetched steps."""
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
        """Wait for the prefetch and undo it."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.wait()
            super().go_to(ahead.before)


class _Ahead:
    """A step prefetched by a thread.

    Args:
        sizes: arguments that it was made for.
        before: state of the loader before it.
        make: makes its batches and advances the loader.
    """

    def __init__(
        self, sizes: dict[str, int], before: dict[str, Any], make: Callable[[], list[Batch]]
    ) -> None:
        self.sizes, self.before = sizes, before
        self._made: Future[list[Batch]] = Future()
        # A daemon, because a run that ends must not wait for a hanging file system.
        threading.Thread(target=self._run, args=(make,), name="read ahead", daemon=True).start()

    def result(self) -> list[Batch]:
        """Return the batches, or raise the error of making them."""
        return self._made.result()

    def wait(self) -> None:
        """Wait until they are made or have failed."""
        self._made.exception()

    def _run(self, make: Callable[[], list[Batch]]) -> None:
        try:
            self._made.set_result(make())
        except BaseException as error:  # Raised when the step is requested.
            self._made.set_exception(error)
