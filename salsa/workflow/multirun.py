"""`salsa run` as a Hydra application: sweeps, flags, and what a sweeper is told of a study.

Hydra makes the points of a sweep; Snakemake computes them. All points of a batch become one DAG, so that what they
share runs once (the launcher in `hydra_plugins` hands the batch over). What else Hydra offers (`--cfg job`, `--help`,
`--info`, sweepers, folders of a multirun) is Hydra's own.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import open_dict

from salsa.workflow import (
    compose,
    interrupts,
    jobs,
    objectives,
    overriding,
    places,
    plan,
    repository,
    runs,
    studies,
    yaml_files,
)
from salsa.workflow.jobs import snakemake_text
from salsa.workflow.messages import UserError
from salsa.workflow.overriding import CONF

OBJECTIVE = "objective.json"
OPTUNA = "hydra/sweeper=optuna"
SEARCH = "hydra_plugins.salsa_search.SalsaSearch"
SIGNALLED = 128  # exit codes from here on say which signal ended a process


class Refused(CompactHydraException):
    """A mistake of the user, or a point that failed: Hydra shows it without a traceback, and ends with 1."""


def is_hydras(arguments):
    """Whether the arguments of `salsa run` ask for what is Hydra's: its flags, its settings."""
    return any(overriding.OF_HYDRA.match(argument) for argument in arguments)


def check_directory(folder):
    """UserError where Snakemake can't write into the folder that it works in."""
    if not places.usable(folder):
        raise UserError(f"{folder}: Snakemake keeps its records here, and can't write; add: -- --directory FOLDER")


def command(options, *config):
    """The command that runs Snakemake on the workflow: with these options, and with `--config key=value` pairs."""
    started = [sys.executable, "-m", "salsa.workflow.snakemake", "--snakefile", str(repository.ROOT / "Snakefile")]
    if not any(option.split("=")[0] in ("--cores", "-c", "--jobs", "-j") for option in options):
        started += ["--cores", "all"]
    if not any(option.split("=")[0] == "--logger" for option in options):
        started += ["--logger=salsa"]  # of one word, or it would take the targets that follow
    return [*started, *map(_placed, options), *(["--config", *config] if config else [])]


def _placed(option):
    """An option of Snakemake's; a profile of the project's as a path to it, from whatever folder it is named."""
    flag, equals, path = option.rpartition("=")
    own = repository.ROOT / path
    is_own = path.startswith("workflow/profiles/") and own.is_dir() and not Path(path).is_dir()
    return f"{flag}{equals}{own}" if is_own else option


def run(arguments, options):
    """Run Hydra on the arguments of `salsa run`; returns the exit code.

    Args:
        arguments: Hydra's flags and overrides.
        options: Snakemake's, after --.
    """
    if OPTUNA in arguments:
        _check_optuna()
    _check(arguments)
    application = Application(options, arguments)
    code = 0
    # Hydra has no place to hand in a loader of configurations, and reads sys.argv alone.
    with (
        mock.patch("hydra._internal.hydra.ConfigLoaderImpl", Loader),
        yaml_files.checked(),
        mock.patch.object(sys, "argv", ["salsa run", *with_defaults(arguments)]),
    ):
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(application)()
        except SystemExit as stopped:
            code = stopped.code or 0
        except Refused as error:  # where Hydra lets it through, as with --help
            print(error, file=sys.stderr)
            return 1
        except ValueError as error:  # flags of Hydra that exclude each other
            raise UserError(str(error)) from None
    if code < SIGNALLED:
        application.compare_batches()
    return max(code, application.code)


def with_defaults(arguments):
    """The overrides, then those of Hydra's settings that `salsa run` adds where they leave them open, then the flags.

    Hydra's parser takes overrides on one side of the flags alone.
    """
    overrides = [text for text in arguments if text.startswith("~") or ("=" in text and not text.startswith("-"))]
    wanted = {"hydra/launcher": "salsa"}
    if OPTUNA in overrides:  # whose own direction is down, and which one failed point of a batch would stop
        wanted |= {"hydra.sweeper._target_": SEARCH}
        wanted |= {"hydra.sweeper.direction": "maximize", "hydra.sweeper.max_failure_rate": "0.9"}
        if "hydra/sweeper/sampler=grid" not in overrides:
            wanted |= {"hydra.sweeper.sampler.seed": "0"}
    given = {override.split("=")[0] for override in overrides}
    added = [f"{key}={value}" for key, value in wanted.items() if key not in given]
    return [*overrides, *added, *(text for text in arguments if text not in overrides)]


def _check(arguments):
    """UserError for overrides that `compose` would refuse, and for a sweep of too many points."""
    overrides = [text for text in arguments if "=" in text or text.startswith("~")]
    task = [text for text in overrides if not overriding.OF_HYDRA.match(text)]
    overriding.check(task)
    searched = any(text.startswith("hydra/sweeper=") for text in overrides)
    if {"-m", "--multirun"} & set(arguments) and not searched:
        overriding.expand(task)


def _check_optuna():
    if importlib.util.find_spec("optuna") is None:
        raise UserError(f"{OPTUNA}: needs the extra salsa[optuna]; pip install -e '.[optuna]'")


class Loader(ConfigLoaderImpl):
    """Hydra's loader, for overrides of what only the schema knows, too; its errors are one line."""

    def load_configuration(self, config_name, overrides, run_mode, *others, **options):
        try:
            applied = [overriding.applied(override) for override in overrides]
            composed = super().load_configuration(config_name, applied, run_mode, *others, **options)
            _name_overrides(composed.hydra, overrides)
            if config_name and run_mode == RunMode.RUN:  # a multirun's wait for its points
                task = [override for override in overrides if not overriding.OF_HYDRA.match(override)]
                compose.configuration(composed, task)
                with open_dict(composed):
                    compose.fill_entries(composed)
            return composed
        except UserError as error:
            raise Refused(f"salsa: {error}") from None
        except compose.HYDRAS as error:
            raise Refused(f"salsa: {compose.one_line(error, overrides)}") from None


def _name_overrides(settings, overrides):
    """Let Hydra's settings name all overrides but those of Hydra itself, in their order."""
    task = [override for override in overrides if not overriding.OF_HYDRA.match(override)]
    with open_dict(settings):
        settings.overrides.task = task
        parsed = OverridesParser.create().parse_overrides(task)
        settings.job.override_dirname = get_overrides_dirname(parsed, **settings.job.config.override_dirname)


@dataclass
class Outcome:
    """What has become of a point.

    Attributes:
        study: its study's folder; None where the point is no configuration.
        objective: what `objectives.read` returned, or None.
        reason: why there is no objective; None where there is one.
        failed: whether that is a failure.
    """

    study: Path | None = None
    objective: dict | None = None
    reason: str | None = None
    failed: bool = False


class Application:
    """What Hydra calls for a point, and the launcher for a batch of them.

    Attributes:
        given: the arguments that were typed, of which no search has chosen any.
        code: the largest exit code of Snakemake so far.
        searching: whether a sweeper has looked for the best point: then what Snakemake says is in files.
    """

    def __init__(self, options, given=()):
        self.options, self.given, self.searching = list(options), set(given), False
        self.directory = directory(options)
        self.code = 0
        self.batches = []  # of each: the file of its points, and those of them whose studies are finished

    def __call__(self, _):
        """Compute one point, that of Hydra's current job, and return its objective; see `report`."""
        current = HydraConfig.get()
        points = [list(current.overrides.task)]
        (outcome,) = self.compute(points, Path(current.runtime.output_dir) / "points.json", searches(current))
        return report(outcome)

    def compute(self, points, file, searching):
        """The `Outcome` of each point, after one Snakemake on all of them.

        Args:
            points: each a list of overrides that are no sweeps.
            file: where to write the list of points that Snakemake reads.
            searching: whether a sweeper looks for the best point. A point that is no configuration, or whose study
                has no objective, then fails alone; otherwise the former stops everything before anything runs, and
                the latter is no failure.

        Raises:
            Refused: what is wrong with a point.
        """
        file, here = Path(file).absolute(), Path.cwd()
        self.searching = searching
        try:
            check_directory(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)  # as Snakemake does
        except UserError as error:
            raise Refused(f"salsa: {error}") from None
        with contextlib.chdir(self.directory):
            planned = [_plan(point, searching) for point in points]
            if searching or len(points) > 1 or self.batches:
                _check_looks(planned)
            sound = [point for point, (study, _, _) in zip(points, planned, strict=True) if study]
            code = 0
            if sound:
                runs.write_json(file, sound)
                code = self._wait(file, here)
                self.code = max(self.code, code)
            outcomes = [_outcome(*entry, code) for entry in planned]
        done = zip(points, outcomes, strict=True)
        self.batches.append((file, [point for point, outcome in done if outcome.study and _finished(outcome.study)]))
        return outcomes

    def compare_batches(self):
        """Where points came in several batches, of which each was a DAG: compare all that are finished."""
        points = [point for _, batch in self.batches for point in batch]
        if len(self.batches) > 1 and len(points) > 1:
            file = Path(os.path.commonpath([file.parent for file, _ in self.batches])) / "points.json"
            runs.write_json(file, points)
            self.code = max(self.code, self._wait(file, Path.cwd()))

    def _wait(self, file, folder):
        """Run Snakemake on a file of points to its end. What it says of a search's trials stands beside that file."""
        started = command(self.options, f"points={snakemake_text(str(file))}")
        return wait(started, folder, *[log_beside(file)] * self.searching)


def log_beside(file):
    """Where stands what Snakemake says of the points in a file, in a search."""
    return Path(file).with_suffix(".log")


def searches(current):
    """Whether Hydra's sweeper looks for the best point, by its settings: any but the basic one does."""
    return current.mode == RunMode.MULTIRUN and not current.sweeper._target_.endswith(".BasicSweeper")


def _plan(point, searching):
    """A point's plan (of its own study, without companions), the objective to read and why none can be."""
    try:
        composed = compose.compose_points([point])[0]
        planned = plan.plan([composed])
    except UserError as error:
        if not searching:
            raise Refused(f"salsa: {error}") from None
        return None, None, str(error)
    try:
        return planned, objectives.resolve(composed), None
    except UserError as error:
        return None if searching else planned, None, str(error)


def _check_looks(planned):
    """Refuse points whose studies look at their claims as they go: they would be compared at other replicates."""
    if any(study and plan.has_looks(study.studies[0]) for study, _, _ in planned):
        raise Refused(f"salsa: {plan.NOT_COMPARED}")


def _outcome(planned, objective, reason, code):
    """The `Outcome` of what `_plan` returned, when Snakemake has ended with `code`."""
    if planned is None:
        return Outcome(reason=reason, failed=True)
    study = (Path(planned.results) / studies.reached(planned, planned.studies[0])).absolute()
    if not _finished(study):
        lines = list(jobs.failures(planned)) if code else ["Snakemake was not asked to compute it"]
        return Outcome(study, reason=(lines or [f"Snakemake ended with {code} before it"])[0], failed=code != 0)
    if objective is None:
        return Outcome(study, reason=reason)
    try:
        return Outcome(study, objectives.read(study, objective))
    except UserError as error:
        return Outcome(study, reason=str(error))


def _finished(study):
    return (study / runs.MANIFEST).exists()


def report(outcome):
    """Write `objective.json` to the folder of Hydra's current job, and return the objective, or None.

    The file says what the objective is made of and where the study is, or the reason why there is none.

    Raises:
        Refused: the point failed.
    """
    objective = outcome.objective or {"objective": None, "reason": outcome.reason}
    study = str(outcome.study) if outcome.study else None
    runs.write_json(Path(HydraConfig.get().runtime.output_dir) / OBJECTIVE, objective | {"study": study})
    if outcome.failed:
        raise Refused(f"salsa: {outcome.reason}")
    return objective["objective"]


def wait(command, folder, log=None):
    """Run a command in a folder to its end; returns its exit code. `log`: a file for what it prints.

    SIGINT and SIGTERM are handed on as SIGTERM, and this process ends when the command has ended. The command ignores
    SIGINT, which a terminal sends to both.
    """
    process, told = None, []

    def terminate(number, _):
        told.append(number)
        if process:
            process.terminate()

    before = interrupts.handle(terminate)
    try:
        with open(log, "ab") if log else contextlib.nullcontext() as file:
            process = subprocess.Popen(
                command, cwd=folder, preexec_fn=interrupts.ignore_interrupts, stdout=file, stderr=file
            )
        if told:  # before there was a process to tell
            process.terminate()
        process.wait()
    finally:
        interrupts.restore(before)
    if told:
        if process.returncode < 0:  # before it could say so itself
            print(interrupts.INTERRUPTED, file=sys.stderr)
        sys.exit(interrupts.exit_code(told[0]))
    return process.returncode if process.returncode >= 0 else SIGNALLED - process.returncode


def directory(options):
    """The folder that Snakemake works in."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--directory", "-d", default=".")
    return Path(parser.parse_known_args(options)[0].directory).absolute()
