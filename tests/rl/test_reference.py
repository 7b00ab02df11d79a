"""References: each kind is what it says, follows the policy as it says, and is found again after PPO."""

import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import EXECUTION, finished, move, random_llama, save_model

from salsa import anchors, soup
from salsa.algorithms import ppo as ppo_stage
from salsa.algorithms.ppo import Ppo
from salsa.evaluate import respond
from salsa.rl import forward, models, reference, trainer
from salsa.workflow import compose, config, overriding, runs

HALVES = ["1/2", "1/2"]
# Of ingredients that only a study has:
NAMED = ("rounds", "strong_reference", "strong_soup", "recipe_soup", "greedy_soup", "warp")
UNEVEN = ["1/2", "0.3", "1/5"]
# Kinds of reference with settings that make each a different one.
KINDS = {
    "soup": config.Reference("soup", ["0.25", "0.75"]),
    "noise": config.Reference("noise", HALVES),
    "multi_kl": config.Reference("multi_kl", ["0.7", "0.3"]),
    "ema": config.Reference("ema", ["1"], rate=0.3),
    "reset": config.Reference("reset", ["1"], every=2),
}


def ppo_settings(kind="soup", weights=("1",), start=("1",), seed=7, rate=0.0, every=0):
    weights = weights if isinstance(weights, dict) else list(weights)
    anchor = config.Reference(kind, weights, rate, every)
    return config.TRAINING["ppo"](seed, 0.05, list(start), anchor, Ppo(), config.Lengths(64, 6))


@pytest.fixture(scope="module")
def third_run(tokenizer, tmp_path_factory):
    """A third finished run of the stage sft."""
    model = move(random_llama(tokenizer, 0), 3, 0.03)
    folder = tmp_path_factory.mktemp("third") / "sft2"
    return finished("sft", folder, lambda f: save_model(model, tokenizer, f / "model") and None)


@pytest.fixture(scope="module")
def folders(sft_runs, third_run):
    return [folder / "model" for folder in (*sft_runs, third_run)]


@pytest.fixture(scope="module")
def make_ingredients(folders, prepare_run, tokenizer):
    rows = runs.read_jsonl(prepare_run / "evaluation.jsonl")

    def make(folders=folders):
        fixed = reference.fixed_prompts(rows, tokenizer, 64)
        sft0 = models.load_policy(folders[0]) if folders[0] else None
        by_role = {f"sft{i}": folder for i, folder in enumerate(folders) if folder}
        return reference.Ingredients(by_role, sft0, fixed, tokenizer, torch.device("cpu"), torch.float32, 16)

    return make


@pytest.fixture(scope="module")
def build(folders, make_ingredients):
    def make(settings, folders=folders):
        made = anchors.build(settings, make_ingredients(folders))
        return made.models[0], made.summary

    return make


def assert_equal(model, other, equal=True):
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(same) if equal else not any(same)


@pytest.mark.parametrize("weights", [HALVES, ["0.25", "0.75"], ["1/3", "2/3"], UNEVEN])
def test_the_soup_in_memory_is_the_soup_on_disk(build, folders, tmp_path, weights):
    soup.soup(folders[: len(weights)], weights, tmp_path / "soup")
    model, summary = build(ppo_settings(weights=weights))
    assert_equal(model, models.load_policy(tmp_path / "soup"))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert summary == {"kind": "soup", "weights": weights, "sha256": [models.content_sha256(model)]}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_weight_of_one_is_the_model_and_reads_no_other(build, folders):
    assert_equal(build(ppo_settings(), [folders[0], None])[0], models.load_policy(folders[0]))
    assert_equal(build(ppo_settings(weights=["0", "1"]), [None, folders[1]])[0], models.load_policy(folders[1]))


def test_ingredients_must_fit(build, folders, tmp_path):
    with pytest.raises(runs.UserError, match=r"weights 1/2 sft0 \+ 1/2 sft1: the run has no parent sft1"):
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


def parameters(model):
    return [tensor.detach().clone() for tensor in model.parameters()]


def moved(model, seed, length=0.02):
    return move(copy.deepcopy(model), seed, length)


def test_a_soup_of_three_uneven_weights(build, folders):
    model, summary = build(ppo_settings(weights=UNEVEN))
    ingredients = [models.load_policy(folder) for folder in folders]
    for found, *tensors in zip(model.parameters(), *(m.parameters() for m in ingredients), strict=True):
        mixed = sum(w * tensor.double() for w, tensor in zip((0.5, 0.3, 0.2), tensors, strict=True))
        torch.testing.assert_close(found.double(), mixed, rtol=1e-6, atol=1e-7)
    assert summary["weights"] == UNEVEN and summary["sha256"] == [models.content_sha256(model)]


def test_several_references_are_the_sft_models_with_their_weights(make_ingredients, folders, prompts):
    ingredients = make_ingredients()
    made = anchors.build(ppo_settings("multi_kl", UNEVEN), ingredients)
    expected = [models.load_policy(folder) for folder in folders]
    for found, model in zip(made.models, expected, strict=True):
        assert_equal(found, model)
        assert not any(p.requires_grad for p in found.parameters())
    assert made.models[0] is ingredients.sft0  # not held twice
    assert made.weights == [0.5, 0.3, 0.2] and not made.moves
    digests = [models.content_sha256(model) for model in expected]
    assert made.summary == {"kind": "multi_kl", "weights": UNEVEN, "sha256": digests}
    sequences = forward.from_lists(prompts[1][:5], [[50, 60, 70]] * 5, [], 0)
    policy = moved(expected[0], 1)
    kls = [forward.exact_kl(policy, model, sequences, 64) for model in expected]
    torch.testing.assert_close(made.kl(policy, sequences, 2), 0.5 * kls[0] + 0.3 * kls[1] + 0.2 * kls[2])
    assert len(set(torch.stack(kls).mean(dim=1).tolist())) == 3


def test_a_weight_of_zero_costs_no_model(make_ingredients, folders):
    made = anchors.build(
        ppo_settings("multi_kl", ["0", "0.6", "0.4"]), make_ingredients([None, folders[1], folders[2]])
    )
    assert made.weights == [0.6, 0.4] and len(made.models) == 2
    assert_equal(made.models[0], models.load_policy(folders[1]))
    assert_equal(made.models[1], models.load_policy(folders[2]))


@pytest.mark.parametrize("weights", [["1"], ["0.3", "0.7"]])
def test_a_moving_average_is_that_of_the_policies_so_far(make_ingredients, weights):
    ingredients = make_ingredients()
    made = anchors.build(ppo_settings("ema", weights, rate=0.3), ingredients)
    start = reference.mix(ingredients.folders, weights, "cpu", torch.float32)
    assert made.moves and made.summary["rate"] == 0.3
    assert_equal(made.models[0], start)
    sft0, before = parameters(ingredients.sft0), made.sha256()
    policies = [moved(start, seed, 0.1) for seed in range(4)]
    expected = [tensor.double() for tensor in start.parameters()]
    for iteration, policy in enumerate(policies):
        kept = parameters(policy)
        made.follow(policy, iteration)
        expected = [0.7 * old + 0.3 * new for old, new in zip(expected, policy.parameters(), strict=True)]
        for found, wanted in zip(made.models[0].parameters(), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)
            assert not found.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(kept, policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sft0, ingredients.sft0.parameters(), strict=True))
    assert made.summary["sha256"] == before != made.sha256()  # the summary says where it began


def test_a_moving_average_follows_small_steps_in_bfloat16(make_ingredients):
    ingredients = make_ingredients()
    sft0 = ingredients.sft0.to(torch.bfloat16)
    policy = copy.deepcopy(sft0).float()
    with torch.no_grad():
        for tensor in policy.parameters():
            tensor.mul_(1.01)  # a hundredth of which is less than bfloat16 tells apart
    made = anchors.kinds()["ema"].build(ppo_settings("ema", rate=0.01), ingredients, None)
    for iteration in range(50):
        made.follow(policy, iteration)
    for found, start in zip(made.models[0].parameters(), sft0.parameters(), strict=True):
        torch.testing.assert_close(found, start.float() * (1 + 0.01 * (1 - 0.99**50)), rtol=1e-5, atol=1e-9)


def test_a_reset_copies_the_policy_now_and_then(make_ingredients):
    ingredients = make_ingredients()
    made = anchors.build(ppo_settings("reset", ["0.3", "0.7"], every=3), ingredients)
    start = reference.mix(ingredients.folders, ["0.3", "0.7"], "cpu", torch.float32)
    assert made.moves and made.summary["every"] == 3
    sft0 = parameters(ingredients.sft0)
    policies = [moved(start, seed) for seed in range(7)]
    holders = [start, start, policies[2], policies[2], policies[2], policies[5], policies[5]]
    for iteration, (policy, holder) in enumerate(zip(policies, holders, strict=True)):
        kept = parameters(policy)
        made.follow(policy, iteration)
        assert_equal(made.models[0], holder)
        move(policy, 99, 0.01)  # a copy, not the policy itself
        assert_equal(made.models[0], policy, equal=False)
        for tensor, value in zip(policy.parameters(), kept, strict=True):
            tensor.data.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(sft0, ingredients.sft0.parameters(), strict=True))


def test_references_that_stand_still_do_not_follow(make_ingredients):
    for kind in ("soup", "noise", "multi_kl"):
        made = anchors.build(config_of(kind), make_ingredients())
        before = made.sha256()
        made.follow(moved(made.models[0], 1), 0)
        assert made.sha256() == before == made.summary["sha256"] and not made.moves


def config_of(kind, seed=7):
    ppo = Ppo(iterations=3, batch_size=8, epochs=1, mini_batches=2, learning_rate=1e-3, missing_eos_penalty=0.5)
    return config.TRAINING["ppo"](seed, 0.1, ["1"], copy.deepcopy(KINDS[kind]), ppo, config.Lengths(64, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_built_again_and_refused_where_its_ingredients_have_changed(make_ingredients, folders, kind):
    settings = config_of(kind)
    first = anchors.build(settings, make_ingredients())
    found = json.loads(json.dumps(first.summary))  # as a manifest gives it
    again = anchors.build(settings, make_ingredients(), found)
    assert again.summary == first.summary
    for model, other in zip(first.models, again.models, strict=True):
        assert_equal(model, other)
    changed = [folders[2], folders[1]] if kind in ("ema", "reset") else [folders[0], folders[2]]
    with pytest.raises(runs.UserError, match="its SFT models, the hardware or a library have changed"):
        anchors.build(settings, make_ingredients(changed), found)


def test_noise_is_built_again_without_a_search(make_ingredients, monkeypatch):
    first = anchors.build(config_of("noise"), make_ingredients())
    monkeypatch.setattr(reference, "exact_kl", None)
    again = anchors.build(config_of("noise"), make_ingredients(), first.summary)
    assert_equal(again.models[0], first.models[0])


@pytest.fixture
def ppo_run(parents, tmp_path, monkeypatch):
    """A finished run of the stage ppo, and the Trainer that made it."""
    kept = []

    class Kept(trainer.Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(trainer, "Trainer", Kept)

    def run(settings):
        folder = tmp_path / "ppo"
        runs.execute("ppo", ppo_stage.VERSION, trainer.train, settings, parents, folder, EXECUTION)
        return folder, kept[-1]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_that_ppo_ended_with_is_found_again(ppo_run, make_ingredients, sft_models, kind):
    settings = config_of(kind)
    folder, made = ppo_run(settings)
    manifest = runs.verify(folder)
    start = anchors.build(settings, make_ingredients())
    assert manifest["summary"]["reference"] == start.summary
    assert manifest["summary"]["kl_gradient"] == "unbiased"
    found = anchors.final(folder, settings, make_ingredients())
    assert found.weights == made.reference.weights
    for model, ended, began in zip(found.models, made.reference.models, start.models, strict=True):
        assert_equal(model, ended)
        assert_equal(model, began, equal=not start.moves)
    moves = kind in ("ema", "reset")
    assert (folder / "reference").is_dir() is moves
    assert manifest["summary"].get("final_reference") == (found.sha256() if moves else None)
    assert any(name.startswith("reference/") for name in manifest["artefacts"]) is moves
    assert_equal(made.sft0, sft_models[0])
    policy = models.load_policy(folder / "model")
    assert_equal(policy, sft_models[0], equal=False)
    assert_equal(policy, found.models[0], equal=False)  # reset: after two of three iterations


def test_the_last_policy_is_not_its_own_reference(ppo_run):
    settings = config_of("reset")
    settings.reference.every = 1
    folder, _ = ppo_run(settings)
    assert_equal(models.load_policy(folder / "model"), models.load_policy(folder / "reference"), equal=False)


def test_the_average_of_a_bfloat16_run_is_found_as_it_was(ppo_run, make_ingredients):
    AcceleratorState._reset_state(True)  # the precision is fixed once a process
    settings = config_of("ema")
    settings.mixed_precision = "bf16"
    folder, made = ppo_run(settings)
    AcceleratorState._reset_state(True)
    ingredients = make_ingredients()
    ingredients.dtype = reference.dtype(settings)
    found = anchors.final(folder, settings, ingredients)
    assert found.sha256() == made.reference.sha256() == runs.manifest_of(folder)["summary"]["final_reference"]
    assert next(found.models[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["ema", "multi_kl"])
def test_distances_are_reported_to_the_reference_that_ppo_ended_with(ppo_run, parents, tokenizer, tmp_path, kind):
    folder, made = ppo_run(config_of(kind))
    lengths, output = config.Lengths(64, 6), tmp_path / "respond"
    settings = config.RespondSettings(3, 1.0, lengths)
    runs.execute(
        "respond", respond.VERSION, respond.respond, settings, {**parents, "policy": folder}, output, EXECUTION
    )
    policy = models.load_policy(folder / "model")
    evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")
    answers = respond.evaluation_answers(policy, tokenizer, evaluation, settings, EXECUTION)
    sequences = forward.from_lists(answers.prompts[0], answers.responses[0], [], 0)
    kls = [forward.exact_kl(policy, model, sequences, 64) for model in made.reference.models]
    expected = sum(w * kl for w, kl in zip(made.reference.weights, kls, strict=True))
    found = [row["kl_to_reference"] for row in runs.read_jsonl(output / "evaluation.jsonl")]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    summary = runs.manifest_of(output)["summary"]
    assert summary["kl_to_reference"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert abs(summary["kl_to_reference"] - summary["kl_to_sft0"]) > 1e-4


ARMS = {  # start, kind of reference, its weights
    "ppo": (["1"], "soup", ["1"]),
    "salsa": (["1"], "soup", HALVES),
    "other": (["1"], "soup", ["0", "1"]),
    "noise": (["1"], "noise", HALVES),
    "soup_start": (HALVES, "soup", HALVES),
    "soup_start_ppo": (HALVES, "soup", ["1"]),
    "n_soup": (["1"], "soup", ["1/3"] * 3),
    "multi_kl": (["1"], "multi_kl", HALVES),
    "ema": (["1"], "ema", ["1"]),
    "reset": (["1"], "reset", ["1"]),
    "smaller_beta": (["1"], "soup", ["1"]),
    "decaying_beta": (["1"], "soup", ["1"]),
}


@pytest.mark.parametrize("arm", [arm for arm in overriding.presets("arm") if arm not in NAMED])
def test_every_arm_has_a_start_and_a_reference(make_ingredients, folders, arm):
    found = compose.compose([f"arm=[{arm}]", "sft.models=3"])[0].config.arms[arm]
    own = found.reference
    assert arm not in ARMS or (found.start, own.kind, own.weights) == ARMS[arm]
    settings = ppo_settings(own.kind, own.weights, found.start, rate=own.rate, every=own.every)
    made = anchors.build(settings, make_ingredients())
    assert made.summary["kind"] == own.kind and len(made.models) == (2 if arm == "multi_kl" else 1)
    start = reference.mix(make_ingredients().folders, found.start, torch.device("cpu"), torch.float32)
    beginning = own.kind in ("soup", "ema", "reset") and found.start == own.weights
    assert anchors.starts_there(settings) is beginning
    assert_equal(start, made.models[0], equal=beginning or arm == "multi_kl")
    assert made.moves is (arm in ("ema", "reset"))
    # What an arm changes beside: a smaller penalty, or one that fades.
    assert (found.kl_scale < 1) is (arm == "smaller_beta")
    assert (found.kl_schedule is not None and found.kl_schedule.final < 1) is (arm == "decaying_beta")


def test_every_arm_is_known():
    assert set(ARMS) <= set(overriding.presets("arm"))


def test_folders_are_found_by_role(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)  # a run
    (tmp_path / "c").mkdir()  # a plain model folder in a run's place
    parents = {"prepare": tmp_path, "sft0": tmp_path / "a", "ingredient1": tmp_path / "c", "policy": tmp_path}
    assert reference.ingredient_folders(parents) == {"sft0": tmp_path / "a" / "model", "ingredient1": tmp_path / "c"}


def other_architecture(tokenizer, folder):
    save_model(random_llama(tokenizer, 5, num_hidden_layers=3), tokenizer, folder)
    return folder


def test_a_model_of_another_architecture_is_a_reference_by_itself_alone(make_ingredients, tokenizer, tmp_path, prompts):
    ingredients = make_ingredients()
    ingredients.folders = ingredients.folders | {"ingredient0": other_architecture(tokenizer, tmp_path)}
    weights = {"ingredient0": "1"}
    made = anchors.build(ppo_settings(weights=weights), ingredients)
    sequences = forward.from_lists(prompts[1][:5], [[50, 60, 70]] * 5, [], 0)
    kl = made.kl(ingredients.sft0, sequences, 2)
    torch.testing.assert_close(kl, forward.exact_kl(ingredients.sft0, made.models[0], sequences, 64))
    for kind, own in {"ema": {"rate": 0.1}, "reset": {"every": 1}, "noise": {}}.items():
        with pytest.raises(runs.UserError, match=f"reference {kind}: its tensor .* another architecture"):
            anchors.build(ppo_settings(kind, weights, **own), ingredients)
    with pytest.raises(runs.UserError, match=r"only like models can be averaged|config\.json"):
        anchors.build(ppo_settings(weights={"sft0": "1/2", "ingredient0": "1/2"}), ingredients)
