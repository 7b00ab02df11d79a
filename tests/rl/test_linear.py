"""Linear layers that multiply by oneDNN: their products, their gradients, and where torch's own are left alone."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from salsa.rl import linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def layers(inputs, outputs, bias=False):
    """A layer of torch, and the same layer by oneDNN."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    other = copy.deepcopy(layer)
    other.__class__ = linear.Linear
    return layer, other


def naive_product(rows, weight):
    """rows · weightᵀ and, of the sum of its squares, the gradients of both, by loops in float64."""
    product = [[sum(a * b for a, b in zip(row, w, strict=True)) for w in weight] for row in rows]
    of_rows = [
        [sum(2 * out * w[i] for out, w in zip(line, weight, strict=True)) for i in range(len(weight[0]))]
        for line in product
    ]
    of_weight = [
        [sum(2 * line[o] * row[i] for line, row in zip(product, rows, strict=True)) for i in range(len(rows[0]))]
        for o in range(len(weight))
    ]
    return [torch.tensor(x, dtype=torch.float32) for x in (product, of_rows, of_weight)]


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (1, 1, 3)])
def test_products_and_gradients_are_those_of_the_definition(shape):
    _, layer = layers(3, 4)
    inputs = torch.randn(shape, requires_grad=True)
    product = layer(inputs)
    product.square().sum().backward()
    expected = naive_product(inputs.detach().reshape(-1, 3).tolist(), layer.weight.tolist())
    for mine, theirs in zip((product, inputs.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(mine.detach().reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-6)


def test_inputs_that_are_views_give_what_torch_gives():
    torchs, ours = layers(24, 40)
    inputs = torch.randn(24, 6, 7).permute(2, 1, 0)  # (7, 6, 24), not contiguous
    results = []
    for layer in (torchs, ours):
        given = inputs.clone().requires_grad_()
        layer(given.transpose(0, 1))[:, 2:].tanh().sum().backward()
        results.append((given.grad, layer.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_computed_where_they_are_asked_for():
    _, layer = layers(3, 4)
    inputs = torch.randn(5, 3)
    layer(inputs).sum().backward()
    assert inputs.grad is None and layer.weight.grad is not None
    layer.requires_grad_(False).weight.grad = None
    inputs.requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad is not None and layer.weight.grad is None
    assert not layer(inputs.detach()).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(inputs), layer(inputs.detach())) and not layer(inputs).requires_grad


def test_torch_multiplies_other_types_and_biases(monkeypatch):
    def refuse(*_):
        raise AssertionError("multiplied by oneDNN")

    monkeypatch.setattr(linear, "product", refuse)
    for torchs, ours in (layers(3, 4, bias=True), [layer.double() for layer in layers(3, 4)]):
        inputs = torch.randn(5, 3, dtype=torchs.weight.dtype)
        assert torch.equal(ours(inputs), torchs(inputs))
    torchs, ours = layers(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(torch.ones(5, 3)), torchs(torch.ones(5, 3)))
    with pytest.raises(AssertionError):
        ours(torch.ones(5, 3))


@pytest.mark.parametrize("worthwhile", [True, False])
def test_the_layers_of_a_trunk_are_accelerated_where_it_is_worthwhile(monkeypatch, worthwhile):
    monkeypatch.setattr(linear, "worthwhile", lambda: worthwhile)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=1,
        )
    )
    tokens = torch.arange(12).reshape(2, 6)
    before, names = model(input_ids=tokens).logits, list(model.state_dict())
    assert linear.accelerate(model) is model
    assert {type(m) for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)} == {
        linear.Linear if worthwhile else torch.nn.Linear
    }
    assert type(model.lm_head) is torch.nn.Linear and list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("vendor", "capability", "expected"), [
    ("AuthenticAMD", "AVX512", True),
    ("AuthenticAMD", "AVX2", False),
    ("GenuineIntel", "AVX512", False),
    (None, "AVX512", False),
])  # fmt: skip
def test_it_is_worthwhile_with_avx512_of_another_vendor_than_intel(monkeypatch, tmp_path, vendor, capability, expected):
    if vendor:
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(linear, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear.worthwhile.__wrapped__() is expected
