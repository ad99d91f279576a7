"""Blocks of the key-value cache: shared, copied before a write, given back, never lost."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phi4.engine.generation.blocks import BlockCopy, BlockPool, CachedSequence, slots_of
from phi4.errors import ConfigError

SIZE, NUM_BLOCKS = 4, 14


def admitted(pool, prompt, *, num_samples=1, max_new_tokens=1, weights_key="w"):
    """A sequence of a prompt that is cached whole."""
    sequence = pool.admit(
        prompt, num_samples=num_samples, max_new_tokens=max_new_tokens, weights_key=weights_key
    )
    pool.extend(sequence, prompt[len(sequence.tokens) :])
    pool.publish(sequence)
    return sequence


def test_samples_share_the_prompt_and_copy_its_last_block_when_they_write():
    pool = BlockPool(8, SIZE)
    first = admitted(pool, range(6), num_samples=3, max_new_tokens=2)
    second, third = pool.fork(first), pool.fork(first)
    assert pool.num_in_use == 2

    copies = [pool.extend(sequence, [9]) for sequence in (second, first, third)]
    assert copies == [
        BlockCopy(third.blocks[1], second.blocks[1]),
        BlockCopy(third.blocks[1], first.blocks[1]),
        None,
    ]
    assert first.blocks[0] == second.blocks[0] == third.blocks[0]
    assert pool.num_in_use == 4
    for sequence in (first, second, third, third):
        pool.end(sequence)
    assert (pool.num_in_use, pool.num_available) == (0, 8)


def test_a_prompt_reuses_full_blocks_of_the_same_weights_only():
    pool = BlockPool(8, SIZE)
    first = admitted(pool, range(8))
    pool.end(first)
    others = {
        "same": (range(9), "w"),
        "weights": (range(9), "v"),
        "other": ((1, *range(1, 9)), "w"),
    }
    found = {}
    for name, (prompt, key) in others.items():
        one = pool.admit(prompt, num_samples=1, max_new_tokens=1, weights_key=key)
        found[name] = one.tokens
        pool.end(one)

    assert found == {"same": list(range(8)), "weights": [], "other": []}


def test_the_last_prompt_token_is_computed_again():
    pool = BlockPool(8, SIZE)
    admitted(pool, range(8))

    again = pool.admit(range(8), num_samples=1, max_new_tokens=1, weights_key="w")
    assert again.tokens == [0, 1, 2, 3]


def test_blocks_are_known_once_published_and_not_after_forget():
    pool = BlockPool(8, SIZE)
    ask = {"num_samples": 1, "max_new_tokens": 1, "weights_key": "w"}
    first = pool.admit(range(8), **ask)
    pool.extend(first, range(8))
    assert pool.admit(range(9), **ask).tokens == []
    pool.publish(first)
    assert len(pool.admit(range(9), **ask).tokens) == 8
    pool.forget()
    assert pool.admit(range(5), **ask).tokens == []


def test_the_least_recently_used_prefix_makes_room_from_its_end():
    pool = BlockPool(4, SIZE)
    for first in (10, 20):
        pool.end(admitted(pool, range(first, first + 8)))
    pool.end(admitted(pool, range(30, 34)))

    kept = {first: pool._known(range(first, first + 9), ("weights", "w")) for first in (10, 20, 30)}
    assert {first: len(entries) for first, entries in kept.items()} == {10: 1, 20: 2, 30: 1}


def test_a_full_pool_makes_wait_and_what_never_fits_is_refused():
    pool = BlockPool(4, SIZE)
    ask = {"num_samples": 2, "max_new_tokens": 3, "weights_key": "w"}
    first = pool.admit(range(8), **ask)
    assert first is not None
    assert pool.admit([5], num_samples=1, max_new_tokens=1, weights_key="w") is None
    pool.end(first)
    assert pool.admit([5], num_samples=1, max_new_tokens=1, weights_key="w") is not None
    with pytest.raises(ConfigError, match="2 samples of 14 \\+ 3 tokens need 6 cache blocks"):
        pool.admit(range(14), **ask)


def test_known_blocks_that_a_request_takes_over_make_no_room_for_it():
    pool = BlockPool(4, SIZE)
    ask = {"num_samples": 1, "max_new_tokens": 1, "weights_key": "w"}
    pool.end(admitted(pool, range(8)))
    other = admitted(pool, range(50, 58))
    assert pool.admit(range(9), **ask) is None
    pool.end(other)
    assert len(pool.admit(range(9), **ask).tokens) == 8


def test_the_same_prompt_computed_twice_at_once_is_known_once():
    pool = BlockPool(4, SIZE)
    ask = {"num_samples": 1, "max_new_tokens": 1, "weights_key": "w"}
    both = [pool.admit(range(8), **ask) for _ in range(2)]
    for one in both:
        pool.extend(one, range(8))
    for one in both:
        pool.publish(one)
        pool.end(one)
    again = pool.admit(range(9), **ask)
    assert (len(again.tokens), pool.num_available) == (8, 1)
    pool.end(again)
    for first in (10, 30):
        pool.end(admitted(pool, range(first, first + 16)))
    assert (pool.num_in_use, pool.num_available) == (0, 4)


def test_forks_elsewhere_and_growth_beyond_the_reserve_are_refused():
    pool = BlockPool(4, SIZE)
    first = admitted(pool, range(4), num_samples=2, max_new_tokens=2)
    pool.fork(first)
    with pytest.raises(ValueError, match="0 samples left"):
        pool.fork(first)
    with pytest.raises(ValueError, match="beyond its 2 reserved"):
        pool.extend(first, range(9))


class Pool(RuleBasedStateMachine):
    """Random requests against a pool and a model of what every block was written with."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.live: list[tuple[CachedSequence, int]] = []
        """With the tokens that each may still get."""
        self.written: dict[int, list] = {}
        """{slot: the tokens up to and including the one whose keys lie there}."""

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        num_samples=st.integers(1, 4),
        max_new=st.integers(0, 9),
        weights=st.integers(0, 1),
    )
    def admit(self, prompt, num_samples, max_new, weights):
        prompt = [(weights, token) for token in prompt]
        ask = {"num_samples": num_samples, "max_new_tokens": max_new, "weights_key": weights}
        before = self.pool.num_available
        try:
            first = self.pool.admit(prompt, **ask)
        except ConfigError:
            return
        if first is None:
            assert self.pool.num_available == before
            return
        self.check(first)
        while len(first.tokens) < len(prompt):
            self.write(first, prompt[len(first.tokens) :][:3])
        samples = [first, *(self.pool.fork(first) for _ in range(num_samples - 1))]
        self.live += [(sample, max(max_new - 1, 0)) for sample in samples]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1), times=st.integers(1, 3))
    def extend(self, data, token, times):
        at = data.draw(st.integers(0, len(self.live) - 1))
        sequence, left = self.live[at]
        for _ in range(min(times, left)):
            self.write(sequence, [(sequence.tokens[0][0], token)])
        self.live[at] = (sequence, max(left - times, 0))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data):
        sequence, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pool.end(sequence)

    @rule()
    def forget(self):
        self.pool.forget()

    def write(self, sequence, tokens):
        start = len(sequence.tokens)
        copy = self.pool.extend(sequence, tokens)
        if copy is not None:
            for i in range(SIZE):
                if copy.source * SIZE + i in self.written:
                    self.written[copy.target * SIZE + i] = self.written[copy.source * SIZE + i]
        slots = slots_of(sequence.blocks, SIZE, start, len(sequence.tokens))
        for position, slot in enumerate(slots, start):
            assert self.pool.references(slot // SIZE) == 1
            self.written[slot] = sequence.tokens[: position + 1]
        self.pool.publish(sequence)

    def check(self, sequence):
        slots = slots_of(sequence.blocks, SIZE, 0, len(sequence.tokens))
        for position, slot in enumerate(slots):
            assert self.written[slot] == sequence.tokens[: position + 1]

    @invariant()
    def every_sequence_reads_what_it_wrote(self):
        for sequence, _ in self.live:
            self.check(sequence)

    @invariant()
    def no_block_is_lost(self):
        held = Counter(block for sequence, _ in self.live for block in sequence.blocks)
        assert {b: self.pool.references(b) for b in range(NUM_BLOCKS)} == {
            b: held[b] for b in range(NUM_BLOCKS)
        }
        assert self.pool.num_in_use == len(held)
        reserved = sum(sequence.num_reserved for sequence, _ in self.live)
        assert self.pool.num_available == NUM_BLOCKS - len(held) - reserved >= 0

    def teardown(self):
        for sequence, _ in self.live:
            self.pool.end(sequence)
        assert (self.pool.num_in_use, self.pool.num_available) == (0, NUM_BLOCKS)


Pool.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestPool = Pool.TestCase
