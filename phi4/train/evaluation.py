"""Held-out loss: the same documents at every evaluation, never trained on."""

from collections.abc import Mapping, Sequence

from phi4.config import Recipe
from phi4.data.stream.loader import HeldOut
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.engine.step_values import StepResult
from phi4.train.hooks import Hook, Progress
from phi4.train.reliability.phases import Phases
from phi4.train.reliability.requests import Requests


class HeldOutLoss(Hook):
    """Measures `held_out_loss`, and `held_out_loss/NAME` for each source of `data.held_out`.

    The total weights all tokens, or pairs, equally. Other metrics of the objective are reported in
    the same way, for example `held_out_rewards/accuracies`.

    An evaluation during which the run is asked to stop is abandoned, without a record of its
    numbers.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        objective: Objective,
        sources: Mapping[str, HeldOut],
        requests: Requests,
        phases: Phases,
    ) -> None:
        self._recipe = recipe
        self._engine = engine
        self._objective = objective
        self._sources = sources
        self._requests = requests
        self._phases = phases

    def measure(self, progress: Progress) -> dict[str, float]:
        """Evaluate when it is due."""
        if not progress.is_due(self._recipe.evaluation.every):
            return {}
        with self._phases.during("evaluate", progress.step):
            return self.evaluate()

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics per source and in total; empty without held-out sources or if abandoned.

        Collectives: those of `Engine.evaluate`.
        """
        by_source = {name: self._results(held_out) for name, held_out in self._sources.items()}
        if self._requests.agreed.stops:
            return {}
        total = _means([result for results in by_source.values() for result in results])
        means = {f"held_out_{name}": value for name, value in total.items()}
        for source, results in by_source.items():
            means |= {f"held_out_{name}/{source}": value for name, value in _means(results).items()}
        return means

    def _results(self, held_out: HeldOut) -> list[StepResult]:
        batch, layout = self._recipe.batch, self._engine.layout
        batches = held_out.batches(
            self._recipe.evaluation.batches,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
        results: list[StepResult] = []
        for step in batches:
            if self._requests.agreed.stops:
                break
            asked = self._requests.asked
            results.append(self._engine.evaluate(step, self._objective, asked=asked))
            self._requests.learn(results[-1])
        return results


def _means(results: Sequence[StepResult]) -> dict[str, float]:
    """Weighted means of loss and metrics over evaluations; empty if the total weight is 0."""
    weight = sum(result.weight for result in results)
    if not weight:
        return {}
    names = results[0].metrics
    means = {name: sum(r.metrics[name] * r.weight for r in results) / weight for name in names}
    return {"loss": sum(r.loss * r.weight for r in results) / weight} | means
