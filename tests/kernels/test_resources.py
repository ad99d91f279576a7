"""Gate 3: every shipped launch compiles for sm_90 within its budget."""

import json
import subprocess
import sys
from typing import Any

import pytest
from phi4_kernels import registry
from phi4_kernels.errors import GateError
from phi4_kernels.testing import budgets, fp8_pairs
from phi4_kernels.testing import compiled as gate

LEAN = {
    "registers": 32,
    "num_warps": 4,
    "stack_bytes": 0,
    "shared_bytes": 0,
    "wide_loads": 2,
    "wide_stores": 1,
    "hgmma": 0,
    "hmma": 0,
    "local_accesses": 0,
    "float_atomics": 0,
    "tf32": 0,
    "bulk_loads": 0,
    "product_waits": 0,
    "hidden_exponentials": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("entry", registry.entries("triton"))
def test_shipped_kernels_keep_their_budget(compiled: dict[str, Any], entry: str) -> None:
    known = budgets.load()
    found = {
        key: numbers for key, numbers in compiled["found"].items() if key.split("/")[0] == entry
    }
    assert found or not registry.entries()[entry].shipped_cases
    assert found.keys() == {key for key in known if key.split("/")[0] == entry}
    broken = [text for key in found for text in budgets.over_budget(key, found[key], known[key])]
    broken += [text for key in found for text in budgets.laws(key, found[key])]
    assert not broken


@pytest.mark.slow
def test_every_ladder_row_is_reached(compiled: dict[str, Any]) -> None:
    assert compiled["unreached"] == []


@pytest.mark.parametrize("name", ["registers", "stack_bytes", "shared_bytes", "local_accesses"])
def test_one_more_than_the_budget_is_red(name: str) -> None:
    assert budgets.over_budget("k", LEAN | {name: LEAN[name] + 1}, LEAN)
    assert not budgets.over_budget("k", LEAN | {name: LEAN[name] - 1}, LEAN)


@pytest.mark.parametrize("name", ["wide_loads", "wide_stores"])
def test_a_lost_wide_access_is_red(name: str) -> None:
    assert budgets.over_budget("k", LEAN | {name: LEAN[name] - 1}, LEAN)


@pytest.mark.parametrize(
    "broken",
    [
        {"stack_bytes": 8},
        {"float_atomics": 1},
        {"shared_bytes": 232_449},
        {"registers": 255, "num_warps": 16},
        {"tf32": 1},
        {"hgmma": 8, "product_waits": 8},
    ],
)
def test_laws_hold_whatever_the_budget_says(broken: dict[str, int]) -> None:
    assert len(budgets.laws("e/c/fp32/k", LEAN | broken)) == 1
    assert budgets.laws("e/c/fp32/k", LEAN) == []


def test_tf32_is_only_banned_from_fp32_kernels() -> None:
    assert budgets.laws("e/c/bf16/k", LEAN | {"tf32": 1}) == []


@pytest.mark.parametrize(
    ("sass", "name"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;", "wide_loads"),
        ("@P0 STG.E.128 desc[UR4][R2.64], R8 ;", "wide_stores"),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;", "hgmma"),
        ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24 ;", "hgmma"),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4 ;", "hmma"),
        ("STL.64 [R1+0x8], R4 ;", "local_accesses"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;", "float_atomics"),
        ("ATOMG.E.ADD.F16x2.RN.STRONG.GPU PT, R5, desc[UR4][R2.64], R5 ;", "float_atomics"),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24 ;", "tf32"),
        ("UTMALDG.3D [UR16], [UR26] ;", "bulk_loads"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "product_waits"),
    ],
)
def test_instructions_are_recognised(sass: str, name: str) -> None:
    assert gate.count_instructions(sass)[name] == 1


@pytest.mark.parametrize(
    "sass",
    ["ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R5 ;", "LDG.E.64 R4, desc[UR4][R2.64] ;"],
)
def test_other_instructions_are_not(sass: str) -> None:
    assert not any(gate.count_instructions(sass).values())


@pytest.mark.parametrize(("left", "hidden"), [("0x1", 2), ("0x0", 0)])
def test_exponentials_beside_a_product_are_counted(left: str, hidden: int) -> None:
    wait = "WARPGROUP.DEPBAR.LE gsb0, "
    lines = ["MUFU.EX2 R1, R1 ;", wait + left, *["MUFU.EX2 R2, R2 ;"] * 2, wait + "0x0", "MUFU.EX2"]
    assert gate.count_instructions("\n".join(lines))["hidden_exponentials"] == hidden


# One warp for a 5120-wide backward spills; a mask that the compiler cannot see through costs the
# 16-byte accesses.
COSTS = {
    "spill": ("Launch(5120, 1024, 4,", "Launch(5120, 1024, 1,", "bytes of stack"),
    "atomics": (
        "_store(share_ptr, b_dweight[block], block, WIDTH, BLOCK)",
        "tl.atomic_add(dweight_ptr + block * BLOCK + tl.arange(0, BLOCK), b_dweight[block])",
        "floating-point atomics",
    ),
    "narrow": ("tl.load(ptr + cols).to", "tl.load(ptr + (cols ^ 1)).to", "wide_loads"),
}
SCRIPT = """
import contextlib, dataclasses, json, sys
from phi4_kernels import registry
from phi4_kernels.testing import budgets, compiled
from phi4_kernels.testing.mutants import mutant

entry = registry.entries()["rms_norm"]
case = next(case for case in entry.shipped_cases if case.name == "w5120")
entry = dataclasses.replace(entry, shipped_cases=(case,), dtypes=entry.dtypes[:1])
known, complaints = budgets.load(), {}
for name, (old, new, _) in {"nothing": ("", "", ""), **json.loads(sys.argv[1])}.items():
    with mutant("rms_norm", "triton_impl.py", old, new) if old else contextlib.nullcontext():
        found, _ = compiled.compile_all([entry])
    complaints[name] = [t for k in found for t in budgets.laws(k, found[k])]
    complaints[name] += [t for k in found for t in budgets.over_budget(k, found[k], known[k])]
print(json.dumps(complaints))
"""


@pytest.fixture(scope="module")
def complaints() -> dict[str, list[str]]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(COSTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("cost", COSTS)
def test_a_costly_mutant_turns_the_gate_red(complaints: dict[str, list[str]], cost: str) -> None:
    assert COSTS[cost][2] in "\n".join(complaints[cost])


@pytest.mark.slow
def test_the_same_launch_unchanged_is_green(complaints: dict[str, list[str]]) -> None:
    assert complaints["nothing"] == []


def test_a_triton_without_budgets_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "path", lambda: registry.ROOT / "no-such-file.json")
    with pytest.raises(GateError, match="make budgets"):
        budgets.load()


_PAIR = "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r2, %r1;\ncvt.rn.satfinite.e4m3x2.f32 %rs2, %r4, %r3;\n"
_JOINED = _PAIR + "mov.b32 %r5, {%rs1, %rs2};\n"


@pytest.mark.parametrize(
    ("ptx", "lost"),
    [
        (_JOINED, []),
        (_PAIR + "shr.u16 %rs3, %rs1, 8;\nst.shared.b8 [%r9], %rs1;", []),
        (_JOINED + "shr.u16 %rs3, %rs1, 8;", ["%rs1"]),
        (
            _PAIR + "st.shared.v2.b16 [%r9], {%rs1, %rs2};\nst.global.b16 [%rd1], { %rs2 };",
            ["%rs2"],
        ),
    ],
)
def test_an_fp8_pair_joined_and_read_again_is_red(ptx: str, lost: list[str]) -> None:
    assert fp8_pairs.lost(ptx) == lost
    assert bool(budgets.laws("k", LEAN | {"lost_fp8_pairs": len(lost)})) == bool(lost)
