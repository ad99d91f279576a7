"""Forward passes over new tokens with cached keys, through the model's own chunks.

Not the training schedule: a pass goes from stage to stage by explicit sends, through all chunks of
all stages in their order, and the last stage draws. Every rank makes the same passes, from the same
`Step`. A step may have one token, so rows are never split: sequence parallelism is switched off for
the while, and every context rank is a replica of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.distributed as dist

from phi4.engine.engine import Engine
from phi4.engine.generation.blocks import BlockCopy
from phi4.engine.generation.cache import CacheRow, KeyValueCache, StepAttention
from phi4.engine.generation.draws import Draw, Drawn, draw
from phi4.engine.model.gpt import LogitsAt
from phi4.engine.model.micro_batch import Documents, rotary_fields
from phi4.engine.optimizer.build import gather_parameters
from phi4.engine.patches import without_rewriting
from phi4.engine.precision import torch_dtype

# Shape legend: T new tokens of all rows, R tokens whose logits are wanted, V vocabulary, H hidden.


@dataclass(frozen=True)
class StepRow:
    """One sequence's part of a step.

    Attributes:
        tokens: new ids, at least one.
        slots: int64, of all its tokens up to and including the new ones.
        draws: one per token to draw after the last new one; empty in the middle of a prompt.
        scored: of the first new tokens, one each, how to score what follows them: forced draws.
    """

    tokens: Sequence[int]
    slots: np.ndarray
    draws: Sequence[Draw] = ()
    scored: Sequence[Draw] = ()


@dataclass(frozen=True)
class Step:
    """What every rank does in one pass; rows with one new token come first."""

    rows: Sequence[StepRow]
    copies: Sequence[BlockCopy] = ()


class Decoder:
    """An engine's model with a key-value cache. A context: the model is in evaluation inside.

    Args:
        engine: in any layout; each data and each context rank is a replica that decodes for itself.
        num_blocks, block_tokens: of the cache, on every rank.
        num_ids: only ids below it are drawn; the model's vocabulary without it.

    Collectives: on entering, the parameter gathers of an engine that trains.
    """

    def __init__(
        self, engine: Engine, num_blocks: int, block_tokens: int, num_ids: int | None = None
    ) -> None:
        self._engine, self._num_ids = engine, num_ids
        self._model, self._layout = engine.recipe.model, engine.layout
        self._device = engine.platform.device
        self._dtype = torch_dtype(engine.recipe.precision)
        self.cache = KeyValueCache(
            [layer.layer_number for chunk in engine.bare_chunks for layer in chunk.decoder.layers],
            num_blocks,
            block_tokens,
            self._model.num_key_value_heads // self._layout.tp_size,
            self._model.head_dim,
            self._dtype,
            self._device,
        )
        self._contexts = ExitStack()

    def __enter__(self) -> "Decoder":
        engine = self._engine
        with ExitStack() as contexts:
            contexts.enter_context(engine.patches)
            gather_parameters(engine.chunks)
            for chunk in engine.chunks:
                # Nothing puts this back: every call of the engine sets the mode that it needs.
                chunk.eval()
            for owner, name in _splits(engine.bare_chunks):
                contexts.callback(setattr, owner, name, True)
                setattr(owner, name, False)
            contexts.enter_context(torch.no_grad())
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()

    def run(self, step: Step) -> list[list[Drawn]]:
        """One pass: for every row its scored tokens, then its drawn ones, on every rank.

        Collectives: see `logits`; one broadcast over pp of 24 bytes per drawn or scored token and
            16 per reported top token.
        """
        draws = [one for row in step.rows for one in (*row.scored, *row.draws)]
        logits_RV = self.logits(step)
        drawn: list[Drawn] = []
        if draws and logits_RV is not None:
            counts = [
                count for row in step.rows for count in (*[1] * len(row.scored), len(row.draws))
            ]
            counts_R = torch.tensor([count for count in counts if count], device=self._device)
            drawn = draw(logits_RV.repeat_interleave(counts_R, dim=0), draws, self._num_ids)
        in_order = iter(self._shared(drawn, draws))
        return [
            [next(in_order) for _ in range(len(row.scored) + len(row.draws))] for row in step.rows
        ]

    def logits(self, step: Step) -> torch.Tensor | None:
        """Cache the new tokens; logits [R, V] after those that are scored, and after the last one
        of every row that draws.

        Returns:
            None except on the last stage.

        Collectives: per stage border and virtual chunk one send over pp of the hidden states
            [T, 1, H]; those of the layers over tp; on the last stage one all-gather over tp of the
            logits.
        """
        with without_rewriting():
            self.cache.copy(step.copies)
            tokens_1T, documents, logits_at = self._inputs(step)
            output = self._through_stages(tokens_1T, documents, logits_at)
        if output is None or not len(logits_at.index_R):
            return None
        return self._whole_vocabulary(output[0])

    def _inputs(self, step: Step) -> tuple[torch.Tensor, Documents, LogitsAt]:
        rows, device = step.rows, self._device
        positions = [
            position
            for row in rows
            for position in range(len(row.slots) - len(row.tokens), len(row.slots))
        ]
        wanted, start = [], 0
        for row in rows:
            wanted += range(start, start + len(row.scored))
            start += len(row.tokens)
            wanted += [start - 1] if row.draws else []
        positions_1T = torch.tensor([positions], dtype=torch.int32, device=device)
        cache_rows = [CacheRow(len(row.tokens), row.slots) for row in rows]
        documents = Documents(
            qkv_format="sbhd",
            cached=StepAttention(self.cache, cache_rows, device),
            **rotary_fields(positions_1T, self._model, self._dtype, self._engine.rope_cache),
        )
        tokens = [token for row in rows for token in row.tokens]
        tokens_1T = torch.tensor([tokens], dtype=torch.int64, device=device)
        index_R = torch.tensor(wanted, dtype=torch.int64, device=device)
        return tokens_1T, documents, LogitsAt(index_R)

    def _through_stages(
        self, tokens_1T: torch.Tensor, documents: Documents, logits_at: LogitsAt
    ) -> torch.Tensor | None:
        """The last chunk's logits on the last stage, elsewhere None."""
        layout, chunks, hidden = self._layout, self._engine.bare_chunks, None
        shape = (tokens_1T.shape[1], 1, self._model.hidden_size)
        visits = list(product(range(len(chunks)), range(layout.pp_size)))
        for visit, (index, stage) in enumerate(visits):
            if stage != layout.pp_rank:
                continue
            if visit:
                if layout.pp_size > 1:
                    hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
                    source = visits[visit - 1][1]
                    dist.recv(hidden, group=layout.groups.pp, group_src=source)
                chunks[index].set_input_tensor(hidden)
            hidden = chunks[index].decode(tokens_1T, documents, logits_at)
            if visit + 1 < len(visits) and layout.pp_size > 1:
                target = visits[visit + 1][1]
                dist.send(hidden.contiguous(), group=layout.groups.pp, group_dst=target)
        return hidden if layout.is_last_stage else None

    def _whole_vocabulary(self, local_RV: torch.Tensor) -> torch.Tensor:
        layout = self._layout
        if layout.tp_size == 1:
            return local_RV
        pieces = [torch.empty_like(local_RV) for _ in range(layout.tp_size)]
        dist.all_gather(pieces, local_RV.contiguous(), group=layout.groups.tp)
        return torch.cat(pieces, dim=-1)

    def _shared(self, drawn: list[Drawn], draws: Sequence[Draw]) -> list[Drawn]:
        """What the last stage has drawn, on all stages."""
        layout = self._layout
        if layout.pp_size == 1 or not draws:
            return drawn
        tops = [min(one.num_top, self._model.vocab_size) for one in draws]
        values = torch.empty(3 * len(draws) + 2 * sum(tops), dtype=torch.float64)
        if drawn:
            flat = [value for one in drawn for value in one[:3]]
            flat += [value for one in drawn for pair in one.top for value in pair]
            values = torch.tensor(flat, dtype=torch.float64)
        values = values.to(self._device)
        dist.broadcast(values, group=layout.groups.pp, group_src=layout.pp_size - 1)
        # Ids are exact in fp64.
        left = iter(values.tolist())
        heads = [(int(next(left)), next(left), next(left)) for _ in draws]
        return [
            Drawn(*head, tuple((int(next(left)), next(left)) for _ in range(count)))
            for head, count in zip(heads, tops, strict=True)
        ]


def _splits(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[object, str]]:
    """The switches of megatron-core, as (object, attribute), that split rows over tensor ranks."""
    for chunk in chunks:
        for module in chunk.modules():
            for owner in (module, getattr(module, "config", None)):
                for name in ("sequence_parallel", "reduce_scatter_embeddings"):
                    if getattr(owner, name, False) is True:
                        yield owner, name
