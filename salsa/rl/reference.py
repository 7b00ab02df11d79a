"""References in memory: frozen models with weights of their KLs in the penalty, and the models they are mixed from.

The kinds of references are in salsa.anchors, one file each.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from salsa.data import chat
from salsa.rl import models
from salsa.rl.forward import exact_kl
from salsa.workflow import runs
from salsa.workflow.messages import UserError
from salsa.workflow.weights import INGREDIENT, canonical_weights, is_sft0, soup_words


class Reference:
    """Frozen models, the weight of each in the penalty, and a summary for the manifest of the run."""

    moves = False

    def __init__(self, models, summary, weights=(1.0,)):
        self.models, self.weights = [model.requires_grad_(False) for model in models], list(weights)
        self.summary = summary

    def sha256(self):
        """A digest of the current weights of each model."""
        return [models.content_sha256(model) for model in self.models]

    def follow(self, policy, iteration):
        """Move after `iteration` (from 0) has changed the policy; most references stay."""

    def kl(self, policy, sequences, micro_batch, measure=exact_kl):
        """KL(policy ‖ reference) (B,) in nats per response, exact over the vocabulary; the weighted sum over models."""
        kls = [measure(policy, model, sequences, micro_batch) for model in self.models]
        return sum(weight * kl for weight, kl in zip(self.weights, kls, strict=True))


class Moving(Reference):
    """A copy of one model that follows the policy.

    `step(tensor, policy_tensor, iteration)` moves a tensor of it in place. With `float32` it is in this precision,
    whatever other frozen models are in.
    """

    moves = True

    def __init__(self, model, summary, step, float32=False):
        model = copy.deepcopy(model)  # it may be sft0, which must stay: KL to it is reported, too
        super().__init__([model.float() if float32 else model], summary)
        self.step = step

    @torch.no_grad()
    def follow(self, policy, iteration):
        for tensor, policy_tensor in zip(self.models[0].parameters(), policy.parameters(), strict=True):
            self.step(tensor, policy_tensor, iteration)


@dataclass
class Ingredients:
    """What references are made from.

    Attributes:
        folders: role -> model folder, of those that start or reference needs, and sft0's.
        sft0: the policy that KL is measured from in all arms, in memory.
        prompts: (ids, token ids) of the fixed prompts on which `noise` measures its distance.
        dtype: the type of frozen models.
    """

    folders: dict
    sft0: Any
    prompts: tuple
    tokenizer: Any
    device: Any
    dtype: Any
    micro_batch: int

    def mix(self, weights):
        """The soup of some weights over ingredients; `sft0` itself where it is that."""
        if is_sft0(weights):
            return self.sft0
        return mix(self.folders, weights, self.device, self.dtype)


def load_ingredients(settings, parents, tokenizer, device, micro_batch):
    """The Ingredients that the parents of a run (`prepare`, `sft0`, …) give."""
    folders = ingredient_folders(parents)
    evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")
    prompts = fixed_prompts(evaluation, tokenizer, settings.lengths.prompt)
    sft0 = models.load_policy(folders["sft0"], device, dtype(settings))
    return Ingredients(folders, sft0, prompts, tokenizer, device, dtype(settings), micro_batch)


def ingredient_folders(parents):
    """Role -> model folder of the ingredients among a run's parents: sft0, …, ingredient0, …"""
    return {role: models.model_folder(folder) for role, folder in parents.items() if INGREDIENT.fullmatch(role)}


def fixed_prompts(evaluation, tokenizer, length):
    """(ids, token ids) of the evaluation prompts that have at most `length` tokens."""
    rows, encoded, _ = chat.fitting(tokenizer, evaluation, length, "evaluation prompts")
    return [row["id"] for row in rows], encoded


def mix(folders, weights, device, dtype):
    """The soup of some weights over ingredients, whose `folders` are by role."""
    roles, shares = zip(*canonical_weights(weights), strict=True)
    for role in roles:
        if role not in folders:
            raise UserError(f"weights {soup_words(weights)}: the run has no parent {role}; give it")
    return models.mix_policies([folders[role] for role in roles], shares, device, dtype)


def check_alike(model, sft0, kind):
    """Raise UserError unless a reference of this `kind`, which is moved weight by weight, has the policy's shapes."""
    for (name, tensor), (other, start) in zip(model.named_parameters(), sft0.named_parameters(), strict=False):
        if (name, tensor.shape) != (other, start.shape):
            raise UserError(
                f"reference {kind}: its tensor {name} has shape {list(tensor.shape)}, and the policy's {other} has "
                f"{list(start.shape)}; a model of another architecture can be a reference of kind=soup alone"
            )


def dtype(settings):
    """The type of frozen models in a run."""
    return torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32


def described(settings):
    """The part of a summary that all references have."""
    return {"kind": settings.reference.kind, "weights": settings.reference.weights}
