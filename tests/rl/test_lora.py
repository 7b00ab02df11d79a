"""PPO that trains low-rank adapters (LoRA) and the value head, and leaves all other weights as they are."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from salsa.algorithms.ppo import Ppo
from salsa.rl import forward, models, processes, trainer
from salsa.workflow import config, runs

SMALL = {
    "iterations": 2,
    "batch_size": 8,
    "epochs": 2,
    "mini_batches": 2,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "lora_rank": 2,
    "lora_alpha": 4.0,
}
OF_RESPONSES = ("score", "kl_k1", "kl_k2", "kl_to_sft0", "response_length", "eos_rate", "entropy", "explained_variance")


def make_settings(reference=("1",), kind="soup", kl_coef=0.1, **ppo):
    anchor = config.Reference(kind, list(reference), rate=0.2 if kind == "ema" else 0.0)
    return config.TRAINING["ppo"](11, kl_coef, ["1"], anchor, Ppo(**SMALL | ppo), config.Lengths(64, 8))


@pytest.fixture
def make(parents, tokenizer, execution, tmp_path):
    """A Trainer of the given settings, on a CPU."""

    def build(settings, output=tmp_path, **changes):
        chosen = dataclasses.replace(execution, **changes)
        accelerator = processes.make_accelerator(settings, torch.device("cpu"), chosen)
        participants = trainer.load(settings, parents, tokenizer, accelerator.device, chosen)
        return trainer.Trainer(settings, participants, tokenizer, accelerator, chosen, output)

    return build


@pytest.fixture
def fit(prompts):
    """A function that trains a Trainer and returns its metrics, a list an iteration."""

    def run(made):
        made.fit([{"id": i, "prompt": []} for i in prompts[0]], prompts[1])
        return runs.read_jsonl(made.output / "metrics.jsonl")

    return run


@pytest.fixture
def sequences(prompts, tokenizer):
    """Prompts and responses of different lengths."""
    responses = [[50, 60, 7, 90], [120], [33, 44]]
    return forward.from_lists(prompts[1][:3], responses, [tokenizer.eos_token_id], tokenizer.pad_token_id)


def weights(made):
    return {name: tensor.detach().clone() for name, tensor in made.networks.named_parameters()}


def moved(before, after):
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(("value_model", "adapted"), [("reward_model", 2), ("sft", 2), ("shared", 1)])
def test_only_adapters_and_the_value_head_are_trained(make, fit, value_model, adapted):
    made = make(make_settings(value_model=value_model))
    before = weights(made)
    fit(made)
    adapters = {name for name in before if ".lora_" in name}
    heads = {name for name in before if name.startswith(("value_model.weight", "value_model.bias"))}
    heads |= {name for name in before if "score.modules_to_save" in name}
    assert len(adapters) == adapted * 2 * 7 * 2  # two matrices beside each of 7 linear layers of 2 decoder layers
    assert len(heads) == (2 if value_model == "shared" else 1)
    assert moved(before, weights(made)) == adapters | heads
    with_gradients = {name for name, tensor in made.networks.named_parameters() if tensor.grad is not None}
    assert with_gradients == adapters | heads


@pytest.mark.parametrize("reference", [["1"], ["1/2", "1/2"]])
def test_the_first_policy_is_the_plain_one(make, fit, tmp_path, reference):
    adapted = fit(make(make_settings(reference), tmp_path / "adapted"))[0]
    plain = fit(make(make_settings(reference, lora_rank=0), tmp_path / "plain"))[0]
    for name in set(OF_RESPONSES) - {"entropy"}:  # which is of the steps
        assert adapted[name] == plain[name], name
    assert (adapted["kl_k2"] < 1e-9) == (reference == ["1"])


def test_it_learns_what_it_is_paid_for(make, fit):
    changes = {"iterations": 25, "batch_size": 32, "mini_batches": 1, "missing_eos_penalty": 0.0}
    made = make(make_settings(kl_coef=0.0, lora_rank=8, lora_alpha=16.0, **changes))

    def late_words(sequences, micro_batch):
        return ((sequences.responses >= 110) & sequences.response_mask.bool()).sum(dim=1) / sequences.lengths

    made.reward_model.scores = late_words
    scores = [row["score"] for row in fit(made)]
    assert scores[0] < 0.4 and np.mean(scores[-3:]) > scores[0] + 0.2


@pytest.mark.parametrize("value_model", ["reward_model", "shared"])
def test_merged_models_are_plain_ones(make, fit, sequences, tmp_path, monkeypatch, value_model):
    """They compute what policy and value model did with their adapters, and load where peft is not installed."""
    made = make(make_settings(["1/2", "1/2"], value_model=value_model))
    fit(made)
    with torch.no_grad():
        logprobs, _, values = made.networks("evaluate", sequences)
    made.save()
    monkeypatch.setitem(sys.modules, "peft", None)
    policy = models.load_policy(tmp_path / "model")
    found, _ = forward.response_logprobs(policy, sequences)
    assert torch.allclose(found, logprobs, atol=1e-5)
    assert not [name for name in policy.state_dict() if "lora" in name]
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert "adapter_config.json" not in {path.name for path in tmp_path.rglob("*")}
    if value_model == "reward_model":
        found = models.load_score_model(tmp_path / "value_model").values(sequences)
        assert torch.allclose(found * sequences.response_mask, values * sequences.response_mask, atol=1e-5)


def test_it_resumes(make, fit, tmp_path):
    settings = make_settings(iterations=3)
    whole = make(settings, tmp_path / "whole")
    expected = fit(whole)
    stopped = make(settings, tmp_path / "stopped")
    iterate = stopped.iterate

    def stop_after(iteration, *arguments):
        stopped.stop.asked = iteration == 1
        return iterate(iteration, *arguments)

    stopped.iterate = stop_after
    with pytest.raises(SystemExit):
        fit(stopped)
    resumed = make(settings, tmp_path / "stopped")
    found = fit(resumed)
    assert resumed.summary["resumed_at"] == [1]
    for name in OF_RESPONSES:
        assert [row[name] for row in found] == [row[name] for row in expected], name
    assert moved(weights(whole), weights(resumed)) == set()


def test_gradient_checkpointing_changes_nothing(make, fit, tmp_path):
    plain = make(make_settings(), tmp_path / "plain")
    recomputing = make(make_settings(), tmp_path / "recomputing", gradient_checkpointing=True)
    before, passes = weights(plain), []
    layer = recomputing.networks.policy.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda module, inputs: passes.append(torch.is_grad_enabled()))
    fit(plain)
    fit(recomputing)
    assert sum(passes) == 2 * 2 * 2 * 2  # iterations, epochs, mini-batches; forwards and again
    assert any("lora_B" in name for name in moved(before, weights(plain)))
    after, other = weights(plain), weights(recomputing)
    assert max((after[name] - other[name]).abs().max().item() for name in after) < 1e-6


def test_without_peft_only_adapters_are_refused(make, fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    made = make(make_settings(lora_rank=0))
    fit(made)
    made.save()
    with pytest.raises(runs.UserError, match=r"pip install .*\[lora\]"):
        make(make_settings())


def test_a_reference_that_moves_is_refused(make):
    with pytest.raises(runs.UserError, match=r"ppo\.lora_rank=2"):
        make(make_settings(kind="ema"))
