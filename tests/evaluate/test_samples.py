"""Several responses to a prompt: what is drawn, what is written, and what statistics make of it; against loops."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import test_respond
from conftest import EXECUTION
from test_generate import ROWS, SETTINGS, SMALL
from test_judge import BASELINE, NAME, folder, judged, row
from test_respond import SEED, naive_answer

from salsa.evaluate import best_of, generate, judge, respond, score, statistics
from salsa.workflow import config, runs

SAMPLES = 3
benchmarks, policy_run = test_respond.benchmarks, test_respond.policy_run  # fixtures


def texts_of(model, tokenizer, row, sample, draws=1):
    """The texts of one sample of a conversation, by sampling each turn alone; the longest of `draws` draws."""
    messages, texts = [], []
    for turn, text in enumerate(row["turns"]):
        messages.append(generate.user(text))
        drawn = []
        for draw in range(sample * draws, (sample + 1) * draws):
            key = f"b/{row['id']}/{turn}" + (f"\nsample {draw}" if draw else "")
            drawn.append(naive_answer(model, tokenizer, messages, key)[1:])
        texts.append(max(drawn, key=lambda pair: len(pair[0]))[1])
        messages.append(generate.assistant(texts[-1]))
    return texts


@pytest.mark.parametrize("draws", [1, 2])
def test_each_sample_has_noise_of_its_own_and_the_first_that_of_a_single_one(sft_models, tokenizer, draws):
    assert SETTINGS.seed == SEED
    best = best_of.BestOf(draws, lambda prompts, drawn: np.array(list(map(len, drawn)), dtype=float))
    for execution in (SMALL, EXECUTION):
        answers = generate.answer(
            sft_models[0], tokenizer, ROWS, "b", SETTINGS, execution, 1.0, best=best, samples=SAMPLES
        )
        assert [(given["id"], given["sample"]) for given in answers.rows] == [
            (asked["id"], sample) for asked in ROWS for sample in range(SAMPLES)
        ]
        for i, answered_row in enumerate(answers.rows):
            written = [texts[i] for texts in answers.texts]
            assert written == texts_of(sft_models[0], tokenizer, answered_row, answered_row["sample"], draws)


def test_what_is_left_out_is_counted_once_a_prompt(sft_models, tokenizer, capsys):
    rows = [{"id": 0, "turns": ["fox " * 70]}, {"id": 1, "turns": ["fox"]}]
    answers = generate.answer(sft_models[0], tokenizer, rows, "b", SETTINGS, EXECUTION, 1.0, samples=SAMPLES)
    assert answers.left_out == 1 and [row["id"] for row in answers.rows] == [1] * SAMPLES


def test_a_killed_run_goes_on_within_a_prompt(sft_models, tokenizer, tmp_path, monkeypatch):
    how = (sft_models[0], tokenizer, ROWS, "b", SETTINGS, dataclasses.replace(EXECUTION, rollout_batch=2), 1.0)
    whole = generate.answer(*how, kept=tmp_path, samples=SAMPLES)
    chunks = sorted((tmp_path / "b").iterdir())
    assert len(chunks) == len(ROWS) * SAMPLES / 2
    for chunk in chunks[3:]:
        chunk.unlink()
    again = generate.answer(*how, kept=tmp_path, samples=SAMPLES)
    assert again.responses == whole.responses


@pytest.fixture(scope="module")
def answered(parents, benchmarks, policy_run, tmp_path_factory):
    """A respond run of three samples, and one of a single sample, of one policy."""
    made = {}
    for samples in (1, SAMPLES):
        output = tmp_path_factory.mktemp("respond") / str(samples)
        settings = config.RespondSettings(SEED, 1.0, config.Lengths(prompt=64, response=10), samples)
        everything = parents | benchmarks | {"policy": policy_run(["1/2", "1/2"])}
        runs.execute("respond", respond.VERSION, respond.respond, settings, everything, output, EXECUTION)
        made[samples] = output
    return made


def test_the_first_samples_are_the_responses_of_a_single_one(answered):
    for name in ("responses.jsonl", "evaluation.jsonl"):
        rows = runs.read_jsonl(answered[SAMPLES] / name)
        assert [row["sample"] for row in rows] == list(range(SAMPLES)) * (len(rows) // SAMPLES)
        alone = runs.read_jsonl(answered[1] / name)
        assert [row["prompt_id"] for row in rows[::SAMPLES]] == [row["prompt_id"] for row in alone]
        text = "responses" if name == "responses.jsonl" else "response"
        assert [row[text] for row in rows[::SAMPLES]] == [row[text] for row in alone]
        assert len({str(row[text]) for row in rows}) > len(alone)


def test_errors_are_over_prompts(answered):
    rows, summary = (
        runs.read_jsonl(answered[SAMPLES] / "evaluation.jsonl"),
        runs.read_json(answered[SAMPLES] / "evaluation.json"),
    )
    for name, column in (("reward", "reward"), ("gold_reward", "gold"), ("kl_to_sft0", "kl_to_sft0")):
        by_prompt = {}
        for line in rows:
            by_prompt.setdefault(line["prompt_id"], []).append(line[column])
        means = [math.fsum(values) / len(values) for values in by_prompt.values()]
        count, mean = len(means), math.fsum(means) / len(means)
        error = math.sqrt(math.fsum((x - mean) ** 2 for x in means) / (count - 1) / count)
        assert summary[name] == pytest.approx(mean, rel=1e-12)
        assert summary[f"{name}_se"] == pytest.approx(error, rel=1e-12)
        assert summary["prompts"] == count
    assert summary["response_length"] == pytest.approx(sum(line["tokens"] for line in rows) / len(rows), rel=1e-12)


def test_the_best_of_n_of_each_sample(parents, benchmarks, policy_run, tmp_path, monkeypatch):
    """Sample k of an evaluation prompt is the best of draws k·n to k·n + n − 1."""
    n, samples = 3, 12  # 36 draws, more than figures need
    monkeypatch.setattr(respond, "draws", lambda policy: n)
    settings = config.RespondSettings(SEED, 1.0, config.Lengths(prompt=64, response=10), samples)
    everything = parents | {"policy": policy_run(["1/2", "1/2"])}
    runs.execute("respond", respond.VERSION, respond.respond, settings, everything, tmp_path / "out", EXECUTION)
    drawn = {line["prompt_id"]: line for line in runs.read_jsonl(tmp_path / "out" / "samples.jsonl")}
    rows = runs.read_jsonl(tmp_path / "out" / "evaluation.jsonl")
    assert len(rows) == samples * len(drawn)
    for line in rows:
        rewards = drawn[line["prompt_id"]]["reward"]
        assert len(rewards) == n * samples
        assert line["reward"] == max(rewards[n * line["sample"] : n * (line["sample"] + 1)])


def test_mean_and_error_of_one_prompt():
    assert score.mean_and_error([1.0, 3.0], samples=2) == (2.0, None)
    mean, error = score.mean_and_error([1.0, 3.0, 5.0, 7.0], samples=2)
    assert (mean, error) == (4.0, pytest.approx(math.sqrt(((2 - 4) ** 2 + (6 - 4) ** 2) / 1 / 2)))


@pytest.fixture
def several(tmp_path):
    """Responses of two samples of three prompts, with the gold of each."""

    def rows(model, golds):
        return [
            row(model, place // 2, gold) | {"sample": place % 2} for place, gold in enumerate(golds)
        ]  # prompt 0: the first two

    return {
        "candidate": folder(tmp_path / "c", rows("policy", [1.0, 0.0, 2.0, 2.0, 0.0, 5.0])),
        "baseline/sft0": folder(tmp_path / "s", rows("sft0", [0.0, 1.0, 1.0, 2.0, 1.0, 6.0])),
        f"baseline/{BASELINE}": folder(tmp_path / "p", rows("policy", [1.0] * 6)),
    }


def test_a_sample_is_compared_with_the_baselines_of_the_same_number(several, tmp_path):
    verdicts = judged(several, tmp_path / "out", margin=0.0)
    assert len(verdicts) == 2 * 3 * 2 * 2
    winners = {
        (line["prompt_id"], line["sample"]): line["winner"]
        for line in verdicts
        if (line["model_b"], line["order"]) == ("sft0", 0)
    }
    assert list(winners.values()) == ["model_a", "model_b", "model_a", "tie", "model_b", "model_b"]
    found = statistics.compare(verdicts, NAME, "sft0")
    assert found["prompts"] == 3 and found["adjusted_win_rate"] == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert "seed" not in verdicts[0]


def test_a_kept_verdict_is_of_its_sample(several, tmp_path):
    whole = judged(several, tmp_path / "out", margin=0.0)
    kept = tmp_path / "again"
    kept.mkdir()
    runs.write_jsonl(kept / "verdicts.jsonl", [line for line in whole if line["sample"] == 1])
    assert judged(several, kept, margin=0.0) == whole


def test_the_verdicts_of_a_training_seed_name_it(several, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    settings = config.JudgeSettings("gold", config.Judge("gold"), 1, NAME, {"sft0": "sft0"}, seed=2)
    judge.judge(settings, several, output, config.Execution())
    assert {line["seed"] for line in runs.read_jsonl(output / "verdicts.jsonl")} == {2}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sample": "1"}, "its sample '1' is no number of a response"),
        ({"sample": -1}, "its sample -1 is no number of a response"),
        ({"sample": 0}, "the response of policy to b/0 stands there twice"),
    ],
)
def test_samples_that_are_none_are_named(several, tmp_path, changes, problem):
    rows = runs.read_jsonl(several["candidate"] / "responses.jsonl")
    runs.write_jsonl(several["candidate"] / "responses.jsonl", [rows[0], rows[1] | changes, *rows[2:]])
    with pytest.raises(runs.UserError, match=problem):
        judged(several, tmp_path / "out")


def test_a_baseline_without_a_sample_is_refused(several, tmp_path):
    rows = runs.read_jsonl(several["baseline/sft0"] / "responses.jsonl")
    runs.write_jsonl(several["baseline/sft0"] / "responses.jsonl", rows[:-1])
    with pytest.raises(runs.UserError, match=r"1 of the candidate's responses .* first b/2 \(sample 1\)"):
        judged(several, tmp_path / "out")


def lines_of(generator):
    """Random verdicts of two replicates of two training seeds and three samples; some are errors, some not there."""
    lines = []
    for prompt in range(8):
        for replicate in (0, 1):
            for seed in (0, 1):
                for sample in range(3):
                    for order in (0, 1):
                        winner = generator.choice(["model_a", "model_b", "tie", "error"])
                        lines.append(
                            {"prompt_id": prompt, "benchmark": "b", "model_a": "new", "model_b": "old", "order": order,
                             "winner": winner, "judge": "j", "replicate": replicate}
                            | ({"seed": seed} if seed else {}) | ({"sample": sample} if sample else {})
                        )  # fmt: skip
    return [line for line in lines if generator.random() < 0.8]


@pytest.mark.parametrize("case", range(5))
def test_a_prompts_score_is_the_mean_over_replicates_seeds_and_samples(case):
    lines = lines_of(random.Random(case))
    value = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}
    scores = []
    for prompt in range(8):
        replicates = []
        for replicate in (0, 1):
            seeds = []
            for seed in (0, 1):
                values = [
                    value[line["winner"]]
                    for line in lines
                    if (line["prompt_id"], line["replicate"], line.get("seed", 0)) == (prompt, replicate, seed)
                    and line["winner"] != "error"
                ]
                seeds += [sum(values) / len(values)] if values else []
            replicates += [sum(seeds) / len(seeds)] if seeds else []
        scores += [sum(replicates) / len(replicates)] if replicates else []
    found = statistics.compare(lines, "new", "old")
    assert found["adjusted_win_rate"] == pytest.approx(sum(scores) / len(scores), rel=1e-12)
    assert found["prompts"] == len(scores)
    assert found["errors"] == sum(line["winner"] == "error" for line in lines)
    whole = [dict(line) for line in lines for _ in (0, 1)]  # a line that stands there twice counts once
    assert statistics.compare(whole, "new", "old") == found


def test_the_command_line_takes_all_lines_on_a_prompt_as_one(tmp_path, capsys):
    runs.write_jsonl(tmp_path / "verdicts.jsonl", lines_of(random.Random(0)))
    statistics.main([str(tmp_path / "verdicts.jsonl"), "--candidate", "new", "--baseline", "old"])
    assert json.loads(capsys.readouterr().out)["prompts"] == 8
    runs.write_jsonl(tmp_path / "wrong.jsonl", [lines_of(random.Random(0))[0] | {"sample": "first"}])
    with pytest.raises(SystemExit, match=r"wrong.jsonl:1: sample 'first' is no whole number"):
        statistics.main([str(tmp_path / "wrong.jsonl"), "--candidate", "new", "--baseline", "old"])
