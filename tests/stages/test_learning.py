"""SFT and DPO learn what the demo's data hold, on documents that they never saw.

A model is pretrained on the demo's code, tuned on its conversations, and then on its preferences.
The recipes are the tiny ones, with fewer layers and on one process.
"""

from pathlib import Path

import numpy as np
import pytest

from phi4.config import Recipe, load_recipe
from phi4.data.demo.corpora import phi4_corpus
from phi4.data.demo.post_training import ROW_TOKENS, write_post_training
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import write_documents
from phi4.data.stream.batch import Batch, build_batch
from phi4.data.stream.references import open_references
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import Tokenizer, rank_file_bytes
from phi4.engine.checkpoint import open_checkpoint
from phi4.rundir.checkpoints import find_checkpoint
from tests.support import preference_runs
from tests.support.ranks import RankPool, pool_fixture

RECIPES = Path(__file__).parents[2] / "examples/recipes"
DATA, RUNS = Path("runs/demo/data"), Path("runs/demo")
VOCABULARY = 512
ONE_PROCESS = (
    *("parallel.tensor=1", "parallel.pipeline=1", "parallel.context=1", "parallel.sequence=false"),
    *(f"model.vocab_size={VOCABULARY}", "model.num_layers=2", "tracking.mlflow=false"),
    *("checkpoint.every=0", "evaluation.every=0"),
)
HELD_OUT_EVERY = 8
"""One exercise of so many is held out, besides those that the demo holds out."""


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"tiny_{name}.toml", [*ONE_PROCESS, *overrides])


PRETRAINING = recipe_of(
    "pretrain",
    "data.sources=[{name='code', path='runs/demo/data/code'}]",
    "data.held_out=[]",
    "run.steps=60",
)
TUNING = recipe_of("sft")
PREFERRING = recipe_of("dpo")


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data with a small vocabulary."""
    directory = tmp_path_factory.mktemp("learning")
    out = directory / DATA
    out.mkdir(parents=True)
    corpus = phi4_corpus(max_code_bytes=1_000_000)
    exercises = corpus["synthetic"]
    tokenizer = Tokenizer(train_bpe(exercises, VOCABULARY))
    (out / "bpe.tiktoken").write_bytes(rank_file_bytes(tokenizer.mergeable_ranks))
    write_documents(corpus["code"], tokenizer, out / "code")
    held_out = exercises[::HELD_OUT_EVERY]
    training = [text for text in exercises if text not in held_out]
    write_post_training(
        out, {"": training, "_held_out": held_out + corpus["synthetic_held_out"]}, tokenizer
    )
    return directory


@pytest.fixture(scope="module")
def tuned(root: Path, pool: RankPool) -> Path:
    """The directory with the runs up to SFT."""
    for recipe in (PRETRAINING, TUNING):
        assert pool.run(preference_runs.run_of, root, recipe) == [""]
    return root


@pytest.mark.slow
def test_sft_lowers_the_loss_on_what_an_assistant_says(tuned: Path, pool: RankPool) -> None:
    before, after = (
        pool.run(losses_of_answers, tuned, TUNING, recipe.run.dir)[0]
        for recipe in (PRETRAINING, TUNING)
    )
    gains = before - after
    interval = 1.96 * gains.std(ddof=1) / np.sqrt(gains.size)
    assert gains.size > 50
    assert gains.mean() > interval


@pytest.mark.slow
def test_dpo_finds_the_preference_that_was_planted(tuned: Path, pool: RankPool) -> None:
    """With the reference's log-probabilities of held-out pairs, and the trained model's."""
    assert pool.run(preference_runs.cache_for, tuned, PREFERRING) == [""]
    assert pool.run(preference_runs.run_of, tuned, PREFERRING) == [""]
    overrides = (f"dpo.reference={PREFERRING.run.dir}", f"data.reference_cache={RUNS}/after")
    trained = recipe_of("dpo", *overrides)
    assert pool.run(preference_runs.cache_for, tuned, trained) == [""]
    reference_P2, trained_P2 = (
        open_references(tuned / recipe.data.reference_cache).log_probs("preferences_held_out")
        for recipe in (PREFERRING, trained)
    )
    chosen_P, rejected_P = (trained_P2 - reference_P2).T
    assert chosen_P.size > 20
    assert np.mean(chosen_P > rejected_P) >= 0.8


# What follows runs in the ranks.


def losses_of_answers(
    rank: int, world_size: int, root: Path, recipe: Recipe, run_dir: str
) -> np.ndarray:
    """Mean loss over the assistant's tokens of each held-out conversation, [documents]."""
    with preference_runs.joined(rank, world_size, root, recipe) as platform:
        batch = whole_conversations(DATA / "chats_held_out")
        engine = open_checkpoint(recipe, find_checkpoint(Path(run_dir)), platform)
        [found] = engine.log_probs([batch])
        engine.close()
    return -(found.labels * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)


def whole_conversations(prefix: Path) -> Batch:
    """Those that fit into a row, one per row."""
    file = TokenFile(prefix)
    fitting = np.flatnonzero(file.document_lengths() <= ROW_TOKENS)
    ids_BS = np.zeros((fitting.size, ROW_TOKENS + 1), np.int64)
    mask_BS = np.zeros((fitting.size, ROW_TOKENS + 1), np.float32)
    for row, index in enumerate(fitting):
        document = file.document(index)
        ids_BS[row, : document.size] = document
        mask_BS[row, : document.size] = file.document_mask(index)
    return build_batch(ids_BS[:, :-1], ids_BS[:, 1:], mask_BS[:, 1:], eod_id=int(document[-1]))
