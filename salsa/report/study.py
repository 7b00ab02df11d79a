"""Everything that a person reads of a study: report.html, tables/, figures/, cards/, runs.csv and texts in Markdown.

This module reads finished runs and says what they were; what is computed from them and drawn is in `sections`, what is
concluded in `claims`, and what readers see of it in `pages`. Nothing is trained, answered or judged here.
"""

import csv
import functools
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from salsa import algorithms
from salsa.evaluate import statistics
from salsa.report import cards, formats, looks, pages, prompts, provenance, sections, style, words
from salsa.report.frames import Frames
from salsa.workflow import config, policies, runs, schema, stages
from salsa.workflow.messages import UserError

VERSION = 8
WHOLE = ("replicate", "training_seed", "seed")  # columns of runs.csv that hold whole numbers, or nothing


@dataclass
class Policy:
    """One training run and its evaluation."""

    arm: str
    alpha: float | None  # place of the reference on the line of the first two SFT models; None: not on it
    kl_coef: float
    replicate: int
    name: str
    index: int
    baselines: dict[str, str]  # sft0, and the arm of the plain anchor -> name of that model in the verdicts
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    responses: list[dict[str, Any]]
    gold: dict[int, float] = field(default_factory=dict)  # iteration -> mean gold of its kept rollouts
    geometry: dict[str, float | None] = field(default_factory=dict)  # where its weights lie: `evaluate.geometry`
    plane: list[dict[str, Any]] = field(default_factory=list)  # rows of plane.csv; none where it spans no plane
    seed: int = 0  # of training, among those of its replicate
    samples: list[dict[str, Any]] = field(default_factory=list)  # rows of samples.jsonl, where the best of n is chosen


@dataclass
class Landscape:
    """The SFT models of a replicate before training."""

    line: list[dict[str, float | None]]
    gates: dict[str, Any]
    responses: list[dict[str, Any]]


@dataclass
class Study:
    """All that the report is made from, read once."""

    config: config.Config
    policies: list[Policy]
    landscapes: dict[int, Landscape]
    reward_models: dict[int, dict[str, Any]]
    verdicts: dict[tuple[str, str, str, str], list[dict]]  # judge, benchmark, model_a, model_b -> lines
    runs: list[dict[str, Any]]
    parents: dict[str, Path] = field(default_factory=dict)  # role (see `read`) -> the run's folder
    overrides: list[str] | None = None  # of the command that planned it; None: not known, for it was made by hand
    known_scores: dict[tuple, dict] = field(default_factory=dict, init=False, repr=False)  # of `training_scores`
    known_means: dict[tuple, dict] = field(default_factory=dict, init=False, repr=False)  # of `scores`
    known_qualities: dict[tuple, Any] = field(default_factory=dict, init=False, repr=False)  # `judging.quality`
    known_tests: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # `claims.tests`

    @functools.cached_property
    def composed(self):
        """The study's arms, those of its alphas among them."""
        return policies.Composed(self.config, policies.expanded_arms(self.config))

    @functools.cached_property
    def frames(self):
        """The study as data frames, each built once."""
        return Frames(self)

    @functools.cached_property
    def registration(self):
        """In which files the study was registered, and whether before its first run: a `provenance.Registration`."""
        return provenance.registration(self)

    @property
    def replicates(self):
        return sorted({policy.replicate for policy in self.policies})

    @functools.cached_property
    def plain_arms(self):
        """Arm -> the arm of its plain anchor: sft0 is start and reference, the algorithm is the same. None: no such."""
        present = {policy.arm for policy in self.policies}
        return {arm: plain for arm, plain in policies.plain_arms(self.composed).items() if plain in present}

    def plain_of(self, arm):
        """The arm of an arm's plain anchor, or None."""
        return self.plain_arms.get(arm)

    @property
    def plain(self):
        """The first arm that is a plain anchor, by a penalty; None: there is none."""
        return next((arm for arm in self.arms if self.plain_of(arm) == arm and self.penalised(arm)), None)

    def penalised(self, arm):
        """Whether an arm's policies are anchored: otherwise neither a kl_coef nor a reference counts."""
        return algorithms.kinds()[policies.algorithm_of(self.composed.arms[arm])].penalised

    def landscape(self, replicate):
        """A replicate's landscape; an empty one where the study has a single SFT model."""
        return self.landscapes.get(replicate, Landscape([], {}, []))

    @property
    def kl_coefs(self):
        """The kl_coefs of the policies, in the configuration's order; a figure of one kl_coef shows the first."""
        present = {policy.kl_coef for policy in self.policies}
        configured = [value for value in self.config.kl_coefs if value in present]
        return configured + sorted(present - set(configured))

    @property
    def arms(self):
        """Arms in the configuration's order, then the alphas that are no arm, by alpha."""
        alphas = {policy.arm: policy.alpha for policy in self.policies}  # in the configuration's order
        configured = [arm for arm in alphas if arm in self.config.arms]
        return configured + sorted(alphas.keys() - configured, key=lambda arm: (alphas[arm] is None, alphas[arm], arm))

    @property
    def ordered(self):
        """The policies by arm, then kl_coef, in the study's orders."""
        arms, kl_coefs = self.arms, self.kl_coefs
        return sorted(self.policies, key=lambda p: (arms.index(p.arm), kl_coefs.index(p.kl_coef)))

    def groups(self, kl_coefs=None):
        """(arm, kl_coef) -> its replicates' policies, in the study's order of arms, for these kl_coefs or all."""
        groups = {(arm, k): self.of(arm=arm, kl_coef=k) for arm in self.arms for k in kl_coefs or self.kl_coefs}
        return {key: policies for key, policies in groups.items() if policies}

    @functools.cached_property
    def benchmarks(self):
        present = dict.fromkeys(row["benchmark"] for policy in self.policies for row in policy.responses)
        return [name for name in self.config.benchmarks if name in present]

    @functools.cached_property
    def compared(self):
        """The benchmarks on which judges compare policies; others are scored alone."""
        alone = {
            row["benchmark"] for policy in self.policies for row in policy.responses if not row.get("compared", True)
        }
        return [name for name in self.benchmarks if name not in alone]

    def of(self, **fields):
        """The policies whose fields have these values."""
        return [p for p in self.policies if all(getattr(p, name) == value for name, value in fields.items())]

    def lines(self, judge, benchmark, candidate, baseline):
        """The verdicts on two models, whichever of them they call model_a."""
        verdicts = self.verdicts
        one, other = (judge, benchmark, candidate, baseline), (judge, benchmark, baseline, candidate)
        return verdicts.get(one, []) + verdicts.get(other, [])

    def training_scores(self, judge, benchmark, candidate, baseline):
        """(replicate, training seed) -> prompt's id -> the candidate's score in [0, 1]; computed once and kept.

        A prompt's score is the mean over its samples, turns and orders.
        """
        key = (judge, benchmark, candidate, baseline)
        if key not in self.known_scores:
            scores = defaultdict(dict)
            battles, _ = statistics.battles(self.lines(*key), candidate, baseline)
            for (_, prompt), trainings in battles.items():
                for training, values in trainings.items():
                    scores[training][prompt] = statistics.mean(values)
            self.known_scores[key] = dict(scores)
        return self.known_scores[key]

    def scores(self, judge, benchmark, candidate, baseline):
        """replicate -> prompt's id -> the candidate's score, the mean over training seeds; computed once and kept."""
        key = (judge, benchmark, candidate, baseline)
        if key not in self.known_means:
            values = defaultdict(lambda: defaultdict(list))
            for (replicate, _), by_prompt in self.training_scores(*key).items():
                for prompt, score in by_prompt.items():
                    values[replicate][prompt].append(score)
            self.known_means[key] = {
                replicate: {prompt: statistics.mean(scores) for prompt, scores in by_prompt.items()}
                for replicate, by_prompt in values.items()
            }
        return self.known_means[key]


def build(settings, parents, output, execution, overrides=None):
    """The stage: read the parents (roles: see `read`) and write the study's folder.

    `overrides` are those of the command that planned the study, where a plan says so.
    """
    study = read(settings, parents)
    study.overrides = overrides
    tables = sections.tables_of(study)
    formats.write_csv(pd.DataFrame(study.runs).astype(dict.fromkeys(WHOLE, "Int64")), output / "runs.csv")
    drawn = set()
    for name, section in sections.sections_of(study).items():
        if section.table:
            caption = section.captioned(study, tables)
            formats.write(tables[name], section.shown(tables[name]), output / "tables", name, caption)
        figure = section.draw(study, tables) if section.figure else None
        if figure is not None:
            style.save(figure, output / "figures", name)
            drawn.add(name)
    prompts.write(study, output / "tables")
    if study.config.looks:
        runs.write_json(output / stages.DECISION, looks.decision(study, tables["claims"]))
    pages.write(study, tables, output, drawn)
    cards.write(study, tables, output)
    counts = {"policies": len(study.policies), "replicates": len(study.replicates), "runs": len(study.runs)}
    return counts | {"overrides": overrides}


def read(settings, parents):
    """Read what a study consists of.

    Parents: prepare, landscape/r<k>, gates/r<k>, reward_model/r<k> (k a replicate), policy/<i>, respond/<i>,
    judge/<name>/<i> and, for some, plane/<i> (i the `index` of a policy of the settings). Raises `UserError` (one line)
    where the settings are those of another version.
    """
    try:
        study_config = schema.from_dict(config.Config, words.cleaned(settings.config))
    except ValueError as error:
        raise UserError(f"{error}; the study was planned by another version: plan and run it again") from None
    gold = gold_judge(parents["prepare"])
    plain = policies.plain_arms(policies.Composed(study_config, policies.expanded_arms(study_config)))
    verdicts, texts = defaultdict(list), {}
    for role, folder in parents.items():
        if role.startswith("judge/"):
            for row in _compact(runs.read_jsonl(folder / "verdicts.jsonl"), texts):
                verdicts[row["judge"], row["benchmark"], row["model_a"], row["model_b"]].append(row)
    return Study(
        config=study_config,
        policies=[_policy(entry, parents, plain, gold, texts) for entry in settings.policies],
        landscapes={k: _landscape(parents, k, texts) for k, _ in _by_replicate(parents, "landscape")},
        reward_models={k: runs.read_json(f / "evaluation.json") for k, f in _by_replicate(parents, "reward_model")},
        verdicts=dict(verdicts),
        runs=provenance.all_runs(settings.policies, parents),
        parents=parents,
    )


def _compact(value, texts):
    """The same rows with equal texts held once, and `plain`: hundreds of thousands of verdicts have few prompts."""
    if isinstance(value, str):
        if value not in texts:
            texts[value] = words.plain(value)
        return texts[value]
    if isinstance(value, list):
        return [_compact(item, texts) for item in value]
    if isinstance(value, dict):
        return {_compact(name, texts): _compact(item, texts) for name, item in value.items()}
    return value


def gold_judge(prepare):
    """The gold judge of the data, or None where it has none."""
    from salsa.data.gold import load

    return load(prepare)


def _by_replicate(parents, stage):
    roles = {role: role.removeprefix(f"{stage}/r") for role in parents if role.startswith(f"{stage}/r")}
    return sorted((int(replicate), parents[role]) for role, replicate in roles.items())


def _policy(entry, parents, plain, gold, texts):
    policy, respond = parents[f"policy/{entry['index']}"], parents[f"respond/{entry['index']}"]
    return Policy(
        arm=entry["arm"],
        alpha=None if entry["alpha"] is None else float(Fraction(entry["alpha"])),
        kl_coef=entry["kl_coef"],
        replicate=entry["replicate"],
        seed=entry["seed"],
        name=entry["name"],
        index=entry["index"],
        baselines={plain[entry["arm"]] if role == config.PLAIN else role: m for role, m in entry["baselines"].items()},
        metrics=runs.read_jsonl(policy / "metrics.jsonl"),
        samples=_rows(respond / "samples.jsonl"),
        evaluation=runs.read_json(respond / "evaluation.json"),
        responses=_compact(runs.read_jsonl(respond / "responses.jsonl"), texts),
        gold=rollout_gold(_rows(policy / "rollouts.jsonl"), gold),
        geometry=runs.read_json(respond / "geometry.json"),
        plane=_csv(parents[f"plane/{entry['index']}"] / "plane.csv") if f"plane/{entry['index']}" in parents else [],
    )


def _rows(path):
    """The rows of a file that not every run writes; none where it isn't there."""
    return runs.read_jsonl(path) if path.exists() else []


def rollout_gold(rollouts, gold):
    """iteration -> mean gold of its rollouts; iterations without gold map to nan."""
    scores = [float("nan")] * len(rollouts)
    if gold is not None and rollouts:
        scores = gold.score([row["prompt"] for row in rollouts], [row["response"] for row in rollouts])
    by_iteration = defaultdict(list)
    for row, score in zip(rollouts, scores, strict=True):
        by_iteration[row["iteration"]].append(float(score))
    return {iteration: sum(values) / len(values) for iteration, values in sorted(by_iteration.items())}


def _landscape(parents, replicate, texts):
    folder, gates = parents[f"landscape/r{replicate}"], parents[f"gates/r{replicate}"]
    line = sorted(_csv(folder / "line.csv"), key=lambda row: row["alpha"])
    responses = _compact(runs.read_jsonl(folder / "responses.jsonl"), texts)
    return Landscape(line, runs.read_json(gates / "gates.json"), responses)


def _csv(path):
    """The rows of a CSV: every column a number (nan where it is empty) but `kind`."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: text if name == "kind" else _number(text) for name, text in row.items()} for row in rows]


def _number(text):
    return float(Fraction(text)) if "/" in text else float(text) if text not in ("", "None") else float("nan")


if __name__ == "__main__":
    stages.STUDY.command(build, VERSION, __doc__)
