"""PPO as a whole: against a plain implementation of it, its invariants, and whether it learns."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from naive import Naive, assert_same_training, exact_norm, largest_difference, make_trainer, train
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from salsa.algorithms import ppo as ppo_stage
from salsa.algorithms.ppo import Ppo
from salsa.rl import forward, models, objective, rollout, trainer
from salsa.workflow import config, runs, schema

SMALL = {
    "iterations": 2,
    "batch_size": 8,
    "epochs": 2,
    "mini_batches": 2,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "value_model": "reward_model",
    "clip_range": 0.05,
    "value_clip_range": 0.05,
    "missing_eos_penalty": 0.7,
    "gamma": 0.97,
    "rollouts_every": 5,
}
METRICS = [
    *("iteration", "score", "reward", "kl_to_reference", "kl_to_sft0", "kl_k1", "kl_k2", "kl_k3", "response_length"),
    *("eos_rate", "entropy", "policy_loss", "value_loss", "policy_clip_fraction", "value_clip_fraction"),
    *("explained_variance", "gradient_norm", "kl_coef", "learning_rate", "seconds_rollout", "seconds_score"),
    *("seconds_reference", "seconds_optimise", "seconds", "peak_memory_mib"),
]
LENGTHS = config.Lengths(64, 8)
HALVES = ["1/2", "1/2"]


def make_settings(reference=("1",), start=("1",), kl_coef=0.1, seed=7, lengths=LENGTHS, kind="soup", **ppo):
    moving = {name: ppo.pop(name) for name in ("rate", "every") if name in ppo}
    anchor = config.Reference(kind, list(reference), **moving)
    return config.TRAINING["ppo"](seed, kl_coef, list(start), anchor, Ppo(**SMALL | ppo), lengths)


@pytest.fixture
def make(parents, tokenizer, execution, tmp_path):
    """A Trainer of the given settings, on a CPU."""

    def build(settings, dtype=torch.float32, **changes):
        return make_trainer(settings, parents, tokenizer, dataclasses.replace(execution, **changes), tmp_path, dtype)

    return build


@pytest.fixture
def fit(make, prompts):
    """A Trainer that has trained, and its metrics, a list an iteration."""

    def run(settings, prepare=lambda made: None, **changes):
        made = make(settings, **changes)
        prepare(made)
        return made, train(made, prompts)

    return run


@pytest.fixture
def exact_norms(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


class NaivePpo(Naive):
    """The values of single tokens, GAE backwards through a response, and two clipped losses a token."""

    def networks(self, made):
        kind = self.section.value_model
        if kind == "reward_model":
            self.trunk, self.head = copy.deepcopy(self.reward_classifier.model), self.reward_classifier.score.weight[0]
            self.head, self.shift, self.scale = (
                self.head.detach().clone(),
                *(self.constants if self.section.score_normalisation != "none" else (0.0, 1.0)),
            )
        else:
            self.trunk = self.policy.model if kind == "shared" else copy.deepcopy(self.policy.model)
            self.head, self.shift, self.scale = torch.zeros(32, dtype=torch.float64), 0.0, 1.0
        if kind == "shared":
            self.bias = torch.zeros((), dtype=torch.float64)
            return [[*self.policy.parameters(), self.head, self.bias]]
        self.bias = 0.0
        return [[*self.policy.parameters()], [*self.trunk.parameters(), self.head]]

    def values(self, prompt, response):
        states = self.trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        return (states @ self.head + self.bias - self.shift) / self.scale

    def advantages(self, rows):
        ppo = self.section
        for row in rows:
            row["values"] = self.values(row["prompt"], row["response"])
            length, values = len(row["response"]), row["values"]
            rewards = torch.zeros(length, dtype=torch.float64)
            for t in range(length):
                if ppo.kl_in == "reward":
                    rewards[t] -= self.kl_coef * self.kl(row["old"][t], row["references"][t], ppo.kl_estimator)
            rewards[-1] += row["paid"]
            row["advantages"], following = torch.zeros(length, dtype=torch.float64), 0.0
            for t in reversed(range(length)):
                next_value = values[t + 1] if t + 1 < length else 0.0
                delta = rewards[t] + ppo.gamma * next_value - values[t]
                following = delta + ppo.gamma * ppo.lam * following
                row["advantages"][t] = following
            row["returns"] = row["advantages"] + row["values"]
        everything = torch.cat([row["advantages"] for row in rows])
        for row in rows if ppo.whiten_advantages else ():
            centred = row["advantages"] - everything.mean()
            row["advantages"] = centred / torch.sqrt(everything.var(unbiased=False) + 1e-8)
        returns, values = (torch.cat([row[name] for row in rows]) for name in ("returns", "values"))
        return {"explained_variance": (1 - (returns - values).var() / returns.var()).item()}

    def losses(self, row, distributions):
        """Policy loss and value loss summed over tokens, the penalty where it is in the loss, clipped tokens."""
        ppo, values = self.section, self.values(row["prompt"], row["response"])
        sums = {"policy": 0.0, "value": 0.0, "kl": 0.0, "policy_clipped": 0, "value_clipped": 0}
        for t, token in enumerate(row["response"]):
            logprob = distributions[t, token]
            ratio, advantage = torch.exp(logprob - row["old"][t]), row["advantages"][t]
            bounded = torch.clamp(ratio, 1 - ppo.clip_range, 1 + ppo.clip_range)
            sums["policy"] -= torch.min(ratio * advantage, bounded * advantage)
            sums["policy_clipped"] += int(-bounded * advantage > -ratio * advantage)
            old, wanted = row["values"][t], row["returns"][t]
            near = old + torch.clamp(values[t] - old, -ppo.value_clip_range, ppo.value_clip_range)
            sums["value"] += torch.max((values[t] - wanted) ** 2, (near - wanted) ** 2) / 2
            sums["value_clipped"] += int((near - wanted) ** 2 > (values[t] - wanted) ** 2)
            sums["kl"] += self.kl(logprob, row["references"][t], ppo.kl_estimator)
        return sums

    def loss(self, part, distributions):
        found = [self.losses(row, each) for row, each in zip(part, distributions, strict=True)]
        policy, value, kl, policy_clipped, value_clipped = (
            sum(one[name] for one in found) for name in ("policy", "value", "kl", "policy_clipped", "value_clipped")
        )
        tokens = sum(len(row["response"]) for row in part)
        loss = (policy + self.section.value_coef * value) / tokens
        if self.section.kl_in == "loss":
            loss = loss + self.kl_coef * kl / tokens
        return (
            loss,
            tokens,
            {
                "policy_loss": policy.item(),
                "value_loss": value.item(),
                "policy_clip_fraction": policy_clipped,
                "value_clip_fraction": value_clipped,
            },
        )


@pytest.mark.parametrize(
    ("arm", "ppo"),
    [
        ({}, {"max_grad_norm": 0.1}),
        ({"reference": HALVES}, {"value_model": "shared", "max_grad_norm": 0.1}),
        ({"reference": ["0", "1"]}, {"kl_estimator": "k3", "temperature": 0.8, "epochs": 1}),
        ({"reference": HALVES, "start": HALVES}, {"kl_estimator": "k2", "mini_batches": 1}),
        ({"reference": HALVES, "kl_coef": 0.5}, {"kl_in": "loss", "kl_estimator": "k2"}),
        ({"reference": HALVES}, {"value_model": "sft", "schedule": "linear", "warmup": 1, "iterations": 3}),
        ({"reference": HALVES, "kl_coef": 0.5}, {"whiten_advantages": False}),
        ({"reference": HALVES}, {"score_normalisation": "batch", "score_clip": 0.8}),
        ({"reference": HALVES}, {"score_normalisation": "none", "score_clip": 0.2, "missing_eos_penalty": 2.0}),
        ({"kind": "multi_kl", "reference": ["0.7", "0.3"], "kl_coef": 0.5}, {}),
        ({"kind": "multi_kl", "reference": ["0.2", "0.8"], "kl_coef": 0.5}, {"kl_in": "loss", "kl_estimator": "k3"}),
        ({"kind": "ema", "kl_coef": 2.0}, {"rate": 0.3, "iterations": 3}),
        ({"kind": "reset", "reference": HALVES, "kl_coef": 2.0}, {"every": 2, "iterations": 3}),
        ({"reference": HALVES, "kl_coef": 2.0}, {"kl_schedule": schema.KlSchedule("linear", 0.1), "iterations": 3}),
        (
            {"reference": HALVES, "kl_coef": 2.0},
            {
                "kl_schedule": schema.KlSchedule("adaptive", target=0.4, horizon=16),
                "iterations": 3,
                "kl_in": "loss",
                "kl_estimator": "k2",
            },
        ),
    ],
)
def test_training_is_that_of_a_plain_implementation(make, prompts, reward_run, exact_norms, arm, ppo):
    settings = make_settings(**arm, **ppo)
    made = make(settings, dtype=torch.float64, micro_batch=3)
    naive = NaivePpo(made, settings, reward_run)
    expected = assert_same_training(made, naive, prompts)
    ended = made.networks.policy, made.networks.value_model, made.reference.models[0]
    for mine, theirs in zip(ended[1].parameters(), naive_value_parameters(naive), strict=True):
        assert (mine - theirs.reshape(mine.shape)).abs().max() < 1e-10
    begun = models.load_policy(made.networks.policy.config._name_or_path)
    assert largest_difference(ended[0], begun) > 1e-3
    assert made.reference.moves is (largest_difference(ended[2], make(settings).reference.models[0]) > 1e-4)
    assert expected["policy_clip_fraction"] > 0 or ppo.get("epochs") == 1


def naive_value_parameters(naive):
    """As the trainer's value model has them."""
    shared = naive.section.value_model == "shared"
    return [naive.head, naive.bias] if shared else [*naive.trunk.parameters(), naive.head]


def test_training_writes_a_model_metrics_and_rollouts(parents, tokenizer, execution, sft_models, tmp_path):
    settings = make_settings(iterations=3, rollouts_every=2, schedule="linear", warmup=1)
    summary = trainer.train(settings, parents, tmp_path, execution)
    digest = models.content_sha256(sft_models[0])
    assert summary["reference"] == {"kind": "soup", "weights": ["1"], "sha256": [digest]}
    metrics = runs.read_jsonl(tmp_path / "metrics.jsonl")
    assert len(metrics) == 3 and all(set(METRICS) <= set(row) for row in metrics)
    assert [row["iteration"] for row in metrics] == [0, 1, 2]
    assert [row["learning_rate"] for row in metrics] == pytest.approx([1e-3, 1e-3, 5e-4])
    assert abs(metrics[0]["kl_to_reference"]) < 1e-4 < metrics[2]["kl_to_reference"]
    assert metrics[0]["kl_to_sft0"] == metrics[0]["kl_to_reference"]
    rows = runs.read_jsonl(tmp_path / "rollouts.jsonl")
    assert [row["iteration"] for row in rows] == [0] * 8 + [2] * 8
    assert set(rows[0]) == {"iteration", "prompt_id", "prompt", "response", "score", "kl_to_reference", "kl_to_sft0"}
    assert np.mean([row["score"] for row in rows[8:]]) == pytest.approx(metrics[2]["score"], abs=1e-5)
    known = {row["id"]: row["prompt"] for row in runs.read_jsonl(parents["prepare"] / "prompts.jsonl")}
    assert all(known[row["prompt_id"]] == row["prompt"] for row in rows)
    policy = models.load_policy(tmp_path / "model")
    assert largest_difference(policy, sft_models[0]) > 1e-3
    assert models.load_tokenizer(tmp_path / "model").chat_template == tokenizer.chat_template
    assert policy.generation_config.eos_token_id == sft_models[0].generation_config.eos_token_id


@pytest.mark.parametrize("value_model", ["reward_model", "shared"])
def test_micro_batches_change_nothing(fit, value_model):
    settings = make_settings(["1/2", "1/2"], value_model=value_model, max_grad_norm=0.2)
    whole, expected = fit(settings, micro_batch=64)
    cut, found = fit(settings, micro_batch=2)
    assert whole.progress.steps == cut.progress.steps == 2 * 2 * 2
    assert largest_difference(whole.networks.policy, cut.networks.policy) < 1e-5
    assert largest_difference(whole.networks.value_model, cut.networks.value_model) < 1e-5
    for name in set(METRICS) - {name for name in METRICS if name.startswith(("seconds", "peak"))}:
        assert found[-1][name] == pytest.approx(expected[-1][name], rel=1e-3, abs=1e-4), name


def wide(values, left, right, fill=0):
    """(B, L) with `left` columns before and `right` columns behind."""
    return torch.nn.functional.pad(values, (left, right), value=fill)


def pad_and_garble(made, left, right):
    """Give every rollout more padding, and garbage in all places that no mask covers."""
    original = made._sample
    generator = torch.Generator().manual_seed(3)

    def garbled(values, mask, scale):
        return torch.where(mask, values, scale * torch.randn(values.shape, generator=generator))

    def sample(*arguments):
        sequences, *tensors = original(*arguments)
        attention = wide(sequences.attention_mask, left, right)
        mask = wide(sequences.response_mask, 0, right)
        tokens = wide(sequences.tokens, left, right)
        anything = torch.randint(0, 100, tokens.shape, generator=generator)
        tokens = torch.where(attention.bool(), tokens, anything)
        tensors = [t if t is None else garbled(wide(t, 0, right), mask.bool(), 3.0) for t in tensors]
        return forward.Sequences(tokens, attention, mask, sequences.ended), *tensors

    made._sample = sample


@pytest.mark.parametrize("value_model", ["reward_model", "shared"])
def test_padding_and_what_stands_in_it_change_nothing(make, prompts, value_model):
    settings = make_settings(HALVES, value_model=value_model, kl_coef=1.0, max_grad_norm=0.2)
    batch = prompts[0][:8], prompts[1][:8]
    plain = make(settings, micro_batch=3)
    expected, sequences, per_response = plain.iterate(0, *batch)
    assert (sequences.response_mask == 0).any() and (sequences.attention_mask[:, 0] == 0).any()
    for left, right in ((0, 0), (5, 0), (0, 4), (3, 2)):
        made = make(settings, micro_batch=3)
        pad_and_garble(made, left, right)
        found, wider, per_its_response = made.iterate(0, *batch)
        assert wider.tokens.shape[1] == sequences.tokens.shape[1] + left + right
        assert_same_iteration(made, found, plain, expected)
        for name, values in per_response.items():
            torch.testing.assert_close(per_its_response[name], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value_model", ["reward_model", "shared"])
def test_the_order_of_a_batch_changes_nothing(make, prompts, value_model):
    settings = make_settings(
        HALVES, value_model=value_model, mini_batches=1, max_grad_norm=0.2, score_normalisation="batch"
    )
    plain, permuted = make(settings, micro_batch=3), make(settings, micro_batch=3)
    expected, sequences, per_response = plain.iterate(0, prompts[0][:8], prompts[1][:8])
    order = np.random.default_rng(0).permutation(8)
    found, other, per_its_response = permuted.iterate(0, *([column[i] for i in order] for column in prompts))
    assert_same_iteration(permuted, found, plain, expected)
    assert torch.equal(other.lengths, sequences.lengths[order])
    for name, values in per_response.items():
        torch.testing.assert_close(per_its_response[name], values[order], rtol=1e-5, atol=1e-5)


def assert_same_iteration(made, found, other, expected):
    for name in expected:
        if not name.startswith(("seconds", "peak")):
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    assert largest_difference(made.networks.policy, other.networks.policy) < 1e-5
    assert largest_difference(made.networks.value_model, other.networks.value_model) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_one_until_the_first_step_of_each_iteration(fit, monkeypatch, temperature):
    original, distances = objective.policy_loss, []

    def note(logprobs, old_logprobs, advantages, mask, clip_range):
        distances.append(((logprobs.detach() - old_logprobs) * mask).abs().max().item())
        return original(logprobs, old_logprobs, advantages, mask, clip_range)

    monkeypatch.setattr(objective, "policy_loss", note)
    fit(make_settings(HALVES, iterations=3, temperature=temperature))
    assert len(distances) == 3 * 2 * 2
    for i, distance in enumerate(distances):
        assert distance < 1e-5 if i % 4 == 0 else distance > 1e-3


class Logits(TorchDispatchMode):
    """The rows of every tensor made that has an entry for each word of the vocabulary, by the largest."""

    def __init__(self, size, weights):
        super().__init__()
        self.size, self.weights, self.rows = size, {w.untyped_storage().data_ptr() for w in weights}, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **keywords or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or tensor.shape[-1] != self.size:
                continue
            if tensor.untyped_storage().data_ptr() not in self.weights:
                self.rows.append(tensor.numel() // self.size)
        return made


def test_logits_are_made_a_chunk_at_a_time_and_none_are_kept(make, prompts, monkeypatch):
    settings = make_settings(HALVES, batch_size=24, epochs=2, mini_batches=1)
    made = make(settings, rollout_batch=2)
    policy, batch = made.networks.policy, (prompts[0][:24], prompts[1][:24])
    size, hidden = policy.config.vocab_size, policy.config.hidden_size
    monkeypatch.setattr(forward, "CHUNK", 3 * size)
    weights = [p for m in (policy, made.sft0, *made.reference.models) for p in m.parameters()]
    seen, kept = [], []
    policy.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(len(output)) if torch.is_grad_enabled() else None
    )

    def note(tensor):
        if tensor.dim() and tensor.shape[-1] == size and not isinstance(tensor, torch.nn.Parameter):
            kept.append(tensor.shape)
        return tensor

    with Logits(size, weights) as made_of, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _, sequences, _ = made.iterate(0, *batch)
    tokens = int(sequences.response_mask.sum())
    assert max(made_of.rows) == hidden < tokens / 2  # that of the head's gradient
    assert max(rows for rows in made_of.rows if rows != hidden) == 3
    assert sum(seen) == 2 * 2 * tokens and max(seen) == 3  # forward, and again in the backward pass; no prompts
    assert kept == []


@pytest.mark.parametrize(("estimator", "place", "word"), [("k3", "reward", "biased"), ("k2", "loss", "unbiased")])
def test_a_biased_penalty_is_marked(make, capsys, estimator, place, word):
    made = make(make_settings(kl_estimator=estimator, kl_in=place))
    assert made.summary["kl_gradient"] == word
    said = f"ppo.kl_estimator={estimator} ppo.kl_in={place}: biased"
    assert capsys.readouterr().out.count(said) == (word == "biased")


def test_the_same_seed_gives_the_same_bits(fit):
    models_and_metrics = [fit(make_settings(["1/2", "1/2"], seed=seed)) for seed in (1, 1, 2)]
    (first, one), (second, two), (third, _) = models_and_metrics
    assert largest_difference(first.networks.policy, second.networks.policy) == 0
    assert largest_difference(first.networks.value_model, second.networks.value_model) == 0
    for name in METRICS:
        if not name.startswith(("seconds", "peak")):
            assert [row[name] for row in one] == [row[name] for row in two]
    assert largest_difference(first.networks.policy, third.networks.policy) > 1e-4


@pytest.mark.parametrize("value_model", ["reward_model", "shared"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(fit, value_model):
    settings = make_settings(value_model=value_model)
    plain, _ = fit(settings)
    calls = []

    def count(made):
        first = made.networks.policy.model.layers[0].self_attn
        first.register_forward_pre_hook(lambda module, inputs: calls.append(torch.is_grad_enabled()))

    fit(settings, count)
    without = sum(calls)
    calls.clear()
    recomputed, _ = fit(settings, count, gradient_checkpointing=True)
    assert sum(calls) == 2 * without
    assert largest_difference(plain.networks.policy, recomputed.networks.policy) < 1e-6
    assert not recomputed.networks.policy.training


def test_a_reference_of_its_own_has_a_kl_from_the_start(fit):
    made, metrics = fit(make_settings(["1/2", "1/2"], iterations=1))
    assert metrics[0]["kl_to_reference"] > 0.01 > 1e-4 > abs(metrics[0]["kl_to_sft0"])
    assert not made.starts_at_reference
    made, metrics = fit(make_settings(["1/2", "1/2"], ["1/2", "1/2"], iterations=1))
    assert abs(metrics[0]["kl_to_reference"]) < 1e-4 and abs(metrics[0]["kl_to_sft0"]) > 1e-3
    assert made.starts_at_reference


def test_arms_see_the_same_prompts_and_noise(make, prompts):
    batch = prompts[0][:8], prompts[1][:8]
    first, second = (make(make_settings(weights)).iterate(0, *batch)[1] for weights in (["1"], ["0", "1"]))
    assert torch.equal(first.tokens, second.tokens)


def test_what_is_logged_is_what_the_record_says(fit):
    _, metrics = fit(make_settings())
    contract = {"iteration", "kl_to_sft0", "kl_to_reference", "score", "response_length", "eos_rate"}
    assert all(set(line) == contract | set(ppo_stage.ALGORITHM.logs) for line in metrics)


def test_every_pass_sees_every_prompt_once():
    order = rollout.prompt_order(10, 7, 3, 5)
    assert [len(batch) for batch in order] == [3] * 7
    for start in (0, 3):
        assert len({int(i) for batch in order[start : start + 3] for i in batch}) == 9
    again = rollout.prompt_order(10, 3, 3, 5)
    assert all((a == b).all() for a, b in zip(order[:3], again, strict=True))
    assert any((a != b).any() for a, b in zip(order[:3], order[3:6], strict=True))


def test_a_response_without_end_is_fined(fit):
    def silent(made):
        made.reward_model.scores = lambda sequences, micro_batch: torch.zeros(len(sequences))

    for penalty in (0.0, 2.0):
        settings = make_settings(missing_eos_penalty=penalty, batch_size=32, lengths=config.Lengths(64, 3))
        _, metrics = fit(settings, silent)
        for row in metrics:
            assert row["score"] == 0 and 0 < row["eos_rate"] < 1
            assert row["reward"] == pytest.approx(-penalty * (1 - row["eos_rate"]))


def pay_for_late_words(made):
    """A reward model that pays the share of a response's tokens that are in the last third of the vocabulary."""

    def scores(sequences, micro_batch):
        hits = (sequences.responses >= 110) & sequences.response_mask.bool()
        return hits.sum(dim=1) / sequences.lengths

    made.reward_model.scores = scores


@pytest.mark.parametrize("value_model", ["reward_model", "shared"])
def test_it_learns_what_it_is_paid_for(fit, value_model):
    settings = make_settings(
        iterations=25,
        batch_size=32,
        epochs=2,
        mini_batches=1,
        learning_rate=3e-3,
        clip_range=0.2,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        gamma=1.0,
        value_model=value_model,
    )
    _, metrics = fit(settings, pay_for_late_words)
    scores = [row["score"] for row in metrics]
    assert scores[0] < 0.4 and np.mean(scores[-3:]) > scores[0] + 0.2
    assert metrics[-1]["kl_to_reference"] > 0.5


def test_corrupted_logprobs_are_noticed(fit, monkeypatch):
    original = rollout.sample_batch

    def corrupted(*arguments):
        sequences, logprobs, values = original(*arguments)
        logprobs[3, 0] += 0.01
        return sequences, logprobs, values

    monkeypatch.setattr(rollout, "sample_batch", corrupted)
    with pytest.raises(trainer.InvariantError, match="from the rollout"):
        fit(make_settings(["0", "1"]))  # a reference of its own: the KL at step 0 says nothing
    with pytest.raises(trainer.InvariantError):
        fit(make_settings())


def test_a_policy_that_is_not_its_reference_at_step_zero_is_noticed(fit):
    def shift(made):
        with torch.no_grad():
            made.reference.models[0].model.norm.weight.mul_(1.1)

    with pytest.raises(trainer.InvariantError, match="from the reference"):
        fit(make_settings(), shift)


def fill(module):
    with torch.no_grad():
        module.weight.fill_(float("nan"))


@pytest.mark.parametrize(
    ("phase", "broken", "says"),
    [
        ("rollout", lambda made: made.networks.policy.model.norm, "old_logprobs is nan; look at the models"),
        (
            "score",
            lambda made: made.reward_model.classifier.score,
            "score is nan; the reward model .* lower reward_model",
        ),
        (
            "reference",
            lambda made: made.reference.models[0].model.norm,
            "reference_logprobs is nan; look at the models",
        ),
        ("value", lambda made: made.networks.value_model.classifier.score, "old_values is nan; look at the reward"),
    ],
)
def test_numbers_that_are_none_end_the_run(fit, tmp_path, phase, broken, says):
    """In one line that names the phase and what is to blame; the batch is kept, and nothing else."""
    with pytest.raises(runs.UserError, match=f"iteration 0, {phase}: {says}") as refused:
        fit(make_settings(["1/2", "1/2"]), lambda made: fill(broken(made)))
    assert str(refused.value).count("\n") == 0 and "diverged.safetensors" in str(refused.value)
    facts, batch = runs.read_json(tmp_path / "diverged.json"), load_file(tmp_path / "diverged.safetensors")
    assert (facts["iteration"], facts["phase"]) == (0, phase) and len(facts["prompt_ids"]) == len(batch["tokens"]) == 8
    assert {"tokens", "response_mask", "score", "old_logprobs", "reference_logprobs"} <= batch.keys()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_learning_rate_that_explodes_ends_the_run(parents, execution, tmp_path):
    settings = make_settings(learning_rate=1e30)
    execution = dataclasses.replace(execution, checkpoint_every=1)
    with pytest.raises(runs.UserError, match=r"iteration 0, optimise: .*; lower ppo\.learning_rate=1e\+30"):
        runs.execute("ppo", ppo_stage.VERSION, trainer.train, settings, parents, tmp_path, execution)
    kept = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert kept == {"checkpoints", "diverged.json", "diverged.safetensors"}
    assert not list((tmp_path / "checkpoints").glob("0*"))


def test_the_last_good_checkpoint_stays(fit, tmp_path):
    """Weights that the last step of an iteration made infinite are neither saved nor learned from."""

    def explode(made):
        step = made._step

        def steps():
            step()
            if made.progress.steps == 8:  # the last of iteration 1
                made.networks.policy.model.norm.weight.data.fill_(float("inf"))

        made._step = steps

    settings = make_settings(iterations=3)
    with pytest.raises(
        runs.UserError, match=r"iteration 1, optimise: what it left of the networks is not finite; lower"
    ):
        fit(settings, explode, checkpoint_every=1)
    assert [path.name for path in (tmp_path / "checkpoints").glob("0*")] == ["000001"]
    assert fit(settings, checkpoint_every=1)[0].progress.resumed_at == [1]


def test_missing_steps_are_noticed(fit):
    def forget(made):
        step = made._step
        made._step = lambda: (
            step(),
            setattr(made.progress, "steps", made.progress.steps - (made.progress.steps == 3)),
        )[0]

    with pytest.raises(trainer.InvariantError, match="optimizer steps"):
        fit(make_settings(), forget)


def test_too_few_prompts_are_refused(parents, execution, tmp_path):
    with pytest.raises(runs.UserError, match=r"48 PPO prompts for ppo.batch_size=64"):
        trainer.train(make_settings(batch_size=64), parents, tmp_path, execution)
    with pytest.raises(runs.UserError, match=r"lengths.prompt=3"):
        trainer.train(make_settings(lengths=config.Lengths(3, 8)), parents, tmp_path, execution)
    assert not list(tmp_path.iterdir())


def test_bfloat16_runs_and_its_ratio_starts_at_one(fit):
    AcceleratorState._reset_state(True)  # the precision is fixed once a process
    settings = dataclasses.replace(make_settings(iterations=2), mixed_precision="bf16")
    _, metrics = fit(settings)
    AcceleratorState._reset_state(True)
    assert len(metrics) == 2 and abs(metrics[0]["kl_to_reference"]) < 0.1 * metrics[0]["response_length"]
