"""WARP's anchor (2406.16768, eq. 1): a soup that follows the policy slowly.

reference ← (1 − rate)·reference + rate·policy after each iteration. It is held in float32: bfloat16 would round such
small moves to none.
"""

from typing import Annotated

from salsa import anchors
from salsa.workflow import schema
from salsa.workflow.weights import number_label, soup_words, weights_label


@schema.dataclass()
class Settings:
    """A moving average's own settings."""

    rate: Annotated[schema.Share, schema.ALWAYS] = 0.0
    """Share of the policy that is mixed in after each iteration (WARP's mu)."""


def build(settings, ingredients, earlier):
    """A copy of the soup, moved a little towards the policy after each iteration."""
    from salsa.rl.reference import Moving, check_alike, described

    rate = settings.reference.rate

    def step(tensor, new, iteration):
        tensor.lerp_(new.to(tensor.dtype), rate)

    start = ingredients.mix(settings.reference.weights)
    check_alike(start, ingredients.sft0, "ema")
    return Moving(start, {**described(settings), "rate": rate}, step, float32=True)


def check(key, reference, training):
    """ValueError for a rate by which nothing would move, or further than the policy."""
    rate = reference.rate
    if not 0 < rate <= 1:
        raise ValueError(f"{key}.rate={rate}: must be above 0 and at most 1, the policy's share after each iteration")


REFERENCE = anchors.Reference(
    kind="ema",
    build=build,
    words=lambda ref: f"{soup_words(ref.weights)}, then a moving average of the policy, rate {ref.rate:g}",
    label=lambda ref: f"ema{number_label(ref.rate)}_{weights_label(ref.weights)}",
    settings=Settings,
    moves=True,
    held_in_float32=True,
    starts_as_soup=True,
    check=check,
)
