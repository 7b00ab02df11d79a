"""Training that left the finite numbers: said in one line, with the batch it happened at, and never saved as a result.

Beside a run's log then lie `diverged.safetensors` (the batch, as the network was given it, and what was computed of
it) and `diverged.json` (what was not finite, at which step or iteration, in which phase). Both are removed when the run
is started again; neither is part of a result.
"""

import torch
from safetensors.torch import save_file

from salsa.workflow import runs

FACTS, BATCH = "diverged.json", "diverged.safetensors"


def stop(output, message, facts, tensors, writes=True):
    """Keep a batch, and raise UserError. Called by every process, of which one writes.

    Args:
        output: the run's folder.
        message: what is not finite, where, and what to do.
        facts: more of it, as JSON.
        tensors: name -> tensor.
    """
    if writes:
        output.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(kept, output / BATCH)
        runs.write_json(output / FACTS, {"message": message, **facts})
    raise runs.UserError(f"{message} (the batch: {output / BATCH})")


class NotFinite(Exception):
    """Numbers that are not finite, with the tensors that they were computed of; whoever knows the stage says `stop`."""

    def __init__(self, what, tensors):
        super().__init__(what)
        self.tensors = tensors


def forget(output):
    """Remove what an earlier start of the run kept."""
    for name in (FACTS, BATCH):
        (output / name).unlink(missing_ok=True)


def first(named):
    """`name is nan` (or inf) of the first of some tensors with a value that is not finite; None where there is none."""
    for name, tensor in named.items():
        wrong = tensor[~torch.isfinite(tensor)]
        if wrong.numel():
            return f"{name} is {wrong[0].item()}"
    return None


@torch.no_grad()
def finite_weights(module):
    """Whether all the weights of a module that this process holds are finite."""
    held = (p.to_local() if hasattr(p, "to_local") else p for p in module.parameters())
    return all(bool(torch.isfinite(tensor).all()) for tensor in held)


def anywhere(accelerator, flag):
    """Which of the processes say yes to a question that is put to all of them, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return [0] if flag else []
    said = accelerator.gather(torch.tensor([float(flag)], device=accelerator.device))
    return said.nonzero().flatten().tolist()
