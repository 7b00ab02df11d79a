"""A regression of effects whose sampling variances are known, with a random effect for each group of effects.

Several effects y are measured in each group (an SFT pair, at two kl_coefs), each with a known variance v from prompts
and responses alone:

    y = X β + u + w + e,    u ~ N(0, τ²) by group,    w ~ N(0, ω²) by effect,    e ~ N(0, v)

This is the multilevel meta-regression of Konstantopoulos (Research Synthesis Methods 2, 2011), which the field fits
with `rma.mv(yi, vi, mods, random = ~ 1 | group/effect)` of metafor (Viechtbauer, Journal of Statistical Software 36,
2010). A mixed model without the v, such as statsmodels' MixedLM, takes prompts' noise for that of training, and where
it sees little spread by chance it is too sure; here the v are a floor. τ² and ω² are estimated by restricted maximum
likelihood, β by generalised least squares at these.

Intervals are t intervals. Degrees of freedom are those of the inner-outer rule (Pinheiro & Bates 2000, section 2.4;
metafor's `dfs="contain"`): a column that is constant in each group is held against the number of groups, any other
against the effects within them, so that two kl_coefs of a pair are not counted as two pairs. In a balanced design
without v this is the exact t test of a split plot. Left out: the uncertainty of τ² and ω² beyond these degrees of
freedom. This module imports no torch.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import linalg, optimize, stats

SMALLEST = 1e-10  # share of the responses' variance, below which V would not be invertible


@dataclass(frozen=True)
class Fit:
    """A fitted regression of N effects in G groups on P columns.

    Attributes:
        names: of the P columns.
        coefficients: β, (P,).
        covariance: of β, (P, P).
        degrees_of_freedom: of each coefficient, (P,).
        between, within: τ² and ω².
        log_likelihood: the restricted one, as metafor gives it.
        effects, groups: N and G.
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    covariance: np.ndarray
    degrees_of_freedom: np.ndarray
    between: float
    within: float
    log_likelihood: float
    effects: int
    groups: int

    def interval(self, name, level=0.95):
        """(β, low, high) of a column, by the t interval; bounds are nan where there is no degree of freedom."""
        return self.combination({name: 1.0}, level)

    def combination(self, weights, level=0.95):
        """(value, low, high) of a sum of coefficients, name -> weight, at the least of their degrees of freedom."""
        row, left = self._row(weights)
        return self._bounds(row, _t_quantile(level, left))

    def line(self, weights, columns, level=0.95):
        """(value, low, high) as `combination` gives them, but right for all values of some columns at once.

        Args:
            columns: names; the interval holds for every weight that these may have (Working & Hotelling 1929;
                Scheffé 1953): a band around a line holds at each of its points together.
        """
        row, left = self._row(weights)
        return self._bounds(row, _scheffe_quantile(level, len(columns), left))

    def _row(self, weights):
        row = np.array([weights.get(name, 0.0) for name in self.names])
        return row, min(self.degrees_of_freedom[row != 0], default=0)

    def _bounds(self, row, quantile):
        value, half = float(row @ self.coefficients), quantile * math.sqrt(row @ self.covariance @ row)
        return value, value - half, value + half


def _t_quantile(level, left):
    return float(stats.t.ppf((1 + level) / 2, left)) if left > 0 else math.nan


def _scheffe_quantile(level, columns, left):
    return math.sqrt(columns * stats.f.ppf(level, columns, left)) if left > 0 else math.nan


def fit(effects, columns, variances, groups):
    """The `Fit` of effects (N,) on columns.

    Args:
        columns: name -> (N,); a column of ones is the intercept.
        variances: (N,) the known sampling variances; 0 where nothing is known of it.
        groups: (N,) the group of each effect, such as the number of its replicate.

    Raises ValueError where there are no more effects than columns, a column is a sum of others, or the columns explain
    every effect and nothing is known of its variance: no interval would come of it.
    """
    y, v = np.asarray(effects, float), np.asarray(variances, float)
    x = np.column_stack([np.asarray(column, float) for column in columns.values()])
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(y) <= x.shape[1] or np.linalg.matrix_rank(x / np.abs(x).max(axis=0).clip(min=1e-300)) < x.shape[1]:
        raise ValueError(f"{len(y)} effects don't determine the coefficients of {', '.join(columns)}")
    between, within = _components(y, x, v, group)
    inverse = np.linalg.inv(_variance(between, within, v, group))
    covariance = np.linalg.inv(x.T @ inverse @ x)
    return Fit(
        names=tuple(columns),
        coefficients=covariance @ (x.T @ inverse @ y),
        covariance=covariance,
        degrees_of_freedom=_degrees_of_freedom(x, group),
        between=between,
        within=within,
        log_likelihood=-_deviance((between, within), y, x, v, group)[0] / 2,
        effects=len(y),
        groups=int(group.max()) + 1,
    )


def _degrees_of_freedom(x, group):
    """Of each column (P,): groups less columns that are constant in groups, or effects within groups less the others.

    Without several effects in any group there is one level, and all columns share its N - P.
    """
    groups, (effects, number) = int(group.max()) + 1, x.shape
    if groups == effects:
        return np.full(number, effects - number)
    constant = np.array([all(np.ptp(column[group == g]) == 0 for g in range(groups)) for column in x.T])
    outer, inner = groups - constant.sum(), effects - groups - (~constant).sum()
    return np.where(constant, outer, inner)


def _variance(between, within, v, group):
    """V = τ² Z Zᵀ + ω² I + diag(v), (N, N)."""
    return between * (group[:, None] == group) + np.diag(within + v)


def _components(y, x, v, group):
    """(τ², ω²) of the highest restricted likelihood; with one effect in each group ω² is a part of τ²."""
    residuals = y - x @ linalg.lstsq(x, y)[0]
    scale = float(residuals @ residuals) / (len(y) - x.shape[1])
    if scale <= SMALLEST**2 * float(y @ y):  # the columns explain all, up to rounding
        if v.min() == 0:
            raise ValueError("the columns explain every effect: nothing says how sure that is")
        return 0.0, 0.0
    y, v = y / math.sqrt(scale), v / scale
    floor = SMALLEST if v.min() < SMALLEST else 0.0
    split = len(np.unique(group)) < len(y)
    # With one effect a group, both components are one diagonal: the floor of ω² is then the whole of it.
    bounds = [(0.0, None), (floor, None) if split else (floor, floor)]
    tried = [
        optimize.minimize(
            _deviance, start, (y, x, v, group), jac=True, method="L-BFGS-B", bounds=bounds,
            options={"ftol": 1e-15, "gtol": 1e-11, "maxiter": 1000},
        )
        for start in ((0.5, 0.5), (0.9, 0.1), (0.1, 0.9), (0.0, floor))
    ]  # fmt: skip
    between, within = min(tried, key=lambda result: result.fun).x
    return float(between) * scale, float(within) * scale


def _deviance(components, y, x, v, group):
    """-2 × the restricted log-likelihood at (τ², ω²), and its gradient (2,).

    With W = V⁻¹ and P = W - W X (Xᵀ W X)⁻¹ Xᵀ W: (N - P) log 2π - log|Xᵀ X| + log|V| + log|Xᵀ W X| + yᵀ P y, whose
    derivative by a component with V' = ∂V is tr(P V') - yᵀ P V' P y.
    """
    variance = _variance(*components, v, group)
    inverse = np.linalg.inv(variance)
    weighted = inverse @ x
    information = x.T @ weighted
    projection = inverse - weighted @ np.linalg.solve(information, weighted.T)
    scaled = projection @ y
    value = (len(y) - x.shape[1]) * math.log(2 * math.pi) - _log_determinant(x.T @ x)
    value += _log_determinant(variance) + _log_determinant(information) + float(y @ scaled)
    same = group[:, None] == group
    between = float((projection * same).sum() - scaled @ same @ scaled)
    within = float(np.trace(projection) - scaled @ scaled)
    return value, np.array([between, within])


def _log_determinant(matrix):
    return float(np.linalg.slogdet(matrix)[1])
