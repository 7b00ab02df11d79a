"""Judges that score each response by itself and prefer the higher score.

They can't prefer a place; both orders are judged all the same, so that every judge's verdicts have one form.
"""

import math
from typing import Annotated

from salsa.workflow import schema
from salsa.workflow.messages import UserError


@schema.dataclass()
class ScoringSettings:
    """What judges that score have in common."""

    tie_margin: Annotated[float, schema.Range(0, 10**6), schema.ALWAYS] = 0.0
    """A difference up to this is a tie."""


class ScoringJudge:
    """Prefers the response with the higher score.

    Args:
        scores: rows of responses.jsonl -> their scores.
        tie_margin: scores no further apart than this are a tie.
    """

    def __init__(self, scores, tie_margin):
        self.scores, self.tie_margin = scores, tie_margin

    def verdicts(self, comparisons):
        rows = [row for both in comparisons for row in (both.row_a, both.row_b)]
        scores = list(self.scores(rows))
        for row, score in zip(rows, scores, strict=True):  # all, before the first verdict is kept
            if not math.isfinite(score):
                raise UserError(f"{response_name(row)} scores {score}, which can't be compared; mend what scores it")
        for comparison, score_a, score_b in zip(comparisons, scores[::2], scores[1::2], strict=True):
            yield comparison, {"winner": winner(score_a, score_b, self.tie_margin)}

    def finish(self):
        return {}


def winner(score_a, score_b, tie_margin=0.0):
    """ "model_a" or "model_b", whichever scores higher, or "tie" for a difference of at most `tie_margin`."""
    if abs(score_a - score_b) <= tie_margin:
        return "tie"
    return "model_a" if score_a > score_b else "model_b"


def response_name(row):
    """Words for a response in a message."""
    sample = f" (sample {row['sample']})" if row.get("sample") else ""
    return f"the response of {row['model']} to {row['benchmark']}/{row['prompt_id']}{sample}"
