"""What starts and references are mixed from: names, addresses, order, and what is refused while planning."""

import importlib.util
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from salsa import data
from salsa.base import ASSETS
from salsa.report.sections import ingredients
from salsa.workflow import compose, plan, policies, runs, weights
from salsa.workflow import ingredients as rules
from salsa.workflow.messages import UserError

STRONG = ["arm=[ppo,strong_reference]", "replicates=[0]"]
ROUNDS = ["arm=[ppo,rounds]", "replicates=[0]"]


def runs_of(*overrides):
    """Path -> run of a study's plan."""
    return plan.plan(compose.compose(list(overrides))).runs


def of(stage, planned):
    return [run for run in planned.values() if run.stage == stage]


@pytest.fixture
def base(tmp_path):
    """A model folder of the default study's tokenizer, and another of the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    (shipped,) = (folder for folder in ASSETS.iterdir() if folder.is_dir())
    shutil.copytree(shipped, first)
    shutil.copytree(shipped, second)
    return first, second


@pytest.mark.parametrize(
    ("given", "mapping", "canonical", "text", "label"),
    [
        (["0.5", "1/2"], {"sft0": "0.5", "sft1": "1/2"}, ["1/2", "1/2"], "1/2 sft0 + 1/2 sft1", "soup0.50"),
        (["1", "0"], {"sft0": "1", "sft1": "0"}, ["1"], "sft0", "sft0"),
        (["0", "1"], {"sft0": "0", "sft1": "1"}, ["0", "1"], "sft1", "sft1"),
        ({"sft2": "1"}, {"sft2": "1"}, ["0", "0", "1"], "sft2", "sft2"),
        (
            {"policy:a": "1/4", "b": "0.5", "sft1": 0.25},
            {"policy:a": "1/4", "b": "0.5", "sft1": "0.25"},
            {"sft1": "1/4", "b": "1/2", "policy:a": "1/4"},
            "1/4 sft1 + 1/2 b + 1/4 policy:a",
            "soup0.25sft1_0.50b_0.25policy.a",
        ),
        ({"policy:a": 1}, {"policy:a": "1"}, {"policy:a": "1"}, "policy:a", "policy.a"),
    ],
)
def test_weights_in_all_their_forms(given, mapping, canonical, text, label):
    pairs = weights.canonical_weights(given)
    assert weights.named(given) == mapping and weights.written(given) == canonical == weights.written(pairs)
    assert weights.soup_words(given) == text and weights.canonical_weights(weights.of_text(text)) == pairs
    assert weights.weights_label(given) == label and weights.canonical_weights(canonical) == pairs


def test_two_names_of_one_model_add_up():
    names = {"sft0": "sft0", "a": "ingredient0", "b": "ingredient0"}
    mixed = weights.renamed({"sft0": "1/2", "a": "1/4", "b": "1/4"}, names)
    assert weights.written(mixed) == {"sft0": "1/2", "ingredient0": "1/2"}
    assert weights.written(weights.renamed({"a": "1"}, {"a": "sft1"})) == ["0", "1"]


def test_a_variant_is_an_sft_model_of_another_recipe():
    planned = runs_of(*STRONG)
    *plain, strong = of("sft", planned)
    first, second = (path_of(run, planned) for run in of("prepare", planned))
    assert strong.settings == plain[0].settings | {
        "best_share": 0.1,
        "sft": plain[0].settings["sft"] | {"epochs": 10, "stop": "validation"},
    }
    assert plain[0].parents["prepare"] == first and strong.parents == plain[0].parents | {"prepare": second}
    (run,) = (run for run in of("ppo", planned) if "ref_ingredient0" in run.label)
    assert run.settings["start"] == ["1"] and run.settings["reference"]["weights"] == {"ingredient0": "1"}
    assert planned[run.parents["ingredient0"]] is strong and set(run.parents) == {
        *("prepare", "reward_model", "sft0", "ingredient0")
    }
    (respond,) = (other for other in of("respond", planned) if other.parents["policy"] == path_of(run, planned))
    assert respond.parents["ingredient0"] == run.parents["ingredient0"]


def path_of(run, planned):
    return next(path for path, other in planned.items() if other is run)


def test_a_variant_may_change_its_recipe_and_its_demonstrations():
    variant = "+sft_variants.v={seed:1,sft:{epochs:5,learning_rate:1e-4},task:{demonstrations:400,seed:9}}"
    planned = runs_of("arm=[ppo,salsa]", "replicates=[0]", variant, "arms.salsa.reference.weights=v")
    *plain, other = of("sft", planned)
    assert other.settings["seed"] == plain[1].settings["seed"] != plain[0].settings["seed"]
    assert other.settings["sft"] == plain[0].settings["sft"] | {"epochs": 5, "learning_rate": 1e-4}
    first, second = of("prepare", planned)
    assert second.settings["task"] == first.settings["task"] | {"demonstrations": 400, "seed": 9}
    assert planned[other.parents["prepare"]] is second and planned[plain[0].parents["prepare"]] is first


def test_a_variant_that_changes_nothing_is_sft0():
    planned = runs_of("arm=[ppo,salsa]", "replicates=[0]", "+sft_variants.v={}", "arms.salsa.reference.weights=v")
    assert len(of("sft", planned)) == 2
    assert len(of("ppo", planned)) == 1  # salsa is anchored to sft0, too


def test_names_change_no_address():
    variant = "+sft_variants.{0}.sft.epochs=2", "arms.salsa.reference.weights='1/2 sft0 + 1/2 {0}'"
    addresses = []
    for name in ("one", "two"):
        planned = runs_of("arm=[ppo,salsa]", "replicates=[0]", *(text.format(name) for text in variant))
        addresses.append({run.address for run in of("ppo", planned)})
    assert addresses[0] == addresses[1] and len(addresses[0]) == 2


def test_a_round_starts_at_the_policy_of_the_one_before(tmp_path):
    planned = runs_of(*ROUNDS, "kl_coefs=[0.02,0.05]")
    assert len(of("ppo", planned)) == 6 == len(of("respond", planned))
    for run in of("ppo", planned):
        if "ingredient0" in run.parents:
            first = planned[run.parents["ingredient0"]]
            assert first.stage == "ppo" and first.settings["kl_coef"] == run.settings["kl_coef"]
            assert run.settings["start"] == {"ingredient0": "1"}
            assert run.settings["reference"]["weights"] == {"sft0": "1/2", "ingredient0": "1/2"}
            assert list(planned).index(run.parents["ingredient0"]) < list(planned).index(path_of(run, planned))
    result = plan.plan(compose.compose([*ROUNDS, f"results={tmp_path}"]))
    assert plan.load(result.save()).runs.keys() == result.runs.keys()


def test_three_policies_are_merged_in_the_order_of_their_names_in_every_replicate():
    arms = [f"+arms.{name}={{start:sft0,seed:{seed}}}" for seed, name in enumerate("cab", 1)]
    mix = "+mixes.arc={kind:slerp,weights:'1/3 policy:c + 1/3 policy:b + 1/3 policy:a',origin:sft0}"
    planned = runs_of("arm=[ppo]", "replicates=[0,1,2]", *arms, mix, "+arms.m={algorithm:none,start:arc}")
    for run in of("mix", planned):
        labels = [planned[run.parents[f"ingredient{i}"]].label.partition("-seed")[2] for i in range(3)]
        assert labels == ["2", "3", "1"]  # of a, b and c


def test_a_second_round_has_prompts_and_noise_of_its_own():
    for arms in ("rounds", "warp"):
        seeds = {run.settings["seed"] for run in of("ppo", runs_of(f"arm=[{arms}]", "replicates=[0]"))}
        assert len(seeds) == {"rounds": 2, "warp": 4}[arms]


def made_at(*overrides):
    """Arm -> the kl_coefs of its policies."""
    (composed,) = compose.compose(list(overrides))
    return {name: kl_coefs for names, kl_coefs in policies.specs(composed).values() for name in names}


WARP = ["arm=[ppo,warp]", "replicates=[0]"]


def test_merged_policies_are_made_at_each_kl_coef_of_what_they_are_made_of():
    overrides = [*WARP, "kl_coefs=[0.05,0.1]", "+arms.third={start:'policy:warp'}"]
    assert made_at(*overrides)["warp"] == [0.05, 0.1] == made_at(*overrides)["third"]
    planned = runs_of(*overrides)
    assert len(of("none", planned)) == 2 == len({run.address for run in of("none", planned)})
    assert all(run.settings["kl_coef"] == 0 for run in of("none", planned))
    for third in (run for run in of("ppo", planned) if run.settings["start"] == {"ingredient0": "1"}):
        if planned[third.parents["ingredient0"]].stage == "none":
            (second,) = planned[third.parents["ingredient0"]].parents.keys() & {"ingredient0"}
            mix = planned[planned[third.parents["ingredient0"]].parents[second]]
            merged = [planned[path] for path in mix.parents.values() if planned[path].stage == "ppo"]
            assert {run.settings["kl_coef"] for run in merged} == {third.settings["kl_coef"]}
    judged = {run.settings["candidate"] for run in of("judge", planned)}
    assert {f"none-start_warp_round_2-kl_{kl_coef}" for kl_coef in ("0.05", "0.1")} <= judged
    alone = of("judge", runs_of(*WARP, "kl_coefs=[0.1]"))  # what another study has, changes no run of it
    assert {run.address for run in alone} <= {run.address for run in of("judge", planned)}


def test_three_rounds_at_two_kl_coefs_stand_each_on_their_own():
    third = "+arms.third={start:'1/2 policy:rounds + 1/2 policy:merged',seed:2}"
    merged = "+arms.merged={algorithm:none,start:'1/2 policy:salsa + 1/2 policy:rounds'}"
    planned = runs_of(*ROUNDS, "kl_coefs=[0.02,0.05]", merged, third)
    assert made_at(*ROUNDS, "kl_coefs=[0.02,0.05]", merged, third)["merged"] == [0.02, 0.05]

    def strengths(run):
        """The kl_coefs of all policies that a run stands on, and its own."""
        made_of = [planned[path] for role, path in run.parents.items() if role.startswith("ingredient")]
        own = {run.settings["kl_coef"]} if run.stage == "ppo" else set()
        return own.union(*map(strengths, made_of))

    assert all(len(strengths(run)) == 1 for run in [*of("ppo", planned), *of("none", planned)])
    assert len(of("ppo", planned)) == 8 and len(of("none", planned)) == 2


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("[0.02,0.05]", "[0.05,0.1]", [0.05]),
        ("[0.05]", "[0.02,0.05,0.1]", [0.05]),
        ("[0.05]", "[0.1,0.02]", [0.02, 0.1]),  # one policy serves all, where it has to
        ("[0.1]", "[0.05]", [0.1]),
    ],
)
def test_a_merged_policy_is_made_where_all_its_ingredients_are(first, second, expected):
    merged = "+arms.merged={algorithm:none,start:'1/2 policy:ppo + 1/2 policy:salsa'}"
    grids = ["kl_coefs=[0.02,0.05,0.1]", f"arms.ppo.kl_coefs={first}", f"arms.salsa.kl_coefs={second}"]
    assert made_at("arm=[ppo,salsa]", *grids, merged)["merged"] == expected


def test_grids_without_a_common_kl_coef_make_no_merged_policy():
    merged = "+arms.merged={algorithm:none,start:arc}"
    arc = "+mixes.arc={kind:slerp,weights:'1/2 policy:ppo + 1/2 policy:salsa',origin:sft0}"
    grids = ["kl_coefs=[1,2,3,4]", "arms.ppo.kl_coefs=[1,2]", "arms.salsa.kl_coefs=[3,4]"]
    line = "arms.merged: policy:salsa: is needed at kl_coef 1, and trained at 3, 4; give both arms the same kl_coefs"
    with pytest.raises(UserError, match=line):
        compose.compose(["arm=[ppo,salsa]", *grids, arc, merged])


def test_each_algorithm_merges_its_policies_on_its_own_grid():
    grids = ["kl_coefs=[0.03,0.1,0.3]", "algorithm_kl_coefs.ppo=[0.1]", "algorithm_kl_coefs.grpo=[0.1,0.3]"]
    grids = [f"+{grid}" if "algorithm" in grid else grid for grid in grids]
    found = made_at(*WARP, "algorithm=[ppo,grpo]", *grids, "+arms.still={algorithm:none,start:sft1}")
    assert found["warp"] == [0.1] and found["grpo_warp"] == [0.1, 0.3]
    assert found["still"] == [0.1]  # at 0.03 nothing is trained


def test_an_ingredient_of_one_kl_coef_serves_all():
    planned = runs_of(*ROUNDS, "kl_coefs=[0.02,0.05]", "arms.salsa.kl_coefs=[0.05]")
    second = [run for run in of("ppo", planned) if "ingredient0" in run.parents]
    assert len(second) == 2 and len({run.parents["ingredient0"] for run in second}) == 1


def test_a_seed_gives_other_noise_alone():
    planned = runs_of("arm=[ppo,salsa]", "replicates=[0]", "arms.salsa.reference.weights=sft0", "+arms.salsa.seed=1")
    first, second = of("ppo", planned)
    assert first.settings | {"seed": 0} == second.settings | {"seed": 0} and first.address != second.address
    composed = compose.compose(["arm=[ppo,salsa]", "+arms.salsa.seed=1"])[0]
    assert [policy.name.endswith("-seed1") for policy in policies.policies(composed)] == [False, True]


def test_another_model_comes_in_after_the_base_and_before_sft(base, tmp_path):
    planned = runs_of("arm=[ppo,salsa]", "replicates=[0]", f"+models.big.path={base[0]}", "arms.salsa.start=big")
    study_base, other = of("base", planned)
    assert other.parents == {"base": path_of(study_base, planned)} and other.settings["base"] is None
    assert all(run.after == (path_of(other, planned),) for run in of("sft", planned))
    renamed = runs_of("arm=[ppo,salsa]", "replicates=[0]", f"+models.other.path={base[0]}", "arms.salsa.start=other")
    assert {run.address for run in of("ppo", planned)} == {run.address for run in of("ppo", renamed)}


SALSA = "arms.salsa.reference.weights="


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([SALSA + "sft3"], "arms.salsa.reference.weights=sft3: needs sft3, and there are 2 SFT models; set sft.models"),
        ([SALSA + "policy:pppo"], "policy:pppo is no ingredient of this study; did you mean policy:ppo?"),
        ([SALSA + "x"], "x is no ingredient of this study; there are sft0, sft1, policy:ppo, policy:salsa"),
        ([SALSA + "'1/2 sft0 + sft1'"], "weights=1/2 sft0 + 1 sft1: the weights sum to 1.5, not 1"),
        ([SALSA + "policy:salsa"], "arms.salsa: is made of itself (salsa → salsa)"),
        (["arms.ppo.start=policy:salsa", SALSA + "policy:ppo"], "is made of itself (ppo → salsa → ppo)"),
        (["+sft_variants.a.sft.epochs=2"], "sft_variants.a: no arm is made of it; name it in one's start or reference"),
        (["+sft_variants.a.sft.epoch=2", SALSA + "a"], "sft_variants.a.sft.epoch: no such setting"),
        (["+sft_variants.a.sft.epochs=0", SALSA + "a"], "sft_variants.a.sft.epochs=0: must be at least 1"),
        (["+sft_variants.a.sft.models=3", SALSA + "a"], "sft_variants.a.sft.models: a variant is one model"),
        (["+sft_variants.a.task.kind=reviews", SALSA + "a"], "sft_variants.a.task"),
        (["+sft_variants.a.best_share=0", SALSA + "a"], "sft_variants.a.best_share=0: must be above 0"),
        (["+sft_variants.sft1={}", SALSA + "sft1"], "sft_variants.sft1: the name of an SFT model of the study"),
        (["+models.a.path=o/n", "+sft_variants.a={}", SALSA + "a"], "models.a: sft_variants has an entry of this name"),
        (["+models.a={}", SALSA + "a"], "models.a.path: no value; give one"),
        (["+models.a.path=./absent", SALSA + "a"], "models.a.path=./absent: no such folder; give a model folder"),
        (
            ["kl_coefs=[0.02,0.05,0.1]", "arms.ppo.kl_coefs=[0.02,0.05]", SALSA + "policy:ppo"],
            "arms.salsa: policy:ppo: is needed at kl_coef 0.1, and trained at 0.02, 0.05; give both arms the same",
        ),
    ],
)
def test_what_is_no_ingredient_is_refused(overrides, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        compose.compose(["arm=[ppo,salsa]", *overrides])
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_differs_is_refused_with_its_first_token(base):
    first, second = base
    tokenizer = json.loads((second / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[20:22]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (second / "tokenizer.json").write_text(json.dumps(tokenizer))
    hub = ["model.source=hub", f"model.path={first}", "model.chat_template=null"]
    overrides = ["arm=[ppo,salsa]", *hub, f"+models.big.path={second}", SALSA + "big"]
    line = rf"its tokenizer differs from that of .*first in vocabulary: {one!r} is .*; models.big has to read the same"
    with pytest.raises(UserError, match=line):
        compose.compose(overrides)
    shutil.copy(first / "tokenizer.json", second)
    assert compose.compose(overrides)


def test_a_model_of_another_size_is_a_reference_by_itself_alone(base):
    first, second = base
    values = runs.read_json(second / "config.json")
    runs.write_json(second / "config.json", values | {"num_hidden_layers": values["num_hidden_layers"] + 1})
    hub = ["model.source=hub", f"model.path={first}", "model.chat_template=null", f"+models.big.path={second}"]
    assert compose.compose(["arm=[ppo,salsa]", *hub, SALSA + "big"])
    for wrong in ([SALSA + "'1/2 sft0 + 1/2 big'"], [SALSA + "big", "arms.salsa.reference.kind=noise"]):
        with pytest.raises(UserError, match=r"models.big has another architecture than the base model"):
            compose.compose(["arm=[ppo,salsa]", *hub, *wrong])


def changed_model(folder, **values):
    """Overrides that add the model of a folder, whose configuration has other values, as models.big."""
    runs.write_json(folder / "config.json", runs.read_json(folder / "config.json") | values)
    return f"+models.big.path={folder}"


UNTRAINED = "+arms.u={algorithm:none,start:big}"


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("values", [{"intermediate_size": 512}, {"num_hidden_layers": 5}, {"num_key_value_heads": 2}])
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([SALSA + "'1/2 sft0 + 1/2 big'"], "arms.salsa.reference.weights: models.big has another"),
        (["+mixes.m={kind:slerp,weights:'1/2 sft0 + 1/2 big'}", SALSA + "m"], "mixes.m: models.big has another"),
        (["+mixes.m={kind:greedy,weights:'1/2 sft0 + 1/2 big'}", SALSA + "m"], "mixes.m: models.big has another"),
        ([UNTRAINED, SALSA + "'1/2 sft0 + 1/2 policy:u'"], "arms.salsa.reference.weights: policy:u (as models.big)"),
        ([UNTRAINED, "evaluate.plane.arms=[u]"], "evaluate.plane.arms: policy:u (as models.big)"),
        (["arms.salsa.start=big"], "arms.salsa.start: models.big has another"),
        ([UNTRAINED, "arms.salsa.start=policy:u"], "arms.salsa.start: policy:u (as models.big)"),
    ],
)
def test_another_architecture_is_refused_wherever_it_is_mixed_or_trained(base, local, values, overrides, line):
    first, second = base
    hub = ["model.source=hub", f"model.path={first}", "model.chat_template=null"] if local else []
    with pytest.raises(UserError, match=re.escape(line)) as error:
        compose.compose(["arm=[ppo,salsa]", *hub, changed_model(second, **values), *overrides])
    assert "\n" not in str(error.value)


def test_another_architecture_may_be_an_untrained_start(base):
    assert compose.compose(["arm=[ppo]", changed_model(base[1], num_hidden_layers=5), UNTRAINED])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+sft_variants.v.task.demonstrations=0"], "sft_variants.v.task.demonstrations=0: at least 1 are needed"),
        (["+sft_variants.v.task.validation=0"], "sft_variants.v.task.validation=0: at least 1 are needed"),
        (["+sft_variants.v.task.demonstrations=9999999"], "sft_variants.v.task.demonstrations: stories have"),
        (["+sft_variants.v.task.evaluation=3"], "sft_variants.v.task.evaluation: other data than the study's may hold"),
        (["+sft_variants.v.sft.batch_size=7", "execution.processes=2"], "cannot share sft_variants.v.sft.batch_size=7"),
        (["+sft_variants.Sft0={}"], "sft_variants.Sft0: the name of an SFT model"),
        (["+sft_variants.sft01={}"], "sft_variants.sft01: the name of an SFT model"),
        (["+sft_variants.v={}", "+sft_variants.V={}"], "differs from v in capitals alone"),
    ],
)
def test_a_variant_is_held_to_the_rules_of_the_sections_that_it_changes(overrides, line):
    with pytest.raises(UserError, match=re.escape(line)):
        compose.compose(["arm=[ppo,salsa]", *overrides, SALSA + "v"])


def test_adapters_of_a_variant_need_their_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(UserError, match=r"sft_variants.v.sft.lora_rank=4: needs peft"):
        compose.compose(["arm=[ppo,salsa]", "+sft_variants.v.sft.lora_rank=4", SALSA + "v"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 1}, "key.seed: other data than the study's may hold"),
        ({"sft_file": "x.jsonl"}, "key.sft_file: other data than the study's may hold"),
        ({"demonstrations": 11}, "key.demonstrations=11: may take prompts that a benchmark asks"),
        ({"demonstrations": 0}, "key.demonstrations=0: may take prompts that a benchmark asks"),
    ],
)
def test_a_variant_takes_no_demonstrations_that_a_benchmark_may_ask(change, line):
    section = SimpleNamespace(name="ultra", task=data.task_settings()(kind="ultra", demonstrations=10))
    with pytest.raises(UserError, match=re.escape(line)):
        rules.check_demonstrations("key", change, section)
    rules.check_demonstrations("key", {"demonstrations": 5}, section)


@pytest.mark.parametrize(
    ("kind", "weights", "line"),
    [
        ("multi_kl", "'1/2 sft0 + 1/2 v'", "a KL to one model is that of kind=soup"),
        ("noise", "v", "noise as far as sft0 from sft0 is none"),
    ],
)
def test_a_variant_that_is_sft0_makes_no_reference_of_two_models(kind, weights, line):
    overrides = ["+sft_variants.v={}", f"arms.salsa.reference.kind={kind}", SALSA + weights]
    with pytest.raises(UserError, match=rf"arms.salsa.reference.*{line}"):
        runs_of("arm=[ppo,salsa]", "replicates=[0]", *overrides)


def test_an_ingredient_that_is_named_twice_is_named():
    with pytest.raises(UserError, match="sft0 is named twice; name it once"):
        compose.compose(["arm=[ppo,salsa]", SALSA + "'1/2 sft0 + 1/2 sft0'"])


def test_the_report_says_what_ingredients_are_made_of():
    (composed,) = compose.compose(
        ["arm=[ppo,warp,greedy_soup]", "+models.large.path=owner/name", "+arms.x.reference.weights=large"]
    )
    study = SimpleNamespace(config=composed.config)
    frame = ingredients.SECTION.table(study)
    assert ingredients.SECTION.present(study) and len(frame) == 7
    words = dict(zip(frame["ingredient"], frame["made_of"], strict=True))
    assert words["better_half"] == "the seed of sft0, the 50% of demonstrations of highest gold"
    assert words["warp_round_2"] == "SLERP of 1/2 policy:warp_a_2 + 1/2 policy:warp_b_2, from warp_round_1, step 0.3"
    assert words["more_dropout"] == "the seed of sft0, sft.dropout=0.3" and words["large"] == "owner/name"
    assert ingredients.SECTION.caption(study, {"ingredients": frame}).startswith("7 ingredients of starts and")
    (plain,) = compose.compose(["arm=[ppo,salsa]"])
    assert not ingredients.SECTION.present(SimpleNamespace(config=plain.config))
