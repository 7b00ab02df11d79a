"""Weights over the SFT models as exact text, and how soups are named by them."""

from fractions import Fraction

SFT0 = ("1",)  # the weights of sft0 alone


def canonical_weights(weights):
    """Weights over the SFT models as fractions in lowest terms, no zeros at the end: 0.50, 0.5, 0 is 1/2, 1/2.

    Raises ValueError for what is no number, ZeroDivisionError for `1/0`.
    """
    fractions = [Fraction(str(weight)) for weight in weights]
    while len(fractions) > 1 and fractions[-1] == 0:
        fractions.pop()
    return tuple(str(weight) for weight in fractions)


def alpha_weights(alpha):
    """The weights of `(1-alpha)*sft0 + alpha*sft1`, canonical."""
    return canonical_weights([1 - Fraction(alpha), Fraction(alpha)])


def used(*lists):
    """The indices of the SFT models with a weight in any of the lists of weights; sft0 always."""
    return sorted({i for weights in lists for i, weight in enumerate(weights) if Fraction(weight)} | {0})


def decimal_text(number):
    """A fraction as the shortest exact decimal, or as a fraction where there is none: 1/4 is "0.25", 1/3 is "1/3"."""
    text = f"{float(Fraction(number)):g}"
    return text if Fraction(text) == Fraction(number) else str(Fraction(number))


def number_label(number):
    """A number as names have it: 0.05, and 1 instead of 1.0."""
    return repr(float(number)).removesuffix(".0")


def weights_label(weights, kind="soup"):
    """A readable name of a soup, a noise, …, to two decimals: sft0, soup0.50, soup0.33_0.33_0.33, noise0.50."""
    fractions = [Fraction(weight) for weight in weights]
    if kind == "soup" and fractions.count(0) == len(fractions) - 1:
        return f"sft{next(i for i, weight in enumerate(fractions) if weight)}"
    labelled = [fractions[1]] if len(fractions) == 2 else fractions
    return kind + "_".join(f"{float(weight):.2f}" for weight in labelled)


def soup_words(weights):
    """The soup as a sum, for tables: sft0, 1/2 sft0 + 1/2 sft1."""
    parts = [f"{weight} sft{i}" for i, weight in enumerate(weights) if Fraction(weight)]
    return " + ".join(parts).removeprefix("1 ")
