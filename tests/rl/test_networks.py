"""The trained networks: what recomputing leaves alone, and how a value model starts."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from salsa.rl import models, networks
from salsa.workflow import runs


def test_recomputing_activations_leaves_dropout_off():
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    policy = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    trained = networks.ActorCritic(policy, torch.nn.Linear(8, 1), 1.0, gradient_checkpointing=True)
    trained.recompute(True)
    assert policy.transformer.h[0].training
    assert not any(m.training for m in policy.modules() if isinstance(m, torch.nn.Dropout))
    tokens = torch.arange(10)[None]
    first, second = (policy(input_ids=tokens, use_cache=False).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    trained.recompute(False)
    assert not any(m.training for m in policy.modules())


@pytest.mark.parametrize("normalised", [True, False])
def test_a_value_model_starts_as_what_it_is_to_predict(reward_run, sft_models, normalised):
    made = networks.value_model("reward_model", sft_models[0], reward_run, normalised)
    constants = runs.read_json(reward_run / "normalisation.json")
    assert (made.mean, made.std) == ((constants["mean"], constants["std"]) if normalised else (0.0, 1.0))
    sft = networks.value_model("sft", sft_models[1], reward_run, normalised)
    assert (sft.mean, sft.std) == (0.0, 1.0) and not sft.classifier.score.weight.any()
    for mine, theirs in zip(sft.classifier.model.parameters(), sft_models[1].model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_a_value_model_is_saved_as_what_it_is(reward_run, sft_models, tmp_path):
    own = networks.value_model("reward_model", sft_models[0], reward_run)
    networks.ActorCritic(sft_models[0], own, 1.0).save(tmp_path)
    loaded = models.load_score_model(tmp_path / "value_model")
    assert loaded.mean == own.mean and torch.equal(loaded.classifier.score.weight, own.classifier.score.weight)
    head = networks.value_model("shared", sft_models[0], reward_run)
    networks.ActorCritic(sft_models[0], head, 1.0).save(tmp_path)
    assert [path.name for path in (tmp_path / "value_model").iterdir()] == ["head.safetensors"]
    networks.ActorCritic(sft_models[0], head, 1.0).save(tmp_path, value_model=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
