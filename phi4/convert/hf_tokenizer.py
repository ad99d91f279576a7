"""Convert tiktoken ranks to Hugging Face's tokenizer files, and `tokenizer.json` to ranks.

tiktoken stores ranks, Hugging Face stores merge pairs. The pair of a token is the result of
applying all merges of lower rank to it; in a vocabulary made by byte-pair encoding this always
leaves two parts, and applying these merges in rank order gives tiktoken's ids. Each export verifies
this on a probe text before anything is written.

tokenizer_class is the literal GPT2Tokenizer: version 4 of transformers rejects version 5's generic
name, and llama.cpp looks for it. With a phi3 config.json both versions load tokenizer.json
unchanged.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from phi4.data.vocabulary.tokenizer import SPLIT_PATTERN, Tokenizer, tokenizer_of_ranks
from phi4.errors import TokenizerError

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

PROBE = (
    "The year 2024's 12345678 words, they'LL we're I'm DON'T.\n\n\n  def f(x):\n\t\treturn x**2 "
    "  # noqa\r\n\r\n" + " " * 17 + "end;}}\n   \n été naïve Straße 你好，世界 こんにちは "
    "привет مرحبا हिन्दी 🙂🇩🇪👩‍👩‍👧 e\u0301 a\u00a0b\u2003c\u3000 _x_ $%^&*() <html> 3.14e-10 \n \t "
)

_FLAGS = {
    "lstrip": True,
    "normalized": False,
    "rstrip": True,
    "single_word": False,
    "special": True,
}


def write_tokenizer(directory: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Write the three tokenizer files.

    Args:
        directory: existing.
        tokenizer: tokenizer used in training.
        max_tokens: longest sequence that the model declares.

    Raises:
        TokenizerError: the ranks are not a byte-pair vocabulary, or the probe text is encoded
            differently.
    """
    fast = fast_tokenizer(tokenizer)
    _probe(fast, tokenizer, "try another version of the tokenizers package")
    fast.save(str(directory / "tokenizer.json"), pretty=True)
    config = tokenizer_config(tokenizer, max_tokens)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return the tokenizer as an object of Hugging Face's `tokenizers`.

    Raises:
        TokenizerError: the ranks are not a byte-pair vocabulary.
    """
    ranks = tokenizer.mergeable_ranks
    vocabulary = {_text(token): rank for token, rank in ranks.items()}
    merges = [(_text(left), _text(right)) for left, right in merges_from_ranks(ranks)]
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    added = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    fast.add_special_tokens([AddedToken(token, **_FLAGS) for token in added])
    assert all(fast.token_to_id(t) == i for t, i in tokenizer.special_tokens.items())
    return fast


def tokenizer_config(tokenizer: Tokenizer, max_tokens: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    names = {token_id: token for token, token_id in tokenizer.special_tokens.items()}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {"content": names[token_id], **_FLAGS} for token_id in sorted(names)
        },
        "bos_token": names[tokenizer.eod_id],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": names[tokenizer.im_end_id],
        "model_max_length": max_tokens,
        "pad_token": names[tokenizer.pad_id],
        "tokenizer_class": "GPT2Tokenizer",
    }


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merge of each token longer than a byte, in rank order.

    Raises:
        TokenizerError: a token does not come from merging two tokens of lower rank.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _parts_below(token, rank, ranks)
        if len(parts) != 2:
            raise TokenizerError(
                f"token {token!r} of rank {rank} splits into {len(parts)} parts of lower rank, "
                f"expected 2; the ranks are not those of a byte-pair encoding"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _parts_below(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def read_tokenizer(hf_dir: Path) -> Tokenizer:
    """Read the tokenizer of a directory's tokenizer.json, after checking that its merges match its
    ranks.

    Raises:
        TokenizerError: the file is missing or damaged, is no byte-level BPE with phi-4's added
            tokens, or gives the probe text other ids than its ranks do.
    """
    path = hf_dir / "tokenizer.json"
    fast, vocabulary, added = _parsed(path)
    try:
        ranks = {_bytes(text): i for text, i in vocabulary.items() if text not in added}
    except KeyError:
        raise TokenizerError(
            f"{path} has tokens that are not written in bytes; only byte-level BPE is supported"
        ) from None
    tokenizer = tokenizer_of_ranks(ranks, str(path))
    for name, token_id in added.items():
        expected = tokenizer.special_tokens.get(name, "no such token")
        if expected != token_id:
            raise TokenizerError(
                f"{path} has the added token {name} with id {token_id}, expected {expected}; only "
                f"phi-4's added tokens are supported"
            )
    _probe(fast, tokenizer, "this is not a phi-4 tokenizer")
    return tokenizer


def _parsed(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int], dict[str, int]]:
    """Return the parsed `tokenizers` object, and the ids of its tokens and of its added tokens."""
    try:
        content = path.read_bytes()
        # The package raises an untyped exception for a file that it cannot parse, so that is
        # checked first.
        fast, raw = tokenizers.Tokenizer.from_buffer(content), json.loads(content)
        added = {token["content"]: token["id"] for token in raw["added_tokens"]}
        return fast, raw["model"]["vocab"], added
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read ({error.strerror}); copy it again from the model's source"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise TokenizerError(f"{path} is not a tokenizer ({reason}); copy it again") from None


def _probe(fast: tokenizers.Tokenizer, tokenizer: Tokenizer, remedy: str) -> None:
    got, expected = fast.encode(PROBE).ids, tokenizer.encode(PROBE)
    if got != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
            min(len(got), len(expected)),
        )
        raise TokenizerError(
            f"tokenizer.json would give {got[at : at + 3]} from token {at} of the probe text, "
            f"expected {expected[at : at + 3]}; {remedy}"
        )


def _byte_alphabet() -> list[str]:
    # Byte-level BPE writes a byte as itself if that is a visible Latin-1 character, else as the
    # next character from U+0100 on.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b) if b in visible else chr(0x100 + hidden.index(b)) for b in range(256)]


_ALPHABET = _byte_alphabet()


def _text(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)


_BYTE_OF = {character: byte for byte, character in enumerate(_ALPHABET)}


def _bytes(text: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in text)
