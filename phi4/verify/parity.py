"""Compare every layout with one process: same checkpoint, same batches, ten steps.

The batches cover difficult cases: several documents per row, a random loss mask whose counts differ
per micro-batch, data rank and context rank, and one micro-batch and one context slice that are
fully masked. Stages that train on pairs get pairs and pivots instead. Every data rank's first
micro-batch has loss tokens, because only it reveals a weight that is read before the last update
has arrived.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from phi4.config import Recipe
from phi4.data.stream.batch import Batch, build_batch
from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.engine.platform import Platform
from phi4.model.shape import Work
from phi4.stages import stage_of
from phi4.verify.layouts import BITWISE, LayoutCase
from phi4.verify.preference_batches import preference_micro_batches

LOSS_TOLERANCE = 5e-7
"""Tolerance of the loss."""
GROUP_NORM_TOLERANCE = 1e-6
"""Tolerance of the gradient norm of a parameter group."""
PARAMETER_TOLERANCE = 1e-5
"""Tolerance of the relative L2 error of a tensor."""
LEARNING_RATE = 1e-3
"""Learning rate after WARMUP_STEPS, regardless of the recipe. Adam's first updates divide a
gradient by its own size, so where a gradient is nearly zero its rounding error moves a weight by a
fraction of the rate; a larger rate would measure this amplification instead of the layout."""
WARMUP_STEPS = 10
_EOD_ID = 0


@dataclass(frozen=True)
class Comparison:
    """Comparison of one layout with one process."""

    name: str
    loss_error: float
    """Largest |difference| / loss over the steps."""
    grad_norm_error: float
    group_norm_error: float
    """The same of the worst parameter group's gradient norm."""
    same_work: bool
    """Whether both counted the same tokens and squared document lengths."""
    parameter_error: float
    """Relative L2 error of the worst tensor after the last step."""
    worst_parameter: str

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerances; recompute layouts must be bit-identical."""
        if self.name in BITWISE:
            errors = (self.loss_error, self.group_norm_error, self.parameter_error)
            return self.same_work and errors == (0, 0, 0)
        return (
            self.same_work
            and self.loss_error <= LOSS_TOLERANCE
            and self.group_norm_error <= GROUP_NORM_TOLERANCE
            and self.parameter_error <= PARAMETER_TOLERANCE
        )


def run_case(
    case: LayoutCase, platform: Platform, objective: Objective, *, steps: int, work_dir: Path
) -> None:
    """Train one layout on this rank and write losses and final parameters under work_dir.

    The first case of a work_dir (one process) writes the initial checkpoint; the others load it.

    Collectives: those of the engine; one all-gather over tp per split tensor.
    """
    engine = Engine(case.recipe, platform)
    initial = work_dir / "initial"
    if initial.is_dir():
        checkpoint = initial / "step_0000000"
        manifest = verify_checkpoint(engine, checkpoint)
        load_checkpoint(engine, checkpoint, manifest, optimizer=False)
    else:
        save_checkpoint(engine, initial, 0, form="none", keep=1, files={}, data={})
    results = [_step(engine, case.recipe, objective, step) for step in range(steps)]
    out = _folder(work_dir, case)
    out.mkdir(parents=True, exist_ok=True)
    parameters = dict(engine.whole_parameters())
    layout = engine.layout
    if (layout.tp_rank, layout.dp_rank, layout.cp_rank) == (0, 0, 0):
        cpu = {name: tensor.float().cpu().contiguous() for name, tensor in parameters.items()}
        save_file(cpu, out / f"stage_{layout.pp_rank}.safetensors")
    if platform.is_writer:
        (out / "steps.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    engine.close()


def compare(case: LayoutCase, reference: LayoutCase, work_dir: Path) -> Comparison:
    """Compare the results of two cases."""
    expected, found = (
        np.array(json.loads((_folder(work_dir, c) / "steps.json").read_text()))
        for c in (reference, case)
    )
    numbers = slice(0, -len(Work._fields))
    errors = np.abs(found - expected)[:, numbers] / np.abs(expected)[:, numbers]
    truth, tensors = _parameters(work_dir, reference), _parameters(work_dir, case)
    assert truth.keys() == tensors.keys(), truth.keys() ^ tensors.keys()
    by_name = {
        name: float(torch.linalg.vector_norm(tensors[name] - tensor))
        / max(float(torch.linalg.vector_norm(tensor)), 1e-30)
        for name, tensor in truth.items()
    }
    worst = max(by_name, key=by_name.__getitem__)
    return Comparison(
        name=case.name,
        loss_error=float(errors[:, 0].max()),
        grad_norm_error=float(errors[:, 1].max()),
        group_norm_error=float(errors[:, 2:].max()),
        same_work=np.array_equal(found[:, numbers.stop :], expected[:, numbers.stop :]),
        parameter_error=by_name[worst],
        worst_parameter=worst,
    )


def global_batch(recipe: Recipe, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Make token ids [rows, S + 1] and loss mask [rows, S] of a step, the same for every layout."""
    rows, length = recipe.batch.global_batch_size, recipe.data.sequence_length
    random = np.random.default_rng([recipe.run.seed, step])
    tokens = random.integers(1, recipe.model.vocab_size, (rows, length + 1))
    # Half of the tokens are determined by the one before, so that the model can learn something.
    followers = tokens[:, 1::2]
    followers[:] = tokens[:, 0::2][:, : followers.shape[1]] * 7 % (recipe.model.vocab_size - 1) + 1
    tokens[random.random(tokens.shape) < 4 / length] = _EOD_ID
    density = random.uniform(0.1, 0.9, (rows, 1))
    mask = (random.random((rows, length)) < density).astype(np.float32)
    size = recipe.batch.micro_batch_size
    if rows >= 4 * size:
        # The last but one: it is a data rank's first micro-batch only if each has just one.
        mask[-2 * size : -size] = 0
    mask[-1, length // 4 : 3 * length // 4] = 0
    return tokens, mask


def micro_batches(recipe: Recipe, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """Return the micro-batches of one data rank: every dp_size-th group of rows."""
    tokens, mask = global_batch(recipe, step)
    size = recipe.batch.micro_batch_size
    return [
        build_batch(
            tokens[start : start + size, :-1],
            tokens[start : start + size, 1:],
            mask[start : start + size],
            eod_id=_EOD_ID,
        )
        for start in range(dp_rank * size, tokens.shape[0], dp_size * size)
    ]


def _step(engine: Engine, recipe: Recipe, objective: Objective, step: int) -> list[float]:
    """Return loss, gradient norm, the norm of each parameter group, and the counts of `Work`."""
    takes_pairs = "pairs" in stage_of(recipe).source_kinds
    serve = preference_micro_batches if takes_pairs else micro_batches
    batches = serve(recipe, step, engine.layout.dp_rank, engine.layout.dp_size)
    rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
    result = engine.train_step(batches, objective, learning_rate=rate, by_group=True)
    return [result.loss, result.grad_norm, *result.group_norms.values(), *result.work]


def _folder(work_dir: Path, case: LayoutCase) -> Path:
    return work_dir / case.name.replace(" ", "_")


def _parameters(work_dir: Path, case: LayoutCase) -> dict[str, torch.Tensor]:
    stages = sorted(_folder(work_dir, case).glob("stage_*.safetensors"))
    return {name: tensor for stage in stages for name, tensor in load_file(stage).items()}
