"""The command line of a stage, so that each runs alone (`python -m salsa.sft --help`) as the workflow runs it."""

import argparse
import contextlib
import functools
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

from salsa.workflow import config, failures, gpus, interrupts, messages, runs, schema, surroundings
from salsa.workflow import plan as planning
from salsa.workflow.bounds import printable
from salsa.workflow.messages import UserError


def main(stage, function, version, description=None, argv=None):
    """Run a stage as its command line asks: by the plan that the driver wrote, or by hand.

    `--plan FILE --run STAGE/NAME` runs one run of a plan. By hand, `--settings FILE` (JSON of the stage's settings),
    `--parent ROLE=FOLDER` and `--output FOLDER` say the same without a workflow.

    Args:
        stage: the stages.Stage.
        function, version: as `runs.execute` takes them.
    """
    parser = _parser(stage, description)
    arguments = parser.parse_args(argv)
    runs.print_anything()
    interrupts.raise_told()
    gpus.keep()
    gc.freeze()  # what is imported stays: it need not be looked at again, nor at the end, for a second
    gc.enable()
    surroundings.clean()
    surroundings.warn()
    try:
        _check(parser, arguments)
        execute = _planned if arguments.plan else _by_hand
        execute(stage, function, version, arguments)
    except interrupts.Told as told:
        if told.number == signal.SIGINT:  # a person is there to read it
            _end_bars()
            print(interrupts.INTERRUPTED, file=sys.stderr)
        raise
    except Exception as error:
        line = _line(error, arguments)
        if line is None:
            raise
        if surroundings.world()[1]:
            time.sleep(5)  # within which the launcher ends this process, where the first one says the same
        _end_bars()
        sys.exit(f"{parser.prog}: {printable(line)}")


def _parser(stage, description):
    settings, roles = stage.settings.__name__, ", ".join(stage.roles) or "none"
    epilog = f"settings: {settings} of salsa.workflow.config; parents: {roles}"
    parser = argparse.ArgumentParser(prog=f"python -m {stage.module}", description=description, epilog=epilog)
    parser.add_argument("--plan", help="a plan file that `salsa plan` or the workflow wrote")
    parser.add_argument("--run", help="with --plan: the run's folder below the plan's results, STAGE/NAME")
    parser.add_argument("--settings", help="JSON file of the stage's settings (- for standard input)")
    parser.add_argument("--execution", help="JSON file of execution settings", default=None)
    parser.add_argument("--parent", action="append", default=[], metavar="ROLE=FOLDER")
    parser.add_argument("--output", help="the folder to write")
    return parser


def _check(parser, arguments):
    if arguments.plan and not arguments.run:
        parser.error("--plan needs --run")
    if not arguments.plan and not (arguments.settings and arguments.output):
        parser.error("give --plan and --run, or --settings and --output")


def _planned(stage, function, version, arguments):
    plan = planning.load(arguments.plan, arguments.run)
    run = plan.runs.get(arguments.run)
    if run is None or run.stage != stage.name:
        raise UserError(f"{arguments.plan}: no run {arguments.run!r} of the stage {stage.name}")
    if run.overrides is not None:
        function = functools.partial(function, overrides=run.overrides)
    results = Path(plan.results)
    arguments.output = results / arguments.run
    if run.execution.get("trackers"):
        _name(plan, arguments.run)
    runs.execute(
        stage.name,
        version,
        function,
        _checked(stage.settings, run.settings, arguments.plan),
        {role: results / path for role, path in run.parents.items()},
        arguments.output,
        _checked(config.Execution, run.execution, arguments.plan),
        expected=run.address,
        writes=stage.writes,
        may_write=stage.may_write,
    )
    _link(plan, arguments.run)


def _name(plan, path):
    """Say in the environment what people call a run, and link what trackers write of it by that name.

    The link lies at trackers/STUDY/NAME below the results, so that TensorBoard shows a study's runs by their names.
    """
    from salsa.workflow import progress  # which other stages have no need of

    name = progress.names(plan)[path].replace("/", "+")  # of arms that share the run
    readers = [study["name"] for study in plan.studies if path in plan.needed([study["path"]]).runs]
    os.environ |= {runs.RUN_NAME: name, runs.STUDY_NAME: "+".join(dict.fromkeys(readers))}
    if surroundings.world()[1]:
        return
    for study in dict.fromkeys(readers):
        link = Path(plan.results) / runs.TRACKERS / study / name
        target = os.path.relpath(Path(plan.results) / path / runs.TRACKERS / name, link.parent)
        with contextlib.suppress(OSError):  # a file system without links, or another job's link
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink() and os.readlink(link) != target:
                link.unlink()
            link.symlink_to(target, target_is_directory=True)


def _link(plan, path):
    """Link the name of a study to its look that has just been finished, so that it is there while the study goes on."""
    from salsa.workflow import studies  # which the other stages have no need of

    for study in plan.studies:
        if path in study["looks"]:
            studies.link(plan, study)


def _by_hand(stage, function, version, arguments):
    settings, execution = _given(arguments.settings), _given(arguments.execution or "{}")
    runs.execute(
        stage.name,
        version,
        function,
        _checked(stage.settings, settings, arguments.settings),
        _given_parents(arguments.parent),
        arguments.output,
        _checked(config.Execution, execution, arguments.execution),
        writes=stage.writes,
        may_write=stage.may_write,
    )


def _line(error, arguments):
    """One line on an error that the user or the machine is to blame for; None for a bug."""
    line = str(error) if isinstance(error, UserError) else failures.describe(error, arguments.output)
    if line is None and not arguments.plan and isinstance(error, ValueError | FileNotFoundError):
        return str(error)  # what was given by hand
    return line


def _end_bars():
    """End the line of each progress bar that is open, or what is said next would stand after it."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _given(text):
    """The JSON object in a file, on standard input (-), or in the text itself, which then begins with a brace."""
    if text.startswith("{"):
        value = json.loads(text)
    elif text == "-":
        value = json.load(sys.stdin)
    else:
        value = runs.read_json(text)
    if not isinstance(value, dict):
        raise UserError(f"{text}: not a JSON object of settings, but {type(value).__name__}")
    return value


def _checked(cls, values, where):
    """The settings `cls` of a dictionary. UserError, which names the key and `where` it stands, for any other."""
    try:
        return schema.from_dict(cls, values)
    except messages.SettingError as error:
        raise UserError(f"{error} ({where})" if where and len(where) < 200 else str(error)) from None


def _given_parents(pairs):
    """Role -> folder of ROLE=FOLDER texts."""
    parents = {}
    for pair in pairs:
        role, sign, folder = pair.partition("=")
        if not (role and sign and folder):
            raise UserError(f"--parent {pair}: write ROLE=FOLDER")
        if role in parents:
            raise UserError(f"--parent {pair}: {role} is given twice")
        parents[role] = folder
    return parents
