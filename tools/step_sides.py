"""The sides of `tools/gpu_step_time.py`: ours, megatron-core's own step, and transformers.

All sides of a run start from the same weights, drawn on the device, and go from the same host
batches to updated weights. transformers keeps bf16 weights and moments, which is less work than the
fp32 master weights and moments of the others.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch

Kind = Literal["cpu", "cuda"]
LEARNING_RATE = 1e-4
_ROWS = """
data.sequence_length=4096 data.unit_tokens=4096 model.max_position_embeddings=4096
batch.global_batch_size=8 batch.micro_batch_size=1 precision.dtype=bf16
"""
_TINY = """
data.sequence_length=64 data.unit_tokens=64 model.max_position_embeddings=64
batch.global_batch_size=2 batch.micro_batch_size=1 precision.dtype=fp32
model.hidden_size=64 model.num_attention_heads=4 model.num_key_value_heads=2
model.intermediate_size=128 model.vocab_size=256
"""
_EVERYWHERE = ("parallel.distributed_optimizer=true", f"optim.learning_rate={LEARNING_RATE}")


class TrainingStep(Protocol):
    """A model with its optimizer on a device."""

    def __call__(self, batches: Sequence) -> float:
        """From host batches to updated weights; the mean loss, once the step has ended."""

    def settings(self) -> dict[str, object]:
        """Return what of the side's library ran, for the row."""

    def close(self) -> None:
        """Leave what the process holds for this model; its memory goes with the last reference."""


@dataclass(frozen=True)
class Side:
    """One of the sides.

    Attributes:
        build: the step from a recipe, the kind of device and this side.
        imports: modules that take long to import, which needs no GPU.
        overrides: overrides of the recipe, on a GPU.
        documents: per row.
        sliced: also measured at a second depth, for the time of a layer.
    """

    build: Callable[[Any, Kind, "Side"], TrainingStep]
    imports: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    documents: int = 1
    sliced: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether phi4's engine runs it."""
        return self.build is Ours


class Ours:
    """`Engine.train_step` of next-token prediction."""

    def __init__(self, recipe: Any, kind: Kind, side: Side) -> None:
        from phi4.engine.engine import Engine
        from phi4.engine.platform import connect
        from phi4.stages.pretrain import NextToken

        platform = connect(kind, threads=recipe.run.threads)
        self.engine = Engine(recipe, platform, draws_weights=False)
        self.engine.read_parameters(draw_weights(recipe, platform.device))
        self.objective = NextToken()

    def __call__(self, batches: Sequence) -> float:
        """See TrainingStep."""
        return self.engine.train_step(batches, self.objective, learning_rate=LEARNING_RATE).loss

    def settings(self) -> dict[str, object]:
        """See TrainingStep."""
        return {choice.op: choice.implementation for choice in self.engine.choices}

    def close(self) -> None:
        """See TrainingStep."""
        from phi4.engine.platform import disconnect

        self.engine.close()
        disconnect()


class Transformers:
    """`Phi3ForCausalLM` and torch's fused AdamW, as they are or as Liger makes them."""

    def __init__(self, recipe: Any, kind: Kind, side: Side) -> None:
        from transformers import Phi3Config, Phi3ForCausalLM

        from phi4.convert.hf_config import hf_config

        self.kind, self.liger = kind, "liger_kernel.transformers" in side.imports
        if self.liger:
            from liger_kernel.transformers import apply_liger_kernel_to_phi3

            apply_liger_kernel_to_phi3()
        torch.set_num_threads(recipe.run.threads)
        dtype = torch.float32 if kind == "cpu" else torch.bfloat16
        settings = hf_config(recipe.model, dtype="bf16", bos_id=0, eos_id=0, pad_id=1)
        settings |= {"pad_token_id": None, "dtype": dtype}
        with torch.device(kind):
            model = Phi3ForCausalLM(Phi3Config(**settings, attn_implementation="sdpa")).to(dtype)
        self.model = model.train()
        self._load(draw_weights(recipe, torch.device(kind)), recipe)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
        )

    def __call__(self, batches: Sequence) -> float:
        """See TrainingStep."""
        num_tokens = sum(batch.labels.size for batch in batches)
        total = torch.zeros((), device=self.kind)
        for batch in batches:
            tokens = torch.from_numpy(batch.tokens).to(self.kind, non_blocking=True)
            labels = torch.from_numpy(batch.labels).to(self.kind, non_blocking=True)
            loss = self._loss(tokens, labels) * (labels.numel() / num_tokens)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()

    def settings(self) -> dict[str, object]:
        """See TrainingStep."""
        return {"attention": "sdpa", "liger": self.liger}

    def close(self) -> None:
        """See TrainingStep."""

    def _loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.liger:  # its fused head takes labels of the tokens themselves and shifts them
            return self.model(tokens, shift_labels=labels, labels=labels, use_cache=False).loss
        logits = self.model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten().long()
        )

    @torch.no_grad()
    def _load(self, weights: Iterator[tuple[str, torch.Tensor]], recipe: Any) -> None:
        from phi4.model.names import to_hf

        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            hf_name, whole = to_hf(name, tensor, recipe.model)
            parameters[hf_name].copy_(whole)


def megatron(recipe: Any, kind: Kind, side: Side) -> TrainingStep:
    """megatron-core's own step; see `tools/stock_megatron.py`."""
    from tools.stock_megatron import StockMegatron

    device = torch.device(kind)
    te = "transformer_engine.pytorch" in side.imports
    return StockMegatron(recipe, kind, draw_weights(recipe, device), te=te)


def draw_weights(recipe: Any, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """(megatron-core's global name, whole fp32 tensor): normal matrices, norms of one."""
    from phi4.model.names import megatron_shapes

    for index, (name, shape) in enumerate(megatron_shapes(recipe.model).items()):
        tensor = torch.ones(shape, device=device)
        if len(shape) > 1:
            generator = torch.Generator(device).manual_seed(index)
            tensor.normal_(0.0, recipe.model.init_std, generator=generator)
        yield name, tensor


def recipe_of(side: Side, kind: Kind, num_layers: int):
    """The recipe of a side: phi-4's width and rows of 4,096 in bf16; small, in fp32, on a CPU."""
    from phi4.config import Recipe, with_overrides

    small = kind == "cpu"
    overrides = [*(_TINY if small else _ROWS).split(), *_EVERYWHERE]
    overrides += [x for x in side.overrides if not small or x.startswith("loss_head.form")]
    return with_overrides(Recipe(), [*overrides, f"model.num_layers={num_layers}"])


def why_absent(side: Side, kind: Kind) -> str | None:
    """Why a side cannot run here; None where it can."""
    for module in side.imports:
        package = module.split(".")[0]
        extra = _EXTRAS.get(package)
        if extra and kind == "cpu":
            return f"{extra} needs a CUDA device"
        if find_spec(package) is None:
            return f"{package} is not installed; run: pip install '{extra or package}'"
    return None


_EXTRAS = {
    "transformer_engine": "transformer-engine[pytorch]>=2.9,<2.12",
    "liger_kernel": "liger-kernel",
}
"""Packages that run on a GPU only, as pip calls them."""
_ENGINE = ("phi4.engine.engine", "phi4.stages.pretrain")
_TRITON = [f"kernels.{x}=triton" for x in ("rope", "rms_norm", "swiglu", "attention")]
_TRITON += ["kernels.cross_entropy=triton"]
_CUDA = [f"kernels.{x}=cuda" for x in ("adamw", "grad_norm")]
_ONE_PASS = ["loss_head.form=one_pass", "loss_head.chunk_tokens=4096"]
_OURS = (*_TRITON, *_CUDA, *_ONE_PASS)
# Every layer in FP8, so that a layer's time can be told from two depths.
_FP8 = ("precision.fp8=te", "precision.fp8_end_layers_in_bf16=0")
_GLUON = (*_TRITON, "kernels.attention=gluon", *_CUDA, *_ONE_PASS)
_PLAIN = tuple(name.split("=")[0] + "=torch" for name in (*_TRITON, *_CUDA))
OURS = "triton, csrc optimizer"
OURS_FP8 = "triton, csrc optimizer, FP8 by TE"
STOCK, STOCK_TE = "megatron-core", "megatron-core + TE"
LIGER = "transformers + liger"
SIDES = {
    OURS: Side(Ours, _ENGINE, _OURS),
    OURS_FP8: Side(Ours, (*_ENGINE, "transformer_engine.pytorch"), (*_OURS, *_FP8)),
    STOCK_TE: Side(megatron, ("transformer_engine.pytorch", "tools.stock_megatron")),
    STOCK: Side(megatron, ("tools.stock_megatron",)),
    "plain torch": Side(Ours, _ENGINE, _PLAIN),
    LIGER: Side(Transformers, ("transformers", "liger_kernel.transformers")),
    "transformers": Side(Transformers, ("transformers",)),
    "gluon attention, csrc optimizer": Side(Ours, _ENGINE, _GLUON, sliced=False),
    "triton, csrc, 16 documents a row": Side(Ours, _ENGINE, _OURS, documents=16, sliced=False),
}
"""By name, the most telling first: where time runs out, the last ones are not timed."""


def import_all(side: Side) -> None:
    """Import what the side needs, which takes seconds and no GPU."""
    for module in (*side.imports, "phi4.config", "tools.step_time"):
        importlib.import_module(module)
