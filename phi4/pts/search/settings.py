"""The numbers of a search, all in one value.

The decision: a mode is a set of numbers, not a program of its own. So the report's search and ours
run through the same code, and a simulation compares them on the same draws.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from phi4.errors import ConfigError


class SearchMode(StrEnum):
    """Which search.

    `default` finds candidates by a tree and confirms them on fresh completions. `report` is the
    technical report's: a tree with one threshold, nothing confirmed. `thorough` confirms every
    token that can be pivotal.
    """

    DEFAULT = "default"
    REPORT = "report"
    THOROUGH = "thorough"


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a question is searched. p is the chance that an answer becomes right.

    Attributes:
        seed: of all draws.
        screen_rollouts: answers that decide whether a question is searched.
        min_share: and `max_share`: a question is searched where the share of right answers among
            them is in this range.
        max_share: see `min_share`.
        max_ungradable_share: of a question's completions; above it the question is dropped.
        has_tree: whether candidates are found by a tree; otherwise every token up to
            `max_token_probability` is one.
        num_cuts: pieces of equal log-probability that an answer is cut into before the tree.
        node_rollouts: completions of every prefix that the tree measures.
        reuses_rollouts: whether completions that went along with the answer count at the prefixes
            that they went through, so that fewer are drawn there.
        open_gap: a piece is split, and a single token is a candidate, where p differs by so much
            between its ends.
        max_token_probability: a token or piece that the sampler gives more than this is left
            alone: it cannot change p by more than the rest. Above 1 for no such bound.
        confirm_draws: fresh completions with a candidate, and as many without, at most; 0 takes
            every candidate as a pivot.
        block_draws: of them, drawn together.
        min_effect: a pivot changes p by so much as measured.
        alpha: level of a question's confirmed pivots.
        counterpart_trials: completions behind a token that can be a pivot's counterpart.
        counterpart_tokens: so many tokens are drawn after for a pivot that lacks a counterpart.
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
    """The numbers of a mode.

    Raises:
        ConfigError: `alpha` is no level, or `seed` is negative.
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
