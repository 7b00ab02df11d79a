"""What the first screen of a page says: the answer to the study's question, in one sentence, and what it took.

Every number is one of the study's tables or of its runs' manifests. Verdicts on single claims are told by
`conclusions`, settings by `words`.
"""

from collections import Counter
from datetime import UTC, datetime, timedelta

from salsa.evaluate import decisions
from salsa.report import claims, conclusions, formats, outcomes, selection, words
from salsa.report.frames import BOUNDS

TIME = "%Y-%m-%dT%H:%M:%SZ"  # as manifests have it
MAIN = ("gold_reward", "win_rate", "training_reward", "reward")  # what an anchor is chosen for, in this order
KL = ("training_kl_to_sft0", "kl_to_sft0")
OPENINGS = {  # verdict on the first of MAIN that an abstract's claim is about
    decisions.SUPPORTED: "The other anchor does better",
    decisions.TOO_SMALL: "The other anchor does better, by less than would matter",
    decisions.EXCLUDED: "The other anchor does not do better by what would matter",
    decisions.REVERSED: "The other anchor does worse",
    decisions.UNDECIDED: "This study does not decide it",
}
FEW_COMMITS = 3  # that a reader sees


def answer(study, tables):
    """The answer to `words.QUESTION`, with numbers and intervals: a sentence, or two."""
    rows = claims.primary_rows(claims.tested_rows(tables["claims"]))
    rows = rows[rows["origin"] == "abstract"].to_dict("records")
    main = _first(rows, MAIN)
    if main is None:
        return means(study, tables)
    sentence = f"{OPENINGS[main['verdict']]}: {_difference(tables, main)}"
    kl = _first([row for row in rows if _arms(row) == _arms(main)], KL)
    if kl is not None:
        sentence += f"; {outcomes.SHORT[kl['measure']]} differs by {conclusions.effect_words(kl)}"
    return f"{sentence}; over {words.replicates(study)}{_no_interval(study)}."


def _first(rows, measures):
    """The first row that is about one of these measures, in their order; None where none is."""
    return next((row for measure in measures for row in rows if row["measure"] == measure), None)


def _arms(row):
    return row["candidate"], row["baseline"]


def _difference(tables, row):
    """A claim's effect, and what its two arms are anchored to."""
    references = tables["arms"].set_index("arm")["reference"]
    candidate, baseline = (f"{arm} (anchored to {references[arm]})" for arm in _arms(row))
    kl_coef = row["candidate_kl_coef"]
    at = f" at kl_coef {kl_coef:g}" if kl_coef == row["baseline_kl_coef"] else ""
    matters = f", where {formats.number(row['smallest_effect'])} would matter" if row["smallest_effect_shown"] else ""
    what = outcomes.SHORT[row["measure"]] + " minus ½" * (row["measure"] == "win_rate")
    between = "against" if row["measure"] == "win_rate" else "minus that of"
    return f"the {what} of {candidate} {between} {baseline}{at} is {conclusions.effect_words(row)}{matters}"


def _no_interval(study):
    return ", which tells nothing of other SFT pairs" if len(study.replicates) == 1 else ""


def means(study, tables):
    """Rewards and KL of each arm, where no claim of the abstract is tested: a sentence."""
    claimed = [(arm, selection.of_claims(study, arm)) for arm in study.arms]
    rows = tables["rewards"].to_dict("records")
    parts = [_means_of(row) for row in rows if (row["arm"], row["kl_coef"]) in claimed]
    parts = [part for part in parts if part]
    if not parts:
        return "Nothing of what would answer it was measured here."
    return f"No claim of the abstract is tested here. Means over {words.replicates(study)}: {'; '.join(parts)}."


def _means_of(row):
    """What was measured of an arm: gold, else proxy reward, and KL to sft0, with their intervals."""
    names = {"gold_reward": "gold reward", "reward": "proxy reward", "kl_to_sft0": "KL to sft0"}
    measured = [name for name in names if row[name] == row[name]]
    if "gold_reward" in measured:
        measured.remove("reward")
    triples = {name: [row[name + bound] for bound in BOUNDS] for name in measured}
    numbers = [f"{names[name]} {formats.number(*triple)}" for name, triple in triples.items()]
    return f"{row['arm']} (kl_coef {row['kl_coef']:g}) {', '.join(numbers)}" if numbers else ""


# What it took.


def facts(study):
    """When the study's runs ran, how long, what they cost, and by which code: name -> text."""
    spans = [_span(row) for row in study.runs if row["started"] and row["wall_seconds"] is not None]
    texts = {"date": _dates(spans), "duration": _duration(spans), "cost": _cost(study.runs)}
    return {name: text for name, text in texts.items() if text} | {"code": _commits(study.runs)}


def _span(row):
    started = datetime.strptime(row["started"], TIME).replace(tzinfo=UTC)
    return started, started + timedelta(seconds=row["wall_seconds"])


def _dates(spans):
    """From when to when, in UTC."""
    if not spans:
        return ""
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {end} UTC"


def busy(spans):
    """The seconds in which at least one of some spans of time (start, end) was under way."""
    seconds, reached = 0.0, None
    for start, end in sorted(spans):
        begins = start if reached is None else max(start, reached)
        seconds += max(0.0, (end - begins).total_seconds())
        reached = end if reached is None else max(end, reached)
    return seconds


def _duration(spans):
    return f"{lasting(busy(spans))} in which at least one run was under way" if spans else ""


def lasting(seconds):
    """A time in words: 48 s, 12.1 minutes, 3.4 hours."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} minutes" if seconds < 3600 else f"{seconds / 3600:.3g} hours"


def _cost(rows):
    """Core-minutes, and minutes of GPUs, of all runs, those that other studies share among them."""
    known = [row for row in rows if row["wall_seconds"] is not None]
    if not known:
        return ""
    cores, gpus = (sum(row["wall_seconds"] * row[unit] for row in known) / 60 for unit in ("cores", "gpus"))
    minutes = f"{cores:,.4g} core-minutes" + (f" and {gpus:,.4g} GPU-minutes" if gpus else "")
    more = f", and of {len(rows) - len(known)} more it is not known" * (len(known) < len(rows))
    return f"{minutes} (wall time × threads) of {len(known)} runs{more}"


def _commits(rows):
    """The commits by whose code the runs were made, the most frequent first."""
    counts = Counter(row["git_commit"] for row in rows if row["git_commit"])
    if not counts:
        return "the commit is not known"
    names = [commit[:12] + " with changes" * commit.endswith("-dirty") for commit, _ in counts.most_common(FEW_COMMITS)]
    more = len(counts) - len(names)
    return f"commit{'s' * (len(counts) > 1)} {', '.join(names)}" + f" and {more} more" * bool(more)
