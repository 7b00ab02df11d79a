"""What a policy is anchored to: one file per kind of reference, with a record of what there is to know of it.

Planning, estimates, training and the report iterate the records, so a new kind is a new file. This module imports no
torch: `build` and `final` do so where they are called. Left out: the classes that hold a reference in memory
(salsa.rl.reference).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from salsa.workflow import registry, runs, schema, weights
from salsa.workflow.messages import UserError


def _nothing(*args):
    pass


@schema.dataclass()
class Settings(schema.Kind):
    """What the KL penalty is measured from: the settings that every kind has."""

    kind: str = "soup"
    """How the reference is made."""
    weights: schema.Weights = schema.listed("1")
    """Over ingredients, decimals or fractions: a list over sft0, sft1, …, or by name."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A kind of reference. Its functions take a `config.Reference`, whose weights are canonical.

    Attributes:
        settings: a schema of its own settings, or None.
        build: (config.PolicySettings, rl.reference.Ingredients, earlier summary or None) -> rl.reference.Reference.
            It imports torch when it is called.
        words: what the KL is measured from, for the table of arms.
        label: a readable name, a part of names of runs.
        moves: whether it follows the policy, so that its end is saved with the run, and all weights have to be trained.
        held_in_float32: whether it is, though other frozen models may be in bfloat16.
        starts_as_soup: whether it begins as the soup of its weights, where a policy with this start has a KL of 0.
        models: how many models it holds in memory.
        holds_sft0: whether one of them is sft0 itself, which is in memory anyway.
        check: (key, reference, schema.Training) -> None. ValueError of one line for what can't be built.
    """

    kind: str
    build: Callable
    words: Callable
    label: Callable
    settings: type | None = None
    moves: bool = False
    held_in_float32: bool = False
    starts_as_soup: bool = False
    models: Callable = lambda reference: 1
    holds_sft0: Callable = lambda reference: False
    check: Callable = _nothing


@functools.cache
def kinds():
    """Kind -> Reference."""
    return registry.records("salsa.anchors", "REFERENCE")


@functools.cache
def settings():
    """The schema of a reference of any kind, `config.Reference`."""
    return schema.of_kinds("Reference", Settings, kinds())


def needed(reference):
    """The names of the ingredients that a finished run's reference is made from again; sft0 always.

    What has become of a reference that moved is in the folder of its run.
    """
    return weights.used() if kinds()[reference.kind].moves else weights.used(reference.weights)


def build(settings, ingredients, earlier=None):
    """The reference of a training run.

    Args:
        settings: config.PolicySettings.
        ingredients: salsa.rl.reference.Ingredients.
        earlier: the summary of the run that built this reference before, to build the same again without a search.

    Raises UserError when `earlier` has another content than what the ingredients make.
    """
    kind = kinds()[settings.reference.kind]
    reference = kind.build(settings, ingredients, earlier)
    if (reference.moves, len(reference.models)) != (kind.moves, kind.models(settings.reference)):
        raise RuntimeError(f"the reference {kind.kind} moves, or holds models, otherwise than its record says")
    reference.summary = {**reference.summary, "sha256": reference.sha256()}
    if earlier and earlier["sha256"] != reference.summary["sha256"]:
        raise UserError(
            "the reference is not, bit for bit, the one that this run was anchored to: its SFT models, the hardware "
            "or a library have changed; remove the run's folder and run again"
        )
    return reference


def final(folder, settings, ingredients):
    """The reference as it was at the end of the finished training run in `folder`."""
    if kinds()[settings.reference.kind].moves:
        from salsa.rl import models
        from salsa.rl.reference import Reference, described

        model = models.load_policy(folder / "reference", ingredients.device, "auto")  # as it was held
        return Reference([model], described(settings))
    return build(settings, ingredients, runs.manifest_of(folder)["summary"].get("reference"))


def starts_there(settings):
    """Whether the policy starts at its reference, where their KL is 0."""
    same = weights.canonical_weights(settings.start) == weights.canonical_weights(settings.reference.weights)
    return kinds()[settings.reference.kind].starts_as_soup and same
