"""What a study concludes, in words: claims.md, and the sentences of the report about claims.

What each verdict is, `claims` says; here stands how it is told. A positive control that the study does not support
comes first, because every other verdict stands under it.
"""

import math
from collections import Counter
from dataclasses import dataclass

from salsa.evaluate import decisions, gates, power, statistics, variance
from salsa.report import claims, formats, judging, noise, outcomes, selection, words
from salsa.report.formats import Bold, Number, Table, Verdict
from salsa.report.frames import BOUNDS
from salsa.report.sections import manipulation

VERDICTS = tuple(decisions.WORDS)
NO_EFFECT = (decisions.TOO_SMALL, decisions.EXCLUDED, decisions.REVERSED)  # that would matter
QUANTITIES = {  # key of evaluation.json -> words
    "gold_reward": "gold reward",
    "reward": "proxy reward",
    "kl_to_sft0": "KL to sft0",
}


def text(study, frame, win_rates):
    """The whole of claims.md.

    Args:
        frame: what `claims.frame` returns.
        win_rates: the table of win rates.
    """
    numbers_of = {origin: numbers(claims.tested_rows(frame[frame["origin"] == origin])) for origin in claims.ORIGINS}
    return words.template("claims.md.jinja", autoescape=False).render(
        sight=sight(study, frame),
        summary=summary(study, frame),
        warnings=warnings(study),
        registered=study.registration.sentences,
        replicates=len(study.replicates),
        families=families(study),
        stated=stated(study),
        compared_at=compared_at(study),
        meanings={verdict: meaning for verdict, meaning in decisions.WORDS.items() if verdict in VERDICTS},
        origins=hypotheses(study, frame),
        numbers=numbers_of,
        titles=claims.ORIGINS,
        baseline=study.plain,
        differences=differences(study),
        signs=signs(win_rates, {*study.plain_arms.values()}),
        markdown=formats.markdown,
    )


def warnings(study):
    """Sentences that a reader of any table needs: judges that can't tell, and policies that have collapsed."""
    return judging.warnings(study) + collapses(study)


def collapses(study):
    """A sentence for each arm and kl_coef of which a policy has collapsed, with the first one's numbers."""
    sentences = []
    for (arm, kl_coef), policies in study.groups().items():
        reasons = [reason for reason in (selection.collapse(study, policy) for policy in policies) if reason]
        if reasons:
            count = f"{len(reasons)} of {len(policies)} replicates"
            sentences.append(f"{arm} at kl_coef {kl_coef:g} collapsed in {count}: {reasons[0]}")
    return sentences


STANDS = "every other verdict stands under that sentence"
SIGHT = {  # verdict on a positive control -> whether the study sees a better anchor
    decisions.SUPPORTED: "this study sees a better anchor ({}).",
    decisions.TOO_SMALL: "this study sees a better anchor, but even that gains less than would matter ({}), and "
    f"{STANDS}.",
    decisions.EXCLUDED: "this study can't see a better anchor: that it gains what would matter is excluded ({}), and "
    f"{STANDS}.",
    decisions.REVERSED: "what should be a better anchor does worse ({}), so that the measure, or how the anchor was "
    f"made, is in doubt, and {STANDS}.",
    decisions.UNDECIDED: f"whether this study would see a better anchor is undecided ({{}}), and {STANDS}.",
}


def sight(study, frame):
    """Sentences on whether the study sees a reference that is better by construction; none where it claims nothing."""
    rows = claims.primary_rows(frame)
    controls = rows[rows["origin"] == "positive_control"].to_dict("records")
    if frame.empty or controls:
        return [_sight(study, row) for row in controls]
    return [f"The study has no positive control: whether it would see a better anchor is not known, and {STANDS}."]


def _sight(study, row):
    name = f"Positive control ({row['claim']})"
    if row["verdict"] == decisions.NOT_TESTED:
        unknown = f"whether this study would see a better anchor is not known, and {STANDS}"
        return f"{name}: it is not tested, for {row['why']}; {unknown}."
    parts = [f"{row['candidate']} against {row['baseline']}: {effect_words(row)}"]
    strength = manipulation.strength(study, row["candidate"], row["candidate_kl_coef"])
    if strength == strength:
        parts.append(f"kl_coef · KL(sft0 ‖ reference) is {gates.text(strength)} {gates.DEVIATIONS}")
    return f"{name}: " + SIGHT[row["verdict"]].format("; ".join(parts))


def effect_words(row):
    """The effect of a row of claims with its interval and unit."""
    unit = outcomes.WORDS[row["measure"]][1]
    effect, low, high = map(selection.number, outcomes.shown_interval(row))
    return effect + (f" ({low} to {high})" if low else "") + (f" {unit}" if unit else "")


def summary(study, frame):
    """One paragraph that counts the verdicts and says how many replicates they rest on."""
    if frame.empty:
        return "This study makes no claims."
    verdicts = claims.primary_rows(frame).set_index("claim")["claim_verdict"]
    counts = Counter(verdicts)
    names = {verdict: ", ".join(verdicts.index[verdicts == verdict]) for verdict in VERDICTS}
    parts = [f"{counts[verdict]} {verdict} ({some})" for verdict, some in names.items() if some]
    opening = f"Of {len(verdicts)} claims: {'; '.join(parts)}. "
    if counts[decisions.NOT_TESTED] == len(verdicts):
        return opening + "No claim can be tested here."
    count = len(study.replicates)
    if count == 1:
        return opening + "One replicate tells nothing of other SFT pairs, so nothing is decided."
    return opening + (
        f"The tests rest on up to {count} replicates, each with its own SFT models, reward model and training seeds. "
        f"{families(study)}"
    )


def families(study):
    """The rule by which several claims are decided, with this study's numbers: sentences."""
    count, level = len(claims.family(study)), claims.family_level(study)
    looks = study.config.looks
    looked = f", and at all looks (after {', '.join(map(str, looks))} replicates) at once" if looks else ""
    return (
        f"The {count} claims that this study plans to test are one family, each decided by an interval at the level "
        f"1 − 0.05/{max(1, count)} = {100 * level:.4g} %, so that all verdicts hold at once with 95 %{looked}."
    )


def stated(study):
    """When what the study claims was written down: a participle that goes with a noun."""
    return "fixed before the study ran" if study.registration.in_advance else "stated in the study's configuration"


def compared_at(study):
    """At which kl_coef arms are compared: a sentence."""
    fixed = study.config.claim_kl_coef
    if fixed is not None:
        return f"All arms are compared at kl_coef {fixed:g}, which was {stated(study)} (claim_kl_coef)."
    return "Each arm is taken at the kl_coef that does best on the development prompts, of those that both were run at."


@dataclass(frozen=True)
class Hypothesis:
    """A claim in words: what was supposed, the verdict, and what stands after it.

    Attributes:
        effect: what differs, with the interval and unit, in few words; "" of a claim that is not tested.
        pair: (candidate, its kl_coef), (baseline, its kl_coef); () where no two policies are compared.
        judged: whether a judge's verdicts decide it.
    """

    name: str
    text: str
    verdict: str
    because: str
    effect: str = ""
    pair: tuple = ()
    judged: bool = False

    @property
    def sentence(self):
        """The claim's text as a sentence without its stop; one that goes on from another's stands alone."""
        text = self.text.removeprefix("and ")
        return text[:1].upper() + text[1:]


def hypotheses(study, frame):
    """origin -> the `Hypothesis` of each of its claims; an origin without claims is left out."""
    by_origin = {}
    for row in claims.primary_rows(frame).to_dict("records"):
        claim = study.config.claims[row["claim"]]
        told = claim.text, row["claim_verdict"], because(study, claim, row)
        hypothesis = Hypothesis(row["claim"], *told, *_compared(row))
        by_origin.setdefault(row["origin"], []).append(hypothesis)
    return by_origin


def _compared(row):
    """(effect in words, the two policies that are compared, whether by a judge) of a claim's row."""
    if row["verdict"] == decisions.NOT_TESTED:
        return "", (), False
    kl_coefs = row["candidate_kl_coef"], row["baseline_kl_coef"]
    pair = () if kl_coefs[0] != kl_coefs[0] else tuple(zip((row["candidate"], row["baseline"]), kl_coefs, strict=True))
    measure = outcomes.SHORT.get(row["measure"], "")
    minus_half = " minus ½" * (row["measure"] == "win_rate")
    return f"{measure}{minus_half}: " * bool(measure) + effect_words(row), pair, bool(row["judge"])


def because(study, claim, row):
    """What stands after a claim's verdict: effect, meaning, equivalence, what would decide it, doubts."""
    if row["verdict"] == decisions.NOT_TESTED:
        return row["why"]
    parts = [f"{effect_words(row)} over {row['replicates']} replicate" + "s" * (row["replicates"] != 1)]
    if row["verdict"] in NO_EFFECT and claim.meaning:
        parts.append(claim.meaning)
    if row["equivalent"] is True:
        parts.append(f"equivalent: a difference of {formats.number(row['smallest_effect'])} is excluded either way")
    if row["verdict"] == decisions.UNDECIDED:
        parts += needed(study, row)
    return "; ".join(parts + ([f"but {row['why']}"] if row["why"] else []))


def needed(study, row):
    """What would decide an undecided claim, in words; nothing where the deviation between replicates is not known."""
    if not row["needed_80"] > 0:
        return []
    look = claims.tests(study)[row["claim"]].look
    most = f"the {look.looks[-1]} planned" if look else f"{power.MOST:,}"
    counts = [_replicates(row, name, most) for name in claims.POWERS]
    excluded = ", or to exclude it where there is no effect," if row["smallest_effect_shown"] else ""
    sentences = [
        f"80 % power to support {formats.number(row['smallest_effect'])}{excluded} "
        f"takes {counts[0]} replicates, and 90 % {counts[1]}"
    ]
    if look and any(math.isinf(row[name]) for name in claims.POWERS):
        sentences.append(_without_looks(study, row))
    return sentences


def _replicates(row, name, most):
    """A number of replicates with the range that the uncertainty of the deviation leaves."""
    number, low, high = (_count(row[name + bound], most) for bound in BOUNDS)
    return number if math.isinf(row[f"{name}_low"]) else f"{number} ({low} to {high})"


def _count(number, most):
    return f"{number:.0f}" if math.isfinite(number) else f"more than {most}"


def _without_looks(study, row):
    """How many replicates a study that is looked at once takes, and their cost, where no planned look decides a claim.

    The range is left to `_replicates`: this number is the one to plan with.
    """
    smallest = row["smallest_effect_shown"] or row["smallest_effect"]  # stability has the latter alone
    floor = row["sampling_deviation"] ** 2 if row["sampling_deviation"] > 0 else 0.0
    known = row["deviation"], row["replicates"] - 1, smallest, row["level"]
    parts = []
    for wanted in claims.POWERS.values():
        number = power.needed(*known, wanted, sampling_variance=floor).replicates
        parts.append(f"{_count(number, f'{power.MOST:,}')} for {wanted:.0%}{_paid(study, row, number)}")
    return f"a study that is looked at once takes {' and '.join(parts)}"


def _paid(study, row, number):
    hours = core_hours(study, row, number) if math.isfinite(number) else None
    return "" if hours is None else f" ({hours:.3g} core-hours of the two arms)"


def core_hours(study, row, replicates):
    """What so many replicates of a claim's two arms cost as they were run here; None where that is not known."""
    kl_coefs = row["candidate_kl_coef"], row["baseline_kl_coef"]
    if kl_coefs[0] != kl_coefs[0]:  # a claim at equal KL, which is over all kl_coefs
        return None
    pair = selection.Pair(row["candidate"], row["baseline"], kl_coefs, *kl_coefs)
    paid = noise.cost(study, pair)
    if paid is None:
        return None
    cost, answers = paid
    design = variance.Design(replicates, len(selection.seeds(study)), answers, 1)
    return cost.of(design) / 60


def numbers(frame):
    """The table that readers see of tested claims: the verdict where an outcome decides, and effects.

    A claim's first row, that of its primary outcome, has the claim's name in the page.
    """
    rows, names = [], []
    for row in frame.to_dict("records"):
        measured, unit = outcomes.WORDS[row["measure"]]
        by = f", judge {row['judge']}" if row["judge"] else ""
        how = f" ({row['how']})" if row["how"] else ""
        rows.append(
            {
                "claim": row["claim"],
                "verdict": Verdict(row["verdict"]),
                "effect": formats.number(*outcomes.shown_interval(row)),
                "unit": unit,
                "would matter": formats.number(row["smallest_effect"]) if row["smallest_effect_shown"] else "",
                "of": measured + how + (f": {row['benchmark']}{by}" if row["benchmark"] else ""),
                "arms, at their kl_coef": f"{_at(row, 'candidate')} − {_at(row, 'baseline')}",
                "p": formats.number(row["p"]),
                "n": formats.number(row["replicates"]),
            }
        )
        names.append(f"claim-{row['claim']}" if row["outcome"] == outcomes.PRIMARY else "")
    return Table(list(rows[0]) if rows else [], [list(row.values()) for row in rows], tuple(names))


def _at(row, role):
    kl_coef = row[f"{role}_kl_coef"]
    return row[role] + (f" ({kl_coef:g})" if kl_coef == kl_coef else "")


def differences(study):
    """Every arm minus its plain anchor at the same kl_coef: a row per arm × kl_coef, a column per quantity, as text.

    Bold where the interval excludes 0, which says above or below it and no more.
    """
    rows, judge = [], selection.main_judge(study)
    for arm, kl_coef in study.groups():
        plain = study.plain_of(arm)
        if plain in (None, arm) or not study.of(arm=plain, kl_coef=kl_coef):
            continue
        row = {"arm": arm, "kl_coef": Number(f"{kl_coef:g}")}
        for key, quantity in QUANTITIES.items():
            sides = (selection.evaluated(study, name, kl_coef, key) for name in (arm, plain))
            row[quantity] = _difference(selection.by_replicate(*sides))
        pair = selection.Pair(arm, plain, (kl_coef,), kl_coef, kl_coef)
        for benchmark in study.compared if judge else ():
            effects, _ = selection.preference(study, pair, judge, benchmark)
            row[f"win rate minus ½, {benchmark}"] = _difference(effects, outcomes.MOST["win_rate"])
        rows.append(row)
    return Table.of({name: [row[name] for row in rows] for name in (rows[0] if rows else ())})


def _difference(effects, most=math.inf):
    """The mean of some effects as a cell, with an interval that is cut where no effect can lie."""
    decision = decisions.decide(list(effects.values()), 0)  # whose bounds are nan where there is no spread
    low, high = (min(max(bound, -most), most) for bound in (decision.low, decision.high))
    cell = formats.number(decision.mean if abs(decision.mean) > statistics.SAME else 0.0, low, high)
    return Bold(cell) if low > 0 or high < 0 else cell


def signs(win_rates, plain):
    """(how many sign tests against plain anchors stay below 0.05 after Holm's correction, of how many)."""
    rows = win_rates[win_rates["baseline"].isin(plain)]
    return int((rows["holm_p"] < 0.05).sum()), len(rows)
