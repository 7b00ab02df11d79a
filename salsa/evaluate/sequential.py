"""Intervals that stay valid when a study is looked at before it ends: repeated t intervals, and a mixture-t sequence.

**Repeated confidence intervals** (Jennison and Turnbull, Journal of the Royal Statistical Society B 51, 1989): at
planned looks, after n₁ < … < n_K replicates, the interval is mean ± c_k · s/√n_k. The critical values c_k are such that
with the probability `level` *all* K intervals hold the true mean, so that a study may stop at any look, for any reason.
The error is spent as Lan and DeMets (Biometrika 70, 1983) approximate O'Brien and Fleming:

    α*(t) = 2 − 2Φ(z_{α/2} / √t),        t = n/n_K,
    P(|T_1| < c_1, …, |T_{k−1}| < c_{k−1}, |T_k| ≥ c_k) = α*(t_k) − α*(t_{k−1}),

where T_k is the t statistic of the first n_k values. (Tables often spend the error of each side so, by itself:
2·(2 − 2Φ(z_{α/4}/√t)), which is a little stricter at first.) Nothing is simulated. For normal values of mean 0 the
direction of the vector of values is independent of its length, and each T is a function of the direction alone. So
T_1, T_2, … is a Markov chain, and the probability above is a sequence of one-dimensional integrals, as Armitage,
McPherson and Rowe (Journal of the Royal Statistical Society A 132, 1969) compute it for a known deviation.

**Mixture-t confidence sequence** (`mixture_t_interval`): valid after every replicate, without any plan, and wider.

Left out: looks at times that depend on what was seen, and stopping early for another reason than the interval (which
leaves the intervals valid, but wastes the error that later looks would have spent).
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from salsa.evaluate import statistics

CELLS = 40  # in which the chain's states before a look are counted, and twice as many, to extrapolate from both
NODES = 16  # of the integral over how much of the scatter is in the new values, where these are four or more
FIRST_LOOK, LAST_LOOK = 2, 1000  # replicates: fewer have no deviation, with more the nodes' weights overflow
LEAST = 1e-30  # error that each look may spend at least, where α* is too small for a quantile


@dataclass(frozen=True)
class Look:
    """One look of a plan.

    Attributes:
        looks: after how many replicates the study is looked at, ascending; 2 to 1000 each.
        place: which of them this is, counted from 0.
    """

    looks: tuple
    place: int

    def __post_init__(self):
        object.__setattr__(self, "looks", checked(self.looks))
        if not 0 <= self.place < len(self.looks):
            raise ValueError(f"place {self.place}: there are {len(self.looks)} looks, counted from 0")

    @property
    def replicates(self):
        """After how many replicates this look is taken."""
        return self.looks[self.place]

    def critical(self, level=0.95):
        """The critical value of this look."""
        return critical_values(self.looks, level)[self.place]


def latest(looks, replicates):
    """The last look that so many replicates reach, or None before the first."""
    looks = checked(looks)
    reached = sum(look <= replicates for look in looks)
    return Look(looks, reached - 1) if reached else None


def checked(looks):
    """The looks as a tuple of whole numbers; ValueError where they are no plan."""
    looks = tuple(looks)
    ascending = all(first < second for first, second in itertools.pairwise(looks))
    if not looks or not ascending or any(look not in range(FIRST_LOOK, LAST_LOOK + 1) for look in looks):
        raise ValueError(
            f"looks {list(looks)}: give ascending whole numbers of replicates between {FIRST_LOOK} and {LAST_LOOK}"
        )
    return tuple(int(look) for look in looks)


def spent(share, alpha=0.05):
    """α*(t): the two-sided error that is spent once this share t of the largest number of replicates is there."""
    return 2 * stats.norm.sf(stats.norm.isf(alpha / 2) / np.sqrt(share))


def critical_values(looks, level=0.95):
    """The critical values of the looks, one each, for the absolute t statistic.

    Their error is below 0.02 % where looks are at least five replicates apart, and below 0.2 % where they are nearer
    (levels up to 99.6 %, against many more cells and nodes). That of a single look is a quantile of t.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level}: give a share between 0 and 1, such as 0.95")
    coarse, fine = (np.array(_critical_values(checked(looks), float(level), cells)) for cells in (CELLS, 2 * CELLS))
    return tuple((fine + (fine - coarse) / 3).tolist())  # the error of cells falls with the square of their width


@functools.lru_cache(maxsize=256)
def _critical_values(looks, level, cells):
    cumulative = spent(np.array(looks) / looks[-1], 1 - level)
    cumulative = np.maximum(cumulative, LEAST * np.arange(1, len(looks) + 1))
    values = [float(stats.t.isf(cumulative[0] / 2, looks[0] - 1))]
    states, masses = _first_states(looks[0], values[0], _count(cells, looks, 0))
    for place in range(1, len(looks)):
        before, after = looks[place - 1 : place + 1]
        values.append(_critical(cumulative[place - 1 : place + 1], before, after, states, masses))
        if place < len(looks) - 1:
            edges, middles = _cells(after, values[-1], _count(cells, looks, place))
            masses = -np.diff(masses @ _exceeds(states, edges, before, after))
            states = middles
    return tuple(values)


def _count(cells, looks, place):
    """How many cells before the step from a look to the next: more for a step of one value, which leaves kinks."""
    return 4 * cells if looks[place : place + 2] == (looks[place], looks[place] + 1) else cells


def _critical(cumulative, before, after, states, masses):
    """The t at which the probability of passing it now, and not before, is what this look may spend.

    It lies between two quantiles of the t distribution: passing now, whatever happened before, is likelier than passing
    now and not before, and is part of passing by now.
    """
    spend = cumulative[1] - cumulative[0]
    low, high = stats.t.isf([cumulative[1] / 2, spend / 2], after - 1)

    def excess(t):
        passing = masses @ _exceeds(states, np.array([t]), before, after)
        return math.log(max(passing[0], spend * LEAST) / spend)

    if excess(high) >= 0:  # not having passed before changes nothing that can be told from rounding
        return float(high)
    return float(optimize.brentq(excess, low, high, xtol=1e-9, rtol=1e-9)) if excess(low) > 0 else float(low)


def _cells(replicates, critical, cells):
    """Edges (C+1,) and middles (C,) of cells of |T| between 0 and the critical value.

    They are equally wide for the normal score of T, so that they are narrow where T is likely.
    """
    freedom = replicates - 1
    scores = np.linspace(0, stats.norm.isf(stats.t.sf(critical, freedom)), 2 * cells + 1)
    values = stats.t.isf(stats.norm.sf(scores), freedom)
    return values[::2], values[1::2]


def _first_states(replicates, critical, cells):
    """States (C,) of |T| at the first look, and the probability (C,) of each."""
    edges, states = _cells(replicates, critical, cells)
    return states, -np.diff(2 * stats.t.sf(edges, replicates - 1))


def _exceeds(states, edges, before, after):
    """P(|T_after| ≥ edge | T_before = state), (S, E), for states (S,) and edges (E,) of at least 0.

    Of unit vectors: let u = Σx/(√n·|x|) after n values, so that T = √(n − 1)·u/√(1 − u²); let b be the sum of the m new
    values over √m, a standard normal, Q the scatter of the new values around their mean, χ²(m − 1), and
    L² = |x_before|², χ²(n). With ρ = L²/(L² + Q), which is Beta(n/2, (m − 1)/2), and β = b/√(L² + Q), which is
    independent of ρ and t-distributed with n + m − 1 degrees of freedom but for its scale,

        u_after = (√f·u·√ρ + √(1 − f)·β) / √(1 + β²),        f = n/(n + m).

    With β = tan ψ this exceeds w where A·sin(ψ + ψ₀) > w, which is an interval of ψ.
    """
    share = before / after
    u, w = (t / np.sqrt(n - 1 + t**2) for t, n in ((states, before), (edges, after)))
    rho, weights = _beta_nodes(before / 2, (after - before - 1) / 2)
    along = math.sqrt(share) * u[:, None] * np.sqrt(rho)  # (S, N)
    size, turn = np.hypot(along, math.sqrt(1 - share)), np.arctan2(along, math.sqrt(1 - share))
    ratio = np.minimum(w[:, None, None] / size, 1.0)  # (E, S, N)
    rise = np.arcsin(ratio)
    above = _between(rise - turn, math.pi - rise - turn, after - 1)
    below = _between(rise + turn, math.pi - rise + turn, after - 1)
    return ((above + below) @ weights).T


def _between(low, high, freedom):
    """P(low < ψ < high) where √freedom·tan ψ has the t distribution, -π/2 < ψ < π/2."""
    tails = []
    for angle in (low, high):
        inside = np.clip(angle, -math.pi / 2, math.pi / 2)
        tails.append(special.stdtr(freedom, -math.sqrt(freedom) * np.tan(inside)))
    return tails[0] - tails[1]


def _beta_nodes(first, second):
    """Nodes (N,) and weights (N,) of the mean over a Beta(first, second) variable; it is 1 where second is 0."""
    if second == 0:
        return np.ones(1), np.ones(1)
    count = NODES if second > 1 else 4 * NODES  # two or three new values leave kinks in what is integrated
    places, weights = special.roots_jacobi(count, second - 1, first - 1)
    return (1 + places) / 2, weights / weights.sum()


def mixture_t_interval(values, level=0.95, scale=1.0):
    """(low, high) of the mixture-t confidence sequence after these values (R,), one paired difference a replicate.

    It is mean ± `mixture_t_critical` · s/√R. Values that are not finite are left out. Where fewer than two are left, or
    all are equal, there is no deviation, and the interval is (-inf, inf).
    """
    values = statistics.finite(values)
    critical = mixture_t_critical(max(values.size, 1), level, scale)
    if not varies(values) or critical == math.inf:
        return -math.inf, math.inf
    mean, half = float(values.mean()), critical * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean - half, mean + half


def mixture_t_critical(replicates, level=0.95, scale=1.0):
    """The largest |t| of so many values that the mixture-t confidence sequence does not deny.

    Of all the intervals after 1, 2, 3, … values, all hold the true mean with at least the probability `level`, where
    the values are normal; so the study may be looked at after each replicate, and stop whenever it likes. This is the
    Gaussian mixture of Wang and Ramdas (2310.03722, theorem 4.9), after Lai's flat one (Annals of Statistics 4, 1976).
    If mean/deviation has the prior N(0, scale²), the Bayes factor against the mean 0 after n values is

        (1/√r) · ((1 + t²/(n − 1)) / (1 + t²/((n − 1)·r)))^(n/2),        r = 1 + n·scale²,  t = √n·mean/s.

    For the mean 0 and any deviation it is a martingale of mean 1, which ever reaches 1/α with a probability of at most
    α = 1 − level (Ville). With k = (r/α²)^(1/n), it is below 1/α for t² < (n − 1)·r·(k − 1)/(r − k), or for every t
    where k ≥ r, as with the first few values: then the result is math.inf.

    Args:
        scale: how large an effect is expected, in deviations of the values. Any is valid; at 95 % the interval is
            narrowest after about 10/scale² replicates.
    """
    if not 0 < level < 1 or not 0 < scale < math.inf or replicates < 1:
        raise ValueError(f"level {level}, scale {scale}, {replicates} replicates: give a share, and positive numbers")
    ratio = 1 + replicates * scale**2
    threshold = (ratio / (1 - level) ** 2) ** (1 / replicates)
    if threshold >= ratio:
        return math.inf
    return math.sqrt((replicates - 1) * ratio * (threshold - 1) / (ratio - threshold))


def varies(values):
    """Whether finite values (R,) differ by more than rounding, so that they have a deviation."""
    return values.size > 1 and float(np.ptp(values)) > statistics.SAME * max(1.0, float(np.abs(values).max()))
