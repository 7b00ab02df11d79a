"""DPO in a plan: what its runs read, and what is refused before anything runs."""

import json

import pytest

from salsa.algorithms.dpo import Dpo
from salsa.workflow import compose, config, plan, resources, stages
from salsa.workflow.messages import UserError

ARM = "+arms.dpo={algorithm: dpo, reference: {weights: [1/2, 1/2]}}"
EMA = "+arms.dpo={algorithm: dpo, reference: {kind: ema, rate: 0.1}}"


def runs_of(stage, *overrides):
    planned = plan.plan(compose.compose([ARM, *overrides]))
    return {path: run for path, run in planned.runs.items() if run.stage == stage}


def test_a_run_reads_the_sft_models_that_pairs_are_drawn_from():
    """And its references; sft1, which is none here, is no ingredient of the policy's distance to it."""
    (run,) = runs_of("dpo", "replicates=[0]", "arms.dpo.reference.weights=[1]").values()
    assert set(run.parents) == {"prepare", "reward_model", "sft0", "sft1"}
    assert run.settings["dpo"] == {**run.settings["dpo"], "pairs": 2400} and run.settings["kl_coef"] == 0.3
    assert run.label.endswith("dpo-start_sft0-ref_sft0-kl_0.3")


def test_other_runs_do_not_change_with_it():
    with_dpo = plan.plan(compose.compose([ARM, "dpo.pairs=64"])).runs
    without = plan.plan(compose.compose([])).runs
    assert {run.stage for path, run in without.items() if path not in with_dpo} == {"study"}
    assert {run.stage for path, run in with_dpo.items() if path not in without} == {"dpo", "respond", "judge", "study"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([ARM, "kl_coefs=[0,0.1]"], "arms.dpo: kl_coef=0 is DPO's β, which must be above 0, for else no pair moves"),
        ([ARM, "+arms.dpo.kl_schedule={kind: linear}"], "arms.dpo.kl_schedule: dpo has none, its kl_coef is fixed"),
        ([ARM, "execution.processes=3", "ppo.batch_size=96", "sft.batch_size=96", "reward_model.batch_size=96",
         "dpo.batch_size=64"],
         "execution.processes=3: cannot share dpo.batch_size=64 evenly"),
        ([ARM, "dpo.pairs=32"], "dpo.batch_size=64: more than dpo.pairs=32"),
        ([ARM, "dpo.label_temperature=0"], "dpo.label_temperature=0"),
        (["arm=[ppo]", "sft.models=1"], "data.preferences=sampled: pairs are drawn from two SFT models"),
        ([EMA, "dpo.lora_rank=4"], "arms.dpo.reference.kind=ema: a moving reference follows all weights, and dpo.lora"),
        (["+arms.dpo={algorithm: dpo, reference: {kind: reset, every: 16}}", "dpo.pairs=1000"],
         "arms.dpo.reference.every=16: must be at least 1 and below the 16 iterations"),
    ],
)  # fmt: skip
def test_what_no_run_can_honour_is_refused(overrides, says):
    with pytest.raises(UserError) as error:
        compose.compose(overrides)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_kl_coef_of_0_is_left_to_the_other_arms():
    (study,) = compose.compose([ARM, "kl_coefs=[0,0.1]", "+arms.dpo.kl_coefs=[0.1]"])
    assert study.config.arms["dpo"].kl_coefs == [0.1]


def test_prompts_are_not_counted_in_pairs():
    """A batch of DPO is of pairs, whose prompts are others than those of PPO."""
    assert compose.compose([ARM, "arm=[]", "dpo.batch_size=512", "data.task.prompts=300"])
    with pytest.raises(UserError, match=r"data\.task\.prompts=30: fewer than ppo\.batch_size=64"):
        compose.compose([ARM, "data.task.prompts=30"])


@pytest.fixture
def given(tmp_path):
    """A function: the overrides of a study whose preferences are in a local file of so many rows."""

    def overrides(rows=400, judge="[]", batch_size=32):
        pairs = tmp_path / "pairs.jsonl"
        lines = [{"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"} for i in range(rows)]
        pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = [f"data.task.{name}={pairs if name == 'preference_file' else ''}" for name in FILES]
        small = [
            "ppo.batch_size=16",
            "reward_model.held_out=8",
            "reward_model.batch_size=16",
            f"dpo.batch_size={batch_size}",
        ]
        chosen = ["data=ultra", "model=gemma_2b", "arm=[ppo,salsa]", "benchmark=[]", f"judge={judge}"]
        return [*chosen, ARM, *file, *small]

    return overrides


FILES = ("sft_file", "preference_file")


def test_the_datas_own_pairs_need_no_second_sft_model(given):
    overrides = [*given(), "arms.dpo.reference.weights=[1]", "replicates=[0]"]
    (run,) = (run for run in plan.plan(compose.compose(overrides)).runs.values() if run.stage == "dpo")
    assert set(run.parents) == {"prepare", "reward_model", "sft0"}


def test_data_without_enough_pairs_are_refused(given):
    with pytest.raises(UserError, match=r"preferences, and reward_model\.held_out=8 and dpo\.batch_size=\d+ need \d+"):
        compose.compose([*given(batch_size=900)])
    with pytest.raises(UserError, match=r"data\.task\.preferences=39: .* fewer than dpo\.batch_size=32; give more"):
        compose.compose([*given(), "data.task.preferences=39"])
    with pytest.raises(UserError, match=r"dpo\.label_temperature=2: no pair is labelled with data\.preferences=given"):
        compose.compose([*given(), "dpo.label_temperature=2"])


def test_a_judge_must_not_learn_from_pairs_that_train_a_policy(given):
    judged = [*given(judge="[reward_model]"), "reward_model.pairs=64"]
    with pytest.raises(UserError, match=r"dpo\.pairs=65: more than reward_model\.pairs=64, and the reward model of"):
        compose.compose([*judged, "dpo.pairs=65"])
    compose.compose([*judged, "dpo.pairs=64"])


def resources_of(kind="soup", weights=("1",), lora_rank=0, precision="no", epochs=1, preferences="sampled"):
    shape = resources.PUBLISHED["google/gemma-2b"]
    settings = {"dpo": {**vars(Dpo(epochs=epochs)), "lora_rank": lora_rank}, "mixed_precision": precision}
    settings |= {"reference": {"kind": kind, "weights": list(weights)}, "lengths": {"prompt": 100, "response": 100}}
    execution = vars(config.Execution(micro_batch=1))
    reward_model = plan.Run("reward_model", "label", "address", {"preferences": preferences}, {}, execution)
    run = plan.Run("dpo", "label", "address", settings, {"reward_model": "rm"}, execution)
    return stages.ALL["dpo"].resources(resources.Case(run, shape, resources.FLOAT, {"rm": reward_model})), shape


def test_what_a_run_needs():
    plain, shape = resources_of()
    several, _ = resources_of("multi_kl", ["1/2", "1/2"])
    moving, _ = resources_of("ema", ["1"], precision="bf16")
    half, _ = resources_of(precision="bf16")
    model = shape.parameters * resources.FLOAT
    assert plain.memory["weights"] == model and plain.memory["optimizer"] == 2 * model
    assert several.memory["frozen models"] == 2 * plain.memory["frozen models"] == 2 * model
    assert moving.memory["frozen models"] == 2 * half.memory["frozen models"] == model
    assert moving.disk == 2 * plain.disk == 2 * model
    assert resources_of(lora_rank=8)[0].memory["optimizer"] < plain.memory["optimizer"] / 50
    passes = plain.operations / (2 * shape.matrices * 2 * 1000 * 200)
    assert passes == 2 + 3 + 1 and resources_of(epochs=2)[0].operations > 1.6 * plain.operations
    given, _ = resources_of(preferences="given")
    assert given.operations < plain.operations and plain.alone["frozen models"] == 2 * model and not given.alone
