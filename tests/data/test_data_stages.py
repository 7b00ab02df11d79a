"""The stages corpus, prepare and benchmark, as runs: their files, counts and refusals."""

import os
from pathlib import Path

import numpy as np
import pytest

from salsa.data import benchmark, corpus, gold, prepare
from salsa.data.messages import user
from salsa.data.worlds import stories
from salsa.workflow import config, runs

REAL = Path(os.environ.get("SALSA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set SALSA_TEST_DATA to a folder that has it")
STORIES = config.Task(
    kind="stories", demonstrations=40, validation=10, preferences=30, prompts=20, evaluation=10, seed=5
)


def execute(module, function, settings, folder, parents=None):
    stage = module.__name__.rsplit(".", 1)[1]
    runs.execute(stage, module.VERSION, function, settings, parents or {}, folder, config.Execution())
    return folder


def prepared(task, folder):
    return execute(prepare, prepare.prepare, config.PrepareSettings(task), folder)


def benchmark_of(settings, task, folder, parent):
    made = config.BenchmarkSettings(settings.kind, settings, task)
    execute(benchmark, benchmark.make, made, folder, {"prepare": parent})
    return runs.read_jsonl(folder / "benchmark.jsonl"), runs.read_json(folder / "counts.json")


def test_corpus(tmp_path):
    settings = config.CorpusSettings(config.Corpus(kind="stories", documents=20, seed=3))
    folder = execute(corpus, corpus.make, settings, tmp_path / "corpus")
    texts = stories.WORLD.corpus(settings.corpus).texts
    assert [row["text"] for row in runs.read_jsonl(folder / "corpus.jsonl")] == texts
    assert runs.read_json(folder / "counts.json")["documents"] == 20
    with pytest.raises(runs.UserError, match="corpus is made for"):
        execute(corpus, corpus.make, config.CorpusSettings(config.Corpus(kind="none")), tmp_path / "none")


def test_prepare_stories(tmp_path):
    folder = prepared(STORIES, tmp_path / "prepare")
    names = {"sft", "sft_validation", "preference_prompts", "prompts", "evaluation"}
    assert {path.stem for path in folder.glob("*.jsonl")} == names
    rows = {name: runs.read_jsonl(folder / f"{name}.jsonl") for name in names}
    assert [len(rows[n]) for n in sorted(names)] == [10, 30, 20, 40, 10]
    for name in ("preference_prompts", "prompts", "evaluation"):
        assert (
            rows[name][0]["id"] == f"{name.replace('preference_prompts', 'preferences')}-0"
            and rows[name][0]["prompt"][0]["role"] == "user"
        )
        assert len({row["id"] for row in rows[name]}) == len(rows[name])
    summary = runs.verify(folder)["summary"]
    assert summary == runs.read_json(folder / "counts.json") and summary["rows"]["demonstrations"] == 40
    judge = gold.load(folder)
    asked = [user("write one sentence about a dog and a lamp ."), {"role": "assistant", "content": "no"}]
    asked.append(user("now write one sentence about a fox and a kite ."))
    scores = judge.score([asked, asked], ["the bright fox loves a kite .", ""])
    assert scores.dtype == np.float64 and scores == pytest.approx([1.0, 0.0])


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(runs.UserError, match="no rows for prompts"):
        prepared(config.Task(**{**vars(STORIES), "prompts": 0}), tmp_path / "prepare")
    assert runs.manifest_of(tmp_path / "prepare") is None


def test_gold_of_an_unfinished_run(tmp_path):
    with pytest.raises(runs.UserError, match="no finished prepare run"):
        gold.load(tmp_path)


@pytest.mark.parametrize("kind", ["in_distribution", "out_of_distribution", "two_turn"])
def test_benchmarks_of_stories(tmp_path, kind):
    parent = prepared(STORIES, tmp_path / "prepare")
    rows, counts = benchmark_of(config.Benchmark(kind, prompts=50), STORIES, tmp_path / kind, parent)
    assert len(rows) == counts["kept"] == 50 and counts["dropped"] == {"in_training": 0}
    assert set(rows[0]) == {"id", "turns", "category", "reference"}


def test_a_benchmark_that_the_data_does_not_have(tmp_path):
    parent = prepared(STORIES, tmp_path / "prepare")
    with pytest.raises(runs.UserError, match="stories has no 'mt_bench'; it has in_distribution"):
        benchmark_of(config.Benchmark("mt_bench"), STORIES, tmp_path / "benchmark", parent)


def test_a_benchmark_drops_what_any_training_asks_anywhere(tmp_path):
    def rows(path, values):
        runs.write_jsonl(path, values)
        return str(path)

    def asked(i):
        return user(f"Question {i}?")

    answered, other = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
    brief = {"role": "system", "content": "Be brief."}
    before = [[brief, user(f"Hello {i}"), answered, asked(i)] for i in range(100)]
    pairs = [{"prompt": "x", "chosen": [*b, answered], "rejected": [*b, other]} for b in before]
    chats = [{"messages": [brief, user(f"Hi {i}"), answered, asked(i), answered]} for i in range(100, 140)]
    task = config.Task(
        kind="ultra",
        preference_file=rows(tmp_path / "p.jsonl", pairs),
        sft_file=rows(tmp_path / "s.jsonl", chats),
        evaluation_file=rows(tmp_path / "e.jsonl", [{"prompt": [brief, asked(i)]} for i in range(140, 150)]),
    )
    parent = prepared(task, tmp_path / "prepare")
    hard = [{"uid": i, "cluster": "c", "prompt": f"QUESTION  {i}?"} for i in range(160)]
    made = config.Benchmark("arena_hard", file=rows(tmp_path / "h.jsonl", hard))
    kept, counts = benchmark_of(made, task, tmp_path / "h", parent)
    # of the preference file's own evaluation share, which the evaluation file replaces, nothing is trained or reported
    unused = 100 - sum(len(runs.read_jsonl(parent / f"{name}.jsonl")) for name in ("preferences", "prompts"))
    assert counts["dropped"]["in_training"] == 150 - unused and len(kept) == 10 + unused
    mt = [{"question_id": i, "category": "c", "turns": [f"New {i}?", f"Question {i + 100}?"]} for i in [*range(41), 50]]
    kept, counts = benchmark_of(
        config.Benchmark("mt_bench", file=rows(tmp_path / "m.jsonl", mt)), task, tmp_path / "m", parent
    )
    assert counts["dropped"]["in_training"] == 41 and [row["id"] for row in kept] == ["mt_bench-50"]


@needs_real
def test_real_benchmarks(tmp_path):
    feedback = REAL / "ultrafeedback"
    task = config.Task(
        kind="ultra",
        preference_file=str(feedback / "train_1000.jsonl.gz"),
        evaluation_file=str(feedback / "eval_200.jsonl.gz"),
        evaluation=40,
    )
    parent = prepared(task, tmp_path / "prepare")
    assert gold.load(parent) is None and (parent / "preferences.jsonl").exists()
    assert not (parent / "preference_prompts.jsonl").exists()

    mt = config.Benchmark(
        "mt_bench",
        file=str(REAL / "mt_bench" / "question.jsonl"),
        reference_file=str(REAL / "mt_bench" / "reference_answer_gpt-4.jsonl"),
    )
    rows, _ = benchmark_of(mt, task, tmp_path / "mt_bench", parent)
    assert len(rows) == 80 and all(len(row["turns"]) == 2 for row in rows)
    references = [row["reference"] for row in rows if row["reference"]]
    assert len(references) == 30 and all(len(reference) == 2 for reference in references)
    assert len({row["category"] for row in rows}) == 8

    hard = config.Benchmark("arena_hard", file=str(REAL / "arena_hard" / "question_v0.1.jsonl"))
    rows, _ = benchmark_of(hard, task, tmp_path / "arena_hard", parent)
    assert len(rows) == 500 and len({row["category"] for row in rows}) > 200

    test = config.Benchmark("preference_file", prompts=100, file=str(feedback / "eval_200.jsonl.gz"))
    rows, counts = benchmark_of(test, task, tmp_path / "test", parent)
    assert len(rows) == 100 and counts["dropped"]["in_training"] > 20  # the evaluation's 40, ties aside
    known = benchmark.training_prompts(parent)
    assert not any(benchmark.normalised(row["turns"][0]) in known for row in rows)
