"""The tokenizer: byte-level BPE ranks plus the 96 tokens that phi-4 adds after them.

In every vocabulary the added tokens follow the last rank in phi-4's own order, so a small BPE has
the same special tokens under the same names, in the 96 ids above its ranks. Text never becomes
special ids: `encode` treats `<|im_end|>` in a document as plain text.
"""

import binascii
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from phi4.config import TokenizerConfig
from phi4.errors import TokenizerError

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""cl100k_base's pre-tokenization pattern, as in phi-4's tokenizer.json."""

CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# tiktoken names cached files by the sha1 of their URL.
_CL100K_CACHE_NAMES = ("9b5ad71b2ce5302211f9c61530b329a4922fc6a4", "cl100k_base.tiktoken")

NUM_ADDED_TOKENS = 96
_NAMED_TOKENS = {
    1: "<|endoftext|>",
    2: "<|fim_prefix|>",
    3: "<|fim_middle|>",
    4: "<|fim_suffix|>",
    8: "<|im_start|>",
    9: "<|im_end|>",
    10: "<|im_sep|>",
    20: "<|endofprompt|>",
}
# The released model pads with this placeholder: a pad that equals the end token would exclude the
# end of every answer from the loss.
_PAD_TOKEN = "<|dummy_85|>"


@dataclass(frozen=True)
class TokenizerFacts:
    """Metadata of the tokenizer that a reader of token files needs."""

    vocab_size: int
    eod_id: int
    pad_id: int
    fingerprint: str


class Tokenizer:
    """A vocabulary and its encoder.

    Attributes:
        mergeable_ranks: token bytes to id; ids are 0 .. number of ranks - 1.
        special_tokens: added token to id; they follow the ranks.
        vocab_size: ranks plus added tokens.
        fingerprint: sha256 over ranks, split pattern and special tokens.
    """

    def __init__(self, mergeable_ranks: dict[bytes, int]) -> None:
        self.mergeable_ranks = mergeable_ranks
        self.special_tokens = added_tokens(len(mergeable_ranks))
        self.vocab_size = len(mergeable_ranks) + NUM_ADDED_TOKENS
        self.eod_id = self.special_tokens["<|endoftext|>"]
        self.pad_id = self.special_tokens[_PAD_TOKEN]
        self.im_start_id = self.special_tokens["<|im_start|>"]
        self.im_sep_id = self.special_tokens["<|im_sep|>"]
        self.im_end_id = self.special_tokens["<|im_end|>"]
        self._encoding = tiktoken.Encoding(
            "phi4",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=mergeable_ranks,
            special_tokens=self.special_tokens,
            explicit_n_vocab=self.vocab_size,
        )
        digest = hashlib.sha256(rank_file_bytes(mergeable_ranks))
        digest.update(f"{SPLIT_PATTERN}\n{self.special_tokens}".encode())
        self.fingerprint = digest.hexdigest()

    @property
    def facts(self) -> TokenizerFacts:
        """The plain values that the loader needs."""
        return TokenizerFacts(self.vocab_size, self.eod_id, self.pad_id, self.fingerprint)

    def encode(self, text: str) -> list[int]:
        """Encode a text; a special token's name in it is encoded as plain text.

        Raises:
            TokenizerError: the text cannot be split, as with millions of spaces in a row.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Encode as `encode`, [n] uint32, without an intermediate list."""
        try:
            # tiktoken's list version aborts the process where this one raises.
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:
            raise TokenizerError(
                f"the text cannot be split into tokens ({error}); remove it"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise self._foreign(next(i for i in ids if not 0 <= i < self.vocab_size))
        return self._encoding.decode(ids)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token, which may be part of a character; a special token's are its
        name.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise self._foreign(token_id)
        return self._encoding.decode_single_token_bytes(token_id)

    def _foreign(self, token_id: int) -> TokenizerError:
        return TokenizerError(
            f"cannot decode token id {token_id}; this tokenizer has ids 0 to "
            f"{self.vocab_size - 1}; use the tokenizer that encoded the text"
        )


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer of a recipe.

    phi4's ranks come from `config.path`, else from TIKTOKEN_CACHE_DIR, else from tiktoken's own
    download; their hash is always checked.

    Raises:
        TokenizerError: ranks are missing, damaged, or not the expected ones.
    """
    if config.kind == "phi4":
        return _phi4_tokenizer(config.path)
    if config.path is None:
        raise TokenizerError(
            "tokenizer.kind=bpe needs tokenizer.path; `phi4 data demo` trains one and writes it"
        )
    return _parsed(_read_ranks(Path(config.path), config.sha256), config.path)


def added_tokens(first_id: int) -> dict[str, int]:
    """Return phi-4's 96 added tokens in id order: the named ones at their ids, dummies between."""
    tokens: dict[str, int] = {}
    num_dummies = 0
    for place in range(NUM_ADDED_TOKENS):
        name = _NAMED_TOKENS.get(place)
        if name is None:
            name = f"<|dummy_{num_dummies}|>"
            num_dummies += 1
        tokens[name] = first_id + place
    return tokens


def rank_file_bytes(ranks: dict[bytes, int]) -> bytes:
    """Return ranks in tiktoken's file format: base64 of the token, a space, its id, by id."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(
        b"%s %d\n" % (binascii.b2a_base64(token, newline=False), rank) for token, rank in ordered
    )


def tokenizer_of_ranks(ranks: dict[bytes, int], origin: str) -> Tokenizer:
    """Make a tokenizer from given ranks.

    Args:
        ranks: token bytes to id.
        origin: identifies them in an error.

    Raises:
        TokenizerError: ids have gaps or repeat, or a single byte is missing.
    """
    _check_ranks(ranks, origin)
    return Tokenizer(ranks)


@lru_cache(maxsize=1)
def _parsed(content: bytes, origin: str) -> Tokenizer:
    """The last one is cached: several steps of a command need it, and it takes 0.2 s to build."""
    return Tokenizer(_parse_ranks(content, origin))


def _phi4_tokenizer(path: str | None) -> Tokenizer:
    cached = _cached_cl100k() if path is None else Path(path)
    if cached is not None:
        return _parsed(_read_ranks(cached, CL100K_SHA256), str(cached))
    try:
        ranks = openai_public.cl100k_base()["mergeable_ranks"]
    except (OSError, ValueError) as error:
        raise TokenizerError(
            "cl100k_base.tiktoken is neither at tokenizer.path nor in TIKTOKEN_CACHE_DIR, and "
            f"tiktoken could not download it ({type(error).__name__}); put the file in a directory "
            "and set TIKTOKEN_CACHE_DIR to it"
        ) from None
    _check_hash(rank_file_bytes(ranks), CL100K_SHA256, "tiktoken's download of cl100k_base")
    return Tokenizer(ranks)


def _cached_cl100k() -> Path | None:
    directory = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not directory:
        return None
    candidates = [Path(directory) / name for name in _CL100K_CACHE_NAMES]
    return next((path for path in candidates if path.is_file()), None)


def _read_ranks(path: Path, sha256: str | None) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"tokenizer ranks {path} cannot be read ({error.strerror}); set tokenizer.path to a "
            "rank file, for example the bpe.tiktoken that `phi4 data demo` writes"
        ) from None
    if sha256 is not None:
        _check_hash(content, sha256, str(path))
    return content


def _check_hash(content: bytes, expected: str, origin: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise TokenizerError(
            f"tokenizer ranks {origin}: sha256 is {found}, expected {expected}; the file is "
            "damaged or belongs to another tokenizer: replace it"
        )


def _parse_ranks(content: bytes, origin: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError:
            raise TokenizerError(
                f"tokenizer ranks {origin}, line {number}: expected base64 and a number; "
                "give a file in tiktoken's format"
            ) from None
    _check_ranks(ranks, origin)
    return ranks


def _check_ranks(ranks: dict[bytes, int], origin: str) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"tokenizer ranks {origin}: ids are not 0 to {len(ranks) - 1} without gap or repeat; "
            "the file is damaged: replace it"
        )
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing:
        raise TokenizerError(
            f"tokenizer ranks {origin}: {missing} of the 256 single bytes are missing, so some "
            "text could not be encoded; give a byte-level vocabulary"
        )
