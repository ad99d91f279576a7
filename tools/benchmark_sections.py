"""The sections of BENCHMARKS.md: one per file under benchmarks/, but for the kernels' rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tools import benchmark_lines as lines
from tools.benchmark_lines import Line, Row


@dataclass(frozen=True)
class Section:
    """The table of one file of rows."""

    title: str
    file: str
    """Under benchmarks/."""
    command: str
    """What writes the rows."""
    about: str
    lines: Callable[[Row], Iterable[Line]]
    """Of one row, without its commit."""
    keys: tuple[str, ...] = ()
    """What tells cases apart; of each the newest row is shown."""

    def newest(self, rows: Iterable[Row]) -> list[Row]:
        """The newest row of each case, in the order in which cases first appeared."""
        return list({tuple(repr(row.get(key)) for key in self.keys): row for row in rows}.values())


GPU = (
    Section(
        "Training steps on a GPU",
        "gpu_step_time.jsonl",
        "python -m tools.gpu_step_time",
        "A slice of phi-4's layers with its whole vocabulary, against plain torch and transformers "
        "with Liger, whose weights and moments are bf16.",
        lines.gpu_step,
        ("device", "side", "num_layers", "row_tokens", "documents_per_row"),
    ),
    Section(
        "The engine on a GPU against the CPU",
        "gpu_engine.jsonl",
        "python -m tools.gpu_engine",
        "The same training on both; the largest relative difference of a step's loss.",
        lines.gpu_engine,
        ("device", "case"),
    ),
)
TRAINING = (
    Section(
        "Layouts against one process",
        "parity.jsonl",
        "make prove-parity",
        "Losses and weights of every layout of tensor, pipeline, context and data ranks, fp32.",
        lines.parity,
    ),
    Section(
        "Step time against transformers",
        "step_time.jsonl",
        "make prove-step-time",
        "One process, one thread, the same model and batch.",
        lines.step_time,
        ("documents_per_row", "num_key_value_heads", "threads"),
    ),
    Section(
        "Step time of a change",
        "step_time_before.jsonl",
        "python -m tools.step_time_before",
        "A commit against an earlier one.",
        lines.step_time_before,
        ("before", "after", "dtype", "tensor"),
    ),
    Section(
        "FP8 against bf16",
        "fp8.jsonl",
        "make prove-fp8",
        "Losses of a small model on the CPU, whose FP8 products are torch's `_scaled_mm`.",
        lines.fp8,
        ("recipe", "fp8_recipe"),
    ),
    Section(
        "The FP8 canary",
        "fp8_canary.jsonl",
        "make prove-fp8-canary",
        "Healthy runs leave no layer; a harmed one leaves FP8 where it was harmed; the cost.",
        lines.fp8_canary,
        ("case", "fp8_recipe", "choices", "seed"),
    ),
    Section(
        "Guards of a step",
        "guard_cost.jsonl",
        "make prove-guard-cost",
        "What the numerics guard costs a step, one thread.",
        lines.guard,
    ),
    Section(
        "Asynchronous checkpoints",
        "async_save.jsonl",
        "make prove-async-save",
        "How long training waits for an asynchronous save and for a synchronous one.",
        lines.async_save,
    ),
    Section(
        "Host time of a kernel's call",
        "host_time.jsonl",
        "make prove-host-time",
        "What Python does before a launch, which is left out; torch computes a few numbers.",
        lines.host_time,
    ),
)
ALIGNMENT = (
    Section(
        "A DPO step in one forward",
        "dpo_one_forward.jsonl",
        "python -m tools.dpo_one_forward",
        "All pivots of a trajectory in one row, against two sequences per pivot.",
        lines.one_forward,
    ),
    Section(
        "Post-training in miniature",
        "post_training.jsonl",
        "make prove-post-training",
        "Share of right answers to held-out questions after each stage, with its standard error.",
        lines.post_training,
        ("task", "seed", "measured"),
    ),
    Section(
        "Pivotal tokens against known truth",
        "pts_simulation.jsonl",
        "make prove-pts-simulation",
        "Searches of answers whose probability of success is known at every token; shares of the "
        "pivots found.",
        lines.pts,
        ("regime", "method", "seed"),
    ),
    Section(
        "Do small runs rank mixtures as large ones do",
        "sweep.jsonl",
        "make prove-sweep",
        "Final losses of mixtures at two scales; `garbage`, shuffled tokens, has to be last.",
        lines.sweep,
        ("sweep",),
    ),
)
DATA_AND_SERVING = (
    Section(
        "First batch and throughput of the data stream",
        "data_startup.jsonl",
        "python -m tools.data_startup",
        "One process.",
        lines.startup,
        ("case",),
    ),
    Section(
        "Tokenizing",
        "data_tokenize.jsonl",
        "python -m tools.tokenize_speed",
        "`phi4 data tokenize`, files included, over other tokenizing on the same machine.",
        lines.tokenize,
        ("cores_used", "megabytes"),
    ),
    Section(
        "Generation against transformers",
        "generation.jsonl",
        "make bench-generation",
        "One thread, a small model.",
        lines.generation,
    ),
    Section(
        "Serving under load",
        "serve_load.jsonl",
        "make prove-serve-load",
        "`phi4 serve` with well-behaved and ill-behaved clients; medians.",
        lines.serve,
        ("streams",),
    ),
)
OPERATION = (
    Section(
        "The demo",
        "demo.jsonl",
        "make demo",
        "Data, training, a resumption in another layout, text, parity.",
        lines.demo,
    ),
    Section(
        "Fresh machines",
        "fresh.jsonl",
        "make prove-fresh",
        "README's commands in a bare Debian.",
        lines.fresh,
        ("debian", "torch_build"),
    ),
    Section(
        "Faults",
        "faults.jsonl",
        "python -m tools.fault_table",
        "What a fault costs a run; [docs/faults.md](docs/faults.md) explains the exit codes.",
        lines.fault,
        ("fault",),
    ),
    Section(
        "Disturbed Slurm jobs",
        "slurm_cases.jsonl",
        "make prove-slurm",
        "On a real Slurm of two nodes on one machine.",
        lines.slurm,
        ("case",),
    ),
    Section(
        "MLflow on a bad server",
        "tracking.jsonl",
        "make prove-tracking",
        "A server that is slow or dies, killed runs: read back and compared with metrics.jsonl. "
        "Last, what tracking costs training.",
        lines.tracking,
        ("case",),
    ),
    Section(
        "Damaged checkpoints",
        "checkpoint_fuzz.jsonl",
        "make prove-checkpoints",
        "None may execute anything, each ends in one line.",
        lines.fuzz,
        ("seed", "mutants"),
    ),
    Section(
        "Proofs",
        "proofs.jsonl",
        "make prove-<name>",
        "The long checks that `make test` leaves out, as they last ran.",
        lines.proof,
        ("proof",),
    ),
)
CHAPTERS = (
    ("Training", TRAINING),
    ("Alignment and data mixtures", ALIGNMENT),
    ("Data, generation and serving", DATA_AND_SERVING),
    ("Operation", OPERATION),
)
