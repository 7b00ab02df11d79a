"""A plain implementation of training by policy gradients, which whole runs are compared with."""

import copy
import math
from fractions import Fraction

import numpy as np
import torch
from torch.nn.functional import log_softmax

from salsa import algorithms
from salsa.rl import processes, rollout, trainer
from salsa.workflow import runs


def largest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def make_trainer(settings, parents, tokenizer, execution, output, dtype):
    """A Trainer of the given settings, on a CPU, with all models in one type."""
    accelerator = processes.make_accelerator(settings, torch.device("cpu"), execution)
    made = trainer.load(settings, parents, tokenizer, accelerator.device, execution)
    for model in (made.policy, made.value_model, made.reward_model, made.sft0, *made.reference.models):
        if model is not None:
            model.to(dtype)
    return trainer.Trainer(settings, made, tokenizer, accelerator, execution, output)


def train(made, prompts):
    """Train on (ids, token ids) of prompts. Returns the metrics, a dictionary an iteration."""
    made.fit([{"id": i, "prompt": f"prompt {i}"} for i in prompts[0]], prompts[1])
    return runs.read_jsonl(made.output / "metrics.jsonl")


def exact_norm(self, hidden):
    """What LlamaRMSNorm.forward computes, in the type that a model is held in: transformers' own is in float32."""
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)


class Naive:
    """One unpadded sequence and one token at a time. Shares with the trainer only its noise and data order.

    An algorithm has its `advantages(rows)`, which writes what its loss reads into the rows and returns metrics, and its
    `loss(part, distributions)`: (loss, how many tokens or responses it is a mean over, sums of metrics).
    """

    def __init__(self, made, settings, reward_run):
        self.settings, self.section, self.ends = settings, algorithms.section_of(settings), made.end_ids
        self.policy, self.sft0 = copy.deepcopy(made.networks.policy), made.sft0
        self.references = [copy.deepcopy(model) for model in made.reference.models]
        weights = [float(Fraction(weight)) for weight in settings.reference.weights]
        self.weights = [w for w in weights if w] if settings.reference.kind == "multi_kl" else [1.0]
        self.kl_coef = settings.kl_coef
        self.reward_classifier = made.reward_model.classifier
        constants = runs.read_json(reward_run / "normalisation.json")
        self.constants = constants["mean"], constants["std"]
        self.groups = [[p.requires_grad_() for p in group] for group in self.networks(made)]
        options = {"lr": self.section.learning_rate, "betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.0}
        self.optimizers = [torch.optim.AdamW(group, **options) for group in self.groups]

    def networks(self, made):
        """What is trained: a list of parameters for each network."""
        return [[*self.policy.parameters()]]

    def distributions(self, model, prompt, response):
        """(T, V) log-probabilities."""
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return log_softmax(logits / self.section.temperature, dim=-1)

    def logprobs(self, model, prompt, response):
        return self.distributions(model, prompt, response)[range(len(response)), response]

    def respond(self, prompt, noise):
        response = []
        for uniform in noise:
            logits = self.policy(input_ids=torch.tensor([prompt + response])).logits[0, -1].double()
            cumulative = torch.softmax(logits / self.section.temperature, dim=-1).cumsum(0)
            response.append(int((cumulative <= uniform * cumulative[-1]).sum()))
            if response[-1] in self.ends:
                break
        return response

    def score(self, prompt, response):
        model, (mean, std) = self.reward_classifier, self.constants
        hidden = model.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]
        return ((model.score(hidden)[0] - mean) / std).item()

    def pay(self, rows):
        section, scores = self.section, [row["score"] for row in rows]
        for row in rows:
            paid = row["score"]
            if section.score_normalisation == "none":
                paid = paid * self.constants[1] + self.constants[0]
            if section.score_normalisation == "batch":
                paid = (paid - np.mean(scores)) / math.sqrt(np.var(scores) + 1e-8)
            if section.score_clip > 0:
                paid = min(max(paid, -section.score_clip), section.score_clip)
            row["paid"] = paid - (0 if row["ended"] else section.missing_eos_penalty)

    def kl(self, ours, theirs, estimator):
        """Of one token: towards each reference, weighted. `theirs`: (R,)."""
        total = 0.0
        for weight, other in zip(self.weights, theirs, strict=True):
            delta = ours - other
            estimates = {"k1": delta, "k2": delta**2 / 2, "k3": torch.exp(-delta) - 1 + delta}
            total = total + weight * estimates[estimator]
        return total

    def response_kl(self, row, estimator):
        """Of a whole response, before the steps."""
        return sum(self.kl(*pair, estimator).item() for pair in zip(row["old"], row["references"], strict=True))

    @torch.no_grad()
    def experience(self, iteration, ids, prompts):
        rows = []
        for prompt_id, prompt in zip(ids, prompts, strict=True):
            for sample in range(self.section.samples):
                key = f"{prompt_id}\nsample {sample}" if sample > 0 else prompt_id
                (noise,) = rollout.uniforms(self.settings.seed, iteration, [key], self.settings.lengths.response)
                response = self.respond(prompt, noise)
                row = {"prompt": prompt, "prompt_id": prompt_id, "response": response}
                row["ended"] = response[-1] in self.ends
                row["old"] = self.logprobs(self.policy, prompt, response)
                row["references"] = torch.stack([self.logprobs(m, prompt, response) for m in self.references], dim=1)
                row["sft0"] = self.logprobs(self.sft0, prompt, response)
                row["score"] = self.score(prompt, response)
                rows.append(row)
        self.pay(rows)
        return rows, self.advantages(rows)

    def learning_rate(self, iteration):
        section = self.section
        if iteration < section.warmup:
            return section.learning_rate * (iteration + 1) / section.warmup
        if section.schedule == "linear":
            left = (section.iterations - iteration) / (section.iterations - section.warmup)
            return section.learning_rate * left
        return section.learning_rate

    def step(self, loss, rate):
        """Returns the norm of the policy's gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        norms = []
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in group)))
            for p in group:
                p.grad *= min(1.0, self.section.max_grad_norm / (norms[-1] + 1e-6))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        return norms[0]

    def mini_batches(self, iteration, rows):
        size = len(rows) // self.section.mini_batches
        for epoch in range(self.section.epochs):
            order = np.random.default_rng([self.settings.seed, iteration, epoch]).permutation(len(rows))
            for start in range(0, len(rows), size):
                yield [rows[i] for i in order[start : start + size]]

    def iterate(self, iteration, ids, prompts):
        rows, measured = self.experience(iteration, ids, prompts)
        kl_coef, rate = self.kl_coef, self.learning_rate(iteration)
        norms, totals, seen, tokens, entropy = [], {}, 0, 0, 0.0
        for part in self.mini_batches(iteration, rows):
            distributions = [self.distributions(self.policy, row["prompt"], row["response"]) for row in part]
            loss, units, sums = self.loss(part, distributions)
            norms.append(self.step(loss, rate))
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
            seen += units
            tokens += sum(map(len, distributions))
            entropy -= sum((each.exp() * each).sum().item() for each in distributions)
        count = len(rows)
        kls = {name: sum(self.response_kl(row, name) for row in rows) / count for name in ("k1", "k2", "k3")}
        self.move_on(iteration, kls["k1"], count)
        return {
            "iteration": iteration,
            "score": sum(row["score"] for row in rows) / count,
            "reward": sum(row["paid"] for row in rows) / count,
            "kl_to_reference": kls["k1"],
            **{f"kl_{name}": value for name, value in kls.items()},
            "kl_to_sft0": sum((row["old"] - row["sft0"]).sum().item() for row in rows) / count,
            "response_length": sum(len(row["response"]) for row in rows) / count,
            "eos_rate": sum(row["ended"] for row in rows) / count,
            "entropy": entropy / tokens,
            "gradient_norm": sum(norms) / len(norms),
            "kl_coef": kl_coef,
            "learning_rate": rate,
            **{name: value / seen for name, value in totals.items()},
            **measured,
        }

    @torch.no_grad()
    def move_on(self, iteration, kl, count):
        """What another iteration finds changed: the reference, and kl_coef."""
        schedule, anchor, last = self.section.kl_schedule, self.settings.reference, self.section.iterations - 1
        if schedule.kind == "linear" and iteration < last:
            self.kl_coef += self.settings.kl_coef * (schedule.final - 1) / last
        if schedule.kind == "adaptive":
            error = np.clip((kl - schedule.target) / schedule.target, -0.2, 0.2)
            self.kl_coef *= 1 + error * count / schedule.horizon
        if iteration == last:
            return
        for ours, theirs in zip(self.references[0].parameters(), self.policy.parameters(), strict=True):
            if anchor.kind == "ema":
                ours.copy_((1 - anchor.rate) * ours + anchor.rate * theirs)
            if anchor.kind == "reset" and (iteration + 1) % anchor.every == 0:
                ours.copy_(theirs)


def assert_same_training(made, naive, prompts):
    """Train, and compare each iteration's metrics, and the policy and reference at the end, with the plain ones.

    Returns the metrics of the last iteration.
    """
    made.fit([{"id": i, "prompt": ""} for i in prompts[0]], prompts[1])
    metrics = runs.read_jsonl(made.output / "metrics.jsonl")
    section = naive.section
    count = section.batch_size // section.samples
    order = rollout.prompt_order(len(prompts[0]), section.iterations, count, naive.settings.seed)
    ends = []
    for iteration, (places, found) in enumerate(zip(order, metrics, strict=True)):
        expected = naive.iterate(iteration, *([column[i] for i in places] for column in prompts))
        for name, value in expected.items():
            assert abs(found[name] - value) <= max(1e-10, 1e-7 * abs(value)), (iteration, name, found[name], value)
        ends.append(expected["eos_rate"])
    assert 0 < np.mean(ends) < 1  # some responses end by a token, some by their length
    assert largest_difference(made.networks.policy, naive.policy) < 1e-10
    assert largest_difference(made.reference.models[0], naive.references[0]) < 1e-10
    return expected
