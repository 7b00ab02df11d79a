"""Every preset composes and plans; every mistake is one line."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from snakemake.cli import parse_config

from salsa.workflow import checks, compose, config, overriding, plan, policies, stages
from salsa.workflow.multirun import snakemake_text
from salsa.workflow.runs import UserError

FITTING = {  # what else has to be chosen with a kind of data
    "stories": [],
    "reviews": ["benchmark=[openings]", "judge=[gold,vader]"],
    "ultra": ["arm=[ppo,salsa]", "benchmark=[ultrafeedback,mt_bench,arena_hard]", "judge=[]"],
}


def one(*overrides):
    composed = compose.compose(overrides)
    assert len(composed) == 1
    return composed[0]


@pytest.mark.parametrize("model", overriding.presets("model"))
@pytest.mark.parametrize("data", FITTING)
def test_models_and_data_compose_and_plan(model, data):
    if model == "tiny" and data == "ultra":
        pytest.skip("has no corpus, and is refused below")
    assert plan.plan([one(f"model={model}", f"data={data}", *FITTING[data])]).runs


@pytest.mark.parametrize("experiment", overriding.presets("experiment"))
def test_experiments_compose_and_plan(experiment):
    composed = compose.compose([f"experiment={experiment}"])
    assert len(composed) == 1 + len(composed[0].config.companions)
    assert composed[0].config.name.startswith(experiment)
    assert all(values.link == f"studies/{values.config.name}" for values in composed)
    assert plan.plan(composed).studies


@pytest.mark.parametrize("arm", overriding.presets("arm"))
def test_arms_compose_under_their_names_and_plan(arm):
    values = one(f"arm=[{arm}]", *(["sft.models=3"] if arm == "n_soup" else []))
    arms = list(values.config.arms)  # of some presets, those that it is made of come first
    assert arms[-1] == arm and all(each.description for each in values.config.arms.values())
    study = next(run for run in plan.plan([values]).runs.values() if run.stage == "study")
    assert [policy["arm"] for policy in study.settings["policies"]] == 3 * arms  # of three replicates


def test_all_arms_together():
    values = one(f"arm=[{','.join(overriding.presets('arm'))}]", "sft.models=3", "replicates=[0]")
    runs = [run for run in plan.plan([values]).runs.values() if stages.ALL[run.stage].trains_policy]
    ppo = {run.settings["reference"]["kind"]: run.settings for run in runs if run.stage == "ppo"}
    assert {"soup", "noise", "multi_kl", "ema", "reset"} <= set(ppo)
    assert len(runs) == len(policies.specs(values)) == len(values.config.arms) - 1 >= 12  # ema is warp_a, too
    assert (ppo["ema"]["reference"]["rate"], ppo["reset"]["reference"]["every"]) == (0.05, 10)
    penalties = {
        (run.settings["kl_coef"], run.settings["ppo"]["kl_schedule"]["kind"]) for run in runs if run.stage == "ppo"
    }
    assert penalties >= {(0.3, "fixed"), (0.15, "fixed"), (0.3, "linear")}


def test_a_schedule_of_the_command_line():
    """Hydra puts nothing into a null: an arm's own schedule is merged by OmegaConf."""
    composed = compose.compose(["arms.salsa.kl_schedule.kind=linear,adaptive", "ppo.kl_schedule.kind=linear"])
    assert [values.config.arms["salsa"].kl_schedule.kind for values in composed] == ["linear", "adaptive"]
    assert composed[0].config.arms["ppo"].kl_schedule is None and composed[0].config.ppo.kl_schedule.kind == "linear"
    (values,) = compose.compose(["arms.salsa.kl_schedule={kind:linear,final:0.2}", "+arms.x.kl_schedule.kind=linear"])
    assert values.config.arms["salsa"].kl_schedule.final == 0.2 and values.config.arms["x"].start == ["1"]
    assert (
        one("arm=[decaying_beta]", "arms.decaying_beta.kl_schedule=null").config.arms["decaying_beta"].kl_schedule
        is None
    )


def test_a_schedule_ignores_nothing():
    with pytest.raises(UserError, match=r"ppo\.kl_schedule\.target=3.0: read by kind adaptive alone"):
        one("ppo.kl_schedule.target=3")
    with pytest.raises(UserError, match=r"arms\.salsa\.kl_schedule\.final=0.5: read by kind linear alone"):
        one("arms.salsa.kl_schedule={kind:adaptive,final:0.5}")


def test_a_package_of_deepspeed_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "accelerate.yaml").write_text("distributed_type: DEEPSPEED\n")
    with pytest.raises(UserError, match="needs deepspeed, of the extra"):
        one(f"execution.accelerate_config={tmp_path}/accelerate.yaml", "execution.processes=2")


def test_default_study():
    values = one()
    assert list(values.config.arms) == ["ppo", "salsa", "strong_soup"] and values.config.replicates == [0, 1, 2]
    result = plan.plan([values])
    assert result.studies[0]["link"] == "studies/default"
    torch_stages = {"sft", "reward_model", "landscape", "ppo", "respond"}  # the base is copied, without torch
    assert sum(run.stage in torch_stages for run in result.runs.values()) <= 33


@pytest.mark.parametrize("experiment", ["decisive", "stronger_penalty"])
def test_a_registered_study_has_the_regime_of_its_model_and_data(experiment):
    """Their files repeat it, for what is registered stands in them alone."""
    default, study = one("arm=[ppo,strong_soup]").config, one(f"experiment={experiment}").config
    assert study.sft == default.sft and study.data == default.data and study.sft_variants == default.sft_variants


def test_full_study_is_planned():
    result = plan.plan(compose.compose(["experiment=tiny_full"]))
    assert len(result.studies) == 2
    full = next(run for run in result.runs.values() if run.stage == "study" and run.label == "tiny_full")
    policies = full.settings["policies"]
    assert {policy["replicate"] for policy in policies} == {0, 1, 2, 3, 4}
    assert len({policy["arm"] for policy in policies}) == 14
    once = ("alpha_", "n_soup", "multi_kl", "ema", "reset", "smaller_beta", "decaying_beta")
    assert {policy["kl_coef"] for policy in policies if policy["arm"].startswith(once)} == {0.05}
    assert {policy["kl_coef"] for policy in policies if policy["arm"] == "noise"} == {0.02, 0.05, 0.1}


def test_sweeps_are_a_product():
    composed = compose.compose(["ppo.learning_rate=1e-5,3e-5", "seed=range(1,4)", "alphas=[0,0.5]"])
    points = [(values.config.ppo.learning_rate, values.config.seed, values.config.alphas) for values in composed]
    assert points == [(rate, seed, ["0", "0.5"]) for rate in (1e-5, 3e-5) for seed in (1, 2, 3)]
    assert [values.config.model.name for values in compose.compose(["model=choice(tiny,gemma_2b)"])] == [
        "tiny",
        "gemma_2b",
    ]
    assert {values.config.name for values in compose.compose(["experiment=glob(tiny_full*)"])} == {
        "tiny_full",
        "tiny_full_overfitted",
    }


def test_only_an_experiment_gives_the_plain_name():
    assert one("experiment=reviews").link == "studies/reviews"
    assert one("experiment=reviews", "execution.threads=7", "results=/tmp/x").link == "studies/reviews"
    assert one("ppo.iterations=3").link is None


def test_companions_take_the_overrides():
    composed = compose.compose(["experiment=tiny_full", "ppo.iterations=12"])
    assert [values.config.ppo.iterations for values in composed] == [12, 12]
    assert composed[1].config.sft.stop == "epochs" and composed[1].link is None
    assert [values.point for values in composed] == [{"experiment": values.config.name} for values in composed]
    swept = compose.compose(["companions=['ppo.iterations=7']", "seed=0,1"])
    assert [values.point for values in swept] == [
        {"seed": seed, "ppo.iterations": iterations} for seed in "01" for iterations in ("50", "7")
    ]


def test_companions_are_compared_with_their_study():
    result = plan.plan(compose.compose(["experiment=paper"]))
    points = result.runs[result.comparison].settings["points"]
    assert points == [{"model": model} for model in ("gemma_2b", "mistral_7b", "llama2_7b")]
    assert list(result.runs[result.comparison].parents.values()) == [study["path"] for study in result.studies]
    twice = plan.plan(compose.compose(["experiment=glob(tiny_full*)"]))  # one of which is the other's companion
    assert len(twice.studies) == len(twice.runs[twice.comparison].settings["points"]) == 2


def test_what_is_overridden_has_no_companions():
    (alone,) = compose.compose(["experiment=paper", "model=llama2_7b_lora"])
    assert (alone.config.name, alone.point) == ("paper_llama2_7b_lora", {})
    assert plan.plan([alone]).comparison is None


def test_one_folder_is_no_three_models(tmp_path):
    with pytest.raises(UserError, match=r"model\.path=\S+: one model's, and model=mistral_7b is planned too"):
        compose.compose(["experiment=paper", f"model.path={tmp_path}"])


def test_companions_by_a_value():
    composed = compose.compose(["companions=['ppo.iterations=7','model=smollm2_135m']"])
    assert [values.point for values in composed] == [
        {"ppo.iterations": "50", "model": "tiny"},
        {"ppo.iterations": "7", "model": "tiny"},
        {"ppo.iterations": "100", "model": "smollm2_135m"},
    ]


def test_two_studies_of_one_name_are_refused(tmp_path, monkeypatch):
    """Companions of an experiment whose name says nothing of the model."""
    conf = tmp_path / "conf"
    shutil.copytree(overriding.CONF, conf)
    (conf / "experiment" / "same.yaml").write_text(
        "# @package _global_\nname: same\ncompanions: [model=smollm2_135m]\n"
    )
    monkeypatch.setattr(overriding, "CONF", conf)
    with pytest.raises(UserError, match="two studies are called same"):
        compose.compose(["experiment=same"])


def test_what_an_experiment_says_of_an_arm_makes_none():
    study, _ = compose.compose(
        ["experiment=tiny_full", "arm=[ppo,ema]", "+arms.far.start=[1]", "evaluate.plane.arms=[]"]
    )
    assert list(study.config.arms) == ["ppo", "ema", "far"]
    assert study.config.arms["ema"].kl_coefs == [0.05]


def test_an_arm_that_is_left_out_takes_what_it_is_made_of_with_it():
    study = one("experiment=decisive", "arm=[ppo,salsa]")
    assert (list(study.arms), study.config.sft_variants) == (["ppo", "salsa"], {})
    study = one("experiment=decisive", "arm=[ppo,salsa]", "~sft_variants.strong")
    assert list(study.arms) == ["ppo", "salsa"]
    kept = one("experiment=decisive", "arm=[ppo,salsa,other]", "arms.other.reference.weights=strong")
    assert list(kept.config.sft_variants) == ["strong"]
    with pytest.raises(UserError, match=r"arms.strong_reference.reference.weights.*strong is no ingredient"):
        one("experiment=decisive", "~sft_variants.strong")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sft_variants.strong.seed=1", "sft_variants.strong: no arm is made of it"),
        ("arms.strong_reference.replicates=8", "arms.strong_reference: is not among the chosen arms; add strong_ref"),
        ("+arms.n_soup.kl_coefs=[0.1]", "arms.n_soup: is not among the chosen arms"),
        ("+arms.far.kl_coefs=[0.1]", "arms.far: no such arm"),
        ("+arms.far.description=mine", "arms.far: no such arm"),
    ],
)
def test_nothing_is_said_of_an_arm_that_is_left_out(override, says):
    with pytest.raises(UserError, match=says):
        one("experiment=decisive", "arm=[ppo,salsa]", override)


def test_an_arm_of_the_command_line():
    values = one(
        "+arms.far={start:[1],reference:{weights:[0.25,0.75]}}",
        "+arms.n.reference.weights=[1/3,1/3,1/3]",
        "sft.models=3",
    )
    assert values.config.arms["far"].reference == config.Reference("soup", ["0.25", "0.75"])
    assert values.config.arms["n"].start == ["1"]


MISTAKES = {
    "~arms": "arms: removed, and needed",
    "~seed": "removed, and needed",
    "evaluate.gates.lowest_agreement=" + 400 * "9": "is too large",
    "arms={}": "changes nothing",
    "arm=[ppo,ppo]": "a preset stands there twice",
    "arm=../x": "no such preset",
    "model=[tiny,gemma_2b]": "one model is chosen",
    "=1": "no key stands before =",
    "hydra.job.name=x": "a setting of Hydra",
    "title=${oc.env:HOME}": "title: calls oc.env",
    "title=${hydra:runtime.cwd}": "title: calls hydra",
    "title=${title}": "Recursive interpolation",
    "title=[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]": "brackets more than 20 deep",
    "ppo.epochs=": "ppo.epochs",
    "ppo.epochs=[1]": "ppo.epochs",
    "ppo.whiten_advantages=2": "true or false",
    "judges.gold.tournament=maybe": "true or false",
    "ppo.ep\u200bochs=1": "\\u200b",
    "seed=range(0,1000000)": "a sweep of more than 1000 points",
    "seed=shuffle(range(0,1000000000))": "a sweep of more than 1000 points",
    "seed=range(0,5,0)": "a sweep without values",
    "seed=-1": "at least 0",
    "report.seed=-1": "at least 0, and at most 4294967295",
    "sft.models=99999999999999999999999": "at most 100",
    "arms.salsa.reference.weights=['1e999999999']": "no number",
    "evaluate.plane.step=1/1000": "4004001 models",
    "execution.trackers=[a]": "tensorboard, wandb",
    "ppo.adam_beta1=1": "below 1",
    "sft.warmup=1": "below 1",
    "ppo.warmup=1000": "longer than ppo.iterations=50",
    "evaluate.gates.smallest_kl=-1": "at least 0",
    "evaluate.gates.smallest_kl=nan": "at least 0",
    "evaluate.gates.lowest_agreement=0.99": "above evaluate.gates.highest_agreement",
    "judges.gold.templates=x": "read by kind openai alone",
    "+judges.ai={kind:openai,model:some,tie_margin:1}": "alone, and this is openai; leave it out",
    "+judges.ai={kind:openai,model:some,key_variable:sk-secret}": "key_variable: must be the name",
    "+judges.ai={kind:openai,model:some,base_url:localhost}": "http://",
    "benchmarks.in_distribution.file=x": "read by kind arena_hard, mt_bench, preference_file alone",
    "benchmarks.in_distribution.prompts=0": "it must be at least 1",
    "benchmarks.in_distribution.prompts=-1": "at least 0",
    "data.task.sft_file=x.jsonl": "read by kind ultra alone",
    "data.task.opening_words=3": "read by kind reviews alone",
    "data.task.demonstrations=0": "at least 1 are needed by SFT",
    "data.task.evaluation=0": "at least 1 are needed",
    "data.corpus.documents=0": "nothing to pretrain on",
    "reward_model.batch_size=100000": "more than reward_model.pairs",
    "reward_model.held_out=100000": "none is left to train on",
    "reward_model.normalisation_prompts=1": "at least 2",
    "reward_model.models=0": "at least 1",
    "reward_model.models=1.5": "reward_model.models",
    "model.chat_template=../../etc/passwd": "cannot be part of a file name",
    "model.revision=x": "of a model of the hub alone",
    "model.path=x": "nothing is read with model.source=pretrain",
    "results=": "is empty",
    "results='a\nb'": "a line break",
    "name=.hidden": "file name",
    "+arms.sft0.start=[1]": "the name of an SFT model",
    "+arms.PPO.start=[0,1]": "in capitals alone",
    "+benchmarks.evaluation.kind=in_distribution": "the name of the development prompts",
    "companions=[reviews]": "write key=value",
    "companions=['ppo.iterations=1,2']": "not one override",
    "companions=['+arms.far.start=[1]']": "not one override",
    "companions=['~arms.salsa']": "not one override",
    "execution.gpus=2": "execution.processes=2",
    "companions=['foo=1']": "foo",
    "model=foo": "gemma_2b",
    "arm=[ppo,foo]": "salsa",
    "experiment=foo": "tiny_full",
    "ppo.learning_rat=1": "did you mean ppo.learning_rate",
    "+ppo.foo=1": "ppo.foo",
    "+foo=1": "foo",
    "foo=1": "the configuration has",
    "~ppo": "needed",
    "arms.foo.start=[1]": "with +",
    "+arms.foo.strt=[1]": "did you mean arms.foo.start",
    "ppo.batch_size=abc": "ppo.batch_size",
    "ppo.batch_size=null": "ppo.batch_size",
    "ppo=1": "ppo",
    "ppo.batch_size=0": "at least 1",
    "ppo.learning_rate=nan": "above 0",
    "ppo.gamma=2": "between 0 and 1",
    "model.name=???": "model.name",
    "a b": "a b",
    "seed=interval(1,2)": "seed",
    "alphas=[2]": "must lie between 0 and 1",
    "alphas=[x]": "no number",
    "alphas=[0.5,1/2]": "twice",
    "alphas=[0.333,1/3]": "0.33",
    "alpha_kl_coefs=[0.7]": "0.7",
    "arms.salsa.kl_coefs=[0.7]": "0.7",
    "arms.salsa.kl_coefs=[]": "empty",
    "evaluate.plane.arms=[nothing]": "nothing",
    "evaluate.plane.step=2": "above 0, and at most 1",
    "evaluate.plane.step=2/3": "1 must be a multiple of it",
    "evaluate.plane.kl_coef=0.7": "0.7",
    "+judges.ai.kind=openai": "judges.ai.model is missing",
    "+judges.ai={kind:openai,model:some,templates:/nowhere}": "no such folder",
    "judges.gold.tie_margin=-1": "tie_margin",
    "claims.stable.smallest_effect=0": "above 0",
    "claims.stable.measure=happiness": "no such choice",
    "claim_kl_coef=0.7": "is not in kl_coefs=",
    "registered=[conf/nothing.yaml]": "no such file of the repository",
    "registered=[/etc/hostname]": "no file of the repository, such as conf/claims.yaml",
    "registered=[conf/experiment/default.yaml,conf/experiment/warm.yaml]": "warm.yaml: is not the experiment",
    "registered=[conf/claims.yaml,conf/./claims.yaml]": "conf/claims.yaml and conf/./claims.yaml are one file",
    "registered=[conf//experiment/./warm.yaml]": "of this study; name conf/experiment/default.yaml",
    "chosen_on=[0/1]": "settings were chosen on replicate 1 of root seed 0",
    "chosen_on=[00/01]": "settings were chosen on replicate 1 of root seed 0",
    "chosen_on=[1]": "write its root seed and number, as in 1000/3",
    "execution.judge_timeout=0": "above 0",
    "arms.salsa.reference.weights=[1,1]": "sum to 2",
    "arms.salsa.reference.weights=[1/0]": "no number",
    "arms.salsa.reference.weights=[1/2,1/4,1/4]": "2 SFT models",
    "arms.salsa.reference.kind=foo": "ema, multi_kl, noise, reset, soup",
    "arms.salsa.reference.kind=ema": "above 0 and at most 1",
    "+arms.x.reference={kind:ema,rate:1.5}": "between 0 and 1",
    "arms.salsa.reference.kind=reset": "at least 1 and below the 50 iterations",
    "+arms.x.reference={kind:reset,every:50}": "at least 1 and below the 50 iterations",
    "arms.salsa.reference.rate=0.1": "read by kind ema alone",
    "arms.salsa.reference.every=2": "read by kind reset alone",
    "+arms.x.reference={kind:reset,every:2,rate:0.1}": "read by kind ema alone",
    "+arms.x.reference={kind:ema,rate:0.1,every:2}": "read by kind reset alone",
    "arms.ppo.reference.kind=multi_kl": "write soup",
    "+arms.x.reference={kind:multi_kl,weights:[0,1]}": "write soup",
    "+arms.x.reference={kind:multi_kl,weights:[2,-1]}": "no weight below 0",
    "+arms.x.reference={kind:noise,weights:[1,0]}": "is none",
    "arms.ppo.kl_scale=0": "above 0",
    "arms.ppo.kl_scale=-1": "above 0",
    "arms.ppo.kl_scale=inf": "above 0",
    "arms.ppo.kl_schedule.kind=foo": "fixed, linear, adaptive",
    "arms.ppo.kl_schedule.final=1.5": "between 0 and 1",
    "arms.ppo.kl_schedule.target=0": "above 0",
    "arms.ppo.kl_schedule.foo=1": "arms.ppo.kl_schedule has kind, final",
    "arms.foo.kl_schedule.kind=linear": "with +",
    "ppo.kl_schedule.kind=foo": "fixed, linear, adaptive",
    "ppo.kl_schedule.final=-0.5": "between 0 and 1",
    "ppo.kl_schedule.target=0": "above 0",
    "ppo.kl_schedule.horizon=0": "above 0",
    "ppo.kl_schedule.kin=linear": "did you mean ppo.kl_schedule.kind",
    "ppo.value_model=policy": "reward_model, sft, shared",
    "ppo.score_normalisation=foo": "constants, batch, none",
    "ppo.score_clip=-1": "at least 0",
    "ppo.score_clip=inf": "at least 0",
    "ppo.lora_rank=-1": "at least 0",
    "ppo.lora_alpha=0": "above 0",
    "sft.lora_rank=-1": "at least 0",
    "sft.lora_alpha=0": "above 0",
    "reward_model.lora_rank=-1": "at least 0",
    "reward_model.lora_alpha=-1": "above 0",
    "execution.checkpoint_minutes=-1": "at least 0",
    "execution.rollouts=sglang": "transformers, vllm",
    "execution.processes=0": "at least 1",
    "execution.processes=3": "64 responses of a mini-batch",
    "execution.checkpoint_every=-1": "at least 0",
    "execution.accelerate_config=missing.yaml": "no such file",
    "sft.models=1": "SFT model",
    "replicates=[]": "empty",
    "replicates=[0,0]": "twice",
    "kl_coefs=[0.3,0.30000000000000004]": "twice",
    "kl_coefs=[-0.0]": "write 0",
    "evaluate.alphas=[1/3,0.333333333]": "twice",
    "ppo.gamma=-0.0": "write 0",
    "evaluate.plane.arms=[salsa,salsa]": "twice",
    "execution.trackers=[tensorboard,tensorboard]": "twice",
    "data.preferences=given": "comes without preferences",
    "+claims.same={text:x,measure:reward,smallest_effect:1,candidate:ppo,baseline:ppo}": "is the candidate itself",
    "kl_coefs=[-1]": "kl_coefs: -1: must be at least 0",
    "arm=[]": "nothing to train",
    "ppo.mini_batches=3": "divisible",
    "ppo.schedule=cosine": "linear, constant",
    "ppo.kl_in=loss": "zero",
    "name=a/b": "file name",
    "benchmark=[openings]": "no benchmark openings",
    "judge=[vader]": "vader",
    "data.preferences=foo": "sampled, given",
    "lengths.response=500": "max_length",
    "model.chat_template=foo": "roles",
    "model.source=hub": "model.path",
    "model.architecture.heads=3": "divisible",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(override):
    with pytest.raises(UserError) as error:
        compose.compose([override])
    assert "\n" not in str(error.value)
    assert MISTAKES[override] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["ppo.epochs=1", "ppo.epochs=2"], "ppo.epochs is given twice"),
        (["ppo.epochs=1", "+ppo.epochs=2"], "ppo.epochs is given twice"),
        (["model=tiny", "model=gemma_2b"], "model is given twice"),
        (["seed=range(0,100)", "ppo.epochs=range(1,100)"], "a sweep of more than 1000 points"),
        (["model=gemma_2b", "base.epochs=3"], "base.epochs: of model.source=pretrain alone"),
        (["model=gemma_2b", "model.architecture.layers=3"], "of model.source=pretrain alone"),
        ([f"replicates={list(range(500))}".replace(" ", ""), "kl_coefs=[1,2,3,4,5]"], "a study may have 5000"),
    ],
)
def test_mistakes_of_several_overrides(overrides, says):
    with pytest.raises(UserError, match=says) as error:
        compose.compose(overrides)
    assert "\n" not in str(error.value)


def test_a_resolver_is_not_called(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "sk-canary")
    for override in ("title=${oc.env:SECRET_KEY}", "companions=['name=${oc.env:SECRET_KEY}']"):
        with pytest.raises(UserError, match=r"calls oc\.env") as error:
            one(override)
        assert "canary" not in str(error.value)
    assert one("title=${name}").config.title == "default"


@pytest.mark.parametrize(
    ("override", "package", "extra"),
    [
        ("execution.rollouts=vllm", "vllm", "salsa[vllm]"),
        ("ppo.lora_rank=8", "peft", "salsa[lora]"),
        ("sft.lora_rank=8", "peft", "salsa[lora]"),
        ("reward_model.lora_rank=8", "peft", "salsa[lora]"),
    ],
)
def test_what_needs_a_package_says_so_while_planning(monkeypatch, override, package, extra):
    asked = []
    monkeypatch.setattr(checks.importlib.util, "find_spec", asked.append)  # finds nothing
    with pytest.raises(UserError) as error:
        one(override)
    assert asked == [package] and extra in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name)
    key, value = override.split("=")
    assert str(compose._value(one(override).config, key)) == value


def test_adapters_and_a_moving_reference_are_refused(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name)
    for arm in ("ema", "reset"):
        with pytest.raises(UserError, match=f"arms.{arm}.reference.kind={arm}: a moving reference") as error:
            one(f"arm=[ppo,{arm}]", "ppo.lora_rank=8")
        assert "\n" not in str(error.value)
    assert one("arm=[ppo,multi_kl]", "ppo.lora_rank=8", "ppo.value_model=shared")
    with pytest.raises(UserError, match="samples from whole models"):
        one("execution.rollouts=vllm", "ppo.lora_rank=8")


def test_processes_share_mini_batches_evenly():
    assert one("execution.processes=4", "ppo.mini_batches=2").config.execution.processes == 4
    with pytest.raises(UserError, match="16 responses of a mini-batch"):
        one("execution.processes=32", "ppo.mini_batches=4")
    for stage in ("sft", "reward_model"):
        with pytest.raises(UserError, match=rf"cannot share {stage}\.batch_size=34 evenly"):
            one("execution.processes=4", f"{stage}.batch_size=34")


FSDP2 = "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2"


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        (FSDP2, ["execution.processes=2"], None),
        ("distributed_type: FSDP", ["execution.processes=2"], "set fsdp_version: 2"),
        (FSDP2, [], None),
        ("distributed_type: 'NO'", [], None),
        ("distributed_type: 'NO'", ["execution.processes=2"], "is NO, which starts one process"),
        ("use_cpu: true", ["execution.processes=2"], "is missing, which starts one process"),
        ("distributed_type: MULTI_GPU", ["execution.processes=2", "arm=[ppo,ema]"], None),
        (FSDP2, ["execution.processes=2", "arm=[ppo,ema]"], "the arm ema needs them whole"),
        ('{\n "distributed_type": "DEEPSPEED"\n}', ["ppo.lora_rank=4"], "ppo.lora_rank needs them whole"),
        (FSDP2, ["execution.processes=2", "sft.lora_rank=4"], "sft.lora_rank needs them whole"),
        (FSDP2, ["execution.processes=2", "reward_model.lora_rank=4"], "reward_model.lora_rank needs them whole"),
        (FSDP2, ["execution.rollouts=vllm"], "vllm needs them whole"),
    ],
)
def test_accelerates_configuration_must_fit_the_runs(monkeypatch, tmp_path, text, overrides, says):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "accelerate.yaml").write_text(f"{text}\n")
    overrides = [f"execution.accelerate_config={tmp_path}/accelerate.yaml", *overrides]
    if says is None:
        assert one(*overrides).config.execution.accelerate_config
        return
    with pytest.raises(UserError, match=says) as error:
        one(*overrides)
    assert "\n" not in str(error.value)


ULTRA = ["data=ultra", *FITTING["ultra"]]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data=ultra"], "no gold to choose by; leave it out, and arms that are made of it (as arm=[ppo,salsa] does)"),
        (["data=ultra", "arm=[ppo,salsa]"], "in_distribution"),
        (ULTRA, "no corpus"),
        ([*ULTRA[:-1], "judge=[gold]"], "cannot be judged by gold"),
        ([*ULTRA, "model=gemma_2b", "data.preferences=sampled"], "no gold"),
        ([*ULTRA, "model=gemma_2b", "data.task.sft_file=missing.jsonl"], "missing.jsonl"),
        (["model=gemma_2b", "model.path=./nowhere"], "./nowhere"),
        (["model=gemma_2b", "model.path=a/b/c"], "a/b/c"),
    ],
)
def test_choices_that_do_not_fit_are_refused(overrides, says):
    with pytest.raises(UserError) as error:
        compose.compose(overrides)
    assert "\n" not in str(error.value) and says in str(error.value)


def test_a_presets_commit_is_of_its_own_path_alone(tmp_path):
    for model in ("gemma_2b", "mistral_7b_lora", "llama2_7b"):
        pinned = compose.compose([*ULTRA, f"model={model}"])[0].config.model.revision
        assert re.fullmatch("[0-9a-f]{40}", pinned)
        other = compose.compose([*ULTRA, f"model={model}", "model.path=some/other"])[0].config.model
        assert (other.path, other.revision) == ("some/other", None)
    both = compose.compose([*ULTRA, "model=gemma_2b", "model.path=some/other", "model.revision=v2"])[0].config.model
    assert both.revision == "v2"


def test_local_model_folder_is_checked_and_addressed_by_content(tmp_path):
    def addressed(folder):
        found = plan.plan([one("model=gemma_2b", f"model.path={folder}")])
        return next(run.address for run in found.runs.values() if run.stage == "base")

    folder = tmp_path / "one"
    folder.mkdir()
    for name, content, says in [
        (None, None, "no config.json"),
        ("config.json", json.dumps({"max_position_embeddings": 64}), "safetensors"),
        ("model.safetensors", "weights", "tokenizer"),
        ("tokenizer.json", "{}", "max_position_embeddings is 64"),
    ]:
        if name:
            (folder / name).write_text(content)
        with pytest.raises(UserError, match=says):
            addressed(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    before = addressed(folder)
    folder.rename(tmp_path / "two")
    assert addressed(tmp_path / "two") == before
    (tmp_path / "two" / "model.safetensors").write_text("others!")
    assert addressed(tmp_path / "two") != before


def test_local_data_files_are_checked_and_addressed_by_content(tmp_path):
    file = tmp_path / "sft.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    arguments = [*ULTRA, "model=gemma_2b", f"data.task.sft_file={file}"]
    first = one(*arguments)
    assert list(first.files["prepare"]) == ["sft_file"]
    study = next(run for run in plan.plan([first]).runs.values() if run.stage == "study")
    assert study.settings["config"]["data"]["task"]["sft_file"] == "sft.jsonl"
    file.write_text('{"messages": 1\n')
    with pytest.raises(UserError, match=r"sft\.jsonl"):
        one(*arguments)


def local_ultra(folder, rows=400, turns=2, judge="[]"):
    """Overrides of a study of local files alone."""
    pairs, questions = folder / "p.jsonl", folder / "q.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(rows))
    )
    asked = [{"question_id": i, "category": "c", "turns": [f"{turn} {i}" for turn in range(turns)]} for i in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    files = ["data.task.sft_file=", f"data.task.preference_file={pairs}", f"benchmarks.mt_bench.file={questions}"]
    small = ["ppo.batch_size=16", "reward_model.held_out=8", "reward_model.batch_size=16"]
    return ["data=ultra", "arm=[ppo,salsa]", "benchmark=[mt_bench]", f"judge={judge}", "model=gemma_2b", *files, *small]


def test_faults_of_local_rows_are_found_while_planning(tmp_path, monkeypatch):
    one(*local_ultra(tmp_path, judge="[openai]"))
    three = local_ultra(tmp_path, turns=3)
    one(*three)
    with pytest.raises(
        UserError, match=r"benchmarks\.mt_bench: prompts of 3 turns, and judges\.openai is shown 2 at most"
    ):
        one(*local_ultra(tmp_path, turns=3, judge="[openai]"))
    with pytest.raises(UserError, match=r"p\.jsonl: \d+ rows for prompts, and ppo\.batch_size=16 need 16"):
        one(*local_ultra(tmp_path, rows=40))
    three = local_ultra(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "c", "turns": [3]}\n')
    with pytest.raises(UserError, match=r"benchmarks\.mt_bench: .*q\.jsonl:1: 'turns' has the wrong form"):
        one(*three)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(UserError, match="org/name: a folder, not a file"):
        one(*ULTRA, "model=gemma_2b", "data.task.preference_file=org/name")


def test_turns_that_fill_the_model_are_refused_while_planning():
    lengths = ["model.architecture.max_length=80", "base.block_length=64", "lengths.prompt=32"]
    with pytest.raises(UserError, match=r"benchmarks\.two_turn: 2 turns of lengths\.response=40 fill all positions"):
        one(*lengths, "lengths.response=40")
    one(*lengths, "lengths.response=24")


def test_turns_that_fill_a_local_model_are_refused_while_planning(tmp_path, tiny_chat_model):
    folder = shutil.copytree(tiny_chat_model, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 100}))
    common = [*local_ultra(tmp_path), "model.source=hub", f"model.path={folder}", "lengths.prompt=20"]
    one(*common, "lengths.response=49")  # two questions of a token, and two answers
    with pytest.raises(
        UserError, match=r"mt_bench: 2 turns of lengths.response=50 fill all .*max_position_embeddings=100"
    ):
        one(*common, "lengths.response=50")


def test_command_line(tmp_path):
    def salsa(*arguments):
        return subprocess.run([sys.executable, "-m", "salsa", *arguments], capture_output=True, text=True)

    shown = salsa("plan", f"results={tmp_path}")
    assert shown.returncode == 0 and "reward_model" in shown.stdout
    printed = json.loads(salsa("plan", "--json", f"results={tmp_path}").stdout)
    assert set(printed) == {"results", "runs", "studies", "comparison", "estimate", "warnings"}
    mistaken = salsa("plan", "model=foo")
    assert mistaken.returncode == 1 and mistaken.stderr.count("\n") == 1 and not mistaken.stdout
    nothing = salsa("verify", str(tmp_path / "none"))
    assert nothing.returncode == 1 and nothing.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=5"],
        ["arm=[ppo]"],
        ["arm=[ppo]", "seed=5", "replicates=[0]"],
        ["title='a b: c #d'", "+arms.x={description:'as it \"is\"'}"],
    ],
)
def test_snakemake_hands_the_overrides_of_salsa_run_on(overrides):
    value = parse_config([f"overrides={snakemake_text(shlex.join(overrides))}"])["overrides"]
    assert shlex.split(value) == overrides


def test_the_dtype_of_a_package_is_refused_instead_of_ignored():
    with pytest.raises(UserError, match="read as float32"):
        compose.compose(["experiment=smollm2_reviews", "model.dtype=bfloat16"])


def test_two_arms_that_differ_in_the_third_decimal_are_refused():
    near = ['+arms.a.reference.weights=["0.501","0.499"]', '+arms.b.reference.weights=["0.502","0.498"]']
    with pytest.raises(UserError, match=r"are both shown as start_sft0-ref_soup0\.50-kl_0\.3"):
        compose.compose(near)
