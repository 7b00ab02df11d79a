"""What is made of a row's values: parts, roles, calls of tools, what can't be seen, what is refused with the form."""

from collections import Counter

import pytest

from salsa.data import messages
from salsa.data.worlds import ultra
from salsa.workflow.runs import UserError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "x"}


def told(*conversation):
    return ultra.conversation({"messages": list(conversation)})


def part(text, kind="text", **more):
    return {"type": kind, "text": text, **more}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([part("a"), part(" b", image_url=None)], "a b"),
        (["a", part("b", "input_text"), part("c", "output_text"), {"text": "d"}, part("e", None)], "abcde"),
        ([{"type": "thinking", "thinking": "hm"}, part("a")], "a"),
    ],
)
def test_parts_become_one_text(content, expected):
    assert told(USER, {**ANSWER, "content": content})["messages"][1]["content"] == expected
    assert ultra.evaluation_prompt({"prompt": [{**USER, "content": content}]})["prompt"][0]["content"] == expected


def test_a_developer_is_the_system():
    """OpenAI's newer name of the role; templates know the older one."""
    assert told({"role": "developer", "content": "be brief"}, USER, ANSWER)["messages"][0]["role"] == "system"


def test_thoughts_are_left_out_and_counted():
    left_out = Counter()
    row = {"messages": [USER, {**ANSWER, "content": [{"type": "thinking", "thinking": "hm"}, part("a")]}]}
    assert ultra.conversation(row, left_out)["messages"] == [USER, {**ANSWER, "content": "a"}]
    assert left_out == {"thinking": 1}


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([USER, {**ANSWER, "content": None}], "no_text"),
        ([USER, {**ANSWER, "content": float("nan")}], "no_text"),  # pandas writes null so
        ([USER, {"role": "assistant", "tool_calls": [{"id": 1}]}], "tool_calls"),
        ([USER, {**ANSWER, "content": None, "tool_calls": [{"id": 1}]}], "tool_calls"),
        ([USER, {**ANSWER, "function_call": {"name": "f"}}], "tool_calls"),
        ([USER, {"role": "tool", "content": "r"}, ANSWER], "tool_calls"),
        ([USER, {"role": "function", "name": "f", "content": "r"}, ANSWER], "tool_calls"),
        (
            [{**USER, "content": [part("what is this?"), {"type": "image_url", "image_url": "u"}]}, ANSWER],
            "not_only_text",
        ),
        ([{**USER, "content": "cut \ud83d"}, ANSWER], "half_surrogate"),
        ([{**USER, "content": []}, ANSWER], "empty"),
        ([USER, {**ANSWER, "content": "\u200b"}], "empty"),
        ([], "empty"),
        ([{"role": "system", "content": "be"}, ANSWER], "no_answer"),
        ([{"role": "system", "content": "be"}], "no_answer"),
    ],
)
def test_what_is_dropped_and_why(conversation, reason):
    assert told(*conversation) == reason


def test_other_keys_of_a_message_are_left_out():
    named = [
        {**USER, "name": "kim", "weight": 1},
        {**ANSWER, "tool_calls": None, "function_call": None, "refusal": None},
    ]
    assert told(*named) == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "int; it is a list of"),
        ("text", "'text'; it is a list of"),
        (["text"], "'text'; it is a list of"),
        ([{"from": "human", "value": "q"}], "a message without 'role' (from, value)"),
        ([{"role": "human", "content": "q"}], "the role 'human'; it is a list of"),
        ([{"role": "User", "content": "q"}], "the role 'User'"),
        ([{"role": None, "content": "q"}], "a message without 'role'"),
        ([{"role": "user"}], "a message without 'content' (role)"),
        ([{"role": "user", "content": 3}], "int; it is"),
        ([{"role": "user", "content": {"text": "q"}}], "dict; it is"),
        ([{"role": "user", "content": [3]}], "int; it is"),
        ([{"role": "user\n\x1b[31m", "content": "q"}], "the role"),
    ],
)
def test_what_is_refused_with_the_form(value, message):
    with pytest.raises(UserError) as error:
        ultra.conversation({"messages": value})
    assert str(error.value).startswith("'messages' has the wrong form: ") and message in str(error.value)
    assert '"role": "user", "assistant" or "system"' in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "text", ["", " \n\t", "\u200b\ufeff", "\u00a0", "\x00\x1b", "\u2028", "\u202e", "\u2800", "\ufe0f\u3164"]
)
def test_blank(text):
    assert messages.blank(text)
    pair = {"prompt": text, "chosen": "x", "rejected": "y"}
    assert ultra.preference(pair) == ultra.preference(pair | {"prompt": "q", "chosen": text}) == "empty"


@pytest.mark.parametrize("text", [".", "é", "\u200bx", "👍", "\u202eab", "\U000f1234"])
def test_not_blank(text):
    assert not messages.blank(text)


def test_metadata_in_any_form():
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    scores = '{"score_chosen": 7, "score_rejected": 7.0}'
    for metadata in (
        None,
        "text",
        "[1]",
        [1],
        3,
        "[" * 100_000,
        {"score_chosen": None},
        {"score_chosen": float("nan")},
    ):
        assert ultra.preference(pair | {"metadata": metadata})["chosen"] == [{"role": "assistant", "content": "x"}]
    assert ultra.preference(pair | {"metadata": scores}) == "tie"
    assert ultra.preference(pair | {"metadata": scores, "score_chosen": 8}) != "tie"
