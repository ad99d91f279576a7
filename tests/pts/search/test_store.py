"""The store: what is in it is what was drawn, and it is one search's."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.errors import ConfigError, DataError
from phi4.oracles.verdict import Grade
from phi4.pts.search.command import search_and_write
from phi4.pts.search.drawing import DrawOptions
from phi4.pts.search.rollouts import Purpose, Rollout, RolloutBlock, Start, block_seed
from phi4.pts.search.settings import SearchMode, settings_of
from phi4.pts.search.store import FILE_NAME, StoredBlock, check_store, opened_store
from tests.pts.search.planted import OPTIONS, LastLetterOracle, RecordingSampler, questions
from tests.pts.search.test_search import job

PROMPT = (1, 2)
ROLLOUTS = (
    Rollout(Grade.RIGHT, 7, 3, 2, False, (7, 8), (-0.5, -0.25)),
    Rollout(Grade.WRONG, 9, 5, 0, True),
    Rollout(Grade.UNGRADABLE, 9, 1),
)
BLOCK = RolloutBlock(Purpose.TREE, Start((5,)), 0, 3)
OTHERS = (
    replace(BLOCK, number=1),
    replace(BLOCK, purpose=Purpose.CONFIRM),
    replace(BLOCK, n=4),
    replace(BLOCK, start=Start((6,))),
    replace(BLOCK, start=Start((5,), forced=3)),
    replace(BLOCK, start=Start((5,), forbidden=3)),
)


def test_block_comes_back_as_it_was_and_no_other_one(tmp_path) -> None:
    with opened_store(tmp_path, {"model": "a"}) as store:
        store.save([StoredBlock(PROMPT, BLOCK, 11, ROLLOUTS)])
        assert store.rollouts(PROMPT, BLOCK) == ROLLOUTS
        assert [store.rollouts(PROMPT, other) for other in OTHERS] == [None] * len(OTHERS)
        # The ids of a prompt and a prefix are not one list.
        assert store.rollouts((1, 2, 5), replace(BLOCK, start=Start(()))) is None
        assert store.rollouts((1, 3), BLOCK) is None
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        totals = connection.execute(
            "SELECT successes, trials, ungradable, truncated, tokens, least_seed FROM node_totals"
        ).fetchall()
    assert totals == [(1, 2, 1, 1, 9, 11)]


def test_blocks_of_a_batch_are_stored_together_or_not_at_all(tmp_path) -> None:
    with opened_store(tmp_path, {}) as store:
        store.save([StoredBlock(PROMPT, BLOCK, 11, ROLLOUTS)])
        # The second one of the batch is there already.
        batch = [StoredBlock(PROMPT, one, 12, ROLLOUTS) for one in (OTHERS[0], BLOCK)]
        with pytest.raises(sqlite3.IntegrityError):
            store.save(batch)
        assert store.rollouts(PROMPT, OTHERS[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "model=planted, but this one has model=other"),
        ({"oracle": "exact"}, "oracle=last letter, but this one has oracle=exact"),
        ({"questions": questions(2)}, "questions="),
        (
            {"settings": settings_of(SearchMode.REPORT, seed=3)},
            "=96, but this one has confirm_draws=0",
        ),
        (
            {"settings": settings_of(SearchMode.DEFAULT, 3, 0.05)},
            "alpha=0.1, but this one has alpha=",
        ),
        (
            {"options": replace(OPTIONS, max_tokens=17)},
            "max_tokens=16, but this one has max_tokens=17",
        ),
        ({"options": replace(OPTIONS, temperature=0.9)}, "temperature=1.0, but this one has"),
        ({"options": replace(OPTIONS, top_p=0.9)}, "top_p=1.0, but this one has top_p=0.9"),
        ({"options": replace(OPTIONS, seed=4)}, "seed=3, but this one has seed=4"),
    ],
)
def test_another_search_is_refused_and_the_difference_named(tmp_path, changes, message) -> None:
    first, second = job(tmp_path), job(tmp_path, **changes)
    check_store(tmp_path, second.identity)
    with opened_store(tmp_path, first.identity):
        check_store(tmp_path, first.identity)
    with pytest.raises(ConfigError) as caught:
        check_store(tmp_path, second.identity)
    assert message in str(caught.value) and "use another --out" in str(caught.value)
    with pytest.raises(ConfigError), opened_store(tmp_path, second.identity):
        pass


def test_same_search_again_draws_nothing(tokenizer, tmp_path) -> None:
    search = job(tmp_path, num=1)
    oracle = LastLetterOracle()
    first = search_and_write(search, RecordingSampler(tokenizer), tokenizer, oracle)
    rows = (tmp_path / "pivots.jsonl").read_bytes()
    again = RecordingSampler(tokenizer)
    second = search_and_write(search, again, tokenizer, LastLetterOracle())
    assert again.requests == []
    assert (second.cost, second.pivots) == (first.cost, first.pivots)
    assert (tmp_path / "pivots.jsonl").read_bytes() == rows
    assert second.seconds >= first.seconds


def test_two_searches_in_one_directory_are_refused(tmp_path) -> None:
    with (
        opened_store(tmp_path, {"a": "b"}),
        pytest.raises(ConfigError, match="another process is searching"),
        opened_store(tmp_path, {"a": "b"}),
    ):
        pass


def test_file_that_is_no_store_is_one_line(tmp_path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 100)
    for use in (lambda: check_store(tmp_path, {}), lambda: opened_store(tmp_path, {}).__enter__()):
        with pytest.raises(DataError, match="cannot be used"):
            use()


IDS = st.lists(st.integers(0, 300), max_size=3).map(tuple)
STARTS = st.builds(Start, IDS, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))
BLOCKS = st.builds(
    RolloutBlock, st.sampled_from(Purpose), STARTS, st.integers(0, 3), st.integers(1, 8)
)


@given(
    one=st.tuples(st.integers(0, 3), IDS, BLOCKS), other=st.tuples(st.integers(0, 3), IDS, BLOCKS)
)
def test_seed_is_of_search_prompt_start_purpose_and_number(one, other) -> None:
    def key(asked):
        seed, prompt, block = asked
        return (seed, prompt, block.start, block.purpose, block.number)

    seeds = block_seed(*one), block_seed(*other)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert (seeds[0] == seeds[1]) == (key(one) == key(other))


def test_each_part_of_a_block_changes_its_seed_and_its_size_does_not() -> None:
    blocks = [BLOCK, *(other for other in OTHERS if other.n == BLOCK.n)]
    seeds = [block_seed(3, PROMPT, block) for block in blocks]
    seeds += [block_seed(4, PROMPT, BLOCK), block_seed(3, (1,), BLOCK)]
    seeds += [block_seed(3, (1,), replace(BLOCK, start=Start((2, 5))))]
    assert len(set(seeds)) == len(OTHERS) + 3
    assert block_seed(3, PROMPT, replace(BLOCK, n=9, along=(1,))) == seeds[0]


def test_identity_holds_every_setting_and_every_option(tmp_path) -> None:
    search = job(tmp_path)
    names = {*vars(search.settings), *vars(search.options)}
    assert names | {"model", "oracle", "questions"} == set(search.identity)
    assert isinstance(search.options, DrawOptions)
