import json
import resource
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.config import DataConfig, SourceConfig, TokenizerConfig
from phi4.data.files.inputs import find_inputs
from phi4.data.files.manifest import ShardManifest
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import write_documents
from phi4.data.stream.loader import Loader
from phi4.data.tokenize import job as tokenize
from phi4.data.tokenize.job import TokenizeProgress, tokenize_parts
from phi4.data.tokenize.merge import merge_runs
from phi4.data.tokenize.parts import work_directory
from phi4.data.tokenize.plan import make_plan
from phi4.data.vocabulary.chat import chat_template_sha256
from phi4.data.vocabulary.tokenizer import Tokenizer, TokenizerFacts, load_tokenizer
from phi4.errors import DataError

TEXTS = [f"the cat {i} sat on the mat " * (i % 7 + 1) for i in range(60)]
SUFFIXES = ("bin", "idx", "manifest.json")


@pytest.fixture
def tokenizer(config: TokenizerConfig) -> Tokenizer:
    return load_tokenizer(config)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(
    config: TokenizerConfig,
    inputs: Iterable[Path],
    prefix: Path,
    *,
    shards: tuple[tuple[int, int], ...] = ((0, 1),),
    workers: int = 1,
    seed: int | None = 5,
    max_rejected: int = 0,
    range_tokens: int = 1 << 20,
    part_bytes: int = 1500,
) -> ShardManifest:
    facts = load_tokenizer(config).facts
    for shard in shards:
        plan = make_plan(find_inputs(inputs), facts, seed=seed, part_bytes=part_bytes)
        tokenize_parts(
            plan,
            prefix,
            config,
            workers=workers,
            shard=shard,
            max_rejected=max_rejected,
            follow=lambda progress: None,
        )
    return merge_runs(prefix, range_tokens)


def documents(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    pair = TokenFile(prefix)
    ids = [pair.document(i).tolist() for i in range(pair.num_documents)]
    assert all(document[-1] == tokenizer.eod_id for document in ids)
    return [tokenizer.decode(document[:-1]) for document in ids]


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


def test_every_document_once_shuffled_under_the_seed(
    config: TokenizerConfig, tokenizer: Tokenizer, rows: Path, tmp_path: Path
) -> None:
    manifest = run(config, [rows], tmp_path / "p")
    found = documents(tmp_path / "p", tokenizer)
    assert sorted(found) == sorted(TEXTS) and found != TEXTS
    assert manifest == TokenFile(tmp_path / "p").verify()
    assert manifest.num_documents == 60 == sum(manifest.length_histogram)
    other = run(config, [rows], tmp_path / "q", seed=6)
    assert other.bin_sha256 != manifest.bin_sha256 and other.num_tokens == manifest.num_tokens
    run(config, [rows], tmp_path / "r", seed=None)
    assert documents(tmp_path / "r", tokenizer) == TEXTS
    assert not list(tmp_path.glob("*.work"))


def test_shuffle_moves_documents_over_the_whole_file(
    config: TokenizerConfig, tokenizer: Tokenizer, rows: Path, tmp_path: Path
) -> None:
    run(config, [rows], tmp_path / "p")
    places = [TEXTS.index(text) for text in documents(tmp_path / "p", tokenizer)]
    # A uniform order moves a document by a third of the file on average.
    moved = np.abs(np.array(places) - np.arange(60)).mean()
    assert 14 < moved < 26


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"shards": ((2, 3), (0, 3), (1, 3))},
        {"range_tokens": 50},
        {"range_tokens": 1},
    ],
)
def test_bytes_do_not_depend_on_who_did_the_work(
    config: TokenizerConfig, rows: Path, tmp_path: Path, options: dict
) -> None:
    run(config, [rows], tmp_path / "one")
    run(config, [rows], tmp_path / "other", **options)
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_bytes_do_not_depend_on_the_length_of_runs(
    config: TokenizerConfig, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, [rows], tmp_path / "one")
    monkeypatch.setattr(tokenize, "RUN_TOKENS", 40)
    run(config, [rows], tmp_path / "other")
    assert content(tmp_path / "one") == content(tmp_path / "other")


@settings(max_examples=8)
@given(kills=st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_killed_job_goes_on_without_loss_or_repeat(
    config: TokenizerConfig, rows: Path, tmp_path_factory, kills: list[int]
) -> None:
    """Killed while writing: at any file of any part."""
    directory = tmp_path_factory.mktemp("kill")
    run(config, [rows], directory / "one", part_bytes=2000)
    original = tokenize.write_atomically
    for kill in kills:
        written = []

        def killed(path: Path, content: bytes, written=written, kill=kill, **options) -> None:
            written.append(path)
            if len(written) > kill:
                raise KeyboardInterrupt
            original(path, content, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tokenize, "write_atomically", killed)
            run(config, [rows], directory / "other", part_bytes=2000)
            raise KeyboardInterrupt  # it had less left to write
    run(config, [rows], directory / "other", part_bytes=2000)
    assert content(directory / "one") == content(directory / "other")


def test_finished_parts_are_not_read_again(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    seen: list[TokenizeProgress] = []
    plan = make_plan(find_inputs([rows]), load_tokenizer(config).facts, part_bytes=500)
    options = {"workers": 1, "max_rejected": 0, "follow": seen.append}
    tokenize_parts(plan, tmp_path / "p", config, shard=(1, 2), **options)
    first = len(seen)
    tokenize_parts(plan, tmp_path / "p", config, **options)
    assert 0 < first < len(seen) == len(plan.parts)
    assert seen[-1].done_bytes == seen[-1].total_bytes and seen[-1].remaining_seconds == 0
    assert seen[-1].new_bytes < seen[-1].total_bytes


def test_every_part_is_told_once_whoever_does_it(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    """Of six parts, one is finished elsewhere, one still runs there, four wait."""
    plan = make_plan(
        find_inputs([rows]), load_tokenizer(config).facts, part_bytes=rows.stat().st_size // 6 + 1
    )
    job = tokenize._Job(tmp_path, "text", 5, config)
    futures = [Future() for _ in plan.parts]
    futures[0].set_result("elsewhere")
    futures[1].set_running_or_notify_cancel()
    told = []
    for index, report in tokenize._shared(plan, job, deque(enumerate(futures))):
        told.append(index)
        if len(told) == 3:
            futures[1].set_result("elsewhere")
        assert (report == "elsewhere") == (index < 2)
    assert told == [0, 5, 4, 1, 3, 2]


def test_bad_rows_are_listed_with_their_line_in_the_file(
    config: TokenizerConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines[7], lines[50], lines[51] = b'{"text": "\xff"}', b"", b"{"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    manifest = run(config, [path, tmp_path / "bad.txt"], tmp_path / "p", max_rejected=3)
    rejected = Path(f"{tmp_path}/p.rejected.jsonl").read_text().splitlines()
    found = [(Path(r["input"]).name, r["line"]) for r in map(json.loads, rejected)]
    assert found == [("rows.jsonl", 8), ("rows.jsonl", 51), ("rows.jsonl", 52), ("bad.txt", 0)]
    assert manifest.num_rejected == 4 and manifest.num_documents == 57
    kept = [text for i, text in enumerate(TEXTS) if i not in (7, 50, 51)]
    assert Counter(documents(tmp_path / "p", tokenizer)) == Counter(kept)


def test_text_that_the_tokenizer_cannot_split_is_a_bad_row(
    config: TokenizerConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    endless = {"text": " " * 2_000_000 + "z"}
    turns = [{"role": "assistant", "content": endless["text"]}]
    lines = [{"text": "the cat"}, endless, {"messages": turns}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = run(config, [path], tmp_path / "p", max_rejected=2, part_bytes=10**8)
    assert manifest.num_rejected == 2
    assert documents(tmp_path / "p", tokenizer) == ["the cat"]
    rejected = Path(f"{tmp_path}/p.rejected.jsonl").read_text()
    assert rejected.count("the text cannot be split into tokens") == 2


def test_too_many_bad_rows_stop_the_job_and_are_shown(
    config: TokenizerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + "{\n" * 3 + "\n" * 5)
    with pytest.raises(
        DataError, match=r"3 rows are bad, at most 2 are allowed; see .*p\.rejected"
    ):
        run(config, [path], tmp_path / "p", max_rejected=2)
    assert len(Path(f"{tmp_path}/p.rejected.jsonl").read_text().splitlines()) == 8
    with pytest.raises(DataError, match="3 rows are bad"):
        run(config, [path], tmp_path / "p", max_rejected=2)
    assert run(config, [path], tmp_path / "p", max_rejected=3).num_documents == 1


def test_list_of_bad_rows_goes_when_none_is_left(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    stale = tmp_path / "p.rejected.jsonl"
    stale.write_text("{}\n")
    run(config, [rows], tmp_path / "p")
    assert not stale.exists()


def test_conversations_become_records_with_a_loss_mask(
    config: TokenizerConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"text": "the mat"}))
    manifest = run(config, [path], tmp_path / "p", seed=None)
    pair = TokenFile(tmp_path / "p")
    assert manifest == pair.verify() and manifest.mask_sha256
    assert manifest.chat_template_sha256 == chat_template_sha256()
    chat, text = (pair.document(i) for i in range(2))
    covered = pair.loss_mask[: chat.size].astype(bool)
    assert tokenizer.decode(chat[covered]) == "sat<|im_end|>"
    assert chat[-1] == tokenizer.eod_id and chat.max() < tokenizer.vocab_size
    assert pair.loss_mask[chat.size :].all() and tokenizer.decode(text[:-1]) == "the mat"
    source = SourceConfig(name="chat", path=f"{tmp_path}/p", kind="windows")
    data = DataConfig(sequence_length=64, unit_tokens=64, sources=(source,))
    (batch,) = Loader(data, tokenizer.facts, 1).next_step(
        global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    served = batch.labels[batch.loss_mask > 0].tolist()
    assert sorted(served) == sorted([*chat[covered].tolist(), *text[1:].tolist()])
    # Without masked records the pair has no mask.
    assert run(config, [self_text(tmp_path)], tmp_path / "p").chat_template_sha256 is None
    assert not Path(f"{tmp_path}/p.mask").exists()


def self_text(tmp_path: Path) -> Path:
    (tmp_path / "x.txt").write_text("the cat")
    return tmp_path / "x.txt"


def test_another_plan_under_the_same_prefix_is_refused(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    options = {"workers": 1, "max_rejected": 0, "follow": lambda progress: None}
    facts = load_tokenizer(config).facts
    plan = make_plan(find_inputs([rows]), facts, part_bytes=500)
    tokenize_parts(plan, tmp_path / "p", config, shard=(0, 2), **options)
    with pytest.raises(DataError, match=r"part 1; run the missing shards again"):
        merge_runs(tmp_path / "p")
    other = make_plan(find_inputs([rows]), facts, seed=9, part_bytes=500)
    with pytest.raises(DataError, match=r"created with another order \(--seed 0, now --seed 9\)"):
        tokenize_parts(other, tmp_path / "p", config, **options)
    rows.write_text(rows.read_text() + "\n")
    grown = make_plan(find_inputs([rows]), facts, part_bytes=500)
    with pytest.raises(DataError, match=r"other inputs: .*rows.jsonl had \d+ bytes, now"):
        tokenize_parts(grown, tmp_path / "p", config, **options)


def test_merge_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="begin with `phi4 data tokenize`"):
        merge_runs(tmp_path / "p")


def test_merge_holds_no_run_open(config: TokenizerConfig, rows: Path, tmp_path: Path) -> None:
    plan = make_plan(find_inputs([rows]), load_tokenizer(config).facts, part_bytes=300)
    options = {"workers": 1, "max_rejected": 0, "follow": lambda progress: None}
    tokenize_parts(plan, tmp_path / "p", config, **options)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 8, limits[1]))
    try:
        manifest = merge_runs(tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(plan.parts) > 20 and manifest.num_documents == len(TEXTS)


def test_many_small_files_fill_parts_and_few_inputs_make_many(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x" * 40)
    (tmp_path / "5.jsonl").write_bytes(b"\n" * (9 << 20))
    facts = TokenizerFacts(vocab_size=1, eod_id=0, pad_id=0, fingerprint="")
    inputs = find_inputs([tmp_path])
    small = make_plan(inputs, facts, part_bytes=100).parts
    assert [len(part.files) for part in small[:2]] == [3, 2]
    assert [part.num_bytes for part in make_plan(inputs, facts).parts] == [200] + [3 << 20] * 3


def test_truncated_run_is_refused(config: TokenizerConfig, rows: Path, tmp_path: Path) -> None:
    plan = make_plan(find_inputs([rows]), load_tokenizer(config).facts)
    options = {"workers": 1, "max_rejected": 0, "follow": lambda progress: None}
    tokenize_parts(plan, tmp_path / "p", config, **options)
    (run_file,) = work_directory(tmp_path / "p").glob("*.tokens")
    run_file.write_bytes(run_file.read_bytes()[:400])
    with pytest.raises(DataError, match=r"\.tokens holds 100 tokens, but its keys describe"):
        merge_runs(tmp_path / "p")
    assert not Path(f"{tmp_path}/p.bin").exists()


def test_nothing_to_write_leaves_no_file(config: TokenizerConfig, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="the inputs contain no text"):
        run(config, [tmp_path / "in"], tmp_path / "out" / "p")
    assert not list((tmp_path / "out").iterdir())
    assert not work_directory(tmp_path / "out" / "p").exists()


def test_written_texts_are_closed_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["the cat <|endoftext|>", "sat"]
    manifest = write_documents(texts, tokenizer, tmp_path / "p")
    assert manifest == TokenFile(tmp_path / "p").require_tokenizer(tokenizer.facts)
    assert documents(tmp_path / "p", tokenizer) == texts
    pair = TokenFile(tmp_path / "p")
    assert np.count_nonzero(pair.tokens == tokenizer.eod_id) == 2
