"""PPO against any reference policy, from top to bottom.

One iteration: sample responses, score them, read the reference's log-probabilities and the values, make per-token
rewards and advantages, then take clipped policy and value steps. Everything a step needs is in `iterate`; the pure
functions are in objective.py, sampling in rollout.py, references in reference.py, forward passes in forward.py.

Left out: checkpoints and resume, adaptive kl_coef, moving references.
Sources: 1707.06347 (PPO), 2403.17031 (its details for RLHF), 2411.01798 (SALSA).
"""

import math
import resource
import time

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from salsa import config, forward, models, runs
from salsa.ppo import objective, reference
from salsa.ppo.rollout import sample_batch, uniforms

VERSION = 1


class InvariantError(RuntimeError):
    """Something that must hold in any correct PPO run does not: a bug, or a model that computes inconsistently."""


def train(settings, parents, output, execution):
    """Train a policy. Writes `model/`, metrics.jsonl (one line an iteration) and rollouts.jsonl.

    Parents: `prepare` (prompts.jsonl), `reward_model`, `sft0`, and the other SFT models that start or reference need.
    """
    device = models.prepare_process(execution)
    tokenizer = models.load_tokenizer(models.model_folder(parents["sft0"]))
    rows = runs.read_jsonl(parents["prepare"] / "prompts.jsonl")
    encoded = models.encode_prompts(tokenizer, [row["prompt"] for row in rows])
    rows, encoded = models.within_length(rows, encoded, settings.lengths.prompt, "PPO prompts")
    if len(rows) < settings.ppo.batch_size:
        raise runs.UserError(f"{len(rows)} PPO prompts for ppo.batch_size={settings.ppo.batch_size}; give more")
    trainer = Trainer(settings, parents, tokenizer, device, execution, output)
    trainer.fit(rows, encoded)
    trainer.policy.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    return trainer.summary


class Trainer:
    """The policy, what it is anchored to, what it is paid by, and the loop that trains it."""

    def __init__(self, settings, parents, tokenizer, device, execution, output):
        self.settings, self.ppo, self.lengths = settings, settings.ppo, settings.lengths
        self.tokenizer, self.execution, self.output = tokenizer, execution, output
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=settings.mixed_precision,
            log_with=execution.trackers or None,
            project_dir=str(output / runs.TRACKERS),
        )
        self.device = self.accelerator.device
        torch.manual_seed(settings.seed)
        frozen = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
        folders = reference.sft_folders(parents)

        self.policy = reference.mix(folders, settings.start, self.device, torch.float32)
        evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")
        fixed = reference.fixed_prompts(evaluation, tokenizer, self.lengths.prompt)
        self.reference, anchored_to = reference.build(
            settings, folders, fixed, tokenizer, self.device, frozen, execution.micro_batch
        )
        is_sft0 = settings.reference.kind == "soup" and settings.reference.weights == ["1"]
        self.sft0 = self.reference if is_sft0 else models.load_policy(folders[0], self.device, frozen)
        self.starts_at_reference = settings.reference.kind == "soup" and settings.reference.weights == settings.start
        self.reward_model = models.load_score_model(parents["reward_model"], self.device, frozen)
        self.reward_model.requires_grad_(False)
        self.value_model = _value_model(self.ppo, parents, self.policy, self.device)
        self.recomputed = []  # networks whose activations are computed again in the backward pass
        if execution.gradient_checkpointing:
            separate = self.ppo.value_model == "reward_model"
            self.recomputed = [self.policy, *([self.value_model.classifier] if separate else [])]
        for network in self.recomputed:
            network.gradient_checkpointing_enable()
        self.end_ids = models.end_ids(self.policy, tokenizer)

        self.optimizers = [_adamw(self.policy.parameters(), self.ppo)]
        if self.ppo.value_model == "reward_model":
            self.optimizers.append(_adamw(self.value_model.parameters(), self.ppo))
        else:
            self.optimizers[0].add_param_group({"params": list(self.value_model.parameters())})
        self.steps = 0
        self.summary = {"reference": anchored_to, "parameters": self.policy.num_parameters()}

    def fit(self, rows, encoded):
        """Train on prompts `rows` ({"id", "prompt"}) with token ids `encoded`."""
        if self.execution.trackers:
            self.accelerator.init_trackers("salsa", config={"kl_coef": self.settings.kl_coef})
        order = _prompt_order(len(rows), self.ppo, self.settings.seed)
        metrics, rollouts = [], []
        progress = tqdm(range(self.ppo.iterations), desc="ppo", mininterval=5)
        for iteration in progress:
            chosen = order[iteration]
            found, sequences, per_response = self.iterate(
                iteration, [rows[i]["id"] for i in chosen], [encoded[i] for i in chosen]
            )
            metrics.append(found)
            runs.write_jsonl(self.output / "metrics.jsonl", metrics)
            if self.execution.trackers:
                self.accelerator.log(found, step=iteration)
            if iteration % self.ppo.rollouts_every == 0 or iteration == self.ppo.iterations - 1:
                texts = models.decode(self.tokenizer, sequences)
                for place, (i, text) in enumerate(zip(chosen, texts, strict=True)):
                    numbers = {name: float(values[place]) for name, values in per_response.items()}
                    rollouts.append(
                        {
                            "iteration": iteration,
                            "prompt_id": rows[i]["id"],
                            "prompt": rows[i]["prompt"],
                            "response": text,
                            **numbers,
                        }
                    )
            progress.set_postfix({key: f"{found[key]:.3g}" for key in ("score", "kl_to_reference", "response_length")})
        runs.write_jsonl(self.output / "rollouts.jsonl", rollouts)
        if self.execution.trackers:
            self.accelerator.end_training()
        expected = self.ppo.iterations * self.ppo.epochs * self.ppo.mini_batches
        if self.steps != expected:
            raise InvariantError(f"{self.steps} optimizer steps instead of {expected}")

    def iterate(self, iteration, prompt_ids, prompts):
        """One PPO iteration. Returns its metrics, its Sequences, and score and KL of each response, (B,) each."""
        ppo, clock = self.ppo, _Clock(self.device)
        # 1. Responses, with the log-probabilities that they were sampled from.
        noise = uniforms(self.settings.seed, iteration, prompt_ids, self.lengths.response)
        with self.accelerator.autocast():
            sequences, old_logprobs = sample_batch(
                self.policy,
                prompts,
                noise,
                ppo.temperature,
                self.end_ids,
                self.tokenizer.pad_token_id,
                self.execution.rollout_batch,
            )
        mask = sequences.response_mask
        if self.settings.mixed_precision == "bf16":
            old_logprobs = self._fresh_logprobs(sequences, old_logprobs)
        clock.lap("rollout")

        # 2. What each response earns.
        score = self.reward_model.scores(sequences, self.execution.micro_batch)  # (B,)
        paid = score - ppo.missing_eos_penalty * (~sequences.ended).float()
        clock.lap("score")

        # 3. What the penalty is measured from, and what the value model expects.
        reference_logprobs = self._logprobs(self.reference, sequences)  # (B, T)
        sft0_logprobs = reference_logprobs
        if self.sft0 is not self.reference:
            sft0_logprobs = self._logprobs(self.sft0, sequences)
        clock.lap("reference")
        old_values = self._values(sequences)  # (B, T)
        clock.lap("value")

        # 4. Rewards a token: the penalty at each, the score at the last.
        kl = objective.kl_estimate(old_logprobs, reference_logprobs, ppo.kl_estimator)
        in_reward = kl if ppo.kl_in == "reward" else torch.zeros_like(kl)
        rewards = objective.token_rewards(in_reward, paid, mask, self.settings.kl_coef)

        # 5. Advantages, whitened over the whole batch.
        advantages, returns = objective.gae(rewards, old_values, mask, ppo.gamma, ppo.lam)
        if ppo.whiten_advantages:
            advantages = objective.whiten(advantages, mask)

        # 6. Clipped steps.
        learning_rate = self._set_learning_rate(iteration)
        batch = {
            "old_logprobs": old_logprobs,
            "reference_logprobs": reference_logprobs,
            "advantages": advantages,
            "old_values": old_values,
            "returns": returns,
        }
        losses = self._optimise(iteration, sequences, batch)
        clock.lap("optimise")

        # 7. One line of metrics, of the responses as they were before the steps.
        per_response = {
            "score": score,
            "kl_to_reference": ((old_logprobs - reference_logprobs) * mask).sum(dim=1),
            "kl_to_sft0": ((old_logprobs - sft0_logprobs) * mask).sum(dim=1),
        }
        if iteration == 0 and self.starts_at_reference:
            # A policy that is its reference is at no distance from it.
            self._check_agreement("the reference", old_logprobs, reference_logprobs, mask, mean_tolerance=0.1)
        metrics = {
            "iteration": iteration,
            "score": score.mean().item(),
            "reward": paid.mean().item(),
            "kl_to_reference": per_response["kl_to_reference"].mean().item(),
            "kl_to_sft0": per_response["kl_to_sft0"].mean().item(),
            "response_length": sequences.lengths.float().mean().item(),
            "eos_rate": sequences.ended.float().mean().item(),
            "explained_variance": _explained_variance(old_values, returns, mask),
            "kl_coef": self.settings.kl_coef,
            "learning_rate": learning_rate,
            **losses,
            **clock.seconds(),
            "peak_memory_mib": _peak_memory(self.device),
        }
        for estimator in ("k1", "k2", "k3"):
            estimate = objective.kl_estimate(old_logprobs, reference_logprobs, estimator)
            metrics[f"kl_{estimator}"] = (estimate * mask).sum(dim=1).mean().item()
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise InvariantError(f"iteration {iteration}: {name} is {value}; lower ppo.learning_rate")
        return metrics, sequences, per_response

    def _optimise(self, iteration, sequences, batch):
        """`epochs` x `mini_batches` steps. Returns the losses' metrics, means over tokens and steps."""
        ppo = self.ppo
        totals, tokens_seen, norms = {}, 0, []
        for network in self.recomputed:
            network.train()  # transformers recomputes in this mode alone, and can't sample in it
        for epoch in range(ppo.epochs):
            generator = np.random.default_rng([self.settings.seed, iteration, epoch])
            for part in np.array_split(generator.permutation(len(sequences)), ppo.mini_batches):
                # Micro-batches of like length, so that padding isn't computed. Losses are sums over tokens divided by
                # the mini-batch's tokens, so how it is split changes nothing.
                part = part[np.argsort(sequences.lengths[part].cpu().numpy(), kind="stable")]
                tokens = sequences.response_mask[part].sum().item()
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=True)
                first = epoch == 0 and self.steps == iteration * ppo.epochs * ppo.mini_batches
                for start in range(0, len(part), self.execution.micro_batch):
                    rows = torch.from_numpy(part[start : start + self.execution.micro_batch])
                    found = self._backward(sequences.rows(rows), {k: v[rows] for k, v in batch.items()}, tokens, first)
                    for name, value in found.items():
                        totals[name] = totals.get(name, 0.0) + value
                tokens_seen += tokens
                norms.append(self._step())
        for network in self.recomputed:
            network.eval()
        metrics = {name: value / tokens_seen for name, value in totals.items()}
        return {**metrics, "gradient_norm": float(np.mean(norms))}

    def _backward(self, sequences, batch, tokens, first):
        """Gradients of one micro-batch. Returns sums over its tokens of what is logged."""
        ppo, mask = self.ppo, sequences.response_mask
        batch = {name: values[:, : mask.shape[1]] for name, values in batch.items()}
        with self.accelerator.autocast():
            if ppo.value_model == "shared":
                hidden = forward.hidden_states(self.policy, sequences)
                values = self.value_model(forward.before_responses(hidden, sequences)).squeeze(-1).float()
            else:
                hidden, values = None, self.value_model.values(sequences)
            logprobs, entropies = forward.response_logprobs(self.policy, sequences, ppo.temperature, hidden)
        if first:
            self._check_agreement("the rollout", logprobs, batch["old_logprobs"], mask)  # the ratio starts at 1
        policy_loss, policy_clipped = objective.policy_loss(
            logprobs, batch["old_logprobs"], batch["advantages"], mask, ppo.clip_range
        )
        value_loss, value_clipped = objective.value_loss(
            values, batch["old_values"], batch["returns"], mask, ppo.value_clip_range
        )
        loss = policy_loss + ppo.value_coef * value_loss
        if ppo.kl_in == "loss":
            kl = objective.kl_estimate(logprobs, batch["reference_logprobs"], ppo.kl_estimator)
            loss = loss + self.settings.kl_coef * objective.masked_mean(kl, mask)
        share = mask.sum().item()
        self.accelerator.backward(loss * (share / tokens))
        return {
            "policy_loss": policy_loss.item() * share,
            "value_loss": value_loss.item() * share,
            "policy_clip_fraction": policy_clipped.item() * share,
            "value_clip_fraction": value_clipped.item() * share,
            "entropy": entropies.sum().item(),
        }

    def _step(self):
        """One step of each optimizer, gradients clipped to `max_grad_norm` in each. Returns the policy's norm."""
        norms = []
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, self.ppo.max_grad_norm).item())
            optimizer.step()
        self.steps += 1
        return norms[0]

    def _fresh_logprobs(self, sequences, sampled):
        """(B, T) log-probabilities of the policy by one pass without a cache, checked against the sampled ones.

        bfloat16 rounds the two ways of computing them differently; the ratio shall start from what training computes.
        """
        with self.accelerator.autocast():
            fresh = self._logprobs(self.policy, sequences)
        self._check_agreement("sampling", fresh, sampled, sequences.response_mask, mean_tolerance=0.1)
        return fresh

    @torch.no_grad()
    def _logprobs(self, model, sequences):
        """(B, T) log-probabilities of the responses under a frozen model."""
        found = torch.zeros(sequences.response_mask.shape, device=self.device)
        for rows in _by_length(sequences, self.execution.micro_batch):
            some = sequences.rows(rows)
            logprobs, _ = forward.response_logprobs(model, some, self.ppo.temperature)
            found[rows, : logprobs.shape[1]] = logprobs
        return found

    @torch.no_grad()
    def _values(self, sequences):
        """(B, T) values of the states before each response token."""
        found = torch.zeros(sequences.response_mask.shape, device=self.device)
        for rows in _by_length(sequences, self.execution.micro_batch):
            some = sequences.rows(rows)
            with self.accelerator.autocast():
                if self.ppo.value_model == "shared":
                    hidden = forward.before_responses(forward.hidden_states(self.policy, some), some)
                    values = self.value_model(hidden).squeeze(-1).float()
                else:
                    values = self.value_model.values(some)
            found[rows, : values.shape[1]] = values.float()
        return found * sequences.response_mask

    def _set_learning_rate(self, iteration):
        rate = self.ppo.learning_rate
        if iteration < self.ppo.warmup:
            rate *= (iteration + 1) / self.ppo.warmup
        elif self.ppo.schedule == "linear":
            rate *= 1 - (iteration - self.ppo.warmup) / (self.ppo.iterations - self.ppo.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _check_agreement(self, what, logprobs, others, mask, mean_tolerance=0.02):
        """InvariantError unless two computations of log-probabilities (B, T) agree, in nats a token.

        float32: everywhere within 1e-3. bfloat16 rounds each logit to 3 digits, so the mean difference counts.
        """
        difference = (logprobs.detach() - others).abs() * mask
        worst, tolerance = difference.max().item(), 1e-3
        if self.settings.mixed_precision == "bf16":
            worst, tolerance = (difference.sum() / mask.sum()).item(), mean_tolerance
        if not worst <= tolerance:
            raise InvariantError(
                f"log-probabilities from {what} and from a fresh forward pass of the policy differ by {worst:.3g} nats "
                f"(tolerance {tolerance})"
            )


def _value_model(ppo, parents, policy, device):
    """A network of its own that starts from the reward model, or a linear head on the policy's trunk, from zero."""
    if ppo.value_model == "reward_model":
        return models.load_score_model(parents["reward_model"], device)
    head = torch.nn.Linear(policy.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head.to(device)


def _adamw(parameters, ppo):
    return torch.optim.AdamW(
        parameters,
        lr=ppo.learning_rate,
        betas=(ppo.adam_beta1, ppo.adam_beta2),
        eps=ppo.adam_epsilon,
        weight_decay=0.0,
        foreach=True,
    )


def _prompt_order(count, ppo, seed):
    """Prompt indices of each iteration: passes over all prompts, each shuffled; the last, incomplete batch left out."""
    order, batches = np.random.default_rng(runs.derive_seed(seed, "prompt order", 0)), []
    while len(batches) < ppo.iterations:
        permutation = order.permutation(count)
        batches += [permutation[i : i + ppo.batch_size] for i in range(0, count - ppo.batch_size + 1, ppo.batch_size)]
    return batches[: ppo.iterations]


def _by_length(sequences, micro_batch):
    return torch.argsort(sequences.lengths.cpu(), stable=True).split(micro_batch)


def _explained_variance(values, returns, mask):
    """1 − Var(returns − values) / Var(returns) over the mask: 1 is a perfect value model, 0 a constant one."""
    chosen = mask.bool()
    variance = returns[chosen].var(unbiased=False)
    return (1 - (returns - values)[chosen].var(unbiased=False) / variance.clamp(min=1e-8)).item()


def _peak_memory(device):
    """Peak memory of this process in MiB: the device's, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Clock:
    """Seconds by phase."""

    def __init__(self, device):
        self.device, self.laps = device, {}
        self.start = self.last = time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[f"seconds_{name}"], self.last = now - self.last, now

    def seconds(self):
        return {**self.laps, "seconds": self.last - self.start}


if __name__ == "__main__":
    runs.command(
        "ppo",
        VERSION,
        train,
        config.PpoSettings,
        roles=("prepare", "reward_model", "sft0", "sft1", "…"),
        description=__doc__,
    )
