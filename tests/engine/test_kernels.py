"""The engine on Triton's kernels, interpreted on the CPU, equals the engine on torch.

The same weights and batches on both: several documents per row, random loss masks. What differs is
the order of fp32 sums and the kernels' exponentials, as between layouts, so layout parity's bounds
hold here too. A wrong seam between engine and kernels (the order of the tokens' positions, the
residual stream) exceeds them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
import torch
from phi4_kernels import dispatch, registry
from phi4_kernels.testing.interpreted import InterpretedProcess

from phi4.config import KernelsConfig
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.model import attention, layers
from phi4.engine.model.implementations import (
    attention_needs,
    choose,
    decoding_implementation,
    gathering_implementation,
)
from phi4.engine.model.rope import RopeCache, rope_cos_sin
from phi4.errors import ConfigError
from phi4.stages.pretrain import NextToken
from phi4.verify.parity import (
    LEARNING_RATE,
    LOSS_TOLERANCE,
    PARAMETER_TOLERANCE,
    WARMUP_STEPS,
)
from tests.kernels.foreign_attention import LIBRARIES, installed
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.generation import Asked, collect, generate
from tests.support.ranks import run_ranks

GPU = torch.device("cuda", 0)
OPS = ("rope", "rms_norm", "swiglu", "attention", "cross_entropy")
STEPS, NUM_LAYERS = 1, 2
RECIPE = (
    f"model.num_layers={NUM_LAYERS}",
    "data.sequence_length=16",
    "data.unit_tokens=16",
    "batch.global_batch_size=4",
    # Attention's kernels take heads of 64. Heads n // 2 and n % 2 are different key heads.
    "model.hidden_size=256",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
)
LAYOUTS = {
    "one process": (),
    "one process, full recompute": ("recompute.granularity=full",),
    "tp2+sp": ("parallel.tensor=2", "parallel.sequence=true"),
    "cp2 ring, selective recompute": (
        "parallel.context=2",
        "parallel.context_attention=ring",
        "recompute.granularity=selective",
    ),
    "pp2": ("parallel.pipeline=2",),
}
# What reaches a kernel of tp2+sp and pp2 is as in one process, only narrower or fewer; attention of
# parts of a row has tests of its own.
SLOW = ("one process, full recompute", "tp2+sp", "pp2", "cp2 ring, selective recompute")
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LAYOUTS]


@pytest.fixture(scope="module")
def interpreting() -> Iterator[InterpretedProcess]:
    # Triton decides when it is imported whether it interprets, so this process cannot.
    process = InterpretedProcess()
    yield process
    process.close()


@pytest.fixture(scope="module")
def compared(interpreting) -> Callable[..., list[dict]]:
    """(layout, fault) -> what each rank found."""

    @cache
    def measure(layout: str, fault: str = "") -> list[dict]:
        return interpreting.call(f"{__name__}:compare", overrides=LAYOUTS[layout], fault=fault)

    return measure


@pytest.mark.parametrize("layout", NAMES)
def test_triton_equals_torch(compared, layout):
    for rank in compared(layout):
        assert rank["loss_error"] <= LOSS_TOLERANCE
        assert rank["parameter_error"] <= PARAMETER_TOLERANCE
        lines = [f"{op}: triton (named; interpreted on the CPU)" for op in OPS]
        assert [line for line in rank["log"] if line.split(":")[0] in OPS] == lines


@pytest.mark.parametrize("layout", NAMES)
def test_every_call_of_the_ops_is_the_kernel(compared, layout):
    for rank, found in enumerate(compared(layout)):
        num_layers = STEPS * (NUM_LAYERS // 2 if layout == "pp2" else NUM_LAYERS)
        layers_run = num_layers * (2 if "full" in layout else 1)
        has_head = layout != "pp2" or rank == 1
        expected = {
            "rope triton": layers_run,
            "rms_norm triton": 2 * layers_run + STEPS * has_head,
            # Of backward too: the engine adds the weight's gradient there.
            "swiglu triton": layers_run + num_layers,
            "attention triton": layers_run,
            "cross_entropy triton": STEPS * has_head,
        }
        calls = {key: count for key, count in found["calls"].items() if key.split()[0] in OPS}
        if "ring" in layout:
            # Both chunks meet their own block: forward, forward again, backward. The other rank's
            # they meet where a document goes on.
            assert calls.pop("attention triton") > 6 * expected.pop("attention triton")
        assert calls == {op: count for op, count in expected.items() if count}


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_on_triton_equals_torch(interpreting, exact):
    found, expected, calls = interpreting.call(f"{__name__}:generate_on_both", exact=exact)
    assert found["tokens"] == expected["tokens"]
    assert found["ends"] == expected["ends"] == ["length"] * 2
    assert found["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-5)
    assert found["prompt"] == pytest.approx(expected["prompt"], abs=1e-5)
    assert set(calls) == {f"{op} triton" for op in OPS if op != "cross_entropy"}


@pytest.mark.parametrize(
    "fault",
    [
        "positions in the order of rows",
        pytest.param("residual without attention", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_seam_is_found(compared, fault):
    (rank,) = compared("one process", fault)
    assert rank["loss_error"] > LOSS_TOLERANCE
    assert rank["parameter_error"] > PARAMETER_TOLERANCE


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"rope": "triton"}, ("kernels.rope=triton", "expected cuda", "TRITON_INTERPRET=1")),
        ({"swiglu": "te"}, ("kernels.swiglu=te", "no implementation 'te'", "there are")),
        ({"attention": "te"}, ("kernels.attention=te", "no implementation 'te'", "there are")),
        ({"cross_entropy": "triton"}, ("kernels.cross_entropy=triton", "expected cuda")),
        ({"adamw": "triton"}, ("kernels.adamw=triton", "there are cuda, torch")),
    ],
)
def test_a_choice_that_cannot_run_is_one_clear_error(monkeypatch, asked, parts):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError) as raised:
        choose(KernelsConfig(**asked), torch.device("cpu"))
    text = str(raised.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text


def test_auto_takes_torch_on_a_cpu_and_says_why():
    choices = choose(KernelsConfig(), torch.device("cpu"))
    assert {choice.op for choice in choices} == set(KernelsConfig().by_op()) - {"fp8_cast"}
    assert {choice.implementation for choice in choices} == {"torch"}
    said = [choice.describe() for choice in choices]
    assert "rope: torch (auto: tensors are on cpu)" in said
    assert "adamw: torch (auto: tensors are on cpu)" in said


def test_heads_that_attention_kernels_do_not_take(monkeypatch):
    proven = dispatch.Choice("attention", "triton", "auto: proven")
    monkeypatch.setattr(dispatch, "choose", lambda op, asked, device, **_: replace(proven, op=op))
    device = torch.device("cpu")
    chosen = {head_dim: choose(KernelsConfig(), device, head_dim)[3] for head_dim in (8, 128)}
    assert chosen[128].describe() == "attention: triton (auto: proven)"
    reason = "auto: triton supports head dims 64, 96, 128, but the model's is 8"
    assert chosen[8].describe() == f"attention: torch ({reason})"
    with pytest.raises(ConfigError, match=r"kernels.attention=triton: .* is 8; use auto or torch"):
        choose(KernelsConfig(attention="triton"), device, 8)


@pytest.mark.parametrize(
    ("named", "overrides", "parts"),
    [
        ("flash", (), None),
        ("cudnn", (), ("a caller that asks for equal bits", "kernels.deterministic=true")),
        ("cudnn", ("kernels.deterministic=false",), None),
        ("flash", ("parallel.context=2",), ("does not serve ranges", "parallel.context=2")),
        ("flash", ("precision.dtype=fp32",), ("does not serve float32", "precision.dtype=fp32")),
        ("flash", ("model.hidden_size=320",), ("head dims 64, 96, 128, but the model's is 80",)),
    ],
)
def test_what_a_recipe_asks_of_attention_is_checked_at_the_start(named, overrides, parts):
    recipe = tiny_recipe(*RECIPE, "precision.dtype=bf16", f"kernels.attention={named}", *overrides)
    arguments = (recipe.kernels, GPU, recipe.model.head_dim, None, attention_needs(recipe))
    with installed(*LIBRARIES):
        if parts is None:
            assert choose(*arguments)[3].implementation == named
            return
        with pytest.raises(ConfigError) as raised:
            choose(*arguments)
    text = str(raised.value)
    assert text.startswith(f"kernels.attention={named}: ") and "\n" not in text
    assert all(part in text for part in parts), text


def test_an_absent_library_is_one_clear_error():
    with installed(), pytest.raises(ConfigError, match=r"kernels.attention=cudnn: .* is absent: "):
        choose(KernelsConfig(attention="cudnn"), GPU, 128)


@pytest.mark.parametrize(
    ("op", "text"), [("rope", "no implementation 'flash'; there are"), ("swiglu", "there are")]
)
def test_an_op_without_the_implementation_says_which_there_are(op, text):
    with pytest.raises(ConfigError, match=text):
        choose(KernelsConfig(**{op: "flash"}), torch.device("cpu"))


def test_required_kernels_leave_nothing_to_torch_that_nobody_gave_it():
    cpu = torch.device("cpu")
    with pytest.raises(
        ConfigError, match=r"qualify=required, but rope: torch \(auto: .*kernels.OP"
    ):
        choose(KernelsConfig(qualify="required"), cpu)
    named = dict.fromkeys(KernelsConfig().by_op(), "torch")
    assert {c.reason for c in choose(KernelsConfig(qualify="required", **named), cpu)} == {"named"}


def test_angles_by_position_are_the_angles_of_the_tables_per_token():
    model, cpu = tiny_recipe().model, torch.device("cpu")
    positions_BS = torch.randint(0, 16_384, (3, 50))
    cache = RopeCache.up_to(16_384, model, cpu)
    cos_SBD, sin_SBD = rope_cos_sin(positions_BS.float(), model, torch.float32)
    for per_token, by_position in ((cos_SBD, cache.cos_PD2), (sin_SBD, cache.sin_PD2)):
        assert torch.equal(per_token.transpose(0, 1), by_position[positions_BS].repeat(1, 1, 2))


def test_every_implementation_of_attention_has_one_that_decodes():
    chosen = {name: decoding_implementation(name) for name in registry.implementations("attention")}

    others = dict.fromkeys(("cudnn", "flash", "gluon"), "triton")
    assert chosen == {"torch": "torch", "triton": "triton"} | others
    assert all(registry.provides("attention", name, "decode") for name in chosen.values())


def test_every_implementation_of_attention_has_one_for_gathered_keys():
    names = registry.implementations("attention")
    chosen = {name: gathering_implementation(name) for name in names}
    assert chosen == {name: name for name in names} | {"cudnn": "triton", "flash": "triton"}


# What follows runs in the interpreting process and its ranks.


def compare(overrides: list[str], fault: str) -> list[dict]:
    """What each rank found."""
    parallel = tiny_recipe(*RECIPE, *overrides).parallel
    return run_ranks(parallel.model_parallel_size, run_both, overrides, fault)


def generate_on_both(exact: bool) -> tuple[dict, dict, list[str]]:
    """What a request gets on Triton and on torch, and which kernels were called."""
    return run_ranks(1, run_generation, exact)[0]


def run_generation(rank: int, world_size: int, exact: bool) -> tuple[dict, dict, list[str]]:
    with dispatch.count_calls() as calls:
        found = generated(rank, "triton", exact)
    return found, generated(rank, "torch", exact), [" ".join(key) for key in calls]


def generated(rank: int, implementation: str, exact: bool) -> dict:
    asked = [f"kernels.{op}={implementation}" for op in OPS]
    request = Asked((5, 17, 3, 80), n=2, max_tokens=2, prompt_log_probs=True)
    size = CacheSize(12, 16)
    with (
        engine_on(rank, tiny_recipe(*RECIPE, *asked), trains=False) as engine,
        Generator(engine, size, 0, batch_invariant=exact) as generator,
    ):
        return collect([e for step in generate(generator, [request]) for e in step], 1)[0]


def run_both(rank: int, world_size: int, overrides: list[str], fault: str) -> dict:
    """Train on torch, then on Triton; errors of losses and of this stage's tensors."""
    expected, truth, _, _ = train(rank, overrides, "torch")
    with faulty(fault):
        losses, tensors, calls, log = train(rank, overrides, "triton")
    errors = [(tensors[name] - tensor).norm() / tensor.norm() for name, tensor in truth.items()]
    return {
        "loss_error": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "parameter_error": float(max(errors)),
        "calls": {" ".join(key): count for key, count in calls.items()},
        "log": log,
    }


def train(
    rank: int, overrides: list[str], implementation: str
) -> tuple[list[float], dict[str, torch.Tensor], Counter, list[str]]:
    """Losses, parameters after the last step, calls of the ops, and the engine's choices."""
    asked = [f"kernels.{op}={implementation}" for op in OPS]
    with engine_on(rank, tiny_recipe(*RECIPE, *overrides, *asked)) as engine:
        with dispatch.count_calls() as calls:
            losses = [
                # One micro-batch keeps the interpreter's work small. The rate of parity's first
                # step: a larger one would measure what Adam makes of gradients near zero.
                engine.train_step(
                    batches_of(engine, step)[1:],
                    NextToken(),
                    learning_rate=LEARNING_RATE / WARMUP_STEPS,
                ).loss
                for step in range(STEPS)
            ]
        log = [choice.describe() for choice in engine.choices]
        tensors = {name: tensor.clone() for name, tensor in engine.whole_parameters()}
        return losses, tensors, calls, log


def faulty(name: str):
    """A context with the fault of that name."""

    def in_rows(qkv, *args, position_ids, **options):
        rows = position_ids.view(-1, 2).t().flatten()
        return kept_rope(qkv, *args, position_ids=rows, **options)

    def without_attention(x, residual, *args, **options):
        return kept_norm(x, residual, *args, **options)[0], residual

    kept_rope, kept_norm = attention.rope_qkv, layers.add_rms_norm
    faults = {
        "positions in the order of rows": (attention, "rope_qkv", in_rows),
        "residual without attention": (layers, "add_rms_norm", without_attention),
    }
    return mock.patch.object(*faults[name]) if name else nullcontext()
