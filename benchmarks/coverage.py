#!/usr/bin/env python3
"""How often the intervals that are reported contain the truth, by simulation where the truth is known.

    python benchmarks/coverage.py --part prompts --studies 2000 --seed 0
    python benchmarks/coverage.py --part looks --studies 100000 --seed 0
    python benchmarks/coverage.py --part claims --studies 20000 --seed 0
    python benchmarks/coverage.py --part floor --studies 100000 --seed 0

prints one table of percentages.

**prompts**: intervals of win rates. A prompt has an effect of its own, normal; a verdict is the sign of mean + prompt's
effect + noise, a tie where that is small; the noise of a prompt's two orders is correlated, up to orders that always
agree. Beside the intervals that we report stand those that we don't: resampling battles, which takes the orders of a
prompt for independent, and a prompt bootstrap that is taken to speak of other training seeds.

**looks**: four rules of when a study of one claim and up to 48 replicates is looked at, and with which critical value.
A study stops at the first look whose interval decides, as `decisions.verdict` says, with δ of half a deviation; its
differences are normal, or skewed (a centred exponential distribution, of skewness 2).

**claims**: a whole study, by the rule in force. Every two of its six claims have a correlation of 0.5, intervals have
the level 1 − 0.05/6, a claim's interval at a look is what those of all looks until then have in common, and the study
stops at the first look at which all claims are decided. Beside it stands the same study that never stops.

**floor**: what known sampling variance under the deviation does to coverage and verdicts (`decisions.decide`).

Left out: judges that prefer a place, and noise of verdicts that is not normal.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))

from salsa.evaluate import sequential, statistics

TIE = 0.3  # a verdict nearer to 0 than this is a tie, in standard deviations of its noise
PROMPT_SPREAD = 1.0  # of the prompts' effects
REPLICATE_SPREAD = 0.5  # of the replicates' means
LOOKS = (8, 16, 24, 32, 40, 48)
DELTA = 0.5  # the smallest effect that would matter, in deviations between replicates
CLAIMS, CORRELATION = 6, 0.5  # claims of a study, and the correlation of every two of them
EFFECTS = {  # of a study's claims, in deviations between replicates
    "0": (0.0,) * CLAIMS,
    "δ/2": (DELTA / 2,) * CLAIMS,
    "δ": (DELTA,) * CLAIMS,
    "2δ": (2 * DELTA,) * CLAIMS,
    "0 and 2δ, three each": (0.0,) * 3 + (2 * DELTA,) * 3,
}
CHUNK = 10_000  # studies simulated at a time
DRAWS = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "skewed": lambda generator, shape: generator.exponential(size=shape) - 1,
}


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


def prompts_table(studies, seed):
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


def rules(level=0.95):
    """name -> (numbers of replicates (K,) after which a study is looked at, the critical value (K,) of each)."""
    every, any_number = np.arange(LOOKS[0], LOOKS[-1] + 1), np.arange(3, LOOKS[-1] + 1)

    def quantiles(numbers):
        return stats.t.isf((1 - level) / 2, numbers - 1)

    return {
        "t after every replicate from the 8th": (every, quantiles(every)),
        "t after 48 replicates": (every[-1:], quantiles(every[-1:])),
        "repeated intervals at 8, 16, …, 48": (np.array(LOOKS), np.array(sequential.critical_values(LOOKS, level))),
        "mixture-t after every replicate": (
            any_number,
            np.array([sequential.mixture_t_critical(int(n), level, DELTA) for n in any_number]),
        ),
    }


def intervals(differences, numbers, critical):
    """Bounds, (K, S) each, of the mean of the first n of the differences (S, R), for each n of the numbers (K,)."""
    sums, squares = (np.cumsum(values, axis=1)[:, numbers - 1].T for values in (differences, differences**2))
    numbers = numbers[:, None]
    means = sums / numbers
    deviations = np.sqrt(np.maximum(squares - sums * means, 0) / (numbers - 1))
    halves = critical[:, None] * deviations / np.sqrt(numbers)
    return means - halves, means + halves


def wrong(low, high, effect, smallest_effect):
    """Whether intervals say what is not so: that the mean is above 0, below 0, or below the smallest effect."""
    return ((low > 0) & (effect <= 0)) | ((high < 0) & (effect >= 0)) | ((high < smallest_effect) & (effect >= DELTA))


def looked_at(differences, effect, numbers, critical):
    """Of studies that stop at the first look that decides: sums of wrong verdicts, verdicts, covered, replicates.

    Covered means twice: by the interval at which the study stops, and by those of all looks there could be.
    """
    low, high = intervals(differences + effect, numbers, critical)
    decided = (low > 0) | (high < DELTA)
    stop = np.where(decided.any(axis=0), decided.argmax(axis=0), len(numbers) - 1)
    at_stop = (stop, np.arange(len(stop)))
    covered = (low <= effect) & (effect <= high)
    return np.array(
        [
            wrong(low[at_stop], high[at_stop], effect, DELTA).sum(),
            decided[at_stop].sum(),
            covered[at_stop].sum(),
            covered.all(axis=0).sum(),
            numbers[stop].sum(),
        ]
    )


def looks_table(studies, seed):
    """Rows (differences, rule, then the five numbers of `looked_at` a study, (3,) each: for effects 0, δ/2 and δ)."""
    for name, draw in DRAWS.items():
        for rule, (numbers, critical) in rules().items():
            generator, sums = np.random.default_rng(seed), np.zeros((3, 5))
            for start in range(0, studies, CHUNK):
                differences = draw(generator, (min(CHUNK, studies - start), LOOKS[-1]))
                sums += [looked_at(differences, effect, numbers, critical) for effect in (0, DELTA / 2, DELTA)]
            yield name, rule, *(sums / studies).T


def correlated(draw, generator, studies):
    """Differences (CLAIMS, studies, R) of mean 0 and variance 1, of which every two claims have CORRELATION."""
    shared, own = (draw(generator, (count, studies, LOOKS[-1])) for count in (1, CLAIMS))
    return math.sqrt(CORRELATION) * shared + math.sqrt(1 - CORRELATION) * own


def study_intervals(differences):
    """Bounds (K, CLAIMS, S) of a study's claims at each look, each inside those of the looks before; nan: none left."""
    critical = np.array(sequential.critical_values(LOOKS, 1 - 0.05 / len(differences)))
    by_claim = [intervals(values, np.array(LOOKS), critical) for values in differences]
    low = np.maximum.accumulate(np.stack([low for low, _ in by_claim], axis=1))
    high = np.minimum.accumulate(np.stack([high for _, high in by_claim], axis=1))
    apart = low > high
    return np.where(apart, np.nan, low), np.where(apart, np.nan, high)


def stopped(low, high, stops):
    """Which look (S,) a study ends at: the first at which all its claims are decided, or the last."""
    decided = ((low > 0) | (high < DELTA)).all(axis=1)
    return np.where(stops & decided.any(axis=0), decided.argmax(axis=0), len(LOOKS) - 1)


def whole_studies(differences, effects, stops):
    """Of studies with these effects (CLAIMS,): sums over studies of what `claims_table` has, seven numbers."""
    low, high = study_intervals(differences + effects[:, None, None])
    stop = stopped(low, high, stops)
    low, high = (bounds[stop, :, np.arange(len(stop))] for bounds in (low, high))  # (S, CLAIMS)
    mistaken = wrong(low, high, effects, DELTA)
    covered = (low <= effects) & (effects <= high)
    return np.array(
        [
            mistaken.any(axis=1).sum(),
            mistaken.mean(axis=1).sum(),
            covered.all(axis=1).sum(),
            (low > 0).mean(axis=1).sum(),
            (high < DELTA).mean(axis=1).sum(),
            np.isnan(low).mean(axis=1).sum(),
            np.array(LOOKS)[stop].sum(),
        ]
    )


def claims_table(studies, seed):
    """Rows (differences, effects, whether studies stop, then seven numbers).

    They are the share of studies with a wrong verdict; of claims with one; of studies whose intervals hold all their
    means; of claims above 0, below δ, and without an interval, because those of looks have nothing in common; and the
    mean number of replicates.
    """
    for name, draw in DRAWS.items():
        for words, effects in EFFECTS.items():
            for stops in (True, False):
                generator, sums, chunk = np.random.default_rng(seed), np.zeros(7), CHUNK // CLAIMS
                for start in range(0, studies, chunk):
                    differences = correlated(draw, generator, min(chunk, studies - start))
                    sums += whole_studies(differences, np.array(effects), stops)
                yield name, words, stops, *(sums / studies)


def floor_table(studies, seed):
    """Rows (replicates, sampling's share of the deviation, covered and wrong, plain and with the floor; wider).

    Wrong verdicts are over studies whose effect is δ; wider is the mean width with the floor over the plain one.
    """
    for replicates in (3, 5, 8, 16):
        critical = float(stats.t.ppf(0.975, replicates - 1))
        values = np.random.default_rng(seed).normal(DELTA, size=(studies, replicates))
        means, plain = values.mean(axis=1), values.std(axis=1, ddof=1)
        for share in (0.0, 0.5, 0.8, 1.0):
            floored = np.maximum(plain, share)
            rates = (_covered_and_wrong(means, critical * used / math.sqrt(replicates)) for used in (plain, floored))
            yield replicates, share, *itertools.chain(*rates), floored.mean() / plain.mean() - 1


def _covered_and_wrong(means, halves):
    low, high = means - halves, means + halves
    return ((low <= DELTA) & (high >= DELTA)).mean(), wrong(low, high, DELTA, DELTA).mean()


def print_prompts(studies, seed):
    error = 100 * math.sqrt(0.95 * 0.05 / studies)
    print(f"Coverage of 95 % intervals, in %; Monte-Carlo standard error {error:.1f}. Of prompts, as reported: prompts")
    print("resampled, otherwise: battles. Of replicates, as reported: t interval, otherwise: prompts resampled.\n")
    print("| of | orders' correlation | true win rate | as reported | otherwise |\n|---|---|---|---|---|")
    for units, correlation, rate, reported, otherwise in prompts_table(studies, seed):
        cells = f"{units} | {correlation:g} | {rate:.2f} | {100 * reported:.1f} | {100 * otherwise:.1f}"
        print(f"| {cells} |", flush=True)


def print_looks(studies, seed):
    print("Three numbers in a cell: for effects of 0, δ/2 and δ. Shares are in %.\n")
    heads = ("wrong verdict", "decided", "covered at the stop", "covered at every look", "replicates")
    print(f"| differences | rule | {' | '.join(heads)} |\n|---|---|---|---|---|---|---|")
    for name, rule, *shares, replicates in looks_table(studies, seed):
        cells = [name, rule, *(_three(100 * share) for share in shares), _three(replicates)]
        print(f"| {' | '.join(cells)} |", flush=True)


def _three(values):
    return " / ".join(f"{value:.1f}" for value in values)


def print_claims(studies, seed):
    print(f"Shares are in %, of studies, or of their {CLAIMS} claims.\n")
    heads = ("a wrong verdict", "wrong claims", "all covered", "above 0", "below δ", "no interval", "replicates")
    print(f"| differences | effects | study | {' | '.join(heads)} |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, effects, stops, *shares, replicates in claims_table(studies, seed):
        cells = [name, effects, "stops" if stops else "goes on", *(f"{100 * share:.1f}" for share in shares)]
        print(f"| {' | '.join(cells)} | {replicates:.1f} |", flush=True)


def print_floor(studies, seed):
    heads = ("covered, plain", "wrong, plain", "covered, floor", "wrong, floor", "wider by")
    print(f"| replicates | sampling's share of the deviation | {' | '.join(heads)} |\n|---|---|---|---|---|---|---|")
    for replicates, share, *shares in floor_table(studies, seed):
        cells = [str(replicates), f"{share:g}", *(f"{100 * value:.1f}" for value in shares)]
        print(f"| {' | '.join(cells)} |", flush=True)


PARTS = {"prompts": print_prompts, "looks": print_looks, "claims": print_claims, "floor": print_floor}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, default="prompts", help="which table")
    parser.add_argument("--studies", type=int, default=4000, help="simulated studies a row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    PARTS[arguments.part](arguments.studies, arguments.seed)


if __name__ == "__main__":
    main()
