"""How much prompts and responses alone make replicates differ.

Two arms answer the same P prompts in each of R replicates. Let d_rp be candidate minus baseline on prompt p in
replicate r: d_rp = mean + replicate_r + prompt_p + residual_rp. A prompt's own effect is the same in all replicates, so
it makes none differ from another. The residual does: it is the noise of responses, and what a prompt means to one
trained model and not to the next. Its mean over P prompts varies by residual variance / P, and a variance between
replicates below that is luck (`decisions.decide` takes it as a floor). Of a mean over iterations of training, the same
is known from how the iterations differ (`flat.mean_variance`).

Left out: which part of it is sampling and which training (`variance`), which takes several responses to a prompt.
"""

import math

import numpy as np


def residual_variance(table):
    """The mean square of what replicate and prompt effects leave of a table (R, P); nan with fewer than 2 of either.

    It estimates the variance of the residual without bias, with (R − 1)(P − 1) degrees of freedom. Prompts that not
    every replicate has (nan) are left out.
    """
    table = np.asarray(table, dtype=np.float64)
    return float(residual_variances(table).mean()) if len(table) > 1 else math.nan


def residual_variances(table):
    """Likewise of each replicate by itself, (R,), for replicates that were made in different ways.

    Each is free of bias where all replicates have one variance. Of a single replicate nothing says what the prompts'
    own effects are, and they stay in its variance. nan with fewer than two prompts.
    """
    table = np.asarray(table, dtype=np.float64)
    table = table[:, np.isfinite(table).all(axis=0)]
    replicates, prompts = table.shape
    if prompts < 2:
        return np.full(replicates, math.nan)
    residuals, share = table - table.mean(axis=1, keepdims=True), 1.0
    if replicates > 1:
        residuals, share = residuals - residuals.mean(axis=0), 1 - 1 / replicates
    return (residuals**2).sum(axis=1) / (share * (prompts - 1))


def sampling_variance(tables):
    """The variance that prompts and responses alone give to a replicate's mean over several tables; nan: not known.

    Args:
        tables: one (R, P) table for each benchmark, whose prompts are others; the outcome is the mean of their means.
    """
    variances = [residual_variance(table) / np.isfinite(table).sum(axis=1).mean() for table in tables]
    return sum(variances) / len(variances) ** 2 if variances else math.nan
