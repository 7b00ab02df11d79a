"""The axis of algorithms: what arms, ingredients and claims become, and what they are called."""

import re

import pytest

from salsa.workflow import compose, plan, policies, schema
from salsa.workflow.messages import UserError

ARC = "+mixes.arc={kind:slerp,weights:'1/2 policy:ppo + 1/2 policy:salsa',origin:sft0}"
CLAIM = "+claims.z={{text:'SALSA beats PPO',measure:gold_reward,smallest_effect:0.01,{}}}"


def config_of(*overrides):
    (composed,) = compose.compose(list(overrides))
    return composed.config


def test_ppo_alone_is_what_every_study_was():
    plain, chosen = config_of(), config_of("algorithm=[ppo]")
    assert schema.dump(plain) == schema.dump(chosen) and "algorithms" not in schema.dump(plain)
    assert [arm.algorithm for arm in plain.arms.values()] == [None] * 3


def test_arms_are_crossed_and_keep_ppos_names():
    chosen = "arm=[ppo,salsa,other]"
    arms = config_of("algorithm=[ppo,dpo]", chosen).arms
    assert list(arms) == ["ppo", "salsa", "other", "dpo", "dpo_salsa", "dpo_other"]
    for name in ("ppo", "salsa", "other"):
        crossed = arms["dpo" if name == "ppo" else f"dpo_{name}"]
        assert crossed.algorithm == "dpo" and crossed.reference == arms[name].reference
        assert crossed.start == arms[name].start and crossed.description == arms[name].description
    assert list(config_of("algorithm=[dpo]", chosen).arms) == ["dpo", "dpo_salsa", "dpo_other"]


def test_an_arm_that_names_its_algorithm_is_crossed_with_none():
    arms = config_of("algorithm=[ppo,dpo]", "arm=[ppo,salsa]", "+arms.salsa.algorithm=dpo").arms
    assert list(arms) == ["salsa", "ppo", "dpo"]


def test_ingredients_are_those_of_the_same_algorithm():
    arms = config_of("algorithm=[ppo,dpo]", "arm=[ppo,rounds]").arms
    assert arms["rounds"].start == {"policy:salsa": "1"} and arms["dpo_rounds"].start == {"policy:dpo_salsa": "1"}
    assert arms["dpo_rounds"].reference.weights == {"sft0": "1/2", "policy:dpo_salsa": "1/2"}


def test_mixes_of_policies_are_crossed_too():
    mixes = ["+mixes.arc={kind:slerp,weights:'1/2 policy:ppo + 1/2 policy:salsa',origin:sft0}"]
    mixes += ["+mixes.plain={kind:slerp,weights:'1/2 sft0 + 1/2 sft1'}"]
    mixes += ["+arms.a={start:arc,reference:{weights:plain}}"]
    study = config_of("algorithm=[ppo,dpo]", "arm=[ppo,salsa]", *mixes)
    assert set(study.mixes) == {"arc", "plain", "dpo_arc"} and study.mixes["dpo_arc"].origin == "sft0"
    assert study.mixes["dpo_arc"].weights == {"policy:dpo": "1/2", "policy:dpo_salsa": "1/2"}
    assert study.arms["dpo_a"].start == {"dpo_arc": "1"} and study.arms["dpo_a"].reference.weights == {"plain": "1"}
    assert set(config_of("algorithm=[dpo]", "arm=[ppo,salsa]", *mixes).mixes) == {"plain", "dpo_arc"}


def test_what_names_the_policy_of_one_algorithm_is_crossed_with_none():
    both = "+mixes.both={kind:slerp,weights:'1/2 policy:ppo + 1/2 policy:dpo',origin:sft0}"
    untrained, trained = "+arms.a={algorithm:none,start:both}", "+arms.b={algorithm:dpo,start:'policy:ppo'}"
    study = config_of("algorithm=[ppo,dpo]", "arm=[ppo]", both, untrained, trained)
    assert list(study.mixes) == ["both"] and list(study.arms) == ["a", "b", "ppo", "dpo"]


def test_an_arm_that_is_not_trained_is_crossed_with_what_it_is_made_of():
    study = config_of("algorithm=[dpo]", "arm=[ppo,warp]")
    assert study.arms["dpo_warp"].algorithm == "none" and study.arms["dpo_warp"].start == {"dpo_warp_round_2": "1"}
    assert study.mixes["dpo_warp_round_2"].origin == "dpo_warp_round_1" and "warp" not in study.arms


def test_claims_are_made_of_each_algorithm():
    arms = "arm=[ppo,salsa,other]"
    claims = config_of("algorithm=[ppo,dpo]", arms).claims
    before = config_of(arms).claims
    assert {name: claims[name] for name in before} == before
    crossed = {name: claim for name, claim in claims.items() if name not in before}
    assert all(name.startswith("dpo_") for name in crossed) and "dpo_soup_not_noise" not in crossed  # no such arm
    claim = crossed["dpo_higher_gold"]
    assert (claim.candidate, claim.baseline) == ("dpo_salsa", "dpo")
    assert crossed["dpo_preferred"].text == "DPO: SALSA is preferred to DPO over all benchmarks"
    assert crossed["dpo_soup_not_other"].baseline == "dpo_other"


def test_a_claim_may_name_both_algorithms():
    claim = "{text:x,measure:gold_reward,smallest_effect:0.01,algorithm:dpo,baseline_algorithm:ppo}"
    claims = config_of("algorithm=[ppo,dpo]", f"+claims.both={claim}").claims
    assert (claims["both"].candidate, claims["both"].baseline) == ("dpo_salsa", "ppo") and "dpo_both" not in claims
    same = "{text:x,measure:gold_reward,smallest_effect:0.01,candidate:salsa,baseline:salsa,algorithm:dpo,"
    claims = config_of("algorithm=[ppo,dpo]", f"+claims.both={same}baseline_algorithm:ppo}}").claims
    assert (claims["both"].candidate, claims["both"].baseline) == ("dpo_salsa", "salsa")


def test_what_a_claim_says_of_another_algorithm():
    claims = config_of("algorithm=[ppo,grpo]", CLAIM.format("baseline_algorithm:ppo")).claims
    assert (claims["grpo_z"].candidate, claims["grpo_z"].baseline) == ("grpo_salsa", "ppo")
    assert claims["grpo_z"].text == "GRPO: SALSA beats PPO" and claims["z"].text == "SALSA beats PPO"
    own = ["+arms.a={algorithm:ppo,seed:1}", "+arms.b={algorithm:ppo,seed:2}"]
    study = config_of("algorithm=[grpo]", *own, CLAIM.format("candidate:a,baseline:b"))
    assert (study.claims["z"].candidate, study.claims["z"].baseline) == ("a", "b") and "grpo_z" not in study.claims
    same = CLAIM.format("candidate:salsa,baseline:salsa,algorithm:grpo,baseline_algorithm:ppo")
    assert config_of("algorithm=[ppo,grpo]", same).claims["z"].candidate == "grpo_salsa"


def test_a_study_of_four_algorithms_can_be_narrowed():
    study = config_of("experiment=algorithms", "algorithm=[ppo,grpo]")
    assert set(study.algorithm_kl_coefs) == {"ppo", "grpo"}
    alphas = config_of("experiment=algorithms", "alphas=[0.25]")
    assert policies.expanded_arms(alphas)["alpha_0.25"].kl_coefs == alphas.algorithm_kl_coefs["ppo"]


def test_an_arm_whose_penalty_changes_is_not_trained_by_what_has_none_that_does():
    study = config_of("experiment=tiny_full", "companions=[]", "algorithm=[ppo,dpo,grpo]")
    assert {"decaying_beta", "grpo_decaying_beta", "dpo_smaller_beta"} <= set(study.arms)
    assert "dpo_decaying_beta" not in study.arms


@pytest.mark.parametrize("companion", ["algorithm=[dpo]", "arm=[ppo,salsa]", "kl_coefs=[0.1]"])
def test_companions_of_another_choice(companion):
    composed = compose.compose([f"companions=['{companion}']", "name=x"])
    key, value = companion.split("=")
    assert composed[1].point[key] == value.replace(",", ", " if key == "kl_coefs" else ",")


def test_a_sweep_over_algorithms():
    composed = compose.compose(["algorithm=[ppo],[grpo]"])
    assert [next(iter(study.config.arms)) for study in composed] == ["ppo", "grpo"]
    assert [study.point["algorithm"] for study in composed] == ["[ppo]", "[grpo]"]


def test_each_algorithm_has_its_own_grid():
    grids = ["kl_coefs=[0.02,0.05,0.1]", "+algorithm_kl_coefs={ppo:[0.02,0.05],dpo:[0.05,0.1]}"]
    study = config_of("algorithm=[ppo,dpo]", "arm=[ppo,salsa]", *grids)
    assert [arm.kl_coefs for arm in study.arms.values()] == [[0.02, 0.05]] * 2 + [[0.05, 0.1]] * 2
    study = config_of("algorithm=[ppo,dpo]", "arm=[ppo,salsa]", "arms.salsa.kl_coefs=[0.1]", *grids)
    assert study.arms["dpo_salsa"].kl_coefs == [0.1] and study.arms["dpo"].kl_coefs == [0.05, 0.1]


def test_the_plan_judges_against_the_plain_anchor_of_the_same_algorithm():
    planned = plan.plan(compose.compose(["algorithm=[ppo,dpo]", "arm=[ppo,salsa]", "replicates=[0]"])).runs
    stages = [run.stage for run in planned.values()]
    assert stages.count("ppo") == stages.count("dpo") == 2
    for run in planned.values():
        if run.stage == "judge" and "baseline/ppo" in run.parents:
            candidate, baseline = (planned[run.parents[role]] for role in ("candidate", "baseline/ppo"))
            assert planned[candidate.parents["policy"]].stage == planned[baseline.parents["policy"]].stage


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["algorithm=[ppo,x]"], "algorithm=x: no such preset; there are "),
        (["algorithm=[]"], "algorithm: none is chosen, and arms.ppo names none; choose some, such as algorithm=[ppo]"),
        (["algorithms.ppo=false"], "algorithm: none is chosen, and arms.ppo names none"),
        (
            ["algorithm=[ppo,dpo]", f"{ARC}", "+mixes.dpo_arc={kind:slerp,weights:'1/2 sft0 + 1/2 sft1'}"],
            "mixes.dpo_arc: is also what algorithm=dpo calls arc; rename one",
        ),
        ([CLAIM.format("algorithm:dpo")], "claims.z.algorithm=dpo: is none of algorithm=[ppo]; add it there"),
        (
            ["algorithm=[ppo,rloo]", CLAIM.format("baseline_algorithm:dpo")],
            "claims.z.baseline_algorithm=dpo: is none of algorithm=[ppo,rloo]; add it there",
        ),
        (
            ["algorithm=[ppo,dpo]", "+claims.dpo_preferred={text:x,measure:stable,smallest_effect:0.1}"],
            "claims.dpo_preferred: is also what preferred is called when crossed; rename one",
        ),
        (["arms.salsa.start={sft0:1}"], "arms.salsa.start: is a list, which no mapping takes the place of; write it"),
        (["+algorithm_kl_coefs.dpo=[0.3]"], "algorithm_kl_coefs.dpo: is none of algorithm=[ppo]; leave it out"),
        (
            ["algorithm=[ppo,dpo]", "+algorithm_kl_coefs.dpo=[0.5]"],
            "algorithm_kl_coefs.dpo: 0.5 is not in kl_coefs=[0.3]; add it there",
        ),
        (
            ["algorithm=[dpo]", "alphas=[0.25]"],
            "alphas: are trained by ppo; add it to algorithm=[…], or give alphas=[]",
        ),
        (
            ["algorithm=[ppo,dpo]", "+arms.dpo_salsa={algorithm:dpo}"],
            "arms.dpo_salsa: is also what algorithm=dpo calls salsa; rename one",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, line):
    with pytest.raises(UserError, match=re.escape(line)):
        compose.compose(overrides)
