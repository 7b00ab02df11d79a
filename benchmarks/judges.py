#!/usr/bin/env python3
"""How often an effect is wrongly excluded or supported by a judge that partly ignores the answers.

    python benchmarks/judges.py --studies 2000 --seed 0

prints one table of percentages. A study has 3 replicates of 200 prompts, each judged in both orders; the candidate is
truly better on 60 % or on 50 % of them, and 3 points would matter. In each order by itself the judge ignores the
answers with some chance, and then names the first place, or throws dice. Beside what `salsa.report.claims` says stands
what the t interval alone would say, which takes the judge's win rate for the true one.

Left out: ties, errors, and agreement with gold, by which more judges are left out of claims.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from salsa.evaluate import decisions, statistics

SMALLEST_EFFECT = 0.03
NO_EFFECT = "none that matters"  # too small, excluded or reversed
VERDICTS = (decisions.SUPPORTED, NO_EFFECT, decisions.UNDECIDED, decisions.NOT_TESTED)


def judged(better, ignoring, places, generator):
    """Whether the candidate is named, (R, N, 2): shown first, then second; `better` (R, N) is whether it should be."""
    ignored = generator.random((*better.shape, 2)) < ignoring
    dice = generator.random((*better.shape, 2)) < 0.5
    blind = np.broadcast_to([True, False], ignored.shape) if places else dice
    return np.where(ignored, blind, better[..., None])


def place_counts(named):
    """(N, 3): pairs of a prompt's two orders that name one model, the first place twice, the second place twice."""
    shown_first, shown_second = named[..., 0], named[..., 1]
    kinds = (shown_first == shown_second, shown_first & ~shown_second, ~shown_first & shown_second)
    return np.stack([kind.sum(axis=0) for kind in kinds], axis=1)


def verdicts(rate, ignoring, places, generator, replicates=3, prompts=200, resamples=400):
    """(what the interval alone says, what is reported) of one simulated study."""
    named = judged(generator.random((replicates, prompts)) < rate, ignoring, places, generator)
    effects = named.mean(axis=(1, 2)) - 0.5
    alone = verdict(effects, SMALLEST_EFFECT)
    seen = statistics.discrimination(place_counts(named), resamples=resamples)[1]
    if seen <= 0 or seen / 2 < SMALLEST_EFFECT:
        return alone, decisions.NOT_TESTED
    return alone, verdict(effects, SMALLEST_EFFECT * seen)


def verdict(effects, smallest_effect):
    """The verdict of `decisions.decide`, with one word for those that deny an effect that would matter."""
    word = decisions.decide(effects, smallest_effect).verdict
    return NO_EFFECT if word in (decisions.TOO_SMALL, decisions.EXCLUDED, decisions.REVERSED) else word


def rates(rate, ignoring, places, studies, seed):
    """Shares of the verdicts over simulated studies, as two dictionaries: of the interval alone, and as reported."""
    generator = np.random.default_rng(seed)
    pairs = [verdicts(rate, ignoring, places, generator) for _ in range(studies)]
    counts = [Counter(verdicts_) for verdicts_ in zip(*pairs, strict=True)]
    return [{name: count[name] / studies for name in VERDICTS} for count in counts]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    heads = ("truly better on", "the judge", "ignores", "interval alone: supported", NO_EFFECT)
    print("| " + " | ".join([*heads, "reported: supported", *VERDICTS[1:]]) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rate in (0.6, 0.5):
        for places in (True, False):
            for ignoring in (0.0, 0.5, 0.8, 0.95, 1.0):
                alone, reported = rates(rate, ignoring, places, arguments.studies, arguments.seed)
                cells = [f"{rate:.0%}", "names the first place" if places else "throws dice", f"{ignoring:.0%}"]
                shown = [alone[decisions.SUPPORTED], alone[NO_EFFECT], *(reported[name] for name in VERDICTS)]
                print("| " + " | ".join([*cells, *(f"{100 * share:.1f}" for share in shown)]) + " |")


if __name__ == "__main__":
    main()
