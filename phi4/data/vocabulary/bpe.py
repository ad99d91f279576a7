"""Train a small byte-level BPE in tiktoken's rank format.

The vocabulary size includes everything: 256 bytes, the merges, and the 96 tokens that phi-4 adds.
Training depends only on the texts and their order, so equal input gives equal bytes.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from phi4.data.vocabulary.tokenizer import NUM_ADDED_TOKENS, SPLIT_PATTERN
from phi4.errors import DataError

SMALLEST_VOCAB = 256 + NUM_ADDED_TOKENS


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn the ranks of a vocabulary with exactly `vocab_size` ids.

    Args:
        texts: training documents; merges never cross cl100k's pre-tokens.
        vocab_size: bytes + merges + added tokens.

    Returns:
        Token bytes to rank, ranks 0 .. vocab_size - 97.

    Raises:
        DataError: vocab_size is too small for the bytes, or the texts too short for the merges.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab_size} was requested; 256 bytes and {NUM_ADDED_TOKENS} added "
            f"tokens need at least {SMALLEST_VOCAB}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_ADDED_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) + NUM_ADDED_TOKENS < vocab_size:
        raise DataError(
            f"a vocabulary of {vocab_size} was requested, but the texts only have merges for "
            f"{len(vocabulary) + NUM_ADDED_TOKENS}: give more text or a smaller size"
        )
    byte_of = _byte_of_character()
    return {
        bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()
    }


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of the byte-level alphabet.

    Printable Latin-1 bytes represent themselves, the others are mapped to U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [value for value in range(256) if value not in printable]
    mapping = {chr(value): value for value in printable}
    mapping.update({chr(256 + index): value for index, value in enumerate(moved)})
    return mapping
