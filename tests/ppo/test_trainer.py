"""PPO as a whole: against a plain implementation of it, its invariants, and whether it learns."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.functional import log_softmax

from salsa import config, models, runs
from salsa.ppo import rollout, trainer

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


def make_settings(reference=("1",), start=("1",), kl_coef=0.1, seed=11, lengths=LENGTHS, **ppo):
    anchor = config.Reference("soup", list(reference))
    return config.PpoSettings(seed, kl_coef, list(start), anchor, config.Ppo(**SMALL | ppo), lengths)


@pytest.fixture
def make(parents, tokenizer, execution, tmp_path):
    """A Trainer of the given settings, on a CPU."""

    def build(settings, **changes):
        execution_ = dataclasses.replace(execution, **changes)
        accelerator = trainer.make_accelerator(settings, torch.device("cpu"), execution_, tmp_path)
        cast = trainer.load(settings, parents, tokenizer, accelerator.device, execution_)
        return trainer.Trainer(settings, cast, tokenizer, accelerator, execution_, tmp_path)

    return build


@pytest.fixture
def fit(make, prompts):
    """A Trainer that has trained, and its metrics, a list an iteration."""

    def run(settings, prepare=lambda made: None, **changes):
        made = make(settings, **changes)
        prepare(made)
        made.fit([{"id": i, "prompt": []} for i in prompts[0]], prompts[1])
        return made, runs.read_jsonl(made.output / "metrics.jsonl")

    return run


def largest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


class Naive:
    """PPO on one unpadded sequence and one token at a time. Shares with the trainer only its noise and data order."""

    def __init__(self, made, settings):
        self.settings, self.ppo = settings, settings.ppo
        self.policy, self.value_model = copy.deepcopy(made.networks.policy), copy.deepcopy(made.networks.value_model)
        self.reference, self.sft0, self.reward_model = made.reference.models[0], made.sft0, made.reward_model
        self.ends = made.end_ids
        self.shared = self.ppo.value_model == "shared"
        groups = [[*self.policy.parameters(), *self.value_model.parameters()]]
        if not self.shared:
            groups = [list(self.policy.parameters()), list(self.value_model.parameters())]
        self.groups = groups
        options = {"lr": self.ppo.learning_rate, "betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.0}
        self.optimizers = [torch.optim.AdamW(group, **options) for group in groups]

    def distributions(self, model, prompt, response):
        """(T, V) log-probabilities."""
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return log_softmax(logits / self.ppo.temperature, dim=-1)

    def logprobs(self, model, prompt, response):
        return self.distributions(model, prompt, response)[range(len(response)), response]

    def states(self, prompt, response):
        model = self.policy.model if self.shared else self.value_model.classifier.model
        return model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]

    def values(self, prompt, response):
        states = self.states(prompt, response)
        if self.shared:
            return self.value_model(states)[:, 0]
        return (self.value_model.classifier.score(states)[:, 0] - self.value_model.mean) / self.value_model.std

    def respond(self, prompt, noise):
        response = []
        for uniform in noise:
            logits = self.policy(input_ids=torch.tensor([prompt + response])).logits[0, -1].double()
            cumulative = torch.softmax(logits / self.ppo.temperature, dim=-1).cumsum(0)
            response.append(int((cumulative <= uniform * cumulative[-1]).sum()))
            if response[-1] in self.ends:
                break
        return response

    def score(self, prompt, response):
        model = self.reward_model
        hidden = model.classifier.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]
        return ((model.classifier.score(hidden)[0] - model.mean) / model.std).item()

    def kl(self, ours, theirs):
        delta = ours - theirs
        return {"k1": delta, "k2": delta**2 / 2, "k3": torch.exp(-delta) - 1 + delta}[self.ppo.kl_estimator]

    @torch.no_grad()
    def experience(self, iteration, ids, prompts):
        noise = rollout.uniforms(self.settings.seed, iteration, ids, self.settings.lengths.response)
        rows = []
        for prompt, uniforms in zip(prompts, noise, strict=True):
            response = self.respond(prompt, uniforms)
            row = {"prompt": prompt, "response": response, "ended": response[-1] in self.ends}
            row["old"] = self.logprobs(self.policy, prompt, response)
            row["reference"] = self.logprobs(self.reference, prompt, response)
            row["sft0"] = self.logprobs(self.sft0, prompt, response)
            row["values"] = self.values(prompt, response)
            row["score"] = self.score(prompt, response)
            row["paid"] = row["score"] - (0 if row["ended"] else self.ppo.missing_eos_penalty)
            rewards = torch.zeros(len(response))
            if self.ppo.kl_in == "reward":
                rewards -= self.settings.kl_coef * self.kl(row["old"], row["reference"])
            rewards[-1] += row["paid"]
            row["advantages"], following = torch.zeros(len(response)), 0.0
            for t in reversed(range(len(response))):
                next_value = row["values"][t + 1] if t + 1 < len(response) else 0.0
                delta = rewards[t] + self.ppo.gamma * next_value - row["values"][t]
                following = delta + self.ppo.gamma * self.ppo.lam * following
                row["advantages"][t] = following
            row["returns"] = row["advantages"] + row["values"]
            rows.append(row)
        everything = torch.cat([row["advantages"] for row in rows])
        for row in rows:
            centred = row["advantages"] - everything.mean()
            row["advantages"] = centred / torch.sqrt(everything.var(unbiased=False) + 1e-8)
        return rows

    def losses(self, row):
        """Policy loss and value loss of each token, both clipped, and the penalty where it is in the loss."""
        logprobs = self.logprobs(self.policy, row["prompt"], row["response"])
        values = self.values(row["prompt"], row["response"])
        result = {"policy": [], "value": [], "kl": [], "policy_clipped": 0, "value_clipped": 0}
        for t in range(len(row["response"])):
            ratio, advantage = torch.exp(logprobs[t] - row["old"][t]), row["advantages"][t]
            bounded = torch.clamp(ratio, 1 - self.ppo.clip_range, 1 + self.ppo.clip_range)
            result["policy"].append(-torch.min(ratio * advantage, bounded * advantage))
            result["policy_clipped"] += int(-bounded * advantage > -ratio * advantage)
            old, wanted = row["values"][t], row["returns"][t]
            near = old + torch.clamp(values[t] - old, -self.ppo.value_clip_range, self.ppo.value_clip_range)
            result["value"].append(torch.max((values[t] - wanted) ** 2, (near - wanted) ** 2) / 2)
            result["value_clipped"] += int((near - wanted) ** 2 > (values[t] - wanted) ** 2)
            result["kl"].append(self.kl(logprobs[t], row["reference"][t]))
        return result

    def iterate(self, iteration, ids, prompts):
        rows = self.experience(iteration, ids, prompts)
        seen, sums, norms = 0, dict.fromkeys(["policy", "value", "policy_clipped", "value_clipped"], 0.0), []
        for epoch in range(self.ppo.epochs):
            order = np.random.default_rng([self.settings.seed, iteration, epoch]).permutation(len(rows))
            size = len(rows) // self.ppo.mini_batches
            for start in range(0, len(rows), size):
                part = [rows[i] for i in order[start : start + size]]
                tokens = sum(len(row["response"]) for row in part)
                found = [self.losses(row) for row in part]
                policy, value, kl = (sum(sum(one[name]) for one in found) for name in ("policy", "value", "kl"))
                loss = (policy + self.ppo.value_coef * value) / tokens
                if self.ppo.kl_in == "loss":
                    loss = loss + self.settings.kl_coef * kl / tokens
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for group, optimizer in zip(self.groups, self.optimizers, strict=True):
                    norm = math.sqrt(sum(p.grad.square().sum().item() for p in group))
                    for p in group:
                        p.grad *= min(1.0, self.ppo.max_grad_norm / (norm + 1e-6))
                    optimizer.step()
                    norms += [norm] if optimizer is self.optimizers[0] else []
                seen += tokens
                sums["policy"], sums["value"] = sums["policy"] + policy.item(), sums["value"] + value.item()
                for name in ("policy_clipped", "value_clipped"):
                    sums[name] += sum(one[name] for one in found)
        count = len(rows)
        deltas = [row["old"] - row["reference"] for row in rows]
        returns, values = (torch.cat([row[name] for row in rows]) for name in ("returns", "values"))
        return {
            "score": sum(row["score"] for row in rows) / count,
            "reward": sum(row["paid"] for row in rows) / count,
            "kl_to_reference": sum(d.sum().item() for d in deltas) / count,
            "kl_k1": sum(d.sum().item() for d in deltas) / count,
            "kl_k2": sum((d**2 / 2).sum().item() for d in deltas) / count,
            "kl_k3": sum((torch.exp(-d) - 1 + d).sum().item() for d in deltas) / count,
            "kl_to_sft0": sum((row["old"] - row["sft0"]).sum().item() for row in rows) / count,
            "response_length": sum(len(row["response"]) for row in rows) / count,
            "eos_rate": sum(row["ended"] for row in rows) / count,
            "explained_variance": (1 - (returns - values).var() / returns.var()).item(),
            "policy_loss": sums["policy"] / seen,
            "value_loss": sums["value"] / seen,
            "policy_clip_fraction": sums["policy_clipped"] / seen,
            "value_clip_fraction": sums["value_clipped"] / seen,
            "gradient_norm": sum(norms) / len(norms),
            "kl_coef": self.settings.kl_coef,
            "learning_rate": self.ppo.learning_rate,
        }


@pytest.mark.parametrize(
    ("arm", "ppo"),
    [
        ({}, {"max_grad_norm": 0.1}),
        ({"reference": ["1/2", "1/2"]}, {"value_model": "shared", "max_grad_norm": 0.1}),
        ({"reference": ["0", "1"]}, {"kl_estimator": "k3", "temperature": 0.8, "epochs": 1}),
        ({"reference": ["1/2", "1/2"], "start": ["1/2", "1/2"]}, {"kl_estimator": "k2", "mini_batches": 1}),
        ({"reference": ["1/2", "1/2"], "kl_coef": 0.5}, {"kl_in": "loss", "kl_estimator": "k2"}),
    ],
)
def test_an_iteration_is_that_of_a_plain_implementation(make, prompts, arm, ppo):
    settings = make_settings(**arm, **ppo)
    made = make(settings, micro_batch=3)
    naive = Naive(made, settings)
    for iteration in range(2):  # the second one starts from optimizers that have a past
        start = 8 * iteration
        batch = prompts[0][start : start + 8], prompts[1][start : start + 8]
        found, _, _ = made.iterate(iteration, *batch)
        expected = naive.iterate(iteration, *batch)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    assert largest_difference(made.networks.policy, naive.policy) < 2e-5
    assert largest_difference(made.networks.value_model, naive.value_model) < 2e-5
    moved = largest_difference(made.networks.policy, models.load_policy(made.networks.policy.config._name_or_path))
    assert moved > 1e-3
    assert expected["policy_clip_fraction"] > 0 or ppo.get("epochs") == 1


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


def test_every_pass_sees_every_prompt_once():
    ppo = config.Ppo(iterations=7, batch_size=3)
    order = trainer._prompt_order(10, ppo, 5)
    assert [len(batch) for batch in order] == [3] * 7
    for start in (0, 3):
        assert len({int(i) for batch in order[start : start + 3] for i in batch}) == 9
    again = trainer._prompt_order(10, config.Ppo(iterations=3, batch_size=3, learning_rate=1.0), 5)
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


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_larger_kl_coef_keeps_the_policy_nearer(fit, kl_in):
    estimator = "k1" if kl_in == "reward" else "k2"
    distances = []
    for kl_coef in (0.0, 3.0):
        settings = make_settings(
            iterations=8,
            batch_size=32,
            mini_batches=1,
            learning_rate=2e-3,
            kl_coef=kl_coef,
            kl_in=kl_in,
            kl_estimator=estimator,
            missing_eos_penalty=0.0,
        )
        distances.append(fit(settings, pay_for_late_words)[1][-1]["kl_to_reference"])
    assert distances[1] < 0.5 * distances[0]


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


def test_numbers_that_are_none_end_the_run(fit):
    def break_it(made):
        made.reward_model.scores = lambda sequences, micro_batch: torch.full((len(sequences),), float("nan"))

    with pytest.raises(trainer.InvariantError, match="score is nan"):
        fit(make_settings(), break_it)


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
