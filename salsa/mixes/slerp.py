"""SLERP of task vectors, WARP's way to merge policies (2406.16768, section 3.2), and its step towards the start.

Models are turned into one another along an arc instead of a line, so that the mix of vectors at an angle is not shorter
than they are. Of two task vectors δ_m = θ_m − θ_origin with the angle Ω between them,

    slerp(δ_0, δ_1, λ) = sin((1 − λ)Ω)/sin Ω · δ_0 + sin(λΩ)/sin Ω · δ_1,
    θ = θ_origin + step · slerp(δ_0, δ_1, λ).

Each stored tensor (a matrix, a vector of norms) has an angle of its own: "layer by layer", as WARP says, and as
mergekit's `slerp` does. More than two models are merged as in WARP: the result so far with the next model, whose λ is
its share of the weights so far, 1/m when they are even. Without an origin the vectors start at 0, and the mix of two
models is mergekit's. `step` below 1 is WARP's interpolation towards the initialization (LITI, its η).

Every result is a linear combination of the models. Its coefficients follow from the inner products of the δ_m alone:
these are read first, in float64, and the combination is then made as every soup is (salsa.soup).
"""

import math
from typing import Annotated

from salsa import mixes
from salsa.workflow import schema
from salsa.workflow.messages import UserError

# As mergekit has them. Of vectors nearly parallel, or opposite, sin Ω is nearly 0 and the arc isn't determined: they
# are mixed linearly. A vector shorter than SHORTEST has no direction, and is taken to be at right angles to all others.
PARALLEL = 0.9995
SHORTEST = 1e-8
LONGEST_STEP = 10  # from the origin; beyond 1, the mix lies beyond the merged models


@schema.dataclass()
class Settings:
    """SLERP's own settings."""

    origin: Annotated[str, schema.Text(200)] = ""
    """The model that the task vectors start at; nothing: they start at 0, and are the weights themselves."""
    step: Annotated[float, schema.Range(above=0, at_most=LONGEST_STEP)] = 1.0
    """Length of the step from the origin, as a share of the way to the merged model: WARP's eta."""


def make(mix, folders, output, held_out=None):
    """Write the mix; the summary says what angles its tensors had, in degrees, and how many were mixed linearly."""
    weights = mixes.weights_of(mix)
    origin = folders[mix.origin] if mix.origin else None
    (angles,) = write(
        [folders[role] for role in weights], [list(weights.values())], [output], origin, mix.step, list(weights)
    )
    return {"mix": words(mix), **describe(angles)}, {}


def write(models, grid, outputs, origin=None, step=1.0, names=None):
    """Write the SLERP of model folders for each row of weights, as `soup.soups` writes averages.

    `names`: what the models are called in their cards, beside their folders.

    Returns for each output the angles (radians) of all merges in it, with None for a linear one.
    """
    from salsa import mix_card, soup

    given, grid = grid, soup.parse_grid(models, grid, outputs)
    if any(weight < 0 for weights in grid for weight in weights):
        raise UserError("weights: SLERP goes from one model to another and not beyond; each must be at least 0")
    angles = [[] for _ in outputs]

    def choose():
        rows = {}
        for name, products in soup.task_products(models, origin).items():
            merged = [coefficients(products.tolist(), weights) for weights in grid]
            rows[name] = [combination(row, origin is not None, step) for row, _ in merged]
            for of_output, (_, of_tensor) in zip(angles, merged, strict=True):
                of_output += of_tensor
        unused = [combination(weights, origin is not None, 1.0) for weights in grid]  # of tensors that are no floats
        return lambda name: rows.get(name, unused)

    options = ["--method", "slerp", *(["--origin", mix_card.place(origin), "--step", f"{step:g}"] if origin else [])]
    title = f"The SLERP of {len(models)} models"
    card = mix_card.Card(list(models), title, method_words(origin, step), names, options, origin, ("slerp",))

    def describe(number, folder):
        card.write(folder, given[number], f"Of its tensors: {report(angles[number])}.")

    soup.combinations([*models, *([origin] if origin else [])], outputs, choose, describe)
    return angles


def method_words(origin, step):
    """How a SLERP is made, for its card."""
    start = f"the differences from the origin, then a step of {step:g} from it" if origin else "the weights themselves"
    return (
        f"Each tensor is merged along an arc, in float64 and rounded once to the stored type (SLERP; of {start}; "
        "WARP, arXiv:2406.16768, section 3.2)."
    )


def coefficients(products, weights):
    """The coefficients of the task vectors in their SLERP, and the angle of each merge (None for a linear one).

    Args:
        products: the inner products of the task vectors, (M, M).
        weights: M numbers from 0 on. A model of weight 0 takes no part.
    """
    everyone = range(len(weights))
    merged, total, angles = [0.0] * len(weights), 0.0, []
    for new in everyone:
        if not weights[new]:
            continue
        if not total:
            merged[new], total = 1.0, weights[new]
            continue
        total += weights[new]
        square = sum(merged[i] * merged[j] * products[i][j] for i in everyone for j in everyone)
        product = sum(merged[i] * products[i][new] for i in everyone)
        cosine = product / (_norm(square) * _norm(products[new][new]))
        of_merged, of_new, angle = arc(cosine, weights[new] / total)
        merged = [of_merged * coefficient for coefficient in merged]
        merged[new] = of_new
        angles.append(angle)
    return merged, angles


def _norm(square):
    """The norm of a vector from its square, which rounding can make negative; 1 for a vector without a direction."""
    norm = math.sqrt(max(0.0, square))
    return norm if norm > SHORTEST else 1.0


def arc(cosine, share):
    """The coefficients of two vectors at the place `share` of the arc between them, and the angle (None: linear)."""
    if abs(cosine) > PARALLEL:
        return 1 - share, share, None
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle), angle


def combination(merged, from_origin, step):
    """The coefficients of the models, and last of the origin where there is one, from those of the task vectors."""
    merged = [step * coefficient for coefficient in merged]
    return [*merged, 1 - sum(merged)] if from_origin else merged


def describe(angles):
    """What a run's manifest says of the angles (radians) of an output's merges."""
    measured = sorted(math.degrees(angle) for angle in angles if angle is not None)
    lowest, middle, highest = (measured[i] for i in (0, len(measured) // 2, -1)) if measured else (None,) * 3
    counts = {"merges": len(angles), "linear": len(angles) - len(measured)}
    return counts | {"lowest_angle": lowest, "median_angle": middle, "highest_angle": highest}


def report(angles):
    """`describe` in words."""
    said = describe(angles)
    counts = f"{said['merges']} merges, {said['linear']} of them linear"
    if said["median_angle"] is None:
        return counts
    lowest, median, highest = (f"{said[f'{name}_angle']:.1f}°" for name in ("lowest", "median", "highest"))
    return f"{counts}; angles from {lowest} to {highest}, median {median}"


def words(mix):
    """The mix in words."""
    start = f", from {mix.origin}" if mix.origin else ""
    return f"SLERP of {mixes.sum_words(mix)}{start}" + (f", step {mix.step:g}" if mix.step != 1 else "")


def check(mix):
    """Refuse an origin that is merged itself, and what has no arc or no start."""
    weights = mixes.weights_of(mix)
    if mix.origin in weights:
        raise schema.fault("has a weight, and no direction from itself; take it out of the weights", "origin", mix)
    if not mix.origin and len(weights) < 2:
        raise mixes.wrong_weights("one model is no mix; give weights to two or more")
    if not mix.origin and mix.step != 1:
        raise schema.fault("has no origin to start from; give one, or leave step out", "step", mix)


MIX = mixes.Mix(
    kind="slerp",
    make=make,
    words=words,
    settings=Settings,
    origin=lambda mix: mix.origin,
    by_name=lambda mix: len(mixes.weights_of(mix)) > 2,
    check=check,
)
