"""A KL penalty towards each of several SFT models, Σ wᵢ·KL(policy ‖ sftᵢ).

Its optimum is anchored to the geometric mean of their distributions over responses, where a soup averages weights.
"""

from fractions import Fraction

from salsa import anchors
from salsa.workflow.weights import soup_words, weights_label


def build(settings, ingredients, earlier):
    """Each SFT model with a weight of its own in the penalty."""
    from salsa.rl.reference import Reference, described

    weights = {i: float(weight) for i, weight in enumerate(map(Fraction, settings.reference.weights)) if weight}
    models = [ingredients.mix(["0"] * i + ["1"]) for i in weights]
    return Reference(models, described(settings), weights.values())


def check(key, reference, training):
    """ValueError for a weight below 0, or for one model alone."""
    weights = [Fraction(weight) for weight in reference.weights]
    if min(weights) < 0:
        weights = ",".join(reference.weights)
        raise ValueError(f"{key}.weights=[{weights}]: a KL has no weight below 0; change them")
    if sum(weight != 0 for weight in weights) < 2:
        raise ValueError(f"{key}: a KL to one model is that of kind=soup; write soup, or give two models a weight")


REFERENCE = anchors.Reference(
    kind="multi_kl",
    build=build,
    words=lambda reference: f"a KL to each: {soup_words(reference.weights)}",
    label=lambda reference: weights_label(reference.weights, "multi_kl"),
    models=lambda reference: sum(Fraction(weight) != 0 for weight in reference.weights),
    holds_sft0=lambda reference: Fraction(reference.weights[0]) != 0,
    check=check,
)
