"""Gate 1: numerics of every op, case and dtype under the interpreter, by the error rule."""

import pytest
from _pytest.mark import ParameterSet
from phi4_kernels import registry
from phi4_kernels.errors import GateError
from phi4_kernels.testing import gates
from phi4_kernels.testing.interpreted import InterpretedProcess

from tests.kernels.test_cross_entropy import MUTANTS as LOSS_MUTANTS

CHECKS = [check for entry in registry.entries("triton").values() for check in gates.names(entry)]
GATE = "phi4_kernels.testing.gates:check_numbers"


@pytest.mark.parametrize(("entry", "case", "dtype"), CHECKS)
def test_torch_obeys_the_error_rule(entry: str, case: str, dtype: str) -> None:
    assert gates.check_numbers(entry, case, dtype, "torch")


# Each changes the source of the shipped kernel and must turn the named check red.
MUTANTS = {
    "a query sees the key after it": (
        "attention",
        "triton_impl.py",
        "(keys < high[:, None])",
        "(keys < high[:, None] + 1)",
        "attention",
        "two-tiles",
        "bf16",
    ),
    "a document sees the one before": (
        "attention",
        "triton_impl.py",
        "(keys >= low[:, None]) & (keys",
        "(keys >= 0) & (keys",
        "attention",
        "ranges",
        "bf16",
    ),
    "a head of the group forgotten": (
        "attention",
        "triton_impl.py",
        "        group,\n        num_queries,",
        "        group - 1,\n        num_queries,",
        "attention_backward",
        "all-keys",
        "bf16",
    ),
    "a gradient without the scale": (
        "attention",
        "triton_impl.py",
        "        scale,\n        *strides,",
        "        1.0,\n        *strides,",
        "attention_backward",
        "far-keys",
        "bf16",
    ),
    "a gradient without delta": (
        "attention",
        "triton_dq.py",
        "ds = p * (dp - delta[:, None])",
        "ds = p * dp",
        "attention_backward",
        "far-keys",
        "bf16",
    ),
    "bounds one key late": (
        "attention",
        "triton_tiles.py",
        "high = high - (end - 1 - tokens)",
        "high = high - (end - tokens)",
        "attention",
        "two-tiles",
        "bf16",
    ),
    "a scale of natural powers": (
        "attention",
        "triton_impl.py",
        "_LOG2_E = 1.4426950408889634",
        "_LOG2_E = 1.0",
        "attention",
        "two-tiles",
        "bf16",
    ),
    "sums that do not decay": (
        "attention",
        "triton_impl.py",
        "acc * alpha[:, None]",
        "acc",
        "attention",
        "group-of-8",
        "fp32",
    ),
    "parts that do not decay": (
        "attention",
        "triton_decode.py",
        "weights[:, :, None] * acc_p",
        "acc_p",
        "attention_decode",
        "peaked",
        "bf16",
    ),
    "a part forgotten": (
        "attention",
        "triton_decode.py",
        "tl.minimum(tl.cdiv(length, PART), num_parts)",
        "tl.minimum(length // PART, num_parts)",
        "attention_decode",
        "group-of-1",
        "bf16",
    ),
    "a query decodes the key after it": (
        "attention",
        "triton_decode_parts.py",
        "seen_end = length - (end_query - 1 - query) * causal",
        "seen_end = length - (end_query - 2 - query) * causal",
        "attention_decode",
        "few-queries",
        "bf16",
    ),
    "a mask that comes a block late": (
        "attention",
        "triton_decode_parts.py",
        "fewest = length - (end_query - 1 - first_query - row // group) * causal",
        "fewest = length",
        "attention_decode",
        "few-queries",
        "bf16",
    ),
    "a tile of heads that sees the first tile's": (
        "attention",
        "triton_decode_parts.py",
        "rows % group * stride_q_head",
        "rows % 16 % group * stride_q_head",
        "attention_decode",
        "group-of-20",
        "bf16",
    ),
    "keys as if blocks lay in order": (
        "attention",
        "triton_decode_parts.py",
        "blocks_ptr + keys // BLOCK_TOKENS)",
        "blocks_ptr) + keys // BLOCK_TOKENS",
        "attention_decode",
        "unequal-lengths",
        "bf16",
    ),
    "a ragged block read from its start": (
        "attention",
        "triton_decode_parts.py",
        "keys % BLOCK_TOKENS",
        "keys % 1",
        "attention_decode",
        "group-of-1",
        "bf16",
    ),
    "the first sequence's blocks for all": (
        "attention",
        "triton_decode_parts.py",
        "blocks_ptr += index.to(tl.int64) * max_blocks",
        "blocks_ptr += index * 0",
        "attention_decode",
        "group-of-1",
        "bf16",
    ),
    "samples that see the prompt causally": (
        "attention",
        "triton_decode_parts.py",
        "(end_query - 1 - query) * causal",
        "(end_query - 1 - query)",
        "attention_decode",
        "shared-prompt",
        "bf16",
    ),
    "dropped eps": (
        "rms_norm",
        "triton_impl.py",
        "mean_square + eps",
        "mean_square",
        "rms_norm",
        "w640",
        "fp32",
    ),
    "one column off": (
        "rms_norm",
        "triton_impl.py",
        "cols = block * BLOCK + tl.arange(0, BLOCK)",
        "cols = block * BLOCK + tl.arange(0, BLOCK) + 1",
        "rms_norm",
        "w5120",
        "bf16",
    ),
    "bf16 accumulation": (
        "rms_norm",
        "triton_impl.py",
        "b_dweight[block] + b_dy[block] * b_hat[block]",
        "(b_dweight[block] + b_dy[block] * b_hat[block]).to(tl.bfloat16).to(tl.float32)",
        "rms_norm",
        "fp32-weight",
        "bf16",
    ),
    "unmasked tail": (
        "rms_norm",
        "triton_impl.py",
        "if (block + 1) * BLOCK <= WIDTH:",
        "if True:",
        "add_rms_norm",
        "w63",
        "bf16",
    ),
    "unmasked rows": (
        "swiglu",
        "triton_impl.py",
        "mask = rows < num_rows",
        "mask = rows < num_rows + 1",
        "swiglu",
        "w640",
        "bf16",
    ),
    "a row's gradient skipped": (
        "rms_norm",
        "triton_impl.py",
        "range(program, num_rows,",
        "range(program + 1, num_rows,",
        "rms_norm",
        "w640",
        "bf16",
    ),
    "residual gradient dropped": (
        "rms_norm",
        "triton_impl.py",
        "dx += _load(dtotal_ptr",
        "dx += 0.0 * _load(dtotal_ptr",
        "add_rms_norm",
        "w100-strided",
        "fp16",
    ),
    "no scale": (
        "swiglu",
        "triton_impl.py",
        "tl.clamp(out * tl.load(scale_ptr), -FP8_MAX, FP8_MAX)",
        "tl.clamp(out, -FP8_MAX, FP8_MAX)",
        "swiglu_fp8",
        "w640",
        "bf16",
    ),
    "two rows of the transpose swapped": (
        "swiglu",
        "triton_impl.py",
        "cols.to(tl.int64) * num_rows + rows",
        "cols.to(tl.int64) * num_rows + (rows ^ 1)",
        "swiglu_fp8_columnwise",
        "w640",
        "bf16",
    ),
    "backward rotates forward": (
        "rope",
        "triton_impl.py",
        "sin = -_angles",
        "sin = _angles",
        "rope_qkv",
        "phi4-blocked-ids",
        "bf16",
    ),
    "bisection ends early": (
        "rope",
        "triton_impl.py",
        "num_documents.bit_length())",
        "num_documents.bit_length() - 2)",
        "rope_qkv",
        "many-documents",
        "fp32",
    ),
    "partial rotation loses the rest": (
        "rope",
        "triton_impl.py",
        "if REST > 0:",
        "if False:",
        "rope_qkv",
        "partial",
        "bf16",
    ),
    "sigmoid of the wrong sign": (
        "swiglu",
        "triton_impl.py",
        "tl.where(x >= 0, 1.0, small)",
        "tl.where(x <= 0, 1.0, small)",
        "swiglu",
        "one-row",
        "fp16",
    ),
    "gradient in half precision": (
        "swiglu",
        "triton_impl.py",
        "sigmoid = _sigmoid(gate, gate_up_ptr.dtype.element_ty == tl.float32)",
        "sigmoid = _sigmoid(gate, False).to(tl.bfloat16).to(tl.float32)",
        "swiglu",
        "w640",
        "fp16",
    ),
}


MUTATED = {mutant[3:] for mutant in MUTANTS.values()}
MUTATED |= {mutant[2] for mutant in LOSS_MUTANTS.values()}
# Attention's first case has wide heads, which take seconds under the interpreter.
CHEAP = {"attention": "ranges"}
FIRST = {
    (entry.name, CHEAP.get(entry.name, entry.proof_cases[0].name))
    for entry in registry.entries("triton").values()
}


def _marked(check: tuple[str, str, str]) -> ParameterSet:
    """`make test` interprets bf16 and fp32 for an entry's first case, and what a mutant needs."""
    entry, case, dtype = check
    brief = (dtype in ("bf16", "fp32") and (entry, case) in FIRST) or check in MUTATED
    return pytest.param(*check, marks=() if brief else pytest.mark.slow)


@pytest.mark.parametrize(("entry", "case", "dtype"), [*map(_marked, CHECKS)])
def test_triton_obeys_the_error_rule(
    interpreted: InterpretedProcess, entry: str, case: str, dtype: str
) -> None:
    margins = interpreted.call(GATE, entry=entry, case=case, dtype=dtype)
    assert margins


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_turns_the_gate_red(mutated: InterpretedProcess, mutant: str) -> None:
    op, file, old, new, entry, case, dtype = MUTANTS[mutant]
    with pytest.raises(GateError, match="GateError"):
        mutated.call(GATE, mutant=(op, file, old, new), entry=entry, case=case, dtype=dtype)


@pytest.mark.slow
def test_a_sum_by_atomics_turns_the_program_orders_red(mutated: InterpretedProcess) -> None:
    cols = "block * BLOCK + tl.arange(0, BLOCK)"
    change = (
        "rms_norm",
        "triton_impl.py",
        "_store(share_ptr, b_dweight[block], block, WIDTH, BLOCK)",
        f"tl.atomic_add(dweight_ptr + {cols}, b_dweight[block], mask={cols} < WIDTH)",
        "shares = torch.empty((programs, width)",
        "shares = torch.zeros((1, width)",
    )
    with pytest.raises(GateError, match="d_weight: two runs differ"):
        mutated.call(GATE, mutant=change, entry="rms_norm", case="fp32-weight", dtype="fp32")
