"""Judges: which of two responses to a prompt is better. One file per kind, with a record; all else reads the records.

This module and the records import nothing heavy: planning asks them. Left out: what is compared with what, and how
verdicts are kept (salsa/evaluate/judge.py and common/ledger.py); what verdicts say (salsa/evaluate/statistics.py).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from salsa import data
from salsa.workflow import registry, schema

FLAWS = ("empty", "off_topic", "truncated", "other_language", "ill_mannered")  # of answers in check_set.jsonl


class Interrupted(Exception):
    """Why a judge can't be asked any more for now; what it judged is kept."""


def _nothing(*_):
    return None


@schema.dataclass()
class Settings(schema.Kind):
    """Who compares two responses: the settings that every kind of judge has."""

    kind: str
    """The kind of judge."""
    tournament: schema.Switch = False
    """Compare every pair of policies at one kl_coef, not only each with sft0 and the plain anchor."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A kind of judge, of which `judges.<name>.kind` names one.

    Attributes:
        open: (settings, parents, output, execution, comparisons) -> the judge of a run, ready to be asked. It has
            `verdicts(comparisons)`, which yields each comparison with a dictionary of `winner` ("model_a", "model_b",
            "tie" or "error") and what else is to be said, in any order, and `finish()`, which returns counts for the
            manifest. `verdicts` raises `Interrupted` where it has to end early. Raises UserError for what it lacks.
        settings: a schema of its own settings, or None.
        fits: data.World -> whether it can judge responses to that world's prompts.
        rank: of the judges of a study, claims are read from the one of the lowest rank.
        is_gold: whether its verdicts are the truth that those of other judges are held to.
        scores_alone: whether it scores each response by itself, and so can't prefer a place.
        by_turn: whether each turn of a conversation is judged by itself.
        most_turns: of a prompt that it can judge; None: any number.
        shown_references: whether it sees the benchmarks' reference answers; its runs have the parents `benchmark/NAME`.
        scorer: whether a reward model of its own is trained for it; its runs have the parent `scorer`.
        loads_model: whether its runs hold a model, and so want a model's memory, threads and GPU.
        takes_long: whether a run may take hours although it holds no model.
        check: (key, config.Judge) -> None; UserError, which begins with the key, for settings that can't be meant.
        check_access: (config.Judge, config.Execution or None) -> None; UserError where it could not be asked now. With
            an execution it is asked one question over the network; None: nothing is sent. Called before the first job
            of a study.
        sees: data.World -> the flaws in check_set.jsonl that it should see; a text says why it can't be held to any.
        folders: config.Judge -> (setting's name -> path) of the local folders that it reads.
    """

    kind: str
    open: Callable
    settings: type | None = None
    fits: Callable = lambda world: True
    rank: int = 10
    is_gold: bool = False
    scores_alone: bool = False
    by_turn: bool = False
    most_turns: int | None = None
    shown_references: bool = False
    scorer: bool = False
    loads_model: bool = False
    takes_long: bool = False
    check: Callable = _nothing
    check_access: Callable = _nothing
    sees: Callable = lambda world: FLAWS
    folders: Callable = lambda judge: {}


@functools.cache
def settings():
    """The schema of a judge of any kind, `config.Judge`."""
    return schema.of_kinds("Judge", Settings, kinds())


@functools.cache
def kinds(world=None):
    """Kind -> Judge; of those that fit a kind of World."""
    records = registry.records(__name__, "JUDGE")
    return {kind: judge for kind, judge in records.items() if world is None or judge.fits(data.world_kinds()[world])}


def find(kind):
    """The Judge of a kind."""
    return kinds()[kind]
