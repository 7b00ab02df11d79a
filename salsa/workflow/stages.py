"""The stages of the pipeline: one record each, which planning, rules, estimates and the stages' commands read.

A stage is a function in a module of its own, which this module names and doesn't import: a record imports no torch.
What the records say is not repeated anywhere: a new stage is a module with a function, a VERSION and a settings class
of `config`, and its record here. Left out: which runs of a stage a study has (plan.py), and what a run does.
"""

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass

from salsa import algorithms, judges, mixes
from salsa.workflow import config, repository, resources, runs
from salsa.workflow.messages import UserError

DECISION = "decision.json"  # of a look of a study: what it decided, and whether the study goes on


def never(settings):
    return False


def always(settings):
    return True


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        module: the module with its function and its VERSION, whose command runs it.
        settings: its settings dataclass.
        roles: what its parents are to it, for the help of its command.
        writes, may_write: what it has written when it is finished, as `runs.execute` takes it.
        resources: resources.Case -> resources.Resources of a run. The default: next to nothing.
        trains_policy: whether an algorithm makes a policy in it: its runs play the role `policy`.
        processes: whether several processes may share a run.
        retried: whether a failed job is tried again on this machine, because it goes on from checkpoints.
        light: settings as a dictionary -> whether a run is one small process, whatever the model.
        light_mb: memory of such a process.
        minutes: a time limit that always suffices; None: the run's `execution.runtime`.
        group: settings as a dictionary -> on a cluster, runs with one name that take seconds are one job; or None.
        printed: whether what a run prints goes to the terminal as well as to its log.
        page: of a stage that makes a report, the file that a person reads first.
    """

    name: str
    module: str
    settings: type
    roles: tuple = ()
    writes: tuple | None = None
    may_write: tuple = ()
    resources: Callable = resources.nothing
    trains_policy: bool = False
    processes: bool = False
    retried: bool = False
    light: Callable = never
    light_mb: int = 2000
    minutes: int | None = None
    group: Callable = lambda settings: None
    printed: bool = False
    page: str | None = None

    @property
    def folder(self):
        """Where its runs lie, below the results."""
        return "studies" if self.page else self.name

    @functools.cached_property
    def version(self):
        """The VERSION in its module's source: to import the module would be to import torch."""
        path = repository.PACKAGE.parent / (self.module.replace(".", "/") + ".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(getattr(name, "id", None) == "VERSION" for name in node.targets):
                return ast.literal_eval(node.value)
        raise UserError(f"{path.relative_to(repository.PACKAGE.parent)}: has no VERSION")

    def command(self, function, version, description=None, argv=None):
        """Run the stage as its command line asks; see `command.main`."""
        from salsa.workflow import command  # which plans, and so imports this module

        command.main(self, function, version, description, argv)


def _data(**fields):
    """A stage that makes data: a small process that holds whole data sets in memory."""
    return Stage(light=always, light_mb=4000, minutes=60, group=lambda settings: "data", **fields)


def _report(**fields):
    return Stage(light=always, minutes=60, **fields)


CORPUS = _data(
    name="corpus",
    module="salsa.data.corpus",
    settings=config.CorpusSettings,
    writes=("corpus.jsonl", "counts.json"),
    may_write=("words.json",),
)
PREPARE = _data(
    name="prepare",
    module="salsa.data.prepare",
    settings=config.PrepareSettings,
    writes=("sft.jsonl", "sft_validation.jsonl", "prompts.jsonl", "evaluation.jsonl", "gold/*", "counts.json"),
    may_write=("preference_prompts.jsonl", "preferences.jsonl"),
)
BENCHMARK = _data(
    name="benchmark",
    module="salsa.data.benchmark",
    settings=config.BenchmarkSettings,
    roles=("prepare",),
    writes=("benchmark.jsonl", "counts.json"),
)
BASE = Stage(
    name="base",
    module="salsa.base",
    settings=config.BaseSettings,
    roles=("corpus", "base"),
    writes=runs.MODEL,
    resources=resources.base,
    retried=True,
)
SFT = Stage(
    name="sft",
    module="salsa.sft",
    settings=config.SftSettings,
    roles=("prepare", "base"),
    writes=(*runs.MODEL, "log_history.json"),
    resources=resources.sft,
    processes=True,
    retried=True,
)
REWARD_MODEL = Stage(
    name="reward_model",
    module="salsa.reward",
    settings=config.RewardModelSettings,
    roles=("prepare", "sft0", "sft1", "reward_model/I"),
    writes=(*runs.MODEL, "evaluation.json", "normalisation.json"),
    resources=resources.reward_model,
    processes=True,
    retried=True,
)
LANDSCAPE = Stage(
    name="landscape",
    module="salsa.evaluate.landscape",
    settings=config.LandscapeSettings,
    roles=("prepare", "reward_model", "sft0", "sft1", "benchmark/NAME"),
    writes=("responses.jsonl", "line.csv"),
    resources=resources.landscape,
)
GATES = Stage(
    name="gates",
    module="salsa.evaluate.gates",
    settings=config.GatesSettings,
    roles=("landscape", "reward_model"),
    writes=("gates.json",),
    light=always,
    group=lambda settings: "gates",
    printed=True,  # they say before hours of training whether the study can show anything
)
POLICIES = [
    Stage(
        name=algorithm.kind,
        module=algorithm.module,
        settings=config.TRAINING[algorithm.kind],
        roles=("prepare", "reward_model", "sft0", "sft1", "…"),
        writes=algorithms.CONTRACT,
        may_write=("rollouts.jsonl", "reference", *algorithm.may_write),
        resources=algorithm.resources,
        trains_policy=True,
        processes=algorithm.processes,
        retried=algorithm.resumes,
    )
    for algorithm in algorithms.kinds().values()
]
MIX = Stage(
    name="mix",
    module="salsa.mix",
    settings=config.MixSettings,
    roles=("the mix's models", "prepare"),
    writes=runs.MODEL,
    may_write=tuple({name: None for mix in mixes.kinds().values() for name in mix.writes}),
    resources=resources.mix,
    retried=True,
)
PLANE = Stage(
    name="plane",
    module="salsa.evaluate.plane",
    settings=config.PlaneSettings,
    roles=("prepare", "reward_model", "sft0", "sft1", "policy"),
    writes=("plane.csv",),
    resources=resources.plane,
)
RESPOND = Stage(
    name="respond",
    module="salsa.evaluate.respond",
    settings=config.RespondSettings,
    roles=("prepare", "reward_model", "policy", "sft0", "…", "benchmark/NAME"),
    writes=("responses.jsonl", "evaluation.jsonl", "evaluation.json", "geometry.json"),
    may_write=("samples.jsonl",),
    resources=resources.respond,
)


def _judge(settings):
    return judges.find(settings["judge"]["kind"])


JUDGE = Stage(
    name="judge",
    module="salsa.evaluate.judge",
    settings=config.JudgeSettings,
    roles=("candidate", "baseline/NAME", "scorer", "benchmark/NAME"),
    writes=("verdicts.jsonl",),
    may_write=("answers.jsonl", "templates"),
    resources=resources.judge,
    light=lambda settings: not _judge(settings).loads_model,
    group=lambda settings: None if _judge(settings).loads_model or _judge(settings).takes_long else "verdicts",
)
STUDY = _report(
    name="study",
    module="salsa.report.study",
    settings=config.StudySettings,
    roles=(
        "prepare",
        "landscape/rK",
        "gates/rK",
        "reward_model/rK",
        "policy/I",
        "respond/I",
        "judge/NAME/I",
        "plane/I",
    ),
    writes=(
        "runs.csv",
        "tables/*.csv",
        "figures/*.png",
        "samples.md",
        "claims.md",
        "report.md",
        "report.html",
        "cards/*",
    ),
    may_write=(DECISION,),
    page="claims.md",
)
COMPARISON = _report(
    name="comparison",
    module="salsa.report.comparison",
    settings=config.ComparisonSettings,
    roles=("study/I",),
    writes=("tables/*.csv", "figures/*.png", "comparison.md"),
    page="comparison.md",
)

# In the order of the pipeline.
ALL = {
    stage.name: stage
    for stage in (
        CORPUS,
        PREPARE,
        BENCHMARK,
        BASE,
        SFT,
        REWARD_MODEL,
        LANDSCAPE,
        GATES,
        *POLICIES,
        MIX,
        PLANE,
        RESPOND,
        JUDGE,
        STUDY,
        COMPARISON,
    )
}
