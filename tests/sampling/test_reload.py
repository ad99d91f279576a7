"""Other weights in a sampler that goes on: its tokens are those of a fresh one, in any layout."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from phi4.config import dump_toml
from phi4.convert.model_source import ModelSource
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.engine.checkpoint import recipe_of, save_checkpoint
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.model.gpt import initialise
from phi4.errors import CheckpointError, PlatformError
from phi4.rundir.names import MANIFEST_FILE, RECIPE_FILE
from phi4.sampling.batch import answers
from phi4.sampling.local import LocalSampler
from phi4.sampling.protocol import Completion, Request, SamplerLoad
from tests.support.engines import engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

TOKENIZER = Tokenizer({bytes([65 + i]): i for i in range(32)})
SIZES = (f"model.vocab_size={TOKENIZER.vocab_size}", "model.num_layers=2")
SPLIT = ("parallel.tensor=2", "parallel.pipeline=2")
LAYOUTS = [
    pytest.param((), id="one process"),
    pytest.param(SPLIT, id="tp2xpp2", marks=pytest.mark.slow),
]
PROMPT = tuple(range(32, 53)) * 2
REQUEST = Request(prompt=PROMPT, max_tokens=8, n=2, seed=3)


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def checkpoints(pool, tmp_path_factory) -> list[Path]:
    """Two of a run, and one of another model."""
    root = tmp_path_factory.mktemp("runs")
    pool.run(save, root / "one", SIZES)
    pool.run(save, root / "other", (*SIZES, "model.num_layers=4"))
    return [root / "one/step_0000001", root / "one/step_0000002", root / "other/step_0000003"]


@pytest.fixture(params=LAYOUTS)
def on_leader(request, pool) -> Iterator[Callable]:
    """Calls a function of this file in the leading rank of a layout."""
    if not request.param:
        yield lambda *call: pool.run(in_ranks, (), *call)[0]
        return
    with RankPool(4) as ranks:
        yield lambda *call: ranks.run(in_ranks, request.param, *call)[0]


def test_tokens_after_a_reload_are_those_of_a_fresh_sampler(on_leader, checkpoints) -> None:
    first, second, _ = checkpoints
    fresh = [on_leader(path, reloaded, ()) for path in (first, second)]
    assert fresh[0] != fresh[1]
    # Also a prompt whose keys and values are cached, and weights that come back.
    assert on_leader(first, reloaded, (second, first)) == [*fresh[0], *fresh[1], *fresh[0]]


def test_wrong_checkpoint_leaves_the_weights(on_leader, checkpoints, tmp_path) -> None:
    first, second, other = checkpoints
    damaged, incomplete, foreign = (tmp_path / name / second.name for name in ("a", "b", "c"))
    for path in (damaged, incomplete, foreign):
        shutil.copytree(second, path)
    damage(damaged)
    (incomplete / MANIFEST_FILE).unlink()
    (foreign / RECIPE_FILE).write_text((other / RECIPE_FILE).read_text())
    gone = tmp_path / "d" / second.name
    said = [
        (damaged, "has another sha256 than its manifest lists"),
        (incomplete, "has no manifest.json"),
        (foreign, "does not match its manifest.json"),
        (other, f"model.num_layers of {other} differs from that of {first}; serve it separately"),
        (gone, f"{gone} has no recipe.toml"),
    ]
    [expected] = on_leader(first, reloaded, ())
    outcomes = on_leader(first, refused, [path for path, _ in said])
    for (checked, loaded, tokens), (_, message) in zip(outcomes, said, strict=True):
        assert message in checked and message in loaded
        assert "\n" not in checked + loaded
        assert tokens == expected


def test_weights_are_not_changed_under_a_request(on_leader, checkpoints) -> None:
    first, second, _ = checkpoints
    message, before, after = on_leader(first, reloaded_too_early, second)
    assert message == "1 requests are in progress; finish or cancel them first"
    assert [before, after] == on_leader(first, reloaded, (second,))


def test_checkpoint_that_goes_away_while_it_is_read_ends_the_model(pool, checkpoints) -> None:
    first, second, _ = checkpoints
    message = pool.run(in_ranks, (), first, reloaded_while_removed, second)[0]
    assert "the model's weights are undefined" in message and "\n" not in message


def test_generator_that_was_given_no_way_to_load_says_so(pool, checkpoints) -> None:
    assert pool.run(loads_nothing, checkpoints[0])[0] == (
        "the generator cannot load weights; create it with load_weights"
    )


def test_load_counts_requests_and_blocks(pool, checkpoints) -> None:
    found = pool.run(in_ranks, (), checkpoints[0], loads)[0]
    # 3 blocks hold a prompt of 42 tokens and 9 new ones; 4 are free.
    assert found == [SamplerLoad(0, 7, 0, 0), SamplerLoad(3, 7, 1, 2), SamplerLoad(0, 7, 0, 0)]


def damage(checkpoint: Path) -> None:
    """Turn a bit of the largest file."""
    path = max(checkpoint.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What follows runs in the ranks.


def save(rank: int, world_size: int, root: Path, overrides: tuple[str, ...]) -> None:
    recipe = tiny_recipe(*overrides)
    files = {RECIPE_FILE: dump_toml(recipe)}
    with engine_on(rank, recipe, trains=False) as engine:
        for step in (1, 2, 3):
            initialise(engine.bare_chunks, recipe.model, step, engine.layout)
            save_checkpoint(engine, root, step, form="none", keep=9, files=files, data={})


def in_ranks(
    rank: int,
    world_size: int,
    layout: tuple[str, ...],
    checkpoint: Path,
    use: Callable,
    *arguments: object,
) -> object:
    """`use(sampler, source, *arguments)` on the leader; the others follow."""
    source = ModelSource(checkpoint, recipe_of(checkpoint, layout), None)
    with (
        engine_on(rank, source.recipe, checkpoint=checkpoint) as engine,
        sampler_of(engine, source, CacheSize(7, 16)) as (generator, sampler),
    ):
        if sampler is None:
            return generator.follow()
        found = use(sampler, source, *arguments)
        sampler.close()
        return found


@contextmanager
def sampler_of(
    engine, source: ModelSource, size: CacheSize
) -> Iterator[tuple[Generator, LocalSampler | None]]:
    def load_weights(place: str) -> None:
        source.load_into(engine, Path(place))

    num_ids = TOKENIZER.vocab_size
    with Generator(engine, size, "", num_ids=num_ids, load_weights=load_weights) as generator:
        yield generator, LocalSampler(generator, TOKENIZER) if generator.leads else None


def tokens_of(sampler: LocalSampler, request: Request = REQUEST) -> list[list[int]]:
    [answer] = answers(sampler, [request])
    return [[token.id for token in one.tokens] for one in answer.completions]


def reloaded(sampler: LocalSampler, source: ModelSource, places: tuple[Path, ...]) -> list:
    """Tokens with the weights of the source, then with those of every place."""
    found = [tokens_of(sampler)]
    for place in places:
        source.check_successor(place)
        sampler.reload(str(place))
        found.append(tokens_of(sampler))
    return found


def refused(sampler: LocalSampler, source: ModelSource, places: list[Path]) -> list[tuple]:
    """What the check says, what the loading says without it, and tokens after both."""
    outcomes = []
    for place in places:
        with pytest.raises(CheckpointError) as checked:
            source.check_successor(place)
        with pytest.raises(CheckpointError) as loaded:
            sampler.reload(str(place))
        outcomes.append((str(checked.value), str(loaded.value), tokens_of(sampler)))
    return outcomes


def reloaded_too_early(sampler: LocalSampler, source: ModelSource, place: Path) -> tuple:
    """The refusal; tokens of the request that it did not disturb; tokens after a reload.

    The reload comes right behind a stop string, which the engine hears of by a cancel.
    """
    sampler.submit(REQUEST)
    completions: list[Completion] = []
    message = ""
    while len(completions) < REQUEST.n:
        completions += [e for e in sampler.step() if isinstance(e, Completion)]
        if not completions and not message:
            with pytest.raises(ValueError) as caught:
                sampler.reload(str(place))
            message = str(caught.value)
    before = [[token.id for token in one.tokens] for one in completions]
    letter = TOKENIZER.bytes_of(before[0][0])
    tokens_of(sampler, replace(REQUEST, stop_strings=(letter,), n=1))
    sampler.reload(str(place))
    return message, before, tokens_of(sampler)


def reloaded_while_removed(sampler: LocalSampler, source: ModelSource, place: Path) -> str:
    from phi4.convert import model_source

    whole = model_source.load_checkpoint

    def load_from_nothing(engine, checkpoint, *given, **options) -> None:
        whole(engine, checkpoint.with_name("step_0000009"), *given, **options)

    model_source.load_checkpoint = load_from_nothing
    try:
        with pytest.raises(PlatformError) as caught:
            sampler.reload(str(place))
    finally:
        model_source.load_checkpoint = whole
    return str(caught.value)


def loads_nothing(rank: int, world_size: int, checkpoint: Path) -> str:
    with engine_on(rank, recipe_of(checkpoint), checkpoint=checkpoint) as engine:
        with Generator(engine, CacheSize(4), "") as generator, pytest.raises(ValueError) as caught:
            generator.load("anywhere")
        return str(caught.value)


def loads(sampler: LocalSampler, source: ModelSource) -> list[SamplerLoad]:
    """Before, while three requests of which the cache holds one are under way, and after."""
    found = [sampler.load()]
    for _ in range(3):
        sampler.submit(Request(prompt=PROMPT, max_tokens=20))
    sampler.step()
    found.append(sampler.load())
    num_ended = 0
    while num_ended < 3:
        num_ended += sum(isinstance(event, Completion) for event in sampler.step())
    return [*found, sampler.load()]
