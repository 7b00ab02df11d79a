"""The stage mix: what it writes, what its search measures, and what a killed one goes on from."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EXECUTION, LENGTHS
from test_soup import assert_same_bits, contents, tensors

from salsa import mix, sft, soup
from salsa.data import gold as gold_data
from salsa.evaluate import landscape, respond
from salsa.rl import models
from salsa.workflow import config, resources, runs, stages
from salsa.workflow.messages import UserError

THIRDS = {"sft0": "1/3", "sft1": "1/3", "base": "1/3"}


def greedy(measure="validation_loss"):
    return config.MixSettings(config.Mix(kind="greedy", weights=THIRDS, measure=measure), seed=7, lengths=LENGTHS)


@pytest.fixture
def candidates(prepare_run, sft_runs, base_run):
    return {"prepare": prepare_run, "sft0": sft_runs[0], "sft1": sft_runs[1], "base": base_run}


def execute(settings, parents, folder):
    stage = stages.MIX
    options = {"writes": stage.writes, "may_write": stage.may_write}
    return runs.execute("mix", stage.version, mix.mix, settings, parents, folder, EXECUTION, **options)


def average(candidates, names):
    """The average of candidates, in memory."""
    return models.mix_policies([candidates[name] / "model" for name in names], [f"1/{len(names)}"] * len(names))


@torch.no_grad()
def plain_loss(policy, prepare, tokenizer):
    """The mean over response tokens of what SFT trains on, one conversation at a time, in float64."""
    data, _ = sft.tokenize(tokenizer, runs.read_jsonl(prepare / "sft_validation.jsonl"), LENGTHS)
    losses = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        logprobs = policy(input_ids=ids).logits[0].double().log_softmax(-1)
        marked = [place for place, of_response in enumerate(row["completion_mask"]) if of_response]
        losses += [-logprobs[place - 1, ids[0, place]].item() for place in marked]
    return math.fsum(losses) / len(losses)


def test_a_search_by_validation_loss(candidates, tokenizer, tmp_path):
    manifest = execute(greedy(), candidates, tmp_path / "mix")
    search = runs.read_json(tmp_path / "mix" / "search.json")
    names, taken = sorted(THIRDS), []
    alone = {name: plain_loss(average(candidates, [name]), candidates["prepare"], tokenizer) for name in names}
    assert [step["candidate"] for step in search["steps"]] == sorted(names, key=alone.get)
    best = math.inf
    for step in search["steps"]:
        together = [name for name in names if name in [*taken, step["candidate"]]]
        expected = plain_loss(average(candidates, together), candidates["prepare"], tokenizer)
        assert step["value"] == pytest.approx(expected, rel=1e-6)
        assert step["alone"] == pytest.approx(alone[step["candidate"]], rel=1e-6)
        assert step["accepted"] == (expected <= best)
        if step["accepted"]:
            taken, best = together, expected
    assert search["measure"] == "validation_loss" and sorted(manifest["summary"]["taken"]) == taken
    assert manifest["summary"]["validation_loss"] == pytest.approx(best, rel=1e-6)
    assert manifest["summary"]["validation_loss_of_best"] == pytest.approx(min(alone.values()), rel=1e-6)
    soup.soup([candidates[name] / "model" for name in taken], [f"1/{len(taken)}"] * len(taken), tmp_path / "plain")
    assert_same_bits(tensors(tmp_path / "mix" / "model"), tensors(tmp_path / "plain"))
    assert {"model/config.json", "search.json"} <= manifest["artefacts"].keys()


def test_a_search_by_gold(candidates, tokenizer, tmp_path):
    manifest = execute(greedy("gold"), candidates, tmp_path / "mix")
    steps = runs.read_json(tmp_path / "mix" / "search.json")["steps"]
    evaluation = runs.read_jsonl(candidates["prepare"] / "evaluation.jsonl")
    judge = gold_data.load(candidates["prepare"])
    alone = {}
    for name in THIRDS:
        policy = average(candidates, [name])
        answers = respond.evaluation_answers(policy, tokenizer, evaluation, greedy("gold"), EXECUTION)
        alone[name] = np.mean([judge.score([row["prompt"]], [text])[0] for row, text in zip(
            evaluation, answers.texts[0], strict=True)])  # fmt: skip
    assert {step["candidate"]: step["alone"] for step in steps} == pytest.approx(alone)
    assert [step["alone"] for step in steps] == sorted(alone.values(), reverse=True)
    assert manifest["summary"]["gold"] >= max(alone.values())


def test_a_killed_search_goes_on(candidates, tmp_path, monkeypatch):
    execute(greedy(), candidates, tmp_path / "whole")
    calls, token_loss = [], landscape.token_loss

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return token_loss(*arguments)

    monkeypatch.setattr(landscape, "token_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        execute(greedy(), candidates, tmp_path / "mix")
    (tmp_path / "mix" / "model").mkdir()  # as one that was killed later would leave
    (tmp_path / "mix" / "model" / "config.json").write_text("{}")
    execute(greedy(), candidates, tmp_path / "mix")
    assert len(calls) == 6  # five averages, of which one was tried twice
    for path in ("search.json", "model/model.safetensors", "model/config.json"):
        assert (tmp_path / "mix" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert "checkpoints" not in contents(tmp_path / "mix")


def test_slerp_is_a_run(candidates, tmp_path):
    spec = config.Mix(weights={"sft1": "1/4", "sft0": "3/4"}, origin="base", step=0.8)
    given = {role: candidates[role] for role in ("sft0", "sft1", "base")}
    manifest = execute(config.MixSettings(spec), given, tmp_path / "mix")
    from salsa.mixes import slerp

    folders = [candidates[role] / "model" for role in ("sft0", "sft1")]
    slerp.write(folders, [["3/4", "1/4"]], [tmp_path / "plain"], candidates["base"] / "model", 0.8)
    assert_same_bits(tensors(tmp_path / "mix" / "model"), tensors(tmp_path / "plain"))
    summary = manifest["summary"]
    assert summary["mix"] == "SLERP of 3/4 sft0 + 1/4 sft1, from base, step 0.8"
    assert summary["merges"] == len(tensors(tmp_path / "plain")) and 60 < summary["median_angle"] < 120
    assert "search.json" not in contents(tmp_path / "mix")


def test_what_is_missing_is_said_before_anything_is_computed(candidates, tmp_path):
    given = dict(candidates)
    for role in ("prepare", "base"):
        gone = given.pop(role)
        with pytest.raises(UserError, match=f"mix: no parent '{role}'") as caught:
            execute(greedy(), given, tmp_path / role)
        assert "\n" not in str(caught.value)
        given[role] = gone


def test_gold_where_there_is_none(candidates, tmp_path):
    without = tmp_path / "prepare"
    (without / "gold").mkdir(parents=True)
    gold_data.save(without / "gold", gold_data.NONE)
    folders = {role: candidates[role] / "model" for role in THIRDS}
    with pytest.raises(UserError, match="the data has no gold judge; use validation_loss"):
        mix.mix(greedy("gold"), {**folders, "prepare": without}, tmp_path, EXECUTION)


@pytest.mark.parametrize("measure", [None, "validation_loss", "gold"])
def test_resources(measure):
    settings = greedy(measure).mix if measure else config.Mix(weights={"sft0": "1/2", "sft1": "1/2"})
    task = {"sft_file": "", "preference_file": "", "validation": 100, "evaluation": 50}
    prepare = SimpleNamespace(stage="prepare", settings={"task": task}, parents={})
    values = {"mix": vars(settings), "lengths": {"prompt": 10, "response": 10} if measure else None}
    run = SimpleNamespace(stage="mix", settings=values, execution=vars(EXECUTION), parents={"prepare": "prepare/p"})
    shape = resources.Shape(1000, 64, 128, 2, 2, 2, 32)
    needed = resources.mix(resources.Case(run, shape, 4, {"prepare/p": prepare, "mix/m": run}))
    assert needed.disk == 4 * shape.parameters and needed.peak > resources.PROCESS
    # A search of three measures five averages: of 100 demonstrations forwards, of 50 prompts with answers.
    operations = {None: 0, "validation_loss": 5 * 100 * 20 * 2 * shape.matrices}
    assert measure == "gold" or needed.operations == operations[measure]
    assert measure != "gold" or needed.operations > 0
