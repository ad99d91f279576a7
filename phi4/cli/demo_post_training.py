"""`phi4 demo --post-training`: from a base model to two rounds of DPO, in `phi4` commands.

The decision: every stage consists of commands that a user would type, and each of them resumes
where it was stopped, so the chain has no state besides their files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from phi4.cli.answers import scored
from phi4.cli.demo_commands import NumberedCommands, RunCommand, moved_recipe, run_phi4
from phi4.pts.score import Estimate, Score, gain
from phi4.pts.select_checkpoint import read_selection
from phi4.rundir.names import SELECTED_FILE

USUAL_OUT = Path("runs/reasoning")
ORACLE = "exact"
RECIPES = "examples/recipes"
SAMPLES = 8
BASE_ANSWERS, JUDGED_ANSWERS, COMPARISONS = 8, 8, 6
"""Answers to a question that fine-tuning and the judge choose from; comparisons of a question."""
_CACHE_TOKENS = 65_536
_ROW_TOKENS = 256
_NUM_COMMANDS = 37
"""Of the chain, which numbers them."""


@dataclass(frozen=True)
class ChainSettings:
    """What a chain is run on.

    Attributes:
        out: directory of everything.
        seed: of data, draws and training.
        num_operators: of an expression.
        precedence_error: of the documents' writer.
        scale: of documents and questions.
        overrides: of all recipes.
        base_overrides: additional ones of the base model's recipe.
    """

    out: Path = USUAL_OUT
    seed: int = 0
    num_operators: int = 3
    precedence_error: float = 0.4
    scale: float = 1.0
    overrides: Sequence[str] = ()
    base_overrides: Sequence[str] = ()

    def data_options(self) -> list[str]:
        """Options of `phi4 data reasoning`, where they are not its defaults."""
        names = {
            "operators": "num_operators",
            "precedence-error": "precedence_error",
            "scale": "scale",
        }
        options = [
            f"--{option}={getattr(self, name)}"
            for option, name in names.items()
            if getattr(self, name) != getattr(ChainSettings, name)
        ]
        return [*options, *self.seed_option()]

    def seed_option(self) -> list[str]:
        """Of every command that draws."""
        return [f"--seed={self.seed}"] if self.seed else []


@dataclass(frozen=True)
class StageFigures:
    """What a stage's model does on the test questions.

    Attributes:
        name: of the stage.
        model: its checkpoint or run.
        sampled: score of answers drawn at temperature 1.
        greedy: score of the likeliest answers.
    """

    name: str
    model: Path
    sampled: Score
    greedy: Score


class PostTraining:
    """The stages; each method runs its commands and returns the resulting model.

    Args:
        settings: of the chain.
        run: runs its commands; `run_phi4` by default.
    """

    def __init__(self, settings: ChainSettings, run: RunCommand | None = None) -> None:
        self._settings = settings
        self._run = run or run_phi4
        self._out = settings.out
        self.data = settings.out / "data"

    def base(self) -> Path:
        """Build the data, and pretrain."""
        settings = self._settings
        self._run(
            "The task: arithmetic modulo 10, by a writer who often computes sums before products.",
            *("data", "reasoning", f"--out={self.data}", *settings.data_options()),
        )
        why = "Pretraining on all that was written, right or wrong."
        self._train(why, "pretrain", *settings.base_overrides)
        return self._out / "base"

    def fine_tuned(self, base: Path) -> Path:
        """Fine-tune on the best of the base model's own answers."""
        answers, rows = self._out / "answers/base_sft.jsonl", self.data / "best_of.jsonl"
        self.draw(
            "The base model answers each question several times.",
            *(base, "sft", answers, BASE_ANSWERS),
        )
        self._run(
            "Of its answers to a question, a right one is kept.",
            *("data", "best-of", f"--answers={answers}", f"--oracle={ORACLE}", f"--out={rows}"),
            f"--ranks={self._ranks}",
        )
        self._run(
            "They become conversations.",
            *("data", "tokenize", rows, f"--out={self.data / 'best_of'}"),
            *(f"--ranks={self._ranks}", "--overwrite"),
        )
        self._train("Supervised fine-tuning.", "sft", f"run.init_from={base}")
        return self.selected(self._out / "sft")

    def pivotal(self, start: Path) -> Path:
        """Search pivotal tokens of a model, and prefer the better one of two."""
        found, rows = self._out / "search", self.data / "pivots.jsonl"
        self._run(
            "Which tokens decide whether an answer becomes right?",
            *("pts", "search", start, f"--questions={self.data / 'search.jsonl'}"),
            *(f"--oracle={ORACLE}", f"--out={found}", *self._drawing()),
        )
        self._run(
            "Each with a token that does better or worse.",
            *("pts", "pairs", found, f"--out={rows}"),
        )
        self.write_pairs(rows)
        return self.preferred("dpo_pivotal", start)

    def judged(self, start: Path) -> Path:
        """Let the oracle judge a model's answers against each other, and prefer the right ones."""
        answers, found = self._out / "answers/judged.jsonl", self._out / "judged"
        self.draw(
            "The model answers other questions several times.",
            *(start, "judge", answers, JUDGED_ANSWERS, "--chat"),
        )
        self._run(
            "A judge compares the answers to a question; here it is the oracle.",
            *("judge", "pairs", f"--answers={answers}", f"--judge=oracle:{ORACLE}"),
            *(f"--out={found}", "pairs.same_model=true", f"pairs.max_per_prompt={COMPARISONS}"),
        )
        self.write_pairs(found / "overall.jsonl", "judged")
        return self.preferred("dpo_judge", start)

    def judged_only(self, start: Path) -> Path:
        """The second round's pairs without the first round."""
        return self.preferred("dpo_judge", start, "dpo_judge_only")

    def write_pairs(self, rows: Path, name: str | None = None) -> None:
        """Make a token file of preferences.

        Args:
            rows: JSON Lines.
            name: of the token file; that of the rows without one.
        """
        self._run(
            "The preferences become a token file.",
            *("data", "pairs", rows, f"--out={self.data / (name or rows.stem)}"),
            *(f"--ranks={self._ranks}", f"--row-tokens={_ROW_TOKENS}", "--overwrite"),
        )

    def preferred(self, recipe: str, start: Path, name: str | None = None, *overrides: str) -> Path:
        """Train a recipe of preferences, in a run of its own where it has a name."""
        words = [f"run.init_from={start}", *overrides]
        if name is not None:
            cache = self._out / f"{name}_reference"
            words += [f"run.dir={self._out / name}", f"data.reference_cache={cache}"]
        recipe_words = self._recipe(recipe, *words)
        self._run("What the model thinks of both sides before.", "dpo", "cache-ref", *recipe_words)
        self._run("Direct preference optimisation.", "train", *recipe_words)
        return self.selected(self._out / (name or recipe))

    def selected(self, run: Path) -> Path:
        """The checkpoint of a run that answers the questions for choosing best."""
        self._run(
            "A loss does not say where to stop: the share of right answers does.",
            *("pts", "select", run, f"--questions={self.data / 'stop.jsonl'}"),
            *(f"--oracle={ORACLE}", f"--n={SAMPLES}", *self._drawing()),
        )
        return Path(read_selection(run / SELECTED_FILE).checkpoint)

    def figures(self, name: str, model: Path, *, chat: bool = True) -> StageFigures:
        """Answer the test questions, and print how many answers are right."""
        label = name.lower().replace(" ", "_").replace("_+_", "_")
        sampled, greedy = (
            self._out / f"answers/test_{label}{how}.jsonl" for how in ("", "_greedy")
        )
        words = ("--chat",) if chat else ()
        self.draw(f"{name} on the test questions.", model, "test", sampled, SAMPLES, *words)
        self._run("How many are right?", "answers", "score", sampled, f"--oracle={ORACLE}")
        likeliest = ("--temperature=0", *words)
        self.draw("Its likeliest answers.", model, "test", greedy, 1, *likeliest)
        return StageFigures(name, model, scored(sampled, ORACLE), scored(greedy, ORACLE))

    def draw(self, why: str, model: Path, questions: str, out: Path, n: int, *words: str) -> None:
        """Draw answers of a model.

        Args:
            why: a line about it.
            model: checkpoint or run.
            questions: name of the set.
            out: file of answers.
            n: answers to each question.
            words: further options.
        """
        self._run(
            why,
            *("answers", "draw", model, f"--questions={self.data / questions}.jsonl"),
            *(f"--out={out}", f"--n={n}", *words, *self._drawing()),
        )

    @property
    def max_tokens(self) -> int:
        """Room for answers that are longer than they should be."""
        count = self._settings.num_operators
        return 2 * count * (count + 1)

    @cached_property
    def _ranks(self) -> Path:
        return self.data / "bpe.tiktoken"

    def _drawing(self) -> list[str]:
        """Options of every command that draws."""
        room = [f"--max-tokens={self.max_tokens}", f"--cache-tokens={_CACHE_TOKENS}"]
        return [*room, *self._settings.seed_option()]

    def _train(self, why: str, recipe: str, *overrides: str) -> None:
        self._run(why, "train", *self._recipe(recipe, *overrides))

    def _recipe(self, name: str, *overrides: str) -> list[str]:
        """A recipe's path and its overrides; later ones count."""
        path, settings = f"{RECIPES}/reasoning_{name}.toml", self._settings
        moved = moved_recipe(path, settings.out, USUAL_OUT)
        seed = [f"run.seed={settings.seed}"] if settings.seed else []
        words: dict[str, str] = {}
        for word in (*moved, *seed, *overrides, *settings.overrides):
            words[word.partition("=")[0]] = word
        return [path, *words.values()]


def run_chain(settings: ChainSettings) -> list[StageFigures]:
    """All stages in order, each measured on the test questions as it ends."""
    chain = PostTraining(settings, NumberedCommands(run_phi4, _NUM_COMMANDS))
    base = chain.base()
    figures = [chain.figures("base", base, chat=False)]
    sft = chain.fine_tuned(base)
    figures.append(chain.figures("SFT", sft))
    first = chain.pivotal(sft)
    figures.append(chain.figures("DPO 1", first))
    second = chain.judged(first)
    figures.append(chain.figures("DPO 1 + 2", second))
    only = chain.judged_only(sft)
    # Where the report's Table 9 has it: before the model that had both rounds.
    figures.insert(-1, chain.figures("DPO 2 only", only))
    return figures


def gains(figures: Sequence[StageFigures]) -> dict[str, Estimate]:
    """How much better each stage of the chain is than the one before it."""
    chain = [one for one in figures if one.name != "DPO 2 only"]
    return {after.name: gain(before.sampled, after.sampled) for before, after in pairwise(chain)}
