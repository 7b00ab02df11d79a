"""Training runs in which several processes take part: `accelerate launch distributed_script.py CASES.json`.

Each case leaves `result.pt` in a folder beside the file: what it is compared by. The tests import this module too, to
run the same cases in one process. Weights are float64 where nothing forbids it, so that what distribution changes,
rounding aside, shows.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from salsa.data import chat
from salsa.rl import models, processes, trainer
from salsa.workflow import config, runs, schema


def exact_norms(model):
    """transformers computes norms in float32, whatever a model is held in: the last digits of float64 would be lost."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = functools.partial(_norm, module)


def _norm(module, hidden):
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)


def run(case, parents, output, stop_after=None, double=True, device="cpu"):
    """Train as a case says; with `stop_after`, the last process is told to stop after that many iterations."""
    settings = schema.from_dict(config.TRAINING[case["kind"]], case["settings"])
    execution = schema.from_dict(config.Execution, case["execution"])
    AcceleratorState._reset_state()  # the precision is a case's
    accelerator = processes.make_accelerator(settings, torch.device(device), execution)
    tokenizer = models.load_tokenizer(models.model_folder(parents["sft0"]))
    participants = trainer.load(settings, parents, tokenizer, accelerator.device, execution)
    if double and settings.mixed_precision == "no":
        frozen = participants.reward_model, participants.sft0, *participants.reference.models
        for model in (participants.policy, *filter(None, [participants.value_model]), *frozen):
            exact_norms(model.double())
    made = trainer.Trainer(settings, participants, tokenizer, accelerator, execution, output)
    sampled, iterate = [], made.iterate

    def watched(*arguments):
        found = iterate(*arguments)
        sampled.append((found[1].tokens, found[1].attention_mask, found[1].response_mask))
        made.stop.asked = accelerator.is_last_process and len(sampled) == stop_after
        return found

    made.iterate = watched
    rows = runs.read_jsonl(parents["prepare"] / "prompts.jsonl")
    made.fit(rows, chat.encode_prompts(tokenizer, [row["prompt"] for row in rows]))
    result = {
        "weights": accelerator.get_state_dict(made.networks),  # gathered by all processes
        "reference": [model.state_dict() for model in made.reference.models],
        "sampled": sampled,
        "metrics": runs.read_jsonl(output / "metrics.jsonl"),
        "resumed_at": made.summary["resumed_at"],
        "units": sum(type(module).__name__.startswith("FSDP") for module in made.networks.modules()),
    }
    return made, result


def main(path):
    """Run the cases of a file; those with `stop_after` are interrupted once."""
    asked = json.loads(Path(path).read_text())
    parents = {role: Path(folder) for role, folder in asked["parents"].items()}
    # DeepSpeed is started on what Accelerate takes for no CPU, and holds float32 at most.
    zero3 = "ACCELERATE_USE_DEEPSPEED" in os.environ
    options = {"double": False, "device": "cuda"} if zero3 else {}
    together = PartialState(backend="gloo") if zero3 else PartialState(cpu=True)
    usual = together.distributed_type
    for name, case in asked["cases"].items():
        output = Path(path).parent / name
        for stop_after in [case["stop_after"], None] if "stop_after" in case else [None]:
            # Accelerate shards by FSDP on GPUs alone: of what it looks at, on a CPU.
            seen = DistributedType.MULTI_GPU if name.startswith("fsdp2") else usual
            PartialState._shared_state["distributed_type"] = seen
            try:
                made, result = run(case, parents, output, stop_after, **options)
            except SystemExit:
                pass
            except runs.UserError as error:  # in each of the processes, or the next case would wait for ever
                made, result = None, {"refused": str(error)}
        if together.is_main_process:
            torch.save(result, output / "result.pt")
        if made:
            made.save()
        together.wait_for_everyone()
    together.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
