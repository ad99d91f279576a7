"""Files of pairs, pivots and conversations whose content follows from a seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from phi4.data.files.token_writer import TokenFileWriter
from tests.data.conftest import FACTS

LOWEST_ID, HIGHEST_ID = 10, 500


class Side(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray


class Pivots(NamedTuple):
    ids: np.ndarray
    positions: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def drawn_pairs(num_pairs: int, seed: int = 0) -> list[tuple[Side, Side]]:
    """Prompts of 1 to 6 tokens, answers of 1 to 7, some of them with a stretch without loss."""
    random = np.random.default_rng(seed)

    def side(prompt: np.ndarray) -> Side:
        answer = random.integers(LOWEST_ID, HIGHEST_ID, random.integers(1, 8))
        mask = np.concatenate([np.zeros(prompt.size), np.ones(answer.size)]).astype(np.uint8)
        if answer.size > 4:
            mask[prompt.size + 1] = 0
        return Side(np.concatenate([prompt, answer]), mask)

    prompts = (random.integers(LOWEST_ID, HIGHEST_ID, n) for n in random.integers(1, 7, num_pairs))
    return [(side(prompt), side(prompt)) for prompt in prompts]


def drawn_pivots(num_documents: int, seed: int = 0) -> list[Pivots]:
    """Trajectories of 3 to 12 tokens with 1 to 3 pivots, one of them at the end sometimes."""
    random = np.random.default_rng(seed)

    def document() -> Pivots:
        ids = random.integers(LOWEST_ID, HIGHEST_ID, random.integers(3, 13))
        positions = np.sort(random.choice(ids.size, random.integers(1, 4), replace=False))
        chosen = random.integers(LOWEST_ID, HIGHEST_ID, positions.size)
        return Pivots(ids, positions, chosen, chosen + 1)

    return [document() for _ in range(num_documents)]


def write_pairs(prefix: Path, pairs: int | Sequence[tuple[Side, Side]]) -> str:
    pairs = drawn_pairs(pairs) if isinstance(pairs, int) else pairs
    with TokenFileWriter(prefix, FACTS, kind="pairs") as writer:
        for sides in pairs:
            ids, masks = (np.concatenate(column) for column in zip(*sides, strict=True))
            writer.add_many(ids, [side.ids.size for side in sides], masks)
    return str(prefix)


def write_pivots(prefix: Path, documents: int | Sequence[Pivots]) -> str:
    documents = drawn_pivots(documents) if isinstance(documents, int) else documents
    with TokenFileWriter(prefix, FACTS, kind="pivots") as writer:
        for document in documents:
            writer.add_many(np.concatenate(document), [part.size for part in document])
    return str(prefix)


def write_conversations(prefix: Path, masks: Sequence[Sequence[int]]) -> str:
    """Documents whose ids count up, with these loss masks."""
    with TokenFileWriter(prefix, FACTS) as writer:
        for mask in masks:
            writer.add(np.arange(LOWEST_ID, LOWEST_ID + len(mask)), np.array(mask))
    return str(prefix)
