"""Each cross-rule is tripped by one recipe and by nothing sound; all are reported at once."""

import ast
import inspect

import pytest

from phi4.config import Recipe, check, rules, te_rules, violations, with_overrides
from phi4.errors import ConfigError, LayoutError

SOUND = with_overrides(Recipe(), ["batch.global_batch_size=16"])

# What is asked on top of SOUND, and the line it yields.
BROKEN = {
    "delayed scaling is Transformer Engine's": (
        ["precision.fp8=torch", "precision.fp8_recipe=delayed"],
        "precision.fp8_recipe=delayed is only available in Transformer Engine; use "
        "precision.fp8=te, or precision.fp8_recipe=tensorwise",
    ),
    "rowwise scaling is torch's": (
        ["precision.fp8=te", "precision.fp8_recipe=rowwise"],
        "precision.fp8_recipe=rowwise is not supported by Transformer Engine; use tensorwise, "
        "blockwise or delayed, or precision.fp8=torch",
    ),
    "Transformer Engine reads bf16": (
        ["precision.fp8=te", "precision.dtype=fp32"],
        "precision.fp8=te needs bf16 inputs and outputs, but precision.dtype=fp32; use "
        "precision.dtype=bf16, or precision.fp8=torch",
    ),
    "Transformer Engine needs a GPU": (
        ["precision.fp8=te", "run.platform=cpu"],
        "precision.fp8=te needs a GPU, but run.platform=cpu; use precision.fp8=torch, which "
        "also runs on a CPU",
    ),
    "delayed scaling is of all layers": (
        ["precision.fp8=te", "precision.fp8_recipe=delayed"],
        "precision.fp8_recipe=delayed applies to all layers, but "
        "precision.fp8_end_layers_in_bf16=1; use precision.fp8_end_layers_in_bf16=0, or "
        "precision.fp8_recipe=tensorwise",
    ),
    "delayed scaling computes no layer again": (
        [
            *("precision.fp8=te", "precision.fp8_recipe=delayed"),
            *("precision.fp8_end_layers_in_bf16=0", "recompute.granularity=full"),
        ],
        "precision.fp8_recipe=delayed cannot be used with recompute.granularity=full; use "
        "recompute.granularity=selective, or precision.fp8_recipe=tensorwise",
    ),
    "end layers in bf16 fit a stage": (
        ["precision.fp8=te", "precision.fp8_end_layers_in_bf16=11", "parallel.pipeline=4"],
        "precision.fp8_end_layers_in_bf16=11 with precision.fp8=te exceeds "
        "model.num_layers / parallel.pipeline = 10; lower it or parallel.pipeline",
    ),
    "skipped windows ascend": (
        ["data.skip_windows=[[4, 8], [4, 16]]"],
        "data.skip_windows has the steps 4, 4, which do not ascend; give each step once",
    ),
    "replica is elsewhere": (
        ["run.dir=runs/a", "checkpoint.replica_dir=runs/b/../a/replica"],
        "checkpoint.replica_dir=runs/b/../a/replica is inside run.dir=runs/a and would be lost "
        "with it; use a directory on another file system",
    ),
    "heads divide hidden": (
        ["model.num_attention_heads=30"],
        "model.num_attention_heads=30 does not divide model.hidden_size=5120",
    ),
    "head dim is even": (
        ["model.hidden_size=520", "model.num_attention_heads=40"],
        "head dim 13 is odd",
    ),
    "KV heads divide heads": (
        ["model.num_key_value_heads=12"],
        "model.num_key_value_heads=12 does not divide model.num_attention_heads=40",
    ),
    "tensor divides KV heads": (
        ["parallel.tensor=4"],
        "parallel.tensor=4 does not divide num_key_value_heads=10; use 1 or 2 (a KV head is not",
    ),
    "tensor divides everything it splits": (
        ["parallel.tensor=3", "model.num_key_value_heads=20"],
        "parallel.tensor=3 does not divide num_key_value_heads=20 nor num_attention_heads=40 nor "
        "intermediate_size=17920 nor vocab_size=100352; use 1, 2 or 4",
    ),
    "tensor divides the vocabulary": (
        ["parallel.tensor=5"],
        "parallel.tensor=5 does not divide vocab_size=100352; use 1 or 2",
    ),
    "sequence within positions": (
        ["model.max_position_embeddings=2048"],
        "data.sequence_length=4096 exceeds model.max_position_embeddings=2048",
    ),
    "sequence is whole units": (
        ["data.unit_tokens=1000"],
        "data.sequence_length=4096 is not a multiple of data.unit_tokens=1000",
    ),
    "sequence parallelism needs tensor": (
        ["parallel.sequence=true"],
        "parallel.sequence=true needs parallel.tensor > 1",
    ),
    "sequence splits": (
        ["parallel.context=3"],
        "data.sequence_length=4096 does not split over context=3",
    ),
    "sequence splits with sequence parallelism": (
        [
            *("data.sequence_length=4098", "data.unit_tokens=4098"),
            *("parallel.context=3", "parallel.tensor=2", "parallel.sequence=true"),
        ],
        "use a multiple of 12",
    ),
    "virtual pipeline needs pipeline": (
        ["parallel.virtual_pipeline=2", "parallel.overlap_p2p=true"],
        "parallel.virtual_pipeline > 1 needs parallel.pipeline > 1",
    ),
    "virtual pipeline on two stages overlaps": (
        ["parallel.virtual_pipeline=2", "parallel.pipeline=2"],
        "parallel.virtual_pipeline > 1 on parallel.pipeline=2 needs parallel.overlap_p2p=true",
    ),
    "overlap needs virtual pipeline": (
        ["parallel.pipeline=2", "parallel.overlap_p2p=true"],
        "parallel.overlap_p2p=true needs parallel.virtual_pipeline > 1",
    ),
    "stages divide layers": (
        ["parallel.pipeline=3"],
        "pipeline=3 x virtual_pipeline=1 does not divide model.num_layers=40",
    ),
    "one entry per stage": (
        ["parallel.pipeline=2", "parallel.layers_per_stage=[10, 10, 20]"],
        "parallel.layers_per_stage has 3 entries; pipeline=2 x virtual_pipeline=1 needs 2",
    ),
    "entries sum to layers": (
        ["parallel.pipeline=2", "parallel.layers_per_stage=[20, 19]"],
        "parallel.layers_per_stage sums to 39; model.num_layers is 40",
    ),
    "batch divides": (
        ["batch.micro_batch_size=3"],
        "batch.global_batch_size=16 is not a multiple of micro_batch_size=3 x data=1",
    ),
    "interleaved micro-batches": (
        ["batch.micro_batch_size=8", "parallel.pipeline=4", "parallel.virtual_pipeline=2"],
        "needs the 2 micro-batches per rank to be a multiple of parallel.pipeline=4",
    ),
    "minimum below peak": (
        ["optim.min_learning_rate=1.0"],
        "optim.min_learning_rate=1.0 exceeds optim.learning_rate=0.0003",
    ),
    "warm-up before decay": (
        ["optim.warmup=10", "optim.decay=10"],
        "optim.warmup=10 must end before optim.decay=10",
    ),
    "parameter gather overlap": (
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
        "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true",
    ),
    "source names differ": (
        [
            'data.sources=[{name="a", path="x"}, {name="a", path="y"}, {name="b", path="z"}]',
        ],
        "data.sources names 'a' twice",
    ),
    "some weight": (
        ['data.sources=[{name="a", path="x", weight=0.0}]'],
        "data.sources: all weights are 0",
    ),
    "fractions sum to 1": (
        ['data.sources=[{name="a", path="x", weight=0.5}, {name="b", path="y", weight=0.4}]'],
        "data.sources: weights below 1 are fractions, and they sum to 0.9",
    ),
    "streams take documents of any length": (
        ['data.sources=[{name="a", path="x", min_tokens=9}]'],
        "source 'a' selects documents by min_tokens, max_tokens or overlong, but a stream is cut",
    ),
    "pairs are selected before training": (
        ['data.sources=[{name="a", path="x", kind="pairs", max_tokens=9}]'],
        "source 'a' selects documents by min_tokens, max_tokens or overlong, which has no effect",
    ),
    "only answers of pairs are shortened": (
        ['data.held_out=[{name="a", path="x", kind="pivots", max_response_tokens=5}]'],
        "source 'a': max_response_tokens=5 has no effect on kind=pivots",
    ),
    "document bounds leave documents": (
        [
            'data.held_out=[{name="a", path="x", kind="windows", min_tokens=9, max_tokens=8}]',
        ],
        "source 'a': min_tokens=9 exceeds max_tokens=8",
    ),
}

WORLD = {
    "processes match the layout": (
        ["parallel.tensor=2", "parallel.data=2"],
        8,
        "8 processes were started; tensor=2 x pipeline=1 x context=1 x data=2 needs 4",
    ),
    "processes are whole replicas": (
        ["parallel.tensor=2", "parallel.data=0"],
        3,
        "3 processes were started; not a multiple of tensor=2 x pipeline=1 x context=1 = 2",
    ),
    "batch divides over what was started": (
        ["parallel.data=0"],
        3,
        "batch.global_batch_size=16 is not a multiple of micro_batch_size=1 x data=3",
    ),
    "interleaved over what was started": (
        ["parallel.data=0", "parallel.pipeline=4", "parallel.virtual_pipeline=2"],
        32,
        "needs the 2 micro-batches per rank to be a multiple of parallel.pipeline=4",
    ),
}

FITTING = [
    ["parallel.tensor=2", "parallel.sequence=true"],
    ["model.vocab_size=100360", "parallel.tensor=10"],
    ["parallel.tensor=2", "parallel.pipeline=4", "parallel.layers_per_stage=[10, 10, 11, 9]"],
    ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.overlap_p2p=true"],
    ["parallel.pipeline=4", "parallel.virtual_pipeline=2"],
    ["parallel.context=4", "parallel.tensor=2", "parallel.sequence=true"],
    [
        "parallel.overlap_param_gather=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.distributed_optimizer=true",
    ],
    ["optim.warmup=9", "optim.decay=10"],
]


@pytest.mark.parametrize("overrides", [[], *FITTING])
def test_sound_recipe_breaks_no_rule(overrides: list[str]) -> None:
    check(with_overrides(SOUND, overrides))


@pytest.mark.parametrize(("overrides", "line"), BROKEN.values(), ids=BROKEN)
def test_broken_recipe_is_refused(overrides: list[str], line: str) -> None:
    found = violations(with_overrides(SOUND, overrides))
    assert any(line in violation for violation in found), found


@pytest.mark.parametrize(("overrides", "world_size", "line"), WORLD.values(), ids=WORLD)
def test_wrong_number_of_processes_is_refused(
    overrides: list[str], world_size: int, line: str
) -> None:
    recipe = with_overrides(SOUND, overrides)
    assert violations(recipe) == []
    with pytest.raises(LayoutError) as error:
        check(recipe, world_size)
    assert line in str(error.value)


@pytest.mark.parametrize("world_size", [4, 8])
def test_replicas_follow_the_processes(world_size: int) -> None:
    recipe = with_overrides(SOUND, ["parallel.tensor=2", "parallel.data=0"])
    check(recipe, world_size)
    assert rules.data_parallel_size(recipe, world_size) == world_size // 2


def test_every_line_of_the_rules_has_a_recipe_that_trips_it() -> None:
    trees = [ast.parse(inspect.getsource(module)) for module in (rules, te_rules)]
    num_lines = sum(isinstance(node, ast.Yield) for tree in trees for node in ast.walk(tree))
    seen = {line for overrides, _ in BROKEN.values() for line in shapes(overrides)}
    seen |= {line for overrides, n, _ in WORLD.values() for line in shapes(overrides, n)}
    assert len(seen) == num_lines


def shapes(overrides: list[str], world_size: int | None = None) -> set[str]:
    """Where in rules.py the violations of a recipe were yielded."""
    recipe = with_overrides(SOUND, overrides)
    generators = [rule(recipe) for rule in rules.RULES]
    if world_size is not None:
        generators.append(rules._world(recipe, world_size))
    lines = set()
    for generator in generators:
        for _ in generator:
            innermost = generator
            while innermost.gi_yieldfrom is not None:
                innermost = innermost.gi_yieldfrom
            lines.add(f"{innermost.gi_code.co_name}:{innermost.gi_frame.f_lineno}")
    return lines


def test_all_violations_are_reported_at_once() -> None:
    recipe = with_overrides(SOUND, ["parallel.tensor=4", "data.unit_tokens=1000", "optim.decay=1"])
    recipe = with_overrides(recipe, ["optim.warmup=2"])
    with pytest.raises(ConfigError) as error:
        check(recipe)
    lines = str(error.value).splitlines()
    for key in ("parallel.tensor=4", "data.unit_tokens=1000", "optim.warmup=2"):
        assert sum(key in line for line in lines) == 1
    assert len(lines) == 3


def test_one_violation_is_one_line() -> None:
    with pytest.raises(LayoutError) as error:
        check(with_overrides(SOUND, ["parallel.tensor=4"]))
    assert "\n" not in str(error.value)
