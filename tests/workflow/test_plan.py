"""The plan: what an address depends on, and what it does not; which runs are one run."""

import copy
import dataclasses
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from salsa import algorithms
from salsa.algorithms.ppo import Ppo
from salsa.workflow import bounds, checks, config, jobs, plan, policies, runs, schema, stages
from salsa.workflow.messages import UserError


def arm(start=("1",), kind="soup", weights=("1",), rate=0.0, every=0, kl_scale=1.0, kl_schedule=None):
    reference = config.Reference(kind, list(weights), rate=rate, every=every)
    return dataclasses.asdict(config.Arm("", list(start), reference, kl_scale, kl_schedule))


ARMS = {"ppo": arm(), "salsa": arm(weights=["0.5", "0.50"])}


def make(files=None, link=None, point=None, results="results", **changes):
    """A small configuration as `compose` returns it; `changes` are dotted keys with __ for the dots."""
    values = schema.defaults(config.Config)
    values["replicates"] = [0, 1]
    values["model"] |= {"name": "tiny", "source": "pretrain"}
    values["data"] |= {"name": "stories"}
    values["data"]["corpus"]["kind"] = values["data"]["task"]["kind"] = "stories"
    values["arms"] = dict(ARMS)
    values["benchmarks"] = {"in_distribution": {"kind": "in_distribution"}}
    values["judges"] = {"gold": {"kind": "gold"}}
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *path, name = key.split("__")
        inner = values
        for part in path:
            inner = inner[part]
        inner[name] = value
    made = schema.from_dict(config.Config, values)
    made.results = results
    return policies.Composed(made, policies.expanded_arms(made), files or {}, link, point or {})


def folders(paths):
    return {path.split("/")[0] for path in paths}


def changed(**changes):
    """The stages of the runs that a changed configuration has and the small one has not."""
    return folders(set(plan.plan([make(**changes)]).runs) - set(plan.plan([make()]).runs))


AFTER_PPO = {"ppo", "respond", "judge", "studies"}
AFTER_REWARD = AFTER_PPO | {"reward_model", "landscape", "gates"}


def test_runs_come_after_their_parents():
    seen = set()
    for path, run in plan.plan([make()]).runs.items():
        assert set(run.parents.values()) | set(run.after) <= seen
        assert path == f"{stages.ALL[run.stage].folder}/{run.label}-{run.address[:12]}"
        seen.add(path)


def test_settings_are_those_of_the_stages():
    """What a stage builds from a plan's settings gives the plan's address again, as `runs.execute` checks."""
    judges = {kind: {"kind": kind} for kind in ("gold", "reward_model", "openai")}
    arms = ARMS | {f"by_{kind}": arm() | {"algorithm": kind} for kind in algorithms.kinds()}
    arms["of_mix"] = arm() | {"reference": {"kind": "soup", "weights": {"arc": "1"}}}
    changes = {"alphas": ["0.25", "1/3"], "evaluate__plane__arms": ["salsa"], "judges": judges, "arms": arms}
    changes["mixes"] = {"arc": {"kind": "slerp", "weights": {"sft0": "1/2", "sft1": "1/2"}}}
    result = plan.plan([make(seed=seed, point={"seed": str(seed)}, **changes) for seed in (0, 1)])
    assert {run.stage for run in result.runs.values()} == set(stages.ALL)
    for run in result.runs.values():
        cls = stages.ALL[run.stage].settings
        hints = bounds.type_hints(cls)
        assert set(run.settings) == {name for name in hints if bounds.ADDED not in bounds.marks(hints[name])}
        settings = schema.dump(schema.from_dict(cls, run.settings))
        addresses = {role: result.runs[path].address for role, path in run.parents.items()}
        assert runs.address(run.stage, stages.ALL[run.stage].version, settings, addresses) == run.address
        assert schema.from_dict(config.Execution, run.execution)


def test_parents_of_each_stage():
    result = plan.plan([make()])
    roles = {run.stage: set(run.parents) for run in result.runs.values() if run.stage != "study"}
    assert roles["sft"] == {"prepare", "base"} and roles["base"] == {"corpus"}
    assert roles["reward_model"] == {"prepare", "sft0", "sft1"}
    assert roles["landscape"] == {"prepare", "reward_model", "sft0", "sft1", "benchmark/in_distribution"}
    assert roles["gates"] == {"landscape", "reward_model"}
    ppo = {run.label.split("-r0-")[-1]: set(run.parents) for run in result.runs.values() if run.stage == "ppo"}
    assert ppo["start_sft0-ref_sft0-kl_0.05"] == {"prepare", "reward_model", "sft0"}
    assert ppo["start_sft0-ref_soup0.50-kl_0.05"] == {"prepare", "reward_model", "sft0", "sft1"}
    study = next(run for run in result.runs.values() if run.stage == "study")
    assert {"prepare", "landscape/r0", "gates/r0", "reward_model/r1", "policy/3", "respond/3", "judge/gold/3"} <= set(
        study.parents
    )
    assert [policy["index"] for policy in study.settings["policies"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({"kl_coefs": [0.05, 0.3, 0.1]}, 0.3),
        ({"arms": ARMS | {"twice": arm(weights=["0", "1"], kl_scale=2.0)}}, 0.1),
        ({"arms": ARMS | {"half": arm(weights=["0", "1"], kl_scale=0.5)}}, 0.05),
        ({"ppo__score_normalisation": "none"}, None),  # then the penalty is in another unit
        ({"ppo__kl_in": "loss", "ppo__kl_estimator": "k2"}, None),
        ({"ppo__kl_schedule__kind": "adaptive"}, None),  # which may raise it
        ({"arms": {name: values | {"algorithm": "dpo"} for name, values in ARMS.items()}}, None),
        ({"arms": ARMS | {"by_grpo": arm(kl_scale=9.0) | {"algorithm": "grpo"}}}, 0.05),
        ({"arms": ARMS | {"by_rloo": arm(kl_scale=3.0) | {"algorithm": "rloo"}}}, 0.15),
    ],
)
def test_gates_know_the_largest_kl_coef(changes, largest):
    for run in plan.plan([make(**changes)]).runs.values():
        assert run.stage != "gates" or run.settings["largest_kl_coef"] == largest


def test_judge_compares_with_sft0_and_plain_ppo():
    result = plan.plan([make()])
    judged = {run.settings["candidate"]: run for run in result.runs.values() if run.stage == "judge"}
    plain = "start_sft0-ref_sft0-kl_0.05"
    assert judged[plain].settings["baselines"] == {"sft0": "sft0"}
    salsa = judged["start_sft0-ref_soup0.50-kl_0.05"]
    assert salsa.settings["baselines"] == {"sft0": "sft0", plain: "policy"}
    assert result.runs[salsa.parents["baseline/sft0"]].stage == "landscape"
    baseline = result.runs[salsa.parents[f"baseline/{plain}"]]
    assert baseline.stage == "respond" and baseline.replicate == salsa.replicate


def test_a_tournament_judges_every_pair_once():
    arms = {"ppo": arm(), "salsa": arm(weights=["1/2", "1/2"]), "other": arm(weights=["0", "1"])}
    values = make(arms=arms, kl_coefs=[0.02, 0.05], judges__gold__tournament=True)
    pairs = [
        (run.replicate, frozenset((run.settings["candidate"], name)))
        for run in plan.plan([values]).runs.values()
        if run.stage == "judge"
        for name in run.settings["baselines"]
    ]
    assert len(pairs) == len(set(pairs)) == 2 * 2 * 6  # replicates, kl_coefs, pairs of three arms and sft0


def test_a_tournament_judges_every_pair_across_algorithms():
    """Plain anchors are the baselines of their own algorithm's policies alone."""
    arms = ARMS | {"grpo": {"algorithm": "grpo"}, "grpo_salsa": arm(weights=["1/2", "1/2"]) | {"algorithm": "grpo"}}
    arms |= {"best": {"algorithm": "best_of_n", "start": ["0", "1"]}}
    for order in (list(arms), list(reversed(arms))):
        ordered = {name: arms[name] for name in order}
        values = make(arms=ordered, kl_coefs=[0.02], judges__gold__tournament=True, replicates=[0])
        pairs = [
            frozenset((run.settings["candidate"], name))
            for run in plan.plan([values]).runs.values()
            if run.stage == "judge"
            for name in run.settings["baselines"]
        ]
        assert len(pairs) == len(set(pairs)) == 6 * 5 / 2  # of five arms and sft0


UNTRAINED = {
    "untrained": {"start": ["1/2", "1/2"], "algorithm": "none"},
    "best": {"algorithm": "best_of_n"},
}


def test_an_arm_without_training_has_one_policy():
    study = make(arms=ARMS | UNTRAINED, kl_coefs=[0.02, 0.05], replicates=[0])
    names = {(policy.arm, policy.kl_coef): policy.name for policy in policies.policies(study)}
    assert names["untrained", 0.02] == "none-start_soup0.50" and names["best", 0.02] == "best_of_n-start_sft0"
    assert len(names) == 2 * len(ARMS) + 2
    made = {run.stage: run for run in plan.plan([study]).runs.values() if run.stage in ("none", "best_of_n")}
    assert all(run.settings["kl_coef"] == 0 for run in made.values())
    assert made["best_of_n"].settings["best_of_n"] == {"n": 16} and made["none"].settings["none"] == {}
    assert made["none"].settings["reference"] == schema.dump(config.Reference())
    baselines = [
        run.settings["baselines"] for run in plan.plan([study]).runs.values()
        if run.stage == "judge" and not run.settings["candidate"].startswith("start")
    ]  # fmt: skip
    assert baselines == [{"sft0": "sft0"}] * 2  # neither has a plain anchor of its algorithm beside itself


def test_other_strengths_of_a_penalty_change_no_untrained_policy():
    one, other = (plan.plan([make(arms=UNTRAINED, kl_coefs=[kl_coef])]).runs for kl_coef in (0.02, 0.05))
    assert {path.split("/")[0] for path in set(one) ^ set(other)} == {"studies"}


@pytest.mark.parametrize(
    "setting, value",
    [
        ("kl_scale", 2.0),
        ("seed", 1),
        ("kl_coefs", [0.05]),
        ("kl_schedule", {"kind": "fixed"}),
        ("reference", {"kind": "soup", "weights": ["0", "1"]}),
    ],
)
def test_a_penalty_that_does_not_count_is_refused(setting, value):
    study = make(arms=ARMS | {"best": {"algorithm": "best_of_n", setting: value}})
    with pytest.raises(UserError, match=rf"^arms\.best\.{setting}: not read with algorithm=best_of_n; leave it out$"):
        checks.check(study.config)


def test_a_plane_needs_weights_of_the_policys_own():
    study = make(arms=ARMS | UNTRAINED)
    study.config.evaluate.plane.arms = ["best"]
    with pytest.raises(UserError, match=r"^evaluate\.plane\.arms: best chooses among responses"):
        checks._check_plane(study.config)


def test_a_start_needs_weights_too():
    second = {"start": {"policy:best": "1"}, "algorithm": "none"}
    with pytest.raises(UserError, match=r"policy:best: chooses among responses, and has no weights of its own"):
        plan.plan([make(arms=ARMS | UNTRAINED | {"second": second})])
    second = {"start": {"policy:untrained": "1/2", "sft0": "1/2"}}
    made = plan.plan([make(arms=UNTRAINED | {"second": second}, replicates=[0])]).runs
    (trained,) = (run for run in made.values() if run.stage == "ppo")
    assert made[trained.parents["ingredient0"]].stage == "none"


def test_a_judging_reward_model_is_another():
    judges = {"reward_model": dataclasses.asdict(config.Judge("reward_model"))}
    result = plan.plan([make(judges=judges, replicates=[0])]).runs
    judged = [run for run in result.values() if run.stage == "judge"]
    scorers = {run.parents["scorer"] for run in judged}
    trained = {run.parents["reward_model"] for run in result.values() if run.stage == "ppo"}
    assert len(judged) == 2 and len(scorers) == 1 and not scorers & trained
    own, other = result[trained.pop()].settings, result[scorers.pop()].settings
    assert other["preferences"] == own["preferences"] + "_for_judge" and other["seed"] != own["seed"]


def with_reward_models(**changes):
    """The plan of one replicate that a reward model judges too; path -> run of the stage that makes reward models."""
    judges = {"reward_model": dataclasses.asdict(config.Judge("reward_model"))}
    result = plan.plan([make(judges=judges, replicates=[0], **changes)])
    return result, {path: run for path, run in result.runs.items() if run.stage == "reward_model"}


def test_a_reward_model_is_the_average_of_members():
    """PPO's and the judge's alike; all is read from the average, and members differ in their place alone."""
    result, made = with_reward_models(reward_model__models=3)
    averages = {path: run for path, run in made.items() if "reward_model/0" in run.parents}
    read = {run.parents.get(role) for run in result.runs.values() for role in ("scorer", "reward_model")}
    assert len(made) == 2 * 4 and len(averages) == 2 and read - {None} == set(averages)
    for average in averages.values():
        roles = [f"reward_model/{i}" for i in range(3)]
        assert set(average.parents) == {"prepare", "sft0", "sft1", *roles}
        section = dict(average.settings["reward_model"])
        assert section.pop("models") == 3
        for place, role in enumerate(roles):
            member, own = made[average.parents[role]], {"member": place} if place else {}
            assert member.settings == average.settings | {"reward_model": section} | own
            assert set(member.parents) == {"prepare", "sft0", "sft1"} and member.replicate == 0
    study = next(run for run in result.runs.values() if run.stage == "study")
    assert study.parents["reward_model/r0"] in averages and study.settings["config"]["reward_model"]["models"] == 3


def test_the_first_members_are_shared_by_studies_of_fewer():
    one, two, three = (set(with_reward_models(reward_model__models=count)[1]) for count in (1, 2, 3))
    assert one <= two and one <= three and one == set(with_reward_models()[1])
    assert len(one) == 2 and len(two & three) == 2 * 2  # two members of each average


def test_an_average_takes_one_process_where_its_members_share():
    several = {"execution__processes": 4, "execution__gpus": 4, "execution__accelerate_config": "some.yaml"}
    _, made = with_reward_models(reward_model__models=2, **several)
    assert set(made) == set(with_reward_models(reward_model__models=2)[1])
    for run in made.values():
        averaged = "reward_model/0" in run.parents
        taken = [run.execution[name] for name in ("processes", "gpus", "accelerate_config")]
        assert taken == ([1, 1, ""] if averaged else [4, 4, "some.yaml"])
        assert jobs.resource(run, "gpus") == taken[1] and jobs.launcher(run).endswith("python") == averaged


def test_given_preferences_have_averages_too():
    result = plan.plan([make(data__preferences="given", reward_model__models=2, replicates=[0])])
    roles = [set(run.parents) for run in result.runs.values() if run.stage == "reward_model"]
    assert roles == [{"prepare", "sft0"}] * 2 + [{"prepare", "sft0", "reward_model/0", "reward_model/1"}]


def test_a_plan_of_averages_is_read_again(tmp_path):
    result, _ = with_reward_models(reward_model__models=2, results=str(tmp_path))
    assert plan.load(result.save()).runs.keys() == result.runs.keys()


def test_an_openai_judge_is_shown_the_benchmark():
    judges = {"openai": dataclasses.asdict(config.Judge("openai", model="some"))}
    result = plan.plan([make(judges=judges)]).runs
    assert all("benchmark/in_distribution" in run.parents for run in result.values() if run.stage == "judge")


def test_planes_of_some_policies():
    for change, wanted in (
        ({"evaluate__plane__arms": ["salsa"]}, ["r0-start_sft0-ref_soup0.50-kl_0.02"]),
        (
            {"evaluate__plane__arms": ["salsa", "ppo"], "evaluate__plane__kl_coef": 0.05},
            ["r0-start_sft0-ref_sft0-kl_0.05", "r0-start_sft0-ref_soup0.50-kl_0.05"],
        ),
        (
            {"evaluate__plane__arms": ["ppo"], "evaluate__plane__replicates": 2},
            ["r0-start_sft0-ref_sft0-kl_0.02", "r1-start_sft0-ref_sft0-kl_0.02"],
        ),
    ):
        result = plan.plan([make(kl_coefs=[0.02, 0.05], **change)])
        planes = sorted(run.label.split("-stories-")[1] for run in result.runs.values() if run.stage == "plane")
        assert planes == wanted
        study = next(run for run in result.runs.values() if run.stage == "study")
        assert sum(role.startswith("plane/") for role in study.parents) == len(wanted)


def test_a_plane_of_a_policy_that_is_not_run_is_refused():
    study = make(kl_coefs=[0.02, 0.05], arms__salsa__kl_coefs=[0.02])
    study.config.evaluate.plane = dataclasses.replace(study.config.evaluate.plane, arms=["ppo", "salsa"], kl_coef=0.05)
    line = r"^evaluate\.plane\.kl_coef=0\.05: salsa is run at 0\.02 alone; choose that, or leave the arm out$"
    with pytest.raises(UserError, match=line):
        checks._check_plane(study.config)


def test_an_arm_at_some_kl_coefs():
    values = make(kl_coefs=[0.02, 0.05], arms__salsa__kl_coefs=[0.05])
    found = [(policy.arm, policy.kl_coef) for policy in policies.policies(values)]
    assert found == [("ppo", 0.02), ("ppo", 0.05), ("salsa", 0.05)]


def test_alphas_are_the_arms_they_equal():
    arms = {"ppo": arm(), "salsa": arm(weights=["1/2", "1/2"]), "other": arm(weights=["0", "1"])}
    values = make(arms=arms, alphas=["0", "0.25", "0.5", "0.750", "1"])
    found = policies.policies(values)
    assert [(policy.arm, policy.alpha) for policy in found] == [
        ("ppo", "0"),
        ("salsa", "0.5"),
        ("other", "1"),
        ("alpha_0.25", "0.25"),
        ("alpha_0.75", "0.75"),
    ]
    assert sum(run.stage == "ppo" for run in plan.plan([values]).runs.values()) == 10


def test_equal_arms_are_one_run():
    values = make(arms={"salsa": arm(weights=["1/2", "1/2"]), "again": arm(weights=["0.50", "0.5", "0"])})
    assert [policy.arm for policy in policies.policies(values)] == ["salsa"]


def test_alphas_at_some_kl_coefs_only():
    values = make(kl_coefs=[0.02, 0.05], alphas=["0.25", "0.5"], alpha_kl_coefs=[0.05])
    assert [(policy.arm, policy.kl_coef) for policy in policies.policies(values)] == [
        ("ppo", 0.02),
        ("ppo", 0.05),
        ("salsa", 0.02),
        ("salsa", 0.05),
        ("alpha_0.25", 0.05),
    ]


HALVES = {"weights": ["1/2", "1/2"]}
LINEAR = schema.KlSchedule("linear", final=0.1)


@pytest.mark.parametrize(
    ("values", "name", "label"),
    [
        ({}, "start_sft0-ref_sft0-kl_0.05", None),
        ({"weights": ["0", "1"]}, "start_sft0-ref_sft1-kl_0.05", None),
        ({"start": ["0.5", "0.5"], "weights": ["2/3", "1/3"]}, "start_soup0.50-ref_soup0.33-kl_0.05", None),
        ({"weights": ["1/3", "1/3", "1/3"]}, "start_sft0-ref_soup0.33_0.33_0.33-kl_0.05", None),
        (HALVES | {"kind": "noise"}, "start_sft0-ref_noise0.50-kl_0.05", None),
        (HALVES | {"kind": "multi_kl"}, "start_sft0-ref_multi_kl0.50-kl_0.05", None),
        ({"kind": "ema", "rate": 0.05}, "start_sft0-ref_ema0.05_sft0-kl_0.05", None),
        (HALVES | {"kind": "ema", "rate": 1.0}, "start_sft0-ref_ema1_soup0.50-kl_0.05", None),
        ({"kind": "reset", "every": 10}, "start_sft0-ref_reset10_sft0-kl_0.05", None),
        ({"kl_scale": 0.5}, "start_sft0-ref_sft0-kl_0.05x0.5", "start_sft0-ref_sft0-kl_0.025"),
        ({"kl_schedule": LINEAR}, "start_sft0-ref_sft0-kl_0.05-linear0.1", None),
        (
            {"kl_scale": 2.0, "kl_schedule": schema.KlSchedule("adaptive", target=3.5)},
            "start_sft0-ref_sft0-kl_0.05x2-adaptive3.5_10000",
            "start_sft0-ref_sft0-kl_0.1-adaptive3.5_10000",
        ),
    ],
)
def test_names_and_labels_are_readable(values, name, label):
    way = policies.spec_of(schema.from_dict(config.Arm, arm(**values)), SimpleNamespace(ppo=Ppo()))
    assert way.name(0.05) == name and way.run_label(0.05) == (label or name)


@pytest.mark.parametrize(
    ("kl_coef", "scale", "effective"), [(0.05, 0.5, 0.025), (0.1, 3.0, 0.3), (0.07, 0.1, 0.007), (1e-05, 2.0, 2e-05)]
)
def test_the_effective_kl_coef_has_no_noise(kl_coef, scale, effective):
    """3 * 0.1 is 0.30000000000000004 in binary, and would be another run than that of kl_coef 0.3."""
    assert policies.PolicySpec(kl_scale=scale).kl_coef(kl_coef) == effective


def ppo_runs(values):
    return {path: run for path, run in plan.plan([values]).runs.items() if run.stage == "ppo"}


def test_a_scaled_kl_coef_shares_the_run_of_the_kl_coef_that_it_gives():
    arms = {"ppo": arm(), "smaller_beta": arm(kl_scale=0.5)}
    values = make(arms=arms, kl_coefs=[0.05, 0.025], replicates=[0])
    found = policies.policies(values)
    assert [(policy.arm, policy.kl_coef, policy.name.split("kl_")[1]) for policy in found] == [
        ("ppo", 0.05, "0.05"),
        ("ppo", 0.025, "0.025"),
        ("smaller_beta", 0.05, "0.05x0.5"),
        ("smaller_beta", 0.025, "0.025x0.5"),
    ]
    assert sorted(run.settings["kl_coef"] for run in ppo_runs(values).values()) == [0.0125, 0.025, 0.05]
    study = next(run for run in plan.plan([values]).runs.values() if run.stage == "study")
    parents = study.parents
    assert parents["policy/1"] == parents["policy/2"] and parents["respond/1"] == parents["respond/2"]
    assert parents["judge/gold/1"] != parents["judge/gold/2"]  # whose candidates are named otherwise
    assert [policy["kl_coef"] for policy in study.settings["policies"]] == [0.05, 0.025, 0.05, 0.025]
    alone = make(arms={"ppo": arm()}, kl_coefs=[0.025], replicates=[0])
    assert set(ppo_runs(alone)) < set(ppo_runs(values))


def test_arms_of_another_penalty_are_not_plain_ppo():
    """Neither on the line of alphas nor a baseline: they are judged against plain PPO at the study's kl_coef."""
    arms = {"smaller_beta": arm(kl_scale=0.5), "decaying_beta": arm(kl_schedule=LINEAR), "ppo": arm()}
    values = make(arms=arms | {"ema": arm(kind="ema", rate=0.1)}, replicates=[0])
    assert [policy.alpha for policy in policies.policies(values)] == [None, None, "0", None]
    study = next(run for run in plan.plan([values]).runs.values() if run.stage == "study")
    plain = "start_sft0-ref_sft0-kl_0.05"
    assert [policy["baselines"].get("ppo") for policy in study.settings["policies"]] == [plain, plain, None, plain]


def test_an_arms_schedule_takes_the_place_of_the_studys():
    arms = {"ppo": arm(), "fixed": arm(kl_schedule=schema.KlSchedule()), "decaying_beta": arm(kl_schedule=LINEAR)}
    values = make(arms=arms, ppo__kl_schedule=dataclasses.asdict(LINEAR), replicates=[0])
    found = {policy.arm: policy for policy in policies.policies(values)}
    assert list(found) == ["ppo", "fixed"]  # the third says what the study says
    assert [policy.alpha for policy in found.values()] == ["0", None]
    schedules = [run.settings["ppo"]["kl_schedule"] for run in ppo_runs(values).values()]
    assert schedules == [dataclasses.asdict(LINEAR), dataclasses.asdict(schema.KlSchedule())]
    arms = {"decaying_beta": arm(kl_schedule=LINEAR)}
    assert set(ppo_runs(make(arms=arms, replicates=[0]))) < set(ppo_runs(values))


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])
def test_the_alpha_of_adapters_is_read_where_there_are_any(stage):
    def addresses(rank, alpha):
        result = plan.plan([make(**{f"{stage}__lora_rank": rank, f"{stage}__lora_alpha": alpha})])
        return {run.address for run in result.runs.values() if run.stage == stage}

    assert addresses(0, 16.0) == addresses(0, 32.0)
    assert not addresses(0, 16.0) & addresses(4, 16.0) and not addresses(4, 16.0) & addresses(4, 32.0)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "ema", "rate": 0.1},
        {"kind": "ema", "rate": 0.2},
        {"kind": "reset", "every": 5},
        {"kind": "reset", "every": 6},
        {"kind": "multi_kl", "weights": ["1/2", "1/2"]},
        {"kind": "noise", "weights": ["1/2", "1/2"]},
        {"kl_scale": 0.5},
        {"kl_schedule": LINEAR},
        {"kl_schedule": schema.KlSchedule("linear", 0.2)},
        {"kl_schedule": schema.KlSchedule("adaptive")},
        {"kl_schedule": schema.KlSchedule("adaptive", target=7.0)},
    ],
)
def test_each_setting_of_an_arm_makes_a_run_of_its_own(change):
    arms = {"ppo": arm(), "salsa": arm(weights=["1/2", "1/2"]), "ema": arm(kind="ema", rate=0.3)}
    values = make(arms=arms | {"new": arm(**change)}, replicates=[0])
    assert len(ppo_runs(values)) == 4 and len({policy.name for policy in policies.policies(values)}) == 4


def test_the_reference_is_passed_on_whole():
    arms = {"ema": arm(kind="ema", weights=["1/2", "1/2"], rate=0.1), "ppo": arm()}
    result = plan.plan([make(arms=arms, replicates=[0])])
    ema, plain = (run for run in result.runs.values() if run.stage == "ppo")
    assert ema.settings["reference"] == {"kind": "ema", "weights": ["1/2", "1/2"], "rate": 0.1, "every": 0}
    assert plain.settings["reference"] == {"kind": "soup", "weights": ["1"], "rate": 0.0, "every": 0}
    assert schema.from_dict(config.TRAINING["ppo"], ema.settings).reference.rate == 0.1


def test_what_has_moved_is_read_from_the_folder_of_ppo():
    arms = {
        "ema": arm(kind="ema", weights=["1/2", "1/2"], rate=0.1),
        "multi_kl": arm(kind="multi_kl", weights=["1/3", "1/3", "1/3"]),
    }
    result = plan.plan([make(arms=arms, sft__models=3, replicates=[0])])
    models = {
        (run.stage, run.settings.get("reference", {}).get("kind")): {r for r in run.parents if r.startswith("sft")}
        for run in result.runs.values()
        if run.stage == "ppo"
    }
    assert models == {("ppo", "ema"): {"sft0", "sft1"}, ("ppo", "multi_kl"): {"sft0", "sft1", "sft2"}}
    ema, multi_kl = (set(run.parents) for run in result.runs.values() if run.stage == "respond")
    assert {role for role in ema if role.startswith("sft")} == {"sft0", "sft1"}  # to say where the policy went
    assert {role for role in multi_kl if role.startswith("sft")} == {"sft0", "sft1", "sft2"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ppo__learning_rate": 1e-5}, AFTER_PPO),
        ({"kl_coefs": [0.1]}, AFTER_PPO | {"gates"}),  # which warn where the largest is too small to matter
        ({"ppo__kl_schedule__kind": "linear"}, AFTER_PPO),
        ({"ppo__lora_rank": 4}, AFTER_PPO),
        ({"execution__checkpoint_minutes": 1.0}, set()),
        ({"execution__processes": 2}, set()),
        ({"execution__checkpoint_every": 1}, set()),
        ({"execution__rollouts": "vllm"}, set()),
        ({"reward_model__epochs": 7}, AFTER_REWARD),
        ({"reward_model__models": 2}, AFTER_REWARD),
        ({"reward_model__models": 1}, set()),
        ({"sft__epochs": 7}, AFTER_REWARD | {"sft"}),
        ({"base__epochs": 7}, AFTER_REWARD | {"sft", "base"}),
        ({"data__corpus__seed": 7}, AFTER_REWARD | {"sft", "base", "corpus"}),
        ({"data__task__seed": 7}, AFTER_REWARD | {"sft", "prepare", "benchmark"}),
        ({"seed": 7}, AFTER_REWARD | {"sft"}),
        ({"evaluate__gates__smallest_kl": 0.1}, {"gates", "studies"}),
        ({"judges__gold__tie_margin": 0.5}, {"judge", "studies"}),
        ({"judges__gold__tournament": True}, {"studies"}),  # of two arms all pairs are judged anyway
        ({"evaluate__plane__arms": ["salsa"]}, {"plane", "studies"}),
        ({"report__bootstrap": 7}, {"studies"}),
        ({"replicates": [1]}, {"studies"}),
        ({"execution__threads": 64}, set()),
        ({"execution__device": "cuda"}, set()),
        ({"results": "elsewhere"}, set()),
        ({"companions": ["other"]}, set()),
    ],
)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(change, expected):
    assert changed(**change) == expected


def test_a_new_arm_changes_no_other_address():
    before = plan.plan([make()]).runs
    after = plan.plan([make(arms={"noise": arm(kind="noise", weights=["1/2", "1/2"])} | ARMS)]).runs
    assert {path for path in before if path.split("/")[0] != "studies"} <= set(after)
    assert folders(set(after) - set(before)) == AFTER_PPO


def test_a_third_sft_model_leaves_the_first_two():
    before = plan.plan([make()]).runs
    unread = plan.plan([make(sft__models=3)]).runs
    assert folders(set(unread) ^ set(before)) == {"studies"}
    after = plan.plan([make(sft__models=3, arms=ARMS | {"three": arm(weights=["1/3", "1/3", "1/3"])})]).runs
    assert {path for path in before if path.split("/")[0] != "studies"} <= set(after)
    assert Counter(path.split("/")[0] for path in set(after) - set(before))["sft"] == 2  # one in each replicate


def test_seeds_come_from_root_stage_and_replicate():
    result = plan.plan([make()])
    sft = {run.label: run.settings["seed"] for run in result.runs.values() if run.stage == "sft"}
    assert sft["tiny-stories-r1-s0"] == runs.derive_seed(0, "sft", 1, 0) and len(set(sft.values())) == 4
    for stage in ("ppo", "respond"):
        seeds = {(run.replicate, run.settings["seed"]) for run in result.runs.values() if run.stage == stage}
        assert len(seeds) == 2


def test_one_sft_model_has_no_line():
    values = make(arms={"ppo": arm()}, sft__models=1)
    assert "landscape" not in folders(plan.plan([values]).runs)


def test_given_preferences_need_no_second_sft_model():
    values = make(data__preferences="given")
    reward_models = [run for run in plan.plan([values]).runs.values() if run.stage == "reward_model"]
    assert all(set(run.parents) == {"prepare", "sft0"} for run in reward_models)


ULTRA = {"kind": "ultra"}


def test_a_moved_file_is_the_same_file():
    def at(folder):
        values = make(data__task=ULTRA | {"sft_file": f"{folder}/sft.jsonl"}, files={"prepare": {"sft_file": "3:abc"}})
        return set(plan.plan([values]).runs)

    assert at("/one") == at("/two") != set(plan.plan([make(data__task=ULTRA)]).runs)
    other = make(data__task=ULTRA | {"sft_file": "/one/sft.jsonl"}, files={"prepare": {"sft_file": "3:abd"}})
    assert not at("/one") & {p for p in plan.plan([other]).runs if p.split("/")[0] not in ("corpus", "base")}


def test_two_studies_share_what_they_can():
    both = plan.plan([make(), make(ppo__iterations=7), make()])
    assert len(both.studies) == 2
    assert sum(run.stage == "sft" for run in both.runs.values()) == 4
    assert sum(run.stage == "ppo" for run in both.runs.values()) == 8


def test_two_results_folders_are_refused():
    with pytest.raises(runs.UserError, match="results"):
        plan.plan([make(), make(results="elsewhere")])


def test_saved_plan_is_read_again(tmp_path):
    result = plan.plan([make(results=str(tmp_path))])
    path = result.save()
    assert path.parent == tmp_path / "plans" and result.save() == path
    loaded = plan.load(path)
    assert set(loaded.runs) == set(result.runs) and loaded.studies == result.studies
    for mistake in (tmp_path / "none.json", Path(__file__)):
        with pytest.raises(runs.UserError):
            plan.load(mistake)


def test_ten_thousand_runs_in_five_seconds(tmp_path):
    values = make(
        results=str(tmp_path),
        replicates=list(range(10)),
        kl_coefs=[0.01 * i for i in range(1, 13)],
        alphas=[f"{i}/27" for i in range(28)],
    )
    started = time.process_time()  # of this process alone: what else the machine does is no matter
    result = plan.plan([values])
    result.save()
    assert time.process_time() - started < 5
    assert len(result.runs) > 10_000


def test_planning_imports_nothing_heavy():
    code = "import sys, salsa.workflow.plan; "
    code += "print(sorted({'torch', 'hydra', 'snakemake', 'transformers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def judged_pairs(composed):
    """(candidate, baseline) of all judge runs of a plan, sft0 left out."""
    judged = [run.settings for run in plan.plan([composed]).runs.values() if run.stage == "judge"]
    return {(run["candidate"], name) for run in judged for name in run["baselines"] if name != "sft0"}


PLAIN, SALSA, OTHER = (f"start_sft0-ref_{reference}-kl_{{}}" for reference in ("sft0", "soup0.50", "sft1"))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {(SALSA, OTHER, 0.05), (SALSA, OTHER, 0.1)}),
        ({"claim_kl_coef": 0.1}, {(SALSA, OTHER, 0.1)}),
        ({"measure": "reward"}, set()),
        ({"baseline": "nobody"}, set()),
        ({"judges__gold__tournament": True}, {(OTHER, SALSA, 0.05), (OTHER, SALSA, 0.1)}),  # which judges every pair
        ({"baseline": "ppo"}, set()),  # judged anyhow
        ({"candidate": "ppo", "baseline": "salsa"}, set()),
    ],
)
def test_a_claim_lets_its_two_arms_be_judged_directly(changes, expected):
    changes = dict(changes)
    claim = {"text": "t", "measure": "gold_reward", "smallest_effect": 0.1, "origin": "control", "baseline": "other"}
    claim |= {name: changes.pop(name) for name in ("measure", "candidate", "baseline") if name in changes}
    arms = ARMS | {"other": arm(weights=["0", "1"])}
    pairs = judged_pairs(make(arms=arms, kl_coefs=[0.05, 0.1], replicates=[0], claims={"it": claim}, **changes))
    anyhow = {(name.format(k), PLAIN.format(k)) for name in (SALSA, OTHER) for k in (0.05, 0.1)}
    assert pairs - anyhow == {(one.format(k), other.format(k)) for one, other, k in expected}
    assert anyhow <= pairs
