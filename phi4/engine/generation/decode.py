"""Forward passes over new tokens with cached keys, through all stages of the model.

This does not use the training schedule: hidden states are sent from stage to stage explicitly, and
the last stage samples. A stage that has sent its part of a step may begin the next one, so as many
steps are in flight as there are stages. Every rank begins and ends the same steps in the same
order, so a step that reads or writes a block of the cache comes after all steps begun before it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
import torch.distributed as dist

from phi4.engine.engine import Engine
from phi4.engine.generation.cache import KeyValueCache, StepAttention
from phi4.engine.generation.chunk_forward import ChunkForward
from phi4.engine.generation.draws import Drawn, draw
from phi4.engine.generation.steps import Step, tiles
from phi4.engine.model.micro_batch import Documents
from phi4.engine.model.rope import rope_cos_sin
from phi4.engine.optimizer.build import gather_parameters
from phi4.engine.precision import torch_dtype
from phi4.errors import LayoutError

# Shape legend: T new tokens of all rows, R tokens whose logits are wanted, V vocabulary, H hidden.

_MAX_INVARIANT_TP = 2
"""A sum over two ranks does not depend on a value's position in the message; over more it may."""


@dataclass
class Running:
    """A step that this rank has begun: its sampled tokens, and messages that must be kept alive."""

    step: Step
    drawn: list[Drawn] = field(default_factory=list)
    sent: list[tuple[dist.Work | None, torch.Tensor]] = field(default_factory=list)


class Decoder:
    """An engine's model with a key-value cache.

    Args:
        engine: engine in any layout; each data and each context rank is a replica that decodes
            independently.
        num_blocks, block_tokens: size of the cache, on every rank.
        num_ids: only ids below it are sampled; defaults to the model's vocabulary.
        batch_invariant: compute in passes of one size, so that results are bit-identical whatever
            else is in a step. Costs one attention call per token.

    Attributes:
        max_running: maximum number of steps in flight.

    Raises:
        LayoutError: batch_invariant on more than two tensor ranks.

    Collectives: see `read_weights`.
    """

    def __init__(
        self,
        engine: Engine,
        num_blocks: int,
        block_tokens: int,
        num_ids: int | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        layout = engine.layout
        if batch_invariant and layout.tp_size > _MAX_INVARIANT_TP:
            raise LayoutError(
                f"batch_invariant with parallel.tensor={layout.tp_size}: the order of sums over "
                f"tensor ranks is fixed for at most {_MAX_INVARIANT_TP}; use fewer"
            )
        self._engine, self._num_ids, self._batch_invariant = engine, num_ids, batch_invariant
        self._model, self._layout = engine.recipe.model, layout
        self._device = engine.platform.device
        self._dtype = torch_dtype(engine.recipe.precision)
        self._rotary = () if engine.rope_cache else self._rotary_tables()
        self._chunks = [ChunkForward(chunk, layout) for chunk in engine.bare_chunks]
        self._spare_block = num_blocks
        self.cache = KeyValueCache(
            [layer.layer_number for chunk in engine.bare_chunks for layer in chunk.decoder.layers],
            num_blocks + batch_invariant,
            block_tokens,
            self._model.num_key_value_heads // layout.tp_size,
            self._model.head_dim,
            self._dtype,
            self._device,
        )
        # Virtual chunks visit a stage more than once, and a stage would wait for itself.
        self.max_running = layout.pp_size if layout.vpp_size == 1 else 1
        self.read_weights()

    def read_weights(self) -> None:
        """Read the current weights; call again after every change of them.

        Collectives: on an engine that trains, the parameter gathers that are outstanding, over data
            and context ranks.
        """
        with self._engine.patches:
            gather_parameters(self._engine.chunks, self._engine.optimizer)

    @torch.inference_mode()
    def begin(self, step: Step) -> Running:
        """Do this rank's part of a step, and sample on the last stage.

        Collectives: per stage border, virtual chunk and pass one send over pp of the hidden states
            [T, H]; those of `ChunkForward` over tp; see `end`.
        """
        self.cache.copy(step.copies)
        running = Running(step)
        passes = tiles(step, self._spare_block) if self._batch_invariant else (step,)
        for one in passes:
            logits_RV = self._logits(one, running)
            if logits_RV is not None:
                running.drawn += draw(logits_RV, one.draws, self._num_ids)
        if self._layout.is_last_stage and self._layout.pp_size > 1 and step.draws:
            values = _packed(running.drawn).to(self._device)
            group, source = self._layout.groups.pp, self._layout.pp_rank
            work = dist.broadcast(values, group=group, group_src=source, async_op=True)
            running.sent.append((work, values))
        return running

    def end(self, running: Running) -> list[list[Drawn]]:
        """Return the results of a step: for every row its scored tokens, then its sampled ones.

        Collectives: one broadcast over pp of 24 bytes per drawn or scored token and 16 per reported
            top token, which the last stage has begun.
        """
        step, layout = running.step, self._layout
        drawn, draws = running.drawn, step.draws
        if draws and not layout.is_last_stage:
            tops = [min(one.num_top, self._model.vocab_size) for one in draws]
            size = 3 * len(draws) + 2 * sum(tops)
            values = torch.empty(size, dtype=torch.float64, device=self._device)
            dist.broadcast(values, group=layout.groups.pp, group_src=layout.pp_size - 1)
            drawn = _unpacked(values, tops)
        for work, _ in running.sent:
            if work is not None:
                work.wait()
        in_order = iter(drawn)
        return [
            [next(in_order) for _ in range(len(row.scored) + len(row.draws))] for row in step.rows
        ]

    def _logits(self, step: Step, running: Running) -> torch.Tensor | None:
        """Cache the new tokens of one pass; return the logits of its draws [R, V] on the last
        stage."""
        hidden_TH = self._through_stages(step, running)
        if hidden_TH is None or not step.draws:
            return None
        token_of = _tokens_of_draws(step)
        if self._batch_invariant:
            # Of all tokens, so that this product also has a fixed size.
            return _rows(self._chunks[-1].logits(hidden_TH), token_of)
        wanted = sorted(set(token_of))
        logits = self._chunks[-1].logits(_rows(hidden_TH, wanted))
        return _rows(logits, [bisect_left(wanted, token) for token in token_of])

    def _through_stages(self, step: Step, running: Running) -> torch.Tensor | None:
        """Return hidden states [T, H] after the last chunk on the last stage, elsewhere None."""
        layout, hidden_TH = self._layout, None
        tokens_T, rotary, attention = self._inputs(step)
        visits = list(product(range(len(self._chunks)), range(layout.pp_size)))
        for visit, (index, stage) in enumerate(visits):
            if stage != layout.pp_rank:
                continue
            if visit and layout.pp_size > 1:
                shape = (len(tokens_T), self._model.hidden_size)
                hidden_TH = torch.empty(shape, dtype=self._dtype, device=self._device)
                dist.recv(hidden_TH, group=layout.groups.pp, group_src=visits[visit - 1][1])
            hidden_TH = self._chunks[index](tokens_T, hidden_TH, rotary, attention)
            if visit + 1 < len(visits) and layout.pp_size > 1:
                target = visits[visit + 1][1]
                work = dist.isend(hidden_TH, group=layout.groups.pp, group_dst=target)
                running.sent.append((work, hidden_TH))
        return hidden_TH if layout.is_last_stage else None

    def _rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [P, 1, D] of all P positions, for RoPE with tables per token."""
        positions_1P = torch.arange(self._model.max_position_embeddings, device=self._device)[None]
        return rope_cos_sin(positions_1P.float(), self._model, self._dtype)

    def _inputs(self, step: Step) -> tuple[torch.Tensor, Documents, StepAttention]:
        rows, device = step.rows, self._device
        positions = [position for row in rows for position in range(row.start, row.end)]
        positions_T = torch.tensor(positions, dtype=torch.int32, device=device)
        if self._rotary:
            cos_SBD, sin_SBD = (table.index_select(0, positions_T) for table in self._rotary)
            rotary = Documents(qkv_format="sbhd", cos_SBD=cos_SBD, sin_SBD=sin_SBD)
        else:
            cache = self._engine.rope_cache
            rotary = Documents(qkv_format="sbhd", rope_cache=cache, positions_T=positions_T)
        tokens = [token for row in rows for token in row.tokens]
        tokens_T = torch.tensor(tokens, dtype=torch.int64, device=device)
        return tokens_T, rotary, StepAttention(self.cache, rows, self._batch_invariant)


def _tokens_of_draws(step: Step) -> list[int]:
    """Return which of the step's tokens each draw follows; ascending."""
    tokens: list[int] = []
    start = 0
    for row in step.rows:
        tokens += range(start, start + len(row.scored))
        start += len(row.tokens)
        tokens += [start - 1] * len(row.draws)
    return tokens


def _rows(x: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Return some rows of x, ascending and perhaps repeated; x itself if they are all of it."""
    if indices == list(range(len(x))):
        return x
    return x[torch.tensor(indices, device=x.device)]


def _packed(drawn: Sequence[Drawn]) -> torch.Tensor:
    """Convert to fp64, in which ids are exact."""
    values = [value for one in drawn for value in one[:3]]
    values += [value for one in drawn for pair in one.top for value in pair]
    return torch.tensor(values, dtype=torch.float64)


def _unpacked(values: torch.Tensor, tops: Sequence[int]) -> list[Drawn]:
    left = iter(values.tolist())
    heads = [(int(next(left)), next(left), next(left)) for _ in tops]
    return [
        Drawn(*head, tuple((int(next(left)), next(left)) for _ in range(count)))
        for head, count in zip(heads, tops, strict=True)
    ]
