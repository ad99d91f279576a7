"""Dispatch: explicit choice or `auto` on proof, always with a reason, never a silent fallback."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from phi4_kernels import cuda_library, dispatch, evidence, registry
from phi4_kernels.errors import DeviceError, ImplementationError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No rows, nothing decided yet, and a pretended GPU of capability 9.0."""
    monkeypatch.setattr(dispatch, "CORRECTNESS_ROWS", tmp_path / "correctness.jsonl")
    monkeypatch.setattr(dispatch, "SPEED_ROWS", tmp_path / "speed.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H200")
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


def write_row(**changes: object) -> None:
    row = {
        "op": "swiglu",
        "implementation": "triton",
        "capability": "9.0",
        "triton": evidence.triton_version(),
        "source": registry.source_digest("swiglu", "triton"),
        "green": True,
        "commit": "abc123",
        "device": "H200",
        "date": "2026-01-01",
    }
    with dispatch.CORRECTNESS_ROWS.open("a") as file:
        file.write(json.dumps(row | changes) + "\n")


def test_auto_on_cpu_is_torch() -> None:
    assert dispatch.choose("rope", "auto", CPU).describe() == (
        "rope: torch (auto: tensors are on cpu)"
    )


def test_auto_without_a_row_is_torch() -> None:
    choice = dispatch.choose("swiglu", "auto", GPU)
    assert (choice.implementation, "proven" in choice.reason) == ("torch", True)


def test_auto_takes_what_is_proven_here() -> None:
    write_row()
    choice = dispatch.choose("swiglu", "auto", GPU)
    assert choice == dispatch.Choice("swiglu", "triton", "auto: proven on 9.0, commit abc123")
    assert dispatch.choose("rope", "auto", GPU).implementation == "torch"


def prove(op: str, name: str) -> None:
    write_row(op=op, implementation=name, source=registry.source_digest(op, name))


def write_speed(**changes: object) -> None:
    row = {
        "op": "attention",
        "implementation": "gluon",
        "against": "triton",
        "device": "H200",
        "source": registry.source_digest("attention", "gluon"),
        "against_source": registry.source_digest("attention", "triton"),
        "faster": True,
    }
    with dispatch.SPEED_ROWS.open("a") as file:
        file.write(json.dumps(row | changes) + "\n")


def test_auto_takes_a_gated_kernel_that_is_proven_and_faster_here() -> None:
    prove("attention", "triton")
    prove("attention", "gluon")
    write_speed()
    assert dispatch.choose("attention", "auto", GPU).implementation == "gluon"


def test_auto_leaves_a_faster_kernel_that_has_no_such_step() -> None:
    prove("attention", "triton")
    prove("attention", "gluon")
    write_speed()
    assert dispatch.choose("attention", "auto", GPU, "decode").implementation == "triton"


def test_a_named_kernel_without_the_step_is_an_error() -> None:
    with pytest.raises(ImplementationError, match=r"'gluon' has no 'decode'; use one of torch, tr"):
        dispatch.choose("attention", "gluon", GPU, "decode")


def test_auto_leaves_a_faster_kernel_that_is_not_proven() -> None:
    prove("attention", "triton")
    write_speed()
    assert dispatch.choose("attention", "auto", GPU).implementation == "triton"


@pytest.mark.parametrize(
    "changes",
    [
        {"faster": False},
        {"device": "H100"},
        {"source": "0" * 16},
        {"against_source": "0" * 16},
        {"op": "rope"},
        None,
    ],
)
def test_auto_leaves_a_gated_kernel_that_is_not_faster_here(changes: dict | None) -> None:
    prove("attention", "triton")
    prove("attention", "gluon")
    if changes is not None:
        write_speed(**changes)
    assert dispatch.choose("attention", "auto", GPU).implementation == "triton"


def test_a_later_slower_row_withdraws_the_choice() -> None:
    prove("attention", "triton")
    prove("attention", "gluon")
    write_speed()
    write_speed(faster=False)
    assert dispatch.choose("attention", "auto", GPU).implementation == "triton"


@pytest.mark.parametrize(
    "changes",
    [
        {"green": False},
        {"capability": "8.0"},
        {"source": "0" * 16},
        {"op": "rope"},
        {"triton": "2.0.0"},
    ],
)
def test_auto_ignores_rows_that_prove_something_else(changes: dict[str, object]) -> None:
    write_row(**changes)
    assert dispatch.choose("swiglu", "auto", GPU).implementation == "torch"


def test_a_later_red_row_withdraws_the_proof() -> None:
    write_row()
    write_row(green=False)
    assert dispatch.choose("swiglu", "auto", GPU).implementation == "torch"


def test_named_without_a_row_is_experimental() -> None:
    choice = dispatch.choose("swiglu", "triton", GPU)
    assert (choice.implementation, choice.reason) == ("triton", "named; experimental on 9.0")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="phi4_kernels"):
        for _ in range(3):
            dispatch.resolve("rope", "torch", CPU)
    assert [record.message for record in caplog.records] == ["rope: torch (named)"]


def test_unknown_op_is_an_error() -> None:
    with pytest.raises(ImplementationError, match=f"there are {', '.join(registry.OPS)}"):
        dispatch.choose("softmax", "auto", CPU)


def test_status_lists_every_implementation() -> None:
    write_row()
    write_row(op="rope", source="0" * 16)
    states = {(row["op"], row["implementation"]): row["state"] for row in dispatch.status()}
    every = [(op, name) for op in registry.OPS for name in registry.implementations(op)]
    assert list(states) == every
    assert {("adamw", "cuda"), ("attention", "gluon"), ("grad_norm", "torch")} <= states.keys()
    assert states.pop(("rope", "triton")) == "experimental: changed since its last row"
    assert states.pop(("swiglu", "triton")) == "proven"
    for (_, name), state in states.items():
        never = "experimental: never executed on a GPU"
        assert state.startswith("always available" if name == "torch" else never)


def test_calls_are_only_counted_inside() -> None:
    dispatch.resolve("rope", "torch", CPU)
    with dispatch.count_calls() as calls:
        dispatch.resolve("rope", "torch", CPU)
    dispatch.resolve("rope", "torch", CPU)
    assert calls == {("rope", "torch"): 1}


def test_the_committed_rows_are_readable() -> None:
    path = registry.ROOT / "correctness.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        assert {"op", "implementation", "capability", "source", "green"} <= json.loads(line).keys()


def test_a_changed_source_has_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "rope"
    shutil.copytree(registry.folder("rope"), copy)
    monkeypatch.setattr(registry, "folder", lambda op: copy)
    digest = registry.source_digest.__wrapped__
    before = digest("rope", "triton"), digest("rope", "torch")
    with (copy / "triton_impl.py").open("a") as file:
        file.write("edited = 1\n")
    assert digest("rope", "triton") != before[0] and digest("rope", "torch") == before[1]
    (copy / "triton_tables.py").write_text("further = 1")
    assert digest("rope", "torch") == before[1]
    with (copy / "layout.py").open("a") as file:
        file.write("edited = 1\n")
    assert digest("rope", "torch") != before[1]
    (copy / "triton_parts").mkdir()
    (copy / "triton_parts" / "tables.py").write_text("size = 1")
    triton, torch_digest = digest("rope", "triton"), digest("rope", "torch")
    (copy / "triton_parts" / "tables.py").write_text("size = 2")
    assert digest("rope", "triton") != triton and digest("rope", "torch") == torch_digest
    (copy / "shared").mkdir()
    (copy / "shared" / "angles.py").write_text("both = 1")
    assert digest("rope", "torch") != torch_digest


def test_comments_and_docstrings_are_not_in_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "rope"
    shutil.copytree(registry.folder("rope"), copy)
    monkeypatch.setattr(registry, "folder", lambda op: copy)
    digest = registry.source_digest.__wrapped__
    before, kernels = digest("rope", "triton"), copy / "triton_impl.py"
    source = kernels.read_text()
    head, _, code = source.partition("@triton.jit\n")
    explained = f'"""Another docstring."""\n{head}# A kernel.\n\n@triton.jit\n{code}'
    kernels.write_text(explained)
    assert digest("rope", "triton") == before
    kernels.write_text(explained.replace("a * cos - b * sin", "a * cos + b * sin"))
    assert digest("rope", "triton") != before


def test_the_digest_of_a_cuda_kernel_is_that_of_csrc() -> None:
    assert registry.source_digest("adamw", "cuda") == cuda_library.digest()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_kernel_refuses_a_device_that_it_does_not_know(name: str) -> None:
    op = {"cuda": "adamw", "triton": "rope"}[name]
    with pytest.raises(DeviceError, match=f"{op}: implementation '{name}' got tensors on meta"):
        dispatch.choose(op, name, torch.device("meta"))


def test_auto_says_why_a_proven_cuda_kernel_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_library, "BUILDS", tmp_path)
    prove("grad_norm", "cuda")
    choice = dispatch.choose("grad_norm", "auto", GPU)
    assert choice.implementation == "torch" and "csrc is not built" in choice.reason
