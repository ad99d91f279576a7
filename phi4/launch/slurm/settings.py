"""Environment variables of the ranks, by hardware and layout.

Site-specific variables (network interfaces, NCCL plugins) belong in --setup: wrong guesses here are
slow or do not connect.
"""

from phi4.config import Recipe
from phi4.launch.slurm.request import Setting


def rank_settings(recipe: Recipe, *, on_gpus: bool) -> tuple[Setting, ...]:
    """Return the variables with the reason for each."""
    settings = [
        Setting("PYTHONUNBUFFERED", "1", "Keeps the last output lines of a killed rank."),
        Setting("PYTHONFAULTHANDLER", "1", "A crashing rank prints its stack."),
        Setting("OMP_NUM_THREADS", str(recipe.run.threads), "run.threads of the recipe."),
    ]
    if not on_gpus:
        return tuple(settings)
    settings += [
        Setting(
            "PYTORCH_ALLOC_CONF",
            "expandable_segments:True",
            "Micro-batches of several sizes fragment the allocator's fixed segments.",
        ),
        Setting("NCCL_DEBUG", "WARN", "NCCL logs the link and the peer that failed."),
        Setting(
            "TORCH_FR_BUFFER_SIZE",
            "2000",
            "The last collectives of each rank, dumped when one times out.",
        ),
    ]
    if recipe.parallel.needs_one_queue:
        settings.append(
            Setting(
                "CUDA_DEVICE_MAX_CONNECTIONS",
                "1",
                "Tensor and context parallel: communication is queued before the products that it "
                "overlaps with (Hopper; without effect on Blackwell).",
            )
        )
    return tuple(settings)
