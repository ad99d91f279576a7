"""A server that was asked for: each rank's part in it, and how it ends."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from phi4.cli.command_words import option_words
from phi4.cli.model_ranks import logs_of, on_model_rank
from phi4.launch import StopPlan, WorkerEnvironment, on_ranks, take_notices

if TYPE_CHECKING:
    from phi4.convert.model_source import ModelSource
    from phi4.sampling.local import LocalSampler
    from phi4.serve.server import ServerOptions
    from phi4.serve.traffic import Traffic

_CLOSE_SECONDS = 10.0
"""From the end of the drain to the end of all processes: a last step, and closing connections."""


@dataclass(frozen=True)
class ServedRanks:
    """What a server was asked to be, on the ranks of its layout.

    Attributes:
        source: its model.
        name: what clients call it.
        max_tokens: new tokens of a request that does not say how many.
        cache_tokens: see `phi4.cli.model_ranks.on_model_ranks`.
        batch_invariant: likewise.
        run_dir: whose new checkpoints it takes; None where it keeps its own.
        options: how it is reached.
        no_key: whether other machines may come without a key.
    """

    source: "ModelSource"
    name: str
    max_tokens: int
    cache_tokens: int | None
    batch_invariant: bool
    run_dir: Path | None
    options: "ServerOptions"
    no_key: bool

    def run(self, overrides: list[str]) -> int:
        """Serve on all ranks of the layout until the server is stopped; returns the exit code."""
        return on_ranks(
            [*self.arguments(), "--", str(self.source.path), *overrides],
            self.on_rank,
            num_workers=self.source.recipe.parallel.model_parallel_size,
            work_dir=logs_of("serve"),
            stop=self.stop,
        )

    @property
    def stop(self) -> StopPlan:
        """How it ends."""
        seconds = self.options.drain_seconds
        return StopPlan(
            seconds + _CLOSE_SECONDS,
            first=f"the server ends once open requests are answered, within {seconds:g} s "
            "(--drain-seconds); a second signal ends it at once",
            overdue=f"not ended {_CLOSE_SECONDS:g} s after --drain-seconds={seconds:g}; killed",
            second="ended at once; open requests are cut off",
            by_ctrl_c=True,
        )

    def arguments(self) -> list[str]:
        """The command line of a worker, up to its model."""
        values = {
            "--host": self.options.host,
            "--port": self.options.port,
            "--name": self.name,
            "--max-requests": self.options.max_requests,
            "--max-tokens": self.max_tokens,
            "--cache-tokens": self.cache_tokens,
            "--drain-seconds": self.options.drain_seconds,
            "--batch-invariant": self.batch_invariant,
            "--follow": self.run_dir is not None,
            "--no-key": self.no_key,
        }
        return ["serve", *option_words(values)]

    def on_rank(self, worker: WorkerEnvironment) -> None:
        """One rank's part; the leading rank alone decides when the server ends.

        Collectives: those of `on_model_rank`.
        """
        from phi4.serve.served_model import ServedModel
        from phi4.serve.server import answer_until
        from phi4.serve.web_server import listen

        if worker.rank == 0:
            # Fail on a used port before weights are read. The port is closed again meanwhile, so
            # that early connections are refused instead of waiting without an answer.
            listen(self.options.host, self.options.port).close()
        has_launcher = worker.rendezvous == "directory"
        told = take_notices(
            None if has_launcher else self.stop,
            ends_at_second=worker.rank == 0 and not has_launcher,
        )

        def use(sampler: "LocalSampler") -> None:
            model = ServedModel(
                self.name,
                self.source.tokenizer(),
                sampler.limits,
                int(self.source.path.stat().st_mtime),
                self.max_tokens,
            )
            beside = partial(self._follow, sampler)
            weights = self.source.path.resolve().name
            answer_until(told, sampler, model, weights, self.options, beside)

        on_model_rank(worker, self.source, self.cache_tokens, use, self.batch_invariant)

    def _follow(self, sampler: "LocalSampler", traffic: "Traffic") -> AbstractContextManager[None]:
        if self.run_dir is None:
            return nullcontext()
        from phi4.serve.follow import Weights, follow
        from phi4.serve.server import say

        weights = Weights(
            self.source.path,
            self.source.check_successor,
            lambda checkpoint: sampler.reload(str(checkpoint)),
        )
        return follow(self.run_dir, traffic, weights, say)
