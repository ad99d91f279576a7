"""Time of generation against transformers' `generate`, in one process on one CPU thread.

Two questions, answered at the same weights and prompts, by interleaved pairs that change their
order. Prefixes that an earlier call left in the cache are forgotten first.

- What a decode step costs: greedy, the time of 72 new tokens less that of 8, over 64, so that
  prefill and set-up cancel. Both sides draw the same tokens, or nothing is timed.
- How much faster 100 samples of a 400-token prompt are than with `num_return_sequences`, and how
  many bytes of keys and values they hold.

    python -m tools.generation_time --pairs 20 --json benchmarks/generation.jsonl
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from phi4.config import Recipe, with_overrides
from phi4.engine.engine import Engine
from phi4.engine.generation.events import TokenDrawn
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.platform import connect, disconnect
from phi4.sampling.protocol import Request
from phi4.verify.measured_rows import append_row, provenance
from tools.step_time import (
    ATTENTION_BACKENDS,
    benchmark_recipe,
    phi3_of,
    ratio_interval,
    time_steps,
)

# Shape legend: B prompts, T tokens of each, N new tokens.

NUM_BLOCKS, BLOCK_TOKENS = 1024, 16
LEAST_SPEEDUP = 8.0
"""How many times faster 100 samples have to be, in CPU time."""
Generate = Callable[..., np.ndarray]
"""New tokens [B * samples, N] after prompts [B, T], as `EngineSide` is called."""


class Blocks(NamedTuple):
    """Blocks of the cache: all in use, and those of them that every sample holds."""

    in_use: int
    shared: int


class Sizes(NamedTuple):
    """How much is generated.

    Attributes:
        batches: rows of the decode steps that are timed.
        prompt_tokens: prompt tokens of each of those rows.
        step_tokens: the two numbers of new tokens whose difference is timed.
        prefix_tokens, num_samples: of the shared prompt.
        sampled_tokens: new tokens of each sample, a case each.
    """

    batches: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 16
    step_tokens: tuple[int, int] = (8, 72)
    prefix_tokens: int = 400
    num_samples: int = 100
    sampled_tokens: tuple[int, ...] = (8, 64)


def generation_recipe() -> Recipe:
    """Return the model of tools/step_time.py with 512 positions."""
    return with_overrides(benchmark_recipe(2), ["model.max_position_embeddings=512"])


class EngineSide:
    """Ours: a `Generator` that stays open between calls."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def __call__(
        self, prompts_BT: np.ndarray, *, num_new: int, num_samples: int = 1, temperature: float = 0
    ) -> np.ndarray:
        """See Generate."""
        found: dict[tuple[int, int], list[int]] = {}
        self._submit(prompts_BT, max_tokens=num_new, n=num_samples, temperature=temperature)
        while not self._generator.is_idle:
            for event in self._generator.step():
                if isinstance(event, TokenDrawn):
                    key = event.request_id, event.sample
                    found.setdefault(key, []).append(event.drawn.token)
        return np.array([found[key] for key in sorted(found)])

    def count_blocks(self, prompt_1T: np.ndarray, *, num_new: int, num_samples: int) -> "Blocks":
        """Return the blocks of all samples of a prompt, at the most."""
        generator, counts = self._generator, []
        self._submit(prompt_1T, max_tokens=num_new, n=num_samples, temperature=1.0)
        while not generator.is_idle:
            generator.step()
            references = [generator.pool.references(block) for block in range(NUM_BLOCKS)]
            shared = sum(count == num_samples for count in references)
            counts.append(Blocks(sum(count > 0 for count in references), shared))
        return max(counts)

    def _submit(self, prompts_BT: np.ndarray, **options: float) -> None:
        # The same weights again: what matters is that no prefix is known from the round before.
        self._generator.load("")
        for prompt in prompts_BT.tolist():
            self._generator.submit(Request(prompt=tuple(prompt), **options))


class TransformersSide:
    """Theirs: `Phi3ForCausalLM.generate` with its cache, from an engine's weights.

    Args:
        engine: where the weights come from.
        attention: transformers' attention back-end.
    """

    def __init__(self, engine: Engine, attention: str) -> None:
        self._model = phi3_of(engine, attention).eval()

    def __call__(
        self, prompts_BT: np.ndarray, *, num_new: int, num_samples: int = 1, temperature: float = 0
    ) -> np.ndarray:
        """See Generate."""
        tokens_BT = torch.from_numpy(prompts_BT)
        sampled = {"temperature": temperature, "top_k": 0} if temperature else {}
        text = self._model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            max_new_tokens=num_new,
            num_return_sequences=num_samples,
            do_sample=temperature > 0,
            use_cache=True,
            eos_token_id=None,
            **sampled,
        )
        return text[:, prompts_BT.shape[1] :].numpy()


@contextmanager
def both_sides() -> Iterator[tuple[EngineSide, dict[str, TransformersSide]]]:
    """Our side, and theirs per attention back-end, at the same weights."""
    recipe = generation_recipe()
    engine = Engine(recipe, connect("cpu", threads=recipe.run.threads), trains=False)
    theirs = {name: TransformersSide(engine, name) for name in ATTENTION_BACKENDS}
    size = CacheSize(NUM_BLOCKS, BLOCK_TOKENS)
    with Generator(engine, size, 0, load_weights=lambda place: None) as generator:
        yield EngineSide(generator), theirs
    engine.close()
    disconnect()


def prompts_of(num_rows: int, num_tokens: int, index: int) -> np.ndarray:
    """Prompts [B, T] of a round."""
    random = np.random.default_rng([num_rows, num_tokens, index])
    return random.integers(1, generation_recipe().model.vocab_size, (num_rows, num_tokens))


def faster(candidates: dict[str, Generate], inputs_of: Callable[[int], np.ndarray]) -> str:
    """Return the name of the attention back-end that takes least CPU time after a first call."""
    if len(candidates) == 1:
        return next(iter(candidates))
    times = time_steps(list(candidates.values()), inputs_of, 4)
    return list(candidates)[np.median(times[1:, :, 1], axis=0).argmin()]


def compare_steps(
    ours: Generate, theirs: dict[str, Generate], rows: int, pairs: int, sizes: Sizes
) -> dict[str, Any]:
    """One decode step of a batch.

    Raises:
        RuntimeError: the two sides draw different tokens.
    """
    short, long = sizes.step_tokens
    inputs_of = partial(prompts_of, rows, sizes.prompt_tokens)
    expected = ours(inputs_of(0), num_new=long)
    for name, side in theirs.items():
        if not np.array_equal(side(inputs_of(0), num_new=long), expected):
            raise RuntimeError(f"batch {rows}: greedy tokens of {name} differ from the engine's")
    attention = faster({n: partial(s, num_new=long) for n, s in theirs.items()}, inputs_of)
    sides = ours, theirs[attention]
    calls = [partial(side, num_new=count) for count in (long, short) for side in sides]
    times = time_steps(calls, inputs_of, pairs)
    step_times = (times[:, :2] - times[:, 2:]) / (long - short)
    return {**_ratios(step_times[:, 0], step_times[:, 1]), "attention": attention}


def compare_samples(
    ours: EngineSide, theirs: dict[str, Generate], num_new: int, pairs: int, sizes: Sizes
) -> dict[str, Any]:
    """All samples of one prompt: times faster than transformers, and bytes of keys and values."""
    options = {"num_new": num_new, "num_samples": sizes.num_samples, "temperature": 1.0}
    inputs_of = partial(prompts_of, 1, sizes.prefix_tokens)
    candidates = {name: partial(side, **options) for name, side in theirs.items()}
    attention = faster(candidates, inputs_of)
    our_call = partial(ours, **options)
    our_call(inputs_of(0))
    blocks = ours.count_blocks(inputs_of(0), num_new=num_new, num_samples=sizes.num_samples)
    times = time_steps((our_call, candidates[attention]), inputs_of, pairs)
    cpu_speedup, *cpu_interval = ratio_interval(times[:, 1, 1], times[:, 0, 1])
    speedup, *interval = ratio_interval(times[:, 1, 0], times[:, 0, 0])
    return {
        "cpu_speedup": cpu_speedup,
        "cpu_speedup_95": cpu_interval,
        "speedup": speedup,
        "speedup_95": interval,
        **_bytes(blocks, num_new, sizes),
        "attention": attention,
    }


def _ratios(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Of times [pairs, (wall, CPU)] in seconds."""
    ratio, *interval = ratio_interval(ours[:, 0], theirs[:, 0])
    cpu_ratio, *cpu_interval = ratio_interval(ours[:, 1], theirs[:, 1])
    medians = [round(float(np.median(side[:, 1])) * 1e3, 3) for side in (ours, theirs)]
    return {
        "cpu_ratio": cpu_ratio,
        "cpu_ratio_95": cpu_interval,
        "ratio": ratio,
        "ratio_95": interval,
        "engine_cpu_ms": medians[0],
        "transformers_cpu_ms": medians[1],
    }


def _bytes(blocks: Blocks, num_new: int, sizes: Sizes) -> dict[str, int]:
    """Keys and values in use, those that all samples share, and what separate sequences hold."""
    model = generation_recipe().model
    token_bytes = 2 * model.num_layers * model.num_key_value_heads * model.head_dim * 4
    # The last token drawn is not cached.
    sequence_tokens = sizes.prefix_tokens + num_new - 1
    return {
        "kv_bytes": blocks.in_use * BLOCK_TOKENS * token_bytes,
        "kv_bytes_shared": blocks.shared * BLOCK_TOKENS * token_bytes,
        "kv_bytes_of_separate_sequences": sizes.num_samples * sequence_tokens * token_bytes,
    }


def compare(pairs: int, sample_pairs: int, sizes: Sizes) -> dict[str, Any]:
    """Return the row: decode steps by batch, samples by new tokens."""
    with both_sides() as (ours, theirs):
        return {
            "model": "4 layers, hidden 128, vocabulary 512, fp32",
            "step": {
                str(rows): compare_steps(ours, theirs, rows, pairs, sizes) for rows in sizes.batches
            },
            "samples": {
                str(num_new): compare_samples(ours, theirs, num_new, sample_pairs, sizes)
                for num_new in sizes.sampled_tokens
            },
            **sizes._asdict(),
            "pairs": pairs,
            "sample_pairs": sample_pairs,
            "threads": torch.get_num_threads(),
        }


def keeps_bound(row: dict[str, Any]) -> bool:
    """Whether the samples of a row are all LEAST_SPEEDUP times faster, by the whole interval."""
    return all(case["cpu_speedup_95"][1] >= LEAST_SPEEDUP for case in row["samples"].values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit code 1 when samples are less than LEAST_SPEEDUP times faster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="of decode steps, per batch")
    parser.add_argument("--sample-pairs", type=int, default=7, help="of 100 samples, per case")
    parser.add_argument("--json", type=Path, help="append the row to this file")
    options = parser.parse_args(arguments)
    row = compare(options.pairs, options.sample_pairs, Sizes())
    print(json.dumps(row | provenance()))
    if options.json:
        append_row(options.json, row)
    raise SystemExit(not keeps_bound(row))


if __name__ == "__main__":
    main()
