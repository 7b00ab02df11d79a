"""References: the soup in memory is the soup on disk, the noise is as far away as the soup, every arm has one."""

import pytest
import torch

from salsa import compose, config, forward, models, runs, soup
from salsa.ppo import reference

HALVES = ["1/2", "1/2"]


def ppo_settings(kind="soup", weights=("1",), start=("1",), seed=7):
    anchor = config.Reference(kind, list(weights))
    return config.PpoSettings(seed, 0.05, list(start), anchor, config.Ppo(), config.Lengths(64, 6))


@pytest.fixture(scope="module")
def folders(sft_runs):
    return [folder / "model" for folder in sft_runs]


@pytest.fixture(scope="module")
def build(folders, prepare_run, tokenizer):
    rows = runs.read_jsonl(prepare_run / "evaluation.jsonl")

    def make(settings, folders=folders):
        fixed = reference.fixed_prompts(rows, tokenizer, settings.lengths.prompt)
        sft0 = models.load_policy(folders[0]) if folders[0] else None
        ingredients = reference.Ingredients(folders, sft0, fixed, tokenizer, torch.device("cpu"), torch.float32, 16)
        made = reference.build(settings, ingredients)
        return made.models[0], made.summary

    return make


def assert_equal(model, other, equal=True):
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(same) if equal else not any(same)


@pytest.mark.parametrize("weights", [HALVES, ["0.25", "0.75"], ["1/3", "2/3"]])
def test_the_soup_in_memory_is_the_soup_on_disk(build, folders, tmp_path, weights):
    soup.soup(folders, weights, tmp_path / "soup")
    model, summary = build(ppo_settings(weights=weights))
    assert_equal(model, models.load_policy(tmp_path / "soup"))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert summary == {"kind": "soup", "weights": weights, "sha256": [models.content_sha256(model)]}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_weight_of_one_is_the_model_and_reads_no_other(build, folders):
    assert_equal(build(ppo_settings(), [folders[0], None])[0], models.load_policy(folders[0]))
    assert_equal(build(ppo_settings(weights=["0", "1"]), [None, folders[1]])[0], models.load_policy(folders[1]))


def test_ingredients_must_fit(build, folders, tmp_path):
    with pytest.raises(runs.UserError, match=r"2 weights|1 models"):
        build(ppo_settings(weights=HALVES), folders[:1])
    with pytest.raises(runs.UserError, match="no such model folder"):
        build(ppo_settings(weights=HALVES), [folders[0], tmp_path / "none"])


def test_noise_is_as_far_from_sft0_as_the_soup(build, folders, sft_models, prepare_run, tokenizer, prompts):
    settings = ppo_settings("noise", HALVES)
    model, summary = build(settings)
    target, _ = build(ppo_settings(weights=HALVES))
    assert summary["kl_sft0_reference"] == pytest.approx(summary["kl_sft0_soup"], rel=0.02)
    assert summary["kl_sft0_soup"] > 0.01
    assert not any(p.requires_grad for p in model.parameters())
    # On other samples, from other prompts, the distances are alike too.
    sequences = forward.from_lists(prompts[1], [[10, 11, 12]] * len(prompts[1]), [], 0)
    ours, soups = (forward.exact_kl(sft_models[0], m, sequences, 64).mean() for m in (model, target))
    assert 0.5 < ours / soups < 2
    # Each tensor moves as far as in the soup, times one factor, and elsewhere.
    for start, soup_tensor, moved in zip(
        sft_models[0].parameters(), target.parameters(), model.parameters(), strict=True
    ):
        theirs, mine = (soup_tensor - start).detach(), (moved - start).detach()
        assert (mine.norm() / theirs.norm()).item() == pytest.approx(summary["displacement"], rel=1e-3)
        cosine = (mine * theirs).sum() / (mine.norm() * theirs.norm())
        assert cosine.abs() < 0.6
    assert_equal(build(settings)[0], model)
    assert_equal(build(ppo_settings("noise", HALVES, seed=8))[0], model, equal=False)


def test_noise_has_no_size_where_the_soup_is_sft0(build, folders):
    with pytest.raises(runs.UserError, match="sft0 itself"):
        build(ppo_settings("noise", ["1"]))
    with pytest.raises(runs.UserError, match="sft0 itself"):
        build(ppo_settings("noise", HALVES), [folders[0], folders[0]])


def test_prompts_that_the_policy_never_sees_are_left_out(tokenizer, prepare_run):
    rows = runs.read_jsonl(prepare_run / "evaluation.jsonl")
    rows.append({"id": "long", "prompt": [{"role": "user", "content": "fox " * 100}]})
    ids, encoded = reference.fixed_prompts(rows, tokenizer, 64)
    assert ids == [row["id"] for row in rows[:-1]] and max(map(len, encoded)) <= 64


@pytest.mark.parametrize("arm", compose.presets("arm"))
def test_every_arm_has_a_start_and_a_reference(build, folders, arm):
    values = compose.compose([f"arm=[{arm}]"])[0]["arms"][arm]
    found = config.from_dict(config.Arm, values)
    settings = ppo_settings(found.reference.kind, found.reference.weights, found.start)
    model, summary = build(settings)
    assert summary["kind"] == found.reference.kind
    start = reference.mix(folders, found.start, torch.device("cpu"), torch.float32)
    expected = {
        "ppo": (["1"], "soup", ["1"]),
        "salsa": (["1"], "soup", HALVES),
        "other": (["1"], "soup", ["0", "1"]),
        "noise": (["1"], "noise", HALVES),
        "soup_start": (HALVES, "soup", HALVES),
        "soup_start_ppo": (HALVES, "soup", ["1"]),
    }
    if arm in expected:
        assert (found.start, found.reference.kind, found.reference.weights) == expected[arm]
    assert_equal(start, model, equal=found.reference.kind == "soup" and found.start == found.reference.weights)


def test_folders_are_found_by_index(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)  # a run
    (tmp_path / "c").mkdir()  # a plain model folder in a run's place
    parents = {"prepare": tmp_path, "sft0": tmp_path / "a", "sft2": tmp_path / "c"}
    assert reference.sft_folders(parents) == [tmp_path / "a" / "model", None, tmp_path / "c"]
