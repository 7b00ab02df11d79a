"""What the runs of a plan need, before anything runs: memory, disk and time, from sizes and counts alone.

Time is operations over a stated throughput. The formulas of each stage are in resources.py. Left out: what a network, a
file system or a judge behind an API adds.
"""

from dataclasses import asdict, dataclass, field

from salsa import algorithms, data, judges
from salsa.evaluate.judge import ORDERS
from salsa.workflow import config, jobs, resources, schema, stages
from salsa.workflow.resources import Resources

REMEDIES = (
    "lower execution.micro_batch, execution.rollout_batch or lengths, train adapters (lora_rank of the stage's "
    "section), or use more GPUs (execution.gpus, processes, accelerate_config)"
)


def of_run(run, runs_):
    """The `Resources` of a plan's run; None where its model's shape is not known. `runs_`: path -> Run of the plan."""
    stage = stages.ALL[run.stage]
    if stage.light(run.settings):
        return Resources()
    model = resources.model_of(run, runs_)
    shape = model and resources.shape(model)
    if shape is None:
        return None
    stored = resources.FLOAT if model["dtype"] == "float32" else 2
    processes, path = run.execution["processes"] if stage.processes else 1, run.execution["accelerate_config"]
    sharded = processes > 1 and path and jobs.distributed_type(path) in jobs.SHARDED
    needed = stage.resources(resources.Case(run, shape, stored, runs_, processes, bool(sharded)))
    needed.processes = processes
    return needed


@dataclass
class StageSurvey:
    """The runs of one stage: how many, and how many are done; what the largest needs; hours of what is left."""

    runs: int = 0
    done: int = 0
    memory: float = 0.0  # bytes of the largest run, all its processes together
    parts: dict[str, float] = field(default_factory=dict)  # of that run
    gpus: int = 0  # of that run
    a_gpu: float = 0.0  # bytes of that run's largest process, which has a GPU to itself
    disk: float = 0.0
    hours: float = 0.0
    gpu_hours: float = 0.0
    unknown: int = 0  # runs of a model whose sizes are not known

    def add(self, run, needed, done):
        """Count a run of the stage; returns the operations that it has still to do. `needed`: None where not known."""
        self.runs, self.done = self.runs + 1, self.done + done
        if needed is None:
            self.unknown, needed = self.unknown + 1, Resources()
        if needed.peak > self.memory:
            self.memory, self.parts, self.gpus = needed.peak, needed.parts, jobs.resource(run, "gpus")
            self.a_gpu = needed.largest if self.gpus else 0.0
        self.disk += needed.disk
        return 0.0 if done else needed.operations


@dataclass
class Survey:
    """What a plan needs.

    Attributes:
        stages: stage -> StageSurvey, in the pipeline's order.
        longest: hours of the path of runs that takes longest, and the paths of these runs.
        timed: whether a throughput was stated: hours mean nothing otherwise.
        questions: about how many questions are still to be asked of judges over a network.
    """

    stages: dict[str, StageSurvey]
    longest: tuple[float, list[str]]
    timed: bool
    questions: int = 0

    def table(self):
        """A rich table with a row a stage."""
        from rich.table import Table

        table = Table()
        names = ["stage", "runs", "done", "to run", "memory a run", "on disk", *["hours"] * self.timed]
        for name in names:
            table.add_column(name, justify="left" if name == "stage" else "right")
        everything = [(name, stage.runs, stage.done, stage) for name, stage in self.stages.items()]
        for name, count, done, stage in everything:
            hours = [_hours(stage.hours)] * self.timed
            table.add_row(
                name, str(count), str(done), str(count - done), _size(stage.memory), _size(stage.disk), *hours
            )
        table.add_section()
        count, done = (sum(row[place] for row in everything) for place in (1, 2))
        hours = [_hours(sum(stage.hours for stage in self.stages.values()))] * self.timed
        largest = max((stage.memory for stage in self.stages.values()), default=0.0)
        disk = sum(stage.disk for stage in self.stages.values())
        table.add_row("all", str(count), str(done), str(count - done), _size(largest), _size(disk), *hours)
        return table

    def lines(self):
        """What the table doesn't say: what the largest run's memory is for, and the longest path."""
        name, stage = max(self.stages.items(), key=lambda item: item[1].memory, default=("", StageSurvey()))
        lines = []
        if stage.memory:
            parts = ", ".join(f"{part} {_size(size)}" for part, size in stage.parts.items())
            lines.append(f"most memory: {name}, {_size(stage.memory)} ({parts}); an estimate, at full lengths")
        if self.timed:
            hours, path = self.longest
            gpu_hours = sum(stage.gpu_hours for stage in self.stages.values())
            lines.append(f"longest path: {_hours(hours)} hours, {len(path)} runs, ending with {path[-1]}")
            lines += [f"GPU-hours: {_hours(gpu_hours)}"] * bool(gpu_hours)
        if self.questions:
            lines.append(f"questions to judges over a network: about {self.questions:,}, without repeated ones")
        unknown = sum(stage.unknown for stage in self.stages.values())
        if unknown:
            lines.append(f"{unknown} runs of a model whose sizes only the hub knows are not counted")
        return lines

    def warnings(self, gpu_memory=None, memory=None):
        """A line for each stage whose largest run can't fit: GiB of a GPU, and of the machine."""
        lines = []
        for name, stage in self.stages.items():
            size, limit, where = stage.memory, memory, "this machine"
            if stage.gpus:
                size, limit, where = stage.a_gpu, gpu_memory, "a GPU"
            if limit is not None and size > limit * 2**30:
                need = f"{name} needs {_size(size)} on {where}, which has {limit:g} GiB"
                lines.append(f"warning: {need}; {_remedies(name)}")
        return lines

    def as_dict(self):
        """The survey as JSON holds it."""
        described = {"stages": {name: asdict(stage) for name, stage in self.stages.items()}}
        described |= {"questions": self.questions} if self.questions else {}
        if not self.timed:
            return described
        return described | {"longest_hours": self.longest[0], "longest_path": self.longest[1]}


def survey(result, finished, tflops=None):
    """The `Survey` of a plan.

    Args:
        result: plan.Plan.
        finished: path -> whether that run is done.
        tflops: throughput of a run, in 10¹² operations a second.
    """
    totals, hours, before = {name: StageSurvey() for name in stages.ALL}, {}, {}
    asked = sum(questions(run, result.runs) for path, run in result.runs.items() if not finished(path))
    for path, run in result.runs.items():
        operations = totals[run.stage].add(run, of_run(run, result.runs), finished(path))
        duration = operations / (tflops * 1e12) / 3600 if tflops else 0.0
        totals[run.stage].hours += duration
        totals[run.stage].gpu_hours += duration * jobs.resource(run, "gpus")
        before[path] = max([*run.parents.values(), *run.after], key=hours.__getitem__, default=None)
        hours[path] = duration + hours.get(before[path], 0.0)
    longest, path = [], max(hours, key=hours.get)
    last = hours[path]
    while path:
        longest.append(path)
        path = before[path]
    used = {name: stage for name, stage in totals.items() if stage.runs}
    return Survey(used, (last, longest[::-1]), tflops is not None, asked)


def questions(run, runs_):
    """About how many questions a run asks over a network: none, unless it is of a judge that may take hours.

    Of each prompt, every sample is compared with every baseline's, in both orders, turn by turn where the judge wants
    it. A file whose number of prompts is not known counts as `resources.PROMPTS`.
    """
    kind = judges.find(run.settings["judge"]["kind"]) if run.stage == "judge" else None
    if kind is None or not kind.takes_long:
        return 0
    candidate = runs_[run.parents["candidate"]]
    benchmarks = [runs_[path].settings for role, path in candidate.parents.items() if role.startswith("benchmark/")]
    compared = sum(_compared(settings["benchmark"], kind) for settings in benchmarks)
    return compared * candidate.settings.get("samples", 1) * len(run.settings["baselines"]) * len(ORDERS)


def _compared(benchmark, judge):
    """How many responses, or turns of them, a judge compares of a benchmark's settings."""
    kind = data.benchmark_kinds()[benchmark["kind"]]
    turns = kind.turns(schema.from_dict(config.Benchmark, benchmark)) or 1
    prompts = benchmark["prompts"] or resources.PROMPTS
    return prompts * (turns if judge.by_turn else 1) * kind.compared


def looks(result, study, finished, tflops=None):
    """Lines on what the looks of a study take, up to each of them; none for a study without looks.

    Args:
        study: the plan's entry of the study; the others as `survey` takes them.
    """
    if len(study["looks"]) < 2:
        return
    for path in study["looks"]:
        part = survey(result.needed([path]), finished, tflops)
        count, done = (sum(getattr(stage, name) for stage in part.stages.values()) for name in ("runs", "done"))
        hours = sum(stage.hours for stage in part.stages.values())
        text = f"up to the look at {len(result.runs[path].settings['config']['replicates'])} replicates: {count} runs"
        text += f", {count - done} to run" + (f" in {_hours(hours)} hours of jobs" if part.timed else "")
        yield text + (", finished" if finished(path) else "")


def _remedies(stage):
    algorithm = algorithms.kinds().get(stage)
    return f"{algorithm.remedy}, {REMEDIES}" if algorithm and algorithm.remedy else REMEDIES


def _size(size):
    """Bytes in words; nothing of none."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}" if size < 1000 * 2**power else f"{size / 2**power:.0f} {unit}"
    return ""


def _hours(hours):
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
