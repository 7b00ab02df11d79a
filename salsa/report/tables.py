"""The tables of a study as data frames, and how each is written as CSV, Markdown and LaTeX.

The CSV holds every number, bounds in columns of their own (`<name>_low`, `<name>_high`: 95 %, over replicates,
except in win_rates); Markdown and LaTeX show the same rounded, "mean [low, high]". Intervals come from
`evaluate.statistics`. Proxy reward is everywhere the reward model's score, without PPO's penalty for a missing end.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pandas as pd

from salsa import plan, runs
from salsa.evaluate import statistics

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
REFERENCES = {  # kind -> what the penalty is measured from, in words
    "soup": "{soup}",
    "noise": "sft0 moved at random, as far as {soup}",
    "multi_kl": "a KL to each: {soup}",
    "ema": "{soup}, then a moving average of the policy, rate {rate:g}",
    "reset": "{soup}, then the policy, every {every} iterations",
}
SCHEDULES = {
    "fixed": "fixed",
    "linear": "falls linearly to {0:g} × kl_coef",
    "adaptive": "adapts to a KL of {0:g} nats, over {1:g} responses",
}
MEASURES = ["gold_reward", "reward", "kl_to_sft0", "kl_to_reference", "response_length", "eos_rate"]
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
LATEX = {"\\": r"\textbackslash{}", "‖": r"$\|$", "½": r"$\frac{1}{2}$"}
LATEX |= {character: "\\" + character for character in "%&_#${}"}


def _identity(study):
    return {"model": study.config["model"]["name"], "data": study.config["data"]["name"]}


def value(number_or_none):
    """A float; None (a number that this data has not) becomes nan."""
    return math.nan if number_or_none is None else float(number_or_none)


def interval(name, values):
    """Three columns of a row: mean over replicates, and its t interval (nan with one replicate)."""
    mean, low, high = statistics.replicate_interval([value(v) for v in values])
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def arms(study):
    """One row an arm: where the policy starts, what its penalty is measured from, and how strong that is."""
    rows, described = [], {name: arm["description"] for name, arm in study.config["arms"].items()}
    for way, (names, _) in plan.ways(study.config).items():
        first = next(name for name in study.arms if name in names)  # the configuration of a plan is sorted by name
        row = {
            "start": soup_text(way.start),
            "reference": REFERENCES[way.kind].format(soup=soup_text(way.weights), rate=way.rate, every=way.every),
            "kl_scale": way.kl_scale,
            "kl_schedule": SCHEDULES[way.kl_schedule[0]].format(*way.kl_schedule[1:]),
        }
        rows.append({"arm": first} | row | {"description": described.get(first, "on the line from sft0 to sft1")})
        same = f"the same as {first}, and shown under that name"
        rows += [{"arm": name} | row | {"description": same} for name in names if name != first]
    order = {arm: place for place, arm in enumerate(study.arms)}
    return pd.DataFrame(sorted(rows, key=lambda row: order.get(row["arm"], len(order))))


def soup_text(weights):
    """sft0, 1/2 sft0 + 1/2 sft1."""
    parts = [f"{weight} sft{i}" for i, weight in enumerate(weights) if Fraction(weight)]
    return " + ".join(parts).removeprefix("1 ")


def win_rates(study):
    """One row a benchmark x judge x candidate arm x baseline x kl_coef; bounds: bootstrap over prompts."""
    report, rows = study.config["report"], []
    for arm in study.arms:
        for kl_coef in study.kl_coefs:
            policies = study.of(arm=arm, kl_coef=kl_coef)
            for baseline, name in policies[0].baselines.items() if policies else ():
                for judge, benchmark in judged(study):
                    lines = study.verdicts.get((judge, benchmark, policies[0].name, name), [])
                    found = statistics.compare(lines, policies[0].name, name, report["seed"], report["bootstrap"])
                    if found["prompts"]:
                        key = {"benchmark": benchmark, "judge": judge, "candidate": arm, "baseline": baseline}
                        count = len({line["replicate"] for line in lines})
                        rows.append(_identity(study) | key | {"kl_coef": kl_coef, "replicates": count} | found)
    return pd.DataFrame(rows, columns=WIN_RATES)


def judged(study):
    """The (judge, benchmark) pairs that have verdicts, in the configuration's order."""
    present = {key[:2] for key in study.verdicts}
    return [(judge, name) for judge in study.config["judges"] for name in study.benchmarks if (judge, name) in present]


def replicate_win_rates(study, policy_name, baseline_name, judge, benchmarks):
    """replicate -> adjusted win rate over all prompts of some benchmarks."""
    lines = [line for name in benchmarks for line in study.verdicts.get((judge, name, policy_name, baseline_name), [])]
    found = {}
    for replicate in sorted({line["replicate"] for line in lines}):
        own = [line for line in lines if line["replicate"] == replicate]
        scores = statistics.prompt_scores(own, policy_name, baseline_name)
        if scores:
            found[replicate] = statistics.adjusted_win_rate(list(scores.values()))
    return found


def frontier(study):
    """Trajectory rows at the iterations whose rollouts were kept, then the final policy on evaluation prompts."""
    rows = []
    for policy in study.policies:
        key = _identity(study) | {"arm": policy.arm, "kl_coef": policy.kl_coef, "replicate": policy.replicate}
        final = policy.evaluation["iteration"]
        for line in policy.metrics:
            if line["iteration"] in policy.gold and line["iteration"] < final:
                own = {"reward": line["score"], "gold_reward": policy.gold[line["iteration"]]}
                rows.append(key | _measures(line) | own)
        rows.append(key | _measures(policy.evaluation))
    return pd.DataFrame(rows, columns=FRONTIER)


def _measures(line):
    return {name: value(line.get(name)) for name in MEASURES} | {"iteration": line["iteration"]}


def final(frontier_frame):
    """The rows of final policies: the last iteration of each (arm, kl_coef, replicate)."""
    keys = ["arm", "kl_coef", "replicate"]
    return frontier_frame[frontier_frame["iteration"] == frontier_frame.groupby(keys)["iteration"].transform("max")]


def rewards(study):
    """Mean and t interval over replicates, of the SFT models and the soup, then of every arm at every kl_coef."""
    rows = []
    for alpha, name in ((0.0, "sft0"), (1.0, "sft1"), (0.5, "soup")):
        lines = line_rows(study, alpha)
        if lines:
            row = {"arm": name, "kl_coef": math.nan, "replicates": len(lines)}
            for measure in MEASURES:
                row |= interval(measure, [line.get(measure) for line in lines])
            rows.append(row)
    for arm in study.arms:
        for kl_coef in study.kl_coefs:
            policies = study.of(arm=arm, kl_coef=kl_coef)
            if policies:
                row = {"arm": arm, "kl_coef": kl_coef, "replicates": len(policies)}
                for measure in MEASURES:
                    row |= interval(measure, [policy.evaluation.get(measure) for policy in policies])
                rows.append(row)
    columns = [name + bound for name in MEASURES for bound in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["arm", "kl_coef", "replicates", *columns])


def line_rows(study, alpha):
    """The row of line.csv at one alpha, of each replicate that has it."""
    rows = [line for k in study.replicates for line in study.landscape(k).line]
    return [line for line in rows if math.isclose(line["alpha"], alpha, abs_tol=1e-6)]


def alpha_curve(study):
    """By alpha: SFT soups before PPO; after it, policies from sft0 with the soup of that alpha as reference."""
    rows = []
    for alpha in sorted({line["alpha"] for k in study.replicates for line in study.landscape(k).line}):
        lines = line_rows(study, alpha)
        row = {"kind": "sft_soup", "alpha": alpha, "kl_coef": math.nan, "replicates": len(lines)}
        for measure in ("reward", "gold_reward"):
            row |= interval(measure, [line[measure] for line in lines])
        rows.append(row)
    for kl_coef in study.kl_coefs:
        for alpha in sorted({p.alpha for p in study.of(kl_coef=kl_coef) if p.alpha is not None}):
            rows.append(_alpha_policy(study, alpha, kl_coef))
    names = [name + bound for name in ("reward", "gold_reward", "win_rate_vs_sft0") for bound in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["kind", "alpha", "kl_coef", "replicates", *names])


def _alpha_policy(study, alpha, kl_coef):
    policies = study.of(alpha=alpha, kl_coef=kl_coef)
    row = {"kind": "policy", "alpha": alpha, "kl_coef": kl_coef, "replicates": len(policies)}
    for measure in ("reward", "gold_reward"):
        row |= interval(measure, [policy.evaluation.get(measure) for policy in policies])
    judge = next(iter(study.config["judges"]), None)
    baseline = policies[0].baselines.get("sft0", "sft0")
    rates = replicate_win_rates(study, policies[0].name, baseline, judge, study.benchmarks)
    return row | interval("win_rate_vs_sft0", list(rates.values()))


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
        for key in first.keys() & second.keys():
            a, b = first[key], second[key]
            product = (a["reward"] - b["reward"]) * (a["gold"] - b["gold"])
            if product != 0:
                agree.append(product > 0)
    return (float(np.mean(agree)) if agree else math.nan), len(agree)


def sft0_responses(study, replicate):
    return [row for row in study.landscape(replicate).responses if row["model"] == "sft0"]


def _by_prompt(responses):
    return {(row["benchmark"], row["prompt_id"]): row for row in responses if row["gold"] is not None}


def plain_gain(study, replicate):
    """(gain, standard error): gold of plain PPO minus sft0's, paired by benchmark prompt, at its first kl_coef."""
    policies = sorted(study.of(arm=study.plain, replicate=replicate), key=lambda p: study.kl_coefs.index(p.kl_coef))
    if not policies:
        return math.nan, math.nan
    ours, theirs = _by_prompt(policies[0].responses), _by_prompt(sft0_responses(study, replicate))
    gains = [ours[key]["gold"] - theirs[key]["gold"] for key in ours.keys() & theirs.keys()]
    if len(gains) < 2:
        return math.nan, math.nan
    return float(np.mean(gains)), float(np.std(gains, ddof=1) / math.sqrt(len(gains)))


AFTER_PPO = (
    "policy_gold_agreement",
    "policy_pairs",
    "gold_ppo_minus_sft0",
    "gold_ppo_minus_sft0_in_errors",
)  # columns of gates that need policies


def gate_checks(study):
    """Column of `gates` -> (what is wanted, in words; whether a number is that)."""
    wanted = study.config["evaluate"]["gates"]
    low, high = wanted["lowest_agreement"], wanted["highest_agreement"]
    kl, barrier = wanted["smallest_kl"], wanted["largest_barrier"]
    agreement = "reward model agrees with gold"
    return {
        "gold_agreement": (f"{agreement} on {low:.0%} to {high:.0%} of held-out pairs", lambda x: low <= x <= high),
        "kl_sft0_soup": (f"KL(sft0 ‖ soup) at least {kl:g} nats a response", lambda x: x >= kl),
        "barrier": (f"loss barrier at most {barrier:g} nats a token", lambda x: x <= barrier),
        "policy_gold_agreement": (
            f"{agreement} on at least {low:.0%} of pairs of two final policies' responses",
            lambda x: x >= low,
        ),
        "gold_ppo_minus_sft0_in_errors": (
            f"gold reward of {study.plain} above sft0's by more than two standard errors over prompts (errors)",
            lambda x: x > 2,
        ),
    }


def gate_lines(study, frame):
    """Sentences: which gate held in how many replicates, for the gates that `frame` has and that were measured."""
    lines = []
    for name, (text, holds) in gate_checks(study).items():
        measured = frame[name].dropna() if name in frame else ()
        held = sum(bool(holds(x)) for x in measured)
        if len(measured):
            mark = "" if held == len(measured) else "**Warning**: "
            values = ", ".join(number(x) for x in measured)
            lines.append(f"{mark}{text}: held in {held} of {len(measured)} replicates ({values})")
    return lines


def runs_frame(study):
    """Every run of the study; columns as in RUNS."""
    return pd.DataFrame(study.runs, columns=RUNS).astype({"replicate": "Int64", "seed": "Int64"})


def captions(study, frames, kl_coefs):
    """name -> one sentence for each table and figure, from its numbers; `kl_coefs`: those that curves show."""
    count = len(study.replicates)
    replicates = f"{count} replicate" + "s" * (count != 1)
    band = "95 % t intervals over replicates" if count > 1 else "no interval: conditional on one SFT pair"
    last = final(frames["frontier"])
    drawn = [policy for policy in study.policies if policy.kl_coef in kl_coefs]
    coefs = ", ".join(f"{kl_coef:g}" for kl_coef in kl_coefs)
    texts = {
        "arms": f"{len(frames['arms'])} arms: where the policy starts, what its KL penalty is measured from, and the "
        "penalty's strength, kl_scale times the study's kl_coef, over the run as the schedule says; the kl_coef that "
        "tables and figures show is the study's, before the scale.",
        "win_rates": _win_rate_caption(frames["win_rates"], replicates),
        "frontier": f"{len(last)} final policies of {replicates}: KL(policy ‖ sft0) from {_range(last['kl_to_sft0'])} "
        f"nats a response, gold reward {_range(last['gold_reward'])}, proxy reward {_range(last['reward'])}; KL to the "
        "own reference is not comparable between references.",
        "alpha_curve": f"Reward along the line from sft0 (alpha 0) to sft1 (alpha 1), before PPO at "
        f"{(frames['alpha_curve']['kind'] == 'sft_soup').sum()} soups and after it at "
        f"{(frames['alpha_curve']['kind'] == 'policy').sum()} settings of alpha and kl_coef, {replicates}; {band}.",
        "gates": f"Gates of {replicates}: KL(sft0 ‖ soup) {_range(frames['gates']['kl_sft0_soup'])} nats a response, "
        f"reward model's agreement with gold {_range(frames['gates']['gold_agreement'])} on held-out pairs and "
        f"{_range(frames['gates']['policy_gold_agreement'])} between final policies.",
        "rewards": f"Mean over {replicates} on the evaluation prompts ({band}); sft0, sft1 and their soup before PPO.",
        "training_curves": f"Training of {len(drawn)} policies (kl_coef {coefs}), sampled before each iteration's "
        f"update: line the mean, band the range over {replicates}; gold reward is that of the kept rollouts.",
        "response_lengths": f"Response length in tokens (kl_coef {coefs}), in training and on "
        f"{len(study.benchmarks)} benchmarks; final policies answer the evaluation prompts in "
        f"{_range(last['response_length'])} tokens on average.",
        "loss_line": "Validation loss along the line between the first two SFT models: the barrier is "
        f"{_range(frames['gates']['barrier'])} nats a token over {replicates}.",
    }
    return texts


def _win_rate_caption(frame, replicates):
    if frame.empty:
        return "No verdicts: this study has no judge."
    clear = int(((frame["ci_low"] > 0.5) | (frame["ci_high"] < 0.5)).sum())
    return (
        f"Adjusted win rates (wins + ties/2) with 95 % intervals that resample {_range(frame['prompts'])} prompts over "
        f"{replicates}, conditional on these models: {clear} of {len(frame)} intervals exclude ½."
    )


def _range(values):
    values = [value(v) for v in values if v == v]
    if not values:
        return "unknown"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def number(x):
    """Three significant digits without an exponent where that is readable; nothing for nan and None."""
    if x is None or x != x:
        return ""
    return f"{x:.0f}" if abs(x) >= 100 or x == 0 else f"{x:.3g}"


def readable(frame):
    """Text columns: numbers rounded, `x`, `x_low`, `x_high` (or ci_low, ci_high) joined to "mean [low, high]"."""
    shown = {}
    for name in frame.columns:
        if name.endswith(("_low", "_high")):
            continue
        bounds = ("ci_low", "ci_high") if name == "adjusted_win_rate" else (f"{name}_low", f"{name}_high")
        values = [_cell(x) for x in frame[name]]
        if bounds[0] in frame:
            pairs = zip(values, frame[bounds[0]], frame[bounds[1]], strict=True)
            values = [f"{x} [{number(low)}, {number(high)}]" if low == low else x for x, low, high in pairs]
        if any(values):
            shown[name.replace("_", " ")] = values
    return pd.DataFrame(shown, dtype=str)


def _cell(x):
    return x if isinstance(x, str) else number(x)


def shown(name, frame):
    """What Markdown and LaTeX show of a table: of the frontier, final policies alone; never model and data."""
    if name == "frontier":
        frame = final(frame).drop(columns="iteration")
    return readable(frame.drop(columns=["model", "data"], errors="ignore"))


def markdown(frame):
    """A Markdown table of text columns; pipes in cells are escaped."""
    if frame.empty:
        return "(no rows)"
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def latex(frame, name, caption):
    """A booktabs table in a float, everything escaped."""
    escaped = "".join(LATEX.get(character, character) for character in caption)
    columns = "".join("p{4cm}" if frame[column].str.len().max() > 40 else "l" for column in frame)
    text = frame.to_latex(
        index=False, escape=True, caption=escaped, label=f"tab:{name}", position="htbp", column_format=columns
    )
    return "% \\usepackage{booktabs}\n" + text.replace("‖", LATEX["‖"]).replace("½", LATEX["½"])


def write_csv(frame, path):
    """CSV with full precision and empty cells for missing numbers."""
    runs.write_atomically(path, frame.to_csv(index=False, lineterminator="\n"))


def write(frame, folder, name, caption):
    """Write one table as <name>.csv, .md and .tex."""
    write_csv(frame, folder / f"{name}.csv")
    text = shown(name, frame)
    runs.write_atomically(folder / f"{name}.md", f"{caption}\n\n{markdown(text)}\n")
    runs.write_atomically(folder / f"{name}.tex", latex(text, name, caption))
