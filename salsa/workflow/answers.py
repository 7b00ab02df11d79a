"""What a finished study has found, in a few lines for a terminal: its verdicts, SALSA against plain PPO, rewards.

All is read from the study's own tables, so that a study that was made or published before says it, too. Where there is
no difference with an interval (one replicate, or a single arm), the rewards and KL of each arm are shown instead.
"""

import csv
import math
import re
import textwrap
from collections import Counter
from pathlib import Path

from salsa.workflow.bounds import printable

CLAIMS, REWARDS = "tables/claims.csv", "tables/rewards.csv"
NOT_TESTED, UNDECIDED = "not tested", "undecided"  # words of salsa.evaluate.decisions, which imports SciPy
ORDER = ("supported", "too small", "excluded", "reversed")  # then those of earlier versions, then undecided
POSITIVE_CONTROL = "positive_control"
PAIR = ("salsa", "ppo")
DIFFERENCE = " − ".join(PAIR)
GOLD = ("gold_reward",)
PROXY = ("training_reward", "reward")
KL = ("training_kl_to_sft0", "kl_to_sft0")
UNITS = {**dict.fromkeys(GOLD, "gold"), **dict.fromkeys(PROXY, "proxy"), **dict.fromkeys(KL, "KL")}
LONGEST = 2  # lines of a verdict's claims in words; above, their names are listed
MOST_ROWS = 7  # of the table of rewards
WIDTH = 80
TOGETHER = "\xa0"  # a space at which no line is broken


def lines(folder, width=WIDTH):
    """What the study in a folder has found, each line at most `width` characters long; none where it has no tables."""
    rewards = _rows(Path(folder) / REWARDS)
    claims = [row for row in _rows(Path(folder) / CLAIMS) if row.get("outcome", "primary") == "primary"]
    tested = [row for row in claims if _verdict(row) != NOT_TESTED]
    if any(math.isfinite(_number(row, "effect_low")) for row in tested):
        said = [*_verdicts(tested, width), *_difference(claims, rewards, width)]
    else:
        said = [*_undecided(claims, tested, width), *_difference(claims, rewards, width), *_table(rewards, width)]
    return [printable(line) for line in said]


def short(folder):
    """The difference between SALSA and plain PPO alone, in one line; None where the study has not both."""
    return next((line for line in lines(folder, width=10**6) if line.startswith(DIFFERENCE)), None)


def _rows(path):
    """The rows of a CSV as dictionaries of text; none where the file isn't there."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return list(csv.DictReader(file))


def _undecided(claims, tested, width):
    """Why no claim has an interval, in a line; nothing of a study that states none."""
    if not claims:
        return []
    single = tested and all(_number(row, "replicates") <= 1 for row in tested)
    why = "one replicate tells nothing of other SFT models" if single else "see claims.md for what they lack"
    return _wrapped(f"none of {len(claims)} claims is decided: {why}", width)


def _verdicts(tested, width):
    """How many claims have which verdict, then those of each verdict; what is undecided comes last."""
    counts = Counter(_verdict(row) for row in tested)
    order = [*ORDER, *sorted(counts.keys() - {*ORDER, UNDECIDED}), UNDECIDED]
    order = [verdict for verdict in order if verdict in counts]
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in order)
    together = " (all at once with 95 %)" if len(tested) > 1 and "level" in tested[0] else ""
    said = _wrapped(f"{len(tested)} claim{'s' * (len(tested) != 1)} tested: {summary}{together}", width)
    for verdict in order:
        said += _claims_of([row for row in tested if _verdict(row) == verdict], verdict, width)
    return said


def _claims_of(rows, verdict, width):
    """The claims that have a verdict: as the configuration words them if that is short, else by their names."""
    texts = _wrapped(f"{verdict}: {'; '.join(map(_text, rows))}", width)
    return texts if len(texts) <= LONGEST else _wrapped(f"{verdict}: {', '.join(map(_name, rows))}", width)


def _verdict(row):
    return row.get("claim_verdict") or row.get("verdict") or NOT_TESTED


def _text(row):
    """A claim's text; its name where the text goes on from that of another claim."""
    text = row.get("text") or ""
    return _name(row) if not text or text.startswith("and ") else text + _mark(row)


def _name(row):
    return re.sub(r"\bkl\b", "KL", (row.get("claim") or "").replace("_", " ")) + _mark(row)


def _mark(row):
    return " (the positive control)" if row.get("origin") == POSITIVE_CONTROL else ""


def _difference(claims, rewards, width):
    """SALSA minus plain PPO in gold (without gold, in the proxy's reward) and in KL from sft0."""
    of_pair = [row for row in claims if (row.get("candidate"), row.get("baseline")) == PAIR]
    gold = _first(of_pair, GOLD) or _first(of_pair, PROXY)
    effects = [row for row in (gold, _first(of_pair, KL)) if row]
    if effects:
        kl_coef = f" (kl_coef {_number(effects[0], 'candidate_kl_coef'):g})"
        words = ", ".join(f"{UNITS[row['measure']]} {_effect(row)}" for row in effects)
    else:
        kl_coef, words = _means(rewards)
    return _wrapped(f"{DIFFERENCE}{kl_coef}: {words}", width) if words else []


def _first(rows, measures):
    """The first row of one of the measures that has an effect."""
    fitting = (row for row in rows if row.get("measure") in measures)
    return next((row for row in fitting if math.isfinite(_number(row, "effect"))), None)


def _effect(row):
    """An effect with its sign, and with its interval where it has one."""
    low, high = _number(row, "effect_low"), _number(row, "effect_high")
    interval = f" [{low:.2g}, {high:.2g}]".replace(" ", TOGETHER) if math.isfinite(low) and math.isfinite(high) else ""
    return f"{_number(row, 'effect'):+.2g}{interval}"


def _means(rewards):
    """(at which kl_coef, the difference of the arms' means) from the table of rewards, at a kl_coef of both arms."""
    rows = {(row.get("arm"), row.get("kl_coef")): row for row in rewards}
    for (arm, kl_coef), row in rows.items():
        other = rows.get((PAIR[1], kl_coef))
        if arm == PAIR[0] and other:
            names = {"gold_reward": "gold", "reward": "proxy", "kl_to_sft0": "KL"}
            effects = {word: _number(row, name) - _number(other, name) for name, word in names.items()}
            words = ", ".join(f"{word} {effect:+.2g}" for word, effect in effects.items() if math.isfinite(effect))
            return f" (kl_coef {kl_coef})", words
    return "", ""


def _table(rewards, width):
    """The rewards and KL of each arm, as columns of text."""
    columns = {"arm": "arm", "kl_coef": "kl_coef", "reward": "proxy", "gold_reward": "gold", "kl_to_sft0": "KL to sft0"}
    cells = [[_cell(row, name) for name in columns] for row in rewards[:MOST_ROWS]]
    kept = [place for place, _ in enumerate(columns) if any(row[place] for row in cells)]
    table = [[row[place] for place in kept] for row in ([*columns.values()], *cells)] if cells else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    said = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in table]
    left = len(rewards) - MOST_ROWS
    return [line[:width] for line in said] + ([f"and {left} more in tables/rewards.md"] if left > 0 else [])


def _cell(row, name):
    value = _number(row, name)
    return (row.get(name) or "") if name in ("arm", "kl_coef") else f"{value:.3g}" if math.isfinite(value) else ""


def _number(row, name):
    try:
        return float(row.get(name) or "nan")
    except ValueError:
        return math.nan


def _wrapped(text, width):
    broken = textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line.replace(TOGETHER, " ") for line in broken]
