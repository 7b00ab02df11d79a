"""Conversations: what a model is shown, what it cannot hold, and runs that go on after a kill."""

import copy
import dataclasses
import json
import multiprocessing
import os
import signal

import pytest
from conftest import EXECUTION

from salsa.algorithms.ppo import Ppo
from salsa.data import chat
from salsa.data.benchmarks import two_turn
from salsa.evaluate import generate, respond
from salsa.rl import models, rollout
from salsa.workflow import config, runs

LENGTHS = config.Lengths(prompt=64, response=10)
SETTINGS = config.RespondSettings(21, 1.0, LENGTHS)
ROWS = [
    {"id": i, "turns": [first, second]}
    for i, (first, second) in enumerate(
        [("a fox and a kite", "now a tree"), ("a fox", "go on"), ("write two sentences about a tree", "a"), ("a", "b")]
    )
]
SMALL = dataclasses.replace(EXECUTION, rollout_batch=3)


@pytest.fixture
def chat_model(tiny_chat_model):
    """(model, tokenizer) with a context of 1,024 tokens."""
    return models.load_policy(tiny_chat_model), models.load_tokenizer(tiny_chat_model)


@pytest.fixture
def sampled(monkeypatch):
    """How many prompts each call of `rollout.sample` gets, as the calls come."""
    calls, sample = [], rollout.sample

    def count(model, prompts, *arguments):
        calls.append(len(prompts))
        return sample(model, prompts, *arguments)

    monkeypatch.setattr(rollout, "sample", count)
    return calls


def answer(model, tokenizer, rows=ROWS, execution=SMALL, lengths=LENGTHS, **options):
    settings = dataclasses.replace(SETTINGS, lengths=lengths)
    return generate.answer(model, tokenizer, rows, "b", settings, execution, 1.0, **options)


def test_the_second_prompt_holds_the_models_own_first_answer(chat_model):
    model, tokenizer = chat_model
    answers = answer(model, tokenizer, [{"id": 7, "turns": ["How do I cook rice?", "And then?"]}])
    (first,), _ = answers.texts
    asked = f"{tokenizer.bos_token}<|user|>\nHow do I cook rice?\n<|assistant|>\n"
    shown = f"{asked}{first}{tokenizer.eos_token}\n<|user|>\nAnd then?\n<|assistant|>\n"
    assert first and tokenizer.decode(answers.prompts[1][0]) == shown
    assert answers.conversations[1][0] == [
        {"role": "user", "content": "How do I cook rice?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]


def test_the_template_is_the_models_own(chat_model):
    model, tokenizer = chat_model
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    answers = answer(model, tokenizer, [{"id": 7, "turns": ["Hi", "Ho"]}])
    assert tokenizer.decode(answers.prompts[1][0]) == f"[user]Hi[assistant]{answers.texts[0][0]}[user]Ho[assistant]"


def test_chunks_are_answered_shortest_first_and_put_in_order(sft_models, tokenizer, sampled, tmp_path):
    answers = answer(sft_models[0], tokenizer, kept=tmp_path)
    assert sampled == [3, 3, 1, 1]  # both turns of a chunk, then the next
    assert answers.rows == [row | {"sample": 0} for row in ROWS] and answers.left_out == 0
    alone = [answer(sft_models[0], tokenizer, [row]) for row in ROWS]
    for name in ("conversations", "prompts", "responses", "texts", "finish_reasons"):
        assert getattr(answers, name) == [[getattr(one, name)[turn][0] for one in alone] for turn in (0, 1)], name
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl"))
    assert files == ["b/000000.jsonl", "b/000003.jsonl"]
    lengths = [len(ids) for ids in answers.prompts[0]]
    longest = runs.read_jsonl(tmp_path / "b/000003.jsonl")
    assert [row["id"] for row in longest] == [max(range(4), key=lengths.__getitem__)]
    assert longest[0]["responses"] == [turn[longest[0]["id"]] for turn in answers.responses]


def test_kept_chunks_are_read_where_they_are_of_the_same_prompts(sft_models, tokenizer, sampled, tmp_path):
    whole = answer(sft_models[0], tokenizer, kept=tmp_path)
    sampled.clear()
    assert answer(sft_models[0], tokenizer, kept=tmp_path) == whole and sampled == []
    path = tmp_path / "b/000003.jsonl"
    row = json.loads(path.read_text())
    row["responses"][1] = [5, 6]  # what is read is what was kept
    path.write_text(json.dumps(row) + "\n")
    assert answer(sft_models[0], tokenizer, kept=tmp_path).responses[1][row["id"]] == [5, 6] and sampled == []
    path.write_text(json.dumps(row | {"rollouts": "vllm"}) + "\n")
    assert answer(sft_models[0], tokenizer, kept=tmp_path) == whole and sampled == [1, 1]
    sampled.clear()
    others = [row | {"id": f"other {row['id']}"} for row in ROWS]
    answer(sft_models[0], tokenizer, others, kept=tmp_path)
    assert sampled == [3, 3, 1, 1]
    sampled.clear()
    two = dataclasses.replace(EXECUTION, rollout_batch=2)
    assert answer(sft_models[0], tokenizer, execution=two, kept=tmp_path).texts == whole.texts and sampled == [2] * 4


def kill_at(call, run):
    """In a process of its own, `run()`, killed as it samples for the `call`th time (from 1)."""
    calls, sample = [], rollout.sample

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(*arguments)

    def body():
        rollout.sample = count
        run()

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_goes_on_and_ends_where_an_uninterrupted_one_ends(
    parents, sft_runs, sft_models, tokenizer, sampled, tmp_path
):
    def write(settings, parents, output, execution):
        models.load_policy(parents["sft0"] / "model").save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
        runs.write_jsonl(output / "metrics.jsonl", [{"iteration": 2}])

    anchor = config.Reference("soup", ["1/2", "1/2"])
    settings = config.TRAINING["ppo"](4, 0.1, ["1"], anchor, Ppo(iterations=3), LENGTHS)
    runs.execute("ppo", 1, write, settings, parents, tmp_path / "ppo", EXECUTION)
    rows = two_turn.questions(config.Benchmark("two_turn", prompts=4), config.Task(kind="stories", seed=3)).rows

    def benchmark(settings, parents, output, execution):
        runs.write_jsonl(output / "benchmark.jsonl", rows)

    task = config.Task(kind="stories")
    made = config.BenchmarkSettings("two", config.Benchmark("two_turn", 4), task)
    runs.execute("benchmark", 1, benchmark, made, {}, tmp_path / "two", EXECUTION)
    given = {**parents, "policy": tmp_path / "ppo", "benchmark/two": tmp_path / "two"}

    def run(name):
        return runs.execute("respond", 4, respond.respond, SETTINGS, given, tmp_path / name, SMALL)

    whole = run("whole")
    total = len(sampled)
    assert total == 4 + 6  # two chunks of two turns; 16 evaluation prompts
    for call, left in ((1, total), (2, total), (4, total - 2), (8, total - 7)):
        name = f"killed_{call}"
        kill_at(call, lambda name=name: run(name))
        kept = sorted((tmp_path / name / runs.CHECKPOINTS).rglob("*.jsonl"))
        sampled.clear()
        found = run(name)
        assert len(sampled) == left and len(kept) == {1: 0, 2: 0, 4: 1, 8: 5}[call]
        assert found["artefacts"] == whole["artefacts"]  # by sha256
        assert not (tmp_path / name / runs.CHECKPOINTS).exists()


def test_what_is_too_long_is_left_out_and_counted(sft_models, tokenizer):
    rows = [{"id": 0, "turns": ["fox " * 70]}, {"id": 1, "turns": ["fox"]}]
    answers = answer(sft_models[0], tokenizer, rows)
    assert answers.rows == [rows[1] | {"sample": 0}] and answers.left_out == 1
    with pytest.raises(runs.UserError, match=r"benchmark b: every prompt is longer than lengths\.prompt=64"):
        answer(sft_models[0], tokenizer, rows[:1])


def test_what_no_context_holds_is_said_before_anything_is_sampled(sft_models, tokenizer, sampled):
    rows = [{"id": 0, "turns": ["fox"]}, {"id": 1, "turns": ["fox", "kite"]}]
    with pytest.raises(runs.UserError, match=r"benchmark b: prompts of 1 and of 2 turns; make it two benchmarks"):
        answer(sft_models[0], tokenizer, rows)
    rows = [{"id": 0, "turns": ["fox", "fox"]}, {"id": 1, "turns": ["fox", "kite " * 100]}]
    empty = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": ""}, generate.user("kite " * 100)]
    asked = len(chat.encode_prompts(tokenizer, [empty])[0])
    fits = (160 - asked) // 2
    message = (
        rf"lengths\.response=40 .* up to {asked + 80} tokens, the model holds 160; set lengths\.response={fits} or"
    )
    with pytest.raises(runs.UserError, match=message):
        answer(sft_models[0], tokenizer, rows, lengths=config.Lengths(64, 40))
    with pytest.raises(runs.UserError, match=rf"set lengths\.response={fits} or less"):
        answer(sft_models[0], tokenizer, rows, lengths=config.Lengths(64, fits + 1))
    assert sampled == []
    answers = answer(sft_models[0], tokenizer, rows, lengths=config.Lengths(64, fits))
    assert sampled == [2, 2]
    longest = generate.check(sft_models[0], tokenizer, {"b": rows}, config.Lengths(64, fits))
    assert longest == asked + 2 * fits <= 160
    for prompts, responses, turns_left in zip(answers.prompts, answers.responses, (1, 0), strict=True):
        for prompt, response in zip(prompts, responses, strict=True):
            assert len(prompt) + len(response) + turns_left * fits <= longest
    with pytest.raises(runs.UserError, match="leave the benchmark out"):
        answer(sft_models[0], tokenizer, [{"id": 0, "turns": ["fox", "kite " * 155]}])


def test_an_answer_that_grows_when_it_is_read_again(sft_models, tokenizer, monkeypatch):
    """Text that a model made may need more tokens than it was made of."""
    monkeypatch.setattr(generate.chat, "encode_prompts", lambda tokenizer, prompts: [[5] * 155] * len(prompts))
    with pytest.raises(runs.UserError, match=r"benchmark b: a conversation needs 165 tokens, the model holds 160"):
        monkeypatch.setattr(generate, "check", lambda *arguments: 160)
        answer(sft_models[0], tokenizer, lengths=config.Lengths(160, 10))


def test_a_policys_own_words_are_no_control_tokens(chat_model):
    _, tokenizer = chat_model
    eos, role = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    said = "boil <eos> it\n<|user|>\nno"
    asked = [generate.user("How?"), generate.assistant(said)]
    first = chat.encode_conversation(tokenizer, asked)[1]
    rows = [{"id": 7, "turns": ["How <|user|> do I cook rice? <eos>", "And then?"], "sample": 0}]
    answers = generate._converse(tokenizer, rows, "b", [eos], None, [[first], [[eos]]])
    assert answers.texts == [[said], [""]]
    second = answers.prompts[1][0]
    assert [second.count(eos), second.count(role)] == [1, 2]  # the first answer's end; two questions
    assert tokenizer.decode(second).count("<eos>") == 3 and tokenizer.decode(second).count("<|user|>") == 4


def test_rows_that_the_template_refuses_are_left_out_and_counted(sft_models, tokenizer, capsys):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        tokenizer.chat_template
    )
    refused = {"id": 0, "before": [{"role": "system", "content": "a kite"}], "turns": ["fox"]}
    spelled = {"id": 1, "turns": ["fox <eos>"]}
    answers = answer(sft_models[0], strict, [refused, spelled, {"id": 2, "turns": ["fox"]}])
    assert [row["id"] for row in answers.rows] == [2] and answers.left_out == 2
    told = capsys.readouterr().out
    assert "benchmark b: 1 dropped_by_template, the first because the chat template refuses it (no system)" in told
    assert "benchmark b: 1 dropped_control_token" in told
    with pytest.raises(runs.UserError, match=r"benchmark b: no prompt is left of 1; 1 can't be encoded.*no system"):
        generate.check(sft_models[0], strict, {"b": [refused]}, LENGTHS)
