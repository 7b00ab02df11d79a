"""Every preset composes and plans; every mistake is one line."""

import json
import subprocess
import sys

import pytest

from salsa import compose, plan
from salsa.runs import UserError

FITTING = {  # what else has to be chosen with a kind of data
    "stories": [],
    "reviews": ["benchmark=[openings]", "judge=[gold,vader]"],
    "ultra": ["benchmark=[ultrafeedback,mt_bench,arena_hard]", "judge=[]"],
}


def one(*overrides):
    composed = compose.compose(overrides)
    assert len(composed) == 1
    return composed[0]


@pytest.mark.parametrize("model", compose.presets("model"))
@pytest.mark.parametrize("data", FITTING)
def test_models_and_data_compose_and_plan(model, data):
    if model == "tiny" and data == "ultra":
        pytest.skip("has no corpus, and is refused below")
    assert plan.plan([one(f"model={model}", f"data={data}", *FITTING[data])]).runs


@pytest.mark.parametrize("experiment", compose.presets("experiment"))
def test_experiments_compose_and_plan(experiment):
    composed = compose.compose([f"experiment={experiment}"])
    assert [values["name"] for values in composed] == [experiment, *composed[0]["companions"]]
    assert all(values["link"] == f"studies/{values['name']}" for values in composed)
    assert plan.plan(composed).studies


@pytest.mark.parametrize("arm", compose.presets("arm"))
def test_arms_compose_under_their_names(arm):
    assert list(one(f"arm=[{arm}]")["arms"]) == [arm]


def test_default_study():
    values = one()
    assert list(values["arms"]) == ["ppo", "salsa", "other"] and values["replicates"] == [0, 1]
    result = plan.plan([values])
    assert result.studies[0]["link"] == "studies/default"
    torch_stages = {"sft", "reward_model", "landscape", "ppo", "respond"}  # the base is copied, without torch
    assert sum(run.stage in torch_stages for run in result.runs.values()) <= 20


def test_full_study_is_planned():
    result = plan.plan(compose.compose(["experiment=tiny_full"]))
    assert len(result.studies) == 2
    full = next(run for run in result.runs.values() if run.stage == "study" and run.label == "tiny_full")
    policies = full.settings["policies"]
    assert {policy["replicate"] for policy in policies} == {0, 1, 2, 3, 4}
    assert len({policy["arm"] for policy in policies}) == 8
    assert {policy["kl_coef"] for policy in policies if policy["arm"].startswith("alpha_")} == {0.05}


def test_sweeps_are_a_product():
    composed = compose.compose(["ppo.learning_rate=1e-5,3e-5", "seed=range(1,4)", "alphas=[0,0.5]"])
    points = [(values["ppo"]["learning_rate"], values["seed"], values["alphas"]) for values in composed]
    assert points == [(rate, seed, ["0", "0.5"]) for rate in (1e-5, 3e-5) for seed in (1, 2, 3)]
    assert [values["model"]["name"] for values in compose.compose(["model=choice(tiny,gemma_2b)"])] == [
        "tiny",
        "gemma_2b",
    ]
    assert {values["name"] for values in compose.compose(["experiment=glob(tiny_full*)"])} == {
        "tiny_full",
        "tiny_full_overfitted",
    }


def test_only_an_experiment_gives_the_plain_name():
    assert one("experiment=reviews")["link"] == "studies/reviews"
    assert one("experiment=reviews", "execution.threads=7", "results=/tmp/x")["link"] == "studies/reviews"
    assert one("ppo.iterations=3")["link"] is None


def test_companions_take_the_overrides():
    composed = compose.compose(["experiment=tiny_full", "ppo.iterations=3"])
    assert [values["ppo"]["iterations"] for values in composed] == [3, 3]
    assert composed[1]["sft"]["stop"] == "epochs" and composed[1]["link"] is None


def test_an_arm_of_the_command_line():
    values = one(
        "+arms.far={start:[1],reference:{weights:[0.25,0.75]}}",
        "+arms.n.reference.weights=[1/3,1/3,1/3]",
        "sft.models=3",
    )
    assert values["arms"]["far"]["reference"] == {"kind": "soup", "weights": ["0.25", "0.75"]}
    assert values["arms"]["n"]["start"] == ["1"]


MISTAKES = {
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
    "alphas=[2]": "outside 0 to 1",
    "alphas=[x]": "no number",
    "alphas=[0.5,1/2]": "twice",
    "alphas=[0.333,1/3]": "0.33",
    "alpha_kl_coefs=[0.7]": "0.7",
    "arms.salsa.reference.weights=[1,1]": "sum to 2",
    "arms.salsa.reference.weights=[1/0]": "no number",
    "arms.salsa.reference.weights=[1/2,1/4,1/4]": "2 SFT models",
    "arms.salsa.reference.kind=foo": "soup, noise",
    "sft.models=1": "SFT model",
    "replicates=[]": "empty",
    "replicates=[0,0]": "twice",
    "kl_coefs=[-1]": "below 0",
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


ULTRA = ["data=ultra", *FITTING["ultra"]]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data=ultra"], "in_distribution"),
        (ULTRA, "no corpus"),
        ([*ULTRA, "judge=[gold]"], "gold"),
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
    assert list(first["files"]["prepare"]) == ["sft_file"]
    study = next(run for run in plan.plan([first]).runs.values() if run.stage == "study")
    assert study.settings["config"]["data"]["task"]["sft_file"] == "sft.jsonl"
    file.write_text('{"messages": 1\n')
    with pytest.raises(UserError, match=r"sft\.jsonl"):
        one(*arguments)


def test_command_line(tmp_path):
    def salsa(*arguments):
        return subprocess.run([sys.executable, "-m", "salsa", *arguments], capture_output=True, text=True)

    shown = salsa("plan", f"results={tmp_path}")
    assert shown.returncode == 0 and "reward_model" in shown.stdout
    printed = json.loads(salsa("plan", "--json", f"results={tmp_path}").stdout)
    assert set(printed) == {"results", "runs", "studies"}
    mistaken = salsa("plan", "model=foo")
    assert mistaken.returncode == 1 and mistaken.stderr.count("\n") == 1 and not mistaken.stdout
    nothing = salsa("verify", str(tmp_path / "none"))
    assert nothing.returncode == 1 and nothing.stderr.count("\n") == 1


def test_the_dtype_of_a_package_is_refused_instead_of_ignored():
    with pytest.raises(UserError, match="read as float32"):
        compose.compose(["experiment=smollm2_reviews", "model.dtype=bfloat16"])
