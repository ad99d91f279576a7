"""Ranks on paper hold what the real model of their layout holds, and leave nothing behind."""

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state

from phi4.config import Recipe, check, with_overrides
from phi4.engine.fake_ranks import fake_rank, rank_shapes
from phi4.engine.model.gpt import build_chunks, seed_random_states, transformer_config
from phi4.model.shape import num_parameters, num_rank_parameters

TINY = (
    "model.num_layers=8",
    "model.hidden_size=40",
    "model.num_attention_heads=20",
    "model.num_key_value_heads=10",
    "model.intermediate_size=60",
    "model.vocab_size=130",
    "batch.global_batch_size=16",
)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
        ["parallel.pipeline=20"],
        ["parallel.pipeline=4", "parallel.layers_per_stage=[12,10,11,7]"],
        [
            "parallel.pipeline=4",
            "parallel.virtual_pipeline=2",
            "parallel.tensor=2",
            "parallel.layers_per_stage=[5,6,5,5,5,5,5,4]",
            "batch.global_batch_size=16",
        ],
    ],
)
def test_every_layout_of_phi4_sums_to_its_parameters(overrides: list[str]) -> None:
    recipe = with_overrides(Recipe(), overrides)
    check(recipe)
    assert sum(shape.num_counted_parameters for shape in rank_shapes(recipe)) == 14_659_507_200


@settings(max_examples=8)
@given(
    tensor=st.sampled_from([1, 2, 5, 10]),
    pipeline=st.sampled_from([1, 2, 4]),
    virtual=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2]),
)
def test_ranks_hold_what_the_shape_table_says(tensor, pipeline, virtual, context) -> None:
    virtual = virtual if pipeline > 1 else 1
    recipe = with_overrides(
        Recipe(),
        [
            *TINY,
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.virtual_pipeline={virtual}",
            f"parallel.overlap_p2p={str(virtual > 1).lower()}",
            f"parallel.context={context}",
        ],
    )
    check(recipe)
    shapes = rank_shapes(recipe)
    assert [(s.pp_rank, s.tp_rank) for s in shapes] == [
        (pp_rank, tp_rank) for pp_rank in range(pipeline) for tp_rank in range(tensor)
    ]
    assert sum(s.num_counted_parameters for s in shapes) == num_parameters(recipe.model)
    for shape in shapes:
        first, last = shape.pp_rank == 0, shape.pp_rank == pipeline - 1
        assert [c.is_first for c in shape.chunks] == [first] + [False] * (virtual - 1)
        assert [c.is_last for c in shape.chunks] == [False] * (virtual - 1) + [last]
        assert shape.num_parameters == num_rank_parameters(
            recipe.model, 8 // pipeline, tensor, first=first, last=last
        )


def test_uneven_layers_land_on_their_stage_and_chunk() -> None:
    recipe = with_overrides(
        Recipe(),
        [
            *TINY,
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "parallel.overlap_p2p=true",
            "parallel.layers_per_stage=[1,2,4,1]",
        ],
    )
    layers = [[chunk.num_layers for chunk in shape.chunks] for shape in rank_shapes(recipe)]
    assert layers == [[1, 4], [2, 1]]


def test_no_tensor_has_bytes_and_groups_go_away() -> None:
    recipe = with_overrides(Recipe(), ["parallel.tensor=2"])
    with fake_rank(recipe.parallel, 1) as layout:
        config = transformer_config(recipe, frees_stage_outputs=True)
        seed_random_states(1)
        chunks = build_chunks(recipe, layout, config)
        assert all(p.is_meta for chunk in chunks for p in chunk.parameters())
        assert (layout.tp_rank, layout.groups.tp.size()) == (1, 2)
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_groups_go_away_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), fake_rank(Recipe().parallel, 0):
        raise ZeroDivisionError
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
