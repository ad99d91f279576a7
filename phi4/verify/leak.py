"""Check document isolation: no document affects another's logits or gradients.

Attention and positions restart at document boundaries. If the tokens of one document change and its
loss weight is 0, the logits of all others, the gradients of the embedding's output at their
positions and every parameter gradient must be bit-identical. The check first runs without the
document mask, where each of the three must change: otherwise the check could not detect a leak.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from phi4.config import Recipe, with_overrides
from phi4.data.stream.batch import Batch, build_batch
from phi4.engine.engine import Engine
from phi4.engine.model.gpt import global_parameters
from phi4.engine.objective import Objective
from phi4.engine.platform import Platform
from phi4.errors import ConfigError
from phi4.verify.layouts import LayoutCase

DOCUMENTS = {
    "first": (0, 5),
    "across context borders": (5, 19),
    "middle": (19, 23),
    "last": (23, 32),
}
"""Documents of the first row, as columns in 32nds. Context ranks meet at 8, 16 and 24, or more
often. The second row has documents of its own."""
_PARTS = 32
_SECOND_ROW_ENDS = (2, 14, 15, 31)
_EOD_ID = 0
_SEPARABLE = ("fp32", "bf16")
_WITHOUT_MASK = "without the document mask"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """Changes seen on one rank when one document's tokens changed; None for values that it does not
    hold.

    The first field is about the document itself, which must change; the others are about the rest.
    """

    own_logits: bool | None
    logits: bool | None
    embedding: bool | None
    """Gradients of the embedding's output at the other documents' positions."""
    parameters: int
    """Names of parameters whose gradient is not bit-identical."""

    @property
    def is_none(self) -> bool:
        """Whether the document changed nothing outside itself."""
        return not (self.logits or self.embedding or self.parameters)

    @property
    def is_everywhere(self) -> bool:
        """Whether every value on this rank changed."""
        return self.logits is not False and self.embedding is not False and self.parameters > 0


@dataclass(frozen=True)
class LeakFindings:
    """Results of one layout, by rank: changes without the document mask, and per document with
    it."""

    case: LayoutCase
    without_mask: tuple[Difference, ...]
    by_document: dict[str, tuple[Difference, ...]]

    @property
    def sees(self) -> bool:
        """Whether every rank detected the leak that exists without the mask."""
        return all(difference.is_everywhere for difference in self.without_mask)

    def leaks(self, document: str) -> str:
        """Return what the document changed elsewhere, in words; empty if nothing."""
        found = self.by_document[document]
        kinds = [kind for kind in ("logits", "embedding") if any(getattr(d, kind) for d in found)]
        if worst := max(difference.parameters for difference in found):
            kinds.append(f"{worst} parameters")
        if not any(difference.own_logits for difference in found):
            kinds.append("not even itself")
        return ", ".join(kinds)

    @property
    def passed(self) -> bool:
        """Whether nothing leaks and the check was able to detect a leak."""
        return self.sees and not any(self.leaks(document) for document in self.by_document)


def leak_case(case: LayoutCase, recipe: Recipe) -> LayoutCase:
    """Return the case in the recipe's number format, with the two rows of `leak_batch` per
    micro-batch.

    Raises:
        ConfigError: values of one document depend on another by design, or the rows are too short.
    """
    dtype, length = recipe.precision.dtype, recipe.data.sequence_length
    if dtype not in _SEPARABLE:
        raise ConfigError(
            f"precision.dtype={dtype} scales entire tensors, so every document changes the "
            f"rounding of all others by design; use {' or '.join(_SEPARABLE)} for this check"
        )
    if recipe.precision.fp8 != "off":
        raise ConfigError(
            f"precision.fp8={recipe.precision.fp8} scales values of several documents together, so "
            f"each changes the rounding of others by design; use precision.fp8=off for this check"
        )
    if length < _PARTS:
        raise ConfigError(
            f"data.sequence_length={length} is too short for {len(DOCUMENTS)} documents with "
            f"context boundaries between; use at least {_PARTS}"
        )
    parallel = case.recipe.parallel
    rows = 2 * parallel.pipeline * parallel.data
    overrides = [f"precision.dtype={dtype}", "batch.micro_batch_size=2"]
    overrides.append(f"batch.global_batch_size={rows}")
    return LayoutCase(case.name, with_overrides(case.recipe, overrides))


def run_leak(case: LayoutCase, platform: Platform, objective: Objective, *, work_dir: Path) -> None:
    """Measure one layout on this rank and write the results under work_dir.

    Collectives: those of the engine's training step and logits.
    """
    engine = Engine(case.recipe, platform)
    found = {_WITHOUT_MASK: _difference(engine, objective, "first", mask=False)}
    for document in DOCUMENTS:
        found[document] = _difference(engine, objective, document, mask=True)
    folder = work_dir / case.name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(difference) for name, difference in found.items()})
    (folder / f"rank_{platform.rank}.json").write_text(text)
    torch.distributed.barrier()
    engine.close()


def read_findings(case: LayoutCase, work_dir: Path) -> LeakFindings:
    """Read the results of all ranks of a case."""
    folder = work_dir / case.name.replace(" ", "_")
    ranks = [
        json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(case.world_size)
    ]
    found = {name: tuple(Difference(**rank[name]) for rank in ranks) for name in ranks[0]}
    return LeakFindings(case, found.pop(_WITHOUT_MASK), found)


def leak_batch(recipe: Recipe, changed: str, seed: int, *, mask: bool = True) -> Batch:
    """Make two rows of documents; the changed one's tokens depend on the seed and have no loss
    weight."""
    length, vocabulary = recipe.data.sequence_length, recipe.model.vocab_size
    columns = document_columns(length, changed)
    tokens = np.random.default_rng(0).integers(1, vocabulary, (2, length + 1))
    tokens[0, columns] = np.random.default_rng(seed).integers(1, vocabulary, length)[columns]
    ends = [document_columns(length, document).stop for document in DOCUMENTS]
    tokens[0, np.array(ends) - 1] = _EOD_ID
    tokens[1, np.array(_SECOND_ROW_ENDS) * length // _PARTS] = _EOD_ID
    weights = (tokens[:, :-1] != _EOD_ID).astype(np.float32)
    weights[0, columns] = 0
    return build_batch(tokens[:, :-1], tokens[:, 1:], weights, eod_id=_EOD_ID, document_mask=mask)


def document_columns(length: int, document: str) -> slice:
    """Return the columns of a document in the first row."""
    start, end = DOCUMENTS[document]
    return slice(start * length // _PARTS, end * length // _PARTS)


def _difference(engine: Engine, objective: Objective, document: str, *, mask: bool) -> Difference:
    before, after = (
        _measure(engine, objective, leak_batch(engine.recipe, document, seed, mask=mask))
        for seed in (1, 2)
    )
    length = engine.recipe.data.sequence_length
    others_BS = torch.ones(2, length, dtype=torch.bool)
    others_BS[0, document_columns(length, document)] = False
    held = {"logits": others_BS, "embedding": _embedded_positions(engine, others_BS)}

    def changed(name: str, at: torch.Tensor) -> bool | None:
        if name not in before:
            return None
        at = at.to(before[name].device)
        return not _same(before[name][at], after[name][at])

    return Difference(
        own_logits=changed("logits", ~others_BS),
        logits=changed("logits", others_BS),
        embedding=changed("embedding", held["embedding"]),
        parameters=sum(not _same(before[name], after[name]) for name in before.keys() - held),
    )


def _measure(engine: Engine, objective: Objective, batch: Batch) -> Tensors:
    """Return this rank's logits [B, S, V], gradients of the embedding's output, local [S, B,
    hidden], and parameter gradients by name."""
    batches = [batch] * engine.layout.pp_size
    outputs = engine.logits(batches)
    measured = {"logits": outputs[-1]} if outputs else {}

    def keep(_module, _inputs, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: measured.update(embedding=gradient.clone()))

    first = engine.bare_chunks[0]
    hook = first.embedding.register_forward_hook(keep) if first.pre_process else None
    engine.train_step(batches, objective, learning_rate=0.0)
    if hook is not None:
        hook.remove()
    gradients = global_parameters(engine.bare_chunks)
    # main_grad is megatron-core's.
    return measured | {
        name: parameter.main_grad.clone()  # type: ignore[attr-defined]
        for name, parameter in gradients
    }


def _embedded_positions(engine: Engine, mask_BS: torch.Tensor) -> torch.Tensor:
    """Return the mask at the positions whose embeddings this rank holds, [S, B]."""
    layout = engine.layout
    mask_SB = layout.context_slice(mask_BS).t()
    return mask_SB.chunk(layout.tp_size)[layout.tp_rank] if layout.parallel.sequence else mask_SB


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
