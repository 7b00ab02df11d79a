"""How models become one beside the weight average: one file per kind of mix, with a record of what there is to know.

A mix is made as a model folder, by the stage `mix` or by `salsa soup --method`, and is then a model like any other. The
weight average itself needs no file here: it is made in memory wherever weights over models stand (salsa.soup). This
module imports no torch: `make` does so when it is called.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated

from pydantic import model_validator

from salsa.workflow import bounds, registry, schema

Role = Annotated[str, schema.Text(200, empty=False)]
"""What names a model among those that a mix is made from."""


def _nothing(*_):
    return None


@schema.dataclass()
class Settings(schema.Kind):
    """A mix of models that is made before it is used, and stored: the settings that every kind has."""

    kind: str = "slerp"
    """How the models are mixed."""
    weights: Annotated[
        dict[Role, Annotated[str, schema.Range(0, 1, in_text=True)]], schema.Items(100), schema.Sum()
    ] = field(default_factory=dict)
    """Name of a model -> its weight, a decimal or a fraction, or their sum as text; they sum to 1."""

    @model_validator(mode="after")
    def _can_be_made(self):
        total = sum(map(Fraction, self.weights.values()))
        if abs(total - 1) > Fraction(1, 10**6):
            raise wrong_weights(f"they sum to {float(total):g}, not 1; mend them")
        kinds()[self.kind].check(self)
        return self


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A kind of mix. Its functions take a `config.Mix`.

    Attributes:
        make: (mix, role -> model folder, the folder to write, held_out) -> (summary, name of a file -> JSON value).
            `held_out(measure)` is a function: role -> weight of some of the models -> the measure of their average on
            held-out data, None where it is not finite. It imports torch when it is called.
        words: what the mix is, in words.
        settings: a schema of its own settings, or None.
        origin: mix -> the role that it is made from beside those with weights, or "".
        by_name: mix -> whether it depends on the order of its models, which is then that of their names.
        searches: whether it calls `held_out`, for which its run has the parent `prepare`, a seed and lengths.
        needs_gold: mix -> whether what it measures is gold, which not every world has.
        writes: the names of the files that it adds to the model.
        check: mix -> None. `schema.fault` of one line for what can't be made.
    """

    kind: str
    make: Callable
    words: Callable
    settings: type | None = None
    origin: Callable = lambda mix: ""
    by_name: Callable = lambda mix: False
    searches: bool = False
    needs_gold: Callable = lambda mix: False
    writes: tuple = ()
    check: Callable = _nothing


def wrong_weights(text):
    """The error of a mix's validator about its weights, to be raised."""
    return schema.fault(text, "weights", shows=False)


@functools.cache
def kinds():
    """Kind -> Mix."""
    return registry.records(__name__, "MIX")


@functools.cache
def settings():
    """The schema of a mix of any kind, `config.Mix`."""
    return schema.of_kinds("Mix", Settings, kinds())


def roles(mix):
    """The roles of the models that a mix is made from: those with a weight, then its origin."""
    origin = kinds()[mix.kind].origin(mix)
    return [*weights_of(mix), *([origin] if origin else [])]


def weights_of(mix):
    """Role -> weight (Fraction) of the models that take part in a mix, by name; a weight of 0 adds nothing.

    They have the order of their names, because a SLERP of three depends on their order, and a run's address does not.
    """
    weights = {role: bounds.fraction(mix.weights[role]) for role in sorted(mix.weights)}
    return {role: weight for role, weight in weights.items() if weight}


def sum_words(mix):
    """The models of a mix with their weights: 1/2 sft0 + 1/2 sft1."""
    return " + ".join(f"{weight} {role}" for role, weight in weights_of(mix).items()).removeprefix("1 ")
