"""Mutants of the Hopper kernels of attention: each must turn the emulated run red."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from phi4_kernels import registry
from phi4_kernels.attention import gluon_impl
from phi4_kernels.errors import GateError

from tests.kernels.gluon_problems import SCHEDULES, Problem, check, packed, run

KERNELS = ("attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel")
FILES = ("gluon_rings", "gluon_forward", "gluon_dq", "gluon_dkdv")


@contextmanager
def mutant(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """Copies of all kernels, one text of one file replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in FILES:
            source = (registry.folder("attention") / f"{name}.py").read_text()
            if name == file:
                assert source.count(old) == 1, old
                source = source.replace(old, new)
            for other in FILES:
                source = source.replace(f"phi4_kernels.attention.{other} ", f"mutant_{other} ")
            (folder / f"mutant_{name}.py").write_text(source)
            patch.delitem(sys.modules, f"mutant_{name}", raising=False)
        importlib.invalidate_caches()
        for name, kernel in zip(FILES[1:], KERNELS, strict=True):
            module = importlib.import_module(f"mutant_{name}")
            patch.setattr(gluon_impl, kernel, getattr(module, kernel))
        yield


RAGGED = Problem(((300, 300, 5), (40, 0, 0), (130, 520, 3)))
GROUPED = Problem(packed(5), num_heads=4, num_key_heads=2)
"""Heads n // 2 and n % 2 are different key heads."""
MUTANTS = {
    "keys are not released": (
        "gluon_forward",
        "    release(k_ring, count, STAGES)\n    new_p",
        "    new_p",
    ),
    "values are released while read": (
        "gluon_forward",
        "    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))\n"
        "    release(v_ring, count - 1, STAGES)\n",
        "    release(v_ring, count - 1, STAGES)\n"
        "    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))\n",
    ),
    "scores are used in flight": (
        "gluon_forward",
        "s_ML = warpgroup_mma_wait(1, deps=(s_ML,))",
        "s_ML = warpgroup_mma_wait(2, deps=(s_ML,))",
    ),
    "values are not awaited": (
        "gluon_forward",
        "    wait_full(v_ring, last, STAGES)\n    v = ",
        "    v = ",
    ),
    "queries are released early": (
        "gluon_forward",
        "q = block_of(q_ring, mine, CONSUMERS)\n",
        "q = block_of(q_ring, mine, CONSUMERS)\n                release(q_ring, mine, CONSUMERS)\n",
    ),
    "turns are not passed": ("gluon_rings", "turns.index(1 - CONSUMER)", "turns.index(CONSUMER)"),
    "one key too many": (
        "gluon_forward",
        "keys[None, :] < limits[:, None]",
        "keys[None, :] <= limits[:, None]",
    ),
    "one row too many": ("gluon_forward", "mask=own < num_rows", "mask=own <= num_rows"),
    "no decay": ("gluon_forward", "l_i * alpha + gl.sum", "l_i + gl.sum"),
    "slots are waited for in the wrong phase": (
        "gluon_rings",
        "mbarrier.wait(ring[1].index(count % STAGES), count // STAGES & 1)",
        "mbarrier.wait(ring[1].index(count % STAGES), (count // STAGES & 1) ^ 1)",
    ),
    "slots are filled while read": (
        "gluon_rings",
        "    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)\n    mbarrier.expect(full",
        "    mbarrier.expect(full",
    ),
    "barriers of the forward pass are not fenced": (
        "gluon_forward",
        "    fence_async_shared()\n    work",
        "    work",
    ),
    "barriers of dq are not fenced": ("gluon_dq", "    fence_async_shared()\n    work", "    work"),
    "barriers of dk and dv are not fenced": (
        "gluon_dkdv",
        "    fence_async_shared()\n    inputs",
        "    inputs",
    ),
    "loads are not fenced": (
        "gluon_rings",
        "    fence_async_shared()\n    release",
        "    release",
    ),
    "loads are fenced after their release": (
        "gluon_rings",
        "    fence_async_shared()\n    release(ring, count, STAGES)",
        "    release(ring, count, STAGES)\n    fence_async_shared()",
    ),
    "loads of rows are not fenced": ("gluon_dkdv", "release_loaded(row_ring", "release(row_ring"),
    "loads of dout are not fenced": ("gluon_dq", "release_loaded(dout_ring", "release(dout_ring"),
    "zeros are not fenced": (
        "gluon_rings",
        "    fence_async_shared()\n    mbarrier.arrive(full",
        "    mbarrier.arrive(full",
    ),
    "zeros are not written": (
        "gluon_rings",
        "if num_rows < (part + 1) * _ZEROED_ROWS:",
        "if False:",
    ),
    "one block unmasked": (
        "gluon_rings",
        "seen_by_first // BLOCK_N\n",
        "gl.cdiv(seen_by_first, BLOCK_N)\n",
    ),
    "keys of dq are released while read": (
        "gluon_dq",
        "    dq_MC, ds_ML = warpgroup_mma_wait(0, deps=(dq_MC, ds_ML))\n"
        "    release(k_ring, count, STAGES)\n",
        "    release(k_ring, count, STAGES)\n"
        "    dq_MC, ds_ML = warpgroup_mma_wait(0, deps=(dq_MC, ds_ML))\n",
    ),
    "delta is left out": ("gluon_dq", "(dp_ML - delta[:, None])", "dp_ML"),
    "delta of another head": ("gluon_dq", "head.to(gl.int64) * row_stride", "0 * row_stride"),
    "rows start anywhere": ("gluon_dkdv", "head, at + shift, STAGES", "head, at, STAGES"),
    "rows are stored elsewhere": ("gluon_dq", "(row + shift) + rows", "row + rows"),
    "a block of rows starts anywhere": ("gluon_dkdv", " // _ALIGNMENT * _ALIGNMENT", ""),
    "rows are not awaited": ("gluon_dkdv", "    wait_full(row_ring, count, STAGES)\n", ""),
    "rows expect one load": (
        "gluon_dkdv",
        "2 * lse2_desc.block_type.nbytes",
        "lse2_desc.block_type.nbytes",
    ),
    "rows are not cut at the range": (
        "gluon_dkdv",
        "queries < left, lse2",
        "queries < BLOCK_M, lse2",
    ),
    "keys see one query too many": (
        "gluon_dkdv",
        "own[:, None] <= queries",
        "own[:, None] - 1 <= queries",
    ),
    "one head of the group": ("gluon_dkdv", "for _ in range(group):", "for _ in range(group - 1):"),
    "probabilities are used in flight": (
        "gluon_dkdv",
        "dp_LM = warpgroup_mma_wait(1, deps=(dp_LM,))",
        "dp_LM = warpgroup_mma_wait(2, deps=(dp_LM,))",
    ),
}

GROUP_MUTANTS = {
    "forward": ("gluon_forward", "key + start, head // group", "key + start, head % (4 // group)"),
    "dq": ("gluon_dq", "key + start, head // group", "key + start, head % (4 // group)"),
    "dk and dv": (
        "gluon_dkdv",
        "range(k_head * group, (k_head + 1) * group)",
        "range(k_head, num_key_heads * group, num_key_heads)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUP_MUTANTS)
def test_another_group_s_key_head_is_found(tmp_path: Path, name: str) -> None:
    with (
        mutant(tmp_path, *GROUP_MUTANTS[name]),
        pytest.raises(GateError, match=r"error is|is .* off"),
    ):
        check(GROUPED, run(GROUPED))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(tmp_path: Path, name: str) -> None:
    with mutant(tmp_path, *MUTANTS[name]), pytest.raises(GateError):
        for schedule in SCHEDULES[:3]:
            check(RAGGED, run(RAGGED, schedule))


@pytest.mark.slow
def test_unchanged_copies_are_green(tmp_path: Path) -> None:
    with mutant(tmp_path, "", "", ""):
        for problem in (GROUPED, RAGGED):
            check(problem, run(problem))
