"""Benchmarks that are scored and not compared, in the study's tables."""

import math

import pytest
from tree import Tree

from salsa.report import claims, sections, study


class Scored(Tree):
    """A tree whose second benchmark scores answers: sft's models all 0, a policy's by its arm and replicate."""

    def rows(self, model, reward, gold, text):
        made = super().rows(model, reward, gold, text)
        for row in made:
            if row["benchmark"] == "sums":
                right = reward > 0 and int(row["prompt_id"].split("-")[1]) % 2 == 0
                row |= {"scores": {"exact": float(right)}, "compared": False}
        return made

    def verdicts(self, *judged):
        return [row for row in super().verdicts(*judged) if row["benchmark"] != "sums"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    tree = Scored(tmp_path_factory.mktemp("scores"), benchmarks=("in_distribution", "sums"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "gold_judge", lambda prepare: None)
        return study.read(tree.settings, tree.parents)


def test_scores_are_means_over_prompts_and_replicates(found):
    frame = sections.tables_of(found)["scores"]
    assert set(frame["benchmark"]) == {"sums"} and set(frame["measure"]) == {"exact"}
    assert list(frame["arm"]) == ["sft0", "sft1", "soup", *found.arms]
    assert (frame["prompts"] == 12).all() and (frame["replicates"] == 2).all()
    means = dict(zip(frame["arm"], frame["score"], strict=True))
    assert means["sft0"] == 0 and means["salsa"] == 0.5
    assert frame["kl_coef"][0] != frame["kl_coef"][0] and frame["kl_coef"][3] == 0.05


def test_what_is_scored_alone_is_no_part_of_claims(found):
    assert found.benchmarks == ["in_distribution", "sums"] and found.compared == ["in_distribution"]
    tested = claims.frame(found)
    assert "sums" not in set(tested["benchmark"]) and "in_distribution" in set(tested["benchmark"])
    assert math.isfinite(sections.tables_of(found)["win_rates"]["adjusted_win_rate"].iloc[0])
