"""Mutants of the shipped arithmetic: each must be caught by the checks of its op."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from phi4_kernels import cuda_library
from phi4_kernels.errors import GateError

from tests.csrc import host_checks
from tests.csrc.host_forms import HostForms, build_host_forms

DECAY = "old.param * f.decay"
UPDATE = f"fmaf(-f.step_size, now.exp_avg / denominator, {DECAY})"
ROUNDED = "x * multiplier, __NV_SATFINITE"
MUTANTS = {
    "adamw": {
        "first correction one step ahead": ("power(call.beta1, step)", "power(call.beta1, step+1)"),
        "second correction one step ahead": (
            "power(call.beta2, step)",
            "power(call.beta2, step+1)",
        ),
        "weight decay after the update": (
            UPDATE,
            UPDATE.replace(DECAY, "old.param") + " * f.decay",
        ),
        "weight decay in the gradient": (
            "AdamWElement now;",
            "AdamWElement now; grad += 0.1f * old.param; old.param /= f.decay;",
        ),
        "epsilon under the root": ("fmaf(sqrtf(now.exp_avg_sq), f.root_correction, f.eps)",
                                   "sqrtf(now.exp_avg_sq + f.eps) * f.root_correction"),
        "weights truncated": ("__float2bfloat16_rn", "__float2bfloat16_rz"),
        "FP8 from the rounded weight": ("(now.param, *shard.fp8_scale)",
                                        "(widened(w.lane[i]), *shard.fp8_scale)"),
        "amax of the gradient": ("magnitude_bits(now.param)", "magnitude_bits(g.lane[i])"),
        "gradient scale forgotten": ("widened(g.lane[i]) * grad_scale", "widened(g.lane[i])"),
    },
    "grad_norm": {
        "squares in fp32": ("fma(x, x, sum)", "float(x) * float(x) + sum"),
        "cut pack forgotten": ("offset < count; offset", "offset + kPack <= count; offset"),
    },
    "fp8_cast": {
        "truncated": (ROUNDED, ROUNDED.replace(
            "x * multiplier",
            "copysignf(from_bits(magnitude_bits(x * multiplier) & 0xfff00000u), x)")),
        "not saturated": ("__NV_SATFINITE", "__NV_NOSAT"),
        "NaN is not the largest": ("return bits & 0x7fffffffu",
                                   "return (bits & 0x7fffffffu) > 0x7f800000u ? 0u : bits & "
                                   "0x7fffffffu"),
        "scale may underflow": ("inverse < kSmallest ? kSmallest : inverse", "inverse"),
    },
}  # fmt: skip
CHECKS = {
    "adamw": host_checks.adamw_all,
    "grad_norm": host_checks.norm_all,
    "fp8_cast": host_checks.casts_all,
}


@pytest.mark.slow
@pytest.mark.parametrize(("op", "check"), CHECKS.items())
def test_mutants_are_caught(op: str, check: Callable[[HostForms], None], tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH, and mutants are built")
    check(build_host_forms(cuda_library.SOURCES, op, tmp_path / "shipped.so"))
    survivors = []
    for name, (old, new) in MUTANTS[op].items():
        source = tmp_path / name.replace(" ", "-")
        shutil.copytree(cuda_library.SOURCES, source)
        texts = {
            path: path.read_text() for path in (source / "numerics.h", *source.glob(f"{op}/*.h"))
        }
        hit = [path for path, text in texts.items() if old in text]
        assert len(hit) == 1 and texts[hit[0]].count(old) == 1, f"{name}: does not occur once"
        hit[0].write_text(texts[hit[0]].replace(old, new))
        try:
            check(build_host_forms(source, op, source.with_suffix(".so")))
        except (AssertionError, GateError):
            continue
        survivors.append(name)
    assert survivors == []
