"""Attention of other libraries: our adaptors by the error rule, and what they refuse."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from phi4_kernels import dispatch, registry
from phi4_kernels.attention import (
    Ranges,
    attention,
    attention_backward,
    attention_decode,
    attention_forward,
    cudnn_impl,
    flash_impl,
)
from phi4_kernels.attention.arguments import ANY_RANGES
from phi4_kernels.attention.block_table import BlockTable
from phi4_kernels.errors import DeviceError, ImplementationError, PositionError, ShapeError
from phi4_kernels.evidence import GpuMachine, KernelEvidence, Row, machine_of, triton_version
from phi4_kernels.qualification import qualify
from phi4_kernels.registry import need_of
from phi4_kernels.testing import gates, numerics

from tests.kernels.foreign_attention import LIBRARIES, forget, installed, named_on_the_cpu

GPU = torch.device("cuda", 0)
TORCH = f"torch {torch.__version__}"
FLASH = ("flash_attn_3 3.0.0", "flash_attn 2.8.3", TORCH)
BF16 = need_of(torch.bfloat16)
WHOLE = Ranges.of([0, 6], [0], [6])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A user without rows."""
    monkeypatch.setattr(dispatch, "CORRECTNESS_ROWS", tmp_path / "correctness.jsonl")
    monkeypatch.setattr(dispatch, "SPEED_ROWS", tmp_path / "speed.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def checks(implementation: str) -> list[gates.Check]:
    entries = [entry for entry in registry.entries().values() if entry.op == "attention"]
    return [check for entry in entries for check in gates.names(entry, implementation)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_adaptors_obey_the_error_rule(library: str) -> None:
    implementation = LIBRARIES[library]
    with installed(library) as calls, named_on_the_cpu(), dispatch.count_calls() as counted:
        assert registry.implementation("attention", implementation).library() == library
        for check in checks(implementation):
            gates.check_numbers(*check, implementation, "cpu")
    assert set(counted) == {("attention", implementation)}
    # cuDNN is never asked for it, and so declares that it has no equal bits.
    assert set(calls.deterministic) == {implementation == "flash"}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("library", LIBRARIES)
def test_gates_ask_for_equal_bits_where_they_are_declared(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(numerics, "expect_same_bits", lambda name, *_: asked.append(name))
    with installed(library), named_on_the_cpu():
        gates.check_numbers("attention", "phi4-documents", "bf16", LIBRARIES[library], "cpu")
    assert len(asked) == (LIBRARIES[library] == "flash")


@pytest.mark.parametrize("implementation", ["flash", "cudnn"])
def test_gates_ask_for_what_is_served_alone(implementation: str) -> None:
    asked = checks(implementation)
    assert {entry for entry, _, _ in asked} == {
        "attention",
        "attention_forward",
        "attention_backward",
    }
    cases = {case for _, case, _ in asked}
    assert {"phi4-documents", "group-of-8", "empty", "tiny-documents", "all-keys"} <= cases
    assert not {"ranges", "not-causal", "decoding", "far-keys"} & cases
    assert {dtype for _, _, dtype in asked} == {"bf16", "fp16"}
    assert {"ranges", "not-causal"} < {case for _, case, _ in checks("triton")}


def tensors(tokens: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16, step: int = 0):
    """q of 4 heads, k and v of 2, with `step` elements between the rows."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads, dim + step) for heads in (4, 2, 2))
    return [torch.randn(shape, generator=generator).to(dtype)[..., :dim] for shape in shapes]


def test_cudnn_gets_documents_of_one_length_in_one_call() -> None:
    ranges = Ranges.of([0, 3, 6, 6, 7, 12, 15], [0, 3, 6, 6, 7, 12], [3, 6, 6, 7, 12, 15])
    with installed(f"cudnn 91900 {TORCH}") as calls, named_on_the_cpu():
        attention_forward(*tensors(15), ranges, implementation="cudnn")
    # The single token is no call.
    assert calls.shapes == [(2, 4, 3, 64), (1, 4, 5, 64), (1, 4, 3, 64)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_views_that_do_not_lie_by_16_bytes_are_copied(library: str) -> None:
    ranges = Ranges.of([0, 9], [0], [9])
    with installed(library), named_on_the_cpu():
        given = tensors(9, step=3)
        out = attention(*given, ranges, implementation=LIBRARIES[library]).out
        exact = attention(*given, ranges, implementation="torch").out
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("library", LIBRARIES)
def test_results_over_more_keys_merge(library: str) -> None:
    """Backward takes the lse and out that it is given, not its own keys' alone."""
    q, k, v = tensors(9)
    ranges = Ranges.of([0, 4, 5, 9], [0, 4, 5], [4, 5, 9])
    with installed(library), named_on_the_cpu():
        out, lse = attention_forward(q, k, v, ranges, implementation="torch")
        given = (q, q, k, v, out * 0.5, lse + 1.0, ranges)
        found = attention_backward(*given, implementation=LIBRARIES[library])
        exact = attention_backward(*given, implementation="torch")
    for mine, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-2)


def test_flash_attn_3_leaves_multiprocessors_free() -> None:
    q, k, v = tensors(6)
    where = (WHOLE.q_offsets, WHOLE.k_starts, WHOLE.k_ends, 6, 6, True, 0.1)
    with installed("flash_attn_3 3.0.0") as calls:
        out, lse = flash_impl.forward(q, k, v, *where, 20)
        flash_impl.backward(out, q, k, v, out, lse, *where, 24)
    assert calls.sm_margins == [20, 24]


OTHER_RANGES = {
    "a gap between keys": lambda: Ranges.of([0, 3, 6], [0, 4], [3, 7]),
    "more keys than queries": lambda: Ranges.of([0, 3, 6], [0, 3], [3, 8]),
    "tokens behind the documents": lambda: Ranges.of([0, 3], [0], [3]),
    "a query behind the keys": lambda: Ranges.of([0, 5], [0], [5]),
    "tokens before the documents": lambda: Ranges.of([1, 6], [1], [6]),
    "boundaries that the host does not know": lambda: Ranges.packed(
        torch.tensor([0, 6], dtype=torch.int32), 6
    ),
}


@pytest.mark.parametrize("name", OTHER_RANGES)
@pytest.mark.parametrize("implementation", ["flash", "cudnn"])
def test_other_ranges_are_an_error_before_any_call(name: str, implementation: str) -> None:
    ranges = OTHER_RANGES[name]()
    q, num_keys = tensors(6)[0], {"more keys than queries": 8, "a query behind the keys": 5}
    _, k, v = tensors(num_keys.get(name, 7 if "gap" in name else 6))
    with installed(*LIBRARIES) as calls, named_on_the_cpu():
        with pytest.raises(ImplementationError, match=f"does not serve {ANY_RANGES}; use one of"):
            attention(q, k, v, ranges, implementation=implementation)
        assert not calls.shapes
        attention(q, k, v, ranges, implementation="auto")


BAD = {
    "no causal mask": (lambda n: attention(*tensors(6), WHOLE, causal=False, **n), ANY_RANGES),
    "fp32": (
        lambda n: attention(*tensors(6, dtype=torch.float32), WHOLE, **n),
        "does not serve float32 tensors; use one of torch, triton",
    ),
    "decoding": (
        lambda n: attention_decode(*tensors(6), BlockTable.of([[0]], [6], 6, [6]), **n),
        "has no 'decode'; use one of torch, triton",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("implementation", ["flash", "cudnn"])
def test_what_is_not_served_is_one_clear_error(name: str, implementation: str) -> None:
    run, text = BAD[name]
    refused = pytest.raises(ImplementationError, match=re.escape(text))
    with installed(*LIBRARIES), named_on_the_cpu(), refused as raised:
        run({"implementation": implementation})
    assert "\n" not in str(raised.value) and f"'{implementation}'" in str(raised.value)


@pytest.mark.parametrize("implementation", ["flash", "cudnn"])
def test_a_head_width_that_it_cannot_take(implementation: str) -> None:
    with installed(*LIBRARIES), named_on_the_cpu(), pytest.raises(ShapeError, match="is 80; exp"):
        attention(*tensors(6, dim=80), WHOLE, implementation=implementation)


def test_num_tokens_that_are_not_so_are_an_error() -> None:
    boundaries = torch.tensor([0, 3, 6], dtype=torch.int32)
    attention(*tensors(6), Ranges.packed(boundaries, 3, 6), implementation="torch")
    with pytest.raises(PositionError, match="num_tokens is 6; expected documents side by side"):
        attention(*tensors(6), Ranges.packed(boundaries[:2], 3, 6), implementation="torch")


@pytest.mark.parametrize(
    ("present", "versions", "found", "absent"),
    [
        (FLASH, {}, "flash_attn_3 3.0.0", ()),
        (FLASH[1:], {}, "flash_attn 2.8.3", ("flash_attn_interface is not installed",)),
        (FLASH[1:], {"flash_attn": "2.6.3"}, TORCH, ("flash_attn is 2.6.3; expected 2.7",)),
        (FLASH[2:], {}, TORCH, ("flash_attn is not installed",)),
        ((), {}, "", ("is built without flash attention",)),
    ],
)
def test_the_first_library_that_is_here(
    present: tuple[str, ...], versions: dict[str, str], found: str, absent: tuple[str, ...]
) -> None:
    with installed(*present, versions=versions):
        assert flash_impl.library() == found
        why = "; ".join(flash_impl._found()[1])
        assert all(text in why for text in absent)
        assert (flash_impl.missing() is None) == bool(found)


def test_another_card_takes_no_flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(*FLASH):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
        assert flash_impl.library() == "flash_attn 2.8.3"


def test_a_package_that_cannot_be_imported_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(*FLASH[1:]):
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", SimpleNamespace())
        assert flash_impl.library() == TORCH
        assert "cannot import name" in flash_impl._found()[1][-1]


def test_a_release_with_other_arguments_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("flash_attn 2.8.3"), named_on_the_cpu():
        module = sys.modules["flash_attn.flash_attn_interface"]
        monkeypatch.setattr(module, "_flash_attn_varlen_forward", lambda q, k, v: None)
        with pytest.raises(ImplementationError, match=r"flash_attn 2.8.3 takes other arguments"):
            attention(*tensors(6), WHOLE, implementation="flash")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("flash", "built without flash attention"), ("cudnn", "finds no cuDNN")],
)
def test_a_named_one_that_is_absent_is_an_error(name: str, reason: str) -> None:
    with installed(), pytest.raises(ImplementationError, match=f"'{name}' is absent: .*{reason}"):
        dispatch.choose("attention", name, GPU)


def test_an_old_cudnn_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(*LIBRARIES):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8907)
        assert "cuDNN is 8907; expected 90000" in cudnn_impl.missing()


def test_without_a_gpu_they_are_absent_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in registry.FOREIGN:
        assert registry.missing("attention", name) == "torch finds no CUDA device"
        with pytest.raises(DeviceError, match=f"'{name}' got tensors on cpu; expected cuda"):
            dispatch.choose("attention", name, torch.device("cpu"))


def evidence(green: tuple[str, ...], **us: float) -> KernelEvidence:
    """Green rows of attention on the pretended H200, and times."""
    machine = machine_of(GPU)
    columns = {"op": "attention", "device": machine.device, "capability": machine.capability}
    columns |= {"triton": machine.triton, "commit": "here", "date": ""}
    sources = {name: registry.source_digest("attention", name) for name in (*us, *green)}
    rows: list[Row] = [
        columns | {"implementation": name, "source": sources[name], "green": True} for name in green
    ]
    return KernelEvidence((*rows, columns | {"kind": "time", "us": us, "sources": sources}))


def chosen(known: KernelEvidence, *needs: str) -> str:
    return dispatch.choose("attention", "auto", GPU, None, needs, known).implementation


def test_auto_takes_the_fastest_that_serves_the_call() -> None:
    with installed(*LIBRARIES):
        known = evidence(("flash", "triton"), flash=1.0, triton=2.0, torch=3.0)
        assert chosen(known, BF16) == "flash"
        assert chosen(known, BF16, ANY_RANGES) == chosen(known, need_of(torch.float32)) == "triton"
        assert chosen(evidence(("flash", "triton"), flash=2.0, triton=1.0, torch=3.0)) == "triton"
        # Without times ours come first; without a proof of ours the next best runs.
        assert chosen(evidence(("flash", "triton"))) == "triton"
        assert chosen(evidence(("flash",), flash=1.0, torch=3.0)) == "flash"
    with installed("flash_attn 2.8.3"):
        # Another library's proof.
        assert chosen(known, BF16) == "triton"


def test_auto_never_takes_one_without_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_PREFERENCE", ("cudnn", "triton"))
    with installed(*LIBRARIES):
        known = evidence(("cudnn", "triton"), cudnn=1.0, triton=2.0, torch=3.0)
        assert chosen(known) == "triton"
        named = dispatch.choose("attention", "cudnn", GPU, None, (BF16,), known)
        assert (named.implementation, named.reason) == ("cudnn", "named")
        with pytest.raises(ImplementationError, match=registry.EQUAL_BITS):
            dispatch.choose("attention", "cudnn", GPU, None, (registry.EQUAL_BITS,), known)
        dispatch.choose("attention", "flash", GPU, None, (registry.EQUAL_BITS,), known)


def test_status_says_what_is_never_automatic() -> None:
    states = {(row["op"], row["implementation"]): row["state"] for row in dispatch.status()}
    assert states["attention", "cudnn"].endswith("; not deterministic, never automatic")
    assert "deterministic" not in states["attention", "flash"]


class _Prover:
    """The pretended H200, on which all are green and flash is fastest."""

    machine = GpuMachine("H200", "9.0", triton_version())

    def columns(self) -> Row:
        m = self.machine
        columns = {"device": m.device, "capability": m.capability, "triton": m.triton}
        return columns | {"commit": "", "date": ""}

    def prove(self, candidates, seconds: float):
        for candidate in candidates:
            yield candidate, {"num_checks": 2, "worst_margin": 0.5, "red": {}}

    def time(self, op: str, names) -> dict[str, float]:
        return {name: {"flash": 1.0, "triton": 2.0}.get(name, 3.0) for name in names}


@pytest.mark.parametrize(
    ("present", "verdicts", "taken"),
    [
        (LIBRARIES, {"triton": "proven", "flash": "proven"}, "flash"),
        ((), {"triton": "proven", "flash": "absent"}, "triton"),
    ],
)
def test_self_qualification_covers_what_is_here(present, verdicts, taken) -> None:
    with installed(*present):
        done = qualify(_Prover(), ops=("attention",))
        assert {found.implementation: found.verdict for found in done.findings} == verdicts
        assert chosen(done.evidence, BF16) == taken
        details = {found.implementation: found.detail for found in done.findings}
        assert present or "built without flash attention" in details["flash"]


def _without_foreign(tmp_path: Path) -> Callable[[str], Path]:
    copy = tmp_path / "attention"
    ignored = shutil.ignore_patterns("flash_*", "cudnn_*", "__pycache__")
    shutil.copytree(registry.folder("attention"), copy, ignore=ignored)
    return lambda op: copy


def test_sources_of_others_do_not_depend_on_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("triton", "gluon", "torch")
    before = [registry.source_digest("attention", name) for name in names]
    monkeypatch.setattr(registry, "folder", _without_foreign(tmp_path))
    registry.source_digest.cache_clear()
    assert registry.implementations("attention") == ("gluon", "torch", "triton")
    assert [registry.source_digest("attention", name) for name in names] == before


def test_a_proof_is_of_one_library_and_version() -> None:
    digests = set()
    for release in ("2.8.3", "2.8.4"):
        with installed(f"flash_attn {release}"):
            digests.add(registry.source_digest("attention", "flash"))
    with installed(TORCH):
        digests.add(registry.source_digest("attention", "flash"))
    assert len(digests) == 3
