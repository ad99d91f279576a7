"""Sampling of the next token from the model's logits, with separate parameters for each row.

A row's draw is the arg max of its tempered and truncated log-probabilities plus Gumbel noise keyed
by (seed, sample, position): it depends on nothing else in the batch. The distribution of a row is
made in this order: bias, forbidden ids, temperature, top_k, top_p (over the mass that top_k left),
min_p. Tokens of equal probability are taken by ascending id.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from phi4.engine.generation.noise import gumbel, stream_key

# Shape legend: R rows, V vocabulary, Q rows that need a sort.


class Draw(NamedTuple):
    """Sampling parameters of one row's next token.

    Attributes:
        seed, sample, position: key of the noise; see `noise.stream_key`.
        temperature: 0 takes the most probable token.
        top_k: keep the k most probable; 0 keeps all.
        top_p: in (0, 1], keep the fewest most probable tokens whose mass reaches it.
        min_p: in [0, 1], keep tokens at least this fraction as probable as the most probable.
        logit_bias: added to the logits of these ids.
        forbidden: ids that are not sampled.
        forced: the token to take regardless of the model.
        num_top: how many of the most probable tokens to report.
    """

    seed: int
    sample: int = 0
    position: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = MappingProxyType({})
    forbidden: frozenset[int] = frozenset()
    forced: int | None = None
    num_top: int = 0


class Drawn(NamedTuple):
    """One row's token.

    Attributes:
        token: its id.
        log_prob: under the raw model, without bias or temperature.
        sampled_log_prob: under the row's adjusted distribution, which at temperature 0 has only one
            token; -inf for a forced token outside it.
        top: (id, log_prob) of the most probable tokens of the model, most probable first.
    """

    token: int
    log_prob: float
    sampled_log_prob: float
    top: tuple[tuple[int, float], ...]


def draw(logits_RV: torch.Tensor, rows: Sequence[Draw], num_ids: int | None = None) -> list[Drawn]:
    """Choose a token per row.

    Args:
        logits_RV: logits of the model, any float dtype; processed in fp64.
        rows: one per row; ids in them are within [0, V), and at least one id is allowed.
        num_ids: only ids below it are sampled; V by default.
    """
    if not rows:
        return []
    log_probs_RV = torch.log_softmax(logits_RV.double(), dim=-1)
    scores_RV = _adjusted(log_probs_RV, rows, num_ids)
    best_R = scores_RV.argmax(-1)
    tokens_R, sampled_R = best_R.clone(), torch.zeros_like(log_probs_RV[:, 0])
    forced = [i for i, row in enumerate(rows) if row.forced is not None]
    if forced:
        forced_ids = [rows[i].forced for i in forced]
        tokens_R[forced] = torch.tensor(forced_ids, device=tokens_R.device)
        sampled_R.masked_fill_(tokens_R != best_R, -torch.inf)
    warm = [i for i, row in enumerate(rows) if row.temperature > 0]
    if warm:
        kept_RV, drawn_R = _sampled(scores_RV[warm], [rows[i] for i in warm])
        is_free = [rows[i].forced is None for i in warm]
        drawn_R = drawn_R.where(torch.tensor(is_free, device=drawn_R.device), tokens_R[warm])
        tokens_R[warm] = drawn_R
        sampled_R[warm] = _at(kept_RV, drawn_R)
    chosen_R = _at(log_probs_RV, tokens_R)
    tops = [
        most_probable(log_probs_RV[i], row.num_top) if row.num_top else ()
        for i, row in enumerate(rows)
    ]
    return list(map(Drawn, tokens_R.tolist(), chosen_R.tolist(), sampled_R.tolist(), tops))


def most_probable(log_probs_V: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return (id, log_prob) of the `count` most probable tokens, equal ones by ascending id."""
    least = log_probs_V.topk(min(count, len(log_probs_V))).values[-1]
    # topk does not define the order of equal values. If all are NaN, as many are returned.
    ids = (~(log_probs_V < least)).nonzero().squeeze(1)
    pairs = zip(ids.tolist(), log_probs_V[ids].tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count])


def _adjusted(
    log_probs_RV: torch.Tensor, rows: Sequence[Draw], num_ids: int | None
) -> torch.Tensor:
    """Return logits with bias, and -inf for excluded ids; the argument itself without either."""
    num_ids = log_probs_RV.shape[-1] if num_ids is None else num_ids
    changed = num_ids < log_probs_RV.shape[-1] or any(r.logit_bias or r.forbidden for r in rows)
    if not changed:
        return log_probs_RV
    scores_RV = log_probs_RV.clone()
    scores_RV[:, num_ids:] = -torch.inf
    for scores_V, row in zip(scores_RV, rows, strict=True):
        for token, bias in row.logit_bias.items():
            scores_V[token] += bias
        if row.forbidden:
            scores_V[sorted(row.forbidden)] = -torch.inf
    return scores_RV


def _sampled(scores_RV: torch.Tensor, rows: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities [R, V] after temperature and truncation, and tokens [R] sampled from
    them."""
    temperature_R1 = _column([row.temperature for row in rows], scores_RV.device)
    # The maximum becomes 0 first, so that a low temperature cannot overflow it.
    peak_R1 = scores_RV.max(-1, keepdim=True).values
    tempered_RV = torch.log_softmax((scores_RV - peak_R1) / temperature_R1, dim=-1)
    kept_RV = torch.log_softmax(truncated(tempered_RV, rows), dim=-1)
    keys = [stream_key(row.seed, row.sample, row.position) for row in rows]
    noise_RV = gumbel(keys, scores_RV.shape[-1], scores_RV.device)
    return kept_RV, (kept_RV + noise_RV).argmax(-1)


def truncated(tempered_RV: torch.Tensor, rows: Sequence[Draw]) -> torch.Tensor:
    """Return tempered log-probabilities with -inf for the tokens that top_k, top_p and min_p
    drop."""
    device, vocab_size = tempered_RV.device, tempered_RV.shape[-1]
    least_R1 = _column([row.min_p for row in rows], device).log()
    least_R1 = least_R1 + tempered_RV.max(-1, keepdim=True).values
    kept_RV = tempered_RV.masked_fill(tempered_RV < least_R1, -torch.inf)
    ranked = [i for i, row in enumerate(rows) if row.top_p < 1 or row.top_k]
    if not ranked:
        return kept_RV
    ordered_QV, ids_QV = tempered_RV[ranked].sort(dim=-1, descending=True, stable=True)
    top_k = [rows[i].top_k or vocab_size for i in ranked]
    beyond_QV = torch.arange(vocab_size, device=device) >= _column(top_k, device)
    mass_QV = ordered_QV.masked_fill(beyond_QV, -torch.inf).exp().cumsum(-1)
    # A token stays while the mass before it has not reached top_p.
    target_Q1 = _column([rows[i].top_p for i in ranked], device) * mass_QV[:, -1:]
    reached_QV = mass_QV.roll(1, -1) >= target_Q1
    reached_QV[:, 0] = False
    dropped_QV = torch.empty_like(beyond_QV).scatter_(1, ids_QV, beyond_QV | reached_QV)
    kept_RV[ranked] = kept_RV[ranked].masked_fill(dropped_QV, -torch.inf)
    return kept_RV


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)


def _at(values_RV: torch.Tensor, tokens_R: torch.Tensor) -> torch.Tensor:
    return values_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
