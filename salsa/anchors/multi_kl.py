"""A KL penalty towards each of several models, Σ wᵢ·KL(policy ‖ modelᵢ).

Its optimum is anchored to the geometric mean of their distributions over responses, where a soup averages weights.
"""

from fractions import Fraction

from salsa import anchors
from salsa.workflow.weights import canonical_weights, soup_words, weight_of, weights_label


def build(settings, ingredients, earlier):
    """Each model with a weight of its own in the penalty."""
    from salsa.rl.reference import Reference, described

    weights = canonical_weights(settings.reference.weights)
    models = [ingredients.mix({name: 1}) for name, _ in weights]
    return Reference(models, described(settings), [float(Fraction(weight)) for _, weight in weights])


def check(key, reference, training):
    """ValueError for a weight below 0, or for one model alone."""
    weights = canonical_weights(reference.weights)
    if min(Fraction(weight) for _, weight in weights) < 0:
        raise ValueError(f"{key}.weights={soup_words(weights)}: a KL has no weight below 0; change them")
    if len(weights) < 2:
        raise ValueError(f"{key}: a KL to one model is that of kind=soup; write soup, or give two models a weight")


REFERENCE = anchors.Reference(
    kind="multi_kl",
    build=build,
    words=lambda reference: f"a KL to each: {soup_words(reference.weights)}",
    label=lambda reference: weights_label(reference.weights, "multi_kl"),
    models=lambda reference: len(canonical_weights(reference.weights)),
    holds_sft0=lambda reference: weight_of("sft0", reference.weights) != 0,
    check=check,
)
