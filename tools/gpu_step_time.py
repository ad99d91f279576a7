"""Training speed on one GPU at phi-4's width: our kernels, plain torch, transformers, and Liger.

Part of `make gpu`. Two of phi-4's 40 layers with its whole vocabulary, rows of 4,096 tokens, bf16.
Each side runs in a process of its own over the same random rows, from the host's batches to updated
weights; they are built and warmed up side by side and timed one after another. transformers keeps
bf16 weights and moments, which is less work than our fp32 ones; its side with Liger is what that
package's `apply_liger_kernel_to_phi3` makes of it.

    python tools/gpu_step_time.py --out benchmarks/gpu_step_time.jsonl
    python tools/gpu_step_time.py --tiny            # the script itself, on a CPU
"""

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

WARMUP, STEPS = 4, 8
TOGETHER = 3
"""Sides that are built at the same time; they are timed one after another."""
PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 or H200 SXM, by the datasheet: what MFU is a fraction of."""
LOSS_TOLERANCE = 5e-3
"""Of the first losses, between sides: bf16 and another order of summation."""
_ROWS = [
    "data.sequence_length=4096",
    "data.unit_tokens=4096",
    "model.max_position_embeddings=4096",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=1",
    "model.num_layers=2",
    "precision.dtype=bf16",
    "parallel.distributed_optimizer=true",
    "optim.learning_rate=1e-4",
]
_TINY = [
    "data.sequence_length=64",
    "data.unit_tokens=64",
    "model.max_position_embeddings=64",
    "batch.global_batch_size=2",
    "batch.micro_batch_size=1",
    "model.num_layers=2",
    "precision.dtype=fp32",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=128",
    "model.vocab_size=256",
]
_OPS = ("rope", "rms_norm", "swiglu", "attention", "cross_entropy", "adamw", "grad_norm")
_PLAIN = [f"kernels.{op}=torch" for op in _OPS]
_TRITON = [f"kernels.{op}=triton" for op in _OPS[:5]]
_CUDA = [f"kernels.{op}=cuda" for op in _OPS[5:]]
_ONE_PASS = ["loss_head.form=one_pass", "loss_head.chunk_tokens=4096"]
SIDES = {
    "triton, csrc optimizer": [*_TRITON, *_CUDA, *_ONE_PASS],
    "plain torch": _PLAIN,
    "transformers + liger": None,
    "gluon attention, csrc optimizer": [*_TRITON, "kernels.attention=gluon", *_CUDA, *_ONE_PASS],
    "transformers": None,
    "triton, csrc, 16 documents a row": [*_TRITON, *_CUDA, *_ONE_PASS],
}
"""Overrides of each of our sides, the most telling first; None where the model is not ours."""

Step = Callable[[Sequence], float]


def _engine_step(recipe, kind: str) -> Step:
    from phi4.engine.engine import Engine
    from phi4.engine.platform import connect
    from phi4.stages.pretrain import NextToken

    engine = Engine(recipe, connect(kind))

    def step(batches: Sequence) -> float:
        return engine.train_step(batches, NextToken(), learning_rate=1e-4).loss

    return step


def _transformers_step(recipe, kind: str, *, liger: bool) -> Step:
    import torch.nn.functional as F
    from transformers import Phi3Config, Phi3ForCausalLM

    from phi4.convert.hf_config import hf_config

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_phi3

        apply_liger_kernel_to_phi3()
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    settings = hf_config(recipe.model, dtype="bf16", bos_id=0, eos_id=0, pad_id=1)
    settings |= {"pad_token_id": None, "dtype": dtype}
    torch.manual_seed(0)
    with torch.device(kind):
        model = Phi3ForCausalLM(Phi3Config(**settings, attn_implementation="sdpa")).to(dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(batches: Sequence) -> float:
        num_tokens = sum(batch.labels.size for batch in batches)
        total = torch.zeros((), device=kind)
        for batch in batches:
            tokens = torch.from_numpy(batch.tokens).to(kind, non_blocking=True)
            labels = torch.from_numpy(batch.labels).to(kind, non_blocking=True)
            if liger:  # its fused head takes labels of the tokens themselves and shifts them
                output = model(tokens, shift_labels=labels, labels=labels, use_cache=False)
                loss = output.loss * (labels.numel() / num_tokens)
            else:
                logits = model(tokens, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().long())
                loss = loss * (labels.numel() / num_tokens)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step


@contextmanager
def _alone(turn: IO) -> Iterator[None]:
    """Have the GPU to oneself: sides that are still being built hold the lock together."""
    fcntl.flock(turn, fcntl.LOCK_UN)
    fcntl.flock(turn, fcntl.LOCK_EX)
    yield
    fcntl.flock(turn, fcntl.LOCK_UN)


def run_side(side: str, tiny: bool, lock: Path) -> dict:
    """Median tokens per second of one side, its MFU, peak memory and losses."""
    turn = lock.open("w")
    fcntl.flock(turn, fcntl.LOCK_SH)
    from phi4.config import Recipe, with_overrides
    from phi4.model.shape import training_flops_per_token
    from tools.step_time import host_batches

    kind = "cpu" if tiny else "cuda"
    overrides = SIDES[side] or []
    if tiny:
        overrides = [name for name in overrides if name.startswith("loss_head.form")]
    recipe = with_overrides(Recipe(), [*(_TINY if tiny else _ROWS), *overrides])
    if SIDES[side] is None:
        step = _transformers_step(recipe, kind, liger=side.endswith("liger"))
    else:
        step = _engine_step(recipe, kind)
    documents = 16 if "documents" in side else 1
    losses, seconds = [], []

    def run(index: int) -> None:
        batches = host_batches(recipe, documents, index)
        start = time.perf_counter()
        losses.append(step(batches))  # a float: the step has ended
        seconds.append(time.perf_counter() - start)

    for index in range(WARMUP):
        run(index)
    with _alone(turn):
        for index in range(WARMUP, WARMUP + STEPS):
            run(index)
    row_tokens = recipe.data.sequence_length
    tokens = recipe.batch.global_batch_size * row_tokens
    timed = sorted(seconds[WARMUP:])
    rate = tokens / timed[len(timed) // 2]
    flops = training_flops_per_token(recipe.model, row_tokens).causal
    return {
        "side": side,
        "tokens_per_second": round(rate),
        "mfu": round(rate * flops / PEAK_FLOPS, 4),
        "step_ms": [round(s * 1e3, 1) for s in timed],
        "peak_gib": 0.0 if tiny else round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": losses,
        "num_layers": recipe.model.num_layers,
        "row_tokens": row_tokens,
        "documents_per_row": documents,
    }


def main() -> int:
    """All sides, or one in a child; 0 when all ran and ours agree in their first losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--out", type=Path, default=Path("gpu_step_time.jsonl"))
    parser.add_argument("--lock", type=Path, default=Path(tempfile.gettempdir()) / "phi4-gpu-lock")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.tiny, arguments.lock)))
        return 0
    failed, rows = [], []
    for begin in range(0, len(SIDES), TOGETHER):
        sides = list(SIDES)[begin : begin + TOGETHER]
        processes = [_start(side, arguments) for side in sides]
        for side, process in zip(sides, processes, strict=True):
            output, _ = process.communicate()
            if process.returncode:
                print(f"{side}: failed", flush=True)
                failed.append(side)
            else:
                rows.append(json.loads(output.splitlines()[-1]))
                _record(rows[-1], arguments)
    failed += _disagreements(rows)
    print(*failed, sep="\n")
    return int(bool(failed))


def _start(side: str, arguments: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.gpu_step_time", "--side", side]
    command += ["--lock", str(arguments.lock), *(["--tiny"] if arguments.tiny else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _record(row: dict, arguments: argparse.Namespace) -> None:
    from phi4.verify.measured_rows import append_row
    from tools.gpu_engine import commit_of_copy

    device = "cpu" if arguments.tiny else torch.cuda.get_device_name()
    append_row(arguments.out, {"device": device, **commit_of_copy(), **row})
    print(
        f"{row['side']:34} {row['tokens_per_second']:8} tokens/s, MFU {row['mfu']:.3f}, "
        f"{row['peak_gib']:.1f} GiB",
        flush=True,
    )


def _disagreements(rows: Sequence[dict]) -> list[str]:
    """Sides of ours whose first loss is not that of the first one; they have the same weights."""
    ours = [r for r in rows if SIDES[r["side"]] is not None and r["documents_per_row"] == 1]
    return [
        f"{row['side']}: first loss {row['losses'][0]}, expected {ours[0]['losses'][0]}"
        for row in ours
        if abs(row["losses"][0] / ours[0]["losses"][0] - 1) > LOSS_TOLERANCE
    ]


if __name__ == "__main__":
    sys.exit(main())
