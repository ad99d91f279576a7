"""All numbers of a search in one value.

A mode is a set of numbers, not separate code, so that the report's search and ours run through the
same code, and a simulation can compare them on the same samples.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from phi4.errors import ConfigError


class SearchMode(StrEnum):
    """Variant of the search.

    `default` finds candidates by a tree and confirms them on fresh completions. `report` is the
    technical report's: a tree with one threshold, nothing confirmed. `thorough` confirms every
    token that can be pivotal.
    """

    DEFAULT = "default"
    REPORT = "report"
    THOROUGH = "thorough"


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of a question's search. p is the probability that an answer becomes right.

    Attributes:
        seed: seed of all sampling.
        screen_rollouts: answers that decide whether a question is searched.
        min_share: and `max_share`: a question is searched if the fraction of right answers among
            them is in this range.
        max_share: see `min_share`.
        max_ungradable_share: maximum fraction of a question's completions that may be ungradable;
            above it the question is dropped.
        has_tree: whether candidates are found by a tree; otherwise every token up to
            `max_token_probability` is one.
        num_cuts: pieces of equal log-probability that an answer is split into before the tree.
        node_rollouts: completions of every prefix that the tree measures.
        reuses_rollouts: whether completions that follow the answer also count at the prefixes that
            they pass, so that fewer are sampled there.
        open_gap: a piece is split, and a single token is a candidate, if p differs by this much
            between its ends.
        max_token_probability: a token or piece with a higher probability is skipped: it cannot
            change p by more than the remainder. Above 1 for no such bound.
        confirm_draws: maximum fresh completions with a candidate, and as many without; 0 accepts
            every candidate as a pivot.
        block_draws: number of them sampled together.
        min_effect: minimum measured change of p by a pivot.
        alpha: level of a question's confirmed pivots.
        counterpart_trials: minimum completions after a token that can be a pivot's counterpart.
        counterpart_tokens: number of tokens to sample completions for if a pivot lacks a
            counterpart.
    """

    mode: SearchMode = SearchMode.DEFAULT
    seed: int = 0
    screen_rollouts: int = 16
    min_share: float = 0.2
    max_share: float = 0.8
    max_ungradable_share: float = 0.1
    has_tree: bool = True
    num_cuts: int = 9
    node_rollouts: int = 32
    reuses_rollouts: bool = True
    open_gap: float = 0.15
    max_token_probability: float = 0.8
    confirm_draws: int = 96
    block_draws: int = 8
    min_effect: float = 0.2
    alpha: float = 0.1
    counterpart_trials: int = 8
    counterpart_tokens: int = 4


def settings_of(mode: SearchMode, seed: int = 0, alpha: float = 0.1) -> SearchSettings:
    """Return the settings of a mode.

    Raises:
        ConfigError: `alpha` is not a level, or `seed` is negative.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha}; expected a level above 0 and below 1")
    if seed < 0:
        raise ConfigError(f"seed={seed}; expected 0 or more")
    base = SearchSettings(mode=mode, seed=seed, alpha=alpha)
    match mode:
        case SearchMode.REPORT:
            return replace(
                base,
                num_cuts=1,
                node_rollouts=50,
                reuses_rollouts=False,
                open_gap=0.2,
                max_token_probability=2.0,
                confirm_draws=0,
            )
        case SearchMode.THOROUGH:
            return replace(base, has_tree=False, confirm_draws=64)
    return base
