"""PPO against any reference policy, from top to bottom.

One iteration samples responses, scores them, reads the log-probabilities of the references and the values, makes
rewards and advantages per token, and then takes clipped policy and value steps. `iterate` is the algorithm, `_optimise`
its steps. The pure functions are in objective.py, sampling in rollout.py, references in reference.py, the trained
networks in networks.py, forward passes in forward.py, interruptions in checkpoints.py, and the records in record.py.

Several processes (processes.py) each sample and read a share of the batch, and then all hold the whole batch: rewards,
advantages and mini-batches are those of one process, and only the forward passes of the steps are shared again.

Sources: 1707.06347 (PPO), 2403.17031 (its details for RLHF), 2411.01798 (SALSA).
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from salsa import anchors
from salsa.data import chat
from salsa.rl import checkpoints, divergence, forward, models, networks, objective, processes, record, reference
from salsa.rl.rollout import prompt_order, uniforms
from salsa.workflow import runs
from salsa.workflow.messages import UserError

LARGEST_IMPORTANCE = 2.0  # the truncation of importance weights
LARGEST_DIFFERENCE = 0.1  # nats per token, mean: importance weights correct for less, and more is a mistake
PHASES = {  # phase -> its tensors, and what to do where one is not finite before anything was learned
    "rollout": (("old_logprobs", "sampling_difference"), "look at the models that the policy starts from"),
    "score": (("score",), "the reward model is broken; train it with a lower reward_model.learning_rate"),
    "reference": (("reference_logprobs", "sft0_logprobs"), "look at the models that the reference is made of"),
    "value": (("old_values",), "look at the reward model, which the value model starts from, or at ppo.value_model"),
}


class InvariantError(UserError, RuntimeError):
    """A condition of every correct PPO run does not hold: there is a bug, or a model computes inconsistently."""


@dataclass
class Participants:
    """The models of a run: policy and value model are trained; reward model, reference and sft0 are frozen."""

    policy: Any
    value_model: Any  # a ScoreModel, or a linear head on the policy's trunk
    reward_model: Any
    reference: reference.Reference
    sft0: Any


def train(settings, parents, output, execution):
    """Train a policy.

    It writes `model/`, `value_model/`, metrics.jsonl (one line per iteration), rollouts.jsonl and, where the reference
    moves, `reference/`. An interrupted run goes on from its last checkpoint. Raises UserError where a number is not
    finite, and keeps the batch (divergence.py) and the last checkpoint.

    Parents: `prepare` (prompts.jsonl), `reward_model`, `sft0`, and the other SFT models that start or reference need.
    """
    device = models.prepare_process(execution)
    divergence.forget(output)
    accelerator = processes.make_accelerator(settings, device, execution, output)
    processes.check_batch(settings.ppo, accelerator)
    tokenizer = models.load_tokenizer(models.model_folder(parents["sft0"]))
    rows = runs.read_jsonl(parents["prepare"] / "prompts.jsonl")
    rows, encoded, refused = chat.fitting(tokenizer, rows, settings.lengths.prompt, "PPO prompts")
    if len(rows) < settings.ppo.batch_size:
        raise UserError(f"{len(rows)} PPO prompts for ppo.batch_size={settings.ppo.batch_size}; give more")
    earlier = checkpoints.anchored_to(output)
    participants = load(settings, parents, tokenizer, accelerator.device, execution, earlier)
    trainer = Trainer(settings, participants, tokenizer, accelerator, execution, output)
    with trainer.stop:  # a request to stop that comes while the result is written does not interrupt it
        trainer.fit(rows, encoded)
        trainer.save()
    return trainer.summary | ({"refused_prompts": refused} if refused else {})


def load(settings, parents, tokenizer, device, execution, earlier=None):
    """The `Participants` of a run, from its parents; `earlier` is the summary of a reference that was built before."""
    torch.manual_seed(settings.seed)  # adapters start with random weights
    ppo = settings.ppo
    ingredients = reference.load_ingredients(settings, parents, tokenizer, device, execution.micro_batch)
    anchor = anchors.build(settings, ingredients, earlier)
    # Trained weights are in float32 whatever precision computes: bfloat16 would round small steps to none.
    policy = reference.mix(ingredients.folders, settings.start, "cpu", torch.float32)
    models.check_head(policy)
    normalised = ppo.score_normalisation != "none"  # values are in the unit of the rewards that they predict
    value_model = networks.value_model(ppo.value_model, policy, parents["reward_model"], normalised)
    reward_model = models.load_score_model(parents["reward_model"], device, ingredients.dtype)
    return Participants(policy, value_model, reward_model.requires_grad_(False), anchor, ingredients.sft0)


class Trainer:
    """The models of a run, and the loop that trains two of them.

    Args:
        settings: config.PolicySettings, with the section `ppo`.
        participants: the Participants; the trained ones may be on any device, in float32 or float64.
        accelerator: the result of `processes.make_accelerator`.
        output: the run's folder.
    """

    def __init__(self, settings, participants, tokenizer, accelerator, execution, output):
        self.settings, self.ppo = settings, settings.ppo
        self.tokenizer, self.execution, self.output = tokenizer, execution, output
        self.accelerator, self.device = accelerator, accelerator.device
        self.reward_model, self.reference = participants.reward_model, participants.reference
        self.sft0, policy, value_model = participants.sft0, participants.policy, participants.value_model
        self.end_ids, self.pad_id = chat.end_ids(policy, tokenizer), tokenizer.pad_token_id
        self.starts_at_reference = anchors.starts_there(settings)
        processes.check(self.ppo, accelerator, self.reference, execution.rollouts)

        if self.ppo.lora_rank and self.reference.moves:
            raise UserError(
                f"ppo.lora_rank={self.ppo.lora_rank} trains adapters, and a reference that moves follows all weights; "
                "set ppo.lora_rank=0, or a reference that stays"
            )
        parameters = policy.num_parameters()  # counted before this process holds only a part of them
        self.adapters = networks.adapters(policy, value_model, self.ppo)
        self.networks = networks.ActorCritic(
            policy, value_model, self.ppo.temperature, execution.gradient_checkpointing
        )
        compiled = execution.compile and models.compile_trunks(
            [*self.networks.trunks, self.reward_model.classifier, self.sft0, *self.reference.models]
        )
        self.vllm = None
        if execution.rollouts == "vllm":
            from salsa.rl.vllm_rollout import Sampler  # vLLM is an optional dependency

            self.vllm = Sampler(policy, tokenizer, self.settings, accelerator)
        self.optimizer = torch.optim.AdamW(
            self.networks.parameter_groups(),
            lr=self.ppo.learning_rate,
            betas=(self.ppo.adam_beta1, self.ppo.adam_beta2),
            eps=self.ppo.adam_epsilon,
            weight_decay=0.0,
            fused=True,  # one pass over each tensor, without temporary tensors as large as all weights
        )
        self.networks, self.optimizer = accelerator.prepare(self.networks, self.optimizer)
        self.progress = checkpoints.Progress(settings.kl_coef, self.reference)
        accelerator.register_for_checkpointing(self.progress)
        self.stop = checkpoints.StopRequest()
        self.last_batch = None  # (iteration, prompt ids, Sequences)
        self.summary = {
            "reference": self.reference.summary,
            "parameters": parameters,
            "compiled": compiled,
            "kl_gradient": objective.kl_gradient(self.ppo.kl_estimator, self.ppo.kl_in),
        }
        if self.summary["kl_gradient"] == "biased" and accelerator.is_main_process:
            penalty = f"ppo.kl_estimator={self.ppo.kl_estimator} ppo.kl_in={self.ppo.kl_in}"
            print(f"{penalty}: biased, the penalty's expected gradient is not that of the KL", flush=True)

    def fit(self, rows, encoded):
        """Train on prompts `rows` ({"id", "prompt"}) with token ids `encoded`, from the last checkpoint on.

        When it is asked to `stop`, it saves a checkpoint and exits with 143.
        """
        order = prompt_order(len(rows), self.ppo.iterations, self.ppo.batch_size, self.settings.seed)
        checkpoints.load(self.accelerator, self.progress, self.output)
        log = record.Record(
            self.output, self.progress.iteration, self.accelerator.is_main_process, self.ppo.rollouts_every
        )
        self.accelerator.init_trackers("salsa", config={"kl_coef": self.settings.kl_coef})
        iterations = range(self.progress.iteration, self.ppo.iterations)
        bar = tqdm(iterations, desc="ppo", mininterval=5, disable=not self.accelerator.is_main_process)
        for iteration in bar:
            batch = [rows[i] for i in order[iteration]]
            try:
                metrics, sequences, per_response = self.iterate(
                    iteration, [row["id"] for row in batch], [encoded[i] for i in order[iteration]]
                )
            except checkpoints.Stopped:
                self._checkpoint_and_exit()
            self._move_on(iteration, metrics)
            kept = iteration % self.ppo.rollouts_every == 0 or iteration == self.ppo.iterations - 1
            responses = record.rollout_rows(iteration, batch, sequences, per_response, self.tokenizer) if kept else []
            log.add(metrics, responses)
            self.accelerator.log(metrics, step=iteration)
            bar.set_postfix({key: f"{metrics[key]:.3g}" for key in ("score", "kl_to_reference", "response_length")})
            if self._asked_to_stop():
                self._checkpoint_and_exit()
            if self.execution.checkpoint_every and self.progress.iteration % self.execution.checkpoint_every == 0:
                self._checkpoint()
        self._check_networks()
        if self.execution.trackers:  # ends the group of processes, too
            self.accelerator.end_training()
        expected = self.ppo.iterations * self.ppo.epochs * self.ppo.mini_batches
        if self.progress.steps != expected:
            raise InvariantError(f"{self.progress.steps} optimizer steps instead of {expected}")
        self.summary["resumed_at"] = self.progress.resumed_at
        if self.reference.moves:
            self.summary["final_reference"] = self.reference.sha256()

    def iterate(self, iteration, prompt_ids, prompts):
        """One PPO iteration. Returns its metrics, its Sequences, and the score and KLs of each response, (B,) each."""
        ppo, clock, kl_coef = self.ppo, record.Clock(self.device), self.progress.kl_coef
        self._pause()
        # 1. Sample responses, each process its share of them.
        share = processes.share(self.accelerator, len(prompts))
        sequences, old_logprobs, old_values, difference = self._sample(iteration, prompt_ids[share], prompts[share])
        clock.lap("rollout")
        self._pause()

        # 2. Score them.
        score = self.reward_model.scores(sequences, self.execution.micro_batch)  # (B,)
        clock.lap("score")

        # 3. Read the log-probabilities of the references, and the values. KLs to different references can't be
        # compared, so every arm reports its KL to sft0, too.
        reference_logprobs = torch.stack([self._frozen(m, sequences) for m in self.reference.models], dim=1)
        if self.sft0 in self.reference.models:
            sft0_logprobs = reference_logprobs[:, self.reference.models.index(self.sft0)]
        else:
            sft0_logprobs = self._frozen(self.sft0, sequences)
        clock.lap("reference")
        if old_values is None:
            old_values = self._in_batches(sequences, "values")
        clock.lap("value")
        self._pause()

        # From here to the steps, every process has the whole batch.
        sequences, tensors = processes.gather(
            self.accelerator,
            sequences,
            {
                "score": score,  # (B,)
                "old_logprobs": old_logprobs,  # (B, T), as all below
                "old_values": old_values,
                "sampling_difference": difference,
                "reference_logprobs": reference_logprobs,  # but (B, R, T) for R references
                "sft0_logprobs": sft0_logprobs,
            },
            self.pad_id,
        )
        self.last_batch = iteration, prompt_ids, sequences
        self._check_finite(tensors)
        mask, score, old_logprobs = sequences.response_mask, tensors["score"], tensors["old_logprobs"]
        if iteration == 0 and self.starts_at_reference:  # then the KL is 0
            start = tensors["reference_logprobs"][:, 0]
            self._check_agreement("the reference", old_logprobs, start, mask, mean_tolerance=0.1)

        # 4. Rewards per token: the penalty at each token, the score at the last.
        raw = score
        if ppo.score_normalisation == "none":
            raw = score * self.reward_model.std + self.reward_model.mean
        paid = objective.paid_scores(
            raw, sequences.ended, ppo.score_normalisation, ppo.score_clip, ppo.missing_eos_penalty
        )
        penalty = self._penalty(old_logprobs, tensors["reference_logprobs"], ppo.kl_estimator)
        in_reward = penalty if ppo.kl_in == "reward" else torch.zeros_like(penalty)
        rewards = objective.token_rewards(in_reward, paid, mask, kl_coef)

        # 5. Advantages. They are whitened over the whole batch, so that neither mini-batches nor processes change them.
        advantages, returns = objective.gae(rewards, tensors["old_values"], mask, ppo.gamma, ppo.lam)
        if ppo.whiten_advantages:
            advantages = objective.whiten(advantages, mask)
        # vLLM or bfloat16 sample from a slightly other distribution than the policy's. Importance weights correct for
        # it, and are truncated, because a few large weights would make the gradient noisy.
        difference = tensors["sampling_difference"]
        importance = torch.exp(difference).clamp(max=LARGEST_IMPORTANCE)
        advantages = advantages * importance

        # 6. Take clipped steps.
        learning_rate = self._set_learning_rate(iteration)
        batch = {**tensors, "advantages": advantages, "returns": returns}
        losses = self._optimise(iteration, sequences, batch)
        clock.lap("optimise")

        # 7. One line of metrics, of the policy that sampled the responses.
        kl_to_sft0 = (old_logprobs - tensors["sft0_logprobs"]) * mask
        per_response = {"score": score, "kl_to_sft0": kl_to_sft0.sum(dim=1)}
        for estimator in ("k1", "k2", "k3"):
            kl = self._penalty(old_logprobs, tensors["reference_logprobs"], estimator) * mask
            per_response[f"kl_{estimator}"] = kl.sum(dim=1)
        per_response["kl_to_reference"] = per_response["kl_k1"]
        metrics = {
            "iteration": iteration,
            **{name: values.mean().item() for name, values in per_response.items()},
            "reward": paid.mean().item(),
            "response_length": sequences.lengths.float().mean().item(),
            "eos_rate": sequences.ended.float().mean().item(),
            "explained_variance": record.explained_variance(tensors["old_values"], returns, mask),
            "kl_coef": kl_coef,
            "learning_rate": learning_rate,
            "importance": ((importance * mask).sum() / mask.sum()).item(),
            "sampling_difference": ((difference.abs() * mask).sum() / mask.sum()).item(),
            **losses,
            **clock.seconds(),
            "peak_memory_mib": record.peak_memory(self.device),
        }
        infinite = [name for name, value in metrics.items() if not math.isfinite(value)]
        if infinite:
            self._diverge("optimise", f"{infinite[0]} is {metrics[infinite[0]]}", batch)
        return metrics, sequences, per_response

    def _sample(self, iteration, prompt_ids, prompts):
        """Responses to prompts: Sequences, and (B, T) log-probabilities, values (or None) and sampling differences.

        bfloat16 and vLLM sample with other rounding than a forward pass of training. Then a fresh pass decides the old
        log-probabilities, so that the ratio starts at 1, and the differences say how far it is from what was sampled.
        """
        if self.vllm:
            policy = self.accelerator.unwrap_model(self.networks).policy
            sequences, sampled = self.vllm.sample(policy, prompts, prompt_ids, iteration, self.device)
        else:
            noise = uniforms(self.settings.seed, iteration, prompt_ids, self.settings.lengths.response)
            batch = self.execution.rollout_batch
            with torch.no_grad(), processes.gathered(self.networks):
                sequences, sampled, values = self.networks("sample", prompts, noise, self.end_ids, self.pad_id, batch)
            if self.settings.mixed_precision == "no":
                return sequences, sampled, values, torch.zeros_like(sampled)
        fresh = self._in_batches(sequences, "logprobs")
        difference = (fresh - sampled) * sequences.response_mask
        if torch.isfinite(fresh).all():  # otherwise the policy has diverged, which `_check_finite` reports
            self._check_sampling(iteration, (difference.abs().sum() / sequences.response_mask.sum()).item())
        return sequences, fresh, None, difference

    def _optimise(self, iteration, sequences, batch):
        """Take `epochs` x `mini_batches` steps. Returns the metrics of the losses, means over tokens and steps."""
        ppo, accelerator = self.ppo, self.accelerator
        totals, all_tokens, norms = {}, 0, []
        unwrapped = accelerator.unwrap_model(self.networks)
        unwrapped.recompute(True)
        for epoch in range(ppo.epochs):
            generator = np.random.default_rng([self.settings.seed, iteration, epoch])
            for index, part in enumerate(np.array_split(generator.permutation(len(sequences)), ppo.mini_batches)):
                # Sorted by length, so that micro-batches have little padding. Losses are sums over tokens divided by
                # the tokens of the whole mini-batch, so the size of micro-batches changes nothing.
                part = torch.from_numpy(part[np.argsort(sequences.lengths[part].cpu().numpy(), kind="stable")])
                tokens = sequences.response_mask[part].sum().item()
                first = epoch == index == 0
                self.optimizer.zero_grad(set_to_none=True)
                share = part[accelerator.process_index :: accelerator.num_processes]
                micro_batches, finite = share.split(self.execution.micro_batch), True
                for rows in micro_batches:
                    last = rows is micro_batches[-1]
                    with processes.gradients_kept(accelerator, self.networks, last):
                        micro_batch = {name: values[rows] for name, values in batch.items()}
                        sums = self._backward(sequences.rows(rows), micro_batch, tokens, first)
                    for name, value in sums.items():
                        totals[name] = totals.get(name, 0.0) + value
                        finite = finite and math.isfinite(value)
                all_tokens += tokens
                policy_norm, *other_norms = self._clip_gradients()
                finite = finite and all(map(math.isfinite, (policy_norm, *other_norms)))
                if divergence.anywhere(accelerator, not finite):
                    self._diverge("optimise", "losses or gradients are not finite", batch, rows=part.tolist())
                norms.append(policy_norm)
                self._step()
        unwrapped.recompute(False)
        sums = accelerator.reduce(torch.tensor([*totals.values()], dtype=torch.float64, device=self.device))
        means = {name: value / all_tokens for name, value in zip(totals, sums.tolist(), strict=True)}
        return {**means, "gradient_norm": float(np.mean(norms))}

    def _backward(self, sequences, batch, tokens, first):
        """Add the gradients of one micro-batch. Returns its metrics as sums over tokens."""
        ppo, mask = self.ppo, sequences.response_mask
        batch = {name: values[..., : mask.shape[1]] if values.dim() > 1 else values for name, values in batch.items()}
        logprobs, entropies, values = self.networks("evaluate", sequences)
        if first and torch.isfinite(logprobs).all():
            self._check_agreement("the rollout", logprobs, batch["old_logprobs"], mask)  # the ratio starts at 1
        policy_loss, policy_clipped = objective.policy_loss(
            logprobs, batch["old_logprobs"], batch["advantages"], mask, ppo.clip_range
        )
        value_loss, value_clipped = objective.value_loss(
            values, batch["old_values"], batch["returns"], mask, ppo.value_clip_range
        )
        loss = policy_loss + ppo.value_coef * value_loss
        if ppo.kl_in == "loss":
            penalty = self._penalty(logprobs, batch["reference_logprobs"], ppo.kl_estimator)
            loss = loss + self.progress.kl_coef * objective.masked_mean(penalty, mask)
        share = mask.sum().item()
        # DDP and FSDP average gradients over processes, and the loss is a mean over the tokens of all of them.
        self.accelerator.backward(loss * (share / tokens * self.accelerator.num_processes))
        return {
            "policy_loss": policy_loss.item() * share,
            "value_loss": value_loss.item() * share,
            "policy_clip_fraction": policy_clipped.item() * share,
            "value_clip_fraction": value_clipped.item() * share,
            "entropy": entropies.sum().item(),
        }

    def _clip_gradients(self):
        """Clip gradients to `max_grad_norm` in each network. Returns their norms before, the policy's first."""
        groups = self.optimizer.param_groups
        return [float(self.accelerator.clip_grad_norm_(group["params"], self.ppo.max_grad_norm)) for group in groups]

    def _step(self):
        self.optimizer.step()
        self.progress.steps += 1

    def _penalty(self, logprobs, reference_logprobs, estimator):
        return objective.kl_penalty(logprobs, reference_logprobs, self.reference.weights, estimator)

    def _frozen(self, model, sequences):
        """The log-probabilities (B, T) of responses under a frozen model."""
        return self._rows(sequences, lambda batch: forward.response_logprobs(model, batch, self.ppo.temperature)[0])

    def _in_batches(self, sequences, task):
        """The result (B, T) of a task of the trained networks."""
        return self._rows(sequences, lambda batch: self.networks(task, batch))

    @torch.no_grad()
    def _rows(self, sequences, compute):
        """The result (B, T) of `compute`, which gets micro-batches of like length; zero where masked."""
        computed, length = [], sequences.response_mask.shape[1]
        order = torch.argsort(sequences.lengths.cpu(), stable=True)
        for rows in order.split(self.execution.micro_batch):
            computed.append(forward.pad_right(compute(sequences.rows(rows)), length))
        return torch.cat(computed)[torch.argsort(order)] * sequences.response_mask

    def _move_on(self, iteration, metrics):
        """Update what changes between iterations beside the networks: the reference, and kl_coef."""
        if iteration < self.ppo.iterations - 1:  # the reference of the last iteration is what the run reports and saves
            self.reference.follow(self.accelerator.unwrap_model(self.networks).policy, iteration)
        self.progress.kl_coef = objective.next_kl_coef(
            self.ppo.kl_schedule,
            self.settings.kl_coef,
            self.progress.kl_coef,
            iteration,
            self.ppo.iterations,
            metrics["kl_to_reference"],
            self.ppo.batch_size,
        )
        self.progress.iteration = iteration + 1

    def _pause(self):
        """Raise Stopped when asked to stop: until the steps, a checkpoint can still be that of the last iteration."""
        if self._asked_to_stop():
            raise checkpoints.Stopped

    def _asked_to_stop(self):
        """Whether any process was asked to stop."""
        asked = torch.tensor(float(self.stop.asked), device=self.device)
        return bool(self.accelerator.reduce(asked) > 0)

    def _check_finite(self, tensors):
        """Raise UserError where tensors of a batch are not finite, for the first phase that computed such a tensor."""
        for phase, (names, _) in PHASES.items():
            fault = divergence.first({name: tensors[name] for name in names})
            if fault:
                self._diverge(phase, fault, tensors)

    @torch.no_grad()
    def _check_networks(self):
        """Raise UserError where the trained networks, or their outputs for some responses, are not finite.

        Asked before they are saved: every checkpoint, and every policy, is one that works.
        """
        finite = divergence.finite_weights(self.networks)
        if self.last_batch:
            sequences = self.last_batch[2].rows(slice(self.execution.micro_batch))
            outputs = {task: self._in_batches(sequences, task) for task in ("logprobs", "values")}
            finite = finite and not divergence.first(outputs)
        if divergence.anywhere(self.accelerator, not finite):
            self._diverge("optimise", "what it left of the networks is not finite", {})

    def _diverge(self, phase, what, tensors, **facts):
        """Keep the last batch, and raise UserError. Called by every process."""
        iteration, prompt_ids, sequences = self.last_batch or (self.progress.iteration, [], None)
        learned = phase == "optimise" or (iteration > 0 and phase not in ("score", "reference"))
        remedy = f"lower ppo.learning_rate={self.ppo.learning_rate:g}" if learned else PHASES[phase][1]
        divergence.stop(
            self.output,
            f"iteration {iteration}, {phase}: {what}; {remedy}",
            {"iteration": iteration, "phase": phase, "what": what, "prompt_ids": prompt_ids, **facts},
            tensors | (vars(sequences) if sequences else {}),
            writes=self.accelerator.is_main_process,
        )

    def _checkpoint(self):
        self._check_networks()
        checkpoints.save(self.accelerator, self.progress, self.output)

    def _checkpoint_and_exit(self):
        self._checkpoint()
        self.accelerator.wait_for_everyone()  # after the first exit, the launcher gives the others 30 seconds
        self.accelerator.print(f"stopped before iteration {self.progress.iteration}; run again to go on", flush=True)
        sys.exit(143)

    def save(self):
        """Write the policy, the value model, and a reference that moves, as model folders."""
        state = processes.whole_state(self.accelerator, self.networks)
        if not self.accelerator.is_main_process:
            return
        for adapter in self.adapters:
            adapter.merge_and_unload()
        unwrapped = self.accelerator.unwrap_model(self.networks)
        unwrapped.save(self.output, state, self.execution.keep_value_models)
        self.tokenizer.save_pretrained(self.output / "model")
        if self.reference.moves:
            self.reference.models[0].save_pretrained(self.output / "reference")
            self.tokenizer.save_pretrained(self.output / "reference")

    def _set_learning_rate(self, iteration):
        rate = self.ppo.learning_rate
        if iteration < self.ppo.warmup:
            rate *= (iteration + 1) / self.ppo.warmup
        elif self.ppo.schedule == "linear":
            rate *= 1 - (iteration - self.ppo.warmup) / (self.ppo.iterations - self.ppo.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _check_agreement(self, what, logprobs, others, mask, mean_tolerance=0.02):
        """Raise InvariantError unless two computations of log-probabilities (B, T) agree.

        In float32, each token's differ by at most 1e-3 nats. bfloat16 rounds logits to 3 digits, so the mean counts.
        """
        difference = (logprobs.detach() - others).abs() * mask
        worst, tolerance = difference.max().item(), 1e-3
        if self.settings.mixed_precision == "bf16":
            worst, tolerance = (difference.sum() / mask.sum()).item(), mean_tolerance
        if not worst <= tolerance:
            cause = ""
            if self.progress.iteration:
                cause = f"; has the policy exploded? Then lower ppo.learning_rate={self.ppo.learning_rate:g}"
            raise InvariantError(
                f"log-probabilities from {what} and from a fresh forward pass of the policy differ by {worst:.3g} nats "
                f"(tolerance {tolerance}){cause}"
            )

    def _check_sampling(self, iteration, difference):
        """Raise InvariantError where sampling and training differ by too many nats per token, in the mean."""
        if not difference <= LARGEST_DIFFERENCE:
            remedy = "execution.rollouts=transformers" if self.vllm else "mixed_precision=no"
            raise InvariantError(
                f"iteration {iteration}: log-probabilities from sampling and from a fresh forward pass of the policy "
                f"differ by {difference:.3g} nats per token (at most {LARGEST_DIFFERENCE}); set {remedy}"
            )
