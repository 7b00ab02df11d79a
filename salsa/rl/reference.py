"""References in memory: frozen models with the weight of each one's KL in the penalty, and what they are mixed from.

Left out: the kinds, one file each in salsa.anchors.
"""

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from salsa.data import chat
from salsa.rl import models
from salsa.rl.forward import exact_kl
from salsa.workflow import runs


class Reference:
    """Frozen models, the weight of each in the penalty, and a summary for the run's manifest."""

    moves = False

    def __init__(self, models, summary, weights=(1.0,)):
        self.models, self.weights = [model.requires_grad_(False) for model in models], list(weights)
        self.summary = summary

    def sha256(self):
        """The content of what the policy is anchored to now: one digest a model."""
        return [models.content_sha256(model) for model in self.models]

    def follow(self, policy, iteration):
        """Move, after iteration number `iteration` (from 0) has changed the policy."""

    def kl(self, policy, sequences, micro_batch, measure=exact_kl):
        """KL(policy ‖ reference) (B,), nats a response, exact over the vocabulary; of several models, weighted."""
        kls = [measure(policy, model, sequences, micro_batch) for model in self.models]
        return sum(weight * kl for weight, kl in zip(self.weights, kls, strict=True))


class Moving(Reference):
    """A copy of one model that follows the policy.

    Args:
        step: (tensor of the reference, the policy's tensor, iteration from 0) -> None, moves the former in place.
        float32: whether it is held so, whatever the others are held in.
    """

    moves = True

    def __init__(self, model, summary, step, float32=False):
        model = copy.deepcopy(model)  # which may be sft0, from which KL is reported too
        super().__init__([model.float() if float32 else model], summary)
        self.step = step

    @torch.no_grad()
    def follow(self, policy, iteration):
        for tensor, new in zip(self.models[0].parameters(), policy.parameters(), strict=True):
            self.step(tensor, new, iteration)


@dataclass
class Ingredients:
    """What references are made from.

    Attributes:
        folders: SFT model folders, None for those that neither start nor reference needs.
        sft0: the first of them, in memory.
        prompts: (ids, token ids) of the fixed prompts on which `noise` measures its distance.
    """

    folders: list
    sft0: Any
    prompts: tuple
    tokenizer: Any
    device: Any
    dtype: Any
    micro_batch: int

    def mix(self, weights):
        """The soup of the first SFT models, as many as there are weights; `sft0` itself where it is that."""
        if [Fraction(weight) for weight in weights] == [1]:
            return self.sft0
        return mix(self.folders, weights, self.device, self.dtype)


def load_ingredients(parents, prompt_length, tokenizer, device, dtype, micro_batch):
    """The Ingredients that a stage's parents (`prepare`, `sft0`, …) give."""
    folders = sft_folders(parents)
    rows = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")
    prompts = fixed_prompts(rows, tokenizer, prompt_length)
    sft0 = models.load_policy(folders[0], device, dtype)
    return Ingredients(folders, sft0, prompts, tokenizer, device, dtype, micro_batch)


def sft_folders(parents):
    """The SFT models' folders, by index, of a stage's parents; None where the run needs none."""
    count = 1 + max(int(role[3:]) for role in parents if role.startswith("sft"))
    return [models.model_folder(parents[f"sft{i}"]) if f"sft{i}" in parents else None for i in range(count)]


def fixed_prompts(evaluation, tokenizer, length):
    """(ids, token ids) of the evaluation prompts that have at most `length` tokens."""
    rows, encoded, _ = chat.fitting(tokenizer, evaluation, length, "evaluation prompts")
    return [row["id"] for row in rows], encoded


def mix(folders, weights, device, dtype):
    """The soup of the first SFT models, as many as there are weights."""
    return models.mix_policies(folders[: len(weights)], weights, device, dtype)


def dtype(settings):
    """What frozen models are held in."""
    return torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32


def described(settings):
    """What a summary says of every reference."""
    return {"kind": settings.reference.kind, "weights": settings.reference.weights}
