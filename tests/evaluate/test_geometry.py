"""Where a policy lies in weight space: against models held in memory, and numbers worked out by hand."""

import math

import pytest
import torch
from conftest import move, random_llama, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from salsa import soup
from salsa.evaluate import geometry
from salsa.rl import models
from salsa.workflow.runs import UserError

WITH_SFT1 = {"from_sft1", "from_soup", "sft0_to_sft1", "cosine_sft1", "along_sft1", "off_line"}


def flat(model):
    """All weights of a model in memory, each once, as one vector of float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in model.parameters()])


def naive(policy, sft0, sft1):
    step, line = policy - sft0, sft1 - sft0
    along = (step @ line / (line @ line)).item()
    return {
        "from_sft0": (policy - sft0).norm().item(),
        "sft0_norm": sft0.norm().item(),
        "from_sft1": (policy - sft1).norm().item(),
        "from_soup": (policy - (sft0 + sft1) / 2).norm().item(),
        "sft0_to_sft1": line.norm().item(),
        "cosine_sft1": torch.nn.functional.cosine_similarity(step, line, dim=0).item(),
        "along_sft1": along,
        "off_line": (policy - (sft0 + along * line)).norm().item(),
    }


@pytest.fixture(scope="module")
def trained(tokenizer, sft_models, tmp_path_factory):
    """A policy a little way from sft0: (folder, model)."""
    model = move(models.load_policy(sft_models[0].name_or_path), 9, 0.01)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("policy") / "model"), model


@pytest.mark.parametrize("piece", [7, 2**22])
def test_distances_are_those_of_the_whole_vectors(trained, sft_runs, sft_models, monkeypatch, piece):
    monkeypatch.setattr(geometry, "PIECE", piece)
    found = geometry.describe(trained[0], *(run / "model" for run in sft_runs))
    assert found == pytest.approx(naive(flat(trained[1]), *map(flat, sft_models)), rel=1e-9)
    assert geometry.describe(trained[0], sft_runs[0] / "model") == {
        **dict.fromkeys(WITH_SFT1),
        "from_sft0": found["from_sft0"],
        "sft0_norm": found["sft0_norm"],
    }


def test_shards_and_a_tied_tensor_that_is_stored_twice_change_nothing(
    trained, sft_runs, sft_models, tokenizer, tmp_path
):
    expected = geometry.describe(trained[0], *(run / "model" for run in sft_runs))
    sharded = save_model(sft_models[1], tokenizer, tmp_path / "sharded", max_shard_size="20KB")
    assert len(set(soup.shards(sharded).values())) > 2
    twice = save_model(trained[1], tokenizer, tmp_path / "twice")
    tensors = load_file(twice / soup.SINGLE)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, twice / soup.SINGLE)
    assert geometry.describe(twice, sft_runs[0] / "model", sharded) == pytest.approx(expected, rel=1e-12)


def test_heads_of_their_own_count(tokenizer, tmp_path):
    made = [random_llama(tokenizer, seed, tie_word_embeddings=False) for seed in (1, 2)]
    folders = [save_model(model, tokenizer, tmp_path / str(i)) for i, model in enumerate(made)]
    found = geometry.describe(folders[1], folders[0])
    assert found["from_sft0"] == pytest.approx((flat(made[1]) - flat(made[0])).norm().item(), rel=1e-9)


def test_other_dtypes_are_compared_as_they_are(trained, sft_runs, sft_models, tokenizer, tmp_path):
    half = models.load_policy(trained[0], dtype=torch.bfloat16)
    found = geometry.describe(save_model(half, tokenizer, tmp_path / "half"), *(run / "model" for run in sft_runs))
    assert found == pytest.approx(naive(flat(half), *map(flat, sft_models)), rel=1e-9)


def points(tokenizer, tmp_path, places):
    """Model folders that differ in two weights alone, which have these values."""
    for i, (x, y) in enumerate(places):
        model = random_llama(tokenizer, 3)
        with torch.no_grad():
            model.model.norm.weight[:2] = torch.tensor([x, y])
        yield save_model(model, tokenizer, tmp_path / str(i))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ((3, 4), [5, math.hypot(5, 4), math.hypot(1, 4), 0.6, 3 / 8, 4]),
        ((4, 0), [4, 4, 0, 1, 0.5, 0]),  # the soup
        ((8, 0), [8, 0, 4, 1, 1, 0]),  # sft1
        ((-2, 0), [2, 10, 6, -1, -0.25, 0]),  # beyond sft0
        ((0, 0), [0, 8, 4, None, 0, 0]),  # a policy that did not move has no direction
    ],
)
def test_by_hand(tokenizer, tmp_path, policy, expected):
    sft0, sft1, folder = points(tokenizer, tmp_path, [(0, 0), (8, 0), policy])
    found = geometry.describe(folder, sft0, sft1)
    names = ["from_sft0", "from_sft1", "from_soup", "cosine_sft1", "along_sft1", "off_line"]
    assert [found[name] for name in names] == pytest.approx(expected, abs=1e-12)
    assert found["sft0_to_sft1"] == 8


def test_two_sft_models_that_are_one_have_no_line(tokenizer, tmp_path):
    sft0, sft1, folder = points(tokenizer, tmp_path, [(1, 1), (1, 1), (4, 5)])
    found = geometry.describe(folder, sft0, sft1)
    assert found["from_sft0"] == found["from_sft1"] == found["from_soup"] == 5 and found["sft0_to_sft1"] == 0
    assert found["cosine_sft1"] is found["along_sft1"] is found["off_line"] is None


def test_other_models_are_refused(trained, sft_runs, tokenizer, tmp_path):
    other = save_model(random_llama(tokenizer, 1, num_hidden_layers=1), tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.\S+ has shape None"):
        geometry.describe(other, sft_runs[0] / "model")
    narrow = save_model(random_llama(tokenizer, 1, intermediate_size=40), tokenizer, tmp_path / "narrow")
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight has shape \(32, 40\), in .* it has \(32, 48\)"):
        geometry.describe(trained[0], sft_runs[0] / "model", narrow)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3), min_size=5, max_size=5))
def test_any_three_points(columns):
    """The arithmetic alone: five weights of each model, in tensors of two and three."""
    vectors = [torch.tensor(column) for column in zip(*columns, strict=True)]
    streams = [[("a", vector[:2]), ("b", vector[2:])] for vector in vectors]
    found = geometry.measure(streams)
    step, line = (vector.double() - vectors[0].double() for vector in vectors[1:])
    assert found["from_sft0"] == pytest.approx(step.norm().item(), abs=1e-9)
    assert found["from_soup"] == pytest.approx((step - line / 2).norm().item(), abs=1e-9)
    if line.norm() > 1e-3:
        assert found["off_line"] <= found["from_sft0"] * (1 + 1e-9)
        nearest = (vectors[0].double() + found["along_sft1"] * line - vectors[1].double()).norm().item()
        assert found["off_line"] == pytest.approx(nearest, abs=1e-5)
