"""Several training seeds a replicate, and several responses a prompt, in the plan: which runs, and named how."""

import re

import pytest
from test_ingredients import of, runs_of
from test_plan import make

from salsa import data
from salsa.workflow import compose, estimate, ingredients, plan, policies
from salsa.workflow.messages import UserError

SMALL = ["replicates=[0]"]


def study_of(planned):
    (study,) = of("study", planned)
    return study.settings["policies"]


def trained_before(run, planned):
    """The labels of the PPO runs that a run is made of."""
    labels = set()
    for path in run.parents.values():
        parent = planned[path]
        labels |= ({parent.label} if parent.stage == "ppo" else set()) | trained_before(parent, planned)
    return labels


def test_the_first_seed_is_what_there_is_without():
    """More seeds add runs, and change none but the study's."""
    one, three = runs_of("arm=[ppo,salsa]"), runs_of("arm=[ppo,salsa]", "ppo.seeds=3")
    assert {path for path in one if path not in three} == {path for path in one if path.startswith("studies/")}
    added = [run for path, run in three.items() if path not in one]
    assert {run.stage for run in added} == {"ppo", "respond", "judge", "study"}
    assert all(re.search(r"-t[12](-|$)", run.label) for run in added if run.stage != "study")
    ppo, alone = of("ppo", three), of("ppo", one)
    assert len(ppo) == 3 * len(alone) and all("seeds" not in run.settings["ppo"] for run in ppo)
    for replicate in (0, 1, 2):  # both arms of a replicate and seed see the same noise
        seeds = [run.settings["seed"] for run in ppo if run.replicate == replicate]
        assert len(set(seeds)) == 3 and len(seeds) == 6
    assert len({run.settings["seed"] for run in of("respond", three)}) == 9


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo", "dpo"])
def test_every_algorithm_that_trains_has_seeds(algorithm):
    planned = runs_of(*SMALL, f"algorithm=[{algorithm}]", f"{algorithm}.seeds=2", "companions=[]")
    assert sorted(policy["seed"] for policy in study_of(planned)) == [0, 0, 0, 1, 1, 1]
    assert len(of(algorithm, planned)) == 6


def test_members_name_their_seed_and_are_compared_within_it():
    planned = runs_of("arm=[ppo,salsa]", "ppo.seeds=2")
    (study,) = of("study", planned)
    for member in study.settings["policies"]:
        index, seed = member["index"], member["seed"]
        policy, judged = planned[study.parents[f"policy/{index}"]], planned[study.parents[f"judge/gold/{index}"]]
        assert policy.label.endswith("-t1") == bool(seed) and policy.replicate == member["replicate"]
        assert judged.settings.get("seed", 0) == seed
        assert planned[planned[judged.parents["candidate"]].parents["policy"]] is policy
        assert planned[judged.parents["baseline/sft0"]].stage == "landscape"
        if member["arm"] == "salsa":
            plain = planned[judged.parents[f"baseline/{member['baselines']['ppo']}"]]
            assert planned[plain.parents["policy"]].settings["seed"] == policy.settings["seed"]
    names = {(member["arm"], member["name"]) for member in study.settings["policies"]}
    assert len(names) == 2 and len(study.settings["policies"]) == 12


def test_opponents_of_a_tournament_have_the_same_seed():
    planned = runs_of(*SMALL, "arm=[ppo,salsa,other]", "ppo.seeds=2", "judges.gold.tournament=true")
    for judged in of("judge", planned):
        for role, path in judged.parents.items():
            if role.startswith("baseline/opponent"):
                opponent = planned[planned[path].parents["policy"]]
                candidate = planned[planned[judged.parents["candidate"]].parents["policy"]]
                assert opponent.settings["seed"] == candidate.settings["seed"]


def test_an_ingredient_is_of_the_same_seed():
    planned = runs_of(*SMALL, "arm=[ppo,rounds]", "ppo.seeds=2")
    rounds = [run for run in of("ppo", planned) if "ingredient0" in run.parents]
    assert len(rounds) == 2
    for run in rounds:
        first = planned[run.parents["ingredient0"]]
        assert first.label.endswith("-t1") == run.label.endswith("-t1")
    assert len({run.parents["ingredient0"] for run in rounds}) == 2


def test_what_is_made_of_policies_is_made_of_those_of_each_seed():
    planned = runs_of(*SMALL, "arm=[ppo,warp]", "ppo.seeds=2")
    merged = of("none", planned)
    assert len(merged) == 2
    members = [member for member in study_of(planned) if member["arm"] == "warp"]
    assert sorted(member["seed"] for member in members) == [0, 1]
    for run in merged:
        rounds = trained_before(run, planned)
        assert len(rounds) > 1 and {path.endswith("-t1") for path in rounds} == {run.label.endswith("-t1")}


def test_what_is_not_trained_stands_beside_all_seeds_once():
    planned = runs_of(*SMALL, "arm=[untrained_soup,ppo,best_of_n]", "ppo.seeds=2", "judges.gold.tournament=true")
    seeds = [(member["arm"], member["seed"]) for member in study_of(planned)]
    assert sorted(seeds) == [("best_of_n", 0), ("ppo", 0), ("ppo", 1), ("untrained_soup", 0)]
    met = {
        (run.settings.get("seed", 0), name)
        for run in of("judge", planned)
        if run.settings["candidate"].startswith("start_sft0-ref")
        for name in run.settings["baselines"]
    }
    assert {seed for seed, name in met if name.startswith("none-")} == {0, 1}


def test_fewer_seeds_than_are_needed_are_refused():
    message = r"policy:\w+: is needed at training seed 2, and is trained with 2 seeds; .* \(ppo\.seeds\)"
    study = make(
        arms={
            "ppo": {},
            "second": {"algorithm": "grpo", "start": {"policy:ppo": "1"}},
        },
        ppo__seeds=2,
        grpo__seeds=3,
    )
    with pytest.raises(UserError, match=message):
        ingredients.check_policies(study)
    study.config.grpo.seeds = 2
    ingredients.check_policies(study)
    study.config.ppo.seeds = 1  # one serves all
    ingredients.check_policies(study)
    planned = plan.plan([study]).runs
    second = of("grpo", planned)
    assert len(second) == 4 and len({run.parents["ingredient0"] for run in second}) == 2


def test_too_many_models_are_refused():
    with pytest.raises(UserError, match=r"arms, .*, seeds, replicates and sft.models ask for up to \d+ models"):
        compose.compose(["ppo.seeds=100", f"replicates={list(range(30))}"])
    with pytest.raises(UserError, match=r"ppo\.seeds=0: must be at least 1, and at most 100"):
        compose.compose(["ppo.seeds=0"])
    with pytest.raises(UserError, match=r"evaluate\.samples=0: must be at least 1, and at most 1000"):
        compose.compose(["evaluate.samples=0"])


def test_only_the_first_seed_has_a_plane():
    planned = runs_of(*SMALL, "ppo.seeds=2", "evaluate.plane.arms=[salsa]")
    (plane,) = of("plane", planned)
    assert not planned[plane.parents["policy"]].label.endswith("-t1")


def test_samples_are_part_of_what_answers_and_of_nothing_else():
    one, several = runs_of(*SMALL), runs_of(*SMALL, "evaluate.samples=4")
    changed = [run for path, run in several.items() if path not in one]
    assert {run.stage for run in changed} == {"landscape", "gates", "respond", "judge", "study"}
    assert {run.settings["samples"] for run in changed if run.stage in ("landscape", "respond")} == {4}
    needed = [
        {run.stage: estimate.of_run(run, planned) for run in planned.values() if run.stage in ("landscape", "respond")}
        for planned in (one, several)
    ]
    for stage in ("landscape", "respond"):
        assert needed[1][stage].operations == 4 * needed[0][stage].operations


def test_the_plan_counts_what_a_judge_is_asked():
    """Of the default's benchmarks one has two turns, each judged by itself; each arm meets sft0 and each other one."""
    overrides = [
        *SMALL,
        "arm=[ppo,salsa,other]",
        "judge=[openai]",
        "judges.openai.model=m",
        "execution.judge_check=false",
    ]
    asked = [estimate.survey(plan.plan(compose.compose([*overrides, *more])), lambda path: False)
             for more in ([], ["evaluate.samples=3"], ["evaluate.samples=3", "ppo.seeds=2"])]  # fmt: skip
    (composed,) = compose.compose(overrides)
    prompts = sum(b.prompts * (1 + (b.kind == "two_turn")) for b in composed.config.benchmarks.values())
    arms = len(policies.policies(composed))
    expected = prompts * (arms + arms * (arms - 1) // 2) * 2  # in both orders
    assert [survey.questions for survey in asked] == [expected, 3 * expected, 6 * expected]
    assert f"questions to judges over a network: about {expected:,}, without repeated ones" in asked[0].lines()
    assert asked[0].as_dict()["questions"] == expected
    gold = estimate.survey(plan.plan(compose.compose(SMALL)), lambda path: False)
    assert gold.questions == 0 and "questions" not in gold.as_dict()


def test_more_prompts_than_the_world_has_are_refused_while_planning():
    """The development prompts and every benchmark of stories, at the first number that there is not."""
    from salsa.data.benchmarks import out_of_distribution
    from salsa.data.worlds import stories

    there = {"data.task.evaluation": stories.available("evaluation")}
    there |= {f"benchmarks.{name}.prompts": stories.available(name) for name in ("in_distribution", "two_turn")}
    there["benchmarks.out_of_distribution.prompts"] = 2 * min(map(len, out_of_distribution._instructions()))
    assert set(data.benchmark_kinds("stories")) == {"in_distribution", "two_turn", "out_of_distribution"}
    for key, number in there.items():
        assert number >= 2000
        compose.compose([*SMALL, f"{key}={number}"])
        with pytest.raises(UserError, match=rf"stories have {number} instructions for .*, {number + 1} are wanted"):
            compose.compose([*SMALL, f"{key}={number + 1}"])
