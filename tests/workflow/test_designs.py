"""Designs that can't be run or that decide nothing are refused; what may surprise is noted."""

import pytest

from salsa.workflow import compose, designs
from salsa.workflow.messages import UserError

LONG = "{text: x, measure: gold_reward, smallest_effect: 0.01, candidate: salsa_long"


def composed(*overrides):
    (study,) = compose.compose(list(overrides))
    return study


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["+arms.salsa.replicates=3"], "arms.salsa.replicates=3: the study has 2; give fewer"),
        (["+arms.salsa.replicates=[0,0]"], r"arms.salsa.replicates=\[0, 0\]: a number stands there twice"),
        (["arm=[ppo]", "+arms.ppo.replicates=[5]"], r"none is run in replicates=\[0, 1\]"),
        (
            ["kl_coefs=[0.1,0.3]", "claim_kl_coef=0.1", "+arms.salsa.kl_coefs=[0.3]"],
            "arms.salsa.kl_coefs: 0.1 is missing",
        ),
        (["kl_coefs=[0.1,0.3]", "claim_kl_coef=0.1", "+arms.ppo.kl_coefs=[0.3]"], "arms.ppo.kl_coefs: 0.1 is missing"),
        (["+arms.salsa.iterations_scale=3"], "claims.larger_kl: salsa has iterations_scale=3 and ppo 1"),
        (["+arms.ppo.iterations_scale=3", "+arms.salsa.iterations_scale=2"], "salsa has iterations_scale=2 and ppo 3"),
        (
            ["arm=[ppo,salsa_long]", f"+claims.long={LONG}}}"],
            "claims.long: salsa_long has iterations_scale=3 and ppo 1",
        ),
        (["+arms.x.iterations_scale=1e-5"], "arms.x.iterations_scale=1e-05: 50 iterations become 0"),
        (["+arms.x.iterations_scale=1.001"], "arms.x.iterations_scale=1.001: 50 iterations become 50"),
        (
            ["experiment=decisive", "+regimes.a={replicates:[0],disjoint:true}", "sft_variants.strong.seed=1"],
            "regimes.a.disjoint, for sft_variants.strong: .* 4000 are wanted",
        ),
    ],
)
def test_a_mistake_is_said_while_planning(overrides, says):
    chosen = [] if overrides[0].startswith(("arm=", "experiment=")) else ["arm=[ppo,salsa]"]
    numbers = [] if overrides[0].startswith("experiment=") else ["replicates=[0,1]"]
    with pytest.raises(UserError, match=says) as refused:
        composed(*chosen, *numbers, *overrides)
    assert "\n" not in str(refused.value)


def test_a_claim_that_names_both_arms_may_compare_other_training_times():
    arms = "arm=[ppo,salsa,salsa_long,ppo_long]"
    for baseline in ("ppo_long", "salsa_short"):
        short = ["+arms.salsa_short.reference.weights=[1/2,1/2]"] * (baseline == "salsa_short")
        study = composed(arms, f"+claims.long={LONG}, baseline: {baseline}}}", *short)
        assert study.config.claims["long"].baseline == baseline


def test_arms_of_equal_length_may_be_long():
    assert composed("arm=[ppo,salsa]", "+arms.ppo.iterations_scale=3", "+arms.salsa.iterations_scale=3").arms


def test_a_part_of_a_preset_keeps_its_counts_of_replicates():
    study = composed("experiment=decisive", "replicates=[0,1,2,3,4,5,6,7]", "looks=[8]")
    assert study.config.arms["other"].replicates == 16


def test_claims_need_no_arm_that_the_study_lacks():
    assert composed("arm=[ppo,other]", "kl_coefs=[0.1,0.3]", "claim_kl_coef=0.1", "+arms.other.kl_coefs=[0.3]").arms


def test_what_may_surprise_is_noted():
    study = composed(
        "arm=[ppo,salsa,other]", "replicates=[0,1,2]", "+arms.ppo.replicates=2", "+arms.other.replicates=[5]"
    )
    assert list(designs.notes(study)) == [
        "arm salsa: in 1 of its 3 replicates without ppo, its plain arm",
        "arm other: in none of the replicates",
    ]
    long = composed("arm=[ppo,salsa,salsa_long]")
    assert list(designs.notes(long)) == [
        "arm salsa_long: the study has no plain arm trained 3 times as long to compare it with"
    ]


@pytest.mark.parametrize("experiment", ["default", "decisive", "regimes", "tiny_full_overfitted", "algorithms"])
def test_nothing_is_noted_of_a_preset(experiment):
    assert not [note for study in compose.compose([f"experiment={experiment}"]) for note in designs.notes(study)]
