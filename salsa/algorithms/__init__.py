"""The ways to train a policy: one file each, with a record of what there is to know of it.

The stage of an algorithm bears its name, and so does its section of the configuration: a new algorithm is a new file,
whose module has a VERSION and a command of its own, and an arm names it (`arms.<name>.algorithm`). Everything else
knows the role `policy` alone, and what `CONTRACT` says of a trained one. This module imports no torch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from salsa.workflow import registry, runs, schema

DEFAULT = "ppo"  # what trains the arms of a study that chooses none, and what names of policies leave out
CONTRACT = (*runs.MODEL, "metrics.jsonl")
"""What every algorithm writes: a model's folder `model/`, and its metrics.

metrics.jsonl has a line per iteration: `iteration` (from 0), and what the algorithm `logs`. It is empty where
nothing is trained. One that samples from its policy adds what figures show of it, `kl_to_sft0` and `kl_to_reference` in
nats per response and, where there are any, `score`, `response_length` and `eos_rate`; it may write rollouts.jsonl, a
line per kept response: `iteration`, `prompt_id`, `prompt`, `response`. A reference that has moved stands in
`reference/`.
"""


def _nothing(*_):
    return None


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A way to train a policy against a reference.

    Attributes:
        kind: its name: that of its file, of its section and of its runs' folder.
        title: its name in texts.
        settings: the schema of its section, a `schema.Training`.
        train: (settings, parents, output, execution) -> summary, the function of its stage. It writes `CONTRACT` to
            the folder `output`, and imports torch when it is called.
        words: (its section) -> how long it trains, in words, for the report.
        resources: resources.Case -> resources.Resources, of a run.
        logs: further column of metrics.jsonl -> (what it means, its unit).
        may_write: names of files and folders beside those of `CONTRACT`, rollouts.jsonl and `reference`.
        processes: whether several processes may share a run.
        remedy: what lowers its memory, as a part of a sentence; for `salsa plan`.
        resumes: whether an interrupted run goes on from a checkpoint, so that a failed job is tried again.
        takes_pairs: whether it learns from preference pairs, and a batch is of them: the data's or, where preferences
            are sampled, those that it draws from sft0 and sft1, which are then among its parents.
        check: (its section, config.Execution) -> None. ValueError of one line for what no run can honour.
        check_arm: (key of an arm that it trains, config.Arm, config.Config) -> None. ValueError likewise.
        penalised: whether it is anchored: without a penalty neither a kl_coef nor a reference counts, an arm has one
            policy, and an arm that names either is refused.
        draws: (its section) -> how many responses are drawn for each answer, of which the one of the highest reward is
            kept. With more than one the policy is more than its `model/`.
        pays_deviations: (its section) -> whether a policy is paid rewards in standard deviations on sft0's samples,
            less kl_coef · KL: then that product has this unit, and says how strong the penalty is.
    """

    kind: str
    title: str
    settings: type
    train: Callable
    words: Callable
    resources: Callable
    logs: dict = field(default_factory=dict)
    may_write: tuple = ()
    processes: bool = False
    resumes: bool = False
    remedy: str = ""
    takes_pairs: bool = False
    check: Callable = _nothing
    check_arm: Callable = _nothing
    penalised: bool = True
    draws: Callable = lambda section: 1
    pays_deviations: Callable = lambda section: False

    def __post_init__(self):
        if not issubclass(self.settings, schema.Training):
            raise ValueError(f"algorithm {self.kind}: its settings are no schema.Training")

    @property
    def module(self):
        """The module of its stage."""
        return f"{__name__}.{self.kind}"

    def command(self, version, description):
        """Run the command line of its file, by which its runs are started."""
        from salsa.workflow import stages  # which imports this module

        stages.ALL[self.kind].command(self.train, version, description)


@functools.cache
def kinds():
    """Kind -> Algorithm."""
    return registry.records(__name__, "ALGORITHM")


def section_of(settings):
    """The settings of an algorithm among those of its stage (`config.TRAINING`)."""
    return next(value for value in vars(settings).values() if isinstance(value, schema.Training))
