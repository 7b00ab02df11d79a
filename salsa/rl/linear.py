"""Linear layers that multiply float32 matrices with all vector instructions of a processor that is not Intel's.

On a CPU torch leaves products of float32 to MKL, which uses AVX-512 on Intel's processors alone, and elsewhere reaches
half of the processor's rate. oneDNN, which comes with torch too, asks what a processor can do, not who made it.
"""

import functools
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

PROCESSOR = Path("/proc/cpuinfo")


@functools.cache
def worthwhile():
    """Whether this machine's processor has AVX-512 and is not Intel's, and torch has oneDNN."""
    described = PROCESSOR.read_text() if PROCESSOR.is_file() else "GenuineIntel"
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available() and "GenuineIntel" not in described


class Linear(torch.nn.Linear):
    """torch's linear layer, whose products of float32 on a CPU are oneDNN's, forward and backward."""

    def forward(self, inputs):
        if self._by_torch(inputs):
            return super().forward(inputs)
        if torch.is_grad_enabled():
            return _Product.apply(inputs, self.weight)
        return product(inputs, self.weight)  # without what `apply` costs at each token that is sampled

    def _by_torch(self, inputs):
        """Whether torch multiplies: other types and devices, biases, and what torch.compile or autocast take over."""
        weight = self.weight
        plain = inputs.dtype == weight.dtype == torch.float32 and inputs.is_cpu and weight.is_cpu
        taken_over = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        return not plain or self.bias is not None or taken_over


class _Product(torch.autograd.Function):
    """inputs (…, I) and weight (O, I) to inputs · weightᵀ (…, O)."""

    @staticmethod
    def forward(context, inputs, weight):
        context.save_for_backward(inputs, weight)
        return product(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        inputs, weight = context.saved_tensors
        of_inputs = of_weight = None
        if context.needs_input_grad[0]:
            of_inputs = product(gradient, weight.t())
        if context.needs_input_grad[1]:
            of_weight = product(gradient.flatten(0, -2).t(), inputs.flatten(0, -2).t())
        return of_inputs, of_weight


def product(inputs, weight):
    """inputs (…, I) · weight (O, I)ᵀ by oneDNN; the operator is the one that torch.compile uses for linear layers."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


def accelerate(model):
    """Let the linear layers of a model's trunk be `Linear` where that is `worthwhile`. Returns the model.

    Its head stays torch's: it gets as many rows as a batch has response tokens, another number each time, and oneDNN
    makes a kernel for each number that it has not seen.
    """
    if worthwhile():
        for module in model.base_model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear
    return model
