"""The recipe's [data] section: tokenizer, sources, and how documents are packed into rows."""

from typing import Annotated, Literal

from pydantic import Strict

from phi4.config.fields import NonNegative, Positive, Section, key


class TokenizerConfig(Section):
    """The tokenizer that produced the token ids of the data."""

    kind: Literal["phi4", "bpe"] = key("identity", "phi4")
    """phi4: cl100k_base plus 96 added tokens. bpe: a small vocabulary trained on the demo
    corpus."""
    path: str | None = key("free", None)
    """Path of the rank file. When unset, phi4 uses TIKTOKEN_CACHE_DIR or tiktoken's own
    download."""
    sha256: str | None = key("identity", None, pattern=r"^[0-9a-f]{64}$")
    """Expected sha256 of a bpe rank file; the hash for phi4 is built in."""


SourceKind = Literal["stream", "windows", "conversations", "pairs", "pivots"]


class SourceConfig(Section):
    """One named source of the blend."""

    name: str = key("schedule", min_length=1)
    """Name in the blend, the ledger and the metrics; unique in its array."""
    path: str = key("free", min_length=1)
    """Prefix of a .bin/.idx pair, a glob of prefixes, or a .list file with one prefix per line. The
    files may be moved: the ledger identifies their content by the hash of their manifests."""
    weight: float = key("schedule", 1.0, ge=0)
    """Share of the blend drawn from this source: fractions that sum to 1, or ratios from 1 up."""
    max_epochs: float = key("schedule", 0.0, ge=0)
    """Maximum number of epochs over the source, counted from the start of the ledger; 0 means no
    limit."""
    kind: SourceKind = key("schedule", "stream")
    """stream: cut into units regardless of document boundaries. windows: documents of up to
    sequence_length tokens are not cut and are packed best-fit into rows. conversations: windows of
    chat records; a row never starts inside a record. pairs: two answers to one prompt, in one row.
    pivots: trajectories with pairs of tokens at some of their positions."""
    min_tokens: NonNegative = key("schedule", 0)
    """Shorter documents are dropped; windows only."""
    max_tokens: NonNegative = key("schedule", 0)
    """Longer documents are dropped; 0 means no limit; windows only."""
    overlong: Literal["cut", "truncate", "drop"] | None = key("schedule", None)
    """How to handle documents longer than sequence_length. cut: split over several rows. truncate:
    keep the beginning. drop: remove the document. When unset, text is cut and cutting a
    conversation (a document with a loss mask) is an error, because an answer would be trained on
    without its question. Streams always cut. The counts are logged at the start of a run."""
    max_response_tokens: NonNegative = key("schedule", 0)
    """Truncate both answers of a pair after this many tokens with loss; 0 does not truncate; pairs
    only."""


# Strict mode alone would reject the lists that TOML arrays are parsed into.
Window = Annotated[tuple[NonNegative, Positive], Strict(False)]
Windows = Annotated[tuple[Window, ...], Strict(False)]
Sources = Annotated[tuple[SourceConfig, ...], Strict(False)]


class DataConfig(Section):
    """Data sources and packing."""

    sequence_length: Positive = key("schedule", 4096)
    """Tokens in a row."""
    unit_tokens: Positive = key("identity", 4096)
    """Labels (target tokens) per unit, the granularity of the blend; sequence_length is a
    multiple."""
    document_mask: bool = key("schedule", True)
    """Restart attention and position ids at each document."""
    sources: Sources = key("schedule", ())
    """Training sources; tables [[data.sources]] in the file."""
    weigh_by: Literal["units", "loss_tokens"] = key("schedule", "units")
    """What the weights are measured in. loss_tokens suits sources that differ in padding or loss
    mask."""
    skip_windows: Windows = key("schedule", ())
    """Pairs [after_step, rows]: the given number of rows that follow a step are never drawn, as
    after a rollback. Steps must ascend; entries for completed steps have no further effect."""
    continue_from: str | None = key("identity", None)
    """Checkpoint or run directory whose data ledger the run starts from, as midtraining does with
    pretraining's: sources of the same name resume at their position, other sources start at the
    beginning. Needs the same run.seed and unit_tokens. Ignored once the run has a checkpoint of its
    own."""
    held_out: Sources = key("free", ())
    """Held-out sources, never trained on; the evaluation hook measures their loss. Same keys as
    data.sources."""
    cache_dir: str | None = key("free", None, min_length=1)
    """Directory for the manifests of multi-shard sources and the tables of window rows. When unset,
    they are stored next to the shards; if that directory is not writable, every rank recomputes
    them."""
    reference_cache: str | None = key("free", None, min_length=1)
    """Directory written by `phi4 dpo cache-ref`: the reference model's log-probabilities of the
    answers of pairs and pivots."""
    max_open_shards: Positive = key("free", 1024)
    """Maximum number of memory-mapped shards; each uses address space, not memory."""
