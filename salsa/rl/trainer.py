"""The engine of all algorithms that sample responses and take policy-gradient steps on them, from top to bottom.

One iteration samples responses, scores them, reads the log-probabilities of the references, and the values where the
algorithm has a value model; then it makes the algorithm's advantages, and takes steps on the algorithm's loss. Both are
functions of the algorithm's file in salsa/algorithms. `iterate` is an iteration, `_optimise` its steps. The pure
functions are in objective.py, sampling in rollout.py, references in reference.py, the trained networks in networks.py,
forward passes in forward.py, interruptions in checkpoints.py, and the records in record.py.

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

from salsa import algorithms, anchors
from salsa.data import chat
from salsa.rl import (
    checkpoints,
    divergence,
    forward,
    models,
    networks,
    objective,
    processes,
    record,
    reference,
    trackers,
)
from salsa.rl.batches import Batch
from salsa.rl.rollout import prompt_order, sample_keys, uniforms
from salsa.workflow import runs, schema
from salsa.workflow.messages import UserError

LARGEST_IMPORTANCE = 2.0  # the truncation of importance weights
LARGEST_DIFFERENCE = 0.1  # nats per token, mean: importance weights correct for less, and more is a mistake
LARGEST_ROUNDING = 0.1  # nats / √tokens, mean over responses: what bfloat16 rounds is a tenth of it
PHASES = {  # phase -> its tensors, and what to do where one is not finite before anything was learned
    "rollout": (("old_logprobs", "sampling_difference"), "look at the models that the policy starts from"),
    "score": (("score",), "the reward model is broken; train it with a lower reward_model.learning_rate"),
    "reference": (("reference_logprobs", "sft0_logprobs"), "look at the models that the reference is made of"),
    "value": (("old_values",), "look at the reward model, which the value model starts from, or at value_model"),
}


class InvariantError(UserError, RuntimeError):
    """A condition of every correct run does not hold: there is a bug, or a model computes inconsistently."""


@dataclass
class Participants:
    """The models of a run: policy and value model are trained; reward model, reference and sft0 are frozen."""

    policy: Any
    value_model: Any  # a ScoreModel, a linear head on the policy's trunk, or None
    reward_model: Any
    reference: reference.Reference
    sft0: Any


def train(settings, parents, output, execution):
    """Train a policy.

    It writes `model/`, metrics.jsonl (one line per iteration), rollouts.jsonl, `value_model/` where there is one and,
    where the reference moves, `reference/`. An interrupted run goes on from its last checkpoint. Raises UserError where
    a number is not finite, and keeps the batch (divergence.py) and the last checkpoint.

    Parents: `prepare` (prompts.jsonl), `reward_model`, `sft0`, and the other SFT models that start or reference need.
    """
    section = algorithms.section_of(settings)
    device = models.prepare_process(execution)
    divergence.forget(output)
    accelerator = processes.make_accelerator(settings, device, execution)
    processes.check_batch(section, accelerator)
    tokenizer = models.load_tokenizer(models.model_folder(parents["sft0"]))
    title = algorithms.kinds()[section.section].title
    rows = runs.read_jsonl(parents["prepare"] / "prompts.jsonl")
    rows, encoded, refused = chat.fitting(tokenizer, rows, settings.lengths.prompt, f"{title} prompts")
    if len(rows) < section.prompts:
        raise UserError(f"{len(rows)} {title} prompts for {section.batch_words}; give more")
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
    section = algorithms.section_of(settings)
    ingredients = reference.load_ingredients(settings, parents, tokenizer, device, execution.micro_batch)
    anchor = anchors.build(settings, ingredients, earlier)
    # Trained weights are in float32 whatever precision computes: bfloat16 would round small steps to none.
    policy = reference.mix(ingredients.folders, settings.start, "cpu", torch.float32)
    models.check_head(policy)
    normalised = section.score_normalisation != "none"  # values are in the unit of the rewards that they predict
    value_model = networks.value_model(section.value_model, policy, parents["reward_model"], normalised)
    reward_model = models.load_score_model(parents["reward_model"], device, ingredients.dtype)
    return Participants(policy, value_model, reward_model.requires_grad_(False), anchor, ingredients.sft0)


class Trainer:
    """The models of a run, and the loop that trains the policy, and the value model where there is one.

    Args:
        settings: config.PolicySettings, with the section of an algorithm that is a `PolicyGradient`.
        participants: the Participants; the trained ones may be on any device, in float32 or float64.
        accelerator: the result of `processes.make_accelerator`.
        output: the run's folder.
    """

    def __init__(self, settings, participants, tokenizer, accelerator, execution, output):
        self.settings, self.section = settings, algorithms.section_of(settings)
        self.name = self.section.section
        self.algorithm = algorithms.kinds()[self.name]
        self.tokenizer, self.execution, self.output = tokenizer, execution, output
        self.accelerator, self.device = accelerator, accelerator.device
        self.reward_model, self.reference = participants.reward_model, participants.reference
        self.sft0, policy, value_model = participants.sft0, participants.policy, participants.value_model
        self.end_ids, self.pad_id = chat.end_ids(policy, tokenizer), tokenizer.pad_token_id
        self.starts_at_reference = anchors.starts_there(settings)
        processes.check(self.section, accelerator, self.reference, execution.rollouts)

        if self.section.lora_rank and self.reference.moves:
            setting = f"{self.name}.lora_rank"
            raise UserError(
                f"{setting}={self.section.lora_rank} trains adapters, and a reference that moves follows all weights; "
                f"set {setting}=0, or a reference that stays"
            )
        parameters = policy.num_parameters()  # counted before this process holds only a part of them
        self.adapters = networks.adapters(policy, value_model, self.section)
        self.networks = networks.ActorCritic(
            policy, value_model, self.section.temperature, execution.gradient_checkpointing
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
            lr=self.section.learning_rate,
            betas=(self.section.adam_beta1, self.section.adam_beta2),
            eps=self.section.adam_epsilon,
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
            "kl_gradient": objective.kl_gradient(
                self.section.kl_estimator, self.section.kl_in, self.section.response_means
            ),
        }
        if self.summary["kl_gradient"] == "biased" and accelerator.is_main_process:
            penalty = self.section.penalty_words
            print(f"{penalty}: biased, the penalty's expected gradient is not that of the KL", flush=True)

    def fit(self, rows, encoded):
        """Train on prompts `rows` ({"id", "prompt"}) with token ids `encoded`, from the last checkpoint on.

        When it is asked to `stop`, it saves a checkpoint and exits with 143, after SIGINT with 130.
        """
        section = self.section
        order = prompt_order(len(rows), section.iterations, section.prompts, self.settings.seed)
        checkpoints.load(self.accelerator, self.progress, self.output)
        is_main = self.accelerator.is_main_process
        log = record.Record(self.output, self.progress.iteration, is_main, section.rollouts_every)
        tracked = trackers.Trackers(self.execution.trackers, self.output, schema.dump(self.settings), is_main)
        iterations = range(self.progress.iteration, section.iterations)
        bar = tqdm(iterations, desc=self.name, mininterval=5, disable=not is_main)
        for iteration in bar:
            batch = [rows[i] for i in order[iteration]]
            try:
                metrics, sequences, per_response = self.iterate(
                    iteration, [row["id"] for row in batch], [encoded[i] for i in order[iteration]]
                )
            except checkpoints.Stopped:
                self._checkpoint_and_exit()
            self._move_on(iteration, metrics)
            responses = []
            if iteration % section.rollouts_every == 0 or iteration == section.iterations - 1:
                responses = record.rollout_rows(iteration, batch, sequences, per_response, self.tokenizer)
            log.add(metrics, responses)
            tracked.log(metrics, iteration)
            bar.set_postfix({key: f"{metrics[key]:.3g}" for key in ("score", "kl_to_reference", "response_length")})
            if self._asked_to_stop():
                self._checkpoint_and_exit()
            if self.execution.checkpoint_every and self.progress.iteration % self.execution.checkpoint_every == 0:
                self._checkpoint()
        self._check_networks()
        tracked.finish()
        expected = section.iterations * section.epochs * section.mini_batches
        if self.progress.steps != expected:
            raise InvariantError(f"{self.progress.steps} optimizer steps instead of {expected}")
        self.summary["resumed_at"] = self.progress.resumed_at
        if self.reference.moves:
            self.summary["final_reference"] = self.reference.sha256()

    def iterate(self, iteration, prompt_ids, prompts):
        """One iteration. Returns its metrics, its Sequences, and the score and KLs of each response, (B,) each."""
        clock = record.Clock(self.device)
        self._pause()
        batch = self._experience(iteration, prompt_ids, prompts, clock)

        # 4. Advantages, of the whole batch, so that neither mini-batches nor processes change them.
        tensors, measured = self.algorithm.advantages(batch, self.section)
        batch.tensors |= tensors
        importance = self._importance(batch)
        batch.tensors["advantages"] = tensors["advantages"] * importance

        # 5. Take steps.
        learning_rate = self._set_learning_rate(iteration)
        losses = self._optimise(iteration, batch)
        clock.lap("optimise")

        # 6. One line of metrics, of the policy that sampled the responses.
        per_response, mask = self._per_response(batch), batch.mask
        metrics = {
            "iteration": iteration,
            **{name: values.mean().item() for name, values in per_response.items()},
            "reward": batch["paid"].mean().item(),
            "response_length": batch.sequences.lengths.float().mean().item(),
            "eos_rate": batch.sequences.ended.float().mean().item(),
            **measured,
            "kl_coef": batch.kl_coef,
            "learning_rate": learning_rate,
            "importance": _mean(importance, mask),
            "sampling_difference": _mean(batch["sampling_difference"].abs(), mask),
            **losses,
            **clock.seconds(),
            "peak_memory_mib": record.peak_memory(self.device),
        }
        infinite = [name for name, value in metrics.items() if not math.isfinite(value)]
        if infinite:
            self._diverge("optimise", f"{infinite[0]} is {metrics[infinite[0]]}", batch.tensors)
        return metrics, batch.sequences, per_response

    def _experience(self, iteration, prompt_ids, prompts, clock):
        """The Batch of an iteration: responses, and what is computed of them before advantages are made."""
        # 1. Sample responses, each process its share of them.
        keys = sample_keys(prompt_ids, self.section.samples)
        prompts = [prompt for prompt in prompts for _ in range(self.section.samples)]
        share = processes.share(self.accelerator, len(keys))
        sequences, old_logprobs, old_values, difference = self._sample(iteration, keys[share], prompts[share])
        numbers = self._prompt_numbers(len(keys))
        sequences.prompt_numbers = numbers if numbers is None else numbers[share]
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
        tensors = {
            "score": score,  # (B,)
            "old_logprobs": old_logprobs,  # (B, T), as all below
            "sampling_difference": difference,
            "reference_logprobs": reference_logprobs,  # but (B, R, T) for R references
            "sft0_logprobs": sft0_logprobs,
        }
        if self.section.value_model:
            tensors["old_values"] = self._in_batches(sequences, "values") if old_values is None else old_values
            clock.lap("value")
        self._pause()

        # From here to the steps, every process has the whole batch.
        sequences, tensors = processes.gather(self.accelerator, sequences, tensors, self.pad_id)
        sequences.prompt_numbers = numbers
        self.last_batch = iteration, keys, sequences
        self._check_finite(tensors)
        if iteration == 0 and self.starts_at_reference:  # then the KL is 0
            start = tensors["reference_logprobs"][:, 0]
            mask = sequences.response_mask
            self._check_agreement("the reference", tensors["old_logprobs"], start, mask, mean_tolerance=0.1)
        tensors["paid"] = self._pay(tensors["score"], sequences.ended)
        longest = self.settings.lengths.response
        return Batch(sequences, tensors, self.reference.weights, self.progress.kl_coef, longest)

    def _prompt_numbers(self, count):
        """The number of each response's prompt, (B,), where forward passes compute a prompt once for all of them."""
        # Weights that are sharded would have to be gathered twice in a pass, and again in the backward pass.
        if self.section.samples == 1 or processes.sharded(self.accelerator) or self.summary["compiled"]:
            return None
        return torch.arange(count) // self.section.samples

    def _pay(self, score, ended):
        """What each response is paid, (B,), from its score (B,)."""
        section = self.section
        if section.score_normalisation == "none":
            score = score * self.reward_model.std + self.reward_model.mean
        return objective.paid_scores(
            score, ended, section.score_normalisation, section.score_clip, section.missing_eos_penalty
        )

    def _importance(self, batch):
        """The weight of each token (B, T), or of each response (B,), for how it was sampled.

        vLLM or bfloat16 sample from a slightly other distribution than the policy's. Importance weights correct for it,
        and are truncated, because a few large weights would make the gradient noisy.
        """
        difference = batch["sampling_difference"]
        if batch.of_responses:
            difference = torch.where(batch.mask.bool(), difference, 0.0).sum(dim=1)
        return torch.exp(difference).clamp(max=LARGEST_IMPORTANCE)

    def _per_response(self, batch):
        """The score and the KLs of each response, (B,) each, by name; KLs in nats."""
        to_sft0 = batch["old_logprobs"] - batch["sft0_logprobs"]
        per_response = {"score": batch["score"], "kl_to_sft0": (to_sft0 * batch.mask).sum(dim=1)}
        for estimator in ("k1", "k2", "k3"):
            per_response[f"kl_{estimator}"] = (batch.kl(estimator) * batch.mask).sum(dim=1)
        return per_response | {"kl_to_reference": per_response["kl_k1"]}

    def _sample(self, iteration, keys, prompts):
        """A response to each prompt: Sequences, and (B, T) log-probabilities, values (or None), sampling differences.

        bfloat16 and vLLM sample with other rounding than a forward pass of training. Then a fresh pass decides the old
        log-probabilities, so that the ratio starts at 1, and the differences say how far it is from what was sampled.
        """
        if self.vllm:
            policy = self.accelerator.unwrap_model(self.networks).policy
            sequences, sampled = self.vllm.sample(policy, prompts, keys, iteration, self.device)
        else:
            noise = uniforms(self.settings.seed, iteration, keys, self.settings.lengths.response)
            # Where processes share out the responses to a prompt, each response computes its prompt by itself.
            samples = 1 if len(prompts) % self.section.samples else self.section.samples
            how = self.end_ids, self.pad_id, self.execution.rollout_batch, samples
            with torch.no_grad(), processes.gathered(self.networks):
                sequences, sampled, values = self.networks("sample", prompts, noise, *how)
            if self.settings.mixed_precision == "no":
                return sequences, sampled, values, torch.zeros_like(sampled)
        fresh = self._in_batches(sequences, "logprobs")
        difference = (fresh - sampled) * sequences.response_mask
        if torch.isfinite(fresh).all():  # otherwise the policy has diverged, which `_check_finite` reports
            self._check_sampling(iteration, (difference.abs().sum() / sequences.response_mask.sum()).item())
        return sequences, fresh, None, difference

    def _optimise(self, iteration, batch):
        """Take `epochs` x `mini_batches` steps. Returns the metrics of the losses, means over all steps."""
        totals, all_tokens, all_units, norms = {}, 0, 0, []
        unwrapped = self.accelerator.unwrap_model(self.networks)
        unwrapped.recompute(True)
        for step, part in enumerate(self._mini_batches(iteration, batch)):
            tokens, units = batch.mask[part].sum().item(), self._units(batch.mask[part])
            sums = self._gradients(batch, part, units, first=step == 0)
            gradient_norms = self._clip_gradients()
            finite = all(map(math.isfinite, [*(value for _, value in sums), *gradient_norms]))
            if divergence.anywhere(self.accelerator, not finite):
                what = "losses or gradients are not finite"
                self._diverge("optimise", what, batch.tensors, rows=part.tolist())
            for name, value in sums:
                totals[name] = totals.get(name, 0.0) + value
            all_tokens, all_units = all_tokens + tokens, all_units + units
            norms.append(gradient_norms[0])
            self._step()
        unwrapped.recompute(False)
        sums = self.accelerator.reduce(torch.tensor([*totals.values()], dtype=torch.float64, device=self.device))
        counts = [all_tokens if name == "entropy" else all_units for name in totals]
        means = {name: value / count for name, value, count in zip(totals, sums.tolist(), counts, strict=True)}
        return {**means, "gradient_norm": float(np.mean(norms))}

    def _mini_batches(self, iteration, batch):
        """The rows of each mini-batch, epoch after epoch."""
        for epoch in range(self.section.epochs):
            generator = np.random.default_rng([self.settings.seed, iteration, epoch])
            for part in np.array_split(generator.permutation(len(batch)), self.section.mini_batches):
                # Sorted by length, so that micro-batches have little padding.
                order = np.argsort(batch.sequences.lengths[part].cpu().numpy(), kind="stable")
                yield torch.from_numpy(part[order])

    def _units(self, mask):
        """How many tokens, or responses, the loss of some responses is a mean over. `mask`: (B, T)."""
        return mask.sum().item() if self.algorithm.mean_over == "token" else len(mask)

    def _gradients(self, batch, part, units, first):
        """The gradients of a mini-batch of rows `part`. Returns (name, sum) of each micro-batch's metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        share, sums = part[self.accelerator.process_index :: self.accelerator.num_processes], []
        micro_batches = self._micro_batches(batch.sequences, share)
        for rows in micro_batches:
            last = rows is micro_batches[-1]
            with processes.gradients_kept(self.accelerator, self.networks, last):
                sums += self._backward(batch.rows(rows), units, first).items()
        return sums

    def _backward(self, batch, units, first):
        """Add the gradients of one micro-batch of a mini-batch of so many `units`. Returns its metrics as sums."""
        logprobs, entropies, values = self.networks("evaluate", batch.sequences)
        if first:
            self._start_ratios(batch, logprobs)
        loss, metrics = self.algorithm.loss(batch, logprobs, values, self.section)
        # The loss is a mean over the micro-batch. Weighted by its share it adds up to the mean over the mini-batch, so
        # that the size of micro-batches changes nothing. DDP and FSDP average gradients over processes.
        share = self._units(batch.mask)
        self.accelerator.backward(loss * (share / units * self.accelerator.num_processes))
        sums = {name: value.item() * share for name, value in metrics.items()}
        return {**sums, "entropy": entropies.sum().item()}

    def _start_ratios(self, batch, logprobs):
        """Check that ratios start at 1, before the first step on a Batch; those of whole responses do so exactly.

        In bfloat16 other micro-batches round log-probabilities in other ways, which adds up over a response. Until the
        first step the old ones are therefore the fresh ones. After it they stay those of the rollout: the weights that
        were stepped are rounded anew, so that the ratio has as much noise if the old ones come from the same
        micro-batches (measured at 120 tokens: a deviation of 0.10 nats per response with either).
        """
        old = batch["old_logprobs"]
        if torch.isfinite(logprobs).all():  # otherwise the policy has diverged, which the loss says
            self._check_agreement("the rollout", logprobs, old, batch.mask)
            if batch.of_responses:
                self._check_responses(logprobs, old, batch.mask)
        if batch.of_responses:
            batch.tensors["old_logprobs"] = logprobs.detach()

    def _clip_gradients(self):
        """Clip gradients to `max_grad_norm` in each network. Returns their norms before, the policy's first."""
        limit, groups = self.section.max_grad_norm, self.optimizer.param_groups
        return [float(self.accelerator.clip_grad_norm_(group["params"], limit)) for group in groups]

    def _step(self):
        self.optimizer.step()
        self.progress.steps += 1

    def _frozen(self, model, sequences):
        """The log-probabilities (B, T) of responses under a frozen model."""
        temperature = self.section.temperature
        return self._rows(
            sequences, lambda batch: forward.response_logprobs(model, batch, temperature, entropies=False)[0]
        )

    def _in_batches(self, sequences, task):
        """The result (B, T) of a task of the trained networks."""
        return self._rows(sequences, lambda batch: self.networks(task, batch))

    @torch.no_grad()
    def _rows(self, sequences, compute):
        """The result (B, T) of `compute`, which gets micro-batches of like length; zero where masked."""
        parts, length = self._micro_batches(sequences), sequences.response_mask.shape[1]
        computed = [forward.pad_right(compute(sequences.rows(rows)), length) for rows in parts]
        return forward.in_order(computed, parts) * sequences.response_mask

    def _micro_batches(self, sequences, rows=None):
        """Micro-batches of rows, which are as many in all processes: sharded weights are gathered for each."""
        alone = self.accelerator.num_processes == 1
        return forward.micro_batches(sequences, self.execution.micro_batch, rows, halve=alone)

    def _move_on(self, iteration, metrics):
        """Update what changes between iterations beside the networks: the reference, and kl_coef."""
        section = self.section
        if iteration < section.iterations - 1:  # the reference of the last iteration is what the run reports and saves
            self.reference.follow(self.accelerator.unwrap_model(self.networks).policy, iteration)
        self.progress.kl_coef = objective.next_kl_coef(
            section.kl_schedule,
            self.settings.kl_coef,
            self.progress.kl_coef,
            iteration,
            section.iterations,
            metrics["kl_to_reference"],
            section.batch_size,
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
            fault = divergence.first({name: tensors[name] for name in names if name in tensors})
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
            tasks = ("logprobs", "values") if self.section.value_model else ("logprobs",)
            outputs = {task: self._in_batches(sequences, task) for task in tasks}
            finite = finite and not divergence.first(outputs)
        if divergence.anywhere(self.accelerator, not finite):
            self._diverge("optimise", "what it left of the networks is not finite", {})

    def _diverge(self, phase, what, tensors, **facts):
        """Keep the last batch, and raise UserError. Called by every process."""
        iteration, prompt_ids, sequences = self.last_batch or (self.progress.iteration, [], None)
        learned = phase == "optimise" or (iteration > 0 and phase not in ("score", "reference"))
        remedy = f"lower {self._learning_rate}" if learned else PHASES[phase][1]
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
        sys.exit(self.stop.exit_code)

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

    @property
    def _learning_rate(self):
        """The setting, for messages."""
        return f"{self.name}.learning_rate={self.section.learning_rate:g}"

    def _set_learning_rate(self, iteration):
        rate = self.section.learning_rate
        if iteration < self.section.warmup:
            rate *= (iteration + 1) / self.section.warmup
        elif self.section.schedule == "linear":
            rate *= 1 - (iteration - self.section.warmup) / (self.section.iterations - self.section.warmup)
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
                cause = f"; has the policy exploded? Then lower {self._learning_rate}"
            raise InvariantError(
                f"log-probabilities from {what} and from a fresh forward pass of the policy differ by {worst:.3g} nats "
                f"(tolerance {tolerance}){cause}"
            )

    def _check_responses(self, logprobs, old, mask):
        """Raise InvariantError unless the log-probabilities of whole responses agree, from those (B, T) of tokens.

        Rounding adds up as √T. More than that is a difference in one direction, which grows as T.
        """
        difference = objective.sum_over_tokens(logprobs.detach() - old, mask).abs()
        difference = (difference / mask.sum(dim=1).sqrt()).mean().item()
        if not difference <= LARGEST_ROUNDING:
            raise InvariantError(
                f"log-probabilities of responses from the rollout and from a fresh pass of the policy differ by "
                f"{difference:.3g} nats / √tokens (at most {LARGEST_ROUNDING}), which is more than rounding adds up to"
            )

    def _check_sampling(self, iteration, difference):
        """Raise InvariantError where sampling and training differ by too many nats per token, in the mean."""
        if not difference <= LARGEST_DIFFERENCE:
            remedy = "execution.rollouts=transformers" if self.vllm else "mixed_precision=no"
            raise InvariantError(
                f"iteration {iteration}: log-probabilities from sampling and from a fresh forward pass of the policy "
                f"differ by {difference:.3g} nats per token (at most {LARGEST_DIFFERENCE}); set {remedy}"
            )


def _mean(values, mask):
    """The mean of values (B, T) over the mask, or of values (B,)."""
    return ((values * mask).sum() / mask.sum()).item() if values.dim() > 1 else values.mean().item()
