"""SLERP and greedy soups: against plain loops over whole tensors in float64, and what mergekit writes."""

import base64
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import move, random_llama, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_soup import FLOATS, assert_same_bits, change_tensor, contents, copied, memory, tensors, write_model
from transformers import AutoModelForCausalLM, LlamaConfig

from salsa import mixes, soup
from salsa.base import ASSETS
from salsa.mixes import greedy, slerp
from salsa.workflow import compose, config, plan, schema
from salsa.workflow.messages import UserError

# Plain implementations.


def plain_slerp(one, other, share):
    """SLERP of two vectors in float64: Shoemake's formula, linear where they are nearly parallel."""
    lengths = [float(vector.norm()) or 1.0 for vector in (one, other)]
    cosine = float((one / lengths[0] * (other / lengths[1])).sum())
    if abs(cosine) > 0.9995:
        return (1 - share) * one + share * other
    angle = math.acos(cosine)
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)


def plain_mix(states, weights, origin=None, step=1.0):
    """WARP's merge of whole models, a tensor at a time, in float64."""
    mixed = {}
    for name, first in states[0].items():
        start = origin[name].double() if origin else torch.zeros(first.shape, dtype=torch.float64)
        merged, total = states[0][name].double() - start, weights[0]
        for state, weight in zip(states[1:], weights[1:], strict=True):
            total += weight
            merged = plain_slerp(merged, state[name].double() - start, weight / total)
        mixed[name] = start + step * merged
    return mixed


def assert_mixed(folder, expected, folders, largest=1):
    """A folder's tensors are `expected` (float64), rounded once to the type of storage.

    Both have rounding of float64, which grows with the square of the largest coefficient.
    """
    found, states = tensors(folder), [tensors(each) for each in folders]
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        exact, size = expected[name], sum(state[name].double().abs() for state in states)
        unit = torch.finfo(tensor.dtype).eps / 2 if tensor.is_floating_point() else 0
        subnormal = 2.0**-25 if tensor.dtype == torch.float16 else 0
        bound = 1.0001 * unit * exact.abs() + subnormal + 1e-14 * largest**2 * size
        assert ((tensor.double() - exact).abs() <= bound).all(), name


def mergekit_models(root, dtype):
    """Two small models whose weights no library's random numbers decide; among them parallel and opposite tensors."""
    shape = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        dtype=str(dtype).removeprefix("torch."),
    )
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(shape).state_dict().items()}
    states, numbers = [{}, {}], random.Random(0)
    for name in sorted(names):
        one, other = (torch.tensor([numbers.random() - 0.4 for _ in range(names[name].numel())]) for _ in range(2))
        if name == "model.layers.0.self_attn.q_proj.weight":
            other = 2 * one + 0.01 * other  # almost parallel: linear
        if name == "model.layers.0.mlp.up_proj.weight":
            other = -one
        if name == "model.layers.1.self_attn.k_proj.weight":
            other = one + 0.2 * other  # at a small angle
        if name == "model.layers.1.input_layernorm.weight":
            one = torch.zeros_like(one)
        for state, values in zip(states, (one, other), strict=True):
            state[name] = values.reshape(names[name]).to(dtype).contiguous()
    folders = [root / "a", root / "b"]
    for folder, state in zip(folders, states, strict=True):
        shape.architectures = ["LlamaForCausalLM"]
        shape.save_pretrained(folder)
        save_file(state, folder / soup.SINGLE, metadata={"format": "pt"})
    return folders


# SLERP: its coefficients, and what is written.


@st.composite
def slerps(draw):
    """(tensors' shapes and dtypes, files, rows of weights, origin, step, piece size, threads, seed)."""
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    kinds = draw(st.lists(st.tuples(shapes, st.sampled_from([*FLOATS, torch.int64])), min_size=1, max_size=4))
    models, origin = draw(st.integers(2, 4)), draw(st.booleans())
    parts = st.lists(st.integers(1, 6), min_size=models, max_size=models)
    rows = draw(st.lists(parts, min_size=1, max_size=3))
    grid = [[str(Fraction(part, sum(row))) for part in row] for row in rows]
    files = draw(st.lists(st.integers(1, len(kinds)), min_size=models + 1, max_size=models + 1))
    step = draw(st.sampled_from([1.0, 0.5, 0.123, 1.5])) if origin else 1.0
    piece, threads, seed = draw(st.sampled_from([1, 3, 8, 64, 2**18])), draw(st.integers(1, 3)), draw(st.integers())
    return kinds, files, grid, origin, step, piece, threads, seed


def state_like(kinds, generator):
    """A model's tensors, of one size, so that differences between models keep their digits."""
    return {
        f"t{i}": torch.randn(shape, generator=generator).to(dtype)
        if dtype.is_floating_point
        else torch.full(shape, 3, dtype=dtype)
        for i, (shape, dtype) in enumerate(kinds)
    }


@settings(max_examples=80, deadline=None)
@given(slerps())
def test_slerp_is_that_of_whole_tensors(drawn):
    kinds, files, grid, from_origin, step, piece, threads, seed = drawn
    generator = torch.Generator().manual_seed(seed % 2**63)
    states = [state_like(kinds, generator) for _ in files]
    origin = states[-1] if from_origin else None
    expected = [plain_mix(states[:-1], [float(Fraction(w)) for w in row], origin, step) for row in grid]
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(soup, "PIECE", piece)
        root, before = Path(root), torch.get_num_threads()
        folders = [write_model(root / str(i), *pair) for i, pair in enumerate(zip(states, files, strict=True))]
        *models, start = folders
        outputs = [root / f"mix{i}" for i in range(len(grid))]
        torch.set_num_threads(threads)
        try:
            slerp.write(models, grid, outputs, start if from_origin else None, step)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        for output, tensors_of_row in zip(outputs, expected, strict=True):
            assert_mixed(output, tensors_of_row, folders, largest=32)  # 1/sin Ω where vectors are almost opposite
            for name, tensor in tensors(output).items():
                assert tensor.is_floating_point() or torch.equal(tensor, states[0][name])


def test_the_result_depends_on_no_threads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    states = [{"a": torch.randn(700, generator=generator), "b": torch.randn(3, 50, generator=generator)} for _ in "123"]
    folders = [write_model(tmp_path / str(i), state, 1) for i, state in enumerate(states)]
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soup, "PIECE", 16)
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                slerp.write(folders[:2], [[0.3, 0.7]], [tmp_path / f"threads{threads}"], folders[2], 0.7)
        finally:
            torch.set_num_threads(before)
    assert_same_bits(tensors(tmp_path / "threads1"), tensors(tmp_path / "threads3"))


def test_right_angles_of_unit_vectors_keep_the_length():
    for weights, count in (([0.5, 0.5], 2), ([1 / 3] * 3, 3), ([0.25] * 4, 4)):
        identity = [[float(i == j) for j in range(count)] for i in range(count)]
        merged, angles = slerp.coefficients(identity, weights)
        assert math.hypot(*merged) == pytest.approx(1)
        assert merged[-1] == pytest.approx(math.sin(math.pi / 2 / count))  # the last one's λ is 1/m
        assert angles == pytest.approx([math.pi / 2] * (count - 1))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("degrees", [3, 60, 90, 150, 177])
def test_the_arc_has_a_constant_speed(share, degrees):
    angle = math.radians(degrees)
    of_one, of_other, measured = slerp.arc(math.cos(angle), share)
    assert measured == pytest.approx(angle)
    at = (of_one + of_other * math.cos(angle), of_other * math.sin(angle))  # of the unit vectors at 0 and `angle`
    assert at == pytest.approx((math.cos(share * angle), math.sin(share * angle)))


@pytest.mark.parametrize("cosine", [0.99951, 1.0, 1 + 1e-12, -0.9996, -1.0])
def test_vectors_without_an_arc_are_mixed_linearly(cosine):
    assert slerp.arc(cosine, 0.25) == (0.75, 0.25, None)


def test_a_model_of_weight_0_takes_no_part():
    products = [[4.0, 1.0, math.nan], [1.0, 9.0, math.nan], [math.nan] * 3]
    with_it, angles = slerp.coefficients([row[:2] for row in products[:2]], [0.4, 0.6])
    assert slerp.coefficients([[9, 0, 1], [0, 7, 0], [1, 0, 4]], [0.6, 0, 0.4])[0][1] == 0
    assert len(angles) == 1 and sum(with_it) > 1  # the arc lies outside the chord


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixes_are_mergekits(tmp_path, method, dtype):
    """mergekit.json: what `mergekit-yaml` 0.1.5 writes of these models, weights 0.7 and 0.3, or `t: 0.3`."""
    folders = mergekit_models(tmp_path, dtype)
    write = {"linear": soup.soups, "slerp": slerp.write}[method]
    write(folders, [["0.7", "0.3"]], [tmp_path / "ours"])
    theirs = json.loads(Path(__file__).with_name("mergekit.json").read_text())[method][str(dtype)[6:]]
    ours = tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    differing = 0
    for name, tensor in ours.items():
        expected = torch.frombuffer(bytearray(base64.b64decode(theirs[name])), dtype=dtype).reshape(tensor.shape)
        size = sum(tensors(folder)[name].double().abs() for folder in folders)
        unit = 2**-7 if dtype == torch.bfloat16 else 0  # at a tie, rounding may go to the other neighbour
        assert ((tensor.double() - expected.double()).abs() <= 3e-7 * size + unit * expected.abs()).all(), name
        differing += int((tensor != expected).sum())
    if dtype == torch.bfloat16 or method == "linear":
        assert differing == 0


def test_task_products_are_those_of_whole_tensors(models_of, tmp_path):
    folders, origin = models_of[:2], models_of[2]
    states, start = [tensors(folder) for folder in folders], tensors(origin)
    for name, products in soup.task_products(folders, origin).items():
        for i, j in ((0, 0), (0, 1), (1, 1)):
            one, other = ((states[k][name].double() - start[name].double()).flatten() for k in (i, j))
            expected = math.fsum((one * other).tolist())
            size = math.fsum((one * other).abs().tolist())
            assert abs(products[i, j].item() - expected) <= 1e-14 * size and products[i, j] == products[j, i]


@pytest.fixture(scope="module")
def models_of(tokenizer, tmp_path_factory):
    """Four models with a tied head; the third is where the others come from."""
    root = tmp_path_factory.mktemp("models")
    made = [move(random_llama(tokenizer, 0), seed, 0.05) for seed in (1, 2)]
    made += [random_llama(tokenizer, 0), move(random_llama(tokenizer, 0), 3, 0.4)]
    return [save_model(model, tokenizer, root / str(i)) for i, model in enumerate(made)]


def test_an_origin_and_a_tied_head(models_of, tmp_path):
    folders, origin = models_of[:2], models_of[2]
    (angles,) = slerp.write(folders, [["1/2", "1/2"]], [tmp_path / "mix"], origin, 0.3)
    expected = plain_mix([tensors(folder) for folder in folders], [0.5, 0.5], tensors(origin), 0.3)
    assert_mixed(tmp_path / "mix", expected, models_of[:3])
    assert all(math.radians(45) < angle < math.radians(135) for angle in angles if angle)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mix")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_a_step_alone_goes_towards_the_model(models_of, tmp_path):
    slerp.write([models_of[0]], [["1"]], [tmp_path / "mix"], models_of[2], 0.25)
    soup.soup([models_of[0], models_of[2]], ["1/4", "3/4"], tmp_path / "soup")
    assert_same_bits(tensors(tmp_path / "mix"), tensors(tmp_path / "soup"))


def test_slerp_refuses_what_is_not_finite(models_of, tmp_path):
    broken = copied(models_of[0], tmp_path / "broken")
    change_tensor(broken, lambda state: state["model.norm.weight"].fill_(math.nan))
    for models, origin in (([models_of[1], broken], None), (models_of[:2], broken)):
        with pytest.raises(UserError, match=r"broken/model.safetensors: tensor model.norm.weight holds NaN") as caught:
            slerp.write(models, [[0.5, 0.5]], [tmp_path / "mix"], origin)
        assert "\n" not in str(caught.value) and contents(tmp_path) == ["broken"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel can't reset the peak")
def test_slerp_takes_the_memory_of_pieces(tmp_path):
    folders, size = [], 2**27
    for name in "abc":  # 128 MiB of zeros, in a file with a hole
        folders.append(write_model(tmp_path / name, {"w": torch.zeros(2**10, dtype=torch.bfloat16)}, 1))
        encoded = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
        with open(folders[-1] / soup.SINGLE, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + size)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    slerp.write(folders[:2], [[0.5, 0.5]], [tmp_path / "mix"], folders[2])
    assert memory("VmHWM") - before < 2**25


# Greedy soups.


def plain_search(candidates, value, higher_is_better):
    """Recipe 1 of the paper, with accuracies: what is taken."""
    accuracy = value if higher_is_better else lambda names: -value(names)
    ranked = sorted(candidates, key=lambda name: (-accuracy({name}), candidates.index(name)))
    ingredients = {ranked[0]}
    for name in ranked[1:]:
        if accuracy(ingredients | {name}) >= accuracy(ingredients):
            ingredients = ingredients | {name}
    return ranked, ingredients


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 5), st.booleans(), st.randoms(use_true_random=False))
def test_the_search_is_the_papers(count, higher_is_better, numbers):
    candidates, values = [f"m{i}" for i in range(count)], {}

    def value(names):
        return values.setdefault(frozenset(names), numbers.randint(0, 6))

    ranked, ingredients = plain_search(candidates, value, higher_is_better)
    steps = greedy.search(candidates, value, higher_is_better)
    assert [step["candidate"] for step in steps] == ranked
    assert {step["candidate"] for step in greedy.taken_in(steps)} == ingredients
    assert greedy.taken_in(steps)[-1]["value"] == value(ingredients)
    for step in steps:
        assert step["alone"] == value([step["candidate"]])
    reached = [step["value"] for step in greedy.taken_in(steps)]
    assert all(later >= earlier if higher_is_better else later <= earlier for earlier, later in pairwise(reached))


def test_what_cannot_be_measured_is_left_out():
    table = {("b",): 3.0, ("c",): 2.0, ("b", "c"): 1.0}
    steps = greedy.search(["a", "b", "c"], lambda names: table.get(tuple(names)), False)
    assert [(step["candidate"], step["accepted"]) for step in steps] == [("c", True), ("b", True), ("a", False)]
    with pytest.raises(UserError, match="no candidate of the greedy soup has a finite measure"):
        greedy.search(["a", "b"], lambda names: None, True)


def test_the_soup_of_those_taken_is_written(models_of, tmp_path):
    candidates = dict(zip("abc", models_of, strict=False))
    table = {"a": 1.0, "b": 3.0, "c": 2.0, "ac": 5.0, "ab": 1.0}
    steps = greedy.write(candidates, tmp_path / "soup", lambda: lambda weights: table["".join(weights)])
    assert [step["candidate"] for step in greedy.taken_in(steps)] == ["a", "b"]
    soup.soup([candidates["a"], candidates["b"]], ["1/2", "1/2"], tmp_path / "plain")
    assert_same_bits(tensors(tmp_path / "soup"), tensors(tmp_path / "plain"))


def test_an_output_that_exists_is_refused_before_anything_is_measured(models_of, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        greedy.write(dict(zip("ab", models_of, strict=False)), tmp_path / "mine", lambda: pytest.fail("measured"))


# Settings.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "mix.weights: they sum to 0, not 1"),
        ({"weights": {"a": "1/2", "b": "1/3"}}, "mix.weights: they sum to 0.833333, not 1"),
        ({"weights": {"a": "1"}}, "mix.weights: one model is no mix"),
        ({"weights": {"a": "3/2", "b": "-1/2"}}, "mix.weights.a=3/2: must lie between 0 and 1"),
        ({"weights": {"a": "half", "b": "1/2"}}, "mix.weights.a=half: no number"),
        ({"weights": {"a": "1"}, "origin": "a"}, "mix.origin=a: has a weight"),
        ({"weights": {"a": "1/2", "b": "1/2"}, "step": 0.5}, "mix.step=0.5: has no origin"),
        ({"weights": {"a": "1"}, "origin": "b", "step": 0.0}, "mix.step=0.0: must be above 0"),
        ({"kind": "greedy", "weights": {"a": "1/4", "b": "3/4"}}, "mix.weights: a greedy soup finds the weights"),
        ({"kind": "greedy", "weights": {"a": "1"}}, "mix.weights: one model is no mix"),
        ({"kind": "greedy", "weights": {"a": "1/2", "b": "1/2"}, "origin": "c"}, "read by kind slerp alone"),
        ({"kind": "greedy", "weights": {"a": "1/2", "b": "1/2"}, "measure": "reward"}, "mix.measure=reward: no such"),
        ({"kind": "greedy", "weights": {"a": "1/2", "b": "1/2"}}, "lengths: a greedy mix is searched for with data"),
        ({"kind": "ties", "weights": {"a": "1/2", "b": "1/2"}}, "mix.kind=ties: no such choice"),
    ],
)
def test_settings_are_refused(values, message):
    with pytest.raises(ValueError) as caught:
        schema.from_dict(config.MixSettings, {"mix": values})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_order_of_weights_changes_nothing():
    there, back = ({"b": "1/4", "a": "3/4"}, {"a": "0.75", "c": "0", "b": "0.25"})
    made = [config.Mix(weights=weights, origin="z") for weights in (there, back)]
    assert [list(mixes.weights_of(mix).items()) for mix in made] == [[("a", Fraction(3, 4)), ("b", Fraction(1, 4))]] * 2
    assert [mixes.roles(mix) for mix in made] == [["a", "b", "z"]] * 2
    assert slerp.words(made[0]) == "SLERP of 3/4 a + 1/4 b, from z"


# Planning.


def planned(*overrides):
    """The runs of the stage mix in the plan of a study whose salsa arm has the mix `m` as its reference."""
    reference = "arms.salsa.reference.weights=m"
    runs = plan.plan(compose.compose([*overrides, reference, "replicates=[0]"])).runs
    return [run for run in runs.values() if run.stage == "mix"]


@pytest.mark.parametrize(
    ("mix", "parents"),
    [
        ("{kind:slerp,weights:{sft0:1/2,sft1:1/2}}", {"sft0", "sft1"}),
        ("{kind:slerp,weights:{sft0:1/2,sft1:1/2},origin:'policy:ppo'}", {"sft0", "sft1", "ingredient0"}),
        ("{kind:greedy,weights:{sft0:1/2,sft1:1/2},measure:gold}", {"sft0", "sft1", "prepare"}),
    ],
)
def test_a_mix_has_the_parents_that_its_stage_reads(mix, parents):
    (run,) = planned(f"+mixes.m={mix}")
    made = schema.from_dict(config.MixSettings, run.settings)
    assert set(run.parents) == parents == {*mixes.roles(made.mix), *(["prepare"] if made.lengths else [])}


def test_gold_where_there_is_none_is_refused_while_planning():
    mix = "+mixes.m={kind:greedy,weights:{sft0:1/2,sft1:1/2},measure:gold}"
    with pytest.raises(UserError, match=r"mixes.m: measures gold, and data=ultra\S* has none"):
        planned("experiment=smollm2_ultra", mix)


@pytest.mark.parametrize(
    "mix", ["{kind:slerp,weights:{sft0:1/2,a:1/2},origin:b}", "{kind:greedy,weights:{sft0:1/3,a:1/3,b:1/3}}"]
)
def test_two_names_of_one_model_are_refused_while_planning(mix):
    (folder,) = (path for path in ASSETS.iterdir() if path.is_dir())
    with pytest.raises(UserError, match=r"mixes\.m: two of a, b, sft0 are one model; name it once"):
        planned(f"+mixes.m={mix}", f"+models.a.path={folder}", f"+models.b.path={folder}")


# The command line.


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_slerp_on_the_command_line(models_of, tmp_path, quiet, capsys):
    a, b, start = map(str, models_of[:3])
    command = [a, b, "--method", "slerp", "--origin", start, "--step", "0.5"]
    outputs = [tmp_path / "one", tmp_path / "two"]
    command += ["--weights", "1/3", "2/3", "--output", str(outputs[0])]
    soup.main([*command, "--weights", "0.5", "0.5", "--output", str(outputs[1])])
    for output, weights in zip(outputs, ([1 / 3, 2 / 3], [0.5, 0.5]), strict=True):
        expected = plain_mix([tensors(Path(a)), tensors(Path(b))], weights, tensors(Path(start)), 0.5)
        assert_mixed(output, expected, models_of[:3])
    assert capsys.readouterr().out.count("linear; angles from ") == 2


def test_greedy_on_the_command_line(models_of, prepare_run, tmp_path, quiet, capsys):
    file, good = prepare_run / "sft_validation.jsonl", models_of[:2]
    command = [*map(str, [*good, models_of[3]]), "--method", "greedy", "--validation", str(file)]
    soup.main([*command, "--output", str(tmp_path / "soup")])
    said = capsys.readouterr().out
    taken = said.splitlines()[-1].partition("average of ")[2].split(", ")
    plain = [str(1 / len(taken) if str(folder) in taken else 0) for folder in (*good, models_of[3])]
    soup.soup([*good, models_of[3]], plain, tmp_path / "plain")
    assert_same_bits(tensors(tmp_path / "soup"), tensors(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "slerp", "--weights", "3/2", "-1/2"], "each must be at least 0"),
        (["--method", "slerp", "--weights", "1/2", "1/3"], "must sum to 1"),
        (["--method", "slerp"], "give --weights"),
        ([], "give --weights"),
        (["--method", "slerp", "--weights", "1/2", "1/2", "--step", "0.5"], "give --origin"),
        (["--method", "slerp", "--weights", "1/2", "1/2", "--origin", "FIRST"], "is one of the models"),
        (["--method", "slerp", "--weights", "1/2", "1/2", "--origin", "x", "--step", "0"], "must be above 0"),
        (["--method", "slerp", "--weights", "1/2", "1/2", "--origin", "x", "--step", "nan"], "must be above 0"),
        (["--weights", "1/2", "1/2", "--origin", "x"], "--origin is read by --method slerp alone"),
        (["--weights", "1/2", "1/2", "--validation", "x"], "--validation is read by --method greedy alone"),
        (["--method", "greedy", "--weights", "1/2", "1/2"], "--weights is read by --method linear and slerp alone"),
        (["--method", "greedy"], "give --validation"),
        (["--method", "greedy", "--validation", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--method", "greedy", "--validation", "x", "--output", "y"], "give one --output"),
    ],
)
def test_the_command_line_refuses(models_of, tmp_path, quiet, more, message):
    more = [str(models_of[0]) if word == "FIRST" else word for word in more]
    with pytest.raises(SystemExit) as caught:
        soup.main([*map(str, models_of[:2]), "--output", str(tmp_path / "mix"), *more])
    assert message in str(caught.value) and "\n" not in str(caught.value) and not contents(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "no key 'messages'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no conversation has an answer"),
    ],
)
def test_conversations_that_are_none_are_refused(models_of, tmp_path, quiet, line, message):
    file = tmp_path / "held_out.jsonl"
    file.write_text(json.dumps(line) + "\n")
    command = [*map(str, models_of[:2]), "--method", "greedy", "--validation", str(file)]
    with pytest.raises(SystemExit) as caught:
        soup.main([*command, "--output", str(tmp_path / "mix")])
    assert message in str(caught.value) and "\n" not in str(caught.value) and contents(tmp_path) == [file.name]


def test_planning_a_mix_needs_no_torch():
    statement = "from salsa import mixes; mixes.kinds(); import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", statement], check=True)
