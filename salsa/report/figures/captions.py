"""How each figure is to be read, and what is best seen in it: sentences from the numbers drawn.

What the numbers say is in `salsa.report.captions`, for tables and figures alike.
"""

from salsa.report import tables
from salsa.report.figures.curves import banded, gain_scale, trajectories
from salsa.report.figures.forests import in_units, shown_win_rates
from salsa.report.figures.planes import WEIGHTS, corners, over_replicates
from salsa.report.figures.style import FEW, drawn_kl_coefs, groups, has_intervals, known, measured, spread_kl_coefs

CUT = "a bar that reaches the frame goes on beyond it"


def captions(study, frames):
    """figure -> a sentence on how it is drawn, for the figures of which something is measured."""
    found = {
        "claims": _claims(measured(frames, "claims", "effect")),
        "win_rates": _win_rates(study, measured(frames, "win_rates", "adjusted_win_rate")),
        "bradley_terry": _bradley_terry(measured(frames, "bradley_terry", "score")),
        "frontier": _frontier(study, measured(frames, "frontier", "kl_to_sft0")),
        "matched_kl": _matched_kl(measured(frames, "matched_kl", "difference")),
        "over_optimisation": _over_optimisation(study, measured(frames, "frontier", "kl_to_sft0", "reward")),
        "alpha_curve": _alpha_curve(measured(frames, "alpha_curve", "loss")),
        "training_curves": _training(study),
        "lengths_and_ends": _lengths(study, measured(frames, "rewards", "response_length")),
        "geometry": _geometry(measured(frames, "geometry", "from_sft0")),
        "plane": _plane(frames, measured(frames, "plane", "reward", *WEIGHTS)),
    }
    return {name: text for name, text in found.items() if text}


def _number(x):
    return tables.number(float(x))


def _claims(frame):
    if frame.empty:
        return ""
    inside = sum(abs(in_units(row)[0]) < 1 for row in frame.to_dict("records"))
    return (
        f"{len(frame)} effects in units of the smallest that would matter, {inside} of them smaller than that; bars "
        "are 95 % t intervals, and the words on the right the verdict, p after Holm, and the replicates that would "
        "decide."
    )


def _win_rates(study, frame):
    if frame.empty:
        return ""
    frame, kl_coefs = shown_win_rates(study, frame)
    text = f"Bars are 95 % bootstrap intervals over prompts; kl_coef {', '.join(f'{k:g}' for k in sorted(kl_coefs))}"
    if known(frame, "length_controlled"):
        shift = (frame["length_controlled"] - frame["adjusted_win_rate"]).abs().max()
        text += f"; hollow: at equal response length, which moves a rate by at most {_number(shift)}"
    return text + "."


def _bradley_terry(frame):
    if frame.empty:
        return ""
    best = frame.loc[frame["score"].idxmax()]
    return (
        "Bars are 95 % bootstrap intervals over prompts; the highest score is that of "
        f"{best['model']}, judge {best['judge']}."
    )


def _frontier(study, frame):
    if frame.empty:
        return ""
    last = tables.final(frame)
    farthest = last.loc[last["kl_to_sft0"].idxmax()]
    text = f"The farthest policy is of {farthest['arm']} at kl_coef {farthest['kl_coef']:g}"
    if has_intervals(study):
        text += f"; crosses are 95 % t intervals of the means of KL and reward, and {CUT}"
    if len(study.arms) > FEW:
        text += "; above, the means of all arms, below, each arm and its replicates before the means of the others"
    return text + "."


def _matched_kl(frame):
    if frame.empty:
        return ""
    largest = frame.loc[frame["difference"].abs().idxmax()]
    return (
        f"Bars are 95 % t intervals over replicates; the largest difference is that of {largest['arm']}, "
        f"{_number(largest['difference'])} in {largest['measure'].replace('_', ' ')}."
    )


def _over_optimisation(study, frame):
    if frame.empty:
        return ""
    means = trajectories(frame)
    parts = [
        f"{_number(gain_scale(study, means, name)[1])} of {words}"
        for name, words in (("gold_reward", "gold"), ("reward", "proxy reward"))
        if known(means, name)
    ]
    text = f"1 is a gain of {' and '.join(parts)}; lines are means over replicates, marks the final policies"
    training = means[~means["is_final"]].dropna(subset="gold_reward")
    if len(training):
        peaks = training.groupby(["arm", "kl_coef"])["gold_reward"]
        turned = int((peaks.max() > peaks.last()).sum())
        text += f"; in training, gold ends below its peak in {turned} of {len(peaks)} curves"
    return text + "."


def _alpha_curve(frame):
    soups = frame[frame["kind"] == "sft_soup"] if len(frame) else frame
    if soups.empty:
        return ""
    best = soups.loc[soups["loss"].idxmin()]
    return (
        f"Of the soups, the one at alpha {best['alpha']:g} has the lowest loss, {_number(best['loss'])} nats a token."
    )


def _training(study):
    curves = groups(study, drawn_kl_coefs(study))
    shaded = [arm for arm in study.arms if arm in banded(study, curves)]
    if len(study.replicates) == 1 or len(shaded) == len(study.arms):
        return ""
    return f"Of {len(curves)} curves, the ranges of {' and '.join(shaded)} alone are shown."


def _lengths(study, frame):
    policies = frame[frame["arm"].isin(study.arms)] if len(frame) else frame
    if policies.empty:
        return ""
    shortest = policies.loc[policies["response_length"].idxmin()]
    start = frame[frame["arm"] == "sft0"]["response_length"]
    text = (
        f"Training at kl_coef {', '.join(f'{k:g}' for k in spread_kl_coefs(study))}; the shortest mean responses are "
        f"those of {shortest['arm']} at kl_coef {shortest['kl_coef']:g}, {_number(shortest['response_length'])} tokens"
    )
    return text + (f", where sft0 writes {_number(start.iloc[0])}." if len(start) else ".")


def _geometry(frame):
    if frame.empty:
        return ""
    far = frame.loc[frame["from_sft0"].idxmax()]
    return (
        f"The farthest from sft0 are the policies of {far['arm']} at kl_coef {far['kl_coef']:g}; bars are 95 % t "
        f"intervals over replicates, and {CUT}."
    )


def _plane(frames, frame):
    if frame.empty:
        return ""
    texts, apart = [], []
    distances = measured(frames, "geometry", "sft0_to_sft1", "along_sft1", "off_line")
    for (arm, kl_coef), own in frame[frame["kind"] == "plane"].groupby(["arm", "kl_coef"], sort=False):
        apart.append(corners(distances, arm, kl_coef)[1])
        name = "gold_reward" if known(own, "gold_reward") else "reward"
        means = over_replicates(own, name).set_index(WEIGHTS)[name]
        if means.empty:
            continue
        weights = ", ".join(f"{w:g}" for w in means.idxmax())
        texts.append(f"{arm}: {name.replace('_', ' ')} is best at weights ({weights}) of (sft0, sft1, policy)")
    shape = "distances are those of weight space, means over replicates" if all(apart) else (
        "where the distances in weight space are not known, an equilateral triangle")  # fmt: skip
    return (
        f"{'; '.join(texts)}; {shape}; dots are the points that answered, what lies below the scale has its lowest "
        "colour, and bands are standard errors over prompts."
    )
