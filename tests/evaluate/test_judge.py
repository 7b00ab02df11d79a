"""Verdicts in both orders, resumed after a kill, refused where there is nothing to compare."""

import json
import sys

import pytest

from salsa import config, runs
from salsa.evaluate import judge, statistics

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


def refused(parents, tmp_path, **options):
    with pytest.raises(runs.UserError) as error:
        judged(parents, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_prompt_is_refused_before_anything_is_written(parents, tmp_path):
    parents["baseline/sft0"] = folder(tmp_path / "less", [row("sft0", i, 0.0) for i in range(2)])
    message = refused(parents, tmp_path)
    assert "1 of the candidate's prompts" in message and "b/2" in message
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()


def test_missing_model_unknown_judge_and_no_gold(parents, tmp_path, monkeypatch):
    assert "no response of model 'sft1'" in refused(parents, tmp_path, sft0="sft1")
    assert "is no judge" in refused(parents, tmp_path, kind="oracle")
    parents["candidate"] = folder(tmp_path / "none", [row("policy", i, None) for i in range(3)])
    assert "has no gold score" in refused(parents, tmp_path)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    assert "pip install vaderSentiment" in refused(parents, tmp_path, kind="vader")
