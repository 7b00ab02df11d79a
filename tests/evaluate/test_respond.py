"""Answers, their scores and distances, of a policy and along the line between the SFT models: against naive ones."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from conftest import EXECUTION, move
from torch.nn.functional import log_softmax

from salsa.algorithms.ppo import Ppo
from salsa.data import benchmark, chat, gold
from salsa.evaluate import gates, generate, geometry, landscape, respond, score
from salsa.rl import models, rollout
from salsa.workflow import config, runs, schema

LENGTHS = config.Lengths(prompt=64, response=10)
SEED = 21


@pytest.fixture(scope="module")
def benchmarks(prepare_run, tmp_path_factory):
    """Finished benchmark runs by role."""
    root, made = tmp_path_factory.mktemp("benchmarks"), {}
    for kind, count in (("in_distribution", 7), ("two_turn", 5)):
        task = schema.from_dict(config.Task, runs.manifest_of(prepare_run)["settings"]["task"])
        settings = config.BenchmarkSettings(kind, config.Benchmark(kind, count), task)
        folder = root / kind
        runs.execute(
            "benchmark", benchmark.VERSION, benchmark.make, settings, {"prepare": prepare_run}, folder, EXECUTION
        )
        made[f"benchmark/{kind}"] = folder
    return made


@pytest.fixture(scope="module")
def policy_run(parents, tokenizer, tmp_path_factory):
    """What PPO leaves: a policy near sft0, and a manifest with its settings; by reference."""
    root = tmp_path_factory.mktemp("policies")

    def make(weights, kind="soup"):
        folder = root / f"{kind}-{'-'.join(weights).replace('/', '_')}"
        ppo = Ppo(iterations=3)
        settings = config.TRAINING["ppo"](4, 0.1, ["1"], config.Reference(kind, list(weights)), ppo, LENGTHS)

        def write(settings, parents, output, execution):
            model = move(models.load_policy(parents["sft0"] / "model"), 9, 0.01)
            model.save_pretrained(output / "model")
            tokenizer.save_pretrained(output / "model")
            runs.write_jsonl(output / "metrics.jsonl", [{"iteration": i} for i in range(settings.ppo.iterations)])

        runs.execute("ppo", 1, write, settings, parents, folder, EXECUTION)
        return folder

    return make


@pytest.fixture(scope="module")
def responded(parents, benchmarks, policy_run, tmp_path_factory):
    """The stage respond, run on a policy whose reference is the soup: (folder, summary, policy)."""
    folder = policy_run(["1/2", "1/2"])
    output = tmp_path_factory.mktemp("respond")
    settings = config.RespondSettings(SEED, 1.0, LENGTHS)
    summary = respond.respond(settings, {**parents, **benchmarks, "policy": folder}, output, EXECUTION)
    return output, summary, models.load_policy(folder / "model")


@torch.no_grad()
def naive_answer(model, tokenizer, messages, key, temperature=1.0):
    """One answer, a token at a time: (token ids, text)."""
    prompt = chat.encode_prompts(tokenizer, [messages])[0]
    noise = rollout.uniforms(SEED, 0, [key], LENGTHS.response)[0]
    ends, response = chat.end_ids(model, tokenizer), []
    for uniform in noise:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, -1].double()
        if temperature == 0:
            response.append(int(logits.argmax()))
        else:
            cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(0)
            response.append(int((cumulative <= uniform).sum()))
        if response[-1] in ends:
            break
    return prompt, response, tokenizer.decode(response, skip_special_tokens=True)


@torch.no_grad()
def naive_reward(model, prompt, response):
    hidden = model.classifier.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]
    return ((model.classifier.score(hidden)[0] - model.mean) / model.std).item()


@torch.no_grad()
def naive_kl(model, reference, prompt, response):
    ids = torch.tensor([prompt + response])
    ours, theirs = (log_softmax(m(input_ids=ids).logits[0, len(prompt) - 1 : -1], dim=-1) for m in (model, reference))
    return (ours.exp() * (ours - theirs)).sum().item()


def test_answers_are_those_of_the_policy_turn_by_turn(responded, benchmarks, tokenizer, parents):
    output, _, policy = responded
    rows = runs.read_jsonl(output / "responses.jsonl")
    reward_model, judge = models.load_score_model(parents["reward_model"]), gold.load(parents["prepare"])
    assert [row["benchmark"] for row in rows] == ["in_distribution"] * 7 + ["two_turn"] * 5
    asked = {
        (role.removeprefix("benchmark/"), row["id"]): row
        for role, folder in benchmarks.items()
        for row in runs.read_jsonl(folder / "benchmark.jsonl")
    }
    assert len(asked) == len(rows) == len({(row["benchmark"], row["prompt_id"]) for row in rows})
    assert any(text for row in rows for text in row["responses"])
    ends = chat.end_ids(policy, tokenizer)
    for row in rows:
        question = asked[row["benchmark"], row["prompt_id"]]
        assert row["model"] == "policy" and row["prompt"] == question["turns"]
        assert row["category"] == question["category"]
        messages, rewards, golds = [], [], []
        for turn, text in enumerate(row["prompt"]):
            messages.append({"role": "user", "content": text})
            key = f"{row['benchmark']}/{row['prompt_id']}/{turn}"
            prompt, response, answer = naive_answer(policy, tokenizer, messages, key)
            assert row["responses"][turn] == answer and row["tokens"][turn] == len(response)
            assert row["finish_reasons"][turn] == ("stop" if response[-1] in ends else "length")
            rewards.append(naive_reward(reward_model, prompt, response))
            golds.append(judge.score([messages], [answer])[0])
            messages.append({"role": "assistant", "content": answer})
        assert row["reward"] == pytest.approx(np.mean(rewards), abs=1e-4)
        assert row["gold"] == pytest.approx(np.mean(golds))


def test_evaluation_measures_how_far_the_policy_went(responded, parents, tokenizer, sft_models):
    output, summary, policy = responded
    rows = runs.read_jsonl(output / "evaluation.jsonl")
    prompts = {row["id"]: row["prompt"] for row in runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")}
    soup = models.mix_policies([parents[f"sft{i}"] / "model" for i in (0, 1)], ["1/2", "1/2"])
    reward_model = models.load_score_model(parents["reward_model"])
    assert [row["prompt_id"] for row in rows] == list(prompts)
    for row in rows:
        assert row["prompt"] == prompts[row["prompt_id"]]
        key = f"evaluation/{row['prompt_id']}/0"
        prompt, response, answer = naive_answer(policy, tokenizer, row["prompt"], key)
        assert row["response"] == answer and row["tokens"] == len(response)
        assert row["reward"] == pytest.approx(naive_reward(reward_model, prompt, response), abs=1e-4)
        assert row["kl_to_sft0"] == pytest.approx(naive_kl(policy, sft_models[0], prompt, response), abs=1e-4)
        assert row["kl_to_reference"] == pytest.approx(naive_kl(policy, soup, prompt, response), abs=1e-4)
    assert summary.pop("left_out") == {"in_distribution": 0, "two_turn": 0}
    assert summary == runs.read_json(output / "evaluation.json")
    assert summary["prompts"] == len(rows) and summary["iteration"] == 3
    for name, column in {
        "reward": "reward",
        "gold_reward": "gold",
        "kl_to_sft0": "kl_to_sft0",
        "kl_to_reference": "kl_to_reference",
    }.items():
        values = [row[column] for row in rows]
        assert summary[name] == pytest.approx(np.mean(values))
        assert summary[f"{name}_se"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))
    assert summary["response_length"] == np.mean([row["tokens"] for row in rows])
    assert summary["eos_rate"] == np.mean([row["finish_reason"] == "stop" for row in rows])
    assert 0.001 < summary["kl_to_sft0"] < summary["kl_to_reference"]


def test_where_the_policy_went_in_weight_space(responded, parents, policy_run, tmp_path):
    folder = policy_run(["1/2", "1/2"]) / "model"
    expected = geometry.describe(folder, parents["sft0"] / "model", parents["sft1"] / "model")
    assert runs.read_json(responded[0] / "geometry.json") == expected | {"start": ["1"]}
    alone = {role: folder for role, folder in parents.items() if role != "sft1"}  # a study of one SFT model
    settings = config.RespondSettings(SEED, 1.0, LENGTHS)
    respond.respond(settings, {**alone, "policy": policy_run(["1"])}, tmp_path, EXECUTION)
    found = runs.read_json(tmp_path / "geometry.json")
    assert found["sft0_to_sft1"] is None and found["from_sft0"] == expected["from_sft0"] > 0


@pytest.mark.parametrize(("weights", "kind"), [(["1"], "soup"), (["1/2", "1/2"], "noise")])
def test_the_reference_is_the_one_that_ppo_had(parents, policy_run, tmp_path, weights, kind):
    settings = config.RespondSettings(SEED, 1.0, LENGTHS)
    summary = respond.respond(settings, {**parents, "policy": policy_run(weights, kind)}, tmp_path, EXECUTION)
    assert runs.read_jsonl(tmp_path / "responses.jsonl") == []
    assert (summary["kl_to_reference"] == summary["kl_to_sft0"]) is (kind == "soup")
    assert summary["kl_to_reference"] > 0.001


def test_answers_need_no_company(sft_models, tokenizer, benchmarks):
    rows = runs.read_jsonl(benchmarks["benchmark/two_turn"] / "benchmark.jsonl")
    settings = config.RespondSettings(SEED, 0.7, LENGTHS)

    def texts(rows, micro_batch):
        execution = dataclasses.replace(EXECUTION, micro_batch=micro_batch)
        answers = generate.answer(sft_models[0], tokenizer, rows, "b", settings, execution, settings.temperature)
        return [[turn[i] for turn in answers.texts] for i in range(len(rows))]

    whole = texts(rows, 64)
    assert texts(rows[::-1], 2) == whole[::-1] and texts(rows[:1], 1) == whole[:1]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_temperatures(sft_models, tokenizer, temperature):
    settings = config.RespondSettings(SEED, 1.0, LENGTHS)
    rows = [
        {"id": i, "turns": [text]} for i, text in enumerate(["write one sentence", "a fox", "tell me about a kite"])
    ]
    answers = generate.answer(sft_models[0], tokenizer, rows, "b", settings, EXECUTION, temperature)
    for i, row in enumerate(rows):
        messages = [generate.user(row["turns"][0])]
        assert answers.responses[0][i] == naive_answer(sft_models[0], tokenizer, messages, f"b/{i}/0", temperature)[1]


def test_messages_before_the_first_turn_are_seen(sft_models, tokenizer):
    before = [generate.user("a fox"), {"role": "assistant", "content": "the fox"}]
    evaluation = [{"id": "x", "prompt": [*before, generate.user("a kite")]}, {"id": "y", "prompt": before[:1]}]
    answers = respond.evaluation_answers(
        sft_models[0], tokenizer, evaluation, config.RespondSettings(SEED, 0.7, LENGTHS), EXECUTION
    )
    assert answers.conversations[0] == [row["prompt"] for row in evaluation]
    for i, row in enumerate(evaluation):
        prompt, response, _ = naive_answer(sft_models[0], tokenizer, row["prompt"], f"evaluation/{row['id']}/0")
        assert (answers.prompts[0][i], answers.responses[0][i]) == (prompt, response)


def test_mean_and_error():
    assert score.mean_and_error(None) == (None, None)
    mean, error = score.mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3 and error == pytest.approx(np.sqrt(7 / 3))
    assert score.mean_and_error([2.0]) == (2.0, None)  # JSON holds no nan


@pytest.fixture(scope="module")
def surveyed(parents, benchmarks, tmp_path_factory):
    """The stages landscape and gates: (folder of the first, numbers of the second)."""
    output = tmp_path_factory.mktemp("landscape")
    settings = config.LandscapeSettings(SEED, ["0.25", "1/2"], 1.0, LENGTHS)
    landscape.survey(settings, {**parents, **benchmarks}, output, EXECUTION)
    limits = config.Gates(smallest_kl=1e3, lowest_agreement=0.95, highest_agreement=0.99, largest_barrier=1e3)
    numbers = gates.check(config.GatesSettings(limits), parents | {"landscape": output}, output, EXECUTION)
    return output, numbers


def test_the_line_between_the_sft_models(surveyed, parents, tokenizer, sft_models):
    output, gates = surveyed
    with open(output / "line.csv", encoding="utf-8") as file:
        line = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["alpha"] for row in line] == [0, 0.25, 0.5, 1]  # the ends and the soup are always there
    folders = [parents[f"sft{i}"] / "model" for i in (0, 1)]
    rows = runs.read_jsonl(parents["prepare"] / "sft_validation.jsonl")
    validation = [chat.encode_conversation(tokenizer, row["messages"]) for row in rows]
    validation = [(p, r) for p, r in validation if len(p) <= LENGTHS.prompt and len(r) <= LENGTHS.response]
    evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")
    samples = [
        naive_answer(sft_models[0], tokenizer, row["prompt"], f"evaluation/{row['id']}/0")[:2] for row in evaluation
    ]
    for row in line:
        model = models.mix_policies(folders, [1 - row["alpha"], row["alpha"]])
        total = 0.0
        with torch.no_grad():
            for prompt, response in validation:
                logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                losses = torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
                total += losses.item()
        assert row["loss"] == pytest.approx(total / sum(len(r) for _, r in validation), rel=1e-4)
        straight = (1 - row["alpha"]) * line[0]["loss"] + row["alpha"] * line[-1]["loss"]
        assert row["loss_interpolated"] == pytest.approx(straight)
        kls = [naive_kl(sft_models[0], model, *pair) for pair in samples]  # KL(sft0 ‖ soup), on samples of sft0
        assert row["kl_from_sft0"] == pytest.approx(np.mean(kls), abs=1e-4)
        assert row["kl_from_sft0_se"] == pytest.approx(np.std(kls, ddof=1) / 4, abs=1e-4)
    assert gates["kl_sft0_soup"] == line[2]["kl_from_sft0"] > 0.01
    assert gates["barrier"] == pytest.approx(max(row["loss"] - row["loss_interpolated"] for row in line))
    assert gates["gold"] == {name: line[i]["gold_reward"] for name, i in (("sft0", 0), ("soup", 2), ("sft1", 3))}


def test_gates_that_fail_warn_and_stop_nothing(surveyed):
    output, gates = surveyed
    assert gates == runs.read_json(output / "gates.json")
    assert len(gates["warnings"]) == 2 and "almost sft0" in gates["warnings"][0]
    assert "agrees with gold is 0.9, not 0.95 to 0.99" in gates["warnings"][1]


def test_the_soups_advantage_is_that_of_the_responses_that_are_written(surveyed):
    output, numbers = surveyed
    rows = runs.read_jsonl(output / "responses.jsonl")
    for measure in ("reward", "gold"):
        mean, error = gates.advantage(rows, measure)
        assert numbers[f"soup_minus_sft0_{measure}"] == pytest.approx(mean)
        assert numbers[f"soup_minus_sft0_{measure}_se"] == pytest.approx(error)


def test_the_ends_and_the_soup_answer_the_benchmarks(surveyed, benchmarks, tokenizer, sft_models, parents):
    output, _ = surveyed
    rows = runs.read_jsonl(output / "responses.jsonl")
    assert sorted({row["model"] for row in rows}) == ["sft0", "sft1", "soup"] and len(rows) == 3 * 12
    soup = models.mix_policies([parents[f"sft{i}"] / "model" for i in (0, 1)], ["1/2", "1/2"])
    answering = {"sft0": sft_models[0], "sft1": sft_models[1], "soup": soup}
    for row in rows:
        messages = [generate.user(row["prompt"][0])]
        key = f"{row['benchmark']}/{row['prompt_id']}/0"
        assert row["responses"][0] == naive_answer(answering[row["model"]], tokenizer, messages, key)[2]
