"""What the first screen of a page says: the answer, the effects of claims, and what the study took."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
from tree import Tree

from salsa.evaluate import decisions
from salsa.report import opening, pages, provenance, sections, study
from salsa.workflow import runs


def row(claim="higher_gold", measure="gold_reward", verdict="undecided", **changes):
    """A claim's row, as far as an answer reads it."""
    return {"claim": claim, "measure": measure, "verdict": verdict, "claim_verdict": verdict, "origin": "abstract",
            "outcome": "primary", "candidate": "salsa", "baseline": "ppo", "candidate_kl_coef": 0.3,
            "baseline_kl_coef": 0.3, "effect": 0.01, "effect_low": -0.05, "effect_high": 0.07, "smallest_effect": 0.02,
            "smallest_effect_shown": 0.02} | changes  # fmt: skip


ARMS = pd.DataFrame({"arm": ["ppo", "salsa"], "reference": ["sft0", "1/2 sft0 + 1/2 sft1"]})


def answer(*rows, replicates=(0, 1, 2)):
    return opening.answer(SimpleNamespace(replicates=replicates), {"claims": pd.DataFrame(rows), "arms": ARMS})


def test_the_answer_has_the_effects_their_intervals_and_both_anchors():
    kl = row("larger_kl", "training_kl_to_sft0", "supported", effect=1.0, effect_low=0.1, effect_high=1.9)
    control = row("seen", origin="positive_control", effect=9.0)
    assert answer(control, kl, row("preferred", "win_rate"), row()) == (
        "This study does not decide it: the gold reward of salsa (anchored to 1/2 sft0 + 1/2 sft1) minus that of ppo "
        "(anchored to sft0) at kl_coef 0.3 is 0.01 (-0.05 to 0.07), where 0.02 would matter; KL to sft0 in training "
        "differs by 1 (0.1 to 1.9) nats per response; over 3 replicates."
    )


@pytest.mark.parametrize("verdict", [word for word in decisions.WORDS if word != decisions.NOT_TESTED])
def test_every_verdict_has_an_answer_of_its_own(verdict):
    says = answer(row(verdict=verdict))
    assert says.startswith(opening.OPENINGS[verdict] + ": ")
    assert len(set(opening.OPENINGS.values())) == len(decisions.WORDS) - 1


def test_without_gold_win_rates_answer_and_are_never_beyond_their_ends():
    says = answer(row("preferred", "win_rate", effect=0.4, effect_low=-0.1, effect_high=0.9), replicates=(0,))
    assert "the win rate minus ½ of salsa (anchored to 1/2 sft0 + 1/2 sft1) against ppo" in says
    assert "is 0.4 (-0.1 to 0.5)" in says and says.endswith("1 replicate, which tells nothing of other SFT pairs.")


def test_where_no_claim_is_tested_rewards_and_kl_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    tree = Tree(tmp_path, replicates=(0,), arms={"ppo": "0"}, gold=False)
    found = study.read(tree.settings, tree.parents)
    tables = sections.tables_of(found)
    assert opening.answer(found, tables) == (
        "No claim of the abstract is tested here. Means over 1 replicate: ppo (kl_coef 0.05) proxy reward 1, KL to "
        "sft0 3."
    )
    rewards = tables["rewards"].assign(reward=math.nan, kl_to_sft0=math.nan)
    assert "Nothing of what would answer it" in opening.answer(found, tables | {"rewards": rewards})


# What a study took.


def ran(started, seconds, cores=1, gpus=0, commit="a" * 40):
    return {"started": started, "wall_seconds": seconds, "cores": cores, "gpus": gpus, "git_commit": commit}


def facts(*rows):
    return opening.facts(SimpleNamespace(runs=rows))


def test_date_duration_and_cost_of_runs_side_by_side_and_of_a_break():
    rows = [ran("2026-11-27T05:00:00Z", 600, cores=2), ran("2026-11-27T05:05:00Z", 600),
            ran("2026-11-28T01:00:00Z", 60, cores=4, gpus=4, commit="b" * 40 + "-dirty")]  # fmt: skip
    assert facts(*rows) == {
        "date": "2026-11-27 05:00 to 2026-11-28 01:01 UTC",
        "duration": "16 minutes in which at least one run was under way",
        "cost": "34 core-minutes and 4 GPU-minutes (wall time × threads) of 3 runs",
        "code": "commits aaaaaaaaaaaa, bbbbbbbbbbbb with changes",
    }
    unknown = facts(ran("2026-11-27T05:00:00Z", 30), ran(None, None, commit=None))
    assert unknown["date"] == "2026-11-27 05:00 to 05:00 UTC" and unknown["duration"].startswith("30 s in which")
    assert unknown["cost"] == "0.5 core-minutes (wall time × threads) of 1 runs, and of 1 more it is not known"
    assert facts(ran(None, None, commit=None)) == {"code": "the commit is not known"}


@pytest.mark.parametrize(
    "spans", [[(0, 5)], [(0, 5), (1, 2)], [(3, 4), (0, 1)], [(0, 5), (1, 2), (4, 9), (20, 21)], []]
)
def test_busy_time_counts_each_second_once(spans):
    times = [[pd.Timestamp(end, unit="s") for end in span] for span in spans]
    assert opening.busy(times) == len({second for start, end in spans for second in range(start, end)})


@pytest.mark.parametrize(("seconds", "says"), [(48, "48 s"), (726, "12.1 minutes"), (12345, "3.43 hours")])
def test_times_in_words(seconds, says):
    assert opening.lasting(seconds) == says


def test_cores_and_gpus_are_those_that_a_stage_takes():
    execution = {"threads": 2, "processes": 4, "gpus": 4}
    train = {"stage": "ppo", "execution": execution, "settings": {}}
    assert provenance.cores(train) == 8 and provenance.gpus(train) == 4
    gates = {"stage": "gates", "execution": execution, "settings": {}}
    assert provenance.cores(gates) == 2 and provenance.gpus(gates) == 0
    assert provenance.cores({"stage": "gates"}) == 1


def test_the_first_screen_has_the_tested_claims_and_what_the_runs_took(tmp_path, monkeypatch):
    tree = Tree(tmp_path)
    output = tree.build(monkeypatch)
    page = (output / "report.html").read_text(encoding="utf-8").split('<section id="checks">')[0]
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    found = study.read(tree.settings, tree.parents)
    minutes = sum(runs.manifest_of(tree.root / line["folder"])["wall_seconds"] for line in found.runs) / 60
    assert f"{minutes:,.4g} core-minutes (wall time × threads) of {len(found.runs)} runs" in page
    tested = [name for name, claim in found.config.claims.items() if f'href="#claim-{name}"' in page]
    assert {"larger_kl", "higher_gold", "preferred"} <= set(tested)
    whole = (output / "report.html").read_text(encoding="utf-8")
    assert all(whole.count(f'id="claim-{name}"') == 1 for name in tested)
    assert all(whole.count(f'id="hypothesis-{name}"') == 1 for name in found.config.claims)


def test_the_first_screen_leaves_the_positive_control_to_its_sentence():
    claim = SimpleNamespace(verdict="undecided")
    untested = SimpleNamespace(verdict=decisions.NOT_TESTED)
    origins = {"positive_control": [SimpleNamespace(verdict="supported")], "abstract": [claim, untested]}
    assert pages.first_screen(origins) == {"short": [claim], "untested": [untested]}
