"""The tables of a study as data frames; `formats` writes them.

Bounds are columns of their own (`<name>_low`, `<name>_high`: 95 %, over replicates, except in win_rates and
bradley_terry). Intervals come from `evaluate.statistics`. Proxy reward is everywhere the reward model's score, without
PPO's penalty for a missing end.
"""

import itertools
import math
from collections import defaultdict

import numpy as np
import pandas as pd

from salsa import anchors
from salsa.evaluate import statistics, tournament
from salsa.report import judging, selection
from salsa.report.frames import BEFORE, BOUNDS, GEOMETRY, MEASURES, STABILITY, bounded, interval, over_replicates
from salsa.report.selection import number_or_nan as value
from salsa.report.selection import sft0_responses
from salsa.workflow import policies
from salsa.workflow.weights import soup_words

WIN_RATES = [
    "model",
    "data",
    "benchmark",
    "judge",
    "candidate",
    "baseline",
    "kl_coef",
    "adjusted_win_rate",
    "ci_low",
    "ci_high",
    "prompts",
    "replicates",
    "length_controlled",
    "length_controlled_low",
    "length_controlled_high",
    "wins",
    "ties",
    "losses",
    "swap_consistency",
    "sign_test_p",
    "holm_p",
]
FRONTIER = [
    "model",
    "data",
    "arm",
    "kl_coef",
    "replicate",
    "iteration",
    "kl_to_reference",
    "kl_to_sft0",
    "reward",
    "gold_reward",
    "response_length",
    "eos_rate",
]
SCHEDULES = {
    "fixed": "fixed",
    "linear": "falls linearly to {0:g} × kl_coef",
    "adaptive": "adapts to a KL of {0:g} nats, over {1:g} responses",
}
RUNS = [
    "stage",
    "folder",
    "address",
    "replicate",
    "arm",
    "kl_coef",
    "seed",
    "wall_seconds",
    "peak_memory_mib",
    "git_commit",
    "started",
    "settings",
]


SOURCES = [
    "judge",
    "candidate",
    "baseline",
    "kl_coef",
    "replicate",
    "verdicts",
    "candidate_model",
    "baseline_model",
]
JUDGES = [
    "judge",
    "benchmark",
    "verdicts",
    "errors",
    "ties",
    "swap_consistency",
    "first_position_share",
    "gold_comparisons",
    "gold_agreement",
    "gold_kappa",
    "swap_consistency_low",
    "swap_consistency_high",
    "first_position_share_low",
    "first_position_share_high",
    "discrimination",
    "discrimination_low",
    "discrimination_high",
    "gold_kappa_low",
    "gold_kappa_high",
    "cannot_measure",
]
KEY = ["name", "replicate"]  # of a policy, in every frame
CHOSEN = [
    "candidate",
    "baseline",
    "grid",
    "candidate_kl_coef",
    "baseline_kl_coef",
    "by",
    "candidate_value",
    "baseline_value",
]
PLANE = [
    "kind",
    "w_sft0",
    "w_sft1",
    "w_policy",
    "reward",
    "reward_se",
    "gold_reward",
    "gold_reward_se",
    "kl_from_sft0",
    "response_length",
    "eos_rate",
]
PREFERENCES = [
    "model",
    "data",
    "benchmark",
    "judge",
    "arm",
    "alpha",
    "kl_coef",
    "ppo_kl_coef",
    *bounded("arm_vs_ppo", "arm_vs_sft0", "ppo_vs_sft0"),
    "how",
    "replicates",
]


def _identity(study):
    return {"model": study.config.model.name, "data": study.config.data.name}


def arms(study):
    """One row an arm: where the policy starts, what its penalty is measured from, and how strong that is."""
    rows, described = [], {name: arm.description for name, arm in study.config.arms.items()}
    for spec, (names, _) in policies.specs(study.composed).items():
        first = next(name for name in study.arms if name in names)  # the configuration of a plan is sorted by name
        row = {
            "start": soup_words(spec.start),
            "reference": anchors.kinds()[spec.kind].words(spec.reference),
            "kl_scale": spec.kl_scale,
            "kl_schedule": SCHEDULES[spec.kl_schedule[0]].format(*spec.kl_schedule[1:]),
        }
        rows.append({"arm": first} | row | {"description": described.get(first, "on the line from sft0 to sft1")})
        same = f"the same as {first}, and shown under that name"
        rows += [{"arm": name} | row | {"description": same} for name in names if name != first]
    order = {arm: place for place, arm in enumerate(study.arms)}
    return pd.DataFrame(sorted(rows, key=lambda row: order.get(row["arm"], len(order))))


def win_rates(study):
    """One row a benchmark x judge x candidate arm x baseline x kl_coef; bounds: bootstrap over prompts.

    holm_p corrects the sign tests over all rows of one baseline: the plain anchor, or sft0.
    """
    report, lengths, rows = study.config.report, response_lengths(study), []
    for arm in study.arms:
        for kl_coef in selection.grid(study, arm):
            policy = study.of(arm=arm, kl_coef=kl_coef)[0]
            for baseline, name in policy.baselines.items():
                for judge, benchmark in judged(study):
                    lines = study.lines(judge, benchmark, policy.name, name)
                    found = statistics.compare(lines, policy.name, name, report.seed, report.bootstrap)
                    if found["prompts"]:
                        row = {"benchmark": benchmark, "judge": judge, "candidate": arm, "baseline": baseline}
                        row |= {"kl_coef": kl_coef, "replicates": len({line["replicate"] for line in lines})}
                        row |= length_controlled(study, judge, benchmark, policy.name, name, lengths)
                        rows.append(_identity(study) | row | found)
    frame = pd.DataFrame(rows, columns=WIN_RATES)
    for baseline in frame["baseline"].unique():
        own = frame["baseline"] == baseline
        frame.loc[own, "holm_p"] = statistics.holm(frame.loc[own, "sign_test_p"])
    return frame


def response_lengths(study):
    """(replicate, model's name in verdicts) -> (benchmark, prompt's id) -> tokens of its answers, all turns."""
    found = defaultdict(dict)
    columns = ["replicate", "model", "benchmark", "prompt_id", "tokens"]
    for replicate, model, benchmark, prompt, tokens in study.frames.responses[columns].itertuples(index=False):
        found[replicate, model][benchmark, prompt] = tokens
    return found


def length_controlled(study, judge, benchmark, candidate, baseline, lengths):
    """The length-controlled win rate of a pair and its bounds, as columns; a prompt's numbers are replicates' means."""
    pairs = {}
    for replicate, scores in study.scores(judge, benchmark, candidate, baseline).items():
        ours, theirs = lengths[replicate, candidate], lengths[replicate, baseline]
        for prompt, score in scores.items():
            longer = ours[benchmark, prompt] - theirs[benchmark, prompt]
            pairs.setdefault(prompt, []).append((score, longer))
    scores, differences = np.array([np.mean(found, axis=0) for found in pairs.values()]).reshape(-1, 2).T
    report = study.config.report
    few = min(report.bootstrap, statistics.FEWEST_RESAMPLES)
    resamples = max(few, report.bootstrap // 4)  # each is a fit
    low, high = statistics.length_controlled_interval(scores, differences, report.seed, resamples)
    rate = statistics.length_controlled(scores, differences)
    return {"length_controlled": rate, "length_controlled_low": low, "length_controlled_high": high}


def sources(study):
    """Where verdicts lie: one row a judge x pair x replicate, `verdicts` a file below the results folder.

    `python -m salsa.evaluate.statistics FILE --candidate CANDIDATE_MODEL --baseline BASELINE_MODEL` counts them again.
    """
    arms_of = {policy.name: policy.arm for policy in study.policies}
    pairs = sorted({(judge, first, second) for judge, _, first, second in study.verdicts})
    rows = []
    for policy in study.policies:
        for judge, first, second in pairs:
            role = f"judge/{judge}/{policy.index}"
            if first == policy.name and role in study.parents:
                folder = study.parents[role]
                row = {"judge": judge, "candidate": policy.arm, "baseline": arms_of.get(second, second)}
                row |= {"kl_coef": policy.kl_coef, "replicate": policy.replicate}
                row |= {"verdicts": f"{folder.parent.name}/{folder.name}/verdicts.jsonl"}
                rows.append(row | {"candidate_model": first, "baseline_model": second})
    return pd.DataFrame(rows, columns=SOURCES)


def judges(study):
    """One row a judge x benchmark, and `all`: what its verdicts say of it, and how far they agree with gold's.

    `cannot_measure` says why no claim is read from a judge's verdicts there; it is empty where they can be.
    """
    rows = []
    for judge in judging.asked(study):
        for benchmark in judging.lines_of(study, judge):
            found = judging.quality(study, judge, benchmark)
            rows.append({"judge": judge, "benchmark": benchmark} | found.row | {"cannot_measure": found.reason})
    return pd.DataFrame(rows, columns=JUDGES)


def judge_pairs(study):
    """One row a pair of judges x benchmark, and `all`: agreement and Cohen's kappa on what both judged."""
    rows = []
    for first, second in itertools.combinations(judging.asked(study), 2):
        others = judging.lines_of(study, second)
        for benchmark, lines in judging.lines_of(study, first).items():
            found = statistics.agreement(lines + others.get(benchmark, []), first, second)
            rows.append({"judge": first, "other_judge": second, "benchmark": benchmark} | found)
    return pd.DataFrame(rows, columns=["judge", "other_judge", "benchmark", "comparisons", "agreement", "kappa"])


def bradley_terry(study):
    """One row a judge x model, best first: its score on one scale, sft0's being 0; bounds: bootstrap over prompts.

    All verdicts of a judge together, those on every benchmark and of every replicate.
    """
    report, rows = study.config.report, []
    named = {policy.name: (policy.arm, policy.kl_coef) for policy in study.policies}
    for judge in judging.asked(study):
        lines = judging.lines_of(study, judge)[judging.ALL]
        models = {line[side] for line in lines if line["winner"] != "error" for side in ("model_a", "model_b")}
        if not models:
            continue
        anchor = selection.SFT0 if selection.SFT0 in models else min(models)
        for model, found in tournament.bradley_terry(lines, anchor, report.seed, report.bootstrap).items():
            arm, kl_coef = named.get(model, (model, math.nan))
            label = model if kl_coef != kl_coef else f"{arm}, kl_coef {kl_coef:g}"
            row = {"judge": judge, "model": label, "score": found["score"]}
            row |= {"score_low": found["low"], "score_high": found["high"]}
            rows.append(row | {"arm": arm, "kl_coef": kl_coef})
    return pd.DataFrame(rows, columns=["judge", "model", *bounded("score"), "arm", "kl_coef"])


def judged(study):
    """The (judge, benchmark) pairs that have verdicts, in the configuration's order."""
    present = {key[:2] for key in study.verdicts}
    return [(judge, name) for judge in study.config.judges for name in study.benchmarks if (judge, name) in present]


def frontier(study):
    """Trajectory rows at the iterations whose rollouts were kept, then the final policy on evaluation prompts."""
    policies, rows = study.frames.policies.set_index(KEY), study.frames.trajectories
    rows = rows.join(policies["iteration"].rename("last"), on=KEY)
    rows = rows[rows["kept"] & (rows["iteration"] < rows["last"])]
    listed = []
    for policy in study.policies:
        key = policy.name, policy.replicate
        listed += [rows[(rows["name"] == key[0]) & (rows["replicate"] == key[1])], policies.loc[[key]].reset_index()]
    frame = pd.concat(listed)
    return frame.assign(**_identity(study))[FRONTIER].reset_index(drop=True)


def final(frontier_frame):
    """The rows of final policies: the last iteration of each (arm, kl_coef, replicate)."""
    keys = ["arm", "kl_coef", "replicate"]
    return frontier_frame[frontier_frame["iteration"] == frontier_frame.groupby(keys)["iteration"].transform("max")]


def rewards(study):
    """Mean and t interval over replicates, of the SFT models and the soup, then of every arm at every kl_coef."""
    soups = study.frames.soups
    models = [
        soups[np.isclose(soups["alpha"], alpha, rtol=0, atol=1e-6)].assign(arm=arm) for alpha, arm in BEFORE.items()
    ]
    rows = pd.concat([*models, study.frames.policies])
    return over_replicates(rows, ["arm", "kl_coef"], MEASURES)


def line_rows(study, alpha):
    """The row of line.csv at one alpha, of each replicate that has it."""
    rows = [line for k in study.replicates for line in study.landscape(k).line]
    return [line for line in rows if math.isclose(line["alpha"], alpha, abs_tol=1e-6)]


def alpha_curve(study):
    """By alpha: SFT soups before PPO; after it, policies from sft0 with the soup of that alpha as reference.

    loss is the validation loss of an SFT soup, nats a token.
    """
    policies = study.frames.policies.dropna(subset="alpha").assign(kind="policy")
    order = {kl_coef: place for place, kl_coef in enumerate(study.kl_coefs)}
    policies = policies.sort_values("alpha").sort_values("kl_coef", key=lambda column: column.map(order), kind="stable")
    rows = pd.concat([study.frames.soups.sort_values("alpha").assign(kind="sft_soup"), policies])
    measures = ("reward", "gold_reward", "win_rate_vs_sft0", "loss")
    return over_replicates(rows, ["kind", "alpha", "kl_coef"], measures)


def chosen(study):
    """One row a pair of arms that is compared: every arm and plain PPO, and the pairs of the study's claims.

    The grid, the kl_coef chosen for each, and what it has on the development prompts (`by`).
    """
    plain = study.plain
    pairs = dict.fromkeys((arm, plain) for arm in study.arms if plain is not None and arm != plain)
    for claim in study.config.claims.values():
        pairs[selection.arm_of(study, claim.candidate), selection.arm_of(study, claim.baseline)] = None
    rows = []
    for candidate, baseline in pairs:
        found = selection.pair(study, candidate, baseline) if candidate and baseline else None
        if found and candidate != baseline:
            row = {"candidate": candidate, "baseline": baseline, "grid": ", ".join(f"{x:g}" for x in found.grid)}
            row |= {"candidate_kl_coef": found.candidate_kl_coef, "baseline_kl_coef": found.baseline_kl_coef}
            row |= {"by": selection.measured_by(study)}
            for role, arm, kl_coef in (
                ("candidate", candidate, found.candidate_kl_coef),
                ("baseline", baseline, found.baseline_kl_coef),
            ):
                row[f"{role}_value"] = selection.development(study, arm, kl_coef)
            rows.append(row)
    return pd.DataFrame(rows, columns=CHOSEN)


def matched_kl(study):
    """One row an arm x measure: the arm minus plain PPO at equal KL to sft0, over the KL that both reach.

    Measures: gold reward on the development prompts; the win rate against sft0 over all benchmarks' prompts. Of the
    arms that were run at two kl_coefs at least; bounds: t over replicates.
    """
    rows, judge, plain = [], selection.main_judge(study), study.plain
    measures = {"gold_reward": ("", selection.gold_of(study))}
    if judge:
        measures["win_rate_vs_sft0"] = (judge, selection.rate_of(study, judge, study.benchmarks))
    for arm in study.arms if plain else ():
        for measure, (asked, values) in measures.items() if arm != plain else ():
            found = selection.matched(study, arm, plain, values)
            if found:
                row = {"arm": arm, "baseline": plain, "measure": measure, "judge": asked}
                row |= {"kl_coefs": ", ".join(f"{x:g}" for x in selection.grid(study, arm)), "replicates": len(found)}
                rows.append(row | interval("difference", list(found.values())))
    columns = ["arm", "baseline", "measure", "judge", "kl_coefs", "replicates", *bounded("difference")]
    return pd.DataFrame(rows, columns=columns)


def paper_table(study):
    """The shape of a table of preferences: a row a benchmark; SALSA against PPO, each against sft0; t over replicates.

    Each arm at its chosen kl_coef, judged by the main judge.
    """
    arm = salsa_arm(study)
    frame = _preferences(study, [arm] if arm else [])
    names = {"kl_coef": "salsa_kl_coef"}
    names |= {f"arm_vs_{other}{bound}": f"salsa_vs_{other}{bound}" for other in ("ppo", "sft0") for bound in BOUNDS}
    return frame.drop(columns=["arm", "alpha"]).rename(columns=names)


def ablations(study):
    """As `paper_table`, a row an arm x benchmark: alphas by alpha, then the controls."""
    arms = [arm for arm in study.arms if arm != study.plain]
    alphas = {arm: study.of(arm=arm)[0].alpha for arm in arms}
    return _preferences(study, sorted(arms, key=lambda arm: (alphas[arm] is None, alphas[arm] or 0.0)))


def salsa_arm(study):
    """The arm that is SALSA: of that name, or from sft0 with the soup of alpha ½ as its reference. Or None."""
    named = selection.arm_of(study, "salsa")
    return named or next((policy.arm for policy in study.policies if policy.alpha == 0.5), None)


def _preferences(study, arms):
    """One row an arm x benchmark: win rates of the arm against the plain one, and of both against sft0."""
    rows, judge = [], selection.main_judge(study)
    for arm in arms if study.plain and judge else ():
        found = selection.pair(study, arm, study.plain)
        for benchmark in study.compared if found else ():
            preferred, how = selection.preference(study, found, judge, benchmark)
            row = {"benchmark": benchmark, "judge": judge, "arm": arm, "alpha": value(study.of(arm=arm)[0].alpha)}
            row |= {"kl_coef": found.candidate_kl_coef, "ppo_kl_coef": found.baseline_kl_coef}
            row |= {"replicates": len(preferred), "how": how}
            row |= interval("arm_vs_ppo", [0.5 + effect for effect in preferred.values()])
            for name, own, kl_coef in (
                ("arm_vs_sft0", arm, found.candidate_kl_coef),
                ("ppo_vs_sft0", study.plain, found.baseline_kl_coef),
            ):
                row |= interval(name, list(selection.rate_of(study, judge, [benchmark])(own, kl_coef).values()))
            rows.append(_identity(study) | row)
    return pd.DataFrame(rows, columns=PREFERENCES)


def geometry(study):
    """One row an arm x kl_coef: where its policies lie in the space of weights; mean and t interval over replicates.

    Distances are Euclidean; along_sft1 is the share of the way from sft0 to sft1, off_line the distance from that line.
    """
    return over_replicates(study.frames.policies, ["arm", "kl_coef"], GEOMETRY)


def plane(study):
    """One row a point: rewards and KL at weights w_sft0, w_sft1, w_policy, for each policy that spans a plane."""
    rows = [
        {"arm": policy.arm, "kl_coef": policy.kl_coef, "replicate": policy.replicate} | row
        for policy in study.policies
        for row in policy.plane
    ]
    return pd.DataFrame(rows, columns=["arm", "kl_coef", "replicate", *PLANE])


def stability(study):
    """One row an arm x kl_coef: responses by sft0's, gold's loss from its peak, and in how many replicates that holds.

    Mean and t interval over replicates; `stable` counts replicates in which every known number is within the
    configuration's `stability`, `collapsed` those whose policy has collapsed (`selection.collapse`).
    """
    policies, by = study.frames.policies, ["arm", "kl_coef"]
    holds = policies.assign(stable=[x is not False for x in policies["stable"]], collapsed=policies["collapse"] != "")
    counts = holds.groupby(by, sort=False)[["stable", "collapsed"]].sum().reset_index(drop=True)
    frame = pd.concat([over_replicates(policies, by, STABILITY.values()), counts], axis=1)
    return frame[[*by, "replicates", "stable", *bounded(*STABILITY.values()), "collapsed"]]


def gates(study):
    """One row a replicate: what decides whether a study can show anything."""
    rows = []
    for replicate in study.replicates:
        found, held = study.landscape(replicate).gates, study.reward_models.get(replicate, {})
        gold = found.get("gold") or {}
        agreement, pairs = policy_agreement(study, replicate)
        row = {
            "replicate": replicate,
            "held_out_accuracy": value(held.get("held_out_accuracy", found.get("held_out_accuracy"))),
            "gold_agreement": value(held.get("gold_agreement", found.get("gold_agreement"))),
            "policy_gold_agreement": agreement,
            "policy_pairs": pairs,
            "kl_sft0_soup": value(found.get("kl_sft0_soup")),
            "barrier": value(found.get("barrier")),
        }
        row |= {f"gold_{name}": value(gold.get(name)) for name in ("sft0", "sft1", "soup")}
        gain, error = plain_gain(study, replicate)
        row |= {"gold_ppo_minus_sft0": gain, "gold_ppo_minus_sft0_in_errors": gain / max(error, 1e-9)}
        rows.append(row | {"warnings": "; ".join(found.get("warnings", []))})
    return pd.DataFrame(rows)


def policy_agreement(study, replicate):
    """(share, pairs): does the reward model order two final policies' responses to a prompt as gold does?

    Of a replicate with one policy: that policy's and sft0's. Pairs that either scores equally are left out; no pair:
    nan.
    """
    answered = [_by_prompt(policy.responses) for policy in study.of(replicate=replicate)]
    if len(answered) == 1:
        answered.append(_by_prompt(sft0_responses(study, replicate)))
    agree = []
    for first, second in itertools.combinations(answered, 2):
        for key in first.keys() & second.keys():  # counted, so that the order changes nothing
            a, b = first[key], second[key]
            product = (a["reward"] - b["reward"]) * (a["gold"] - b["gold"])
            if product != 0 and math.isfinite(product):
                agree.append(product > 0)
    return (float(np.mean(agree)) if agree else math.nan), len(agree)


def _by_prompt(responses):
    return {(row["benchmark"], row["prompt_id"]): row for row in responses if row["gold"] is not None}


def plain_gain(study, replicate):
    """(gain, standard error): gold of plain PPO minus sft0's, paired by benchmark prompt, at its first kl_coef."""
    policies = sorted(study.of(arm=study.plain, replicate=replicate), key=lambda p: study.kl_coefs.index(p.kl_coef))
    if not policies:
        return math.nan, math.nan
    ours, theirs = _by_prompt(policies[0].responses), _by_prompt(sft0_responses(study, replicate))
    gains = [ours[key]["gold"] - theirs[key]["gold"] for key in ours if key in theirs]  # in the order of the file
    if len(gains) < 2:
        return math.nan, math.nan
    return float(np.mean(gains)), float(np.std(gains, ddof=1) / math.sqrt(len(gains)))


def runs_frame(study):
    """Every run of the study; columns as in RUNS."""
    return pd.DataFrame(study.runs, columns=RUNS).astype({"replicate": "Int64", "seed": "Int64"})
