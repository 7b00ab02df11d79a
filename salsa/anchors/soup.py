"""SALSA's reference: the weight average of SFT models (2411.01798). A weight of 1 of sft0 is the plain one.

Its ingredients may be any models of one architecture; a single one with the weight 1 may be of another.
"""

from salsa import anchors
from salsa.workflow.weights import is_sft0, soup_words, weights_label


def build(settings, ingredients, earlier):
    """The weight average itself, which stays as it is."""
    from salsa.rl.reference import Reference, described

    return Reference([ingredients.mix(settings.reference.weights)], described(settings))


REFERENCE = anchors.Reference(
    kind="soup",
    build=build,
    words=lambda reference: soup_words(reference.weights),
    label=lambda reference: weights_label(reference.weights),
    starts_as_soup=True,
    holds_sft0=lambda reference: is_sft0(reference.weights),
)
