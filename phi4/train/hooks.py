"""What happens around a step: a hook measures, acts, and may end or undo the run.

Order in the loop: the step, every hook's `measure` into the step's one record, the record to the
trackers, what hooks `remember` in the run's state, every hook's `act`, then whatever their
decisions ask for. A save therefore never precedes
the record of the step it contains, and a step that a hook rejects is never saved.
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
from phi4.engine.step import StepResult
from phi4.errors import ConfigError
from phi4.rundir import Lease
from phi4.rundir.state import RunState
from phi4.train.reliability.phases import Phases
from phi4.train.reliability.requests import Requests

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continue:
    """Go on with the next step."""


@dataclass(frozen=True)
class SaveAndStop:
    """Save this step and end the run; the same command resumes from it later."""

    reason: str
    status: Literal["interrupted", "finished"] = "interrupted"
    """What the trackers show."""
    exit_code: int = 0
    """Of the run."""


@dataclass(frozen=True)
class RollBack:
    """Undo steps and skip the data that they consumed.

    The run goes back to its newest checkpoint that loads and is at least `steps` steps back, and
    resumes behind everything that was drawn since. Nothing limits how often: a hook that asks for
    it counts its own.

    Raises:
        ConfigError: fewer than one step.
    """

    steps: int
    reason: str
    of_bad_numbers: bool = False
    """Whether numbers went wrong: where no checkpoint is old enough, the run has diverged."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"RollBack(steps={self.steps}) undoes nothing; use at least 1")


Decision = Continue | SaveAndStop | RollBack
CONTINUE = Continue()


def strongest(decisions: Sequence[Decision]) -> Decision:
    """The decision that counts: a stop before a roll back before continuing; ties to the first.

    Of several roll backs the one that undoes most steps counts.
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
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.is_last or (every > 0 and self.step % every == 0)


class Hook:
    """Base of all hooks.

    Every rank calls every hook in the same order, so a hook may use collectives.

    Decisions must be the same on every rank: a rank that continues alone waits for the others until
    its collective times out. What follows from the step's result, the state or the recipe is the
    same everywhere; what one rank sees (a signal, a file, a clock) is not, and is shared first, by
    `phi4.engine.agreement.decided_by_writer` where rank 0 decides, or by a reduction of the hook's
    own where any rank may.

    Errors: where a hook, the step or the record raises, every hook that was started is told by
    `on_error`, in order, and closed, in reverse order. That happens on the ranks that raise. No
    collective per step spreads an error, so a hook that raises on one rank only ends that process,
    and its peers are killed by the launcher in whatever collective they wait in: their hooks are
    not told. A hook that can fail on one rank only does its work inside
    `phi4.engine.agreement.done_by_all` or `raise_together`; then all ranks raise.
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
        """The state of the step, with what later starts have to know of what was measured."""
        return state

    def act(self, progress: Progress) -> Decision:
        """Anything else, after the record is written; says how the run continues."""
        return CONTINUE

    def rewind(self, state: RunState) -> None:
        """The run was rolled back: forget what was seen of the steps after `state.step`."""

    def on_error(self, error: BaseException) -> None:
        """The run ends with an error of whatever part of it; `close` follows.

        After an OwnershipError the run directory is another run's: nothing may be written there.
        """

    def close(self) -> None:
        """Release what `start` acquired; called once, also where `start` itself raised."""


@dataclass(frozen=True)
class RunContext:
    """What hooks are made from.

    Attributes:
        recipe: the run.
        platform: this process.
        engine: holds model and optimizer as of `state`.
        objective: the stage's loss.
        tokenizer: whose ids the sources hold.
        source_hashes: sha256 of what each data source holds, by name.
        held_out: open sources of `data.held_out`, by name.
        state: where training resumes.
        lease: on the writer rank; None on the others.
        say: takes one line for the console; silent on ranks other than the writer.
        phases: which part of the run this rank is in; entered by the training thread.
        requests: what is asked of the run from outside.
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
"""Called once on every rank, before anything of an earlier attempt is written over; any number of
hooks, the same on every rank."""


@contextmanager
def running(hooks: Sequence[Hook], state: RunState) -> Iterator[None]:
    """Start hooks for the time of the block, and tell and close them however it ends.

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
    """Call a method; gives what it raised, logged."""
    try:
        getattr(hook, method)(*arguments)
    except Exception as error:
        _log.error("%s.%s: %s: %s", type(hook).__name__, method, type(error).__name__, error)
        return error
    return None
