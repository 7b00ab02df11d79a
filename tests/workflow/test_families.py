"""The claims that a study plans to test, which share the error of all its verdicts: by its configuration alone."""

from dataclasses import replace

import pytest

from salsa.workflow import compose, families
from salsa.workflow.messages import UserError

OF_PPO = {"larger_kl", "stable", "higher_reward", "higher_gold", "out_of_distribution", "preferred"}


def planned(*overrides):
    return set(families.planned(compose.compose(list(overrides))[0]))


def test_the_decisive_study_plans_eleven_claims():
    of_controls = {"soup_not_other", "soup_not_noise", "not_a_weaker_penalty", "better_reference_is_seen"}
    assert planned("experiment=decisive") == OF_PPO | of_controls | {"better_at_equal_kl"}


@pytest.mark.parametrize(
    "overrides, missing",
    [
        (["arm=[ppo,salsa]"], set()),
        (["arm=[ppo]"], OF_PPO),
        (["arm=[ppo,salsa]", "judge=[]"], {"out_of_distribution", "preferred"}),
        (["arm=[ppo,salsa]", "benchmark=[in_distribution]"], {"out_of_distribution"}),
        (["arm=[ppo,salsa]", "benchmark=[]"], {"higher_gold", "out_of_distribution", "preferred"}),
        (["arm=[ppo,salsa]", "kl_coefs=[0.1,0.2]", "arms.salsa.kl_coefs=[0.1]", "arms.ppo.kl_coefs=[0.2]"], OF_PPO),
        (["arm=[ppo,salsa]", "replicates=[0,1]", "arms.salsa.replicates=[0]", "arms.ppo.replicates=[1]"], OF_PPO),
    ],
)
def test_a_claim_counts_where_all_that_it_needs_is_planned(overrides, missing):
    everywhere = [] if any(override.startswith("kl_coefs") for override in overrides) else ["kl_coefs=[0.1]"]
    assert planned(*everywhere, *overrides) == OF_PPO - missing


def test_equal_kl_takes_two_kl_coefs_of_each_arm():
    assert planned("arm=[ppo,salsa]", "kl_coefs=[0.1,0.2]") == OF_PPO | {"better_at_equal_kl"}
    assert "better_at_equal_kl" not in planned("arm=[ppo,salsa]", "kl_coefs=[0.1,0.2]", "arms.ppo.kl_coefs=[0.1]")


def test_the_fixed_kl_coef_has_to_be_that_of_both_arms():
    overrides = ["arm=[ppo,salsa,other]", "kl_coefs=[0.1,0.2]", "claim_kl_coef=0.2"]
    assert {"soup_not_other", "larger_kl"} <= planned(*overrides)
    with pytest.raises(UserError, match=r"arms\.other\.kl_coefs: 0\.2 is missing, at which claims compare it"):
        planned(*overrides, "arms.other.kl_coefs=[0.1]")


def test_where_the_world_has_no_gold_controls_are_of_win_rates():
    composed = compose.compose(["arm=[ppo,salsa,other]", "kl_coefs=[0.1]"])[0]
    task = replace(composed.config.data.task, kind="ultra")
    without = replace(composed.config, data=replace(composed.config.data, task=task))
    assert families.has_gold(composed.config) and not families.has_gold(without)
    claim = without.claims["soup_not_other"]
    assert families.resolved(composed.config, claim) == claim
    judged = families.resolved(without, claim)
    assert (judged.measure, judged.smallest_effect) == ("win_rate", 0.03)
    composed.config.data.task.kind = "ultra"
    assert set(families.planned(composed)) == OF_PPO - {"higher_gold"} | {"soup_not_other"}
