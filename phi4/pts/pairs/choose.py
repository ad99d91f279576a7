"""Which pivots become pairs: each once, in the mixture that is asked for.

The decision: a mixture is kept exactly, to one pair per task, by leaving pivots out. None is
repeated; how often a source is read is a matter of the recipe.
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
        shares: of the pairs by task, ratios; without any, tasks keep their own.
        balance: as many pivots that raise success as such that lower it, in every task; and equal
            tasks, where there are no shares.
        max_pairs: at most; 0 sets no limit.
        seed: of what is left out.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    balance: bool = False
    max_pairs: int = 0
    seed: int = 0


def without_repeats(items: Sequence[PivotItem], left_out: Counter[str]) -> list[PivotItem]:
    """Each pair of tokens behind each prefix once; none where two pivots contradict each other.

    Args:
        items: pivots with both tokens.
        left_out: counted by reason.
    """
    prefixes = [hashlib.sha256(item.prefix.tobytes()).digest() for item in items]
    keys = [(p, item.chosen, item.rejected) for p, item in zip(prefixes, items, strict=True)]
    known, seen, kept = set(keys), set(), []
    for item, (prefix, chosen, rejected) in zip(items, keys, strict=True):
        if (prefix, rejected, chosen) in known:
            left_out["contradicts another pivot"] += 1
        elif (prefix, chosen, rejected) in seen:
            left_out["the same as another pivot"] += 1
        else:
            seen.add((prefix, chosen, rejected))
            kept.append(item)
    return kept


def choose(items: Sequence[PivotItem], rules: MixtureRules) -> list[PivotItem]:
    """The pivots of a mixture, in their order.

    Args:
        items: to choose from.
        rules: what is asked for.

    Raises:
        ConfigError: a share is of a task that has no pivot, or none that can be balanced.
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
    """How many pairs of each task make the largest mixture of these shares.

    Args:
        available: pairs by task; of every task with a share.
        shares: positive, of any sum.
        max_pairs: in all; 0 sets no limit.

    Returns:
        Numbers that differ from the shares of their sum by less than one each.
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
            raise ConfigError(f"--share {task}=...: there is no pivot of it; the tasks are {known}")
    return dict(rules.shares)


def _chance(item: PivotItem, seed: int) -> bytes:
    """Orders pivots by chance, whatever the order of the files."""
    digest = hashlib.sha256(item.prefix.tobytes())
    digest.update(repr((seed, item.chosen, item.rejected, item.task)).encode())
    return digest.digest()
