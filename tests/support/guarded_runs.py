"""Real runs on data with marked rows, whose loss or gradient is wrong where a plan says so."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, chdir
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from megatron.core import parallel_state

from phi4.data.stream.batch import Batch
from phi4.data.stream.read_ahead import ReadAheadLoader
from phi4.engine.engine import Engine
from phi4.engine.objective import Loss
from phi4.engine.platform import disconnect
from phi4.errors import Phi4Error
from phi4.rundir.manifest import read_manifest
from phi4.rundir.step_log import read_metrics
from phi4.stages.pretrain import NextToken
from phi4.track import Trackers
from phi4.train.hooks import CONTINUE, Decision, Hook, Progress, SaveAndStop
from phi4.train.session import run_training
from tests.support.byte_source import write_byte_source
from tests.support.engines import platform_of, tiny_recipe

ROWS = 8
RECIPE = (
    *("tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken", "model.vocab_size=352"),
    *("model.num_layers=2", "run.steps=12", "checkpoint.every=2", "checkpoint.keep=3"),
    *("reliability.spike_window=4", "reliability.max_bad_steps=1"),
    "data.sources=[{name='a', path='tokens'}]",
)
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "consumed_tokens")


def write_source(root: Path) -> None:
    """A tokenizer of the bytes, and 124 rows of tokens."""
    write_byte_source(root, np.random.default_rng(1).integers(256, size=4000))


@dataclass(frozen=True)
class Poison:
    """What is wrong with steps, counted by the rows that were drawn: data, whenever it is read.

    Attributes:
        windows: ranges of step numbers of a run that nothing happens to; their rows are wrong.
        kind: nan (loss and gradient), nan_loss (the loss alone), spike (both 1000 times as large).
        dp_rank: of which data rank's rows; None for all.
    """

    windows: tuple[range, ...] = ()
    kind: str = "nan"
    dp_rank: int | None = None


@dataclass(frozen=True)
class RunPlan:
    """A start of a run, and what happens to it.

    Attributes:
        run_dir: of it.
        overrides: of the recipe.
        poison: of its data.
        stop_after: the step after which it saves and stops; 0 for none.
        at_step: (step, what): called with the engine by every rank, the first time a step is done.
        allow_change: schedule keys may differ.
        fault: gives what is in force during the run, by rank.
    """

    run_dir: str
    overrides: tuple[str, ...] = ()
    poison: Poison = Poison()
    stop_after: int = 0
    at_step: tuple[int, Callable[[Engine], None]] | None = None
    allow_change: bool = False
    fault: Callable[[int], AbstractContextManager] | None = None


@dataclass(frozen=True)
class Ended:
    """How it ended on one rank."""

    how: str
    exit_code: int
    statuses: list[str]
    said: str


class Poisoned(NextToken):
    """Wrong where the loss mask says so."""

    gradient = "any"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, inputs, segment_sum) -> Loss:
        marked = bool((inputs.loss_mask_BS > 1).any())
        clean = replace(inputs, loss_mask_BS=inputs.loss_mask_BS.clamp(max=1.0))
        loss = super().__call__(clean, segment_sum)
        if not marked:
            return loss
        if self.kind == "nan_loss":
            return Loss(loss.loss_sum + (loss.loss_sum * torch.nan).detach(), loss.weight_sum)
        factor = {"nan": torch.nan, "spike": 1000.0}[self.kind]
        return Loss(loss.loss_sum * factor, loss.weight_sum)


class Stopping(Hook):
    """Stops after a step, and lets something happen after another one."""

    def __init__(self, plan: RunPlan, engine: Engine) -> None:
        self.plan, self.engine, self.is_ahead = plan, engine, plan.at_step is not None

    def act(self, progress: Progress) -> Decision:
        if self.is_ahead and progress.step == self.plan.at_step[0]:
            self.plan.at_step[1](self.engine)
            self.is_ahead = False
        if progress.step == self.plan.stop_after:
            return SaveAndStop("told to")
        return CONTINUE


def marking_loader(poison: Poison) -> type[ReadAheadLoader]:
    """A loader that marks rows by the place in the stream that they were drawn from."""

    class MarkingLoader(ReadAheadLoader):
        def next_step(self, **layout: int) -> list[Batch]:
            drawn = self.state()["sources"]["a"]["drawn"] // ROWS + 1
            batches = super().next_step(**layout)
            is_marked = any(drawn in window for window in poison.windows)
            if not is_marked or poison.dp_rank not in (None, layout["dp_rank"]):
                return batches
            return [replace(batch, loss_mask=batch.loss_mask * 2) for batch in batches]

    return MarkingLoader


def start(rank: int, world_size: int, root: Path, plan: RunPlan) -> Ended | None:
    """One rank of a run; None on a rank that its layout does not need."""
    recipe = tiny_recipe(*RECIPE, f"run.dir={plan.run_dir}", *plan.overrides)
    platform = platform_of(rank, recipe)
    if platform is None:
        return None
    said: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(chdir(root))
        loader = marking_loader(plan.poison)
        stack.enter_context(patch("phi4.train.sources.ReadAheadLoader", loader))
        finish = stack.enter_context(patch.object(Trackers, "finish"))
        stack.enter_context(patch("phi4.train.session.print_line", said.append))
        if plan.fault:
            stack.enter_context(plan.fault(rank))
        how, exit_code = "", 0
        try:
            ending = run_training(
                recipe,
                platform,
                Poisoned(plan.poison.kind),
                allow_change=plan.allow_change,
                hooks=(lambda context: [Stopping(plan, context.engine)],),
            )
            how = f"ended after step {ending.state.step}"
        except Phi4Error as error:
            how, exit_code = f"{type(error).__name__}: {error}", error.exit_code
        finally:
            parallel_state.destroy_model_parallel()
            disconnect()
    return Ended(how, exit_code, [one.args[0] for one in finish.mock_calls], "\n".join(said))


def recorded(run: Path, after: int = 0) -> list[tuple[float, ...]]:
    """What a run recorded of each step that does not depend on the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return [tuple(line[key] for key in COMPARED) for line in lines if line["step"] > after]


def weights(run: Path, step: int) -> dict[str, str]:
    """Hashes of a step's files with weights, optimizer and random states."""
    files = read_manifest(run / f"checkpoints/step_{step:07}").files
    found = {name: file.sha256 for name, file in files.items() if name.endswith(".distcp")}
    assert found
    return found
