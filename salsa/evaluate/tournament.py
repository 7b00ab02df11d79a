"""Many models on one scale, from pairwise verdicts: Bradley–Terry scores, and Arena-Hard's own win rates.

`bradley_terry` is this project's; `arena_hard` computes what Arena-Hard v0.1 publishes, to compare with its tables.
Left out: the win rate of one pair (`salsa.evaluate.statistics`).
"""

import math
from collections import Counter, defaultdict

import numpy as np
from scipy import special
from scipy.sparse import coo_array, csgraph

from salsa.evaluate import statistics
from salsa.workflow.messages import UserError

RIDGE = 0.01
GRADES = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}  # A's score, its count
CHUNK = 4_000_000  # about how many numbers a fit holds at a time


def bradley_terry(verdicts, anchor, seed=0, resamples=1000, level=0.95):
    """Scores of all models in the verdicts of one judge, by maximum likelihood with ties.

    Davidson's model (Journal of the American Statistical Association 65, 1970): of two models with scores sᵢ and sⱼ,
    the first wins, the second wins or neither does with odds e^sᵢ : e^sⱼ : ν·e^((sᵢ+sⱼ)/2), one ν for all pairs. A
    prompt counts once for each pair judged on it, whatever the number of its orders, turns, samples and trainings.

    A weak prior keeps the score of a model that never lost, or never won, finite: a ridge of `RIDGE`/2 · s² on every
    score, about the scores' mean, and on log ν. Such a score and its interval say only that they are far from 0.

    Args:
        verdicts: lines of one judge, see salsa.evaluate.statistics.
        anchor: the model whose score is 0.

    Returns model -> {"score", "low", "high"}, best first: the natural log-odds of a win over the anchor when there is
    no tie, and its percentile interval by resampling prompts, (benchmark, prompt_id), over all pairs at once,
    conditional on these models. One prompt or too few resamples have no interval, and models that no chain of
    comparisons joins to the anchor have no score: nan.

    Raises UserError where the anchor has no verdict.
    """
    models, pairs, shares = _shares(verdicts)
    if anchor not in models:
        raise UserError(f"anchor {anchor!r} has no verdict; the models are: {', '.join(models) or 'none'}")
    design, place = _design(pairs, len(models)), models.index(anchor)
    counts = shares.reshape(len(shares), -1)  # (N, P·3)
    score = _relative(_fit(counts.sum(axis=0)[None], design), place)[0]
    generator, samples = np.random.default_rng(seed), []
    rows = max(1, CHUNK // max(len(shares), design.size))
    for start in range(0, resamples, rows):
        weights = generator.multinomial(len(shares), [1 / len(shares)] * len(shares), min(rows, resamples - start))
        samples.append(_relative(_fit(weights @ counts, design), place))
    bounds = np.quantile(np.concatenate(samples), [(1 - level) / 2, (1 + level) / 2], axis=0)
    if len(shares) < 2 or resamples < statistics.FEWEST_RESAMPLES:
        bounds[:] = math.nan
    values = np.stack([score, *bounds], axis=1)
    values[~_joined(pairs, len(models), place)] = math.nan
    table = {
        model: dict(zip(("score", "low", "high"), row, strict=True))
        for model, row in zip(models, values.tolist(), strict=True)
    }
    return dict(sorted(table.items(), key=lambda item: (math.isnan(item[1]["score"]), -item[1]["score"])))


def _shares(verdicts):
    """Models, pairs of their indices (P, 2), and each prompt's shares of (win, loss, tie) for each pair (N, P, 3).

    The shares are those of the first model of the pair; all three are 0 where the prompt has no verdict on the pair.
    """
    outcomes = defaultdict(list)
    for (first, second, benchmark, prompt_id, *_), verdict in statistics.latest(verdicts).items():
        if verdict["winner"] != "error":
            models = tuple(sorted((first, second)))
            winner = verdict.get(verdict["winner"])  # None for a tie
            outcomes[models, (benchmark, prompt_id)].append(models.index(winner) if winner in models else 2)
    models = sorted({model for pair, _ in outcomes for model in pair})
    pairs = sorted({pair for pair, _ in outcomes})
    prompts = sorted({prompt for _, prompt in outcomes}, key=str)  # so that the lines' order changes nothing
    pair_index, prompt_index = ({key: i for i, key in enumerate(keys)} for keys in (pairs, prompts))
    shares = np.zeros((len(prompts), len(pairs), 3))
    for (pair, prompt), places in outcomes.items():
        shares[prompt_index[prompt], pair_index[pair]] = np.bincount(places, minlength=3) / len(places)
    return models, np.array([[models.index(model) for model in pair] for pair in pairs]).reshape(-1, 2), shares


def _design(pairs, models):
    """(P, 3, K+1): the log-odds of each pair's outcomes as linear functions of K scores and log ν."""
    design = np.zeros((len(pairs), 3, models + 1))
    rows = np.arange(len(pairs))
    for side in (0, 1):
        design[rows, side, pairs[:, side]] = 1
        design[rows, 2, pairs[:, side]] = 0.5
    design[:, 2, -1] = 1
    return design


def _fit(counts, design):
    """Scores and log ν (R, K+1) that maximise the penalised likelihood of R samples of counts (R, P·3)."""
    counts = counts.reshape(len(counts), *design.shape[:2])
    totals = counts.sum(axis=2)  # (R, P)
    parameters = np.zeros((len(counts), design.shape[2]))
    flat = design.reshape(-1, design.shape[2])  # (P·3, K+1)
    squares = np.einsum("nd,ne->nde", flat, flat).reshape(len(flat), -1)
    for _ in range(200):
        chances = special.softmax(np.einsum("pod,rd->rpo", design, parameters), axis=2)
        gradient = np.einsum("rpo,pod->rd", counts - totals[..., None] * chances, design) - RIDGE * parameters
        means = np.einsum("rpo,pod->rpd", chances, design)
        weighted = (totals[..., None] * chances).reshape(len(counts), -1)
        curvature = (weighted @ squares).reshape(len(counts), flat.shape[1], flat.shape[1])
        curvature -= np.einsum("rp,rpd,rpe->rde", totals, means, means, optimize=True)
        curvature += RIDGE * np.eye(design.shape[2])
        steps = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # Near separation a full step overshoots, so no step is longer than 1.
        steps /= np.maximum(1, np.abs(steps).max(axis=1, keepdims=True))
        parameters = parameters + steps
        if np.abs(steps).max() < 1e-10:
            break
    return parameters


def _relative(parameters, anchor):
    return parameters[:, :-1] - parameters[:, anchor, None]


def _joined(pairs, models, anchor):
    """Which of the models (K,) a chain of comparisons joins to the anchor."""
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(models, models))
    _, component = csgraph.connected_components(graph, directed=False)
    return component == component[anchor]


def arena_hard(games, baseline, seed=0, resamples=100):
    """Arena-Hard v0.1's leaderboard (Li et al. 2024, 2406.11939) from its games, as its show_result computes it.

    Each game of a model against the baseline is a battle, a decisive one (A>>B, B>>A) three; a tie is half a win and
    half a loss. The score is the win rate against the baseline that a Bradley–Terry fit of all battles predicts. Every
    battle has the baseline on one side, so each model's mean over its battles solves that fit, and is what is computed.
    The interval resamples **battles** over all models, and the three of a decisive game independently. It is theirs,
    for comparison with their tables, and too narrow, because the two games of a prompt, and the three copies of one,
    are no independent evidence. For an interval to rely on, see `bradley_terry` or
    salsa.evaluate.statistics.bootstrap_interval.

    Args:
        games: dictionaries with "model", "grade" (one of `GRADES`; games with another are left out, as by theirs) and
            "order": 1 where the baseline was shown first (as A), 0 where the model was.
        baseline: the opponent of the model in every game.

    Returns model -> {"score", "low", "high", "battles"}, best first: win rates × 100, 95 % bounds, and the number of
    battles; the baseline has 50 by definition.
    """
    battles = Counter()
    for game in games:
        if game["grade"] in GRADES:
            score, copies = GRADES[game["grade"]]
            battles[game["model"], 1 - score if game["order"] else score] += copies
    total, table = battles.total(), {baseline: {"score": 50.0, "low": 50.0, "high": 50.0, "battles": 0}}
    kinds, counts = list(battles), np.array(list(battles.values()), dtype=np.float64)
    # As many battles are drawn with replacement as there are; only how many of each kind come up matters.
    samples = np.random.default_rng(seed).multinomial(total, counts / total, resamples) if total else None
    for model in {model: None for model, _ in kinds}:
        fought = np.array([kind[0] == model for kind in kinds])
        scores = np.array([score for name, score in kinds if name == model])
        with np.errstate(invalid="ignore"):  # a model that no battle of a sample names
            rates = samples[:, fought] @ scores / samples[:, fought].sum(axis=1)
        low, high = (100 * np.nanquantile(rates, [0.025, 0.975])).tolist()
        rate = float(counts[fought] @ scores / counts[fought].sum())
        table[model] = {"score": 100 * rate, "low": low, "high": high, "battles": int(counts[fought].sum())}
    return dict(sorted(table.items(), key=lambda item: -item[1]["score"]))
