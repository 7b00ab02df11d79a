"""Weights over ingredients as exact text, and how mixes are named by them.

Weights are written as a list, over sft0, sft1, … in their order, as a mapping of ingredients' names, or as tables show
them (1/2 sft0 + 1/2 policy:salsa). Code knows them as pairs (`canonical_weights`); `written` gives the form that stands
in settings, where a mix of SFT models that differ in their seed alone is a list.
"""

import re
from fractions import Fraction

SFT0 = (("sft0", "1"),)  # sft0 alone
SEED = re.compile(r"sft(0|[1-9]\d*)")  # the name of an SFT model that differs from sft0 in its seed alone
INGREDIENT = re.compile(r"(sft|ingredient)\d+")  # the role of an ingredient among a run's parents
POLICY = "policy:"  # begins the name of an arm's trained policy as an ingredient


def named(weights):
    """Ingredient -> its weight as text, of weights in any form."""
    if isinstance(weights, dict):
        return {name: str(weight) for name, weight in weights.items()}
    pairs = (weight if isinstance(weight, tuple) else (f"sft{i}", weight) for i, weight in enumerate(weights))
    return {name: str(weight) for name, weight in pairs}


class NamedTwice(ValueError):
    """An ingredient that a mix names twice; its text is the name."""


def of_text(text):
    """The mapping of a mix as `soup_words` writes it. ValueError where it is none; NamedTwice is one, too."""
    weights = {}
    for part in re.split(r"\s+\+\s+", text.strip()):
        *weight, name = part.split()
        if len(weight) > 1:
            raise ValueError(part)
        if name in weights:
            raise NamedTwice(name)
        weights[name] = weight[0] if weight else "1"
    return weights


def _place(name):
    """What sorts ingredients: SFT models by their number, then all others by name."""
    seed = SEED.fullmatch(name)
    return (0, int(seed[1]), "") if seed else (1, 0, name)


def canonical_weights(weights):
    """Pairs of an ingredient and its weight, a fraction in lowest terms, sorted; those of weight 0 are left out.

    Raises ValueError for what is no number, ZeroDivisionError for `1/0`.
    """
    fractions = {name: Fraction(str(weight)) for name, weight in named(weights).items()}
    return tuple((name, str(fractions[name])) for name in sorted(fractions, key=_place) if fractions[name])


def written(weights):
    """Weights as settings hold them: a list where all ingredients are sft0, sft1, …; otherwise a mapping."""
    weights = dict(canonical_weights(weights))
    if not all(map(SEED.fullmatch, weights)):
        return weights
    count = 1 + max((int(SEED.fullmatch(name)[1]) for name in weights), default=0)
    return [weights.get(f"sft{i}", "0") for i in range(count)]


def renamed(weights, names):
    """Canonical weights with the ingredients' names exchanged by the mapping `names`."""
    sums = {}
    for name, weight in canonical_weights(weights):  # two names may be of one model
        sums[names[name]] = sums.get(names[name], 0) + Fraction(weight)
    return canonical_weights(sums)


def alpha_weights(alpha):
    """The weights of `(1-alpha)*sft0 + alpha*sft1`, canonical."""
    return canonical_weights([1 - Fraction(alpha), Fraction(alpha)])


def ingredients(*mixes):
    """The names of the ingredients that have a weight in any of the mixes, sorted."""
    return sorted({name for weights in mixes for name, _ in canonical_weights(weights)}, key=_place)


def used(*mixes):
    """As `ingredients`, of a run's mixes: sft0 always, from which KL is measured."""
    return ingredients(SFT0, *mixes)


def weight_of(name, weights):
    """The weight of an ingredient, a Fraction."""
    return Fraction(dict(canonical_weights(weights)).get(name, 0))


def is_sft0(weights):
    """Whether a mix is sft0 itself."""
    return canonical_weights(weights) == SFT0


def decimal_text(number):
    """A fraction as the shortest exact decimal, or as a fraction where there is none: 1/4 is "0.25", 1/3 is "1/3"."""
    text = f"{float(Fraction(number)):g}"
    return text if Fraction(text) == Fraction(number) else str(Fraction(number))


def number_label(number):
    """A number as names have it: 0.05, and 1 instead of 1.0."""
    return repr(float(number)).removesuffix(".0")


def weights_label(weights, kind="soup"):
    """A readable name of a soup, a noise, …, to two decimals: sft0, soup0.50, soup0.33_0.33_0.33, noise0.50.

    With other ingredients than SFT models of several seeds they are named: soup0.50sft0_0.50policy.salsa.
    """
    weights = canonical_weights(weights)
    if kind == "soup" and len(weights) == 1:
        return weights[0][0].replace(":", ".")
    positional = written(weights)
    if isinstance(positional, dict):
        return kind + "_".join(f"{float(Fraction(weight)):.2f}{name}" for name, weight in weights).replace(":", ".")
    fractions = [Fraction(weight) for weight in positional]
    labelled = [fractions[1]] if len(fractions) == 2 else fractions
    return kind + "_".join(f"{float(weight):.2f}" for weight in labelled)


def soup_words(weights):
    """The mix as a sum, for tables: sft0, 1/2 sft0 + 1/2 sft1."""
    return " + ".join(f"{weight} {name}" for name, weight in canonical_weights(weights)).removeprefix("1 ")
