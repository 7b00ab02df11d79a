"""Gold as the judge: the score that training never sees, which each response carries (salsa/data/gold.py)."""

from salsa.judges import Judge
from salsa.judges.common.scoring import ScoringJudge, ScoringSettings, response_name
from salsa.workflow.messages import UserError


def gold(row):
    """The gold score of a row of responses.jsonl. UserError where it has none."""
    score, name = row.get("gold"), response_name(row)
    if score is None:
        raise UserError(f"judge gold: {name} has no gold score; this data has no gold judge: choose another")
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise UserError(f"judge gold: {name} has the gold score {score!r}, which is no number; mend it")
    return score


def _open(settings, parents, output, execution, comparisons):
    return ScoringJudge(lambda rows: map(gold, rows), settings.judge.tie_margin)


JUDGE = Judge(
    kind="gold",
    open=_open,
    settings=ScoringSettings,
    fits=lambda world: world.gold is not None,
    rank=0,
    is_gold=True,
    scores_alone=True,
    sees=lambda world: "its verdicts are scores that come with the data, the truth that other judges are held to",
)
