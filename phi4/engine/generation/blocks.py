"""Block accounting of the key-value cache: which blocks hold which tokens. Uses no tensors.

A block holds the keys and values of `block_tokens` consecutive tokens in every layer. Sequences
share blocks by reference count: samples of one prompt, and requests with a common prefix. Only a
block with a single owner is written; a sequence that appends to a shared one gets a copy first.

A request is admitted when the pool can hold its maximum length, samples included, and that number
is reserved. An admitted request thus never runs out of blocks, and is never preempted; a request
that does not fit yet waits.

Full blocks stay registered by their tokens after the last sequence has ended, until their space is
needed (least recently used first). A key is exact: the entry of the preceding block and the tokens
of this one, not a hash of them.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from phi4.errors import ConfigError


class BlockCopy(NamedTuple):
    """Copy an entire block, in every layer, before the next write."""

    source: int
    target: int


class _Entry(NamedTuple):
    """A full block with known tokens; children refer to it by its serial number, which is never
    reused."""

    serial: int
    block: int


@dataclass(eq=False)
class CachedSequence:
    """The cached tokens of one sample. Only `BlockPool` modifies it.

    Attributes:
        tokens: ids whose keys and values have space in `blocks`, from position 0.
        blocks: block i holds positions [i * block_tokens, (i + 1) * block_tokens).
        num_reserved: blocks that it, and the samples not yet forked from it, may still take.
    """

    num_prompt_tokens: int
    max_blocks: int
    parent: Hashable
    """Key of the prefix formed by the published blocks."""
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_published: int = 0
    num_reserved: int = 0
    num_unforked: int = 0
    ended: bool = False


def slots_of(blocks: Sequence[int], block_tokens: int, start: int, end: int) -> np.ndarray:
    """Return slots of positions [start, end) of a sequence, int64, counted in tokens from the
    cache's beginning.

    Args:
        blocks: blocks of the sequence, in order.
        block_tokens: tokens of a block.
        start, end: positions within the blocks.
    """
    first = start // block_tokens
    held = np.array(blocks[first : -(-end // block_tokens)], dtype=np.int64)
    slots = (held[:, None] * block_tokens + np.arange(block_tokens)).reshape(-1)
    return slots[start - first * block_tokens : end - first * block_tokens]


class BlockPool:
    """The blocks of one cache.

    Args:
        num_blocks: number of blocks.
        block_tokens: tokens of a block.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(reversed(range(num_blocks)))
        self._references = [0] * num_blocks
        self._entries: dict[Hashable, _Entry] = {}
        self._keys: dict[int, Hashable] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_entries = 0
        self._num_reserved = 0

    @property
    def num_in_use(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - len(self._free) - len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks that a new request may reserve, including those of evictable prefixes."""
        return len(self._free) + len(self._idle) - self._num_reserved

    def references(self, block: int) -> int:
        """Return how many sequences hold a block."""
        return self._references[block]

    def check_fits(self, num_tokens: int, num_samples: int, max_new_tokens: int) -> None:
        """Raise an error for a request that even an empty pool could not hold.

        Raises:
            ConfigError: it does not fit.
        """
        _, needed = self._needed(num_tokens, num_samples, max_new_tokens)
        if needed > self.num_blocks:
            raise ConfigError(
                f"{num_samples} samples of {num_tokens} + {max_new_tokens} tokens need {needed} "
                f"cache blocks of {self.block_tokens} tokens, but the cache has {self.num_blocks}; "
                f"request less, or use a cache of {needed * self.block_tokens} tokens"
            )

    def admit(
        self,
        prompt: Sequence[int],
        *,
        num_samples: int,
        max_new_tokens: int,
        weights_key: Hashable,
        reuses: bool = True,
    ) -> CachedSequence | None:
        """Return a sequence that already holds the cached prefix of the prompt, or None: wait.

        The last prompt token is never taken from the cache, because its logits are needed.

        Args:
            prompt: at least one id.
            num_samples: this sequence and those that `fork` will create from it.
            max_new_tokens: maximum new tokens of each sample; the last one is not cached.
            weights_key: key of the weights that the keys and values are computed with.
            reuses: False computes the entire prompt, whose logits may be needed.

        Raises:
            ConfigError: see `check_fits`.
        """
        num_tokens = len(prompt)
        max_blocks, needed = self._needed(num_tokens, num_samples, max_new_tokens)
        self.check_fits(num_tokens, num_samples, max_new_tokens)
        root: Hashable = ("weights", weights_key)
        found = self._known(prompt, root) if reuses else []
        num_revived = sum(entry.block in self._idle for entry in found)
        if needed - len(found) > self.num_available - num_revived:
            return None
        for entry in found:
            self._hold(entry.block)
        self._num_reserved += needed - len(found)
        return CachedSequence(
            num_prompt_tokens=num_tokens,
            max_blocks=max_blocks,
            parent=found[-1].serial if found else root,
            tokens=list(prompt[: len(found) * self.block_tokens]),
            blocks=[entry.block for entry in found],
            num_published=len(found),
            num_reserved=needed - len(found),
            num_unforked=num_samples - 1,
        )

    def extend(self, sequence: CachedSequence, tokens: Sequence[int]) -> BlockCopy | None:
        """Allocate space for the next tokens of a sequence.

        Returns:
            The copy to make before their keys and values are written, or None.
        """
        copy, size = None, self.block_tokens
        if tokens and len(sequence.tokens) % size and self._references[sequence.blocks[-1]] > 1:
            shared = sequence.blocks.pop()
            self._take(sequence)
            copy = BlockCopy(shared, sequence.blocks[-1])
            self._release(shared)
        sequence.tokens.extend(tokens)
        while len(sequence.blocks) * size < len(sequence.tokens):
            self._take(sequence)
        return copy

    def publish(self, sequence: CachedSequence) -> None:
        """Register the full blocks of a sequence, after keys and values have been written."""
        size = self.block_tokens
        while (sequence.num_published + 1) * size <= len(sequence.tokens):
            i = sequence.num_published
            key = (sequence.parent, tuple(sequence.tokens[i * size : (i + 1) * size]))
            entry, block = self._entries.get(key), sequence.blocks[i]
            if entry is None:
                self._num_entries += 1
                entry = self._entries[key] = _Entry(self._num_entries, block)
                self._keys[block] = key
            sequence.parent, sequence.num_published = entry.serial, i + 1

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """Create another sample of a fully cached prompt; it shares all blocks.

        Raises:
            ValueError: the sequence is not at the end of its prompt, or all samples exist.
        """
        if len(sequence.tokens) != sequence.num_prompt_tokens or not sequence.num_unforked:
            raise ValueError(
                f"fork of a sequence at {len(sequence.tokens)} of {sequence.num_prompt_tokens} "
                f"prompt tokens with {sequence.num_unforked} samples left; fork at the prompt's end"
            )
        for block in sequence.blocks:
            self._hold(block)
        num_reserved = sequence.max_blocks - sequence.num_prompt_tokens // self.block_tokens
        sequence.num_reserved -= num_reserved
        sequence.num_unforked -= 1
        return CachedSequence(
            num_prompt_tokens=sequence.num_prompt_tokens,
            max_blocks=sequence.max_blocks,
            parent=sequence.parent,
            tokens=list(sequence.tokens),
            blocks=list(sequence.blocks),
            num_published=sequence.num_published,
            num_reserved=num_reserved,
        )

    def end(self, sequence: CachedSequence) -> None:
        """Release what a sequence holds and has reserved. A second call does nothing."""
        if sequence.ended:
            return
        sequence.ended = True
        # The end of a prefix is less valuable than its beginning, so it is evicted first.
        for block in reversed(sequence.blocks):
            self._release(block)
        self._num_reserved -= sequence.num_reserved
        sequence.blocks, sequence.num_reserved = [], 0

    def forget(self) -> None:
        """Forget the tokens of all blocks, as after a change of the weights."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._entries.clear()
        self._keys.clear()

    def _needed(self, num_tokens: int, num_samples: int, max_new_tokens: int) -> tuple[int, int]:
        """Return blocks of one sample at its maximum length, and of a request without a cached
        prefix."""
        size = self.block_tokens
        max_blocks = -(-(num_tokens + max(max_new_tokens - 1, 0)) // size)
        num_full = num_tokens // size
        # The last owner of a shared partial block writes in place, but is not known in advance.
        copies = 1 if num_samples > 1 and num_tokens % size else 0
        return max_blocks, max_blocks + (num_samples - 1) * (max_blocks - num_full) + copies

    def _known(self, prompt: Sequence[int], parent: Hashable) -> list[_Entry]:
        found, size = [], self.block_tokens
        for start in range(0, len(prompt) - size, size):
            entry = self._entries.get((parent, tuple(prompt[start : start + size])))
            if entry is None:
                break
            found.append(entry)
            parent = entry.serial
        return found

    def _take(self, sequence: CachedSequence) -> None:
        """Return a free block for the end of a sequence, from those that it has reserved."""
        if not sequence.num_reserved:
            raise ValueError(f"a sequence grew beyond its {sequence.max_blocks} reserved blocks")
        sequence.num_reserved -= 1
        self._num_reserved -= 1
        if not self._free:
            oldest, _ = self._idle.popitem(last=False)
            del self._entries[self._keys.pop(oldest)]
            self._free.append(oldest)
        block = self._free.pop()
        self._references[block] = 1
        sequence.blocks.append(block)

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        if block in self._keys:
            self._idle[block] = None
        else:
            self._free.append(block)
