"""Where the noise of a comparison comes from, and what a further hour of computing would buy.

A value y of replicate r (an SFT pair and its reward model), training seed s, prompt p and response j is

    y = mean + prompt_p + replicate_r + seed_rs + (prompt × replicate)_pr + (prompt × seed)_prs + response_prsj,

all but the mean random and independent. The prompts are the same in all replicates; seeds are nested in replicates.
y is a policy's score or, for two arms, the difference of their scores on the same prompt. The variances are estimated
by the method of moments (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4): in a balanced table the
expectation of each mean square is linear in the variances, and these equations are solved. In a balanced table the
solutions are the REML estimates too, where none is negative. Nothing is read from files and nothing is worded here.
"""

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats

FACTORS = ("replicates", "seeds", "prompts", "responses")
COMPONENTS = {  # name -> what varies, in words
    "replicate": "SFT pairs",
    "seed": "training seeds",
    "prompt_replicate": "prompts × SFT pairs",
    "prompt_seed": "prompts × training seeds",
    "response": "responses to a prompt",
    "prompt": "prompts",
}
PART_OF = (  # component, the factor of which it takes two to see it alone, the component that holds it otherwise
    ("response", "responses", "prompt_seed"),
    ("prompt_seed", "prompts", "seed"),
    ("prompt_seed", "seeds", "prompt_replicate"),
    ("prompt_replicate", "prompts", "replicate"),
    ("prompt_replicate", "replicates", "prompt"),
    ("seed", "seeds", "replicate"),
)
UNSEEN = (("replicate", "replicates"), ("prompt", "prompts"))  # component, the factor without two of which none sees it
FINEST_FIRST = ("response", "prompt_seed", "prompt_replicate", "prompt")  # of which each has the noise of those before
DRAWS = 10_000  # of an interval: its bounds move by about one per cent of its width with the generator's seed


@dataclass(frozen=True)
class Design:
    """How much was measured, or would be.

    Attributes:
        replicates: SFT pairs, each with its reward model.
        seeds: training seeds of each arm in a replicate.
        prompts: of all benchmarks together, the same for every policy.
        responses: of a policy to each prompt.
    """

    replicates: int
    seeds: int
    prompts: int
    responses: int


@dataclass(frozen=True)
class MeanSquare:
    """A sum of squares over its degrees of freedom."""

    value: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Component:
    """One variance of the model.

    Attributes:
        name: its key in COMPONENTS.
        holds: the names of all components that this variance is the sum of: what the table can't tell apart.
        variance: the estimate; 0 where the moments give a negative number.
        low, high: its 95 % interval.
        below_zero: whether the moments give a negative number.
    """

    name: str
    holds: tuple[str, ...]
    variance: float
    low: float
    high: float
    below_zero: bool


def design_of(tables):
    """The `Design` of a list of tables (replicates, seeds, prompts, responses), one per benchmark.

    ValueError where they differ in more than prompts, are empty, or hold a number that is not finite.
    """
    shapes = {(table.shape[0], table.shape[1], table.shape[3]) for table in tables}
    if len(shapes) != 1 or not all(table.size and np.isfinite(table).all() for table in tables):
        raise ValueError("the tables of all benchmarks need finite numbers, and the same replicates, seeds, responses")
    ((replicates, seeds, responses),) = shapes
    return Design(replicates, seeds, sum(table.shape[2] for table in tables), responses)


def separable(design):
    """component -> the components that its estimate is the sum of, in a table of this `Design`.

    With one response to a prompt, for instance, `response` can't be told from `prompt_seed`, which then holds both. A
    component that no estimate holds (the replicates', where there is one) is left out.
    """
    holds = {name: {name} for name in COMPONENTS}
    for name, factor, holder in PART_OF:
        if name in holds and getattr(design, factor) == 1:
            holds[holder] |= holds.pop(name)
    for name, factor in UNSEEN:
        if getattr(design, factor) == 1:
            holds.pop(name, None)
    return {name: tuple(part for part in COMPONENTS if part in parts) for name, parts in holds.items()}


def components(tables, level=0.95):
    """name -> `Component` of the mean over benchmarks, as far as the tables tell them apart.

    Args:
        tables: arrays (replicates R, seeds S, prompts P_b, responses J), one per benchmark b.

    Of K benchmarks, `replicate` and `seed` are those of the mean over benchmarks. The other components are weighted
    so that dividing them by the number N of all prompts gives their part of that mean's variance: a component is
    Σ_b N / (K² P_b) · component_b, which is the benchmarks' mean where they have equally many prompts. Where one has a
    single prompt, prompts can't be told apart in it, and each benchmark counts as one value.
    """
    design, squares, factors = _estimators(tables)
    return {name: _component(name, holds, factors[name], squares, level) for name, holds in separable(design).items()}


def shares(tables, level=0.95):
    """component -> (share, low, high) of the variance between replicates of their measured means (`parts`).

    Intervals are generalised ones, as of `interval`: each drawn set of mean squares gives all components, none below 0,
    and their shares. Empty with one replicate; nan where no two replicates differ, or no draw has a variance.

    Args:
        tables: as of `components`.
    """
    design, squares, factors = _estimators(tables)
    names = [name for name in separable(design) if name != "prompt"]
    if "replicate" not in names:
        return {}
    drawn = {
        key: square.value * _chi_square_ratios(square.degrees_of_freedom, place)
        for place, (key, square) in enumerate(squares.items())
    }
    estimated = {key: square.value for key, square in squares.items()}
    share, draws = (_shares(names, design, factors, values) for values in (estimated, drawn))
    draws = {name: values[np.isfinite(values)] for name, values in draws.items()}
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = {name: np.quantile(values, tails) if values.size else (math.nan,) * 2 for name, values in draws.items()}
    return {name: (float(share[name]), *map(float, bounds[name])) for name in names}


def _shares(names, design, factors, values):
    """component -> its share, from mean squares, key -> value, that may be arrays of draws."""
    variances = {name: sum(factor * values[key] for key, factor in factors[name].items()) for name in names}
    of_mean = parts({name: np.maximum(variance, 0.0) for name, variance in variances.items()}, design)
    total = np.asarray(sum(of_mean.values()), float)
    return {name: part / np.where(total > 0, total, math.nan) for name, part in of_mean.items()}


def _estimators(tables):
    """(`Design`, mean squares, component -> their factors) of tables as `components` takes them."""
    if any(table.shape[2] == 1 for table in tables):
        tables = [np.mean([table.mean(axis=2, keepdims=True) for table in tables], axis=0)]
    design, squares = design_of(tables), mean_squares(tables)
    return design, squares, _factors(design, [table.shape[2] for table in tables], squares)


def deviation(tables):
    """The deviation between replicates of their measured means over benchmarks; nan of one replicate.

    It is the root of `replicate_variance` where no component was estimated below 0, and smaller where one was.
    """
    means = np.mean([table.mean(axis=(1, 2, 3)) for table in tables], axis=0)
    return float(means.std(ddof=1)) if len(means) > 1 else math.nan


def mean_squares(tables):
    """(name, benchmark's place or None) -> `MeanSquare`, of those that have degrees of freedom.

    Those of `replicate` and `seed` are of policies' means over benchmarks, with None for the place, and in the scale of
    these means; those of the other components are of single values.
    """
    squares = {}
    policies = np.mean([table.mean(axis=(2, 3)) for table in tables], axis=0)  # (R, S)
    replicates = policies.mean(axis=1, keepdims=True)  # (R, 1)
    squares["replicate", None] = _mean_square(replicates - replicates.mean(), len(replicates) - 1)
    squares["seed", None] = _mean_square(policies - replicates, policies.size - len(replicates))
    for place, table in enumerate(tables):
        squares |= {(name, place): square for name, square in _prompt_squares(table).items()}
    rounding = (1e-12 * max(float(np.abs(table).max()) for table in tables)) ** 2
    squares = {key: square for key, square in squares.items() if square.degrees_of_freedom}
    return {key: square if square.value > rounding else replace(square, value=0.0) for key, square in squares.items()}


def _prompt_squares(table):
    """component -> `MeanSquare` of one benchmark's table (R, S, P, J), with every other factor's mean removed."""
    replicates, seeds, prompts, responses = table.shape
    cells = table.mean(axis=3, keepdims=True)  # (R, S, P, 1)
    pairs = cells.mean(axis=1, keepdims=True)  # (R, 1, P, 1)
    overall = pairs.mean(axis=0, keepdims=True)  # (1, 1, P, 1)

    def centred(values):
        return values - values.mean(axis=2, keepdims=True)

    free = prompts - 1
    return {
        "response": _mean_square(table - cells, cells.size * (responses - 1)),
        "prompt_seed": _mean_square(centred(cells - pairs), free * replicates * (seeds - 1), responses),
        "prompt_replicate": _mean_square(centred(pairs - overall), free * (replicates - 1), responses * seeds),
        "prompt": _mean_square(centred(overall), free, responses * seeds * replicates),
    }


def _mean_square(deviations, degrees_of_freedom, repeated=1):
    """Of deviations that each stand for so many equal ones."""
    return MeanSquare(repeated * float(np.square(deviations).sum()) / max(degrees_of_freedom, 1), degrees_of_freedom)


def _factors(design, prompts, squares):
    """component -> {mean square: its factor}: the estimate of a component is the sum of these products.

    In a single benchmark the expectations are, with J responses, S seeds, R replicates and P prompts,

        E[response] = V_response
        E[prompt_seed] = V_response + J V_prompt_seed
        E[prompt_replicate] = V_response + J V_prompt_seed + J S V_prompt_replicate
        E[prompt] = V_response + J V_prompt_seed + J S V_prompt_replicate + J S R V_prompt

    and, of policies' means, E[seed] = V_seed + E[prompt_seed] / (J P) and E[replicate] = V_replicate + V_seed / S +
    E[prompt_replicate] / (J S P). A mean square without degrees of freedom is left out, and the next finer one stands
    for it.
    """
    counts = (1, design.responses, design.seeds, design.replicates)
    repeated = dict(zip(FINEST_FIRST, np.cumprod(counts).tolist(), strict=True))
    factors = {name: Counter() for name in COMPONENTS}
    factors["seed"]["seed", None] = factors["replicate"]["replicate", None] = 1.0
    for place, count in enumerate(prompts):
        share = 1 / (len(prompts) ** 2 * count)  # of a prompt's variance in that of the mean over benchmarks
        for name in FINEST_FIRST:
            factor = design.prompts * share / repeated[name]
            factors[name][name, place] += factor
            factors[name][_noise(squares, place, name, below=True), place] -= factor
        for name, noisiest in (("seed", "prompt_seed"), ("replicate", "prompt_replicate")):
            factors[name][_noise(squares, place, noisiest), place] -= share / repeated[noisiest]
    if design.seeds > 1:
        for key, factor in factors["seed"].items():
            factors["replicate"][key] -= factor / design.seeds
    return {name: {key: f for key, f in by_square.items() if key in squares} for name, by_square in factors.items()}


def _noise(squares, place, name, below=False):
    """The noisiest mean square that a benchmark has, up to `name` or `below` it; None where it has none."""
    names = FINEST_FIRST[: FINEST_FIRST.index(name) + (not below)]
    return next((noise for noise in reversed(names) if (noise, place) in squares), None)


def _component(name, holds, factors, squares, level):
    terms = [(factor, squares[key]) for key, factor in factors.items()]
    estimate = math.fsum(factor * square.value for factor, square in terms)
    low, high = interval(terms, level)
    return Component(name, holds, max(estimate, 0.0), low, high, below_zero=estimate < 0)


def interval(terms, level=0.95):
    """(low, high): the generalised interval of the expectation of a weighted sum of mean squares, 0 where below it.

    Weerahandi (Journal of the American Statistical Association 88, 1993): each expectation is drawn as its mean square
    times its degrees of freedom over a chi-square of as many, and the bounds are quantiles of the sum. Satterthwaite's
    interval is for sums without subtraction, which most components are not.
    """
    total = np.zeros(DRAWS)
    for place, (factor, square) in enumerate(terms):
        total += factor * square.value * _chi_square_ratios(square.degrees_of_freedom, place)
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    return max(float(low), 0.0), max(float(high), 0.0)


@functools.lru_cache(maxsize=256)
def _chi_square_ratios(freedom, seed):
    """Draws of degrees of freedom over a chi-square of as many, independent for each seed."""
    return freedom / np.random.default_rng([seed, freedom]).chisquare(freedom, DRAWS)


def parts(variances, design):
    """component -> its part of the variance of one replicate's mean under a `Design`, without the prompts' own.

    The replicates have the same prompts, so that the prompts' own variance is no part of what differs between them.

    Args:
        variances: component -> variance; a component may be missing.
    """
    divisors = {
        "replicate": 1,
        "seed": design.seeds,
        "prompt_replicate": design.prompts,
        "prompt_seed": design.prompts * design.seeds,
        "response": design.prompts * design.seeds * design.responses,
    }
    return {name: variances[name] / divisor for name, divisor in divisors.items() if name in variances}


def replicate_variance(variances, design):
    """The variance over replicates of a replicate's mean: what the t interval of a claim is made of."""
    return math.fsum(parts(variances, design).values())


def half_width(variances, design, level=0.95, new_prompts=False):
    """The expected half-width of the t interval over replicates of a mean, with normal noise; inf for one replicate.

    The interval speaks of the prompts that were asked. With `new_prompts` the prompts' own variance is added, as if
    they were drawn anew each time.
    """
    if design.replicates < 2:
        return math.inf
    variance = replicate_variance(variances, design) / design.replicates
    if new_prompts:
        variance += variances.get("prompt", 0.0) / design.prompts
    return _expected_t(design.replicates, level) * math.sqrt(variance)


@functools.cache
def _expected_t(replicates, level):
    """The critical value of t, times c4: the mean of a sample's deviation over the true one, of normal values."""
    freedom = replicates - 1
    c4 = math.sqrt(2 / freedom) * math.exp(special.gammaln((freedom + 1) / 2) - special.gammaln(freedom / 2))
    return float(stats.t.ppf((1 + level) / 2, freedom)) * c4


@dataclass(frozen=True)
class Cost:
    """What a study of some arms costs, in core-minutes.

    Attributes:
        replicate: SFT, reward model and what is measured of them once.
        seed: training and evaluating all arms with one seed.
        before: sft0, sft1 and their soup answering one prompt once, in one replicate.
        response: all arms answering one prompt once, and the judging of it, with one seed.
    """

    replicate: float
    seed: float
    before: float
    response: float

    def of(self, design):
        """The core-minutes of a `Design`."""
        answers = design.prompts * design.responses
        a_seed = self.seed + self.response * answers
        return design.replicates * (self.replicate + self.before * answers + design.seeds * a_seed)

    def fixed(self, answers):
        """The `Cost` where every policy gives so many answers in any case."""
        return Cost(self.replicate + self.before * answers, self.seed + self.response * answers, 0.0, 0.0)


MOST = {"replicates": 200, "seeds": 8, "responses": 8}  # that `best` considers
LEAST_PROMPTS, MOST_PROMPTS = 100, 2000  # of a benchmark


def choices(design, benchmarks):
    """factor -> (least, most) that `best` may choose, where so many benchmarks were measured with this `Design`.

    A factor of which the table has one stays one: what more of it would buy is not known. Prompts are no fewer than
    LEAST_PROMPTS of a benchmark, or as there are, because an interval over replicates speaks of those prompts alone: a
    single one, answered often, could give the narrowest.
    """
    least = {"replicates": 2, "prompts": min(design.prompts, LEAST_PROMPTS * benchmarks)}
    most = MOST | {"prompts": MOST_PROMPTS * benchmarks}
    ranges = dict.fromkeys(FACTORS, (1, 1))
    for name in FACTORS:
        number = getattr(design, name)
        if number > 1:
            ranges[name] = least.get(name, 1), max(most[name], number)
    return ranges


def best(variances, cost, budget, ranges, level=0.95):
    """The `Design` of the least `half_width` within a budget of core-minutes; None: nothing fits.

    Args:
        ranges: factor -> (least, most) that may be chosen. One that the variances don't tell apart has to stay as it
            was measured: both are that number.

    More prompts never widen the interval, so only replicates, seeds and responses are searched, each with as many
    prompts as the budget leaves. Of designs with equal intervals, the cheapest is returned.
    """

    def merit(design):
        return half_width(variances, design, level), cost.of(design)

    return min(_affordable(cost, budget, ranges), key=merit, default=None)


def _affordable(cost, budget, ranges):
    """Yield a design for each number of replicates, seeds and responses, with as many prompts as the budget leaves."""
    axes = [range(ranges[name][0], ranges[name][1] + 1) for name in ("replicates", "seeds", "responses")]
    least, most = ranges["prompts"]
    for replicates, seeds, responses in itertools.product(*axes):
        left = budget / replicates - cost.replicate - seeds * cost.seed
        a_prompt = responses * (cost.before + seeds * cost.response)
        prompts = min(most, math.floor(left / a_prompt + 1e-9)) if a_prompt else most
        if left >= 0 and prompts >= least:
            yield Design(replicates, seeds, prompts, responses)


def an_hour_more(variances, cost, design, ranges, level=0.95):
    """factor -> (`Design` with as much more of this factor alone as an hour of a core buys, its `gain`).

    It is one step at least, though a step may take more than an hour. A factor that is at its most is left out.
    """
    further = {}
    for factor in FACTORS:
        now, most = getattr(design, factor), ranges[factor][1]
        if now < most:
            step = cost.of(replace(design, **{factor: now + 1})) - cost.of(design)
            steps = math.floor(60 / step) if step * (most - now) > 60 else most - now
            more = replace(design, **{factor: now + max(steps, 1)})
            further[factor] = more, gain(variances, cost, design, more, level)
    return further


def gain(variances, cost, design, more, level=0.95):
    """By how much a larger design narrows the half-width; of one that takes more than an hour, an hour's part."""
    widths = [half_width(variances, each, level) for each in (design, more)]
    return (widths[0] - widths[1]) / max(1.0, (cost.of(more) - cost.of(design)) / 60)
