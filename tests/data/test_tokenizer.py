import hashlib
import shutil
from pathlib import Path

import pytest
from tiktoken_ext import openai_public

from phi4.config import TokenizerConfig
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import Tokenizer, load_tokenizer, rank_file_bytes
from phi4.errors import DataError, TokenizerError

TEXTS = ["def add(a, b):\n    return a + b\n", "Grüße aus 北京, 1234567 times.\r\n\n  x"] * 40


@pytest.fixture(scope="module")
def phi4_tokenizer(cl100k_file: Path) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(path=str(cl100k_file)))


@pytest.fixture
def small_ranks(tmp_path: Path) -> Path:
    path = tmp_path / "bpe.tiktoken"
    path.write_bytes(rank_file_bytes(train_bpe(TEXTS, 380)))
    return path


def small_config(path: Path, **changes: str) -> TokenizerConfig:
    return TokenizerConfig(kind="bpe", path=str(path), **changes)


# Ids that OpenAI's cookbook and Microsoft's .NET tokenizer tests publish.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("tiktoken is great!", [83, 1609, 5963, 374, 2294, 0]),
        ("antidisestablishmentarianism", [519, 85342, 34500, 479, 8997, 2191]),
        ("2 + 2 = 4", [17, 489, 220, 17, 284, 220, 19]),
        ("お誕生日おめでとう", [33334, 45918, 243, 21990, 9080, 33334, 62004, 16556, 78699]),
        ("system", [9125]),
        ("user", [882]),
        ("assistant", [78191]),
    ],
)
def test_phi4_ids_of_known_texts(phi4_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert phi4_tokenizer.encode(text) == ids
    assert phi4_tokenizer.decode(ids) == text


def test_phi4_special_ids(phi4_tokenizer: Tokenizer) -> None:
    t = phi4_tokenizer
    assert t.vocab_size == 100_352
    assert (t.eod_id, t.im_start_id, t.im_end_id, t.im_sep_id) == (100257, 100264, 100265, 100266)
    assert t.pad_id == 100_349
    assert sorted(t.special_tokens.values()) == list(range(100_256, 100_352))
    expected = {
        "<|dummy_0|>": 100256,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|dummy_1|>": 100261,
        "<|dummy_3|>": 100263,
        "<|dummy_4|>": 100267,
        "<|dummy_12|>": 100275,
        "<|endofprompt|>": 100276,
        "<|dummy_13|>": 100277,
        "<|dummy_85|>": 100349,
        "<|dummy_87|>": 100351,
    }
    assert {name: t.special_tokens[name] for name in expected} == expected


def test_phi4_chat_vector_in_id_space(phi4_tokenizer: Tokenizer) -> None:
    t = phi4_tokenizer
    ids = [t.im_start_id, *t.encode("Hello"), t.im_sep_id, *t.encode(" World")]
    ids += [t.im_end_id, t.special_tokens["<|dummy_85|>"]]
    assert ids == [100264, 9906, 100266, 4435, 100265, 100349]
    assert t.decode(ids) == "<|im_start|>Hello<|im_sep|> World<|im_end|><|dummy_85|>"


def test_special_text_in_a_document_is_plain_text(small_ranks: Path) -> None:
    t = load_tokenizer(small_config(small_ranks))
    text = "a <|endoftext|><|im_end|> b"
    ids = t.encode(text)
    assert not set(ids) & set(t.special_tokens.values())
    assert t.decode(ids) == text


def test_phi4_ranks_come_from_the_cache_directory(
    cl100k_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phi4_tokenizer: Tokenizer
) -> None:
    shutil.copy(cl100k_file, tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_tokenizer(TokenizerConfig()).fingerprint == phi4_tokenizer.fingerprint


def test_phi4_ranks_that_tiktoken_supplies_are_checked(
    cl100k_file: Path, monkeypatch: pytest.MonkeyPatch, phi4_tokenizer: Tokenizer
) -> None:
    ranks = dict(phi4_tokenizer.mergeable_ranks)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(openai_public, "cl100k_base", lambda: {"mergeable_ranks": ranks})
    assert load_tokenizer(TokenizerConfig()).fingerprint == phi4_tokenizer.fingerprint
    ranks[b" the"], ranks[b" of"] = ranks[b" of"], ranks[b" the"]
    with pytest.raises(TokenizerError, match="sha256"):
        load_tokenizer(TokenizerConfig())


def test_failed_download_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable() -> None:
        raise ConnectionError("no route")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(openai_public, "cl100k_base", unreachable)
    with pytest.raises(TokenizerError, match="set TIKTOKEN_CACHE_DIR"):
        load_tokenizer(TokenizerConfig())


def test_phi4_ranks_with_a_flipped_byte_are_refused_and_kept(
    cl100k_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(cl100k_file.read_bytes())
    content[1000] ^= 1
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"sha256 is .* expected 223921b7"):
        load_tokenizer(TokenizerConfig(path=str(path)))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(TokenizerError, match=r"sha256 is .* expected 223921b7"):
        load_tokenizer(TokenizerConfig())
    assert path.read_bytes() == content


def test_bpe_has_exactly_the_size_asked_and_round_trips(small_ranks: Path) -> None:
    t = load_tokenizer(small_config(small_ranks))
    assert t.vocab_size == 380
    assert sorted(t.special_tokens.values()) == list(range(380 - 96, 380))
    assert t.pad_id != t.eod_id
    for text in [*TEXTS[:2], "never seen: ∮ \x00 \t"]:
        assert t.decode(t.encode(text)) == text
    assert len(t.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_bpe_training_is_deterministic() -> None:
    first, second = (rank_file_bytes(train_bpe(iter(TEXTS), 380)) for _ in range(2))
    assert first == second


def test_fingerprint_tells_vocabularies_apart(small_ranks: Path) -> None:
    one = load_tokenizer(small_config(small_ranks))
    assert load_tokenizer(small_config(small_ranks)).fingerprint == one.fingerprint
    assert Tokenizer(train_bpe(TEXTS, 381)).fingerprint != one.fingerprint


def test_bpe_hash_is_checked_when_the_recipe_states_it(small_ranks: Path) -> None:
    right = hashlib.sha256(small_ranks.read_bytes()).hexdigest()
    load_tokenizer(small_config(small_ranks, sha256=right))
    with pytest.raises(TokenizerError, match=f"sha256 is {right}, expected {'0' * 64}"):
        load_tokenizer(small_config(small_ranks, sha256="0" * 64))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:5], b"not a rank", *lines[6:]], "line 6: expected base64"),
        (lambda lines: lines[:-2] + lines[-1:], "without gap"),
        (lambda lines: lines[1:], "without gap"),
        (lambda lines: [b"YWI= 0", *lines[1:]], "1 of the 256 single bytes"),
    ],
)
def test_damaged_rank_file_is_one_clear_line(small_ranks: Path, damage, message: str) -> None:
    small_ranks.write_bytes(b"\n".join(damage(small_ranks.read_bytes().splitlines())))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(small_config(small_ranks))
    assert "\n" not in str(caught.value)


def test_bpe_without_a_path_says_how_to_get_one() -> None:
    with pytest.raises(TokenizerError, match="phi4 data demo"):
        load_tokenizer(TokenizerConfig(kind="bpe"))


def test_missing_rank_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="No such file"):
        load_tokenizer(small_config(tmp_path / "none"))


def test_decoding_an_id_beyond_the_vocabulary(small_ranks: Path) -> None:
    t = load_tokenizer(small_config(small_ranks))
    for wrong in (380, -1):
        with pytest.raises(TokenizerError, match=f"token id {wrong}; .* 0 to 379"):
            t.decode([5, wrong])


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [(TEXTS, 351, "at least 352"), (["ab ab"], 400, "merges for 354")],
)
def test_vocabulary_that_cannot_be_trained(texts, vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_bpe(texts, vocab_size)
