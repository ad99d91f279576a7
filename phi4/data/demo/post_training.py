"""The demo's conversations, preferences and pivots: JSON Lines, and their token files."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from phi4.data.demo.answers import conversation_rows, pivot_rows, preference_rows
from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.inputs import find_inputs
from phi4.data.files.manifest import ShardManifest
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.preference.write import write_preferences
from phi4.data.rows.conversations import read_conversation
from phi4.data.vocabulary.chat import chat_template_sha256, encode_chat
from phi4.data.vocabulary.tokenizer import Tokenizer

ROW_TOKENS = 256
"""Row length of the tiny recipes; longer preferences are listed in `PREFIX.rejected.jsonl`."""
_MOST_ROWS = 400
"""Number of preferences and of trajectories: the reference model needs a forward pass of each."""


def write_post_training(
    out: Path, exercises: Mapping[str, Sequence[str]], tokenizer: Tokenizer
) -> dict[str, ShardManifest]:
    """Write `chats`, `preferences` and `pivots`, rows and token files.

    Args:
        out: directory.
        exercises: exercises by the suffix of the names: "" for training, "_held_out".
        tokenizer: tokenizer of the ids.

    Returns:
        Manifests by the name of the token file.
    """
    manifests = {}
    for side, texts in exercises.items():
        chats = list(conversation_rows(texts))
        _write_rows(out / f"chats{side}.jsonl", chats)
        manifests[f"chats{side}"] = _write_chats(chats, out / f"chats{side}", tokenizer)
        rows = {"preferences": preference_rows(texts), "pivots": pivot_rows(texts, tokenizer)}
        for name, found in rows.items():
            path = out / f"{name}{side}.jsonl"
            _write_rows(path, islice(found, _MOST_ROWS))
            written = write_preferences(
                find_inputs([path]),
                path.with_suffix(""),
                tokenizer,
                row_tokens=ROW_TOKENS,
                max_rejected=len(texts) * 10,
                overwrite=True,
            )
            manifests[path.stem] = written.manifest
    return manifests


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def _write_chats(
    rows: Sequence[dict[str, Any]], prefix: Path, tokenizer: Tokenizer
) -> ShardManifest:
    template = chat_template_sha256()
    with TokenFileWriter(prefix, tokenizer.facts, chat_template_sha256=template) as writer:
        for row in rows:
            tokens = encode_chat(read_conversation(row), tokenizer)
            ids, mask = [*tokens.ids, tokenizer.eod_id], [*tokens.loss_mask, False]
            writer.add(np.array(ids), np.array(mask))
    return writer.manifest
