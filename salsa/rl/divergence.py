"""Training that diverged to numbers that are not finite: it ends with one line, and is never saved as a result.

The folder of the run then holds `diverged.safetensors` (the batch, as the network got it, and what was computed from
it) and `diverged.json` (what was not finite, at which step or iteration, in which phase). Both are removed when the run
is started again.
"""

import torch
from safetensors.torch import save_file

from salsa.workflow import runs
from salsa.workflow.messages import UserError

FACTS, BATCH = "diverged.json", "diverged.safetensors"


def stop(output, message, facts, tensors, writes=True):
    """Keep a batch (name -> tensor) in the folder of a run, and raise UserError. Called by every process; one writes.

    The message says what is not finite, where, and what to do; `facts` are more of this for diverged.json.
    """
    if writes:
        output.mkdir(parents=True, exist_ok=True)
        given = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        batch = {name: tensor.cpu().contiguous().clone() for name, tensor in given.items()}
        save_file(batch, output / BATCH)
        runs.write_json(output / FACTS, {"message": message, **facts})
    raise UserError(f"{message} (the batch: {output / BATCH})")


class NotFinite(Exception):
    """Numbers that are not finite, with the tensors they were computed from, for a caller that can `stop` the run."""

    def __init__(self, what, tensors):
        super().__init__(what)
        self.tensors = tensors


def forget(output):
    """Remove the batch that an earlier start of the run kept."""
    for name in (FACTS, BATCH):
        (output / name).unlink(missing_ok=True)


def first(named):
    """`name is nan` (or inf) for the first of the named tensors with a value that is not finite; None without one."""
    for name, tensor in named.items():
        values = tensor[~torch.isfinite(tensor)]
        if values.numel():
            return f"{name} is {values[0].item()}"
    return None


@torch.no_grad()
def finite_weights(module):
    """Whether all weights of a module, or the part of them that this process holds, are finite."""
    local = (p.to_local() if hasattr(p, "to_local") else p for p in module.parameters())
    return all(bool(torch.isfinite(tensor).all()) for tensor in local)


def anywhere(accelerator, flag):
    """The ranks of the processes that call this with a true `flag`; every process calls it."""
    if accelerator.num_processes == 1:
        return [0] if flag else []
    flags = accelerator.gather(torch.tensor([float(flag)], device=accelerator.device))
    return flags.nonzero().flatten().tolist()
