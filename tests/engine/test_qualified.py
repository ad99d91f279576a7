"""Every rank chooses by the same evidence; one rank of each machine makes it."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from phi4_kernels import dispatch, registry
from phi4_kernels.errors import KernelError
from phi4_kernels.evidence import GpuMachine, Row

from phi4.config import Recipe
from phi4.engine.model.implementations import choose
from phi4.engine.platform import Platform
from phi4.engine.qualified import agreed, qualified_evidence
from phi4.rundir.names import KERNELS_FILE
from tests.support.engines import tiny_recipe
from tests.support.ranks import RankPool, gloo_group, pool_fixture

GPU = torch.device("cuda", 0)
MACHINE = GpuMachine("H200", "9.0", "3.6.0")
RED = {"rope_qkv/partial/bf16": "GateError: out0"}


class _Prover:
    """A machine on which all kernels are green and fast, but those that a test names are red."""

    machine = MACHINE

    def __init__(self, red: frozenset[str], log: Path) -> None:
        self._red, self._log = red, log

    def columns(self) -> Row:
        return {"device": "H200", "capability": "9.0", "triton": "3.6.0", "date": "", "commit": ""}

    def prove(self, candidates, seconds: float) -> Iterator:
        self._log.touch()
        for op, name in candidates:
            red = RED if op in self._red else {}
            yield (op, name), {"num_checks": 2, "worst_margin": 0.5, "red": red}

    def time(self, op: str, names) -> dict[str, float]:
        return {name: 2.0 if name == "torch" else 1.0 for name in names}


def _chosen(
    rank: int,
    world_size: int,
    place: Path,
    hosts: tuple[str, ...],
    red: tuple[tuple[str, ...], ...],
    qualify: str = "on",
) -> tuple[dict[str, str], list[str]]:
    """Inside a rank of a pretended GPU machine: implementations by op, and what was said.

    Args:
        rank, world_size: of the rank.
        place: for caches by host and for the run.
        hosts: name of the rank's host, by rank.
        red: ops that are red on it, by rank.
        qualify: the recipe's.
    """
    host, said = hosts[rank], []
    platform = Platform("cuda", GPU, rank, world_size, "pretended")
    recipe = tiny_recipe(f"run.dir={place / 'run'}", f"kernels.qualify={qualify}")
    (place / "run").mkdir(parents=True, exist_ok=True)
    with (
        gloo_group(rank, world_size),
        patch.dict("os.environ", XDG_CACHE_HOME=str(place / host)),
        patch.object(socket, "gethostname", lambda: host),
        patch.object(dispatch, "CORRECTNESS_ROWS", place / "none"),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(torch.cuda, "get_device_name", lambda *_: "H200"),
        patch("phi4_kernels.evidence.triton_version", lambda: "3.6.0"),
    ):
        log = place / f"asked_{host}_{rank}"
        evidence = qualified_evidence(
            recipe, platform, said.append, lambda: _Prover(frozenset(red[rank]), log)
        )
        choices = choose(recipe.kernels, GPU, 128, evidence)
    return {choice.op: choice.implementation for choice in choices}, said


pool = pool_fixture(3)


def test_one_rank_of_each_machine_asks_and_all_choose_the_same(pool: RankPool, tmp_path) -> None:
    hosts, red = ("a", "a", "b"), ((), (), ("rope",))
    (first, said), *others = pool.run(_chosen, tmp_path, hosts, red)
    assert {path.name for path in tmp_path.glob("asked_*")} == {"asked_a_0", "asked_b_2"}
    # Green on a, red on b: nobody takes it.
    assert first["rope"] == "torch" and first["swiglu"] == "triton"
    assert all(choices == first for choices, _ in others)
    assert "b: rope triton: red: rope_qkv/partial/bf16: GateError: out0" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / KERNELS_FILE).open()]
    assert {row["host"] for row in rows} == {"a", "b"}
    # The next start has its rows: nobody is asked, and the choice is the same.
    for path in tmp_path.glob("asked_*"):
        path.unlink()
    again = pool.run(_chosen, tmp_path, hosts, ((), (), ()))
    assert [choices for choices, _ in again] == [first] * 3 and again[0][1] == []
    assert not list(tmp_path.glob("asked_*"))


def test_off_makes_no_rows(pool: RankPool, tmp_path) -> None:
    (choices, said), *_ = pool.run(_chosen, tmp_path, ("a",) * 3, ((),) * 3, "off")
    assert set(choices.values()) == {"torch"} and said == []
    assert not list(tmp_path.glob("asked_*"))


class _Broken(_Prover):
    def prove(self, candidates, seconds: float) -> Iterator:
        raise KernelError("no compiler")


def _broken(rank: int, world_size: int, place: Path) -> list[str]:
    with patch.dict(globals(), _Prover=_Broken):
        return _chosen(rank, world_size, place, ("a",) * 3, ((),) * 3)[1]


def test_a_machine_that_cannot_be_asked_ends_no_run(pool: RankPool, tmp_path) -> None:
    said = pool.run(_broken, tmp_path)[0]
    assert said == ["the kernels were not qualified: KernelError: no compiler"]


def test_on_a_cpu_nothing_is_asked() -> None:
    platform = Platform("cpu", torch.device("cpu"), 0, 1, "")
    assert qualified_evidence(Recipe(), platform, print) is None


def test_a_kernel_that_one_machine_lacks_is_not_chosen() -> None:
    row = {"op": "rope", "implementation": "triton", "green": True, "capability": "9.0"}
    row |= {"source": registry.source_digest("rope", "triton"), "triton": "3.6.0"}
    assert agreed([(row,), (row,)]).proof("rope", "triton", MACHINE)
    assert not agreed([(row,), ()]).proof("rope", "triton", MACHINE)
    assert not agreed([(row,), (row | {"green": False},)]).proof("rope", "triton", MACHINE)
