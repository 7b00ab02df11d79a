#!/usr/bin/env python3
"""How often the intervals that are reported contain the truth, by simulation where the truth is known.

    python benchmarks/coverage.py --studies 4000 --seed 0

prints one table of percentages. A prompt has an effect of its own, normal; a verdict is the
sign of mean + prompt's effect + noise, a tie where that is small; the noise of a prompt's two orders is correlated, up
to orders that always agree. Beside the intervals that we report stand those that we don't: resampling battles, which
takes the orders of a prompt for independent, and a prompt bootstrap that is taken to speak of other training seeds.

Left out: judges that prefer a place, and noise that is not normal.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))

from salsa.evaluate import statistics

TIE = 0.3  # a verdict nearer to 0 than this is a tie, in standard deviations of its noise
PROMPT_SPREAD = 1.0  # of the prompts' effects
REPLICATE_SPREAD = 0.5  # of the replicates' means


def verdicts(mean, effects, correlation, generator):
    """Both orders' values, 1, 0.5 or 0, (..., N, 2): `mean` broadcasts against prompts' effects (..., N).

    The noise of the orders is normal with variance 1 and this correlation; 1: the orders always agree.
    """
    noise = generator.normal(size=(*effects.shape, 2))
    noise[..., 1] = correlation * noise[..., 0] + math.sqrt(1 - correlation**2) * noise[..., 1]
    latent = np.asarray(mean)[..., None] + effects[..., None] + noise
    return (1 + np.sign(latent) * (np.abs(latent) > TIE)) / 2


def expected(mean, variance):
    """The win rate whose verdicts have this mean and variance before they are cut into win, tie and loss."""
    spread = np.sqrt(variance)
    return (stats.norm.cdf((mean - TIE) / spread) + stats.norm.cdf((mean + TIE) / spread)) / 2


def prompt_coverage(prompts, correlation, mean, studies, seed, resamples=1000):
    """How often the bootstrap interval contains the win rate over all prompts there could be.

    Returns the shares of studies where prompts are resampled, and where battles are.
    """
    generator, truth = np.random.default_rng(seed), expected(mean, 1 + PROMPT_SPREAD**2)
    covered = np.zeros(2)
    for study in range(studies):
        values = verdicts(mean, generator.normal(0, PROMPT_SPREAD, prompts), correlation, generator)
        intervals = (statistics.bootstrap_interval(s, study, resamples) for s in (values.mean(axis=1), values.ravel()))
        covered += [low <= truth <= high for low, high in intervals]
    return covered / studies


def replicate_coverage(replicates, mean, studies, seed, prompts=80, resamples=1000):
    """How often an interval contains the win rate over all replicates, on the study's prompts, which they share.

    Replicates have normal means of their own. Returns the shares of studies where the interval is the t interval of
    the replicates' win rates, and where the prompts' mean scores are resampled as if that spoke of other replicates.
    """
    generator, covered = np.random.default_rng(seed), np.zeros(2)
    for study in range(studies):
        effects = generator.normal(0, PROMPT_SPREAD, prompts)
        truth = expected(mean + effects, 1 + REPLICATE_SPREAD**2).mean()
        means = generator.normal(mean, REPLICATE_SPREAD, (replicates, 1))
        scores = verdicts(means, np.tile(effects, (replicates, 1)), 0.5, generator).mean(axis=2)  # (R, N)
        _, *interval = statistics.replicate_interval(scores.mean(axis=1))
        intervals = (interval, statistics.bootstrap_interval(scores.mean(axis=0), study, resamples))
        covered += [low <= truth <= high for low, high in intervals]
    return covered / studies


def table(studies, seed):
    """Rows (units, orders' correlation, true win rate, coverage as reported, coverage otherwise)."""
    for mean in (0.0, 1.5):
        rate = float(expected(mean, 1 + PROMPT_SPREAD**2))
        for prompts in (80, 200, 500):
            for correlation in (0.0, 0.5, 1.0):
                yield (
                    f"{prompts} prompts",
                    correlation,
                    rate,
                    *prompt_coverage(prompts, correlation, mean, studies, seed),
                )
        for replicates in (3, 5, 10):
            yield f"{replicates} replicates", 0.5, rate, *replicate_coverage(replicates, mean, studies, seed)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=4000, help="simulated studies a row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    error = 100 * math.sqrt(0.95 * 0.05 / arguments.studies)
    print(f"Coverage of 95 % intervals, in %; Monte-Carlo standard error {error:.1f}. Of prompts, as reported: prompts")
    print("resampled, otherwise: battles. Of replicates, as reported: t interval, otherwise: prompts resampled.\n")
    print("| of | orders' correlation | true win rate | as reported | otherwise |\n|---|---|---|---|---|")
    for units, correlation, rate, reported, otherwise in table(arguments.studies, arguments.seed):
        cells = f"{units} | {correlation:g} | {rate:.2f} | {100 * reported:.1f} | {100 * otherwise:.1f}"
        print(f"| {cells} |", flush=True)


if __name__ == "__main__":
    main()
