"""What the policy is anchored to.

A reference is one or several frozen models, with the weight of each one's KL in the penalty, mixed in memory when PPO
starts. One that moves follows the policy after each iteration. To add a kind: a function that returns a `Reference`,
an entry in `KINDS`, and a file in conf/arm.
"""

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from salsa.data import chat
from salsa.rl import models
from salsa.rl.forward import exact_kl
from salsa.rl.rollout import sample_in_batches
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


class Ema(Reference):
    """WARP's anchor (2406.16768, eq. 1): reference ← (1 − rate)·reference + rate·policy after each iteration.

    Held in float32: bfloat16 would round such small moves to none.
    """

    moves = True

    def __init__(self, model, summary, rate):
        super().__init__([copy.deepcopy(model).float()], {**summary, "rate": rate})
        self.rate = rate

    @torch.no_grad()
    def follow(self, policy, iteration):
        for tensor, new in zip(self.models[0].parameters(), policy.parameters(), strict=True):
            tensor.lerp_(new.to(tensor.dtype), self.rate)


class Reset(Reference):
    """The policy is copied into the reference after every `every` iterations (TR-DPO 2404.09656; 2602.18037)."""

    moves = True

    def __init__(self, model, summary, every):
        super().__init__([copy.deepcopy(model)], {**summary, "every": every})
        self.every = every

    @torch.no_grad()
    def follow(self, policy, iteration):
        if (iteration + 1) % self.every == 0:
            for tensor, new in zip(self.models[0].parameters(), policy.parameters(), strict=True):
                tensor.copy_(new)


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


def build(settings, ingredients, earlier=None):
    """The reference of a PPO run.

    Args:
        settings: config.PpoSettings.
        earlier: the summary of the run that built this reference before, to build the same again without a search.

    Raises UserError when `earlier` has another content than what the ingredients make.
    """
    made = KINDS[settings.reference.kind](settings, ingredients, earlier)
    made.summary = {**made.summary, "sha256": made.sha256()}
    if earlier and earlier["sha256"] != made.summary["sha256"]:
        raise runs.UserError(
            "the reference is not, bit for bit, the one that this run was anchored to: its SFT models, the hardware "
            "or a library have changed; remove the run's folder and run again"
        )
    return made


def dtype(settings):
    """What frozen models are held in."""
    return torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32


def starts_there(settings):
    """Whether the policy starts at its reference, where their KL is 0."""
    start, weights = ([Fraction(weight) for weight in each] for each in (settings.start, settings.reference.weights))
    return settings.reference.kind in ("soup", "ema", "reset") and start == weights


def final(folder, settings, ingredients):
    """The reference as it was at the end of the finished PPO run in `folder`."""
    if settings.reference.kind in ("ema", "reset"):
        model = models.load_policy(folder / "reference", ingredients.device, "auto")  # as it was held
        return Reference([model], _described(settings))
    return build(settings, ingredients, runs.manifest_of(folder)["summary"].get("reference"))


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


def soup(settings, ingredients, earlier):
    """SALSA's reference: the weight average of SFT models (2411.01798). One weight of 1 is plain PPO's."""
    return Reference([ingredients.mix(settings.reference.weights)], _described(settings))


def multi_kl(settings, ingredients, earlier):
    """A KL penalty towards each of several SFT models, Σ wᵢ·KL(policy ‖ sftᵢ).

    Its optimum is anchored to the geometric mean of their distributions over responses, where a soup averages weights.
    """
    weights = [Fraction(weight) for weight in settings.reference.weights]
    used = [(i, float(weight)) for i, weight in enumerate(weights) if weight]
    made = [ingredients.mix(["0"] * i + ["1"]) for i, _ in used]
    return Reference(made, _described(settings), [weight for _, weight in used])


def ema(settings, ingredients, earlier):
    """A reference that starts as a soup and follows the policy slowly."""
    return Ema(ingredients.mix(settings.reference.weights), _described(settings), settings.reference.rate)


def reset(settings, ingredients, earlier):
    """A reference that starts as a soup and is replaced by the policy now and then."""
    return Reset(ingredients.mix(settings.reference.weights), _described(settings), settings.reference.every)


def noise(settings, ingredients, earlier):
    """The control: sft0 moved in a random direction until KL(sft0 ‖ reference) is that of the soup of these weights.

    The direction is Gaussian, scaled in each tensor to the length of the soup's own displacement from sft0, so that no
    layer moves more than it does there relative to the others. Its length is found by bisection on fixed samples of
    sft0. Raises UserError when the soup is sft0 itself.
    """
    sft0 = ingredients.sft0
    target = mix(ingredients.folders, settings.reference.weights, ingredients.device, ingredients.dtype)
    start = {name: tensor.detach().clone() for name, tensor in sft0.named_parameters()}
    generator = torch.Generator().manual_seed(runs.derive_seed(settings.seed, "noise", 0))
    direction = {}
    for name, tensor in target.named_parameters():
        random = torch.randn(tensor.shape, generator=generator).to(ingredients.device, torch.float32)
        # float64: the same sum on any device and number of threads, and so the same reference whenever it is rebuilt.
        lengths = [x.double().norm().item() for x in (tensor - start[name], random)]
        direction[name] = random * (lengths[0] / max(lengths[1], 1e-12))

    @torch.no_grad()
    def move(length):
        for name, tensor in target.named_parameters():
            tensor.copy_(start[name] + length * direction[name])

    if earlier:
        move(earlier["displacement"])
        return Reference([target], earlier)
    samples = _samples(sft0, settings, ingredients)
    wanted = _mean_kl(sft0, target, samples, ingredients.micro_batch)
    if wanted <= 0:
        raise runs.UserError("reference noise: the soup of its weights is sft0 itself; give other weights")

    def kl_at(length):
        move(length)
        return _mean_kl(sft0, target, samples, ingredients.micro_batch)

    low, high = 0.0, 1.0
    while kl_at(high) < wanted:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) < wanted else (low, middle)
    displacement = (low + high) / 2
    summary = {
        **_described(settings),
        "kl_sft0_soup": wanted,
        "kl_sft0_reference": kl_at(displacement),
        "displacement": displacement,  # in lengths of the soup's own displacement
    }
    return Reference([target], summary)


def _described(settings):
    return {"kind": settings.reference.kind, "weights": settings.reference.weights}


def _samples(model, settings, ingredients):
    ids, encoded = ingredients.prompts
    batches = sample_in_batches(
        model,
        encoded,
        ids,
        runs.derive_seed(settings.seed, "reference", 0),
        0,
        settings.lengths.response,
        1.0,
        chat.end_ids(model, ingredients.tokenizer),
        ingredients.tokenizer.pad_token_id,
        ingredients.micro_batch,
    )
    return [sequences for _, sequences in batches]


def _mean_kl(model, reference, batches, micro_batch):
    return torch.cat([exact_kl(model, reference, batch, micro_batch) for batch in batches]).mean().item()


KINDS = {"soup": soup, "noise": noise, "multi_kl": multi_kl, "ema": ema, "reset": reset}
