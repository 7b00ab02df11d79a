"""What the policy is anchored to.

A reference is its ingredients and weights, mixed in memory when PPO starts. To add a kind: a function that returns
the model, an entry in `KINDS`, and a file in conf/arm.
"""

import torch

from salsa import models, runs
from salsa.forward import exact_kl
from salsa.ppo.rollout import sample_in_batches


def build(settings, folders, prompts, tokenizer, device, dtype, micro_batch, found=None):
    """The frozen reference model of a PPO run, and a summary for its manifest.

    Args:
        settings: config.PpoSettings.
        folders: SFT model folders, None for those that neither start nor reference needs.
        prompts: (ids, encoded) of fixed prompts on which `noise` measures its distance.
        found: the summary of the run that built this reference before, to build the same again without a search.
    """
    make = KINDS[settings.reference.kind]
    model, summary = make(settings, folders, prompts, tokenizer, device, dtype, micro_batch, found)
    return model.requires_grad_(False), summary


def sft_folders(parents):
    """The SFT models' folders, by index, of a stage's parents; None where the run needs none."""
    count = 1 + max(int(role[3:]) for role in parents if role.startswith("sft"))
    return [models.model_folder(parents[f"sft{i}"]) if f"sft{i}" in parents else None for i in range(count)]


def fixed_prompts(evaluation, tokenizer, length):
    """(ids, token ids) of the evaluation prompts that have at most `length` tokens."""
    encoded = models.encode_prompts(tokenizer, [row["prompt"] for row in evaluation])
    rows, encoded = models.within_length(evaluation, encoded, length, "evaluation prompts")
    return [row["id"] for row in rows], encoded


def soup(settings, folders, prompts, tokenizer, device, dtype, micro_batch, found=None):
    """SALSA's reference: the weight average of SFT models (2411.01798). One weight of 1 is plain PPO's."""
    weights = settings.reference.weights
    return mix(folders, weights, device, dtype), {"kind": "soup", "weights": weights}


def mix(folders, weights, device, dtype):
    """The soup of the first SFT models, as many as there are weights."""
    return models.mix_policies(folders[: len(weights)], weights, device, dtype)


def noise(settings, folders, prompts, tokenizer, device, dtype, micro_batch, found=None):
    """The control: sft0 moved in a random direction until KL(sft0 ‖ reference) is that of the soup of these weights.

    The direction is Gaussian, scaled in each tensor to the length of the soup's own displacement from sft0, so that no
    layer moves more than it does there relative to the others. Its length is found by bisection on fixed samples of
    sft0. Raises UserError when the soup is sft0 itself.
    """
    sft0 = models.load_policy(folders[0], device, dtype)
    target = mix(folders, settings.reference.weights, device, dtype)
    start = {name: tensor.detach().clone() for name, tensor in sft0.named_parameters()}
    generator = torch.Generator().manual_seed(runs.derive_seed(settings.seed, "noise", 0))
    direction = {}
    for name, tensor in target.named_parameters():
        random = torch.randn(tensor.shape, generator=generator).to(device, torch.float32)
        direction[name] = random * ((tensor - start[name]).float().norm() / random.norm().clamp(min=1e-12))

    @torch.no_grad()
    def move(length):
        for name, tensor in target.named_parameters():
            tensor.copy_(start[name] + length * direction[name])

    if found:
        move(found["displacement"])
        return target, found
    samples = _samples(sft0, prompts, settings, tokenizer, micro_batch)
    wanted = _mean_kl(sft0, target, samples, micro_batch)
    if wanted <= 0:
        raise runs.UserError("reference noise: the soup of its weights is sft0 itself; give other weights")

    def kl_at(length):
        move(length)
        return _mean_kl(sft0, target, samples, micro_batch)

    low, high = 0.0, 1.0
    while kl_at(high) < wanted:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) < wanted else (low, middle)
    displacement = (low + high) / 2
    return target, {
        "kind": "noise",
        "weights": settings.reference.weights,
        "kl_sft0_soup": wanted,
        "kl_sft0_reference": kl_at(displacement),
        "displacement": displacement,  # in lengths of the soup's own displacement
    }


def _samples(model, prompts, settings, tokenizer, micro_batch):
    ids, encoded = prompts
    batches = sample_in_batches(
        model,
        encoded,
        ids,
        runs.derive_seed(settings.seed, "reference", 0),
        0,
        settings.lengths.response,
        1.0,
        models.end_ids(model, tokenizer),
        tokenizer.pad_token_id,
        micro_batch,
    )
    return [sequences for _, sequences in batches]


def _mean_kl(model, reference, batches, micro_batch):
    return torch.cat([exact_kl(model, reference, batch, micro_batch) for batch in batches]).mean().item()


KINDS = {"soup": soup, "noise": noise}
