"""Parse preferences of rows given as token ids: pairs of answers, and pivots of trajectories.

The ids are used unchanged: no end of turn is appended, no text is encoded again. A pivot is a
position of a trajectory with two tokens that may follow it, one of them preferred.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phi4.data.rows.messages import column_names, shown
from phi4.errors import DataError

PAIR_ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
PIVOT_COLUMNS = ("prompt_ids", "chosen_id", "rejected_id", "ids", "pivots")
_PIVOT_KEYS = ("position", "chosen_id", "rejected_id")


@dataclass(frozen=True)
class PairIds:
    """A prompt and two answers to it."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class Pivots:
    """A trajectory, positions in it, and two ids that may follow each.

    Attributes:
        ids: [n], the trajectory.
        positions: [k], ascending; pivot j follows `ids[: positions[j] + 1]`.
        chosen: [k], preferred ids.
        rejected: [k], the others.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def read_pair_ids(row: Mapping[str, object], vocab_size: int) -> PairIds:
    """Parse the pair of a row with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        DataError: a column is missing, empty or not a list of ids.
    """
    prompt, chosen, rejected = (read_ids(row, name, vocab_size) for name in PAIR_ID_COLUMNS)
    return PairIds(prompt, chosen, rejected)


def read_pivots(row: Mapping[str, object], vocab_size: int) -> Pivots:
    """Parse the pivots of a row.

    Args:
        row: `prompt_ids`, `chosen_id` and `rejected_id`: one pivot after the prompt. Or `ids` and
            `pivots`, a list of `{"position", "chosen_id", "rejected_id"}` in any order.
        vocab_size: ids must be below.

    Raises:
        DataError: a column is missing or malformed, there is no pivot, a position is outside the
            trajectory or has two pivots, or the ids of a pivot are equal.
    """
    if "pivots" in row:
        ids = read_ids(row, "ids", vocab_size)
        pivots = row["pivots"]
        if not isinstance(pivots, Sequence) or isinstance(pivots, str) or not pivots:
            raise DataError(f"pivots is {shown(pivots)}; expected a list of at least one")
    else:
        ids = read_ids(row, "prompt_ids", vocab_size)
        pivots = [{"position": len(ids) - 1, **row}]
    found = sorted(_pivot(value, len(ids), vocab_size) for value in pivots)
    positions, chosen, rejected = zip(*found, strict=True)
    twice = next((a for a, b in pairwise(positions) if a == b), None)
    if twice is not None:
        raise DataError(f"two pivots at one position: {twice}; keep one of them")
    return Pivots(ids, positions, chosen, rejected)


def _pivot(value: object, length: int, vocab_size: int) -> tuple[int, int, int]:
    if not isinstance(value, Mapping) or any(type(value.get(k)) is not int for k in _PIVOT_KEYS):
        raise DataError(
            f"a pivot is {shown(value)}; expected integers under {', '.join(_PIVOT_KEYS)}"
        )
    position, chosen, rejected = (value[key] for key in _PIVOT_KEYS)
    if not 0 <= position < length:
        raise DataError(
            f"a pivot is outside its trajectory: position {position} of {length} tokens"
        )
    if chosen == rejected:
        raise DataError(f"a pivot has equal ids: {chosen} twice at position {position}")
    _check_vocabulary((chosen, rejected), "a pivot", vocab_size)
    return position, chosen, rejected


def read_ids(row: Mapping[str, object], column: str, vocab_size: int) -> tuple[int, ...]:
    """Read the token ids of a column.

    Raises:
        DataError: it is missing, empty or not a list of ids.
    """
    if column not in row:
        raise DataError(f"row of token ids lacks `{column}`: it has {column_names(row)}")
    value = row[column]
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise DataError(f"{column} is {shown(value)}; expected a list of token ids")
    if not value:
        raise DataError(f"{column} is empty; remove the row")
    _check_vocabulary(value, column, vocab_size)
    return tuple(value)


def _check_vocabulary(ids: Sequence[int], place: str, vocab_size: int) -> None:
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(item for item in ids if not 0 <= item < vocab_size)
        raise DataError(
            f"{place} holds an id outside the vocabulary: {wrong} of {vocab_size}; encode with the "
            f"tokenizer given by --ranks"
        )
