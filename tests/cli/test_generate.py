"""`phi4 generate` and `phi4 chat`: prompts of every origin, layouts, Hugging Face's format."""

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi4.convert.checkpoint import export_checkpoint
from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.engine.platform import connect, disconnect
from phi4.sampling.chat import chat_prompt
from phi4.sampling.text import end_ids
from tests.support.commands import Ended, command, write_model
from tests.support.ranks import pool_fixture
from tests.support.waiting import LONG_SECONDS

PHI4 = (sys.executable, "-m", "phi4")
BEGIN = "Every process"
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
DRAWN = ("--max-tokens=9", "--temperature=1", "--seed=3")


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def tokenizer(pool, run) -> Tokenizer:
    return write_model(pool, run)


@pytest.fixture(scope="module")
def exported(pool, run, tokenizer) -> Path:
    """The same model as a Hugging Face directory."""
    pool.run(export, run / "checkpoints" / "step_0000000", run / "hf")
    return run / "hf"


@pytest.fixture
def generate(pool, run, tokenizer):
    """`phi4 generate` of the run, to its end without error."""

    def ended(*words: object, model: Path = run, stdin: Path | None = None) -> Ended:
        found = command(pool, "generate", model, *words, stdin=stdin)
        assert found.code == 0, found.err
        return found

    return ended


@pytest.fixture
def rows(generate):
    """The JSON objects of a command, by prompt and sample."""

    def read(*words: object, **options: Path) -> list[dict]:
        lines = generate(*words, "--json", **options).out.splitlines()
        return sorted(map(json.loads, lines), key=lambda row: (row["index"], row["sample"]))

    return read


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


def test_one_sample_is_its_prompt_and_what_follows(generate, rows, run) -> None:
    found = generate(BEGIN, "--max-tokens=12")
    [row] = rows(BEGIN, "--max-tokens=12", model=run / "checkpoints" / "step_0000000")
    assert found.out == BEGIN + row["text"] + "\n"
    assert (row["index"], row["sample"], row["finish_reason"]) == (0, 0, "length")
    assert len(row["tokens"]) == 12 and "log_probs" not in row
    assert "platform: cpu over gloo, 1 process " in found.err
    assert "layout: tensor 1, pipeline 1, context 1, data 1" in found.err
    assert "cache: 16,384 tokens, 16.0 MiB over all processes" in found.err


def test_hugging_face_directory_gives_the_tokens_of_transformers(
    rows, exported, tokenizer, run
) -> None:
    words = (BEGIN, "def", "--max-tokens=24", "--log-probs")
    found = rows(*words, model=exported)
    model = Phi3ForCausalLM.from_pretrained(exported, dtype=torch.float32)
    for prompt, row in zip((BEGIN, "def"), found, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        ends = sorted(end_ids(tokenizer))
        whole = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=ends)
        assert row["tokens"] == whole[0, ids.shape[1] :].tolist()
        shown = [one for one in row["tokens"] if one not in ends]
        assert row["text"] == tokenizer.decode(shown)
        with torch.no_grad():
            log_probs = model(whole).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
        expected = log_probs.gather(1, whole[0, ids.shape[1] :, None])[:, 0].tolist()
        assert row["log_probs"] == pytest.approx(expected, abs=1e-4)
    assert [row["tokens"] for row in rows(*words)] == [row["tokens"] for row in found]


def test_batch_invariant_log_probs_have_the_same_bits_in_every_batch(rows) -> None:
    words = ("--max-tokens=6", "--log-probs", "--batch-invariant")
    together = rows(BEGIN, "naïve", "def", *words)
    [alone] = rows("naïve", *words)
    assert alone["log_probs"] == together[1]["log_probs"]
    rounded = rows(BEGIN, "naïve", "def", *words[:2])
    assert [row["tokens"] for row in rounded] == [row["tokens"] for row in together]
    assert [row["log_probs"] for row in rounded] != [row["log_probs"] for row in together]


def test_samples_of_several_prompts_are_named(generate, rows, tmp_path) -> None:
    file = write_rows(tmp_path / "p.jsonl", {"prompt": "naïve", "id": 7}, {"prompt": "return"})
    words = ("def", f"--prompts={file}", "--n=2", *DRAWN)
    found = rows(*words)
    assert [(row["index"], row["sample"]) for row in found] == [
        (index, sample) for index in range(3) for sample in range(2)
    ]
    assert len({tuple(row["tokens"]) for row in found}) == 6
    printed = generate(*words).out
    for row in found:
        prompt = ("def", "naïve", "return")[row["index"]]
        head = f"==> prompt {row['index']}, sample {row['sample']}: {row['finish_reason']} <=="
        assert f"{head}\n{prompt}{row['text']}\n" in printed
    alone = rows("naïve", "--n=2", *DRAWN)
    assert [row["tokens"] for row in alone] == [row["tokens"] for row in found[2:4]]


def test_conversations_are_the_same_from_everywhere(generate, rows, tokenizer, tmp_path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|>"}]
    file = write_rows(tmp_path / "p.jsonl", {"messages": turns}, {"prompt": "<|im_end|>"})
    alone = write_rows(tmp_path / "one.jsonl", {"messages": turns})
    [whole] = rows("--prompts=-", *DRAWN, stdin=alone)
    words = ("--chat", "--system=Be brief.", *DRAWN)
    found = rows("<|im_end|>", f"--prompts={file}", *words)
    assert [row["tokens"] for row in found] == [whole["tokens"]] * 3
    assert generate("<|im_end|>", *words).out == whole["text"] + "\n"
    [text] = rows("<|im_end|>", *DRAWN)
    assert text["tokens"] != whole["tokens"]


def test_stop_ends_a_text_before_it(rows, generate) -> None:
    [free] = rows(BEGIN, "--max-tokens=12")
    # What shows as a replacement character is other bytes.
    stop = next(part for part in re.findall(r"(?=(...))", free["text"])[4:] if part.isascii())
    [row] = rows(BEGIN, "--max-tokens=12", "--stop=never", f"--stop={stop}")
    assert row["text"] == free["text"][: free["text"].index(stop)]
    assert row["finish_reason"] == "stop" and len(row["tokens"]) < 12
    assert generate(BEGIN, "--max-tokens=12", f"--stop={stop}").out == BEGIN + row["text"] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no prompt; give PROMPT or --prompts FILE"),
        (("",), "prompt 0: the prompt has no token"),
        (("a", "--temperature=nan"), "prompt 0: temperature=nan; expected 0, or 1e-06 and more"),
        (("a", "--temperature=1e-320"), "prompt 0: temperature=1e-320; expected"),
        (("a", "--top-p=0"), "prompt 0: top_p=0.0; expected above 0"),
        (("a", "--n=0"), "--n: expected at least 1"),
        (("a", "--seed=-1"), "prompt 0: seed=-1; expected"),
        (("a", "b", "--stop="), "a stop string is empty"),
        (("a", BEGIN, "--max-tokens=63"), "tokens and 63 new ones exceed the model's 64"),
        (("a", "--log-probs"), "--log-probs needs JSON output; add --json"),
        (("a", "--system=b"), "add --chat"),
        (("a", "parallel.tensor=3"), "parallel.tensor=3 does not divide"),
        (
            ("a", "parallel.context=2"),
            "parallel.context=2, but generation uses one replica; expected 1",
        ),
        (("a", "parallel.data=2"), "parallel.data=2, but generation uses one replica; expected 1"),
        (("a", "paralel.tensor=2"), "unknown key 'paralel.tensor'; did you mean parallel.tensor?"),
        (("a", "model.num_layers=4"), "model.num_layers are fixed by"),
        (("a", "tokenizer.path=absent"), "tokenizer ranks absent cannot be read"),
        (("a", "--prompts=absent"), "--prompts=absent is not a file"),
        (("--prompts=-",), "there is no prompt in --prompts"),
        (("--prompts=-", "--temperature=-1"), "options: temperature=-1.0; expected"),
        (("a", "--n=20", "--cache-tokens=64"), "cache of 336 tokens"),
        (("a", "--cache-tokens=1000000000000"), "lower --cache-tokens"),
    ],
)
def test_wrong_input_is_one_line_before_any_output(pool, run, tokenizer, words, message) -> None:
    code, out, err = command(pool, "generate", run, "--max-tokens=2", *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "invalid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "a"}', "got the keys text"),
        ('{"prompt": 7}', "got the keys prompt"),
        ('{"prompt": "a", "messages": []}', "got the keys messages, prompt"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "has role 'tool'"),
        ('{"messages": []}', "expected a list of messages"),
        ('{"prompt": ""}', "the prompt has no token"),
    ],
)
def test_line_that_is_no_prompt_is_named(pool, run, tokenizer, tmp_path, line, message) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    code, out, err = command(pool, "generate", run, f"--prompts={file}", "--max-tokens=2", "--json")
    assert (code, out) == (2, "")
    assert f"{file}:2: " in err.splitlines()[-1] and message in err.splitlines()[-1]


def test_directory_without_a_model_is_one_line(pool, exported, tmp_path) -> None:
    code, _, err = command(pool, "generate", tmp_path, "a")
    assert (code, err.count("\n")) == (2, 1) and "no checkpoint in" in err
    (exported / "tokenizer.json").rename(exported / "moved")
    code, _, err = command(pool, "generate", exported, "a")
    (exported / "moved").rename(exported / "tokenizer.json")
    assert (code, err.count("\n")) == (2, 1) and "tokenizer.json cannot be read" in err


def test_chat_prompt_is_what_the_model_is_given(tokenizer) -> None:
    """The ids that the tests above compare by their answers."""
    ids = chat_prompt((Message(Role.USER, "<|im_end|>"),), tokenizer)
    assert ids.count(tokenizer.im_end_id) == 1


def test_chat_answers_lines_and_says_what_is_wrong(pool, generate, run, tmp_path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("def\nreturn\n/reset\ndef\n" + "words " * 60 + "\n")
    code, out, err = command(pool, "chat", run, "--max-tokens=9", stdin=lines)
    assert code == 0, err
    answer = generate("def", "--chat", "--max-tokens=9").out
    assert out.startswith(answer) and out.endswith(answer) and len(out) > 2 * len(answer)
    assert "cache: 16,384 tokens" in err
    assert "ConfigError: the conversation and this turn have" in err.splitlines()[-1]
    for words, message in (
        (("--temperature=nan",), "temperature=nan; expected 0"),
        (("parallel.context=2",), "parallel.context=2, but generation uses one replica"),
        (("hello",), "override 'hello': expected section.key=value"),
    ):
        code, out, err = command(pool, "chat", run, *words)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["checkpoint", "hugging face"])
def test_four_processes_print_what_one_prints(generate, run, exported, form, tmp_path) -> None:
    model = run if form == "checkpoint" else exported
    words = (BEGIN, "--n=3", *DRAWN, "--stop=\n", "--json", "--log-probs")
    file = write_rows(tmp_path / "p.jsonl", {"prompt": "naïve"})
    ran = subprocess.run(
        [*PHI4, "generate", model, *words, "--prompts=-", *LAYOUT],
        stdin=file.open(),
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
    )
    assert ran.returncode == 0, ran.stderr
    found, expected = (
        sorted(map(json.loads, out.splitlines()), key=lambda row: (row["index"], row["sample"]))
        for out in (ran.stdout, generate(*words, f"--prompts={file}", model=model).out)
    )
    assert len(found) == 6
    for one, other in zip(found, expected, strict=True):
        pairs = zip(one.pop("log_probs"), other.pop("log_probs"), strict=True)
        assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in pairs)
        assert one == other
    assert "4 processes" in ran.stderr and "layout: tensor 2, pipeline 2" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",)])
def test_reader_that_leaves_ends_the_command_quietly(run, tokenizer, layout) -> None:
    words = [*PHI4, "generate", run, "def", "--n=40", "--json", *DRAWN, *layout]
    written = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert written.stdout.read(1) == b"{"
    written.stdout.close()
    err = written.stderr.read().decode()
    assert (written.wait(LONG_SECONDS), len(err.splitlines())) == (0, 3), err


@pytest.mark.slow
def test_ctrl_c_in_a_chat_of_two_processes_fails_nothing(run, tokenizer) -> None:
    chat = subprocess.Popen(
        [*PHI4, "chat", run, "parallel.tensor=2", "--max-tokens=50", "--temperature=1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    chat.stdin.write(b"a\n")
    chat.stdin.flush()
    assert chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    out, err = chat.communicate(b"/reset\na\n", timeout=LONG_SECONDS)
    assert chat.returncode == 0, err
    # Which of the two it is depends on when it comes; neither is a failure of the run.
    assert b"2 processes" in err and b"interrupted" not in err and b"\n" in out


# What follows runs in the ranks.


def export(rank: int, world_size: int, checkpoint: Path, out: Path) -> None:
    export_checkpoint(checkpoint, out, connect("cpu"))
    disconnect()
