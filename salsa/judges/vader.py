"""A lexicon as the judge: the compound sentiment of each response (VADER; Hutto & Gilbert, ICWSM 2014)."""

import functools
import importlib.util

from salsa.judges import Judge
from salsa.judges.common.scoring import ScoringJudge, ScoringSettings
from salsa.workflow.messages import UserError


def _check_access(judge, execution=None):
    if importlib.util.find_spec("vaderSentiment") is None:
        raise UserError("judge vader: not installed; run `pip install vaderSentiment`")


def _open(settings, parents, output, execution, comparisons):
    _check_access(settings.judge)
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    compound = functools.cache(lambda text: analyser.polarity_scores(text)["compound"])

    def mean_over_turns(row):
        return sum(map(compound, row["responses"])) / len(row["responses"])

    return ScoringJudge(lambda rows: map(mean_over_turns, rows), settings.judge.tie_margin)


JUDGE = Judge(
    kind="vader",
    open=_open,
    settings=ScoringSettings,
    fits=lambda world: world.kind == "reviews",
    rank=3,
    scores_alone=True,
    check_access=_check_access,
    sees=lambda world: ("ill_mannered",),  # it reads how pleasant words are, and nothing else
)
