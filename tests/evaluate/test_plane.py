"""The plane through three models: its points, what they are worth, runs that go on, and models that fall apart."""

import csv
import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import EXECUTION, move
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

from salsa.data import chat, gold
from salsa.evaluate import plane, respond, score
from salsa.rl import models
from salsa.workflow import config, runs

LENGTHS = config.Lengths(prompt=64, response=10)
SETTINGS = config.PlaneSettings(seed=21, step="1", margin="1/2", prompts=6, lengths=LENGTHS)
HALF = Fraction(1, 2)


def naive_triangle(step, margin):
    """Of all pairs of multiples of `step`, those that a third within the margin completes."""
    multiples = [i * step for i in range(-12, 13)]
    triples = ((1 - w1 - w2, w1, w2) for w1, w2 in itertools.product(multiples, repeat=2))
    return {point for point in triples if min(point) >= -margin}


@pytest.mark.parametrize(
    ("step", "margin", "count"),
    [("1", "0", 3), ("1/2", "0", 6), ("1/2", "1/2", 21), ("1/4", "1/2", 66), ("1/3", "1/2", 28), ("1/4", "3/8", 36)],
)
def test_the_points_of_the_triangle(step, margin, count):
    found = plane.triangle(Fraction(step), Fraction(margin))
    assert set(found) == naive_triangle(Fraction(step), Fraction(margin)) and len(found) == len(set(found)) == count


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.fractions(0, 2, max_denominator=16))
def test_any_triangle_and_line(steps, margin):
    step = Fraction(1, steps)
    points = plane.triangle(step, margin)
    corner = 1 + 2 * math.floor(margin / step) * step
    assert {tuple(sorted(point)) for point in points} >= {(0, 0, 1)}
    assert max(map(max, points)) == corner and all(sum(point) == 1 and min(point) >= -margin for point in points)
    line = plane.line(step / 2, margin)
    assert [point[2] for point in line] == sorted({point[2] for point in line})
    assert all(point[1] == 0 and sum(point) == 1 and -margin <= point[2] <= 1 + margin for point in line)
    assert {point for point in points if point[1] == 0} <= set(line)  # no point of the plane's edge is missing
    assert -margin - line[0][2] > -step / 2


def test_a_step_that_misses_the_models_is_refused():
    with pytest.raises(runs.UserError, match=r"evaluate\.plane\.step=2/3: 1 must be a multiple of it"):
        plane.triangle(Fraction(2, 3), HALF)


@pytest.fixture(scope="module")
def policy(parents, tokenizer, tmp_path_factory):
    """A policy a little way from sft0, as a model folder."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    move(models.load_policy(parents["sft0"] / "model"), 9, 0.03).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(parents, policy):
    """Run the stage into a folder."""
    return lambda output, settings=SETTINGS: runs.execute(
        "plane", plane.VERSION, plane.survey, settings, {**parents, "policy": policy}, output, EXECUTION
    )


@pytest.fixture(scope="module")
def surveyed(run, tmp_path_factory):
    """The finished stage: (folder, manifest)."""
    output = tmp_path_factory.mktemp("plane")
    return output, run(output)


def rows_of(output):
    with open(output / "plane.csv", encoding="utf-8") as file:
        return [
            {key: value if key == "kind" else float(value or "nan") for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def combined(folders, weights):
    """The combination of models, weight by weight in float64."""
    made = [models.load_policy(folder, dtype=torch.float64) for folder in folders]
    mixed = models.load_policy(folders[0])
    with torch.no_grad():
        for tensor, *others in zip(mixed.parameters(), *(model.parameters() for model in made), strict=True):
            tensor.copy_(sum(float(weight) * other for weight, other in zip(weights, others, strict=True)))
    return mixed


@torch.no_grad()
def naive_kl(model, reference, answers):
    found = []
    for prompt, response in zip(answers.prompts[0], answers.responses[0], strict=True):
        ids = torch.tensor([prompt + response])
        ours, theirs = (log_softmax(m(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1) for m in (model, reference))
        found.append((ours.exp() * (ours - theirs)).sum().item())
    return np.mean(found)


def test_each_point_is_the_combination_of_the_three_models(surveyed, parents, policy, tokenizer):
    output, manifest = surveyed
    rows = rows_of(output)
    assert [(row["kind"], row["w_sft0"], row["w_sft1"], row["w_policy"]) for row in rows] == [
        ("plane", 1, 0, 0),
        ("plane", 0, 0, 1),
        ("plane", 0, 1, 0),
        *(("line", 1 - w, 0, w) for w in (-0.5, 0, 0.5, 1, 1.5)),
    ]
    folders = [parents["sft0"] / "model", parents["sft1"] / "model", policy]
    reward_model, judge = models.load_score_model(parents["reward_model"]), gold.load(parents["prepare"])
    evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")[:6]
    ends, pad = chat.end_ids(models.load_policy(folders[0]), tokenizer), tokenizer.pad_token_id
    at = {}
    for row in rows:
        weights = (row["w_sft0"], row["w_sft1"], row["w_policy"])
        model = combined(folders, weights)
        answers = respond.evaluation_answers(model, tokenizer, evaluation, SETTINGS, EXECUTION)
        rewards, golds = score.score(answers, reward_model, judge, ends, pad, EXECUTION)
        at[weights] = (model, answers)
        assert row["reward"] == pytest.approx(rewards[0].mean(), abs=1e-4)
        assert row["reward_se"] == pytest.approx(rewards[0].std(ddof=1) / np.sqrt(6), abs=1e-4)
        assert row["gold_reward"] == pytest.approx(golds[0].mean())
        assert row["gold_reward_se"] == pytest.approx(golds[0].std(ddof=1) / np.sqrt(6))
        assert row["response_length"] == np.mean([len(ids) for ids in answers.responses[0]])
        assert row["eos_rate"] == np.mean([reason == "stop" for reason in answers.finish_reasons[0]])
    sft0, samples = at[1, 0, 0]
    for row in rows:
        model = at[row["w_sft0"], row["w_sft1"], row["w_policy"]][0]
        assert row["kl_from_sft0"] == pytest.approx(naive_kl(sft0, model, samples), abs=1e-3)
    assert rows[0]["kl_from_sft0"] == 0 and min(row["kl_from_sft0"] for row in rows[1:3]) > 0.001
    best = max(rows, key=lambda row: row["reward"])
    summary = manifest["summary"]
    assert summary["points"] == 6 and summary["best_by_reward"]["reward"] == best["reward"]
    assert float(Fraction(summary["best_by_reward"]["w_policy"])) == best["w_policy"]
    assert summary["best_by_gold"]["gold_reward"] == max(row["gold_reward"] for row in rows)


def test_a_point_of_both_is_computed_once_and_a_killed_run_goes_on(surveyed, run, tmp_path, monkeypatch):
    mixed, mix = [], models.mix_policies

    def count(folders, weights, device):
        if len(mixed) == 3:
            raise KeyboardInterrupt
        mixed.append(weights)
        return mix(folders, weights, device)

    monkeypatch.setattr(models, "mix_policies", count)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    first = list(mixed)
    assert set(runs.read_json(tmp_path / runs.CHECKPOINTS / "points.json")) == {
        "1 0 0",
        *(" ".join(map(str, weights)) for weights in first),
    }
    mixed.clear()
    monkeypatch.setattr(models, "mix_policies", lambda *a: mixed.append(a[1]) or mix(*a))
    assert run(tmp_path)["artefacts"] == surveyed[1]["artefacts"]
    assert len(set(first + mixed)) == len(first + mixed) == 5  # and sft0, which needs no mixing
    assert not (tmp_path / runs.CHECKPOINTS).exists()


def test_a_model_that_fell_apart_is_recorded(parents, policy, tokenizer, tmp_path):
    broken = models.load_policy(policy)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    broken.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    settings = dataclasses.replace(SETTINGS, margin="0", prompts=2)
    given = {**parents, "policy": tmp_path / "broken"}
    manifest = runs.execute("plane", 1, plane.survey, settings, given, tmp_path / "plane", EXECUTION)
    at = {row["w_policy"]: row for row in rows_of(tmp_path / "plane")}
    assert math.isnan(at[1]["kl_from_sft0"]) and math.isnan(at[0.5]["kl_from_sft0"])
    assert at[0]["kl_from_sft0"] >= 0 and math.isfinite(manifest["summary"]["best_by_reward"]["reward"])


def test_the_best_of_what_is_a_number():
    points = {(HALF, HALF, Fraction(0)): {"reward": 1.0}, plane.SFT0: {"reward": float("nan")}}
    points[Fraction(0), Fraction(0), Fraction(1)] = {"reward": 0.5}
    assert plane._best(points, "reward") == {"w_sft0": "1/2", "w_sft1": "1/2", "w_policy": "0", "reward": 1.0}
    assert plane._best({plane.SFT0: {"gold_reward": None}}, "gold_reward") is None
