"""Hooks: code that runs after every step, adds metrics, and may stop the run or roll it back.

Order in the loop: the step; every hook's `measure`, into one record per step; the record to the
trackers; every hook's `remember`, into the run's state; every hook's `act`; then what their
decisions require. A save therefore never precedes the record of the step it contains, and a step
that a hook rejects is never saved.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from phi4.config import Recipe
from phi4.data.stream.loader import HeldOut
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.engine.engine import Engine
from phi4.engine.model.host_batch import HostBatch
from phi4.engine.objective import Objective
from phi4.engine.platform import Platform
from phi4.engine.step_values import StepResult
from phi4.errors import ConfigError
from phi4.rundir import Lease
from phi4.rundir.state import RunState
from phi4.train.reliability.phases import Phases
from phi4.train.reliability.requests import Requests

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continue:
    """Continue with the next step."""


@dataclass(frozen=True)
class SaveAndStop:
    """Save this step and end the run; the same command resumes from it later."""

    reason: str
    status: Literal["interrupted", "finished"] = "interrupted"
    """What the trackers show."""
    exit_code: int = 0
    """Exit code of the run."""


@dataclass(frozen=True)
class RollBack:
    """Undo steps and skip the data that they consumed.

    The run returns to its newest checkpoint that loads and is at least `steps` steps back, and
    skips all data consumed since. The number of rollbacks is not limited here: a hook that requests
    them counts its own.

    Raises:
        ConfigError: fewer than one step.
    """

    steps: int
    reason: str
    of_bad_numbers: bool = False
    """Whether bad numbers are the cause: then, if no checkpoint is old enough, the run diverged."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"RollBack(steps={self.steps}) undoes nothing; use at least 1")


Decision = Continue | SaveAndStop | RollBack
CONTINUE = Continue()


def strongest(decisions: Sequence[Decision]) -> Decision:
    """The decision that takes effect: a stop wins over a rollback, a rollback over continuing.

    Of several stops the first one wins, of several rollbacks the one that undoes most steps.
    """
    stops = [decision for decision in decisions if isinstance(decision, SaveAndStop)]
    if stops:
        return stops[0]
    roll_backs = [decision for decision in decisions if isinstance(decision, RollBack)]
    return max(roll_backs, key=lambda decision: decision.steps, default=CONTINUE)


@dataclass(frozen=True)
class Progress:
    """State of the run after a step."""

    state: RunState
    total_steps: int
    step_tokens: int
    step_seconds: float
    learning_rate: float
    result: StepResult
    batches: Sequence[HostBatch] = ()
    """This data rank's micro-batches of the step."""

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.state.step

    @property
    def is_last(self) -> bool:
        """Whether the run ends with this step."""
        return self.step >= self.total_steps

    def is_due(self, every: int) -> bool:
        """Whether something that is done every `every` steps, and at the end, is due now."""
        return self.is_last or (every > 0 and self.step % every == 0)


class Hook:
    """Base of all hooks.

    Every rank calls every hook in the same order, so a hook may use collectives.

    Decisions must be the same on every rank: a rank that continues alone waits for the others until
    its collective times out. A decision derived from the step's result, the state or the recipe is
    the same everywhere. One that depends on what a single rank observes (a signal, a file, a clock)
    must be shared first: by `phi4.engine.agreement.decided_by_writer` if rank 0 decides, or by a
    reduction of the hook's own if any rank may.

    Errors: if a hook, the step or the record raises, `on_error` of every started hook is called in
    order, then `close` in reverse order. That happens on the ranks that raise. No collective per
    step propagates errors, so a hook that raises on a single rank ends that process, and the
    launcher kills its peers while they wait in a collective: their hooks are not notified. A hook
    that can fail on a single rank does its work inside `phi4.engine.agreement.done_by_all` or
    `raise_together`; then all ranks raise.
    """

    def start(self, state: RunState) -> None:
        """Before the first step; acquire here, and not in the constructor, what `close` releases.

        Args:
            state: where training resumes.
        """

    def measure(self, progress: Progress) -> dict[str, float]:
        """Numbers for the step's record."""
        return {}

    def remember(self, state: RunState) -> RunState:
        """The state of the step, with any measurements that a resumed run needs."""
        return state

    def act(self, progress: Progress) -> Decision:
        """Do anything else, after the record is written; decides how the run continues."""
        return CONTINUE

    def rewind(self, state: RunState) -> None:
        """The run was rolled back: drop what was measured in the steps after `state.step`."""

    def on_error(self, error: BaseException) -> None:
        """The run ends with an error, not necessarily of this hook; `close` follows.

        After an OwnershipError the run directory belongs to another run: write nothing there.
        """

    def close(self) -> None:
        """Release what `start` acquired; called once, also where `start` itself raised."""


@dataclass(frozen=True)
class RunContext:
    """What a hook factory receives.

    Attributes:
        recipe: the run's recipe.
        platform: this process.
        engine: holds model and optimizer as of `state`.
        objective: the stage's loss.
        tokenizer: the tokenizer of the sources.
        source_hashes: sha256 of each data source's content, by name.
        held_out: open sources of `data.held_out`, by name.
        state: the state from which training resumes.
        lease: on the writer rank; None on the others.
        say: prints one line to the console; silent on ranks other than the writer.
        phases: the part of the run that this rank is in; entered by the training thread.
        requests: requests to the run from outside.
    """

    recipe: Recipe
    platform: Platform
    engine: Engine
    objective: Objective
    tokenizer: TokenizerFacts
    source_hashes: Mapping[str, str]
    held_out: Mapping[str, HeldOut]
    state: RunState
    lease: Lease | None
    say: Callable[[str], None]
    phases: Phases
    requests: Requests

    @property
    def owned_lease(self) -> Lease:
        """The lease, on the writer rank."""
        assert self.lease is not None, "only the writer rank holds the lease"
        return self.lease


HookFactory = Callable[[RunContext], Sequence[Hook]]
"""Called once on every rank, before any file of an earlier attempt is overwritten; returns any
number of hooks, the same on every rank."""


@contextmanager
def running(hooks: Sequence[Hook], state: RunState) -> Iterator[None]:
    """Start hooks for the duration of the block; report an error to them, and always close them.

    An error of `on_error`, and of `close` after another error, is logged and does not hide the
    first one. At a normal end all hooks are closed, then the first error of a `close` is raised.
    """
    started: list[Hook] = []
    try:
        for hook in hooks:
            started.append(hook)
            hook.start(state)
        yield
    except BaseException as error:
        for hook in started:
            _failure_of(hook, "on_error", error)
        for hook in reversed(started):
            _failure_of(hook, "close")
        raise
    failures = [_failure_of(hook, "close") for hook in reversed(started)]
    for failure in failures:
        if failure is not None:
            raise failure


def _failure_of(hook: Hook, method: str, *arguments: object) -> Exception | None:
    """Call a method; logs and returns the exception that it raised, if any."""
    try:
        getattr(hook, method)(*arguments)
    except Exception as error:
        _log.error("%s.%s: %s: %s", type(hook).__name__, method, type(error).__name__, error)
        return error
    return None
