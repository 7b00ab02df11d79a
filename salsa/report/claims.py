"""What a study says of each claim that its configuration makes, and no more.

A claim (`config.Claim`) is a hypothesis fixed before the run: candidate minus baseline is above 0, and by how much it
would matter. Differences are paired by replicate (the same SFT models, reward model and training seed), each arm at its
chosen kl_coef (`selection`), and decided by `statistics.decide`: refuted where the 95 % t interval lies below the
smallest effect, else supported where it lies above 0, else undecided. One replicate decides nothing, and nothing is
read from a judge that can't measure (`judging`): its verdicts pull every win rate towards ½. One that measures in part
shows a part of an effect, and so refutes a claim only by an interval below that part of the smallest effect.
"""

import math
from collections import Counter
from dataclasses import dataclass

import pandas as pd

from salsa.evaluate import statistics
from salsa.report import formats, judging, selection, words
from salsa.report.formats import Bold, Number, Table
from salsa.report.frames import BOUNDS

VERDICTS = ("supported", "refuted", "undecided", "not tested")
ORIGINS = {
    "abstract": "What the paper's abstract claims",
    "control": "What would tell an explanation from a coincidence",
}
MEASURES = {  # measure -> (what is compared, its unit)
    "kl_to_sft0": ("KL(policy ‖ sft0) on the development prompts", "nats per response"),
    "stable": ("replicates in which the candidate is stable", "share"),
    "reward": ("proxy reward on a benchmark's responses", "standard deviations on sft0's responses"),
    "gold_reward": ("gold reward on a benchmark's responses", ""),
    "win_rate": ("adjusted win rate of the candidate minus ½", ""),
    "matched_gold": ("gold reward on the development prompts at equal KL to sft0", ""),
    "matched_win_rate": ("win rate against sft0 at equal KL to sft0", ""),
}
JUDGED = ("win_rate", "matched_win_rate")
ON_BENCHMARKS = ("reward", "gold_reward", *JUDGED)  # one test per benchmark, all of which must pass
COLUMNS = ["claim", "origin", "claim_verdict", "text", "measure", "benchmark", "judge", "candidate", "baseline",
           "candidate_kl_coef", "baseline_kl_coef", "how", "effect", "effect_low", "effect_high", "smallest_effect",
           "p", "holm_p", "replicates", "replicates_needed", "verdict", "why"]  # fmt: skip
QUANTITIES = {  # key of evaluation.json -> words
    "gold_reward": "gold reward",
    "reward": "proxy reward",
    "kl_to_sft0": "KL to sft0",
}


@dataclass(frozen=True)
class Test:
    """What one benchmark, or the development prompts, say of a claim.

    Attributes:
        benchmark: "" for the development prompts.
        judge: "" where none was asked.
        effects: replicate -> candidate minus baseline; `stable`: replicate -> whether the candidate is.
        how: in what way the two were compared, where there are several.
        decision: what `statistics.decide` returns.
        refutes: whether it refutes the claim alone: as one of several, its interval has to reach further (Bonferroni).
        lost: how many replicates are left out, as their effect is no finite number.
    """

    benchmark: str
    judge: str
    effects: dict[int, float]
    how: str
    decision: dict
    refutes: bool
    lost: int = 0


class NotTested(Exception):
    """The study lacks what a claim needs; the text says what."""


def frame(study):
    """One row per claim × benchmark; a claim that is not tested has one row, whose `why` says what the study lacks.

    `claim_verdict` is the claim's (the same in each of its rows), `verdict` the row's. `p` is one-sided; `holm_p`
    corrects, over the claims tested, each claim's largest p, since all its benchmarks must pass.
    """
    claims = ordered(study.config.claims)
    rows = [row for name, claim in claims.items() for row in _rows(study, name, claim)]
    result = pd.DataFrame(rows, columns=COLUMNS)
    largest = result.dropna(subset="p").groupby("claim", sort=False)["p"].max()
    result["holm_p"] = result["claim"].map(dict(zip(largest.index, statistics.holm(largest), strict=True)))
    return result.astype({"holm_p": float, "replicates": "Int64", "replicates_needed": "Int64"})


def ordered(claims):
    """The claims: the abstract's come first, then they are ordered by measure, then by name, as a plan sorts them."""
    origins, measures = list(ORIGINS), list(MEASURES)
    return dict(sorted(claims.items(), key=lambda c: (origins.index(c[1].origin), measures.index(c[1].measure))))


def _rows(study, name, claim):
    row = {"claim": name} | {key: getattr(claim, key) for key in ("origin", "text", "measure", "smallest_effect")}
    row |= {"candidate": claim.candidate, "baseline": claim.baseline, "benchmark": "", "judge": ""}
    try:
        pair = compared(study, claim)
        tests = tested(study, claim, pair)
    except NotTested as reason:
        return [row | {"claim_verdict": "not tested", "verdict": "not tested", "why": str(reason)}]
    row |= {"candidate": pair.candidate, "baseline": pair.baseline, "claim_verdict": combined(tests)}
    if not claim.measure.startswith("matched"):  # which is over all of an arm's kl_coefs
        row |= {"candidate_kl_coef": pair.candidate_kl_coef, "baseline_kl_coef": pair.baseline_kl_coef}
    notes = ["one replicate: conditional on one SFT pair"] if len(study.replicates) == 1 else []
    notes += _collapsed(study, claim, pair) + _bounded(study, claim, pair)
    return [row | _columns(test) | {"why": "; ".join(notes + _doubts(test))} for test in tests]


def _collapsed(study, claim, pair):
    """Notes for the reader of a claim: which of the policies that it compares have collapsed, and how."""
    sides = [(pair.candidate, pair.candidate_kl_coef), (pair.baseline, pair.baseline_kl_coef)]
    notes, matched = [], claim.measure.startswith("matched")
    for arm, kl_coef in sides[:1] if claim.measure == "stable" else sides:
        policies = [p for p in study.of(arm=arm) if matched or p.kl_coef == kl_coef]
        reasons = [reason for reason in (selection.collapse(study, p) for p in policies) if reason]
        if reasons:
            notes.append(
                f"{arm} has collapsed in {len(reasons)} of its {len(policies)} policies compared here: {reasons[0]}"
            )
    return notes


def _bounded(study, claim, pair):
    """Notes on the arms of a claim about KL whose KL is an upper bound."""
    about_kl = claim.measure == "kl_to_sft0" or claim.measure.startswith("matched")
    arms = [arm for arm in (pair.candidate, pair.baseline) if about_kl and selection.kl_bounded(study, arm)]
    return [f"KL of {arm} is an upper bound" for arm in arms]


def _doubts(test):
    """Doubts about the verdict of a test that its numbers alone don't show."""
    doubts, replicates = [], test.decision["replicates"]
    if test.lost:
        doubts.append(f"{test.lost} of {test.lost + replicates} replicates have no finite number")
    if replicates > 1 and math.isnan(test.decision["low"]) and not math.isnan(test.decision["p"]):
        doubts.append(f"the {replicates} replicates are equal, so that there is no interval")
    return doubts


def _columns(test):
    columns = {"benchmark": test.benchmark, "judge": test.judge, "how": test.how}
    columns |= {name: test.decision[name] for name in ("p", "replicates", "replicates_needed", "verdict")}
    return columns | {f"effect{bound}": test.decision[bound[1:] or "mean"] for bound in BOUNDS}


def compared(study, claim):
    """The claim's two arms, each at its chosen kl_coef. NotTested: an arm or a common kl_coef is missing."""
    arms = [selection.arm_of(study, getattr(claim, role)) for role in ("candidate", "baseline")]
    missing = [getattr(claim, role) for role, arm in zip(("candidate", "baseline"), arms, strict=True) if arm is None]
    if missing:
        raise NotTested("this study has no arm " + " and no arm ".join(missing))
    if arms[0] == arms[1]:
        raise NotTested(f"{claim.candidate} and {claim.baseline} are one arm in this study")
    pair = selection.pair(study, *arms)
    if pair is None:
        raise NotTested(f"{arms[0]} and {arms[1]} were run at no common kl_coef")
    return pair


def tested(study, claim, pair):
    """A `Test` for each benchmark that must pass, or one on the development prompts. NotTested: data are missing."""
    measure = claim.measure
    benchmarks = [""]
    if measure in ON_BENCHMARKS:
        benchmarks = claim.benchmarks or study.compared
        missing = [name for name in benchmarks if name not in study.benchmarks]
        if missing or not benchmarks:
            raise NotTested(f"this study has no benchmark {missing[0]}" if missing else "this study has no benchmark")
    judge = selection.main_judge(study) if measure in JUDGED else ""
    if judge is None:
        raise NotTested("this study has no judge")
    tests = []
    for benchmark in benchmarks:
        seen = _seen(study, claim, judge, benchmark) if judge else 1.0
        effects, how = effects_of(study, measure, pair, judge, benchmark)
        if not effects:
            raise NotTested(_lacking(study, measure, pair, benchmark))
        lost = sum(not math.isfinite(effect) for effect in effects.values())
        if lost == len(effects):
            raise NotTested("no replicate has a finite number to compare")
        if seen < 1:
            how += f"; judge {judge} shows {selection.number(100 * seen)} % of an effect at least"
        tests.append(Test(benchmark, judge, effects, how, *_decided(claim, effects, len(benchmarks), seen), lost))
    return tests


def _seen(study, claim, judge, benchmark):
    """The share of an effect that a judge shows at least. NotTested: it can't measure the smallest effect."""
    quality = judging.quality(study, judge, benchmark)
    if quality.reason:
        everywhere = judging.quality(study, judge).reason
        raise NotTested(quality.reason if everywhere else f"on {benchmark}, {quality.reason}")
    if quality.row["verdicts"] and quality.seen / 2 < claim.smallest_effect:
        raise NotTested(
            f"judge {judge} can't show an effect of {claim.smallest_effect:g} on {benchmark}: even a model that is "
            f"always better need not win by more than {selection.number(quality.seen / 2)}"
        )
    return quality.seen


def _decided(claim, effects, tests, seen=1.0):
    """What `statistics.decide` finds, and whether that refutes a claim of so many tests, at 95 % for all together.

    `seen`: the share of a true effect that shows in these, at least; so much of the smallest effect has to be excluded.
    """
    if claim.measure == "stable":
        decision = _stable(effects)
        return decision, decision["verdict"] == "refuted"
    values, smallest = list(effects.values()), claim.smallest_effect * seen
    strict = statistics.decide(values, smallest, level=1 - 0.05 / tests)
    return statistics.decide(values, smallest), strict["verdict"] == "refuted"


def effects_of(study, measure, pair, judge, benchmark):
    """(replicate -> candidate minus baseline, how they were compared), see MEASURES; empty where data are missing."""
    if measure == "win_rate":
        return selection.preference(study, pair, judge, benchmark)
    if measure in ("matched_gold", "matched_win_rate"):
        gold = measure == "matched_gold"
        values = selection.gold_of(study) if gold else selection.rate_of(study, judge, [benchmark])
        return selection.matched(study, pair.candidate, pair.baseline, values), "where both reach the same KL"
    if measure == "stable":
        policies = study.of(arm=pair.candidate, kl_coef=pair.candidate_kl_coef)
        return selection.over_seeds(policies, lambda policy: selection.stable(study, policy)), ""
    sides = ((pair.candidate, pair.candidate_kl_coef), (pair.baseline, pair.baseline_kl_coef))
    if measure == "kl_to_sft0":
        first, second = (selection.evaluated(study, arm, kl_coef, measure) for arm, kl_coef in sides)
    else:
        name = measure.removesuffix("_reward")  # gold, reward: as responses call them
        first, second = (selection.benchmark_means(study, arm, kl_coef, name, benchmark) for arm, kl_coef in sides)
    return selection.by_replicate(first, second), ""


def _stable(effects):
    """As `statistics.decide`, without a test: supported where all replicates are stable, refuted where most are not."""
    share, count = sum(effects.values()) / len(effects), len(effects)
    verdict = "undecided" if count < 2 else "supported" if share == 1 else "refuted" if share < 0.5 else "undecided"
    untested = {"low": math.nan, "high": math.nan, "p": math.nan, "replicates_needed": None}
    return untested | {"mean": share, "replicates": count, "verdict": verdict}


def _lacking(study, measure, pair, benchmark):
    if measure.startswith("matched"):
        if min(len(selection.grid(study, arm)) for arm in (pair.candidate, pair.baseline)) < 2:
            return "a comparison at equal KL needs two kl_coefs of each arm"
        if measure == "matched_gold" and selection.measured_by(study) != "gold_reward":
            return "this data has no gold reward"
        return "in no replicate do the two arms reach the same KL"
    if measure == "gold_reward":
        return "this data has no gold reward"
    if measure == "stable":
        return "nothing is known of the responses of sft0, nor of gold"
    if measure == "win_rate":
        return f"no verdict on {benchmark} compares {pair.candidate} and {pair.baseline}, or both with a third model"
    return "the two arms have no replicate in common"


def combined(tests):
    """The verdict of a claim of which all tests must pass: refuted by one, supported by all, else undecided."""
    if any(test.refutes for test in tests):
        return "refuted"
    return "supported" if {test.decision["verdict"] for test in tests} == {"supported"} else "undecided"


def text(study, claims, win_rates):
    """The whole of claims.md.

    Args:
        claims: what `frame` returns.
        win_rates: the table of win rates.
    """
    return words.template("claims.md.jinja", autoescape=False).render(
        summary=summary(study, claims),
        warnings=warnings(study),
        replicates=len(study.replicates),
        origins=hypotheses(study, claims),
        numbers={origin: numbers(tested_rows(claims[claims["origin"] == origin])) for origin in ORIGINS},
        titles=ORIGINS,
        baseline=study.plain,
        differences=differences(study),
        signs=signs(win_rates, {*study.plain_arms.values()}),
        markdown=formats.markdown,
    )


def warnings(study):
    """Sentences that a reader of any table needs: judges that can't measure, and policies that have collapsed."""
    return judging.unfit(study) + collapses(study)


def collapses(study):
    """A sentence for each arm and kl_coef of which a policy has collapsed, with the first one's numbers."""
    sentences = []
    for (arm, kl_coef), policies in study.groups().items():
        reasons = [reason for reason in (selection.collapse(study, policy) for policy in policies) if reason]
        if reasons:
            count = f"{len(reasons)} of {len(policies)} replicates"
            sentences.append(f"{arm} at kl_coef {kl_coef:g} collapsed in {count}: {reasons[0]}")
    return sentences


def summary(study, claims):
    """One paragraph that counts the verdicts and says how many replicates they rest on."""
    if claims.empty:
        return "This study makes no claims."
    verdicts = claims.drop_duplicates("claim").set_index("claim")["claim_verdict"]
    counts = Counter(verdicts)
    names = {verdict: ", ".join(verdicts.index[verdicts == verdict]) for verdict in VERDICTS}
    parts = [f"{counts[verdict]} {verdict}" + (f" ({some})" if some else "") for verdict, some in names.items()]
    text = f"Of {len(verdicts)} claims: {'; '.join(parts)}. "
    count = len(study.replicates)
    if counts["not tested"] == len(verdicts):
        return text + "No claim can be tested here."
    if count == 1:
        return text + "One replicate tells nothing of other SFT pairs, so nothing is decided."
    kept = claims[(claims["claim_verdict"] == "supported") & (claims["holm_p"] < 0.025)]["claim"].nunique()
    return text + (
        f"The tests rest on {count} replicates, each with its own SFT models, reward model and training seed; {kept} "
        "of the supported keep a p below 0.025 after Holm's correction."
    )


@dataclass(frozen=True)
class Hypothesis:
    """A claim in words: what was supposed, the verdict, and what stands after it, joined by `joint`."""

    name: str
    text: str
    verdict: str
    joint: str
    because: str


def hypotheses(study, claims):
    """origin -> the `Hypothesis` of each of its claims; an origin without claims is left out."""
    by_origin = {}
    for (origin, name), rows in claims.groupby(["origin", "claim"], sort=False):
        claim = study.config.claims[name]
        verdict = Hypothesis(name, claim.text, rows["claim_verdict"].iloc[0], *because(claim, rows))
        by_origin.setdefault(origin, []).append(verdict)
    return by_origin


def tested_rows(frame):
    return frame[frame["claim_verdict"] != "not tested"]


def because(claim, rows):
    """(how it is joined to the verdict, what the verdict means, what would decide it, or what is missing)."""
    row, notes = rows.iloc[0], "; ".join(dict.fromkeys(note for note in rows["why"] if note))
    if row["claim_verdict"] == "not tested":
        return " here: ", row["why"]
    if row["claim_verdict"] == "refuted" and claim.meaning:
        return ": ", claim.meaning + (f"; but {notes}" if notes else "")
    if row["claim_verdict"] in ("refuted", "supported"):
        return ("; ", f"but {notes}") if notes else ("", "")
    if notes:
        return "; ", notes
    if claim.measure == "stable":
        return ": ", f"stable in {round(row['effect'] * row['replicates'])} of {row['replicates']} replicates"
    needed = rows[rows["verdict"] == "undecided"]["replicates_needed"]
    if needed.empty:
        return ": ", "what one benchmark alone refutes is not enough for several"
    more = f"about {needed.max()} would decide" if needed.notna().all() else "no feasible number would decide"
    return " ", f"with {row['replicates']} replicates; {more}, if effect and spread stay as they are"


def numbers(claims):
    """The table that readers see of tested claims."""
    rows = []
    for row in claims.to_dict("records"):
        measured, unit = MEASURES[row["measure"]]
        by = f", judge {row['judge']}" if row["judge"] else ""
        how = f" ({row['how']})" if row["how"] else ""
        sides = [_at(row, "candidate")] + ([_at(row, "baseline")] if row["measure"] != "stable" else [])
        rows.append(
            {
                "claim": row["claim"],
                "arms, at their kl_coef": " − ".join(sides),
                "of": measured + how + (f": {row['benchmark']}{by}" if row["benchmark"] else ""),
                "effect": formats.number(row["effect"], row["effect_low"], row["effect_high"]),
                "unit": unit,
                "would matter": formats.number(row["smallest_effect"]) if row["measure"] != "stable" else "",
                "p": formats.number(row["p"]),
                "Holm's p": formats.number(row["holm_p"]),
                "n": formats.number(row["replicates"]),
                "verdict": row["verdict"],
            }
        )
    return Table(list(rows[0]) if rows else [], [list(row.values()) for row in rows])


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
            row[f"win rate minus ½, {benchmark}"] = _difference(effects)
        rows.append(row)
    return Table.of({name: [row[name] for row in rows] for name in (rows[0] if rows else ())})


def _difference(effects):
    decision = statistics.decide(list(effects.values()), 0)  # whose bounds are nan where there is no spread
    mean, low, high = (decision[name] for name in ("mean", "low", "high"))
    cell = formats.number(mean if abs(mean) > statistics.SAME else 0.0, low, high)
    return Bold(cell) if low > 0 or high < 0 else cell


def signs(win_rates, plain):
    """(how many sign tests against plain anchors stay below 0.05 after Holm's correction, of how many)."""
    rows = win_rates[win_rates["baseline"].isin(plain)]
    return int((rows["holm_p"] < 0.05).sum()), len(rows)
