"""Machines before a run: what is named as unfit, and what it takes for nothing to be."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from phi4.engine.platform import connect, disconnect
from phi4.train.reliability.same_start import Program
from phi4.verify.preflight import Facts, failures
from phi4.verify.preflight_facts import Device, existing_part, with_answer
from phi4.verify.preflight_shared import shared_directory_trouble
from phi4.verify.preflight_speed import _partner, link_gbytes_per_second
from tests.support.ranks import pool_fixture, rendezvous

GPU = Device("H100", "550.1", 1980, 345, 31, free_bytes=79 << 30, total_bytes=80 << 30)


def healthy(rank: int) -> Facts:
    program = Program(rank, f"n{rank // 2}", "c0de", "torch 2", "ec1be")
    return Facts(program, GPU, 900 << 30, 10**13, "", 600.0 + rank, 40.0)


def with_rank_5(**changes: object) -> list[str]:
    device = {k: v for k, v in changes.items() if k in Device.__struct_fields__}
    program = {k: v for k, v in changes.items() if k in Program.__struct_fields__}
    own = {k: v for k, v in changes.items() if k in Facts.__struct_fields__}
    ranks = [healthy(rank) for rank in range(8)]
    ranks[5] = msgspec.structs.replace(
        ranks[5],
        device=msgspec.structs.replace(GPU, **device),
        program=msgspec.structs.replace(ranks[5].program, **program),
        **own,
    )
    return failures(ranks, needed_disk_bytes=10**9)


def test_equal_machines_have_no_failures() -> None:
    assert with_rank_5() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"code": "old"}, "code differs from that of most ranks (c0de) on rank 5 on n2 (old)"),
        ({"packages": "torch 1"}, "packages differs"),
        ({"recipe": "other"}, "recipe differs"),
        ({"name": "H200"}, "rank 5 on n2: device name is H200, but H100 on most ranks"),
        ({"driver": "535.2"}, "rank 5 on n2: device driver is 535.2, but 550.1 on most ranks"),
        (
            {"max_clock_mhz": 1410},
            "rank 5 on n2: device max clock mhz is 1410, but 1980 on most ranks",
        ),
        ({"free_bytes": 30 << 30}, "rank 5 on n2: 30 of 80 GiB of device memory are free"),
        ({"trouble": "nvidia-smi: not found"}, "rank 5 on n2: nvidia-smi: not found"),
        ({"free_memory_bytes": 300 << 30}, "rank 5 on n2: free host memory 300.00 GiB, below half"),
        (
            {"free_disk_bytes": 10**8},
            "rank 5 on n2: 0.1 GB free for run.dir, but one checkpoint needs",
        ),
        ({"shared": "cannot write /x"}, "rank 5 on n2: cannot write /x"),
        ({"matmul_tflops": 250.0}, "rank 5 on n2: matrix products 250.00 TFLOP/s, below half"),
        (
            {"link_gbytes_per_second": 3.0},
            "rank 5 on n2: bandwidth to its neighbours 3.00 GB/s, below",
        ),
    ],
)
def test_unfit_rank_is_named_with_its_host(changes: dict[str, object], said: str) -> None:
    (line,) = with_rank_5(**changes)
    assert said in line and "rank 5 on n2" in line


def test_answer_of_the_driver_is_read_and_a_strange_one_is_told() -> None:
    bare = Device("H100")
    assert with_answer(bare, "550.1, 1980, 345, 31\n") == Device("H100", "550.1", 1980, 345, 31)
    assert with_answer(bare, "550.1, [N/A], 345, 31\n").max_clock_mhz == 0
    assert "No devices" in with_answer(bare, "No devices were found").trouble


@pytest.mark.parametrize("world_size", range(2, 12))
def test_neighbours_agree_on_each_other_and_every_rank_has_one(world_size: int) -> None:
    partners: dict[int, set[int]] = {rank: set() for rank in range(world_size)}
    for first in (0, 1):
        for rank in range(world_size):
            peer = _partner(rank, first, world_size)
            if peer is not None:
                assert _partner(peer, first, world_size) == rank != peer
                partners[rank].add(peer)
    assert all(partners.values())
    assert world_size == 2 or world_size % 2 or all(len(p) == 2 for p in partners.values())


def test_directory_that_will_be_made_is_looked_for_where_it_will_be(tmp_path: Path) -> None:
    assert existing_part(tmp_path / "runs/a/b") == tmp_path


pool = pool_fixture(3)


def _shared(rank: int, world_size: int, directory: Path, blind: int) -> tuple[str, float]:
    platform = connect("cpu", rank=rank, world_size=world_size, rendezvous=rendezvous())
    exists = Path.exists
    hides = patch.object(Path, "exists", lambda path: "preflight" not in str(path) and exists(path))
    with hides if rank == blind else nullcontext():
        trouble = shared_directory_trouble(platform, directory / "run", seconds=0.3)
    speed = link_gbytes_per_second(platform)
    disconnect()
    return trouble, speed


def test_directory_that_all_share_is_fine_and_left_as_it_was(pool, tmp_path: Path) -> None:
    found = pool.run(_shared, tmp_path, -1)
    assert [trouble for trouble, _ in found] == [""] * 3 and not list(tmp_path.iterdir())
    assert all(speed > 0 for _, speed in found)


def test_rank_that_does_not_see_the_directory_says_so(pool, tmp_path: Path) -> None:
    found = [trouble for trouble, _ in pool.run(_shared, tmp_path, 2)]
    assert found[:2] == ["", ""] and "does not see" in found[2]
    assert not list(tmp_path.iterdir())


def test_rank_whose_file_rank_0_does_not_see_says_so(pool, tmp_path: Path) -> None:
    found = [trouble for trouble, _ in pool.run(_shared, tmp_path, 0)]
    assert "but rank 0 does not see it" in found[1] and "but rank 0 does not see it" in found[2]
