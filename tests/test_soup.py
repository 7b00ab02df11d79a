"""Weight averages: against the plain average in float32, in every layout of a model folder, and every refusal."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import move, random_llama, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from salsa import soup
from salsa.runs import UserError


def tensors(folder):
    """Every tensor of a model folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def naive(folders, weights):
    """The average in float64, unrounded."""
    loaded = [tensors(folder) for folder in folders]
    return {name: sum(w * one[name].double() for w, one in zip(weights, loaded, strict=True)) for name in loaded[0]}


def assert_average(folder, folders, weights):
    found, expected = tensors(folder), naive(folders, weights)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        exact = expected[name]
        scale = sum(abs(w) * tensors(f)[name].double().abs() for w, f in zip(weights, folders, strict=True))
        if tensor.dtype == torch.float32:
            assert ((tensor.double() - exact).abs() <= 4e-7 * scale).all(), name
        else:  # rounded once: half a unit in the last of 8 bits, no more
            assert ((tensor.double() - exact).abs() <= 2**-8 * exact.abs() * 1.001 + 1e-6 * scale).all(), name
            assert (tensor == exact.to(tensor.dtype)).double().mean() > 0.98, name  # but for ties


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """Three models: folders by (dtype, tied, sharded)."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(dtype=torch.float32, tied=True, sharded=()):
        key = f"{dtype}-{tied}-{sharded}".replace("torch.", "")
        if key not in made:
            made[key] = []
            for i in range(3):
                model = move(random_llama(tokenizer, 0, tie_word_embeddings=tied), i, 0.05).to(dtype)
                options = {"max_shard_size": f"{25 + 15 * i}KB"} if i in sharded else {}
                made[key].append(save_model(model, tokenizer, root / key / str(i), **options))
        return made[key]

    return get


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soup_is_the_average_rounded_once(models, tmp_path, dtype, tied):
    folders = models(dtype, tied)
    soup.soup(folders, ["1/3", "1/3", "1/3"], tmp_path / "soup")
    assert_average(tmp_path / "soup", folders, [1 / 3] * 3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "soup", dtype="auto")
    assert loaded.dtype == dtype
    tied_now = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied_now is tied and ("lm_head.weight" in tensors(tmp_path / "soup")) is not tied
    state = loaded.state_dict()
    for name, tensor in tensors(tmp_path / "soup").items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("sharded", [(0,), (1,), (0, 1)])
def test_ingredients_may_be_cut_into_files_differently(models, tmp_path, sharded):
    folders = models(sharded=sharded)[:2]
    for i in sharded:
        assert len(list(folders[i].glob("*.safetensors"))) > 2
    soup.soup(folders, [0.25, "0.75"], tmp_path / "soup")
    assert_average(tmp_path / "soup", folders, [0.25, 0.75])
    assert sorted(p.name for p in (tmp_path / "soup").iterdir()) == sorted(p.name for p in folders[0].iterdir())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    plain = models()[:2]
    soup.soup(plain, [0.25, 0.75], tmp_path / "plain")
    for name, tensor in tensors(tmp_path / "plain").items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_tokenizer_and_configuration_are_copied(models, tmp_path):
    first, second = models()[:2]
    (tmp_path / "soup").mkdir()  # an empty folder may be given
    soup.soup([first, second], [0.5, 0.5], tmp_path / "soup")
    found, expected = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "soup", first))
    assert found.get_vocab() == expected.get_vocab() and found.chat_template == expected.chat_template
    assert (tmp_path / "soup" / "config.json").read_bytes() == (first / "config.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


def test_a_weight_of_one_is_the_model_itself(models, tmp_path):
    soup.soup(models()[:2], [0, 1], tmp_path / "soup")
    for name, tensor in tensors(models()[1]).items():
        assert torch.equal(tensors(tmp_path / "soup")[name], tensor)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["0.5", "0.6"], "sum to 1.1"),
        (["0.5", "0.500002"], "must sum to 1"),
        (["1/3", "1/3"], "must sum to 1"),
        (["1"], "1 weights for 2 models"),
        (["0.2", "0.3", "0.5"], "3 weights for 2 models"),
        (["half", "half"], "decimal or a fraction"),
        (["1/0", "1"], "decimal or a fraction"),
        (["nan", "1"], "decimal or a fraction"),
    ],
)
def test_weights_are_refused(models, tmp_path, weights, message):
    with pytest.raises(UserError, match=message) as caught:
        soup.soup(models()[:2], weights, tmp_path / "soup")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_weights_may_be_off_by_rounding():
    assert soup.parse_weights(["0.3333333", "0.3333333", "0.3333333"], 3) == [0.3333333] * 3
    assert soup.parse_weights([0.1] * 10, 10) == [0.1] * 10
    assert soup.parse_weights(["1/3", "2/3"], 2) == [1 / 3, 2 / 3]


def copied(folder, target):
    return shutil.copytree(folder, target)


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensor(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


SECOND, THIRD = "model.layers.0.input_layernorm.weight", "model.norm.weight"


def reshape(state):
    for name in (SECOND, THIRD):
        state[name] = state[name][:-1].clone()


def other_dtype(state):
    for name in (SECOND, THIRD):
        state[name] = state[name].bfloat16()


def rename(state):
    state["model.layers.0.aaa"] = state.pop(SECOND)


def remove(state):
    del state[SECOND]


def add(state):
    state["model.zzz"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (reshape, rf"{SECOND} is F32 \[31\].*it is F32 \[32\]"),
        (other_dtype, rf"{SECOND} is BF16 \[32\].*it is F32"),
        (rename, r"model.layers.0.aaa is F32 \[32\].*it is missing"),
        (remove, rf"{SECOND} is missing"),
        (add, "model.zzz is F32"),
    ],
)
def test_the_first_differing_tensor_is_named(models, tmp_path, change, named):
    other = copied(models()[1], tmp_path / "other")
    change_tensor(other, change)
    with pytest.raises(UserError, match=named):
        soup.soup([models()[0], other], [0.5, 0.5], tmp_path / "soup")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def damaged(name):
    """What makes a folder no ingredient: (change, message)."""
    return {
        "missing": (shutil.rmtree, "no such model folder"),
        "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
        "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 100), "model.safetensors"),
        "config": (lambda f: edit_json(f / "config.json", rms_norm_eps=1e-3), "rms_norm_eps"),
        "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        "tokenizer": (lambda f: edit_json(f / "tokenizer.json", model={"type": "WordLevel"}), "tokenizer"),
    }[name]


@pytest.mark.parametrize(
    "name", ["missing", "no config", "no weights", "truncated", "config", "no tokenizer", "tokenizer"]
)
def test_what_is_no_like_model_is_refused(models, tmp_path, name):
    other = copied(models()[1], tmp_path / "other")
    change, message = damaged(name)
    change(other)
    with pytest.raises(UserError, match=message) as caught:
        soup.soup([models()[0], other], [0.5, 0.5], tmp_path / "soup")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "soup").exists() and not list(tmp_path.glob(".*"))


def test_a_missing_file_of_an_index_is_refused(models, tmp_path):
    other = copied(models(sharded=(1,))[1], tmp_path / "other")
    gone = sorted(other.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        soup.soup([models()[0], other], [0.5, 0.5], tmp_path / "soup")


def test_what_may_differ_does(models, tmp_path):
    other = copied(models()[1], tmp_path / "other")
    edit_json(other / "config.json", _name_or_path="elsewhere", use_cache=False, transformers_version="5.0")
    edit_json(other / "tokenizer_config.json", padding_side="right")
    soup.soup([models()[0], other], [0.5, 0.5], tmp_path / "soup")


def test_whole_numbers_must_agree(models, tmp_path):
    folders = [copied(models()[i], tmp_path / str(i)) for i in (0, 1)]
    for i, folder in enumerate(folders):
        change_tensor(folder, lambda state, i=i: state.update(steps=torch.tensor([7, 7 + i])))
    with pytest.raises(UserError, match="steps"):
        soup.soup(folders, [0.5, 0.5], tmp_path / "soup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    change_tensor(folders[1], lambda state: state.update(steps=torch.tensor([7, 7])))
    soup.soup(folders, [0.5, 0.5], tmp_path / "soup")
    assert tensors(tmp_path / "soup")["steps"].tolist() == [7, 7]


def test_an_output_that_holds_something_is_left_alone(models, tmp_path):
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        soup.soup(models()[:2], [0.5, 0.5], tmp_path / "soup")
    assert [path.name for path in (tmp_path / "soup").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        soup.soup(models()[:2], [0.5, 0.5], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_command(models, tmp_path):
    command = [sys.executable, "-m", "salsa.soup", *map(str, models()[:2])]
    done = subprocess.run([*command, "--weights", "1/4", "0.75", "--output", tmp_path / "a" / "soup"])
    assert done.returncode == 0
    assert_average(tmp_path / "a" / "soup", models()[:2], [0.25, 0.75])
    failed = subprocess.run(
        [*command, "--weights", "0.5", "0.6", "--output", tmp_path / "b"], capture_output=True, text=True
    )
    assert failed.returncode != 0 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and "sum to 1.1" in failed.stderr
    assert not (tmp_path / "b").exists()
