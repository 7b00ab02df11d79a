"""Weight averages: against the plain average in float32, in every layout of a model folder, and every refusal."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import move, random_llama, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from salsa import soup
from salsa.workflow.runs import UserError


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
    names = [*(path.name for path in folders[0].iterdir()), "README.md"]
    assert sorted(path.name for path in (tmp_path / "soup").iterdir()) == sorted(names)
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


def test_a_truncated_file_of_an_index_is_refused(models, tmp_path):
    other = copied(models(sharded=(1,))[1], tmp_path / "other")
    cut = sorted(other.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{cut.name}: can't be read"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: change_tensor(f, remove), f"tensor {SECOND} is missing, of LlamaForCausalLM"),
        (lambda f: change_tensor(f, lambda s: s.pop("lm_head.weight")), "tensor lm_head.weight is missing"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=1), r"tensor model\.layers\.1\..* is none of"),
        (lambda f: edit_json(f / "config.json", intermediate_size=8), r"has shape \[\d+, \d+\], and config.json"),
        (lambda f: edit_json(f / "config.json", architectures=["LlamaModel"]), ""),
    ],
)
def test_ingredients_that_lack_the_same_are_refused(models, tmp_path, change, message):
    folders = [copied(folder, tmp_path / str(i)) for i, folder in enumerate(models(tied=False)[:2])]
    for folder in folders:
        change(folder)
    if not message:  # whole all the same
        soup.soup(folders, [0.5, 0.5], tmp_path / "soup")
        return
    with pytest.raises(UserError, match=message) as caught:
        soup.soup(folders, [0.5, 0.5], tmp_path / "soup")
    assert "\n" not in str(caught.value) and contents(tmp_path) == ["0", "1"]


def test_classifiers_can_be_averaged(reward_run, tmp_path):
    soup.soup([reward_run / "model"] * 2, [0.5, 0.5], tmp_path / "soup")
    assert_average(tmp_path / "soup", [reward_run / "model"] * 2, [0.5, 0.5])


# Grids: several soups from one reading, in pieces and threads.

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def write_model(folder, state, files):
    """A model folder without a tokenizer, its tensors dealt to so many files; with one, there is no index."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shards = [dict(list(state.items())[i::files]) for i in range(files)]
    paths = [f"part-{i}.safetensors" for i in range(files)] if files > 1 else [soup.SINGLE]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, folder / path, metadata={"format": "pt"})
    if files > 1:
        index = {name: path for path, shard in zip(paths, shards, strict=True) for name in shard}
        (folder / soup.INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def random_tensor(shape, dtype, generator):
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    scale = 10.0 ** torch.randint(-6, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def whole_average(states, weights):
    """The average of whole tensors, in float32 and rounded once."""
    average = {}
    for name, first in states[0].items():
        total = first
        if first.is_floating_point():
            total = first.float() * weights[0]
            for state, weight in zip(states[1:], weights[1:], strict=True):
                total = total.add(state[name].float(), alpha=weight)
        average[name] = total.to(first.dtype)
    return average


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.flatten().view(torch.uint8), other.flatten().view(torch.uint8)), name


@st.composite
def grids(draw):
    """(tensors' shapes and dtypes, files of each model, rows of weights, piece size, threads, seed)."""
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    kinds = draw(st.lists(st.tuples(shapes, st.sampled_from([*FLOATS, *FLOATS, *WHOLE])), min_size=1, max_size=5))
    models = draw(st.integers(2, 4))
    parts = st.lists(st.integers(-3, 6), min_size=models, max_size=models).filter(lambda row: sum(row) > 0)
    rows = draw(st.lists(parts, min_size=1, max_size=4))
    grid = [[str(Fraction(part, sum(row))) for part in row] for row in rows]
    files = draw(st.lists(st.integers(1, len(kinds)), min_size=models, max_size=models))
    return kinds, files, grid, draw(st.sampled_from([1, 3, 8, 64, 2**18])), draw(st.integers(1, 3)), draw(st.integers())


@settings(max_examples=100, deadline=None)
@given(grids())
def test_a_grid_is_the_average_of_whole_tensors_bit_for_bit(drawn):
    kinds, files, grid, piece, threads, seed = drawn
    generator = torch.Generator().manual_seed(seed % 2**63)
    first = {f"t{i}": random_tensor(shape, dtype, generator) for i, (shape, dtype) in enumerate(kinds)}
    states = [first]
    for _ in files[1:]:
        new = {n: random_tensor(t.shape, t.dtype, generator) if t.is_floating_point() else t for n, t in first.items()}
        states.append(new)
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(soup, "PIECE", piece)
        torch.set_num_threads(threads)
        try:
            root = Path(root)
            models = [write_model(root / str(i), *pair) for i, pair in enumerate(zip(states, files, strict=True))]
            outputs = [root / f"soup{i}" for i in range(len(grid))]
            soup.soups(models, grid, outputs)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        for row, output in zip(grid, outputs, strict=True):
            expected = whole_average(states, [float(Fraction(weight)) for weight in row])
            assert_same_bits(tensors(output), expected)
            assert_same_bits(dict(soup.mixed_tensors(models, [float(Fraction(w)) for w in row])), expected)
            for path in models[0].glob("*.safetensors"):
                assert (output / path.name).stat().st_size == path.stat().st_size


def test_whole_numbers_are_compared_to_the_last_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(soup, "PIECE", 2)
    states = [{"a": torch.ones(3), "steps": torch.tensor([1, 2, 3, 4, last])} for last in (5, 6)]
    folders = [write_model(tmp_path / name, state, 2) for name, state in zip("ab", states, strict=True)]
    with pytest.raises(UserError, match=r"steps is torch\.int64 and differs"):
        soup.soup(folders, [0.5, 0.5], tmp_path / "soup")
    assert contents(tmp_path) == ["a", "b"]


GRID = [[str(Fraction(4 - i, 4)), str(Fraction(i, 4))] for i in range(5)]


def test_each_ingredient_is_read_once(models, tmp_path, monkeypatch):
    folders, read, preadv = models(sharded=(0,))[:2], [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    monkeypatch.setattr(soup, "PIECE", 1000)
    soup.soups(folders, GRID, [tmp_path / str(i) for i in range(5)])
    assert sum(read) == sum(tensor.nbytes for folder in folders for tensor in tensors(folder).values())
    assert max(read) == 4000
    for i, row in enumerate(GRID):
        soup.soup(folders, row, tmp_path / "single")
        for path in (tmp_path / "single").iterdir():
            assert path.read_bytes() == (tmp_path / str(i) / path.name).read_bytes()
        shutil.rmtree(tmp_path / "single")


def memory(what):
    """Resident memory of this process, now (VmRSS) or at most since it was reset (VmHWM), bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel can't reset the peak")
def test_memory_is_that_of_pieces(tmp_path):
    folders, size = [], 2**27
    for name in "ab":  # 128 MiB of zeros, in a file with a hole
        folders.append(write_model(tmp_path / name, {"w": torch.zeros(2**10, dtype=torch.bfloat16)}, 1))
        header = {"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
        encoded = json.dumps(header).encode()
        with open(folders[-1] / soup.SINGLE, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + size)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    soup.soups(folders, GRID[:2], [tmp_path / "c", tmp_path / "d"])
    assert memory("VmHWM") - before < 2**25


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_that_is_too_small_is_refused(models, tmp_path, monkeypatch):
    folders = models()[:2]
    size, usage = sum(path.stat().st_size for path in folders[0].iterdir()), namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10 * size, 0, 3 * size - 1))
    with pytest.raises(UserError, match=rf"{tmp_path}: 3 x .* GB are needed, .* GB are free") as caught:
        soup.soups(folders, GRID[:3], [tmp_path / "new" / str(i) for i in range(3)])
    assert "\n" not in str(caught.value) and not contents(tmp_path)
    soup.soups(folders, GRID[:2], [tmp_path / "new" / str(i) for i in range(2)])
    assert contents(tmp_path / "new") == ["0", "1"]


def failing(after, error):
    """os.pwrite that, after so many calls, does what `error` does."""
    calls, pwrite = [], os.pwrite

    def write(*arguments):
        calls.append(arguments)
        return pwrite(*arguments) if len(calls) <= after else error()

    return write


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_leaves_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", failing(20, full))
    with pytest.raises(UserError, match="No space left on device") as caught:
        soup.soups(models()[:2], GRID[:2], [tmp_path / "a", tmp_path / "b"])
    assert "\n" not in str(caught.value) and not contents(tmp_path)


def test_a_terminated_command_leaves_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", failing(20, lambda: os.kill(os.getpid(), signal.SIGTERM) or full()))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            soup.main([*map(str, models()[:2]), "--weights", "1/2", "1/2", "--output", str(tmp_path / "a")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143 and not contents(tmp_path)


def test_an_ingredient_that_shrinks_is_noticed(models, tmp_path):
    folder = copied(models()[0], tmp_path / "a")
    stream = soup.mixed_tensors([folder], [1.0])
    next(stream)
    with open(folder / soup.SINGLE, "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)
    with pytest.raises(UserError, match="ends too early"):
        list(stream)


def test_a_type_that_has_no_average_is_refused(models, tmp_path):
    other = copied(models()[0], tmp_path / "other")
    change_tensor(other, lambda state: state.update({SECOND: state[SECOND].to(torch.float8_e4m3fn)}))
    with pytest.raises(UserError, match=f"{SECOND} is F8_E4M3, which can't be averaged"):
        soup.soup([other, other], [0.5, 0.5], tmp_path / "soup")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["a", "a"], "another output"),
        (["a", "./a"], "another output"),
        (["a/b/c", "a"], "another output"),
        (["a", "link"], "another output"),
        (["a"], "2 rows of weights for 1 outputs"),
        (["a", "taken"], "taken: exists and is not empty"),
    ],
)
def test_outputs_of_a_grid_are_refused(models, tmp_path, monkeypatch, outputs, message):
    monkeypatch.chdir(tmp_path)
    if "link" in outputs:
        (tmp_path / "link").symlink_to("a")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=message):
        soup.soups(models()[:2], GRID[:2], outputs)
    assert set(contents(tmp_path)) <= {"link", "taken"} and contents(tmp_path / "taken") == ["mine.txt"]


def test_a_grid_on_the_command_line(models, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    command = [*map(str, models()[:2]), "--weights", "1/4", "3/4", "--output", str(tmp_path / "a")]
    soup.main([*command, "--weights", "-0.5", "1.5", "--output", str(tmp_path / "b")])
    for name, weights in {"a": [0.25, 0.75], "b": [-0.5, 1.5]}.items():
        assert_same_bits(tensors(tmp_path / name), whole_average([tensors(f) for f in models()[:2]], weights))
    with pytest.raises(SystemExit, match="2 rows of weights for 1 outputs"):
        soup.main([*command[:-1], str(tmp_path / "c"), "--weights", "1/2", "1/2"])
    assert contents(tmp_path) == ["a", "b"]


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


# Two fine-tunes of one model, saved by different versions.


@pytest.fixture(scope="module")
def chat_models(tiny_chat_model, tmp_path_factory):
    """Two models with a byte-level BPE and a tied head."""
    root = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    made = [move(random_llama(tokenizer, 5, max_position_embeddings=1024), i, 0.05) for i in (1, 2)]
    return [save_model(model, tokenizer, root / str(i)) for i, model in enumerate(made)]


def as_an_older_version(folder):
    """Write a folder's configuration and tokenizer as transformers 4 and tokenizers 0.19 did."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for default in ("attention_bias", "mlp_bias", "pretraining_tp", "hidden_act", "head_dim"):
        config.pop(default)
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    config |= {"eos_token_id": [config["eos_token_id"]], "unsloth_version": "2024.9", "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    model.pop("ignore_merges", None)
    tokenizer["added_tokens"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("older", [0, 1])
def test_what_would_be_loaded_is_compared(chat_models, tmp_path, older):
    folders = [copied(folder, tmp_path / str(i)) for i, folder in enumerate(chat_models)]
    as_an_older_version(folders[older])
    embedding = "model.embed_tokens.weight"
    change_tensor(folders[older], lambda state: state.update({"lm_head.weight": state[embedding].clone()}))
    soup.soup(folders, ["1/4", "3/4"], tmp_path / "soup")
    found, expected = tensors(tmp_path / "soup"), naive(chat_models, [0.25, 0.75])
    assert ("lm_head.weight" in found) == (older == 0)  # as the first has it
    if older == 0:
        assert torch.equal(found.pop("lm_head.weight"), found[embedding])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def swap_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        (
            "config.json",
            lambda c: c.update(rope_theta=500000.0, rope_parameters=None),
            "config.json has rope_parameters",
        ),
        ("config.json", lambda c: c.update(hidden_act="gelu"), "config.json has hidden_act = 'gelu'"),
        ("config.json", lambda c: c.update(eos_token_id=[2, 3]), "config.json has eos_token_id"),
        ("config.json", lambda c: c.update(vocab_size=9), "config.json has vocab_size = 9"),
        ("config.json", lambda c: c.update(tie_word_embeddings=False), "config.json has tie_word_embeddings"),
        ("tokenizer.json", swap_tokens, r"its tokenizer differs from that of .* in vocabulary: '[ab]' is \d+, in"),
        ("tokenizer.json", lambda t: t["model"]["merges"].reverse(), "in merges"),
        ("tokenizer.json", lambda t: t["added_tokens"][4].update(content="<x>"), "in (vocabulary|added tokens)"),
        ("tokenizer.json", lambda t: t.update(pre_tokenizer=None), "in pre-tokenizer"),
        ("tokenizer_config.json", lambda t: t.update(eos_token="<bos>"), "eos_token is '<bos>'"),
    ],
)
def test_what_changes_the_meaning_is_refused(chat_models, tmp_path, file, change, named):
    other = copied(chat_models[1], tmp_path / "other")
    as_an_older_version(other)
    content = json.loads((other / file).read_text())
    change(content)
    (other / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=named) as caught:
        soup.soup([chat_models[0], other], [0.5, 0.5], tmp_path / "soup")
    assert "\n" not in str(caught.value) and contents(tmp_path) == ["other"]


def test_a_head_that_is_tied_and_stored_as_another_is_refused(chat_models, tmp_path):
    other = copied(chat_models[1], tmp_path / "other")
    change_tensor(other, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1}))
    for folders in ([chat_models[0], other], [other, chat_models[0]]):
        with pytest.raises(UserError, match=r"other: tensors lm_head.weight and model.embed_tokens.weight differ"):
            soup.soup(folders, [0.5, 0.5], tmp_path / "soup")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_numbers_that_are_not_finite(models, tmp_path, value, place):
    folders = models()[:2]
    folders[place] = copied(folders[place], tmp_path / "broken")
    change_tensor(folders[place], lambda state: state[SECOND].fill_(value))
    weights = ["1", "0"] if place else ["0", "1"]
    soup.soup(folders, weights, tmp_path / "unused")
    for name, tensor in tensors(models()[1 - place]).items():
        assert torch.equal(tensors(tmp_path / "unused")[name], tensor)
    with pytest.raises(UserError, match=f"broken/model.safetensors: tensor {SECOND} holds NaN or infinity"):
        soup.soups(folders, [weights, ["1/2", "1/2"]], [tmp_path / "a", tmp_path / "b"])
    assert contents(tmp_path) == ["broken", "unused"]


def test_negative_fractions_on_the_command_line(models, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    soup.main([*map(str, models()[:2]), "--weights", "-1/2", "3/2", "--output", str(tmp_path / "a")])
    soup.main([*map(str, models()[:2]), "--weights", "3/2", "-.5", "--output", str(tmp_path / "b")])
    for name, weights in {"a": [-0.5, 1.5], "b": [1.5, -0.5]}.items():
        assert_same_bits(tensors(tmp_path / name), whole_average([tensors(f) for f in models()[:2]], weights))


@pytest.mark.parametrize("weights", [["1e999999999", "1"], ["1e-999999999", "1"], ["9" * 9999, "1"], [1001, -1000]])
def test_weights_that_are_no_soups_are_refused_at_once(weights):
    with pytest.raises(UserError, match=r"each must") as caught:
        soup.parse_weights(weights, 2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_an_index_that_names_no_file_of_its_folder_is_refused(models, tmp_path):
    other = copied(models(sharded=(1,))[1], tmp_path / "other")
    index = json.loads((other / soup.INDEX).read_text())
    (name, file), *_ = index["weight_map"].items()
    for content, message in [
        ({"weight_map": {name: "../x.safetensors"}}, "no file of this folder"),
        ({"weight_map": index["weight_map"] | {"model.more": file}}, "has no tensor model.more"),
        ({}, "no weight_map"),
        ([], "no JSON object"),
    ]:
        (other / soup.INDEX).write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            soup.soup([models()[0], other], [0.5, 0.5], tmp_path / "soup")
