"""Best of n: the estimator against all subsets, the bound against a distribution, and a policy's answers."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from conftest import EXECUTION
from hypothesis import given
from hypothesis import strategies as st
from test_generate import LENGTHS, ROWS, SETTINGS, SMALL
from test_respond import SEED, naive_answer, naive_reward

from salsa.algorithms import best_of_n, none
from salsa.data import gold
from salsa.evaluate import best_of, generate, respond
from salsa.rl import models
from salsa.workflow import config, runs

samples = st.lists(st.tuples(st.integers(-3, 3), st.floats(-1e3, 1e3)), min_size=1, max_size=9)


@given(samples)
def test_the_estimator_is_the_mean_over_all_subsets(pairs):
    scores, values = map(list, zip(*pairs, strict=True))
    for n in range(1, len(pairs) + 1):
        subsets = list(itertools.combinations(range(len(pairs)), n))
        naive = sum(values[max(subset, key=lambda i: (scores[i], -i))] for subset in subsets) / len(subsets)
        assert best_of.expected(scores, values, n) == pytest.approx(naive, rel=1e-12, abs=1e-9)


@given(samples)
def test_the_best_of_all_is_the_first_of_the_highest_score(pairs):
    scores, values = map(np.array, zip(*pairs, strict=True))
    place = best_of.best(scores[None])[0]
    assert place == list(scores).index(max(scores))
    assert best_of.expected(scores, values, len(pairs)) == values[place]


@pytest.mark.parametrize("n", [2, 5, 32])
def test_the_bound_is_the_kl_where_scores_differ(n):
    """Of `size` equally likely responses the k-th is the best of n with probability (k/size)ⁿ − ((k−1)/size)ⁿ."""
    size = 100_000
    places = np.arange(size + 1, dtype=np.float64) / size
    chosen = np.diff(places**n)
    chosen = chosen[chosen > 0]
    kl = float((chosen * np.log(chosen * size)).sum())
    assert kl <= best_of.bound(n) == pytest.approx(kl, abs=2e-3)
    assert best_of.bound(1) == 0


def test_the_best_of_n_is_chosen_at_each_turn(sft_models, tokenizer):
    """The conversation goes on with the best; each sample has noise of its own, the first that of a single answer."""

    def score(prompts, responses):
        assert len(prompts) == len(responses)
        return np.array([len(response) - response[0] / 1e6 for response in responses])

    best = best_of.BestOf(3, score)
    for execution in (SMALL, dataclasses.replace(EXECUTION, rollout_batch=2), EXECUTION):
        answers = generate.answer(sft_models[0], tokenizer, ROWS, "b", SETTINGS, execution, 1.0, best=best)
        for i, row in enumerate(ROWS):
            messages = []
            for turn, text in enumerate(row["turns"]):
                messages.append(generate.user(text))
                keys = [f"b/{i}/{turn}", *(f"b/{i}/{turn}\nsample {n}" for n in (1, 2))]
                drawn = [naive_answer(sft_models[0], tokenizer, messages, key)[1:] for key in keys]
                response, answer = max(drawn, key=lambda pair: len(pair[0]) - pair[0][0] / 1e6)
                assert answers.responses[turn][i] == response and answers.texts[turn][i] == answer
                messages.append({"role": "assistant", "content": answer})


@pytest.fixture(scope="module")
def untrained(parents, tmp_path_factory):
    """A function that makes the finished run of an algorithm without training, of a start."""
    root = tmp_path_factory.mktemp("untrained")

    def make(kind, section, start):
        folder = root / f"{kind}-{'-'.join(start).replace('/', '_')}"
        settings = config.TRAINING[kind](4, 0.0, start, config.Reference(), section, LENGTHS)
        runs.execute(kind, 1, none.train, settings, parents, folder, EXECUTION)
        return folder

    return make


SOUP = ["1/2", "1/2"]


def test_without_training_the_start_is_the_policy(parents, untrained, tmp_path):
    folder = untrained("none", none.Settings(), SOUP)
    soup = models.mix_policies([parents[f"sft{i}"] / "model" for i in (0, 1)], SOUP)
    policy = models.load_policy(folder / "model").state_dict()
    assert all((policy[name] == tensor).all() for name, tensor in soup.state_dict().items())
    assert runs.read_jsonl(folder / "metrics.jsonl") == []
    settings = config.RespondSettings(SEED, 1.0, LENGTHS)
    summary = respond.respond(settings, {**parents, "policy": folder}, tmp_path, EXECUTION)
    assert summary["iteration"] == 0 and summary["kl_to_sft0"] > 0.001
    assert not {"kl_to_reference", "kl_is_bound"} & summary.keys() and not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize("start", [["1"], SOUP])
def test_answers_of_best_of_n(parents, untrained, tokenizer, tmp_path, start):
    n = 4
    folder = untrained("best_of_n", best_of_n.Settings(n), start)
    settings = config.RespondSettings(SEED, 1.0, LENGTHS)
    summary = respond.respond(settings, {**parents, "policy": folder}, tmp_path, EXECUTION)
    policy, sft0 = models.load_policy(folder / "model"), models.load_policy(parents["sft0"] / "model")
    reward_model, judge = models.load_score_model(parents["reward_model"]), gold.load(parents["prepare"])
    rows, drawn = runs.read_jsonl(tmp_path / "evaluation.jsonl"), runs.read_jsonl(tmp_path / "samples.jsonl")
    assert [row["prompt_id"] for row in drawn] == [row["prompt_id"] for row in rows]
    for row, scores in list(zip(rows, drawn, strict=True))[:6]:
        key = f"evaluation/{row['prompt_id']}/0"
        keys = [key, *(f"{key}\nsample {sample}" for sample in range(1, 32))]
        answers = [naive_answer(policy, tokenizer, row["prompt"], key) for key in keys]
        rewards = [naive_reward(reward_model, *answer[:2]) for answer in answers]
        golds = judge.score([row["prompt"]] * 32, [answer[2] for answer in answers])
        assert scores["reward"] == pytest.approx(rewards, abs=1e-4) and scores["gold"] == pytest.approx(golds)
        assert row["reward"] == max(scores["reward"][:n])
        place = scores["reward"].index(row["reward"])
        assert row["response"] == answers[place][2] and row["gold"] == pytest.approx(golds[place])
        ratio = naive_logprob(policy, *answers[place][:2]) - naive_logprob(sft0, *answers[place][:2])
        assert row["kl_to_sft0"] == pytest.approx(math.log(4) - 3 / 4 + ratio, abs=1e-4)
    assert summary["kl_is_bound"] and summary["prompts"] == len(rows)
    assert (summary["kl_to_sft0"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-6)) is (start == ["1"])
    assert summary["reward"] == pytest.approx(np.mean([max(scores["reward"][:n]) for scores in drawn]))


def naive_logprob(model, prompt, response):
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return sum(row.log_softmax(-1)[token].item() for row, token in zip(logits, response, strict=True))
