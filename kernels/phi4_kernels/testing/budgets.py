"""The committed resource budget of each shipped kernel, and the check against it.

Budgets are keyed by Triton version, because each version allocates registers differently, and are
written only by `make budgets`. A kernel may use less than its budget, never more.
"""

import json
from collections.abc import Collection
from pathlib import Path

import triton

from phi4_kernels import registry
from phi4_kernels.errors import GateError

FOLDER = registry.ROOT.parent / "budgets"
MAX_SHARED_BYTES = 232_448
"""A Hopper block's opt-in limit, which Triton's compiler does not check."""
_REGISTER_FILE = 65_536
_AT_MOST = ("registers", "stack_bytes", "shared_bytes", "local_accesses", "hmma")
_AT_LEAST = ("wide_loads", "wide_stores", "hgmma", "bulk_loads", "hidden_exponentials")

Found = dict[str, int]


def path(version: str = triton.__version__) -> Path:
    """File of the budgets of a Triton version."""
    return FOLDER / f"triton-{version}.json"


def load() -> dict[str, Found]:
    """The budgets of the installed Triton.

    Raises:
        GateError: there are none.
    """
    if not path().exists():
        raise GateError(
            f"no budgets for triton {triton.__version__}; expected {path()}; run `make budgets` "
            "with this version and review the file"
        )
    return json.loads(path().read_text())


def write(found: dict[str, Found], entries: Collection[str]) -> None:
    """Replace the budgets of the installed Triton that belong to `entries`, by name."""
    FOLDER.mkdir(exist_ok=True)
    known = load() if path().exists() else {}
    others = registry.entries().keys() - set(entries)
    # Other ops' budgets stay: `--op` writes one op's alone.
    kept = {key: value for key, value in known.items() if key.partition("/")[0] in others}
    budgets = kept | found
    # A line per kernel: the diff shows which ones changed.
    lines = [f"  {json.dumps(key)}: {json.dumps(budgets[key])}" for key in sorted(budgets)]
    path().write_text("{\n" + ",\n".join(lines) + "\n}\n")


def laws(key: str, found: Found) -> list[str]:
    """Violations of the limits that hold for every kernel, independent of its budget."""
    threads = found["num_warps"] * 32
    broken = {
        f"{found['stack_bytes']} bytes of stack; registers spill": found["stack_bytes"],
        f"{found['float_atomics']} floating-point atomics; the order of a sum would change": found[
            "float_atomics"
        ],
        f"{found['shared_bytes']} bytes of shared memory, over {MAX_SHARED_BYTES}": found[
            "shared_bytes"
        ]
        > MAX_SHARED_BYTES,
        f"{found['registers']} registers * {threads} threads, over {_REGISTER_FILE}": found[
            "registers"
        ]
        * threads
        > _REGISTER_FILE,
        f"{found['tf32']} TF32 instructions in an fp32 kernel": "/fp32/" in key and found["tf32"],
        f"{found.get('lost_fp8_pairs', 0)} fp8 pairs that ptxas 12 loses; convert once for each "
        "store": found.get("lost_fp8_pairs", 0),
        "a wait after every warpgroup product; ptxas has serialised them": 0
        < found["hgmma"]
        <= found["product_waits"],
    }
    return [f"{key}: {text}" for text, is_broken in broken.items() if is_broken]


def over_budget(key: str, found: Found, budget: Found) -> list[str]:
    """The resources in which a kernel exceeds its budget."""
    worse = [name for name in _AT_MOST if found[name] > budget[name]]
    worse += [name for name in _AT_LEAST if found[name] < budget.get(name, 0)]
    return [
        f"{key}: {name} is {found[name]}, budget {budget[name]}; undo what cost it, or run "
        "`make budgets` and justify the change"
        for name in worse
    ]
