"""What a run prints when it starts and when it ends: the facts to check before waiting for it.

Rows are wrapped at 80 columns, so that the log of a batch job stays readable.
"""

import textwrap
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from phi4.engine.precision import describe_precision
from phi4.model.shape import num_parameters
from phi4.rundir.about import about_path, read_abouts
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint
from phi4.rundir.names import CHECKPOINTS_DIR
from phi4.train.hooks import RunContext
from phi4.train.loop import Ending
from phi4.train.schedule import step_tokens

_WIDTH = 80
_LABEL_WIDTH = 12
_MOST_SOURCES = 6


def start_summary(context: RunContext) -> list[str]:
    """The lines before the first step: what is trained, where, on what and into which directory."""
    return [line for label, text in _rows(context) for line in _row(label, text)]


def already_finished(context: RunContext) -> str:
    """The line for a run whose newest checkpoint is that of its last step."""
    run, step = context.recipe.run, context.state.step
    return (
        f"already finished: {run.dir} has all {run.steps:,} steps (checkpoint of step {step}); "
        f"to train further, raise run.steps: run.steps=N --change with N > {step}"
    )


def end_summary(context: RunContext, ending: Ending, seconds: float) -> list[str]:
    """The lines after the last step.

    Args:
        context: the run's context.
        ending: the ending of a run that trained at least one step and has completed all of them.
        seconds: time since this attempt's start summary was printed.
    """
    run_dir, state = context.recipe.run.dir, ending.state
    assert state is not None
    took = timedelta(seconds=round(seconds))
    numbers = f"{state.step:,} steps, {state.consumed_tokens:,} tokens, {took} since this start"
    loss = "" if ending.loss is None else f", last loss {ending.loss:.4f}"
    return [
        f"finished: {numbers}{loss}",
        f"checkpoint: {latest_checkpoint(checkpoints_dir(run_dir))}",
        f"next: phi4 report {run_dir}",
    ]


def _rows(context: RunContext) -> Iterator[tuple[str, str]]:
    recipe, engine = context.recipe, context.engine
    model, steps_left = recipe.model, recipe.run.steps - context.state.step
    yield "stage", recipe.run.stage
    yield (
        "model",
        f"{_count(num_parameters(model))} parameters: {model.num_layers} layers, hidden "
        f"{model.hidden_size}, {model.num_attention_heads} heads ({model.num_key_value_heads} KV), "
        f"vocabulary {model.vocab_size:,}",
    )
    yield "platform", context.platform.describe().removeprefix("platform: ")
    yield "layout", engine.layout.describe().removeprefix("layout: ")
    yield "kernels", _kernels(context)
    yield "precision", describe_precision(recipe)
    yield "data", _shares(context)
    yield (
        "step",
        f"{step_tokens(recipe):,} tokens ({recipe.batch.global_batch_size:,} rows of "
        f"{recipe.data.sequence_length:,})",
    )
    yield (
        "steps",
        f"{recipe.run.steps:,}; {steps_left:,} to do, {steps_left * step_tokens(recipe):,} tokens",
    )
    yield "start", f"after step {context.state.step:,}" if context.state.step else "new run"
    yield "run.dir", recipe.run.dir
    yield "MLflow", _mlflow(context)


def _row(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{label + ':':{_LABEL_WIDTH}}",
        subsequent_indent=" " * _LABEL_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _kernels(context: RunContext) -> str:
    """The implementations, each with its reason and its ops, or the record that has the same."""
    recorded = _recorded_kernels(context)
    if recorded is not None:
        return f"as in {recorded}"
    ops: dict[tuple[str, str], list[str]] = {}
    for choice in context.engine.choices:
        ops.setdefault((choice.implementation, choice.reason), []).append(choice.op)
    return "; ".join(
        f"{implementation} ({reason}): {', '.join(names)}"
        for (implementation, reason), names in ops.items()
    )


def _recorded_kernels(context: RunContext) -> Path | None:
    """The newest record of this run, or of the one that its weights are from, if it has the same
    implementations for the same reasons."""
    if not context.platform.is_writer:
        # The summary of another rank is not printed.
        return None
    run = context.recipe.run
    chosen = {
        choice.op: (choice.implementation, choice.reason) for choice in context.engine.choices
    }
    for place in (Path(run.dir), *([_run_of(Path(run.init_from))] if run.init_from else [])):
        if abouts := read_abouts(place):
            newest = abouts[-1]
            ops = newest.kernels.items()
            recorded = {op: (name, newest.kernel_reasons.get(op)) for op, name in ops}
            return about_path(place, newest.attempt) if recorded == chosen else None
    return None


def _run_of(place: Path) -> Path:
    """The run directory of a run or of one of its checkpoints."""
    is_checkpoint = place.parent.name == CHECKPOINTS_DIR
    return place.parent.parent if is_checkpoint else place


def _shares(context: RunContext) -> str:
    """The blend by descending share."""
    data = context.recipe.data
    used = [source for source in data.sources if source.weight > 0]
    total = sum(source.weight for source in used)
    sources = sorted(used, key=lambda source: -source.weight)
    shown = [f"{one.name} {one.weight / total:.1%}" for one in sources[:_MOST_SOURCES]]
    if len(sources) > _MOST_SOURCES:
        shown.append(f"and {len(sources) - _MOST_SOURCES} more")
    return f"{', '.join(shown)} (of {data.weigh_by})"


def _mlflow(context: RunContext) -> str:
    tracking = context.recipe.tracking
    if not tracking.mlflow:
        return "off (tracking.mlflow=true turns it on)"
    store = Path(context.recipe.run.dir).parent / "mlflow.db"
    return tracking.uri or f"MLFLOW_TRACKING_URI where it is set, else {store}"


def _count(number: int) -> str:
    """A number of parameters with three digits."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
