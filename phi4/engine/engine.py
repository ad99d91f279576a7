"""The engine's public class: one model in one layout, with plain values as inputs and outputs.

megatron-core is always entered inside `Patches`; callers of this class need not know about it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from phi4_kernels.evidence import KernelEvidence

from phi4.config import Recipe
from phi4.config.fp8_rules import fp8_layers
from phi4.config.gradient_form import check_gradient_form
from phi4.config.te_rules import without_transformer_engine
from phi4.engine import step as steps
from phi4.engine.agreement import Asked, nothing_asked
from phi4.engine.forward_timer import ForwardTimer
from phi4.engine.fp8_check import check_fp8
from phi4.engine.fp8_deviation import FP8Check, FP8Limits
from phi4.engine.layout import Layout, create_layout, destroy_layout
from phi4.engine.model.fp8.device import check_device
from phi4.engine.model.fp8.fallback import use_fp8_in
from phi4.engine.model.fp8.layers import forget_weights
from phi4.engine.model.fp8.te_backend import (
    begin_delayed_scaling,
    check_backend,
    end_delayed_scaling,
    linear_choice,
)
from phi4.engine.model.gpt import (
    build_chunks,
    initialise,
    seed_random_states,
    transformer_config,
)
from phi4.engine.model.host_batch import HostBatch, check_host_batches
from phi4.engine.model.implementations import (
    attention_needs,
    choose,
    unused_ops,
)
from phi4.engine.model.micro_batch import MicroBatches, to_device
from phi4.engine.model.placement import SideStream
from phi4.engine.model.rope import rope_cache
from phi4.engine.model.whole_weights import (
    read_parameters,
    weights_sha256,
    whole_parameters,
)
from phi4.engine.objective import Objective
from phi4.engine.optimizer.adamw import OnePassChain
from phi4.engine.optimizer.build import (
    build_optimizer,
    exact_parameters,
    gather_parameters,
    wrap_data_parallel,
)
from phi4.engine.patches import Patches
from phi4.engine.platform import Platform
from phi4.engine.precision import torch_dtype
from phi4.engine.replay import Replay, replay_step
from phi4.engine.step_values import NO_LIMITS, RowLogProbs, StepResult, UpdateLimits


class Engine:
    """A Phi-4 model in a parallel layout: steps, evaluation, log-probabilities, logits.

    Args:
        recipe: checked against the rules and the world size.
        platform: this process.
        trains: False builds no gradient buffers and no optimizer, and does not use Transformer
            Engine.
        draws_weights: False leaves the weights uninitialised for a checkpoint to be loaded.
        tick: called for every micro-batch that a model chunk processes; must be cheap.
        patches: for tests; the platform's own by default.
        evidence: proof rows of the kernels, the same on every rank; None uses those on each
            machine.

    Raises:
        PlatformError: before any collective, if this process does not support the recipe's FP8.

    Collectives: creation of the process groups, one all-gather of optimizer group names.
    """

    def __init__(
        self,
        recipe: Recipe,
        platform: Platform,
        *,
        trains: bool = True,
        draws_weights: bool = True,
        tick: Callable[[], None] = lambda: None,
        patches: Patches | None = None,
        evidence: KernelEvidence | None = None,
    ) -> None:
        built = recipe if trains else without_transformer_engine(recipe)
        check_device(built.precision, platform.device)
        check_backend(built.precision, platform)
        self.recipe = recipe
        self.platform = platform
        self._tick = tick
        self.forward_timer: ForwardTimer | None = None
        """Measures the forward passes of training while it is set."""
        self.fp8_layers: tuple[int, ...] = tuple(fp8_layers(recipe))
        """Global indices of the layers that currently use FP8; see `leave_fp8`."""
        self._copies = SideStream(platform.device)
        self.patches = patches or Patches(platform.kind)
        self.choices = choose(
            recipe.kernels,
            platform.device,
            recipe.model.head_dim,
            evidence,
            attention_needs(recipe),
            unused_ops(built),
        ) + linear_choice(built.precision)
        with self.patches:
            self.layout: Layout = create_layout(recipe.parallel)
            seed_random_states(recipe.run.seed)
            self.config = transformer_config(built, frees_stage_outputs=platform.kind == "cuda")
            self.bare_chunks = build_chunks(built, self.layout, self.config, self.choices)
            begin_delayed_scaling(self.bare_chunks, self.config)
            if draws_weights:
                initialise(self.bare_chunks, recipe.model, recipe.run.seed, self.layout)
            self.rope_cache = rope_cache(recipe, self.choices, platform.device)
            self.chunks: list[torch.nn.Module] = list(self.bare_chunks)
            self.optimizer: OnePassChain | None = None
            if trains:
                self.chunks = wrap_data_parallel(self.bare_chunks, self.config, recipe, self.layout)
                self.optimizer = build_optimizer(self.chunks, recipe, self.choices)

    @property
    def _updater(self) -> OnePassChain:
        assert self.optimizer is not None, "the engine was built with trains=False"
        return self.optimizer

    def train_step(
        self,
        batches: Sequence[HostBatch],
        objective: Objective,
        *,
        learning_rate: float,
        weight_decay: float | None = None,
        asked: Callable[[], Asked] = nothing_asked,
        limits: UpdateLimits = NO_LIMITS,
        by_group: bool = False,
    ) -> StepResult:
        """Run one update over this data rank's micro-batches; see `step.train_step`.

        Raises:
            ConfigError: before any collective, if loss_head.form does not support the objective.
            DataError: before any collective; see `check_host_batches`.
        """
        has_alternatives = any(batch.alternative_labels is not None for batch in batches)
        gradient = "any" if has_alternatives else objective.gradient
        check_gradient_form(self.recipe.loss_head.form, gradient)
        decay = self.recipe.optim.weight_decay if weight_decay is None else weight_decay
        with self.patches:
            self._set_training(True)
            return steps.train_step(
                self.chunks,
                self._updater,
                self.to_device(batches),
                objective,
                self.layout,
                learning_rate=learning_rate,
                weight_decay=decay,
                asked=asked,
                limits=limits,
                by_group=by_group,
            )

    def replay_step(self, batches: Sequence[HostBatch], objective: Objective) -> Replay:
        """Compute the gradients of a step again, without an update; see `replay.replay_step`."""
        with self.patches:
            self._set_training(True)
            placed = self.to_device(batches)
            return replay_step(self.chunks, self._updater, placed, objective, self.layout)

    def check_fp8(
        self, batches: Sequence[HostBatch], objective: Objective, limits: FP8Limits
    ) -> FP8Check:
        """Compare a micro-batch with FP8 and without it; see `fp8_check.check_fp8`.

        Args:
            batches: this data rank's micro-batches of a step. The first is used; with an
                interleaved pipeline, which processes them in groups, the first group.
            objective: the stage's loss.
            limits: allowed deviations.
        """
        with self.patches, exact_parameters(self.chunks, self._updater):
            self._set_training(True)
            return check_fp8(
                self.chunks,
                self._updater,
                self.to_device(batches[: self.layout.schedule_group]),
                objective,
                self.layout,
                fp8_layers=self.fp8_layers,
                num_layers=self.recipe.model.num_layers,
                limits=limits,
            )

    def leave_fp8(self, layers: Collection[int]) -> None:
        """Let these layers run in precision.dtype from now on, and all others as initially.

        Args:
            layers: global layer indices from 0; in a run, the same on every rank.

        Collectives: with fp8_param_gather those of `gather_parameters`.
        """
        if self.recipe.parallel.fp8_param_gather:
            # Layers that leave it multiply by their weights, not by casts of them.
            self._gather_parameters()
        self.fp8_layers = tuple(one for one in fp8_layers(self.recipe) if one not in layers)
        use_fp8_in(self.bare_chunks, self.fp8_layers)

    def evaluate(
        self,
        batches: Sequence[HostBatch],
        objective: Objective,
        *,
        asked: Callable[[], Asked] = nothing_asked,
    ) -> StepResult:
        """Evaluate the objective over this data rank's micro-batches, without gradients."""
        with self.patches:
            self._set_training(False)
            local = self.to_device(batches)
            return steps.evaluate(self.chunks, local, objective, self.layout, asked=asked)

    def logits(self, batches: Sequence[HostBatch]) -> list[torch.Tensor]:
        """Return logits [B, S, V] per micro-batch on the last stage; elsewhere an empty list.

        Collectives: those of `step.logits`.
        """
        with self.patches:
            self._set_training(False)
            return steps.logits(self.chunks, self.to_device(batches), self.layout)

    def log_probs(self, batches: Sequence[HostBatch]) -> list[RowLogProbs]:
        """Return log-probabilities of the labels per micro-batch, without gradients, in any layout.

        Rows are packed, split and masked as in training. Every rank of a data replica gets the same
        values of complete rows.

        Args:
            batches: this data rank's batches, of one shape; their loss masks are ignored.

        Raises:
            DataError: before any collective; see `check_host_batches`.

        Collectives: those of `step.log_probs`.
        """
        if not batches:
            return []
        filled = [*batches, *[batches[-1]] * (-len(batches) % self.layout.schedule_group)]
        with self.patches:
            self._set_training(False)
            found = steps.log_probs(self.chunks, self.to_device(filled), self.layout)
        return [RowLogProbs.of(log_probs) for log_probs in found[: len(batches)]]

    def to_device(self, batches: Sequence[HostBatch]) -> MicroBatches:
        """Return host batches as this rank's slices on its device, each copied when it is needed.

        Raises:
            DataError: see `check_host_batches`.
        """
        recipe = self.recipe
        check_host_batches(batches, recipe.model.vocab_size)
        move = partial(
            to_device,
            layout=self.layout,
            model=recipe.model,
            dtype=torch_dtype(recipe.precision),
            device=self.platform.device,
            rope_cache=self.rope_cache,
        )
        return MicroBatches(batches, move, self._tick, self.forward_timer, self._copies)

    def whole_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (global name, full tensor) of this pipeline stage, the same on every tensor rank.

        Collectives: one all-gather over tp per split tensor.
        """
        self._gather_parameters()
        yield from whole_parameters(self.bare_chunks, self.layout)

    def weights_sha256(self) -> dict[str, str]:
        """Return the sha256 of every full tensor by global name, the same on every rank and in any
        layout.

        Collectives: those of `whole_parameters`; one all-gather of names and hashes over pp.
        """
        return weights_sha256(self.whole_parameters(), self.layout.groups.pp)

    def load_whole_parameters(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Load this stage's parameters from full tensors by global name; missing names raise."""
        self.read_parameters(whole.items())

    @torch.no_grad()
    def read_parameters(self, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load this stage's parameters from a stream of full tensors, none of which is kept.

        Args:
            stream: (global name, full tensor), in any order; those of other stages are skipped.

        Raises:
            KeyError: the stream lacks parameters of this stage.
        """
        read_parameters(stream, self.bare_chunks, self.layout)
        if self.optimizer is not None:
            with self.patches:
                self.optimizer.reload_model_params()

    def close(self) -> None:
        """Destroy megatron-core's process groups."""
        with self.patches:
            end_delayed_scaling(self.config)
            destroy_layout()

    def _gather_parameters(self) -> None:
        with self.patches:
            gather_parameters(self.chunks, self.optimizer)

    def _set_training(self, training: bool) -> None:
        if not training and self.recipe.parallel.fp8_param_gather:
            self._gather_parameters()
        for chunk in self.chunks:
            chunk.train(training)
        # Weights change only between two calls of the engine.
        forget_weights(self.bare_chunks)
