"""The README.md of a soup says what it was made from, and the hub reads it."""

import hashlib
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import finished, move, random_llama, save_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from salsa import mix_card, soup
from salsa.__main__ import main
from salsa.mixes import greedy

HUB = "models--org--base/snapshots/0123abc"


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A run's model, one in the hub's cache, and one that is cut into several files, in a folder of an odd name."""
    root, first = tmp_path_factory.mktemp("results"), random_llama(tokenizer, 0)
    run, others = root / "sft" / "s0-0123456789ab", [root / HUB, root / "a|b `c`"]
    finished("sft", run, lambda folder: save_model(first, tokenizer, folder / "model") and None)
    for seed, other in enumerate(others, 1):
        save_model(move(first, seed, 0.1), tokenizer, other, **({"max_shard_size": "20KB"} if seed == 2 else {}))
    return [run / "model", *others]


def metadata(folder):
    """The front matter, as YAML reads it; the hub's own reader has to find the same."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    read = yaml.safe_load(text.split("---\n")[1])
    assert ModelCard(text).data.to_dict() == read
    return read, text


def command(text):
    return shlex.split(text.split("## How to make it again")[1].split("```")[1])


def test_a_soup_says_what_was_averaged(folders, tmp_path):
    soup.main([*map(str, folders), "--weights", "1/2", "1/3", "1/6", "--output", str(tmp_path / "soup")])
    read, text = metadata(tmp_path / "soup")
    assert read == {
        "base_model": ["org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "model-soup", "salsa"],
    }
    odd = str(folders[2]).replace("|", "\\|").replace("`", "'")
    lines = ["| `sft/s0-0123456789ab/model` | 1/2 |", "| `org/base` | 1/3 |", f"| `{odd}` | 1/6 |"]
    assert "\n".join(["| model | weight |", "| --- | --- |", *lines]) in text
    assert "float32" in text and "2203.05482" in text


def test_digests_are_those_of_sha256sum(folders, tmp_path):
    soup.soup([folders[0], folders[2]], ["1/2", "1/2"], tmp_path / "soup")
    block = metadata(tmp_path / "soup")[1].split("## Digests")[1].split("```\n")[1]
    found = {tuple(line.split("  ", 1)) for line in block.splitlines()}
    run = folders[0].parents[2]
    names = {"sft/s0-0123456789ab/model/model.safetensors": folders[0] / "model.safetensors"}
    names |= {str(path): path for path in folders[2].glob("*.safetensors")}
    assert len(names) > 3
    assert found == {(hashlib.sha256(path.read_bytes()).hexdigest(), name) for name, path in names.items()}
    (tmp_path / "sums").write_text(block)
    subprocess.run(["sha256sum", "--check", "--quiet", tmp_path / "sums"], cwd=run, check=True)


def test_the_command_makes_it_again(folders, tmp_path, monkeypatch):
    """From the results folder, for a run's model is named from there."""
    monkeypatch.chdir(folders[0].parents[2])
    models = [folders[0], folders[2]]
    for name, options in {
        "linear": [],
        "slerp": ["--method", "slerp"],
        "step": ["--method", "slerp", "--origin", str(folders[1]), "--step", "0.3"],
    }.items():
        output = tmp_path / name
        soup.main([*map(str, models), "--weights", "1/4", "3/4", *options, "--output", str(output)])
        words = command(metadata(output)[1])
        again = [str(folders[1]) if word == "org/base" else word for word in words[2:-1]]  # not on this machine's hub
        assert words[:2] == ["salsa", "soup"] and words[-1] == "FOLDER"
        assert main(["soup", *again, str(tmp_path / f"{name}-again")]) is None
        assert (output / "README.md").read_bytes() == (tmp_path / f"{name}-again" / "README.md").read_bytes()
        for path in output.glob("*.safetensors"):
            one, other = (load_file(folder / path.name) for folder in (output, tmp_path / f"{name}-again"))
            assert all(tensor.equal(other[key]) for key, tensor in one.items())
    text = (tmp_path / "step" / "README.md").read_text()
    assert "| origin | `org/base` |  |" in text and "step of 0.3" in text and "merges" in text and "slerp" in text


def test_a_greedy_soup_shows_its_search(folders, tmp_path):
    candidates, values = dict(zip("abc", folders, strict=True)), {"a": 2.5, "b": 2.0, "c": 4.0, "ab": 1.5, "abc": 1.75}
    greedy.write(candidates, tmp_path / "soup", lambda: lambda weights: values["".join(weights)])
    read, text = metadata(tmp_path / "soup")
    assert "| b | `org/base` | 1/2 |" in text and " | 0 |" in text and read["tags"][0] == "merge"
    for line in ("| `b` | 2 | 2 | yes |", "| `a` | 2.5 | 1.5 | yes |", "| `c` | 4 | 1.75 | no |"):
        assert line in text


def test_what_ingredients_say_of_themselves_is_said_of_the_soup(tokenizer, tmp_path):
    """And where they disagree, or can't be read, nothing; their own cards are not copied."""
    models = [save_model(random_llama(tokenizer, 0), tokenizer, tmp_path / name) for name in "ab"]

    def cards(*texts):
        for folder, text in zip(models, texts, strict=True):
            (folder / "README.md").write_text(text)
        card = mix_card.Card(models, "A soup", mix_card.LINEAR).text([0.5, 0.5])
        assert "of its own" not in card
        data = ModelCard(card).data
        return data.license, data.language, data.base_model

    one = "---\nlicense: mit\nlanguage: de\nbase_model: org/one\n---\nof its own"
    assert cards(one, one) == ("mit", "de", ["org/one"])
    other = "---\nlicense: gemma\nlanguage: [de, en]\nbase_model: [org/two]\n---\n"
    assert cards(one, other) == (None, None, ["org/one", "org/two"])
    assert cards(one, "no card") == (None, None, ["org/one"])
    assert cards("---\n[: not yaml\n---\n", "---\nlicense: 5\n---\n") == (None, None, None)


def test_places(tmp_path):
    assert mix_card.hub_id(Path("/x") / HUB) == mix_card.place(Path("/x") / HUB) == "org/base"
    assert mix_card.hub_id("/x/models--gpt2/snapshots/1") == "gpt2"
    assert mix_card.hub_id("/x/models--a--b--c/snapshots/1") == "a/b--c"
    assert mix_card.hub_id(tmp_path) is None and mix_card.place(tmp_path) == str(tmp_path)
