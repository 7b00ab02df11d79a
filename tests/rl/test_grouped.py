"""RLOO and GRPO: their advantages and losses against plain loops, and whole runs against a plain implementation."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import Naive, assert_same_training, exact_norm, largest_difference, make_trainer, train
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from salsa import algorithms
from salsa.algorithms.grpo import Grpo
from salsa.algorithms.rloo import Rloo
from salsa.rl import batches, forward, models, rollout, trainer
from salsa.workflow import config, runs, schema

SECTIONS = {"rloo": Rloo, "grpo": Grpo}
SMALL = {
    "iterations": 2,
    "batch_size": 8,
    "samples": 2,
    "epochs": 2,
    "mini_batches": 2,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "clip_range": 0.05,
    "missing_eos_penalty": 0.7,
}
LENGTHS = config.Lengths(64, 8)
HALVES = ["1/2", "1/2"]


def make_settings(kind, reference=("1",), start=("1",), kl_coef=0.1, anchor="soup", mixed_precision="no", **section):
    moving = {name: section.pop(name) for name in ("rate", "every") if name in section}
    reference = config.Reference(anchor, list(reference), **moving)
    section = SECTIONS[kind](**SMALL | section)
    return config.TRAINING[kind](7, kl_coef, list(start), reference, section, LENGTHS, mixed_precision)


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


# Equations


@st.composite
def cases(draw):
    """(samples, lengths, seed): some prompts with as many responses each, of up to 5 tokens."""
    samples, count = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 5), min_size=samples * count, max_size=samples * count))
    return samples, lengths, draw(st.integers(0, 2**31))


def batch_of(lengths, seed, references=2):
    """A Batch in float64, with anything finite where it is masked, and the log-probabilities of a newer policy."""
    generator, count, longest = torch.Generator().manual_seed(seed), len(lengths), max(lengths)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    sequences = forward.Sequences(torch.zeros(count, longest + 1), torch.ones(count, longest + 1), mask, mask[:, 0] > 0)
    old = random(count, longest)
    tensors = {
        "paid": random(count),
        "old_logprobs": old,
        "reference_logprobs": random(count, references, longest),
    }
    newer = old + 0.3 * random(count, longest)
    batch = batches.Batch(sequences, tensors, [0.3, 0.7], 0.4, longest=7)
    return batch, newer


def response_kl(batch, row, estimator, logprobs=None):
    """Plain: a number for each token of a response."""
    ours = batch["old_logprobs"] if logprobs is None else logprobs
    estimates = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}
    kls = []
    for t in range(int(batch.mask[row].sum())):
        deltas = [ours[row, t].item() - batch["reference_logprobs"][row, r, t].item() for r in range(2)]
        kls.append(sum(w * estimates[estimator](d) for w, d in zip(batch.weights, deltas, strict=True)))
    return kls


def group_of(row, samples):
    first = row - row % samples
    return range(first, first + samples)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_rloo_is_that_of_plain_loops(case):
    samples, lengths, seed = case
    batch, newer = batch_of(lengths, seed)
    section = Rloo(batch_size=len(lengths), samples=samples, clip_range=0.1)
    rloo = algorithms.kinds()["rloo"]
    rewards = [batch["paid"][i].item() - 0.4 * sum(response_kl(batch, i, "k1")) for i in range(len(lengths))]
    advantages, losses, clipped = [], [], []
    for i, length in enumerate(lengths):
        others = [rewards[j] for j in group_of(i, samples) if j != i]
        advantages.append(rewards[i] - sum(others) / len(others))
        ratio = math.exp(sum((newer[i, t] - batch["old_logprobs"][i, t]).item() for t in range(length)))
        bounded = min(max(ratio, 0.9), 1.1)
        losses.append(-min(ratio * advantages[i], bounded * advantages[i]))
        clipped.append(-bounded * advantages[i] > -ratio * advantages[i])
    tensors, metrics = rloo.advantages(batch, section)
    assert tensors["advantages"].tolist() == pytest.approx(advantages, abs=1e-10)
    groups = [rewards[i : i + samples] for i in range(0, len(rewards), samples)]
    assert metrics == {"group_deviation": pytest.approx(np.mean([np.std(group, ddof=1) for group in groups]))}
    batch.tensors |= tensors
    loss, metrics = rloo.loss(batch, newer, None, section)
    assert loss.item() == metrics["policy_loss"].item() == pytest.approx(np.mean(losses), abs=1e-10)
    assert metrics["policy_clip_fraction"].item() == pytest.approx(np.mean(clipped))


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.sampled_from(["response", "none"]), st.sampled_from(["k2", "k3"]))
def test_grpo_is_that_of_plain_loops(case, scaled, normalisation, estimator):
    samples, lengths, seed = case
    batch, newer = batch_of(lengths, seed)
    options = {"scale_by_deviation": scaled, "length_normalisation": normalisation, "kl_estimator": estimator}
    section = Grpo(batch_size=len(lengths), samples=samples, clip_range=0.1, **options)
    grpo = algorithms.kinds()["grpo"]
    losses, penalties, clipped, advantages = [], [], [], []
    for i, length in enumerate(lengths):
        scores = [batch["paid"][j].item() for j in group_of(i, samples)]
        advantage = batch["paid"][i].item() - sum(scores) / samples
        if scaled:
            advantage /= math.sqrt(sum((s - sum(scores) / samples) ** 2 for s in scores) / (samples - 1)) + 1e-4
        ratios = [math.exp((newer[i, t] - batch["old_logprobs"][i, t]).item()) for t in range(length)]
        bounded = [min(max(ratio, 0.9), 1.1) for ratio in ratios]
        tokens = [-min(r * advantage, b * advantage) for r, b in zip(ratios, bounded, strict=True)]
        divisor = length if normalisation == "response" else 7
        losses.append(sum(tokens) / divisor)
        penalties.append(sum(response_kl(batch, i, estimator, newer)) / divisor)
        clipped.append(np.mean([-b * advantage > -r * advantage for r, b in zip(ratios, bounded, strict=True)]))
        advantages.append([advantage if t < length else 0.0 for t in range(max(lengths))])
    tensors, metrics = grpo.advantages(batch, section)
    np.testing.assert_allclose(tensors["advantages"].numpy(), advantages, atol=1e-10)
    groups = batch["paid"].view(-1, samples).numpy()
    assert metrics == {"group_deviation": pytest.approx(np.mean([np.std(group, ddof=1) for group in groups]))}
    batch.tensors |= tensors
    loss, metrics = grpo.loss(batch, newer, None, section)
    assert metrics["policy_loss"].item() == pytest.approx(np.mean(losses), abs=1e-10)
    assert loss.item() == pytest.approx(np.mean(losses) + 0.4 * np.mean(penalties), abs=1e-10)
    assert metrics["policy_clip_fraction"].item() == pytest.approx(np.mean(clipped))


def test_equal_scores_teach_nothing():
    batch, _ = batch_of([3, 2, 4, 1], 0)
    batch.tensors["paid"] = torch.tensor([0.1, 0.1, 0.7, 0.7], dtype=torch.float64)
    batch.kl_coef = 0.0
    for kind, section in SECTIONS.items():
        tensors, _ = algorithms.kinds()[kind].advantages(batch, section(batch_size=4, samples=2))
        assert not tensors["advantages"].any()


@pytest.mark.parametrize(("advantage", "wanted"), [(1.0, 0.0), (0.0, 0.0), (-1.0, math.exp(30))])
def test_a_response_that_became_far_likelier_has_a_finite_gradient(advantage, wanted):
    """By e^100: its advantage is silenced by the clip, or nothing, or pushes it down."""
    batch, _ = batch_of([2], 0)
    batch.tensors = {"old_logprobs": torch.full((1, 2), -60.0), "advantages": torch.tensor([advantage])}
    logprobs = torch.full((1, 2), -10.0, requires_grad=True)
    loss, metrics = algorithms.kinds()["rloo"].loss(batch, logprobs, None, Rloo(clip_range=0.2))
    loss.backward()
    assert loss.item() == pytest.approx(wanted if advantage < 0 else -1.2 * advantage)
    assert logprobs.grad.tolist() == [[pytest.approx(wanted)] * 2]
    assert metrics["policy_clip_fraction"] == float(advantage > 0)


# Whole runs


class NaiveRloo(Naive):
    def advantages(self, rows):
        samples, section = self.section.samples, self.section
        for row in rows:
            row["reward"] = row["paid"] - self.kl_coef * self.response_kl(row, section.kl_estimator)
        deviations = []
        for start in range(0, len(rows), samples):
            group = rows[start : start + samples]
            assert len({row["prompt_id"] for row in group}) == 1
            for row in group:
                row["advantage"] = row["reward"] - np.mean([other["reward"] for other in group if other is not row])
            deviations.append(np.std([row["reward"] for row in group], ddof=1))
        return {"group_deviation": np.mean(deviations)}

    def loss(self, part, distributions):
        clip, loss, clipped = self.section.clip_range, 0.0, 0
        for row, each in zip(part, distributions, strict=True):
            new = sum(each[t, token] for t, token in enumerate(row["response"]))
            ratio, advantage = torch.exp(new - row["old"].sum()), row["advantage"]
            bounded = torch.clamp(ratio, 1 - clip, 1 + clip)
            loss = loss - torch.min(ratio * advantage, bounded * advantage) / len(part)
            clipped += int(-bounded * advantage > -ratio * advantage)
        return loss, len(part), {"policy_loss": loss.item() * len(part), "policy_clip_fraction": clipped}


class NaiveGrpo(Naive):
    def advantages(self, rows):
        samples, deviations = self.section.samples, []
        for start in range(0, len(rows), samples):
            group = rows[start : start + samples]
            assert len({row["prompt_id"] for row in group}) == 1
            scores = [row["paid"] for row in group]
            deviations.append(np.std(scores, ddof=1))
            for row in group:
                row["advantage"] = row["paid"] - np.mean(scores)
                if self.section.scale_by_deviation:
                    row["advantage"] /= deviations[-1] + 1e-4
        return {"group_deviation": np.mean(deviations)}

    def loss(self, part, distributions):
        grpo, loss, policy, clipped = self.section, 0.0, 0.0, 0.0
        for row, each in zip(part, distributions, strict=True):
            length = len(row["response"])
            divisor = length if grpo.length_normalisation == "response" else self.settings.lengths.response
            for t, token in enumerate(row["response"]):
                ratio, advantage = torch.exp(each[t, token] - row["old"][t]), row["advantage"]
                bounded = torch.clamp(ratio, 1 - grpo.clip_range, 1 + grpo.clip_range)
                surrogate = -torch.min(ratio * advantage, bounded * advantage)
                kl = self.kl(each[t, token], row["references"][t], grpo.kl_estimator)
                loss = loss + (surrogate + self.kl_coef * kl) / divisor / len(part)
                policy += surrogate.item() / divisor
                clipped += int(-bounded * advantage > -ratio * advantage) / length
        return loss, len(part), {"policy_loss": policy, "policy_clip_fraction": clipped}


NAIVE = {"rloo": NaiveRloo, "grpo": NaiveGrpo}


@pytest.mark.parametrize(
    ("kind", "arm", "section"),
    [
        ("rloo", {}, {"max_grad_norm": 0.1}),
        ("rloo", {"reference": HALVES, "kl_coef": 0.5}, {"samples": 4, "mini_batches": 1, "temperature": 0.8}),
        ("rloo", {"reference": HALVES, "start": HALVES}, {"epochs": 1, "score_normalisation": "batch"}),
        ("rloo", {"anchor": "multi_kl", "reference": ["0.7", "0.3"], "kl_coef": 0.5}, {"score_clip": 0.8}),
        ("rloo", {"anchor": "ema", "kl_coef": 2.0}, {"rate": 0.3, "iterations": 3, "mini_batches": 4}),
        ("grpo", {}, {"max_grad_norm": 0.1}),
        (
            "grpo",
            {"reference": HALVES, "kl_coef": 0.5},
            {"samples": 4, "mini_batches": 1, "temperature": 0.8, "iterations": 4},
        ),
        ("grpo", {"reference": HALVES, "kl_coef": 0.5}, {"kl_estimator": "k2", "scale_by_deviation": False}),
        (
            "grpo",
            {"reference": ["0", "1"], "kl_coef": 0.5},
            {"length_normalisation": "none", "scale_by_deviation": False, "score_normalisation": "none"},
        ),
        ("grpo", {"anchor": "multi_kl", "reference": ["0.2", "0.8"], "kl_coef": 0.5}, {"schedule": "linear"}),
        (
            "grpo",
            {"anchor": "reset", "reference": HALVES, "kl_coef": 2.0},
            {"every": 2, "iterations": 3, "kl_schedule": schema.KlSchedule("adaptive", target=0.4, horizon=16)},
        ),
    ],
)
def test_training_is_that_of_a_plain_implementation(make, prompts, reward_run, exact_norms, kind, arm, section):
    chosen = make_settings(kind, **arm, **section)
    made = make(chosen, dtype=torch.float64, micro_batch=3)
    naive = NAIVE[kind](made, chosen, reward_run)
    expected = assert_same_training(made, naive, prompts)
    begun = models.load_policy(made.networks.policy.config._name_or_path)
    assert largest_difference(made.networks.policy, begun) > 1e-3
    assert expected["policy_clip_fraction"] > 0 or section.get("epochs") == 1


@pytest.mark.parametrize("kind", SECTIONS)
def test_it_writes_what_its_record_says(parents, execution, tmp_path, kind):
    chosen = make_settings(kind, samples=4, rollouts_every=2, iterations=3)
    summary = trainer.train(chosen, parents, tmp_path, execution)
    assert summary["kl_gradient"] == {"rloo": "unbiased", "grpo": "biased"}[kind]
    metrics, rows = (runs.read_jsonl(tmp_path / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    contract = {"iteration", "kl_to_sft0", "kl_to_reference", "score", "response_length", "eos_rate"}
    assert all(set(line) == contract | set(algorithms.kinds()[kind].logs) for line in metrics)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "metrics.jsonl", "rollouts.jsonl"}
    assert [row["iteration"] for row in rows] == [0] * 8 + [2] * 8
    assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 4
    assert len({row["prompt_id"] for row in rows[:4]}) == 1 and len({row["response"] for row in rows[:4]}) > 1
    known = {row["id"]: row["prompt"] for row in runs.read_jsonl(parents["prepare"] / "prompts.jsonl")}
    assert all(known[row["prompt_id"]] == row["prompt"] for row in rows)
    assert models.load_policy(tmp_path / "model").config.vocab_size


def test_what_is_biased_is_said(make, capsys):
    for estimator, normalisation in itertools.product(("k2", "k3"), ("response", "none")):
        options = {"kl_estimator": estimator, "length_normalisation": normalisation}
        made = make(make_settings("grpo", **options))
        said = f"grpo.kl_estimator={estimator} grpo.length_normalisation={normalisation}: biased, "
        unbiased = (estimator, normalisation) == ("k2", "none")
        assert made.summary["kl_gradient"] == ("unbiased" if unbiased else "biased")
        assert (said in (out := capsys.readouterr().out)) != unbiased and ("biased" in out) != unbiased


def expected_gradient_of_the_penalty(first, second, reference, section):
    """That of GRPO's loss with β = 1 and no advantages, over all responses of one or two of three words.

    Word 0 ends a response. `first` (3,) are the logits of the first word, `second` (3, 3) those of the second after it;
    `reference` is a pair of such log-probabilities. Returns the gradient by each.
    """
    responses = [(0,), *itertools.product((1, 2), (0, 1, 2))]
    ours = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    loss = 0.0
    for words in responses:
        logprobs, theirs = (
            torch.stack([each[0][words[0]], *(each[1][words[0], word] for word in words[1:])])[None]
            for each in (ours, reference)
        )
        mask = torch.ones(1, len(words))
        sequences = forward.Sequences(torch.zeros(1, 3), torch.ones(1, 3), mask, mask[:, 0] > 0)
        tensors = {
            "old_logprobs": logprobs.detach(),
            "reference_logprobs": theirs[None],
            "advantages": torch.zeros_like(mask),
        }
        batch = batches.Batch(sequences, tensors, [1.0], 1.0, longest=2)
        probability = logprobs.detach().sum().exp()
        loss = loss + probability * algorithms.kinds()["grpo"].loss(batch, logprobs, None, section)[0]
    return torch.autograd.grad(loss, (first, second))


@pytest.mark.parametrize("normalisation", ["response", "none"])
def test_k2s_expected_gradient_is_the_kls_only_where_lengths_do_not_count(normalisation):
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3)) * 2]
    first, second = (each.requires_grad_() for each in logits[:2])
    reference = [each.log_softmax(dim=-1) for each in logits[2:]]
    section = Grpo(kl_estimator="k2", length_normalisation=normalisation)
    found = expected_gradient_of_the_penalty(first, second, reference, section)
    ours, later = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    reached = ours.detach().exp()[1:, None]  # how likely each prefix of one word is
    kl = (ours.exp() * (ours - reference[0])).sum()
    kl = kl + (reached * later[1:].exp() * (later - reference[1])[1:]).sum()
    wanted = torch.autograd.grad(kl / 2, (first, second))  # 2 is the longest response
    equal = [torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(found, wanted, strict=True)]
    # The second word is the last, so that 1/2 is its weight either way.
    assert equal == [normalisation == "none", True]
    cosine = torch.nn.functional.cosine_similarity(found[0], wanted[0], dim=0)
    assert (cosine > 1 - 1e-12) == (normalisation == "none")


@pytest.mark.parametrize(
    ("kind", "section", "said"),
    [
        ("rloo", {"samples": 1}, r"samples=1: must be at least 2"),
        ("grpo", {"samples": 3}, r"batch_size=8: not divisible by grpo\.samples=3; change one"),
        ("rloo", {"mini_batches": 3}, r"batch_size=8: not divisible by rloo\.mini_batches=3; change one"),
        ("grpo", {"kl_estimator": "k1"}, r"kl_estimator=k1: .* zero on average; use kl_estimator=k2"),
        ("rloo", {"warmup": 5}, r"warmup=5: longer than rloo\.iterations=2"),
    ],
)
def test_what_can_not_be_is_refused(kind, section, said):
    with pytest.raises(ValueError, match=said) as refused:
        schema.from_dict(SECTIONS[kind], SMALL | section)
    assert "\n" not in str(refused.value)


def test_too_few_prompts_are_refused(parents, execution, tmp_path):
    chosen = make_settings("grpo", batch_size=128)
    with pytest.raises(runs.UserError, match=r"48 GRPO prompts for grpo.batch_size=128 grpo.samples=2; give more"):
        trainer.train(chosen, parents, tmp_path, execution)


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_learning_rate_that_explodes_ends_the_run(parents, execution, tmp_path, kind):
    with pytest.raises(runs.UserError, match=rf"iteration 0, optimise: .*; lower {kind}\.learning_rate=1e\+30"):
        trainer.train(make_settings(kind, learning_rate=1e30), parents, tmp_path, execution)
    kept = load_file(tmp_path / "diverged.safetensors")
    assert kept["prompt_numbers"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and "advantages" in kept


# Precision


@pytest.fixture
def fresh_precision():
    """The precision is fixed once a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("kind", SECTIONS)
def test_bfloat16_runs(fit, fresh_precision, kind):
    _, metrics = fit(make_settings(kind, HALVES, mixed_precision="bf16"))
    assert len(metrics) == 2 and metrics[0]["sampling_difference"] > 0
    assert abs(metrics[0]["policy_loss"]) < 1


def test_no_rounding_clips_responses_at_the_first_step(make, prompts, fresh_precision):
    """Old log-probabilities that differ by as much as over a thousand tokens in bfloat16, and a narrow clip."""
    options = {"mini_batches": 1, "epochs": 1, "clip_range": 0.01, "kl_coef": 0.0}
    made = make(make_settings("rloo", HALVES, mixed_precision="bf16", **options))
    sample, generator = made._sample, torch.Generator().manual_seed(0)

    def rounded(*args):
        sequences, old, values, difference = sample(*args)
        noise = 0.015 * torch.randn(old.shape, generator=generator)
        return sequences, old + noise * sequences.response_mask, values, difference

    made._sample = rounded
    metrics, _, _ = made.iterate(0, prompts[0][:4], prompts[1][:4])
    assert metrics["policy_clip_fraction"] == 0


def test_a_shift_of_whole_responses_is_no_rounding(make):
    """Rounding of 0.015 nats per token is accepted, and a shift by as much in one direction is not."""
    made, old, mask = make(make_settings("rloo")), torch.zeros(8, 120), torch.ones(8, 120)
    made._check_responses(0.015 * torch.randn(8, 120, generator=torch.Generator().manual_seed(0)), old, mask)
    with pytest.raises(trainer.InvariantError, match=r"responses from the rollout .* differ by 0\.164 nats / √tokens"):
        made._check_responses(old + 0.015, old, mask)


# What changes nothing


def comparable(metrics):
    return [{name: value for name, value in row.items() if not name.startswith(("seconds", "peak"))} for row in metrics]


@pytest.mark.parametrize("kind", SECTIONS)
def test_micro_batches_and_rollout_batches_change_nothing(fit, kind):
    chosen = make_settings(kind, HALVES, samples=4, max_grad_norm=0.2)
    whole, expected = fit(chosen)
    for sizes in ({"micro_batch": 2, "rollout_batch": 6}, {"micro_batch": 3, "rollout_batch": 3}):
        cut, found = fit(chosen, **sizes)
        assert largest_difference(whole.networks.policy, cut.networks.policy) < 1e-5
        for ours, theirs in zip(comparable(expected), comparable(found), strict=True):
            assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", SECTIONS)
def test_padding_changes_nothing(make, prompts, kind):
    """Nor does what stands in it."""
    from test_trainer import pad_and_garble

    chosen, batch = make_settings(kind, HALVES, kl_coef=1.0, samples=4), (prompts[0][:2], prompts[1][:2])
    plain = make(chosen, micro_batch=3)
    expected, sequences, _ = plain.iterate(0, *batch)
    assert (sequences.response_mask == 0).any()
    made = make(chosen, micro_batch=3)
    pad_and_garble(made, 3, 2)
    found, wider, _ = made.iterate(0, *batch)
    assert wider.tokens.shape[1] == sequences.tokens.shape[1] + 5
    assert comparable([found])[0] == pytest.approx(comparable([expected])[0], rel=1e-5, abs=1e-5)
    assert largest_difference(made.networks.policy, plain.networks.policy) < 1e-5


def test_the_first_response_is_the_one_that_ppo_samples(make, prompts):
    (first, second), encoded = rollout.sample_keys(["a", "b"], 3)[::3], prompts[1][:2]
    assert (first, second) == ("a", "b") and rollout.sample_keys(["a"], 1) == ["a"]
    made = make(make_settings("rloo", samples=4))
    _, sequences, _ = made.iterate(0, prompts[0][:2], encoded)
    noise = rollout.uniforms(7, 0, prompts[0][:2], 8)
    fresh = make(make_settings("rloo", samples=4))
    alone, _, _ = fresh.networks("sample", encoded, noise, fresh.end_ids, fresh.pad_id, 64)
    texts = sequences.response_ids()
    assert alone.response_ids() == texts[::4] and len(set(map(tuple, texts[:4]))) > 1


def pay_for_late_words(made):
    """A reward model that pays the share of a response's tokens that are in the last third of the vocabulary."""

    def scores(sequences, micro_batch):
        hits = (sequences.responses >= 110) & sequences.response_mask.bool()
        return hits.sum(dim=1) / sequences.lengths

    made.reward_model.scores = scores


@pytest.mark.parametrize("kind", SECTIONS)
def test_it_learns_what_it_is_paid_for(fit, kind):
    options = {"iterations": 25, "batch_size": 32, "samples": 4, "mini_batches": 1, "clip_range": 0.2}
    chosen = make_settings(kind, kl_coef=0.0, learning_rate=5e-3, missing_eos_penalty=0.0, **options)
    _, metrics = fit(chosen, pay_for_late_words)
    scores = [row["score"] for row in metrics]
    assert scores[0] < 0.4 and np.mean(scores[-3:]) > scores[0] + 0.2
    assert metrics[-1]["kl_to_reference"] > 0.5


@pytest.mark.parametrize("kind", SECTIONS)
def test_adapters_alone_are_trained(fit, kind):
    pytest.importorskip("peft")
    made, _ = fit(make_settings(kind, HALVES, lora_rank=2, learning_rate=1e-2))
    trained = {name for name, tensor in made.networks.named_parameters() if tensor.grad is not None}
    assert trained and all(".lora_" in name for name in trained)
    made.save()
    loaded = models.load_policy(made.output / "model")
    assert not [name for name in loaded.state_dict() if "lora" in name]
