"""Records of worlds and benchmarks, and a benchmark that is scored and not compared, from its rows to its scores."""

import dataclasses

import pytest
import torch

from salsa import data
from salsa.data import benchmark, prepare
from salsa.data.worlds import stories
from salsa.evaluate import generate, judge, score
from salsa.workflow import compose, config, plan, runs

TASK = config.Task(kind="stories", demonstrations=4, validation=2, preferences=3, prompts=3, evaluation=2)


def sums(benchmark, task):
    """Questions whose answers are known."""
    rows = [
        {"id": f"sums-{i}", "turns": [f"{i} + 1 = ?"], "category": "sums", "reference": [str(i + 1)]} for i in range(3)
    ]
    return data.Questions(rows, len(rows))


def exact(responses, row):
    return {"exact": responses == row["reference"], "length": len(responses[0])}


class Rewards:
    """A reward model to which all answers are worth nothing."""

    def parameters(self):
        return iter([torch.zeros(1)])

    def scores(self, batch, micro_batch):
        return torch.zeros(2)


@pytest.fixture
def toy(monkeypatch):
    made = data.Benchmark(kind="sums", questions=sums, compared=False, score=exact)
    known = data.benchmark_kinds()
    monkeypatch.setattr(data, "benchmark_kinds", lambda world=None: {**known, "sums": made})


def test_kinds_are_found_by_their_files():
    assert {"reviews", "stories", "ultra"} <= set(data.world_kinds())
    assert {"in_distribution", "out_of_distribution", "two_turn"} <= set(data.benchmark_kinds("stories"))
    assert "openings" not in data.benchmark_kinds("stories")
    assert {name for kind in data.world_kinds() for name in data.benchmark_kinds(kind)} == set(data.benchmark_kinds())
    for kind, record in (data.world_kinds() | data.benchmark_kinds()).items():
        assert record.kind == kind


def test_a_benchmark_that_nothing_is_said_of_is_none():
    with pytest.raises(ValueError, match="neither compared nor scored"):
        data.Benchmark(kind="sums", questions=sums, compared=False)


def test_a_benchmark_that_is_scored_and_not_compared(toy, tmp_path, monkeypatch):
    runs.execute("prepare", 1, prepare.prepare, config.PrepareSettings(TASK), {}, tmp_path / "p", config.Execution())
    settings = config.BenchmarkSettings("mine", config.Benchmark("two_turn", prompts=2), TASK)
    settings.benchmark.kind = "sums"  # which is in no file, and so no choice that a schema would know
    counts = benchmark.make(settings, {"prepare": tmp_path / "p"}, tmp_path / "b", None)
    assert counts["kept"] == 2 and counts["categories"] == {"sums": 2}
    rows = generate.read_benchmarks({"benchmark/mine": tmp_path / "b"})["mine"]
    rows = [row | {"sample": 0} for row in rows]  # each is answered once
    answers = generate.Answers(rows, responses=[[[1], [1]]], texts=[["1", "no"]], finish_reasons=[["stop", "stop"]])
    monkeypatch.setattr(score, "sequences", lambda *_: None)
    rewards, golds = score.score(answers, Rewards(), stories.StoriesGold(), [0], 0, config.Execution())
    assert rewards.tolist() == [[0.0, 0.0]] and golds is None  # gold of the stories can't read sums
    written = list(score.response_rows(answers, "mine", "policy", rewards, golds))
    assert [row["scores"] for row in written] == [{"exact": 1.0, "length": 1.0}, {"exact": 0.0, "length": 2.0}]
    compared = {key: value for key, value in written[0].items() if key not in ("scores", "compared")}
    runs.write_jsonl(tmp_path / "r" / "responses.jsonl", [*written, compared | {"benchmark": "other"}])
    assert list(judge.responses(tmp_path / "r", "policy")) == [("other", "sums-0", 0)]  # no judge reads the others


def test_no_judge_is_planned_where_nothing_is_compared(monkeypatch):
    known = data.benchmark_kinds()
    assert "judge" in {run.stage for run in plan.plan(compose.compose()).runs.values()}
    alone = {kind: dataclasses.replace(record, compared=False, score=exact) for kind, record in known.items()}
    monkeypatch.setattr(data, "benchmark_kinds", lambda world=None: alone)
    stages = [run.stage for run in plan.plan(compose.compose()).runs.values()]
    assert "respond" in stages and "benchmark" in stages and "judge" not in stages
