"""Verdicts in both orders, resumed after a kill, refused where there is nothing to compare."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from salsa.evaluate import judge, statistics
from salsa.judges import reward_model
from salsa.rl import forward
from salsa.workflow import config, runs

NAME, BASELINE = "start_sft0-ref_soup0.50-kl_0.05", "start_sft0-ref_sft0-kl_0.05"


def row(model, prompt_id, gold, texts=("a text",), benchmark="b"):
    return {
        "benchmark": benchmark,
        "prompt_id": prompt_id,
        "category": "",
        "model": model,
        "prompt": ["p"] * len(texts),
        "responses": list(texts),
        "tokens": [3] * len(texts),
        "finish_reasons": ["stop"] * len(texts),
        "reward": 0.0,
        "gold": gold,
    }


def folder(path, rows):
    path.mkdir()
    runs.write_jsonl(path / "responses.jsonl", rows)
    return path


@pytest.fixture
def parents(tmp_path):
    return {
        "candidate": folder(tmp_path / "c", [row("policy", i, gold) for i, gold in enumerate([1.0, 2.0, 3.0])]),
        "baseline/sft0": folder(
            tmp_path / "s",
            [row("sft0", i, gold) for i, gold in enumerate([0.0, 2.05, 4.0])] + [row("soup", 0, 9.0)],
        ),
        f"baseline/{BASELINE}": folder(tmp_path / "p", [row("policy", i, 1.0) for i in range(3)]),
    }


def settings(kind="gold", margin=0.1, **baselines):
    return config.JudgeSettings(
        name=kind,
        judge=config.Judge(kind=kind, tie_margin=margin),
        replicate=1,
        candidate=NAME,
        baselines=baselines or {"sft0": "sft0", BASELINE: "policy"},
    )


def judged(parents, output, **options):
    output.mkdir(exist_ok=True)
    judge.judge(settings(**options), parents, output, config.Execution())
    return statistics.read_verdicts(output / "verdicts.jsonl")


def test_both_orders_of_every_prompt_against_every_baseline(parents, tmp_path):
    verdicts = judged(parents, tmp_path / "out")
    assert len(verdicts) == 2 * 3 * 2
    winners = {v["prompt_id"]: v["winner"] for v in verdicts if v["model_b"] == "sft0" and v["order"] == 1}
    assert winners == {0: "model_a", 1: "tie", 2: "model_b"}
    assert verdicts[0] == {
        "prompt_id": 0, "benchmark": "b", "model_a": NAME, "model_b": "sft0", "order": 0, "winner": "model_a",
        "judge": "gold", "replicate": 1,
    }  # fmt: skip
    found = statistics.compare(verdicts, NAME, "sft0")
    assert (found["adjusted_win_rate"], found["swap_consistency"]) == (0.5, 1.0)


@pytest.mark.parametrize("cut", [0, 1, 40, 400, 1000])
def test_a_killed_run_continues(parents, tmp_path, cut):
    whole = judged(parents, tmp_path / "whole")
    text = (tmp_path / "whole" / "verdicts.jsonl").read_bytes()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "verdicts.jsonl").write_bytes(text[:cut])
    assert judged(parents, tmp_path / "killed") == whole
    assert (tmp_path / "killed" / "verdicts.jsonl").read_bytes() == text


def test_kept_lines_are_not_judged_again(parents, tmp_path):
    first = judged(parents, tmp_path / "out")[0]
    (tmp_path / "out" / "verdicts.jsonl").write_text(json.dumps({**first, "winner": "tie"}) + "\n")
    assert judged(parents, tmp_path / "out")[0]["winner"] == "tie"


def test_vader_reads_the_response_alone_and_averages_turns(tmp_path):
    parents = {
        "candidate": folder(tmp_path / "c", [row("policy", 0, None, ["a lovely day", "a terrible, awful day"])]),
        "baseline/sft0": folder(tmp_path / "s", [row("sft0", 0, None, ["a lovely day", "a day"])]),
    }
    verdicts = judged(parents, tmp_path / "out", kind="vader", margin=0.0, sft0="sft0")
    assert [v["winner"] for v in verdicts] == ["model_b", "model_b"]


def naive_reward(folder, tokenizer, messages, cut):
    """The reward of the last message, read from the classifier that transformers loads, without any padding."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    end = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    constants = runs.read_json(folder / "normalisation.json")
    with torch.no_grad():
        states = classifier.model(input_ids=torch.tensor([ids[: end if cut else end + 1]])).last_hidden_state
        return ((classifier.score(states[0, -1]) - constants["mean"]) / constants["std"]).item()


@pytest.fixture
def told(tmp_path, tokenizer, reward_run):
    """Parents with conversations of one and two turns, some of them cut."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())

    def said(start, length):
        return " ".join(words[start : start + length])

    def rows(model, shift):
        one = row(model, 0, None, [said(shift, 5)])
        two = row(model, 1, None, [said(shift + 3, 4), said(shift + 20, 7)])
        cut = row(model, 2, None, [said(shift + 8, 6)])
        one["prompt"], two["prompt"], cut["prompt"] = [said(50, 4)], [said(60, 3), said(70, 5)], [said(80, 6)]
        cut["finish_reasons"] = ["length"]
        same = row(model, 3, None, [said(5, 4)])
        return [one, two, cut, same]

    candidate, baseline = rows("policy", 100), rows("sft0", 130)
    folders = {"candidate": folder(tmp_path / "c", candidate), "baseline/sft0": folder(tmp_path / "s", baseline)}
    return folders | {"scorer": reward_run}, candidate + baseline


def test_a_reward_model_scores_each_turn_in_its_conversation(told, tokenizer, reward_run, tmp_path):
    parents, rows = told
    found = reward_model.rewards(rows, reward_run, config.Execution(device="cpu", micro_batch=3))
    expected = []
    for one in rows:
        messages, scores = [], []
        for prompt, response, reason in zip(one["prompt"], one["responses"], one["finish_reasons"], strict=True):
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            scores.append(naive_reward(reward_run, tokenizer, messages, reason == "length"))
        expected.append(sum(scores) / len(scores))
    assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) == 7  # all differ but the two that are one response
    verdicts = judged(parents, tmp_path / "out", kind="reward_model", margin=0.0, sft0="sft0")
    for verdict in verdicts:
        a, b = expected[verdict["prompt_id"]], expected[4 + verdict["prompt_id"]]
        assert verdict["winner"] == ("tie" if verdict["prompt_id"] == 3 else "model_a" if a > b else "model_b")


def test_a_response_that_several_rows_share_is_scored_once(told, reward_run, monkeypatch):
    _, rows = told
    sizes, original = [], forward.ScoreModel.scores

    def counted(self, sequences, micro_batch):
        sizes.append(len(sequences))
        return original(self, sequences, micro_batch)

    monkeypatch.setattr(forward.ScoreModel, "scores", counted)
    reward_model.rewards(rows + rows, reward_run, config.Execution(device="cpu"))
    assert sizes == [9]  # of the rows' 2 * 5 turns, one is shared


def test_a_finished_file_is_in_the_order_of_the_comparisons(parents, tmp_path):
    judged(parents, tmp_path / "out")
    path = tmp_path / "out" / "verdicts.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[7:3:-1]))
    judged(parents, tmp_path / "out")
    assert path.read_bytes() == whole
    runs.write_jsonl(path, [{**json.loads(lines[0]), "prompt_id": 99}])
    assert "verdicts.jsonl: holds lines of another run" in refused(parents, tmp_path)


def refused(parents, tmp_path, **options):
    with pytest.raises(runs.UserError) as error:
        judged(parents, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_prompt_is_refused_before_anything_is_written(parents, tmp_path):
    parents["baseline/sft0"] = folder(tmp_path / "less", [row("sft0", i, 0.0) for i in range(2)])
    message = refused(parents, tmp_path)
    assert "1 of the candidate's responses" in message and "b/2" in message
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_named_and_never_a_loss(parents, tmp_path, monkeypatch, score):
    lines = [json.dumps(row("sft0", i, score if i == 1 else 0.0)) + "\n" for i in range(3)]
    parents["baseline/sft0"] = folder(tmp_path / "odd", [])
    (tmp_path / "odd" / "responses.jsonl").write_text("".join(lines))  # as another program writes it
    message = refused(parents, tmp_path)
    assert f"the response of sft0 to b/1 scores {score}" in message
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()
    monkeypatch.setattr(reward_model, "rewards", lambda rows, scorer, execution: [score] * len(rows))
    assert "the response of policy to b/0 scores" in refused(
        parents | {"scorer": tmp_path}, tmp_path, kind="reward_model"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gold": "1.5"}, "the response of policy to b/0 has the gold score '1.5', which is no number"),
        ({"gold": True}, "has the gold score True"),
        ({"responses": []}, ":1: its 'responses' is not a list of texts"),
        ({"responses": [None]}, ":1: its 'responses' is not a list of texts"),
        ({"responses": "text"}, ":1: its 'responses' is not a list of texts"),
        ({"responses": ["a", "b"]}, ":1: has 2 responses to 1 turns"),
        ({"prompt": None}, ":1: its 'prompt' is not a list of texts"),
        ({"prompt_id": [1]}, ":1: its benchmark, prompt_id or model"),
        ({"prompt": ["another"]}, "b/0 is not the prompt that the candidate answered"),
        ({"prompt_id": 1}, ":2: the response of policy to b/1 stands there twice"),
        (None, ":1: has no 'benchmark'"),
    ],
)
def test_rows_that_cannot_be_judged_are_named(parents, tmp_path, changes, words):
    rows = [row("policy", i, 1.0) for i in range(3)]
    rows[0] = rows[0] | changes if changes else {}
    parents["candidate"] = folder(tmp_path / "odd", rows)
    assert words in refused(parents, tmp_path)


def test_missing_model_and_no_gold(parents, tmp_path, monkeypatch):
    assert "no response of model 'sft1'" in refused(parents, tmp_path, sft0="sft1")
    parents["candidate"] = folder(tmp_path / "none", [row("policy", i, None) for i in range(3)])
    assert "has no gold score" in refused(parents, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install vaderSentiment" in refused(parents, tmp_path, kind="vader")
