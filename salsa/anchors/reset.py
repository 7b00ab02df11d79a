"""A soup that is replaced by the policy after every `every` iterations (TR-DPO 2404.09656; 2602.18037)."""

from typing import Annotated

from salsa import anchors
from salsa.workflow import schema
from salsa.workflow.weights import number_label, soup_words, weights_label


@schema.dataclass()
class Settings:
    """Its own settings."""

    every: Annotated[schema.Count, schema.ALWAYS] = 0
    """Iterations between two copies of the policy."""


def build(settings, ingredients, earlier):
    """A copy of the soup, which becomes the policy after every so many iterations."""
    from salsa.rl.reference import Moving, check_alike, described

    every = settings.reference.every

    def step(tensor, new, iteration):
        if (iteration + 1) % every == 0:
            tensor.copy_(new)

    start = ingredients.mix(settings.reference.weights)
    check_alike(start, ingredients.sft0, "reset")
    return Moving(start, {**described(settings), "every": every}, step)


def check(key, reference, training):
    """ValueError where no iteration would reset it."""
    every, iterations = reference.every, training.iterations
    if not 1 <= every < iterations:
        raise ValueError(
            f"{key}.every={every}: must be at least 1 and below the {iterations} iterations, or nothing is reset"
        )


REFERENCE = anchors.Reference(
    kind="reset",
    build=build,
    words=lambda ref: f"{soup_words(ref.weights)}, then the policy, every {ref.every} iterations",
    label=lambda ref: f"reset{number_label(ref.every)}_{weights_label(ref.weights)}",
    settings=Settings,
    moves=True,
    starts_as_soup=True,
    check=check,
)
