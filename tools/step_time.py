"""Step time of the engine against a plain transformers loop, in one process on one CPU thread.

Both sides go from the same host batch to updated weights: same micro-batches, same arithmetic, same
initial weights, clipping, AdamW with decay on matrices only. Pairs are interleaved and change their
order, so what else runs on the machine meets both sides alike.

    python tools/step_time.py --pairs 40 --json benchmarks/step_time.jsonl
    python tools/step_time.py --profile
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Phi3Config, Phi3ForCausalLM

from phi4.config import Recipe, with_overrides
from phi4.convert.hf_config import hf_config
from phi4.data.stream.batch import Batch, build_batch
from phi4.engine import schedule
from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.model.names import to_hf
from phi4.stages.pretrain import NextToken
from phi4.verify.measured_rows import append_row, provenance

ATTENTION_BACKENDS = ("sdpa", "eager")
LOSS_TOLERANCE = 1e-6
"""Of the loss, over the steps before timing."""
MAX_RATIO = 1.1
"""What a step of ours may cost, as a multiple of theirs, in CPU time."""
_EOD_ID = 0

# The clipping threshold is below every gradient norm of the run, so both sides clip in every step.
_RECIPE = """
model.num_layers=4 model.hidden_size=128 model.num_attention_heads=8 model.intermediate_size=448
model.vocab_size=512 model.max_position_embeddings=256 data.sequence_length=256 data.unit_tokens=256
batch.global_batch_size=8 batch.micro_batch_size=2 optim.learning_rate=1e-3 optim.clip_grad=0.1
precision.dtype=fp32
"""

Input = TypeVar("Input")
Step = Callable[[Sequence[Batch]], float]
"""One optimizer step over host batches; returns the mean loss."""


def benchmark_recipe(num_key_value_heads: int) -> Recipe:
    """4 layers x 128 hidden x 256 tokens, vocabulary 512, 8 rows in micro-batches of 2, fp32."""
    heads = f"model.num_key_value_heads={num_key_value_heads}"
    return with_overrides(Recipe(), [*_RECIPE.split(), heads])


def host_batches(recipe: Recipe, documents_per_row: int, step: int) -> list[Batch]:
    """Return the micro-batches of a step: random tokens, every label counted."""
    rows, length = recipe.batch.global_batch_size, recipe.data.sequence_length
    random = np.random.default_rng([recipe.run.seed, step])
    tokens = random.integers(1, recipe.model.vocab_size, (rows, length + 1))
    for row in tokens:
        row[random.choice(length - 1, documents_per_row - 1, replace=False)] = _EOD_ID
    size = recipe.batch.micro_batch_size
    ones = np.ones((size, length), dtype=np.float32)
    return [
        build_batch(tokens[i : i + size, :-1], tokens[i : i + size, 1:], ones, eod_id=_EOD_ID)
        for i in range(0, rows, size)
    ]


class EngineLoop:
    """Ours: `Engine.train_step`."""

    def __init__(self, recipe: Recipe) -> None:
        self.engine = Engine(recipe, connect("cpu", threads=recipe.run.threads))
        self.rate = recipe.optim.learning_rate

    def __call__(self, batches: Sequence[Batch]) -> float:
        """See Step."""
        return self.engine.train_step(batches, NextToken(), learning_rate=self.rate).loss

    def phases(self) -> dict[str, list[tuple[Any, str]]]:
        """Return the functions that make up each phase of a step, as (owner, attribute)."""
        from megatron.core.pipeline_parallel import schedules

        forward = [(self.engine.bare_chunks[0], "run"), (schedules, "forward_step_calc_loss")]
        return {
            "batch to tensors": [(self.engine, "to_device")],
            "forward": forward,
            "backward": [(schedules, "backward_step")],
            "zero gradients": [(self.engine.chunks[0], "zero_grad_buffer")],
            "reduce gradients": [(schedule, "finalize_model_grads")],
            "clip and AdamW": [(self.engine.optimizer, "step")],
        }


def phi3_of(engine: Engine, attention: str) -> Phi3ForCausalLM:
    """transformers' model with an engine's present weights and an attention back-end of theirs."""
    model = engine.recipe.model
    settings = hf_config(model, dtype="fp32", bos_id=0, eos_id=0, pad_id=1)
    # transformers trains no embedding of a pad token, and every id here is a word.
    config = Phi3Config(**settings | {"pad_token_id": None}, attn_implementation=attention)
    phi3 = Phi3ForCausalLM(config)
    phi3.load_state_dict(dict(to_hf(*item, model) for item in engine.whole_parameters()))
    return phi3


class TransformersLoop:
    """Theirs: Phi3ForCausalLM and torch's fused AdamW, from an engine's present weights.

    Args:
        engine: where weights and hyperparameters come from.
        attention: transformers' attention back-end.
        packed: rows hold several documents, which transformers sees by their positions.
    """

    def __init__(self, engine: Engine, attention: str, packed: bool) -> None:
        optim = engine.recipe.optim
        self.model = phi3_of(engine, attention).train()
        self.parameters = list(self.model.parameters())
        matrices = [p for p in self.parameters if p.dim() > 1]
        norms = [p for p in self.parameters if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.clip_grad, self.packed = optim.clip_grad, packed

    def __call__(self, batches: Sequence[Batch]) -> float:
        """See Step."""
        num_tokens = sum(batch.labels.size for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            positions = {"position_ids": torch.from_numpy(batch.positions)} if self.packed else {}
            tokens = torch.from_numpy(batch.tokens)
            logits = self.model(tokens, use_cache=False, **positions).logits
            labels = torch.from_numpy(batch.labels).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / num_tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()

    def phases(self) -> dict[str, list[tuple[Any, str]]]:
        """As EngineLoop.phases; from_numpy is too little to time."""
        return {
            "forward": [(self.model, "forward"), (F, "cross_entropy")],
            "backward": [(torch.Tensor, "backward")],
            "zero gradients": [(self.optimizer, "zero_grad")],
            "clip and AdamW": [(torch.nn.utils, "clip_grad_norm_"), (self.optimizer, "step")],
        }


@contextmanager
def both_sides(
    documents_per_row: int, num_key_value_heads: int
) -> Iterator[tuple[EngineLoop, dict[str, TransformersLoop]]]:
    """Our loop, and theirs per attention back-end, warm and at the same weights.

    Raises:
        RuntimeError: the losses differ, so that times of the two would say nothing.
    """
    ours = EngineLoop(benchmark_recipe(num_key_value_heads))
    packed = documents_per_row > 1
    theirs = {name: TransformersLoop(ours.engine, name, packed) for name in ATTENTION_BACKENDS}
    for index in range(8):
        batches = host_batches(ours.engine.recipe, documents_per_row, index)
        loss = ours(batches)
        for name, loop in theirs.items():
            error = abs(loop(batches) - loss) / loss
            if not error <= LOSS_TOLERANCE:
                raise RuntimeError(f"step {index}: {name} differs by {error:.1e} of the loss")
    yield ours, theirs
    ours.engine.close()
    disconnect()


def time_steps(
    steps: Sequence[Callable[[Input], object]], inputs_of: Callable[[int], Input], rounds: int
) -> np.ndarray:
    """Seconds [rounds, steps, (wall, CPU)]; every other round runs the steps backwards."""
    times = np.empty((rounds, len(steps), 2))
    sides = range(len(steps))
    for index in range(rounds):
        inputs = inputs_of(index)
        for side in reversed(sides) if index % 2 else sides:
            start = time.perf_counter(), time.process_time()
            steps[side](inputs)
            end = time.perf_counter(), time.process_time()
            times[index, side] = np.subtract(end, start)
    return times


def ratio_interval(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Median of the pairs' ratios, and the ends of its 95% bootstrap interval."""
    ratios = ours / theirs
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return [round(float(x), 4) for x in (np.median(ratios), low, high)]


def compare(pairs: int, documents_per_row: int = 1, num_key_value_heads: int = 2) -> dict[str, Any]:
    """Time pairs of our step and theirs with the faster attention back-end; see the module."""
    with both_sides(documents_per_row, num_key_value_heads) as (ours, candidates):
        batches_of = partial(host_batches, ours.engine.recipe, documents_per_row)
        trial = np.median(time_steps(list(candidates.values()), batches_of, 9), axis=0)[:, 1]
        attention = list(candidates)[trial.argmin()]
        times = time_steps((ours, candidates[attention]), batches_of, pairs)
    engine_ms, transformers_ms = (np.median(times[..., 0], axis=0) * 1e3).round(2).tolist()
    ratio, *interval = ratio_interval(*times[..., 0].T)
    cpu_ratio, *cpu_interval = ratio_interval(*times[..., 1].T)
    return {
        "ratio": ratio,
        "ratio_95": interval,
        "cpu_ratio": cpu_ratio,
        "cpu_ratio_95": cpu_interval,
        "engine_ms": engine_ms,
        "transformers_ms": transformers_ms,
        "attention": attention,
        "attention_trial_ms": dict(zip(candidates, (trial * 1e3).round(2), strict=True)),
        "pairs": pairs,
        "documents_per_row": documents_per_row,
        "num_key_value_heads": num_key_value_heads,
        "threads": torch.get_num_threads(),
    }


def phase_ms(loop: EngineLoop | TransformersLoop, batches: Sequence[Batch]) -> dict[str, float]:
    """Median CPU milliseconds of a step's phases, of the time between them, and of the step."""
    phases = loop.phases()
    records: list[dict[str, float]] = []

    def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = call(*args, **kwargs)
            records[-1][name] += (time.process_time() - start) * 1e3
            return result

        return run

    with ExitStack() as stack:
        for name, places in phases.items():
            for owner, attribute in places:
                call = timed(getattr(owner, attribute), name)
                stack.enter_context(mock.patch.object(owner, attribute, call))
        for _ in range(30):
            records.append(dict.fromkeys((*phases, "step"), 0.0))
            timed(loop, "step")(batches)
    medians = {name: float(np.median([r[name] for r in records])) for name in records[0]}
    step = medians.pop("step")
    return medians | {"between them": step - sum(medians.values()), "step": step}


def print_profile(documents_per_row: int, num_key_value_heads: int) -> None:
    """Where the time of both sides goes, phase by phase."""
    with both_sides(documents_per_row, num_key_value_heads) as (ours, theirs):
        batches = host_batches(ours.engine.recipe, documents_per_row, 0)
        engine, transformers = phase_ms(ours, batches), phase_ms(theirs["sdpa"], batches)
    print(f"{'CPU ms per step':26}{'engine':>10}{'transformers':>14}{'difference':>12}")
    for name, ms in engine.items():
        other = transformers.get(name, 0.0)
        print(f"{name:26}{ms:10.2f}{other:14.2f}{ms - other:+12.2f}")


def keeps_bound(row: dict[str, Any]) -> bool:
    """Return whether a row's step costs at most MAX_RATIO of theirs.

    Neighbours of a shared core move single runs by some percent: the whole interval counts.
    """
    lower_end, _ = row["cpu_ratio_95"]
    return lower_end <= MAX_RATIO


def main() -> None:
    """Command line; exit code 1 when a step costs more than MAX_RATIO."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--documents", type=int, default=1, help="documents per row")
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    parser.add_argument("--profile", action="store_true", help="print phases of both sides instead")
    args = parser.parse_args()
    if args.profile:
        return print_profile(args.documents, args.kv_heads)
    row = compare(args.pairs, args.documents, args.kv_heads)
    print(json.dumps(row | provenance()))
    if args.json:
        append_row(args.json, row)
    raise SystemExit(not keeps_bound(row))


if __name__ == "__main__":
    main()
