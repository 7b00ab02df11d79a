"""DPO with TRL's DPOTrainer, against any reference (2305.18290; 2404.09656 where the reference moves).

The loss of a pair is −log σ(β·(log-ratio of the chosen response − log-ratio of the rejected one)), where a log-ratio is
log π(y|x) − Σᵢ wᵢ log refᵢ(y|x), as the KL penalty of PPO weighs references, and β is kl_coef. Pairs are those of the
data, or are drawn from sft0 and sft1 and labelled by the reward model; the pairs, or prompts, on which the reward model
is measured are left out.

DPO is offline: nothing is sampled from the policy while it learns, so that metrics.jsonl has neither KL nor rewards of
its own responses. An iteration is an optimizer step, after which a reference that moves follows the policy.
"""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from salsa import anchors, reward
from salsa.data import chat
from salsa.rl import checkpoints, divergence, forward, models, processes, reference, training
from salsa.workflow import config, runs, schema
from salsa.workflow.messages import UserError

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # as transformers names them
MOVED = "reference.safetensors"  # in a checkpoint: a reference that moves
KEPT = "pairs"  # a folder beside the checkpoints: the pairs that the run is trained on, and their counts
RATIOS = {  # TRL's name of a mean over the pairs of a micro-batch -> column of metrics.jsonl
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logprob",
    "logps/rejected": "rejected_logprob",
}
COLUMNS = {"loss": "loss", **RATIOS, "grad_norm": "gradient_norm", "learning_rate": "learning_rate"}


def train(settings, parents, output, execution):
    """Train a policy on preference pairs.

    It writes `model/`, metrics.jsonl (one line per optimizer step) and, where the reference moves, `reference/`. An
    interrupted run goes on from its last checkpoint. Raises UserError where there are too few pairs, and where numbers
    are not finite.

    Parents: `prepare`, `reward_model`, `sft0`, the other models that start or reference need, and `sft1` where
    preferences are sampled.
    """
    device = models.prepare_process(execution)
    _check(settings)
    tokenizer = models.load_tokenizer(models.model_folder(parents["sft0"]))
    pairs, counts = _share_pairs(settings, parents, tokenizer, device, execution, output)
    ingredients = reference.load_ingredients(settings, parents, tokenizer, device, execution.micro_batch)
    anchor = anchors.build(settings, ingredients, _anchored_to(output))
    folders = ingredients.folders
    del ingredients  # sft0 leaves the memory, unless it is a reference

    def load():
        return reference.mix(folders, settings.start, "cpu", torch.float32)

    policy = load()
    parameters = policy.num_parameters()  # counted before it has adapters, or this process holds only a part of them
    trainer = make_trainer(settings, policy, anchor, tokenizer, pairs, output, device, execution)
    history = training.train(trainer, output, load, execution)
    if training.world()[1]:
        return None  # the first process writes
    metrics = _metrics(history)
    runs.write_jsonl(output / "metrics.jsonl", metrics)
    summary = {"reference": anchor.summary, "parameters": parameters, "pairs": len(pairs), "counts": counts}
    return summary | _write_moved(anchor, tokenizer, output) | {"steps": len(metrics)}


def _write_moved(anchor, tokenizer, output):
    """Write a reference that moves to `output/reference`. Returns what the run's summary says of it."""
    if not anchor.moves:
        return {}
    models.save(anchor.models[0], output / "reference")
    tokenizer.save_pretrained(output / "reference")
    return {"final_reference": anchor.sha256()}


def _check(settings):
    """Refuse what no run can honour, before anything is computed; a plan has refused it, too."""
    dpo, moves = settings.dpo, anchors.kinds()[settings.reference.kind].moves
    if not settings.kl_coef > 0:
        raise UserError(f"kl_coef={settings.kl_coef:g} is DPO's β, which must be above 0; give another")
    if moves and dpo.lora_rank:
        raise UserError(
            f"dpo.lora_rank={dpo.lora_rank} trains adapters, and a reference that moves follows all weights; "
            "set dpo.lora_rank=0, or a reference that stays"
        )
    training.batch_share("dpo", dpo)
    models.adapter_config("dpo", dpo)  # raises where PEFT is missing


def _check_steps(settings, pairs):
    """Refuse a reference that would not move within the steps that the pairs give."""
    dpo, anchor = settings.dpo, settings.reference
    steps = dpo.epochs * math.ceil(pairs / dpo.batch_size)
    try:
        anchors.kinds()[anchor.kind].check("reference", anchor, SimpleNamespace(iterations=steps))
    except ValueError as error:
        raise UserError(f"{error} ({pairs} pairs)") from None


def _share_pairs(settings, parents, tokenizer, device, execution, output):
    """What `make_pairs` returns, in every process. Raises UserError where kept pairs are damaged."""
    # The first process makes the pairs for all: on GPUs of their own, they would round their samples differently.
    made = _kept_pairs(settings, parents, tokenizer, device, execution, output) if training.world()[1] == 0 else None
    pairs, counts = broadcast_object_list([made])[0]
    clear_device_cache(garbage_collection=True)
    return pairs, counts


def _kept_pairs(settings, parents, tokenizer, device, execution, output):
    """What `make_pairs` returns: made and kept at a run's first start, and read at the others.

    Another rollout_batch or device rounds samples differently. A run that sampled again when it goes on could have
    other pairs than those that its checkpoint has learned from.
    """
    root = output / runs.CHECKPOINTS
    folder = root / KEPT
    # A run that was killed while it wrote the pairs has learned nothing from them; one with a checkpoint has.
    if (folder / checkpoints.FILES).exists() or (root / training.SAVED).exists():
        checkpoints.check_files(folder)
        return runs.read_jsonl(folder / "pairs.jsonl"), runs.read_json(folder / "counts.json")
    pairs, counts = make_pairs(settings, parents, tokenizer, device, execution, output)
    _check_steps(settings, len(pairs))
    runs.write_jsonl(folder / "pairs.jsonl", pairs)
    runs.write_json(folder / "counts.json", counts)
    checkpoints.describe_files(folder)  # last: with it, the pairs are whole
    return pairs, counts


def make_pairs(settings, parents, tokenizer, device, execution, output):
    """The pairs to train on, {"prompt", "chosen", "rejected"} (token ids), and counts of those that were dropped.

    They come from where the reward model's come from, and none of them is held out there. Raises UserError where they
    are too few for a batch.
    """
    trained_on = schema.from_dict(config.RewardModelSettings, runs.read_manifest(parents["reward_model"])["settings"])
    held_out = trained_on.reward_model.held_out
    if trained_on.preferences == "given":
        pairs, counts = reward.read_pairs(trained_on, parents, tokenizer, None)
        pairs = [pair for pair in pairs if not pair["held_out"]][: settings.dpo.pairs]
    else:
        pairs, counts = sample_pairs(settings, held_out, parents, tokenizer, device, execution, output)
    if len(pairs) < settings.dpo.batch_size:
        identical = counts.get("dropped_identical", 0)
        why = f"; {identical} pairs of two equal responses were dropped" if identical else ""
        raise UserError(
            f"{len(pairs)} pairs are left of {counts['read']} rows without reward_model.held_out={held_out}: too few "
            f"for dpo.batch_size={settings.dpo.batch_size}{why}"
        )
    return pairs, counts


def sample_pairs(settings, held_out, parents, tokenizer, device, execution, output):
    """Pairs of responses drawn from sft0 and sft1, labelled by the reward model with Bradley-Terry noise, and counts.

    Prompts are those of preferences but the first `held_out`, used again with other noise where they are fewer than
    pairs. Returns what `make_pairs` does.
    """
    rows = runs.read_jsonl(parents["prepare"] / "preference_prompts.jsonl")
    read, count = len(rows), settings.dpo.pairs
    rows, encoded, refused = chat.fitting(tokenizer, rows, settings.lengths.prompt, "preference prompts")
    if len(rows) <= held_out:
        raise UserError(f"{len(rows)} preference prompts for reward_model.held_out={held_out}; give more")
    ids = [row["id"] for row in rows]
    places = itertools.islice(itertools.cycle(range(held_out, len(rows))), count)
    prompts = [(ids[place], encoded[place]) for place in places]
    responses = reward.draw_pairs(settings, parents, tokenizer, prompts, device, execution)
    scores = _scores(settings, parents, tokenizer, prompts, responses, device, execution, output)
    seed = runs.derive_seed(settings.seed, "labels", 0)
    labelled, dropped = reward.label_pairs(tokenizer, responses, scores, settings.dpo.label_temperature, seed)
    pairs = [
        {"prompt": prompts[i][1], "chosen": responses[i][best], "rejected": responses[i][worst]}
        for i, best, worst in labelled
    ]
    return pairs, {"read": read, "sampled": count, "kept": len(pairs)} | dropped | refused


def _scores(settings, parents, tokenizer, prompts, responses, device, execution, output):
    """The normalised rewards of the first responses (N,), and those of the second ones."""
    reward_model = models.load_score_model(parents["reward_model"], device)
    encoded = [tokens for _, tokens in prompts]
    scores = []
    for place in (0, 1):
        answers = [pair[place] for pair in responses]
        sequences = forward.from_lists(encoded, answers, [], tokenizer.pad_token_id, device)
        scores.append(reward_model.scores(sequences, execution.micro_batch))
        fault = divergence.first({"the score of a pair": scores[-1]})
        if fault:
            remedy = "the reward model is broken; train it with a lower reward_model.learning_rate"
            divergence.stop(output, f"{fault}; {remedy}", {}, {**vars(sequences), "score": scores[-1]})
    return [part.double().cpu().numpy() for part in scores]


def make_trainer(settings, policy, anchor, tokenizer, pairs, output, device, execution):
    """The trainer of a policy, in float32, against an anchor (`reference.Reference`)."""
    dpo, padding = settings.dpo, tokenizer.pad_token_id
    arguments = training.arguments("dpo", dpo, settings, execution, output, device)
    arguments |= {"lr_scheduler_type": SCHEDULES[dpo.schedule], "max_grad_norm": dpo.max_grad_norm, "logging_steps": 1}
    trainer = _Trainer(
        model=policy,
        anchor=anchor,
        args=DPOConfig(
            **arguments,
            beta=settings.kl_coef,
            max_length=None,  # pairs that are too long are dropped and counted when they are made
            router_aux_loss_coef=0.0,  # DPO's loss alone, of mixtures of experts too
        ),
        train_dataset=Dataset.from_dict(
            {f"{part}_ids": [pair[part] for pair in pairs] for part in ("prompt", "chosen", "rejected")}
        ),
        processing_class=tokenizer,
        peft_config=models.adapter_config("dpo", dpo),
        section="dpo",
        # Two responses of no token have no log-probability to learn.
        empty={"prompt_ids": [padding, padding], "chosen_ids": [], "rejected_ids": []},
    )
    if anchor.moves and processes.sharded(trainer.accelerator):
        raise UserError(
            f"{trainer.accelerator.distributed_type.value} shards the policy's weights, and a reference that moves "
            "needs them whole; start the run without it"
        )
    trainer.add_callback(_Follow(trainer))
    return trainer


class _Trainer(training.DistributedMixin, DPOTrainer):
    """TRL's trainer with any reference, of pairs that are tokens already.

    Its losses and metrics are means over the pairs of a batch, for any size of micro-batches and any number of empty
    pairs.
    """

    def __init__(self, *, anchor, **named):
        super().__init__(ref_model=anchor.models[0], **named)
        self.anchor = anchor
        self.references = [self.ref_model, *map(self._prepared, anchor.models[1:])]
        self.precompute_ref_logps = True  # TRL takes them from the batch, where compute_loss puts them

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _prepared(self, model):
        """A further frozen model, as TRL prepares its reference."""
        add_fused_lm_head(model)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = inputs | self._reference_logprobs(inputs)
        loss = super().compute_loss(model, inputs)
        rows = inputs["completion_mask"].any(dim=1)
        pairs = len(rows) // 2
        empty = pairs - rows.sum() / 2
        loss = loss - math.log(2) * empty / pairs  # that of a pair without a margin, a constant
        counted = pairs * self.current_gradient_accumulation_steps * self.args.world_size
        scale = counted / self.in_this_step()
        for name in RATIOS:  # of which TRL logs means over micro-batches
            self._metrics["train"][name][-1] *= scale
        return loss * scale

    def _reference_logprobs(self, inputs):
        """Σᵢ wᵢ log refᵢ(y|x) of the chosen and of the rejected responses, (B,) each, as TRL names them."""
        logprobs = [self.compute_ref_log_probs(model, inputs) for model in self.references]
        chosen, rejected = (
            sum(weight * part for weight, part in zip(self.anchor.weights, parts, strict=True))
            for parts in zip(*logprobs, strict=True)
        )
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _save_checkpoint(self, *arguments):
        super()._save_checkpoint(*arguments)
        if self.accelerator.is_main_process:
            root = Path(self.args.output_dir)
            runs.write_json(root / checkpoints.ANCHOR, self.anchor.summary)
            if self.anchor.moves:  # one that stays is built again from its ingredients
                save_model(self.anchor.models[0], root / f"checkpoint-{self.state.global_step}" / MOVED)

    def _load_from_checkpoint(self, checkpoint, *arguments, **named):
        super()._load_from_checkpoint(checkpoint, *arguments, **named)
        if self.anchor.moves:
            load_model(self.anchor.models[0], Path(checkpoint) / MOVED)


class _Follow(TrainerCallback):
    """Lets the reference follow the policy after each step but the last, whose reference the run reports and saves."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **_):
        if state.global_step < state.max_steps:
            policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
            self.trainer.anchor.follow(policy, state.global_step - 1)


def _anchored_to(output):
    """The summary of the reference of the interrupted run in `output`, or None. Raises UserError if it is damaged."""
    root = output / runs.CHECKPOINTS
    return checkpoints.read_object(root / checkpoints.ANCHOR, "sha256") if (root / training.SAVED).exists() else None


def _metrics(history):
    """The rows of metrics.jsonl, from a trainer's log history: an optimizer step each."""
    steps = [row for row in history if "loss" in row]
    return [
        {"iteration": place, **{column: row[name] for name, column in COLUMNS.items()}}
        for place, row in enumerate(steps)
    ]
