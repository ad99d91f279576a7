"""Choose which pivots become pairs: each once, in the requested mixture.

A mixture is exact, to one pair per task, because excess pivots are dropped. None is repeated; the
recipe determines how often a source is read.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phi4.errors import ConfigError
from phi4.pts.pairs.pivot_file import PivotItem


@dataclass(frozen=True)
class MixtureRules:
    """What the pairs are to be like.

    Attributes:
        shares: of the pairs by task, as ratios; without any, tasks keep their own proportions.
        balance: use as many pivots that raise success as pivots that lower it, in every task; and
            equal numbers per task if there are no shares.
        max_pairs: maximum number of pairs; 0 sets no limit.
        seed: seed of the choice of dropped pivots.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    balance: bool = False
    max_pairs: int = 0
    seed: int = 0


def without_repeats(items: Sequence[PivotItem], left_out: Counter[str]) -> list[PivotItem]:
    """Keep each pair of tokens after each prefix once; drop pivots that contradict each other.

    Args:
        items: pivots with both tokens.
        left_out: counts of dropped pivots by reason.
    """
    prefixes = [hashlib.sha256(item.prefix.tobytes()).digest() for item in items]
    keys = [(p, item.chosen, item.rejected) for p, item in zip(prefixes, items, strict=True)]
    known, seen, kept = set(keys), set(), []
    for item, (prefix, chosen, rejected) in zip(items, keys, strict=True):
        if (prefix, rejected, chosen) in known:
            left_out["contradicts another pivot"] += 1
        elif (prefix, chosen, rejected) in seen:
            left_out["duplicate of another pivot"] += 1
        else:
            seen.add((prefix, chosen, rejected))
            kept.append(item)
    return kept


def choose(items: Sequence[PivotItem], rules: MixtureRules) -> list[PivotItem]:
    """Return the pivots of a mixture, in their order.

    Args:
        items: to choose from.
        rules: the requested mixture.

    Raises:
        ConfigError: a share is for a task without pivots, or without pivots that can be balanced.
    """
    strata: defaultdict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        strata[item.task, rules.balance and item.dp > 0].append(index)
    for indices in strata.values():
        indices.sort(key=lambda index: _chance(items[index], rules.seed))
    if not rules.shares and not rules.balance:
        everything = sorted(range(len(items)), key=lambda i: _chance(items[i], rules.seed))
        return [items[i] for i in sorted(everything[: rules.max_pairs or None])]
    available = _available(strata, rules)
    quotas = task_quotas(available, _shares(available, rules), rules.max_pairs)
    kept: list[int] = []
    for task, quota in quotas.items():
        if rules.balance:
            kept += strata[task, True][: quota // 2] + strata[task, False][: quota // 2]
        else:
            kept += strata[task, False][:quota]
    return [items[index] for index in sorted(kept)]


def task_quotas(
    available: Mapping[str, int], shares: Mapping[str, float], max_pairs: int
) -> dict[str, int]:
    """Return the number of pairs per task in the largest mixture with these shares.

    Args:
        available: number of pairs by task, for every task with a share.
        shares: positive, of any sum.
        max_pairs: maximum in total; 0 sets no limit.

    Returns:
        Numbers that each differ from the exact share by less than one.
    """
    total = math.fsum(shares.values())
    wanted = {task: share / total for task, share in shares.items()}
    # Rounded first: 3 / 0.3 is 10 and not 9.
    limits = [math.floor(round(available[task] / share, 9)) for task, share in wanted.items()]
    number = min([*limits, max_pairs] if max_pairs else limits, default=0)
    exact = {task: number * share for task, share in wanted.items()}
    quotas = {task: math.floor(round(value, 9)) for task, value in exact.items()}
    largest = sorted(exact, key=lambda task: (quotas[task] - exact[task], task))
    for task in largest[: number - sum(quotas.values())]:
        quotas[task] += 1
    return quotas


def _available(
    strata: Mapping[tuple[str, bool], Sequence[int]], rules: MixtureRules
) -> dict[str, int]:
    tasks = dict.fromkeys(task for task, _ in strata)
    if not rules.balance:
        return {task: len(strata[task, False]) for task in tasks}
    signs = {task: [len(strata.get((task, sign), ())) for sign in (True, False)] for task in tasks}
    return {task: 2 * min(counts) for task, counts in signs.items()}


def _shares(available: Mapping[str, int], rules: MixtureRules) -> dict[str, float]:
    if not rules.shares:
        return {task: 1.0 for task, count in available.items() if count}
    for task in rules.shares:
        if not available.get(task):
            known = ", ".join(f"{name} {count}" for name, count in available.items()) or "none"
            raise ConfigError(f"--share {task}=...: no pivot has this task; the tasks are {known}")
    return dict(rules.shares)


def _chance(item: PivotItem, seed: int) -> bytes:
    """Return a pseudo-random order of pivots, independent of the order of the files."""
    digest = hashlib.sha256(item.prefix.tobytes())
    digest.update(repr((seed, item.chosen, item.rejected, item.task)).encode())
    return digest.digest()
