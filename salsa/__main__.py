"""What people type: `salsa plan`, `run`, `verify`, `soup`, `publish`, … (or `python -m salsa …`)."""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from salsa.workflow.bounds import printable
from salsa.workflow.messages import Parser, UserError

try:
    from salsa.workflow import failures, interrupts, jobs, places, runs, stages, surroundings
except UserError as error:  # a file that adds a kind of something has a fault
    sys.exit(f"salsa: {error}")


def main(argv=None):
    """Run one subcommand; a mistake of the user is one line on standard error, and exit code 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    runs.print_anything()
    places.use()
    try:
        if argv[:1] == ["soup"]:
            surroundings.clean()
            from salsa import soup

            return soup.main(argv[1:])
        argv, extra = _split(argv)
        if argv[:1] == ["run"]:
            return run_command(argv[1:], extra)
        arguments = _parser().parse_args(argv)
        if extra:
            raise UserError("options after -- are Snakemake's, and only `salsa run` starts Snakemake")
        return arguments.function(arguments, extra)
    except UserError as error:
        print(f"salsa: {error}", file=sys.stderr)
    except BrokenPipeError:  # `salsa plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # of which Python would say it once more
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        line = failures.describe(error) or f"{place}{error.strerror or error}"
        print(f"salsa: {printable(line)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(interrupts.INTERRUPTED, file=sys.stderr)
        return interrupts.exit_code(signal.SIGINT)
    return 1


def _split(argv):
    if "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _positive(text):
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return number


def _parser():
    parser = Parser(prog="salsa", description="What should a policy be anchored to?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    overrides = {"nargs": "*", "metavar": "OVERRIDE", "help": "Hydra's, such as experiment=reviews ppo.iterations=10"}
    plan = commands.add_parser("plan", help="show the runs of a configuration, and which are done")
    plan.add_argument("overrides", **overrides)
    plan.add_argument("--json", action="store_true", help="print the plan itself, and what it needs")
    plan.add_argument("--tflops", type=_positive, help="throughput of a run in 10¹² operations a second: shows hours")
    plan.add_argument("--gpu-memory", type=_positive, metavar="GIB", help="of a GPU: warn of runs that can't fit")
    plan.add_argument("--memory", type=_positive, metavar="GIB", help="of the machine: warn of runs that can't fit")
    plan.add_argument("--pilot", metavar="STUDY", help="folder of a small study of the arms: which replicates it takes")
    plan.add_argument("--budget", type=_positive, metavar="CORE-MINUTES", help="with --pilot: of the best design")
    plan.set_defaults(function=plan_command)
    run = "run a configuration or, with Hydra's -m, a sweep (Snakemake, all cores); after --: Snakemake's options"
    commands.add_parser("run", help=run, add_help=False)
    status = commands.add_parser("status", help="show where the runs of a configuration stand, wherever they run")
    status.add_argument("overrides", **overrides)
    status.set_defaults(function=status_command)
    verify = commands.add_parser("verify", help="check every finished run's files against its manifest")
    verify.add_argument("results", nargs="?", default="results", help="the results folder (default: results)")
    verify.set_defaults(function=verify_command)
    commands.add_parser("soup", help="average or otherwise mix the weights of models", add_help=False)
    forget = commands.add_parser("forget", help="move finished runs aside, so that they are computed again")
    forget.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, such as results/ppo/…")
    forget.add_argument("--dependents", action="store_true", help="move the finished runs that rest on it, too")
    forget.set_defaults(function=forget_command)
    publish = commands.add_parser("publish", help="copy a finished study to results/published, to be committed")
    publish.add_argument("study", help="a study's folder, such as results/studies/default")
    publish.set_defaults(function=publish_command)
    export = commands.add_parser("export", help="copy a trained policy and its model card to a new folder")
    export.add_argument("study", help="a study's folder, such as results/studies/default")
    export.add_argument("policy", help="its arm, such as salsa")
    export.add_argument("--kl-coef", type=float, help="where the arm was run at several")
    export.add_argument("--replicate", type=int, help="where the study has several")
    export.add_argument("--seed", type=int, help="of training, where a replicate has several")
    export.add_argument("--output", required=True, help="the folder to make")
    export.set_defaults(function=export_command)
    judge = commands.add_parser("judge", help="judge check: whether a judge can judge, on pairs of known quality")
    check = judge.add_subparsers(required=True, metavar="ACTION").add_parser("check", help="ask it, and say so")
    check.add_argument("overrides", **overrides)
    check.add_argument("--output", metavar="FOLDER", help="keep its answers here, and go on from those that are there")
    check.add_argument("--scorer", metavar="FOLDER", help="a finished run of reward_model, for judges that want one")
    check.set_defaults(function=judge_command)
    base = commands.add_parser("base", help="pretrain the checkpoint that ships with the project again (minutes)")
    base.set_defaults(function=base_command)
    schema = commands.add_parser("schema", help="print the JSON schema of presets, which conf/schema.json holds")
    schema.add_argument("--markdown", action="store_true", help="a page with a table of all settings, in place of it")
    schema.set_defaults(function=schema_command)
    return parser


def plan_command(arguments, _):
    """Show the runs of each stage, how many are finished, and what they need; warn of what can't fit."""
    from rich.console import Console

    from salsa.workflow import compose, designs, estimate, plan, studies

    jobs.check_sections()
    composed = compose.compose(arguments.overrides)
    result = plan.plan(composed)
    forecasts = _forecasts(arguments, composed)
    survey = estimate.survey(result, lambda path: jobs.finished(result, path), arguments.tflops)
    warnings = survey.warnings(arguments.gpu_memory, arguments.memory)
    if arguments.json:
        described = runs.read_json(result.save()) | {"estimate": survey.as_dict(), "warnings": warnings}
        described |= {"pilot": [forecast.as_dict() for forecast in forecasts]} if forecasts else {}
        print(json.dumps(described, indent=2))  # in ASCII: a title may hold what a terminal obeys
        return 0
    for study in result.studies:
        path = studies.reached(result, study)
        print(f"{result.results}/{path}" + (f" ({study['link']})" if study["link"] else ""))
        for line in estimate.looks(result, study, lambda path: jobs.finished(result, path), arguments.tflops):
            print(f"  {line}")
    Console().print(survey.table())
    notes = dict.fromkeys(note for study in composed for note in designs.notes(study))
    for line in [*survey.lines(), *notes, *warnings]:
        print(printable(line))
    for forecast in forecasts:
        Console().print(forecast.table())
        for line in forecast.lines:
            print(printable(line))
    return 0


def _forecasts(arguments, composed):
    """What the pilot says of each of the composed studies; nothing where none is given."""
    from salsa.workflow import pilot

    if arguments.budget and not arguments.pilot:
        raise UserError("--budget: is what the best design may cost by a pilot; give --pilot with a study's folder")
    return [pilot.forecast(arguments.pilot, study, arguments.budget) for study in composed if arguments.pilot]


def run_command(arguments, extra):
    """Become Snakemake on the configuration that the overrides say, or Hydra, where flags or settings of it do."""
    from salsa.workflow import multirun, progress

    typed = ["salsa", "run", *arguments, *["--"] * bool(extra), *extra]
    os.environ[progress.COMMAND] = shlex.join(typed)
    jobs.use_environment()
    if multirun.is_hydras(arguments):
        return multirun.run(arguments, extra)
    multirun.check_directory(multirun.directory(extra))
    config = [f"overrides={jobs.snakemake_text(shlex.join(arguments))}"] if arguments else []
    os.execv(sys.executable, multirun.command(extra, *config))


def status_command(arguments, _):
    """Show where the runs of a configuration stand, what failed and why, and the command that goes on."""
    from salsa.workflow import compose, plan, status

    status.show(plan.plan(compose.compose(arguments.overrides)), arguments.overrides)
    return 0


def verify_command(arguments, _):
    """Check every run that has a manifest; exit code 1, and their names, where some are damaged."""
    results = Path(arguments.results)
    if not results.is_dir():
        raise UserError(f"{results}: no such folder; give the results folder")
    count, damaged = 0, []
    for folder, problem in runs.survey(results):
        count += 1
        if problem:
            damaged.append(folder)
            print(printable(problem))
    print(f"{count} finished runs, {len(damaged)} damaged")
    if damaged:
        print(f"to compute them again: rm -r {shlex.join(map(str, damaged))}, then the command that made them")
    return 1 if damaged else 0


def forget_command(arguments, _):
    """Move finished runs to <results>/forgotten, and say how to take them back."""
    from salsa.workflow import forget

    moved = forget.forget(arguments.runs, arguments.dependents)
    for folder, place in moved:
        print(printable(f"{folder} -> {place}"))
    print("the command that made them computes them again; to take one back, move its folder back")
    return 0


def publish_command(arguments, _):
    """Copy a study's tables, figures and texts, which are small and hold no model, to results/published."""
    from salsa.workflow import studies

    print(studies.publish(Path(arguments.study)))
    return 0


def export_command(arguments, _):
    """Copy a trained policy's model folder, with its card as README.md."""
    from salsa.workflow import studies

    wanted = arguments.policy, arguments.output, arguments.kl_coef, arguments.replicate, arguments.seed
    print(studies.export(Path(arguments.study), *wanted))
    return 0


def judge_command(arguments, _):
    """Ask the judges of a configuration about pairs of known quality; exit code 1 where one can't judge."""
    from salsa.tools import judge_check

    return judge_check.run(arguments.overrides, arguments.output, arguments.scorer)


def base_command(arguments, _):
    """Pretrain the default study's base from nothing and put it where the package ships it."""
    from salsa import base
    from salsa.workflow import compose, plan

    with tempfile.TemporaryDirectory() as results:
        overrides = [f"results={results}", "execution.shipped_base=false", f"execution.threads={os.cpu_count()}"]
        result = plan.plan(compose.compose(overrides))
        path = result.save()
        for name, run in result.runs.items():
            if run.stage in ("corpus", "base"):
                command = [sys.executable, "-m", stages.ALL[run.stage].module, "--plan", str(path), "--run", name]
                subprocess.run(command, check=True)
        (name,) = (name for name, run in result.runs.items() if run.stage == "base")
        shipped = base.ASSETS / result.runs[name].address[:12]
        shutil.rmtree(base.ASSETS, ignore_errors=True)
        runs.copy_files(Path(results) / name / "model", shipped)
    print(shipped)
    return 0


def schema_command(arguments, _):
    """Print the JSON schema of presets, from which an editor completes and checks them, or a page for people."""
    if arguments.markdown:
        from salsa.workflow import settings_page

        print(settings_page.page(), end="")
    else:
        from salsa.workflow import json_schema

        print(json.dumps(json_schema.of_presets(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
