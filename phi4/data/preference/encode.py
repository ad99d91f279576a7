"""Encode a preference as token ids: the sequences of one document of a token file.

A pair is two sequences, the prompt with each answer; a trajectory with pivots is four. Every form
of the same pair is encoded to the same ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from phi4.data.files.manifest import FileKind
from phi4.data.rows.forms import read_preference_row
from phi4.data.rows.preferences import PreferencePair
from phi4.data.rows.token_ids import PairIds, Pivots
from phi4.data.vocabulary.chat import ChatTokens, encode_chat
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError


@dataclass(frozen=True, eq=False)
class PreferenceDocument:
    """One document of a token file of pairs or pivots.

    Attributes:
        kind: kind of file that it belongs in.
        sequences: see `FileKind`.
        loss_mask: 1 where the token counts in the loss as a label; over all sequences,
            concatenated. None for pivots.
        num_labels: labels that it occupies in a row.
        uses_chat_format: whether the ids were encoded from messages.
    """

    kind: FileKind
    sequences: tuple[np.ndarray, ...]
    loss_mask: np.ndarray | None
    num_labels: int
    uses_chat_format: bool

    @property
    def num_preferences(self) -> int:
        """Pairs or pivots."""
        return 1 if self.kind == "pairs" else self.sequences[1].size


def encode_preference(
    row: Mapping[str, object], tokenizer: Tokenizer, row_tokens: int
) -> PreferenceDocument:
    """Encode a row in any form of `read_preference_row`.

    Args:
        row: columns by name.
        tokenizer: tokenizer of the ids.
        row_tokens: labels per row of a batch.

    Raises:
        DataError: the row is not a preference, its sides have equal ids, or it is longer than a
            row.
    """
    found = read_preference_row(row, tokenizer.vocab_size)
    if isinstance(found, Pivots):
        document = _pivots(found)
    elif isinstance(found, PairIds):
        chosen, rejected = (_answered(found.prompt, x) for x in (found.chosen, found.rejected))
        document = _pair(chosen, rejected, False)
    else:
        document = _pair(*_encoded(found, tokenizer), True)
    if document.num_labels > row_tokens:
        raise DataError(
            f"longer than a row: {document.num_labels} labels, but a row has {row_tokens}; remove "
            f"it, or raise --row-tokens to the recipe's data.sequence_length"
        )
    return document


def _encoded(pair: PreferencePair, tokenizer: Tokenizer) -> tuple[ChatTokens, ChatTokens]:
    chosen, rejected = (encode_chat(side, tokenizer) for side in pair.conversations())
    return chosen, rejected


def _answered(prompt: tuple[int, ...], answer: tuple[int, ...]) -> ChatTokens:
    return ChatTokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def _pair(chosen: ChatTokens, rejected: ChatTokens, uses_chat_format: bool) -> PreferenceDocument:
    if chosen.ids == rejected.ids:
        raise DataError("chosen and rejected have equal token ids; remove the row")
    sequences = tuple(np.array(side.ids, dtype=np.int32) for side in (chosen, rejected))
    return PreferenceDocument(
        kind="pairs",
        sequences=sequences,
        loss_mask=np.array(chosen.loss_mask + rejected.loss_mask, dtype=np.uint8),
        # The first token of a sequence is not a label.
        num_labels=sum(ids.size - 1 for ids in sequences),
        uses_chat_format=uses_chat_format,
    )


def _pivots(found: Pivots) -> PreferenceDocument:
    columns = (found.ids, found.positions, found.chosen, found.rejected)
    return PreferenceDocument(
        kind="pivots",
        sequences=tuple(np.array(column, dtype=np.int32) for column in columns),
        loss_mask=None,
        # A pivot may follow the last token, so that each position may have a label.
        num_labels=len(found.ids),
        uses_chat_format=False,
    )
