"""Tiny runs of all stages, each from the one before it, by `phi4 train` inside a rank."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from phi4.config import dump_toml
from phi4.data.files.token_writer import TokenFileWriter
from tests.data.preferences import drawn_pairs
from tests.support.byte_source import write_byte_tokenizer
from tests.support.engines import tiny_recipe
from tests.support.in_process import phi4
from tests.support.preference_runs import write_pairs

COMMON = (
    *("tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken", "model.vocab_size=512"),
    *("model.num_layers=2", "run.steps=2", "batch.global_batch_size=4", "checkpoint.every=1"),
)
STAGES = {
    "pretrain": ("data.sources=[{name='web',path='web'}]", "data.held_out=[{name='h',path='h'}]"),
    "midtrain": (
        *("run.init_from=runs/pretrain", "data.continue_from=runs/pretrain"),
        "data.sources=[{name='web',path='web',weight=2},{name='long',path='long',weight=1}]",
    ),
    "sft": (
        "run.init_from=runs/midtrain/checkpoints/step_0000002",
        "data.sources=[{name='chats',path='chats',kind='conversations'}]",
    ),
    "dpo": (
        *("run.init_from=runs/sft", "data.reference_cache=cache"),
        "data.sources=[{name='pairs',path='pairs',kind='pairs'}]",
    ),
}


def write_chain(root: Path) -> None:
    """Data and recipes, `pretrain.toml` and so on; the runs will be in `root/runs`."""
    facts = write_byte_tokenizer(root)
    ids = np.append(np.arange(1999) % 250, facts.eod_id).astype(np.int32)
    for name, first in (("web", 0), ("long", 1), ("h", 2)):
        with TokenFileWriter(root / name, facts) as writer:
            writer.add(np.roll(ids, -first))
    with TokenFileWriter(root / "chats", facts) as writer:
        for start in range(40):
            chat = np.append((start + np.arange(15)) % 250, facts.eod_id).astype(np.int32)
            writer.add(chat, (np.arange(16) > 7).astype(np.uint8))
    write_pairs(root, "pairs", drawn_pairs(10))
    for stage, overrides in STAGES.items():
        recipe = tiny_recipe(*COMMON, f"run.stage={stage}", f"run.dir=runs/{stage}", *overrides)
        (root / f"{stage}.toml").write_text(dump_toml(recipe))


def train_chain(rank: int, world_size: int, root: Path, slurm: Mapping[str, str]) -> list[str]:
    """Train all stages in one rank; gives what was printed of each.

    Args:
        rank: of one.
        world_size: one.
        root: with the files of `write_chain`.
        slurm: variables to set.
    """
    os.environ.update(slurm)
    commands = [["train", f"{stage}.toml"] for stage in STAGES]
    commands.insert(-1, ["dpo", "cache-ref", "dpo.toml"])
    printed = []
    for words in commands:
        code, text = phi4(rank, world_size, root, words)
        assert code == 0, text
        printed.append(text)
    return printed
