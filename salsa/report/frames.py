"""A study as four tidy data frames, from which every table is made: policies, responses, verdicts, trajectories.

What each column means, and its unit, stands in `COLUMNS` (docs/frames.md shows it). A number that was not measured is
nan. Proxy reward is everywhere the reward model's score, without PPO's penalty for a missing end.
"""

import functools
import math
from dataclasses import asdict

import pandas as pd

from salsa.evaluate import flat, statistics
from salsa.report import selection
from salsa.report.selection import number_or_nan

BOUNDS = ("", "_low", "_high")
BEFORE = {0.0: "sft0", 1.0: "sft1", 0.5: "soup"}  # alpha -> the SFT model or soup that is there
MEASURES = ["gold_reward", "reward", "kl_to_sft0", "kl_to_reference", "response_length", "eos_rate"]
GEOMETRY = {
    "from_sft0": ("distance of the weights from sft0's", "Euclidean"),
    "sft0_norm": ("length of sft0's weights", "Euclidean"),
    "from_sft1": ("distance from sft1", "Euclidean"),
    "from_soup": ("distance from the even soup", "Euclidean"),
    "sft0_to_sft1": ("distance of sft1 from sft0", "Euclidean"),
    "cosine_sft1": ("cosine of policy − sft0 and sft1 − sft0", "−1 to 1"),
    "along_sft1": ("place along the way from sft0 (0) to sft1 (1)", "share"),
    "off_line": ("distance from the line through sft0 and sft1", "Euclidean"),
}
STABILITY = {  # field of selection.Steadiness -> column
    "eos_rate": "end_rate_relative",
    "response_length": "length_relative",
    "gold_loss": "gold_loss",
}
ARM = {
    "arm": ("name of the arm", ""),
    "kl_coef": ("weight of the KL penalty", "reward per nat"),
    "replicate": ("number of the replicate: one set of SFT models, and one reward model", ""),
    "seed": ("training seed of the policy, among those of its replicate", ""),
    "name": ("name of the policy in the verdicts, the same in every replicate and seed", ""),
}
MEASURED = {
    "gold_reward": ("mean gold reward", "gold's unit"),
    "reward": ("mean proxy reward", "standard deviations on sft0's responses"),
    "kl_to_sft0": ("KL(policy ‖ sft0)", "nats per response"),
    "kl_to_reference": ("KL(policy ‖ own reference)", "nats per response"),
    "response_length": ("mean length of the responses", "tokens"),
    "eos_rate": ("responses that end by themselves", "share"),
}
FLAT = {  # measure of an iteration's rollouts -> column of its mean over the flat part of training
    "reward": "flat_reward",
    "kl_to_sft0": "flat_kl_to_sft0",
    "kl_to_reference": "flat_kl_to_reference",
    "response_length": "flat_response_length",
    "eos_rate": "flat_eos_rate",
    "gold_reward": "flat_gold",
}
DRIFT = {
    "reward_slope": ("change of the proxy reward over the flat part of training", MEASURED["reward"][1]),
    "reward_slope_se": ("its standard error, allowing for autocorrelation", MEASURED["reward"][1]),
}
COLUMNS = {  # frame -> column -> (meaning, unit)
    "policies": ARM
    | {
        "algorithm": ("what trained the policy", ""),
        "reference": ("kind of reference; none: nothing is penalised", ""),
        "alpha": ("place of the reference on the line from sft0 to sft1; nan: not on it", "share"),
        "iteration": ("iterations of training", "iterations"),
    }
    | {name: (f"{text}, on the development prompts", unit) for name, (text, unit) in MEASURED.items()}
    | {
        "win_rate_vs_sft0": ("adjusted win rate against sft0, the main judge's, over all benchmarks", "share"),
    }
    | {
        column: (f"{MEASURED[name][0]}, on rollouts, mean over the flat part of training", MEASURED[name][1])
        for name, column in FLAT.items()
    }
    | DRIFT
    | GEOMETRY
    | {
        "end_rate_relative": ("eos_rate, by sft0's", "ratio"),
        "length_relative": ("response_length, by sft0's", "ratio"),
        "gold_loss": ("gold of the last kept rollouts below their peak", "gold's unit"),
        "stable": ("is it stable by the configuration's `stability`? None: nothing is known of it", ""),
        "collapse": ("why it counts as collapsed; empty where it does not", ""),
    },
    "responses": {
        "replicate": ARM["replicate"],
        "seed": ("training seed of the policy; 0 for sft0, sft1 and soup, which have none", ""),
        "model": ("a policy's name, or sft0, sft1 or soup", ""),
        "arm": ("name of the policy's arm; empty for sft0, sft1 and soup", ""),
        "kl_coef": ARM["kl_coef"],
        "benchmark": ("name of the benchmark", ""),
        "prompt_id": ("the prompt's id, unique in its benchmark", ""),
        "sample": ("number of the response, of those that the model gave to the prompt", ""),
        "category": ("the prompt's category; empty where it has none", ""),
        "prompt": ("what the user says, one text per turn", ""),
        "responses": ("what the model answers, one text per turn", ""),
        "finish_reasons": ("why each turn's response ends: stop or length", ""),
        "tokens": ("length of the response, all turns", "tokens"),
        "reward": ("proxy reward, mean over turns", "standard deviations on sft0's responses"),
        "gold": ("gold reward, mean over turns", "gold's unit"),
        "scores": ("what the benchmark measures in it by itself: measure → number", ""),
    },
    "verdicts": {
        "judge": ("name of the judge", ""),
        "benchmark": ("name of the benchmark", ""),
        "prompt_id": ("the prompt's id, unique in its benchmark", ""),
        "replicate": ARM["replicate"],
        "seed": ("training seed of the policies that are compared", ""),
        "sample": ("number of the responses that are compared", ""),
        "turn": ("the turn that was judged; nan: all", ""),
        "order": ("0: model_a was shown first; 1: model_b", ""),
        "model_a": ("name of a model", ""),
        "model_b": ("name of the other", ""),
        "winner": ("model_a, model_b, tie or error", ""),
    },
    "trajectories": ARM
    | {
        "iteration": ("number of the iteration; all is measured before its update", ""),
        "kept": ("were the iteration's rollouts kept, so that gold can score them?", ""),
    }
    | {name: (f"{text}, on the iteration's rollouts", unit) for name, (text, unit) in MEASURED.items()},
}
RENAMED = {  # column of metrics.jsonl -> of trajectories, where `reward` and `kl_coef` are what they are in all frames
    "score": "reward",
    "reward": "paid_reward",
    "kl_coef": "current_kl_coef",
}


class Frames:
    """The frames of a `study.Study`, each built when it is first asked for."""

    def __init__(self, study):
        self._study = study

    @functools.cached_property
    def policies(self):
        """One row per policy, by arm and kl_coef in the study's order."""
        rows = [_policy(self._study, policy) for policy in self._study.ordered]
        return pd.DataFrame(rows, columns=list(COLUMNS["policies"]))

    @functools.cached_property
    def soups(self):
        """One row per replicate and alpha: soups of sft0 and sft1 before training; the columns of line.csv."""
        lines = [line | {"replicate": k} for k in self._study.replicates for line in self._study.landscape(k).line]
        columns = ["replicate", "alpha", "loss", *MEASURES]
        return pd.DataFrame(lines, columns=list(dict.fromkeys([*columns, *(name for line in lines for name in line)])))

    @functools.cached_property
    def responses(self):
        """One row for each response to a prompt of a benchmark: of sft0, sft1 and their soup, then each policy's."""
        study, rows = self._study, []
        for replicate in study.replicates:
            for row in study.landscape(replicate).responses:
                rows.append(_response(row, {"replicate": replicate, "seed": 0, "model": row["model"], "arm": ""}))
        for policy in study.ordered:
            for row in policy.responses:
                rows.append(_response(row, _arm(policy) | {"model": policy.name}))
        return pd.DataFrame(rows, columns=list(COLUMNS["responses"])).astype({"reward": float, "gold": float})

    @functools.cached_property
    def verdicts(self):
        """One row per line of verdicts.jsonl, errors included; of several lines on one comparison the last counts."""
        first = {"seed": 0, "sample": 0}  # of a line that says neither
        rows = [first | line for lines in self._study.verdicts.values() for line in lines]
        return pd.DataFrame(rows, columns=list(COLUMNS["verdicts"]))

    @functools.cached_property
    def trajectories(self):
        """One row per policy and iteration, in the configuration's order of policies.

        Beside the columns of `COLUMNS`, all others of metrics.jsonl, but for the names in RENAMED.
        """
        rows = [_iteration(policy, line) for policy in self._study.policies for line in policy.metrics]
        columns = dict.fromkeys([*COLUMNS["trajectories"], *(name for row in rows for name in row)])
        return pd.DataFrame(rows, columns=list(columns))

    def flat_rows(self, policy):
        """The rows of `trajectories` of the flat part of a policy's training."""
        return [_iteration(policy, line) for line in flat.last(policy.metrics, self._study.config.evaluate.flat_share)]


def _arm(policy):
    return {name: getattr(policy, name) for name in ARM}


def _policy(study, policy):
    folder = study.parents.get(f"policy/{policy.index}")
    row = _arm(policy) | {"algorithm": folder.parent.name if folder else "", "alpha": number_or_nan(policy.alpha)}
    row |= {"reference": study.composed.arms[policy.arm].reference.kind if study.penalised(policy.arm) else "none"}
    row |= {"iteration": policy.evaluation.get("iteration")}
    row |= {name: number_or_nan(policy.evaluation.get(name)) for name in MEASURES}
    row |= _flat_part(study.frames.flat_rows(policy))
    row |= {name: number_or_nan(policy.geometry.get(name)) for name in GEOMETRY}
    steadiness = asdict(selection.steadiness(study, policy))
    row |= {column: steadiness[name] for name, column in STABILITY.items()}
    row |= {"stable": selection.stable(study, policy), "collapse": selection.collapse(study, policy)}
    judge = selection.main_judge(study)
    rate = selection.training_win_rate(study, policy, selection.SFT0, judge, study.benchmarks)
    return row | {"win_rate_vs_sft0": rate}


def _flat_part(rows):
    """The columns of FLAT and DRIFT, of the rows of the flat part: gold is the mean over the kept rollouts."""
    means = {}
    for name, column in FLAT.items():
        values = [row[name] for row in rows if row["kept"] or name != "gold_reward"]
        means[column] = sum(values) / len(values) if values else math.nan
    return means | dict(zip(DRIFT, flat.change([row["reward"] for row in rows]), strict=True))


def _response(row, model):
    """A row of responses.jsonl as one of the frame; `model`: the columns that say whose it is."""
    response = {name: row.get(name) for name in COLUMNS["responses"]} | {"kl_coef": math.nan} | model
    return response | {"tokens": sum(row["tokens"]), "scores": row.get("scores", {})}


def _iteration(policy, line):
    row = {RENAMED.get(name, name): value for name, value in line.items()}
    row |= {name: number_or_nan(row.get(name)) for name in MEASURES}
    kept, gold = line["iteration"] in policy.gold, policy.gold.get(line["iteration"], math.nan)
    return row | _arm(policy) | {"kept": kept, "gold_reward": gold}


def identity(study):
    """The columns that tell the tables of two studies apart: model and data."""
    return {"model": study.config.model.name, "data": study.config.data.name}


def interval(name, values):
    """Three columns of a row: mean over replicates, and its 95 % t interval (nan with one replicate)."""
    mean, low, high = statistics.replicate_interval([number_or_nan(value) for value in values])
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def bounded(*names):
    """Columns with their bounds: x, x_low, x_high."""
    return [name + bound for name in names for bound in BOUNDS]


def over_replicates(frame, by, measures):
    """One row per group of equal values `by`, in the frame's order, with `interval` of each measure.

    Columns: by, replicates (their number), and each of `measures` with its bounds. A group has one row per replicate
    and training seed; a replicate's value is the mean over its seeds.
    """
    rows, frame = [], selection.seed_means(frame, by, measures)
    for values, group in frame.groupby(list(by), sort=False, dropna=False):
        row = dict(zip(by, values, strict=True)) | {"replicates": len(group)}
        for name in measures:
            row |= interval(name, group[name])
        rows.append(row)
    return pd.DataFrame(rows, columns=[*by, "replicates", *bounded(*measures)])
