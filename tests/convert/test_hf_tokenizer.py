"""tokenizer.json against tiktoken, and tokenizer_config.json against the released file."""

import hashlib
import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi4.convert.hf_tokenizer import (
    CHAT_TEMPLATE,
    PROBE,
    fast_tokenizer,
    merges_from_ranks,
    read_tokenizer,
    tokenizer_config,
    write_tokenizer,
)
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import TokenizerError

# The released file's bytes: 96 added tokens with all flags, names of bos, eos and pad, template.
RELEASED_CONFIG_SHA256 = "2b707658c7c2b41580155a45503d7d3b42dc2f530bef678f67a39bf5d10b0510"

SINGLES = " \n\t\0\u00a0\u3000\u0085\u0301٣½ß🙂ﬁſ"
CODE = ["\r\n", "  ", " def", "return", "_x_", "();", "//", "123"]
WORDS = ["'s", "'LL", "'ſ", "été", "你好", "👩\u200d👧"]
PIECES = st.sampled_from([*SINGLES, *CODE, *WORDS])
TEXTS = st.lists(PIECES | st.text(st.characters(max_codepoint=0x7F), max_size=6), max_size=25).map(
    "".join
)


@pytest.fixture(scope="module")
def fast(tokenizer):
    return fast_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def phi4_fast(phi4_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("phi4")
    write_tokenizer(directory, phi4_tokenizer, 16_384)
    return directory, tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@given(text=TEXTS)
@example(text=PROBE)
@example(text="\n  ")
def test_small_vocabulary_gives_tiktokens_ids(fast, tokenizer, text):
    ids = tokenizer.encode(text)

    assert fast.encode(text).ids == ids
    assert fast.decode(ids) == text


@settings(deadline=None)
@given(text=TEXTS)
@example(text=PROBE)
@example(text="\n  ")
def test_phi4_vocabulary_gives_tiktokens_ids(phi4_fast, phi4_tokenizer, text):
    assert phi4_fast[1].encode(text).ids == phi4_tokenizer.encode(text)


def test_phi4_vocabulary_gives_tiktokens_ids_on_every_token(phi4_fast, phi4_tokenizer):
    """Each of the 100,256 tokens as a text of its own."""
    texts = [token.decode("utf-8", "replace") for token in phi4_tokenizer.mergeable_ranks]
    found = phi4_fast[1].encode_batch(texts)

    assert [one.ids for one in found] == [phi4_tokenizer.encode(text) for text in texts]


def test_phi4_added_tokens_have_the_released_ids(phi4_fast):
    """.NET's published vector has 4435, " World": it does not strip beside added tokens."""
    text = "<|im_start|>Hello<|im_sep|> World<|im_end|><|dummy_85|>"

    assert phi4_fast[1].encode(" World").ids == [4435]
    assert phi4_fast[1].encode(text).ids == [100_264, 9906, 100_266, 10_343, 100_265, 100_349]


def test_phi4_tokenizer_config_is_the_released_file(phi4_fast):
    content = (phi4_fast[0] / "tokenizer_config.json").read_bytes()

    assert hashlib.sha256(content).hexdigest() == RELEASED_CONFIG_SHA256


def test_chat_template_stands_in_both_places(phi4_fast):
    config = json.loads((phi4_fast[0] / "tokenizer_config.json").read_text())

    assert (phi4_fast[0] / "chat_template.jinja").read_text() == config["chat_template"]
    assert len(CHAT_TEMPLATE) == 462


def test_tokenizer_config_names_its_own_ids(tokenizer):
    config = tokenizer_config(tokenizer, 64)
    added = {int(i): token["content"] for i, token in config["added_tokens_decoder"].items()}

    assert added == {i: token for token, i in tokenizer.special_tokens.items()}
    assert (config["bos_token"], config["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert config["pad_token"] not in (config["bos_token"], config["eos_token"])


def test_merges_are_two_tokens_of_lower_rank(tokenizer):
    ranks = tokenizer.mergeable_ranks
    merges = merges_from_ranks(ranks)

    assert [ranks[left + right] for left, right in merges] == list(range(256, len(ranks)))
    assert all(max(ranks[a], ranks[b]) < ranks[a + b] for a, b in merges)


def test_ranks_that_no_merging_made_are_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}

    with pytest.raises(TokenizerError, match="b'abc' of rank 256 splits into 3 parts"):
        merges_from_ranks(ranks)


def test_export_is_refused_when_the_ids_would_differ(tmp_path, tokenizer):
    class Foreign(Tokenizer):
        def encode(self, text):
            return [0, *super().encode(text)]

    with pytest.raises(TokenizerError, match="from token 0 of the probe text, expected"):
        write_tokenizer(tmp_path, Foreign(tokenizer.mergeable_ranks), 64)
    assert list(tmp_path.iterdir()) == []


def test_written_tokenizer_is_read_as_the_one_that_was_written(tokenizer, tmp_path):
    write_tokenizer(tmp_path, tokenizer, 64)
    found = read_tokenizer(tmp_path)

    assert found.fingerprint == tokenizer.fingerprint


def test_phi4_tokenizer_is_read_as_the_one_that_was_written(phi4_fast, phi4_tokenizer):
    assert read_tokenizer(phi4_fast[0]).fingerprint == phi4_tokenizer.fingerprint


def _without_digits(raw):
    split = raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace("{1,3}", "{1,2}")


DAMAGES = {
    "no such token": lambda raw: raw["added_tokens"][0].update(content="<|other|>"),
    "expected 937; only": lambda raw: raw["added_tokens"][9].update(id=1034),
    "ids are not 0 to": lambda raw: raw["model"].update(
        vocab={text: i + (i > 600) for text, i in raw["model"]["vocab"].items()}
    ),
    "not written in bytes": lambda raw: raw["model"].update(
        vocab={text.replace("Ġ", "▁"): i for text, i in raw["model"]["vocab"].items()}, merges=[]
    ),
    "not a phi-4 tokenizer": _without_digits,
    "is not a tokenizer (": lambda raw: raw.pop("model"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_foreign_tokenizer_is_refused_in_one_line(tokenizer, tmp_path, message):
    write_tokenizer(tmp_path, tokenizer, 64)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    DAMAGES[message](raw)
    path.write_text(json.dumps(raw), encoding="utf-8")

    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path)
