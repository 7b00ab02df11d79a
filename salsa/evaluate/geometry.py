"""Where a trained policy lies in weight space relative to the SFT models: how far it moved, and in which direction.

θ is the policy, θ0 and θ1 the first two SFT models. Weights are read from safetensors, one tensor of each model at a
time, and sums are float64; a tensor that a model uses twice (tied embeddings) counts once. Distances are Euclidean,
over all weights, in the unit of the weights.

Left out: how much a weight matters. A step in a direction that changes no output counts like one that does; KL says
what a policy does.
"""

import math

import torch

from salsa import soup
from salsa.workflow.messages import UserError

OF_SFT1 = ("from_sft1", "from_soup", "sft0_to_sft1", "cosine_sft1", "along_sft1", "off_line")
PIECE = 2**22  # weights held in float64 at once, of each model


def describe(policy, sft0, sft1=None):
    """Distances and angles, as a dictionary of floats.

    Args:
        policy, sft0, sft1: model folders of one architecture, whatever dtype they are stored in.

    Returns `from_sft0` ‖θ − θ0‖, `sft0_norm` ‖θ0‖, `from_sft1` ‖θ − θ1‖, `from_soup` ‖θ − (θ0 + θ1)/2‖,
    `sft0_to_sft1` ‖θ1 − θ0‖, `cosine_sft1` cos(θ − θ0, θ1 − θ0), `along_sft1` <θ − θ0, θ1 − θ0> / ‖θ1 − θ0‖² (0 at
    sft0, 1 at sft1) and `off_line`, the distance of θ from the line through θ0 and θ1. Values that need sft1 are None
    without it, and those that need a direction are None where its two points coincide.

    Raises UserError, naming the first difference, where the models' tensors have other names or shapes.
    """
    folders = [folder for folder in (sft0, policy, sft1) if folder is not None]
    names = _names(folders)
    return measure([soup.mixed_tensors([folder], [1.0], names) for folder in folders])


def alike(policy, sft0):
    """Whether two model folders have tensors of the same names and shapes, so that there is a way between them."""
    first, other = (soup.shapes(folder) for folder in (policy, sft0))
    return first == other


def nowhere():
    """`describe` of a policy of another architecture: there is no distance."""
    return dict.fromkeys(("from_sft0", "sft0_norm", *OF_SFT1))


def measure(models):
    """`describe` for two or three models (sft0, policy, sft1), each a stream of (name, tensor) in the same order."""
    norm = moved = between = product = to_sft1 = to_soup = 0.0  # sums of squares, except `product`
    for tensors in zip(*models, strict=True):
        if not tensors[0][1].is_floating_point():
            continue
        for start, policy, *sft1 in zip(*(tensor.flatten().split(PIECE) for _, tensor in tensors), strict=True):
            start = start.double()
            step = policy.double() - start
            norm, moved = norm + _square(start), moved + _square(step)
            if sft1:
                line = sft1[0].double() - start
                between, product = between + _square(line), product + torch.dot(step, line).item()
                to_sft1, to_soup = to_sft1 + _square(step - line), to_soup + _square(step - line / 2)
    distances = {"from_sft0": math.sqrt(moved), "sft0_norm": math.sqrt(norm)}
    distances |= dict.fromkeys(OF_SFT1)
    if len(models) < 3:
        return distances
    distances |= {"from_sft1": math.sqrt(to_sft1), "from_soup": math.sqrt(to_soup), "sft0_to_sft1": math.sqrt(between)}
    if between:
        # For a policy on the line, rounding can make the square slightly negative.
        distances |= {"along_sft1": product / between, "off_line": math.sqrt(max(0.0, moved - product**2 / between))}
        distances["cosine_sft1"] = product / math.sqrt(moved) / math.sqrt(between) if moved else None
    return distances


def _square(vector):
    return torch.dot(vector, vector).item()


def _names(folders):
    """Names of the tensors that count, the same in all folders; a tied tensor counts under its other name."""
    tied = soup.tied_names(folders[0])
    first, *others = ({n: shape for n, shape in soup.shapes(folder).items() if n not in tied} for folder in folders)
    for folder, shapes in zip(folders[1:], others, strict=True):
        for name in sorted(set(first) | set(shapes)):
            if first.get(name) != shapes.get(name):
                raise UserError(
                    f"{folder}: tensor {name} has shape {shapes.get(name)}, in {folders[0]} it has {first.get(name)}; "
                    "only like models can be compared"
                )
    return list(first)
