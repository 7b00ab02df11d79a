"""SFT, reward models and DPO that several processes train: `accelerate launch training_script.py CASES.json`.

Each case writes its run into a folder beside the file, named as the case. The tests import `run` to do the same in one
process.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import training_args

from salsa import dpo, reward, sft
from salsa.rl import checkpoints, training
from salsa.workflow import config, runs, schema

STAGES = {
    "sft": (sft.train, config.SftSettings),
    "reward_model": (reward.train, config.RewardModelSettings),
    "dpo": (dpo.train, config.TRAINING["dpo"]),
}


def run(case, parents, output):
    """Train as a case says; with `stop_after`, the last process is told to stop after that many steps."""
    train, settings_class = STAGES[case["stage"]]
    output.mkdir(exist_ok=True)
    settings = schema.from_dict(settings_class, case["settings"])
    execution = schema.from_dict(config.Execution, case["execution"])
    (output / runs.CHECKPOINTS).mkdir(exist_ok=True)
    return train(settings, parents, output, execution)


class StopAfter(checkpoints.StopRequest):
    """A request to stop that comes when it was looked for so often, in the last process alone."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    @property
    def asked(self):
        self.left -= training.world()[1] == training.world()[0] - 1
        return self.left == 0

    @asked.setter
    def asked(self, _):
        pass


class Seen(PartialState):
    """Accelerate shards by FSDP on GPUs alone: of what it looks at, on a CPU."""

    def __init__(self, *arguments, **named):
        known = bool(self._shared_state)
        super().__init__(*arguments, **named)
        if not known:
            self.distributed_type = DistributedType.MULTI_GPU


def main(path):
    asked = json.loads(Path(path).read_text())
    parents = {role: Path(folder) for role, folder in asked["parents"].items()}
    together = PartialState(cpu=True)
    for name, case in asked["cases"].items():
        training_args.PartialState = Seen if name.startswith("fsdp2") else PartialState
        output, request = Path(path).parent / name, checkpoints.StopRequest
        for stop_after in [case["stop_after"], None] if "stop_after" in case else [None]:
            checkpoints.StopRequest = partial(StopAfter, stop_after) if stop_after else request
            try:
                summary = run(case, parents, output)
            except SystemExit:
                pass
            except runs.UserError as error:  # in each of the processes, or the next case would wait for ever
                summary = {"refused": str(error)}
        checkpoints.StopRequest = request
        if together.is_main_process:
            runs.write_json(output / "summary.json", summary)
    together.wait_for_everyone()
    together.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
