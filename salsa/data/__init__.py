"""Data: worlds to learn from, benchmarks to be asked, and the one conversational form that all stages read.

A kind of either is one file, in `worlds/` or `benchmarks/`, with a record that describes it; all other code iterates
the records. This module imports nothing heavy: the planner asks it which local files a run reads, and whether they are
sound. Left out: how text becomes tokens (chat.py), and the sources that are read (sources.py).
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from salsa.workflow import registry, schema


def _nothing(settings):
    return {}


@schema.dataclass()
class TaskSettings(schema.Kind):
    """What SFT, the reward model, training and evaluation prompts are made from: the settings of every kind of world.

    Sizes are upper limits for data that are read.
    """

    kind: str
    """The world that all of it comes from."""
    seed: schema.Seed = 0
    """Seed of what is generated, and of what is taken for which purpose."""
    demonstrations: schema.Count = 0
    """Demonstrations for SFT."""
    validation: schema.Count = 0
    """Demonstrations that measure SFT's loss."""
    preferences: schema.Count = 0
    """Prompts (sampled preferences) or pairs (given preferences) for the reward model."""
    prompts: schema.Count = 0
    """Prompts to train policies on."""
    evaluation: schema.Count = 0
    """Development prompts on which KL and rewards of final policies are reported."""


@schema.dataclass()
class BenchmarkSettings(schema.Kind):
    """What policies are compared on: the settings of every kind of benchmark."""

    kind: str
    """The kind of prompts."""
    prompts: schema.Count = 0
    """Largest number of prompts; 0: all."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What the stages learn from where `data.task.kind` is `kind`.

    Attributes:
        words: what a model was trained on, for its card.
        preferences: "sampled", labelled by gold, or "given" with the data.
        prepare: (config.Task, folder) -> (split of `prepare.FILES` -> rows, counts), for the stage of that name. It
            writes what `gold` reads into the folder.
        gold: that folder -> the world's `gold.Gold`; None where there is no gold.
        corpus: config.Corpus -> `Corpus`, to pretrain on; None where there is none.
        exact: whether sizes are exact, because rows are generated; else they are upper limits, and 0 takes all.
        fixed_splits: whether the task's seed and sizes move no row to another split, and benchmarks ask what no split
            of it holds. An SFT variant may then have another seed, and more demonstrations.
        settings: a schema of its own settings beside those of every task, or None.
        licence: the licence of its text, where that is the project's own.
        published: whether prompts may be published with a study, which other people's text may not.
        local_files: config.Task or Corpus -> (setting's name -> path) of the local files that are read.
        check: config.Task -> None; UserError of one line for anything that would fail later.
        sizes: config.Task -> (split -> number of its rows); None where only the hub knows.
    """

    kind: str
    words: str
    preferences: str
    prepare: Callable
    gold: Callable | None = None
    corpus: Callable | None = None
    exact: bool = False
    fixed_splits: bool = False
    settings: type | None = None
    licence: str | None = None
    published: bool = True
    local_files: Callable = _nothing
    check: Callable = _nothing
    sizes: Callable = lambda task: None


class Corpus(NamedTuple):
    """Text to pretrain on: documents, counts, and all words where there are few enough for a vocabulary of words."""

    texts: list
    counts: dict
    words: list | None = None


class Questions(NamedTuple):
    """The rows of a benchmark, before those that training sees are dropped.

    Attributes:
        rows: {"id", "turns", "category", "reference"}, where `turns` are the user's messages, answered one after the
            other, and `reference` is a list of answers to them or None.
        read: number of rows read.
        dropped: reason -> number of rows dropped.
        facts: other facts worth recording, such as the hub's commit.
    """

    rows: list
    read: int
    dropped: dict = types.MappingProxyType({})
    facts: dict = types.MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Prompts that no training sees, where a benchmark's `kind` is this.

    Attributes:
        questions: (config.Benchmark, config.Task) -> `Questions`.
        worlds: kinds of World with which it can be used; none: all.
        exact: whether its number of prompts is exact, because they are generated; else an upper limit, and 0 takes all.
        settings: a schema of its own settings beside those of every benchmark, or None.
        turns: config.Benchmark -> the number of turns of each prompt; None where only the hub knows.
        local_files, check: as those of World, for a config.Benchmark.
        compared: whether judges compare policies on it. A benchmark that is not compared is only scored, without gold.
        score: (responses, row) -> (measure -> number), such as {"exact": 1.0}, for the texts of a policy's answers, one
            per turn, to a row of `questions`. Tables show the mean.
    """

    kind: str
    questions: Callable
    worlds: tuple = ()
    exact: bool = False
    settings: type | None = None
    turns: Callable = lambda benchmark: 1
    local_files: Callable = _nothing
    check: Callable = _nothing
    compared: bool = True
    score: Callable | None = None

    def __post_init__(self):
        if not self.compared and self.score is None:
            raise ValueError(f"benchmark {self.kind}: neither compared nor scored, so that nothing would be said of it")


@functools.cache
def world_kinds():
    """Kind -> World."""
    return registry.records("salsa.data.worlds", "WORLD")


@functools.cache
def benchmark_kinds(world=None):
    """Kind -> Benchmark; with a kind of World, only those that can be used with it."""
    records = registry.records("salsa.data.benchmarks", "BENCHMARK")
    return {kind: rec for kind, rec in records.items() if world is None or not rec.worlds or world in rec.worlds}


@functools.cache
def task_settings():
    """The schema of a task of any kind of world, `config.Task`."""
    return schema.of_kinds("Task", TaskSettings, world_kinds())


@functools.cache
def benchmark_settings():
    """The schema of a benchmark of any kind, `config.Benchmark`."""
    return schema.of_kinds("Benchmark", BenchmarkSettings, benchmark_kinds())


def record(settings):
    """The World or Benchmark of the kind of a config.Task, Corpus or Benchmark; None for a corpus of kind "none"."""
    return (benchmark_kinds() if isinstance(settings, BenchmarkSettings) else world_kinds()).get(settings.kind)
