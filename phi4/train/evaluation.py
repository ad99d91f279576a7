"""Held-out loss: the same documents at every evaluation, never trained on."""

from collections.abc import Mapping

from phi4.config import Recipe
from phi4.data.stream.loader import HeldOut
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.train.hooks import Hook, Progress


class HeldOutLoss(Hook):
    """Measures `held_out_loss`, and `held_out_loss/NAME` for each source of `data.held_out`.

    The total weighs every token alike.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        objective: Objective,
        sources: Mapping[str, HeldOut],
    ) -> None:
        self._recipe = recipe
        self._engine = engine
        self._objective = objective
        self._sources = sources

    def measure(self, progress: Progress) -> dict[str, float]:
        """Evaluate when it is due."""
        return self.evaluate() if progress.is_due(self._recipe.evaluation.every) else {}

    def evaluate(self) -> dict[str, float]:
        """Loss per source and over all; empty without held-out sources.

        Collectives: those of `Engine.evaluate`.
        """
        losses, loss_sum, weight_sum = {}, 0.0, 0.0
        for name, held_out in self._sources.items():
            source_sum, source_weight = self._totals(held_out)
            if source_weight:
                losses[f"held_out_loss/{name}"] = source_sum / source_weight
            loss_sum, weight_sum = loss_sum + source_sum, weight_sum + source_weight
        return {"held_out_loss": loss_sum / weight_sum, **losses} if weight_sum else {}

    def _totals(self, held_out: HeldOut) -> tuple[float, float]:
        batch, layout = self._recipe.batch, self._engine.layout
        batches = held_out.batches(
            self._recipe.evaluation.batches,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
        results = [self._engine.evaluate(step, self._objective) for step in batches]
        return sum(r.loss * r.weight for r in results), sum(r.weight for r in results)
