"""What is read: tokenizer, sources, and how documents share rows."""

from typing import Annotated, Literal

from pydantic import Strict

from phi4.config.fields import NonNegative, Positive, Section, key


class TokenizerConfig(Section):
    """Which ids the tokens of the data mean."""

    kind: Literal["phi4", "bpe"] = key("identity", "phi4")
    """phi4: cl100k_base plus 96 added tokens. bpe: a small vocabulary trained on the demo
    corpus."""
    path: str | None = key("free", None)
    """Rank file. None lets phi4 use TIKTOKEN_CACHE_DIR or tiktoken's own download."""
    sha256: str | None = key("identity", None, pattern=r"^[0-9a-f]{64}$")
    """Expected hash of a bpe rank file; phi4's own is built in."""


SourceKind = Literal["stream", "windows", "conversations", "pairs", "pivots"]


class SourceConfig(Section):
    """One named source of the blend."""

    name: str = key("schedule", min_length=1)
    """Name in the blend, the ledger and the metrics; unique in its array."""
    path: str = key("free", min_length=1)
    """Prefix of a .bin/.idx pair, a glob of prefixes, or a .list file with a prefix per line. Files
    may move: what they must hold under this name is in the ledger, by their manifests' hash."""
    weight: float = key("schedule", 1.0, ge=0)
    """Share of the blend drawn from this source: fractions that sum to 1, or ratios from 1 up."""
    max_epochs: float = key("schedule", 0.0, ge=0)
    """The source may be read so many times, counted from the beginning of the ledger; 0 sets no
    limit."""
    kind: SourceKind = key("schedule", "stream")
    """stream: cut into units wherever documents end. windows: documents are kept whole up to
    sequence_length and packed best-fit into rows. conversations: windows of chat records, never
    begun inside one. pairs: two answers to one prompt, in one row. pivots: trajectories with pairs
    of tokens at some of their positions."""
    min_tokens: NonNegative = key("schedule", 0)
    """Shorter documents are left out; windows only."""
    max_tokens: NonNegative = key("schedule", 0)
    """Longer documents are left out; 0 sets no limit; windows only."""
    overlong: Literal["cut", "truncate", "drop"] | None = key("schedule", None)
    """What becomes of documents longer than sequence_length. cut: they go on in other rows.
    truncate: the beginning is kept. drop: they are left out. None cuts text and refuses to cut
    conversations (documents with a loss mask): an answer without its question teaches the wrong
    thing. Streams only cut. The counts are shown at the start of a run."""
    max_response_tokens: NonNegative = key("schedule", 0)
    """Both answers of a pair end after so many tokens that the loss covers; 0 keeps them whole;
    pairs only."""


# Strict alone would refuse the lists that TOML arrays become.
Window = Annotated[tuple[NonNegative, Positive], Strict(False)]
Windows = Annotated[tuple[Window, ...], Strict(False)]
Sources = Annotated[tuple[SourceConfig, ...], Strict(False)]


class DataConfig(Section):
    """What is read, and how documents share a row."""

    sequence_length: Positive = key("schedule", 4096)
    """Tokens in a row."""
    unit_tokens: Positive = key("identity", 4096)
    """Labels in a unit, the smallest thing the blend counts; sequence_length is a multiple."""
    document_mask: bool = key("schedule", True)
    """Attention and positions restart at each document."""
    sources: Sources = key("schedule", ())
    """What the run trains on; tables [[data.sources]] in the file."""
    weigh_by: Literal["units", "loss_tokens"] = key("schedule", "units")
    """What the weights count. loss_tokens suits sources that differ in padding or mask."""
    skip_windows: Windows = key("schedule", ())
    """Pairs [after_step, rows]: so many rows behind that step are never drawn, as after a roll
    back. Steps ascend; windows of steps that are done are not skipped any more."""
    continue_from: str | None = key("identity", None)
    """Checkpoint or run directory whose ledger the run begins with, as midtraining does with
    pretraining's: sources of the same name go on where they stood, others begin. Needs the same
    run.seed and unit_tokens. Once the run has a checkpoint of its own, that one counts."""
    held_out: Sources = key("free", ())
    """Never trained on; the evaluation hook measures their loss. Keys as those of data.sources."""
    cache_dir: str | None = key("free", None, min_length=1)
    """Where the manifests of sources of many shards and the tables of window rows are kept. None
    keeps them beside the shards; where that cannot be written, every rank makes them again."""
    reference_cache: str | None = key("free", None, min_length=1)
    """Directory that `phi4 dpo cache-ref` wrote: the reference model's log-probabilities of the
    answers of pairs and pivots."""
    max_open_shards: Positive = key("free", 1024)
    """Shards that are mapped at once; each takes addresses, not memory."""
