"""Rows of preferences: every form of a pair is the same pair, and what is no pair has a reason."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import phi4.data
from phi4.data.preference.encode import PreferenceDocument, encode_preference
from phi4.data.rows.conversations import read_conversation
from phi4.data.rows.token_ids import Pivots, read_pivots
from phi4.data.vocabulary import chat
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.chat import Conversation, Message, Role, encode_chat
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError

SMALL = Tokenizer(train_bpe(["system user assistant: the cat sat on the mat\n"] * 3, 370))
ROW_TOKENS = 4096
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, str]:
    return turn("user", content)


def assistant(content: str) -> dict[str, str]:
    return turn("assistant", content)


def encode(row: dict, row_tokens: int = ROW_TOKENS) -> PreferenceDocument:
    return encode_preference(row, SMALL, row_tokens)


def content(document: PreferenceDocument) -> tuple:
    return [ids.tolist() for ids in document.sequences], document.loss_mask.tolist()


def forms(question: str, good: str, bad: str) -> dict[str, dict]:
    """One pair in every form."""
    ask, yes, no = user(question), assistant(good), assistant(bad)
    header = encode_chat(Conversation((Message(Role.USER, question),)), SMALL, True).ids
    answers = [[*SMALL.encode(text), SMALL.im_end_id] for text in (good, bad)]
    ranked = [{"rank": 1, "completion": [no]}, {"rank": 0, "completion": [yes]}]
    return {
        "strings": {"prompt": question, "chosen": good, "rejected": bad},
        "lists": {"prompt": [ask], "chosen": [yes], "rejected": [no]},
        "implicit": {"chosen": [ask, yes], "rejected": [ask, no]},
        "mixed": {"prompt": question, "chosen": [ask, yes], "rejected": [ask, no]},
        "repeated": {"prompt": [ask], "chosen": [ask, yes], "rejected": [ask, no]},
        "repeated once": {"prompt": question, "chosen": [ask, yes], "rejected": bad},
        "ranked": {"context": [ask], "completions": ranked},
        "ids": {"prompt_ids": header, "chosen_ids": answers[0], "rejected_ids": answers[1]},
    }


@settings(max_examples=40)
@given(TEXT, TEXT, TEXT)
def test_every_form_of_a_pair_gives_the_same_ids(question: str, good: str, bad: str) -> None:
    if good == bad:
        return
    found = {name: content(encode(row)) for name, row in forms(question, good, bad).items()}
    assert all(value == found["strings"] for value in found.values())
    (chosen, rejected), mask = found["strings"]
    covered = [i for i, m in zip(chosen + rejected, mask, strict=True) if m]
    end = SMALL.im_end_id
    assert covered == [*SMALL.encode(good), end, *SMALL.encode(bad), end]
    assert chosen.count(SMALL.im_start_id) == 2


@pytest.mark.parametrize("before", [[turn("system", "s")], [user("p"), assistant("o")]])
@pytest.mark.parametrize("prompt", ["q", " q\n", [turn("user", "q")]])
def test_turns_before_a_repeated_prompt_are_kept(before: list, prompt: object) -> None:
    sides = {"chosen": assistant("x"), "rejected": assistant("y")}
    whole = {name: [*before, user("q"), answer] for name, answer in sides.items()}
    lists = {"prompt": [*before, user("q")], **{name: [side] for name, side in sides.items()}}
    assert content(encode({"prompt": prompt, **whole})) == content(encode(lists))


def test_answers_of_several_turns_share_what_they_begin_with() -> None:
    shared = [user("q"), assistant("draft"), user("again")]
    row = {
        "prompt": "q",
        "chosen": [*shared, assistant("good")],
        "rejected": [*shared, assistant("bad")],
    }
    (chosen, _), mask = content(encode(row))
    covered = [i for i, m in zip(chosen, mask, strict=False) if m]
    assert SMALL.decode(covered) == "good<|im_end|>"
    explicit = {"prompt": shared[:1], **{k: row[k][1:] for k in ("chosen", "rejected")}}
    (again, _), mask = content(encode(explicit))
    assert again == chosen
    assert SMALL.decode([i for i, m in zip(again, mask, strict=False) if m]).startswith("draft")


@pytest.mark.parametrize("prompt", ["q", [turn("user", "q")]])
def test_completion_that_repeats_the_prompt_is_read_once(prompt: object) -> None:
    expected = read_conversation({"prompt": "q", "completion": "a"})
    repeated = {"prompt": prompt, "completion": [user("q"), assistant("a")]}
    assert read_conversation(repeated) == expected
    other = {"prompt": prompt, "completion": [user("p"), assistant("a")]}
    with pytest.raises(DataError, match="begins with a user turn and does not repeat the prompt"):
        read_conversation(other)


STRINGS = {"prompt": "q", "chosen": "good", "rejected": "bad"}
IDS = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}
TRAJECTORY = {"ids": [5, 6, 7], "pivots": [{"position": 1, "chosen_id": 8, "rejected_id": 9}]}
PIVOT = TRAJECTORY["pivots"][0]
SKIPPED = {"role": "assistant", "content": "", "weight": 0}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**STRINGS, "rejected": "good"}, "chosen and rejected are equal"),
        ({**IDS, "rejected_ids": [7]}, "chosen and rejected have equal token ids"),
        ({**STRINGS, "chosen": ""}, "chosen has an empty answer: turn 1 is ''"),
        ({**STRINGS, "rejected": " \n"}, "rejected has an empty answer"),
        ({**STRINGS, "chosen": [assistant(""), assistant("x")]}, "chosen has an empty answer"),
        ({**STRINGS, "chosen": [SKIPPED]}, "flags exclude all turns of the answer chosen"),
        ({**STRINGS, "chosen": [user("p"), assistant("x")]}, "chosen begins with a user turn"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"chosen": [user("q")], "rejected": [user("q"), assistant("a")]}, "chosen must end"),
        ({"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "no pr"),
        ({"prompt": "q", "answer": "x"}, "no preference: its columns are answer, prompt; expected"),
        ({**STRINGS, **IDS}, "has two preferences, under chosen and chosen_ids"),
        ({**STRINGS, "tools": [{}]}, "uses `tools`"),
        ({"context": [user("q")], "completions": []}, "0 completions; expected exactly two"),
        ({"completions": [{}, {}]}, "expected `context` and `completions`"),
        ({"context": [user("q")], "completions": [{"rank": 0, "completion": "a"}] * 2}, "rank 0"),
        ({"context": [user("q")], "completions": [{"completion": "a"}] * 2}, "completions are "),
        ({**IDS, "chosen_ids": []}, "chosen_ids is empty"),
        ({**IDS, "prompt_ids": []}, "prompt_ids is empty"),
        ({**IDS, "prompt_ids": None}, "lacks `prompt_ids`"),
        ({**IDS, "chosen_ids": [7, SMALL.vocab_size]}, "outside the vocabulary: 370 of 370"),
        ({**IDS, "chosen_ids": [7, -1]}, "outside the vocabulary: -1"),
        ({**IDS, "chosen_ids": [True]}, "expected a list of token ids"),
        ({**IDS, "chosen_ids": "7"}, "expected a list of token ids"),
        ({"prompt_ids": [5], "chosen_id": 7, "rejected_id": 7}, "a pivot has equal ids: 7 twice"),
        ({"prompt_ids": [5], "chosen_id": 7}, "expected integers under position, chosen_id, reje"),
        ({"prompt_ids": [5], "chosen_id": 7, "rejected_id": 400}, "a pivot holds an id outside"),
        ({**TRAJECTORY, "pivots": []}, "expected a list of at least one"),
        ({**TRAJECTORY, "pivots": [PIVOT, {**PIVOT, "chosen_id": 10}]}, "two pivots at one posi"),
        ({**TRAJECTORY, "pivots": [{**PIVOT, "position": 3}]}, "position 3 of 3 tokens"),
        ({**TRAJECTORY, "pivots": [{**PIVOT, "position": -1}]}, "position -1 of 3 tokens"),
        ({**TRAJECTORY, "ids": []}, "ids is empty"),
    ],
)
def test_what_is_no_preference_has_a_reason(row: dict, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(deepcopy(row))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_equal_ids_of_answers_that_differ_in_their_flags_are_refused() -> None:
    answers = [assistant("a"), user("b"), assistant("c")]
    row = {"prompt": "q", "chosen": answers, "rejected": deepcopy(answers)}
    row["rejected"][0]["weight"] = 0
    with pytest.raises(DataError, match="are equal"):
        encode(row)


def test_empty_answer_of_a_conversation_is_refused_where_the_loss_covers_it() -> None:
    for empty in ("", "\t "):
        with pytest.raises(DataError, match=r"has an empty answer: turn 1 is .*; remove"):
            read_conversation({"messages": [user("q"), assistant(empty), user("r")]})
    messages = [user("q"), SKIPPED, user("r"), assistant("a")]
    assert read_conversation({"messages": messages}).has_loss
    prompt = {"prompt": [user("q"), assistant(""), user("r")], "completion": "a"}
    assert read_conversation(prompt).has_loss


def test_pair_fills_a_row_to_the_last_label_and_is_never_cut() -> None:
    labels = encode(STRINGS).num_labels
    assert labels == sum(ids.size - 1 for ids in encode(STRINGS).sequences)
    assert encode(STRINGS, labels).num_labels == labels
    with pytest.raises(DataError, match=f"longer than a row: {labels} labels, but a row has"):
        encode(STRINGS, labels - 1)
    with pytest.raises(DataError, match="longer than a row: 3 labels, but a row has 2"):
        encode(TRAJECTORY, 2)


def test_pivots_in_both_forms() -> None:
    one = {"prompt_ids": [5, 6, 7], "chosen_id": 8, "rejected_id": 9}
    last = {"position": 2, "chosen_id": 8, "rejected_id": 9}
    assert read_pivots(one, 10) == read_pivots({"ids": [5, 6, 7], "pivots": [last]}, 10)
    several = {"ids": [5, 6, 7], "pivots": [last, {**PIVOT, "position": 0, "rejected_id": 7}]}
    assert read_pivots(several, 10) == Pivots((5, 6, 7), (0, 2), (8, 8), (7, 9))
    document = encode(several)
    assert [ids.tolist() for ids in document.sequences] == [[5, 6, 7], [0, 2], [8, 8], [7, 9]]
    assert document.loss_mask is None and document.num_preferences == 2


@pytest.mark.parametrize("changed", ["\n", "<|im_sep|>"])
def test_changed_format_changes_the_ids_and_the_hash(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation((Message(Role.USER, "the"), Message(Role.ASSISTANT, "cat")))
    before, digest = encode_chat(conversation, SMALL).ids, chat.chat_template_sha256()
    added = [SMALL.im_sep_id] if changed.startswith("<") else SMALL.encode(changed)
    end = chat.CHAT_FORMAT.index("{content}")
    monkeypatch.setattr(
        chat, "CHAT_FORMAT", chat.CHAT_FORMAT[:end] + changed + chat.CHAT_FORMAT[end:]
    )
    after = encode_chat(conversation, SMALL).ids
    place = before.index(SMALL.im_sep_id) + 1
    assert after[: place + len(added)] == [*before[:place], *added]
    assert len(after) == len(before) + 2 * len(added)
    assert chat.chat_template_sha256() != digest


def test_examples_of_the_readme_are_read() -> None:
    text = (Path(phi4.data.__file__).parent / "README.md").read_text()
    examples = re.findall(r"^\|.*\| `(\{.*\})` \|$", text, re.M)
    whole = [json.loads(example) for example in examples if "..." not in example]
    assert len(examples) == 7 and len(whole) == 4
    assert [encode(row).kind for row in whole] == ["pairs", "pairs", "pivots", "pivots"]
