"""The plan, and the functions that the rules read it with.

`--config overrides="…"` takes Hydra's overrides, `--config points=FILE` a list of lists of them, and `--config
plan=FILE` what was planned before.
"""

import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from salsa.workflow import failures, studies
from salsa.workflow import plan as planning
from salsa.workflow.runs import UserError, printable


def read_plan():
    """The plan of the configuration, and its file. Jobs that run elsewhere read the plan that the driver wrote."""
    if set(workflow.basedir) & set("{}"):
        sys.exit(printable(f"salsa: {workflow.basedir}: Snakemake takes braces for wildcards; move the checkout"))
    unknown = sorted(set(config) - {"overrides", "plan", "points"})
    if unknown:
        sys.exit(printable(f'--config {unknown[0]}=…: no such key; give --config overrides="model=tiny seed=1"'))
    for key, value in config.items():
        if not isinstance(value, str | None):
            sys.exit(f'--config {key}: not text but {value!r}; quote it: --config overrides="model=tiny"')
    given = [key for key, value in config.items() if value]
    alone = next((key for key in ("plan", "points") if key in given), None)
    if alone and len(given) > 1:
        sys.exit(f"--config {alone}: the file says everything; give no overrides and no other file beside it")
    try:
        if config.get("plan"):
            return planning.load(config["plan"]), Path(config["plan"])
        from salsa.workflow import compose

        if config.get("points"):
            composed = compose.compose_points(compose.read_points(config["points"]))
        else:
            composed = compose.compose(shlex.split(config.get("overrides") or ""))
        studies.check_sections()
        plan = planning.plan(composed)
        return plan, plan.save()
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"salsa: {printable(failures.describe(error) or error)}")


studies.use_environment(workflow.basedir)
PLAN, PLAN_FILE = read_plan()
# Snakemake hands these arguments on to the processes that it starts for jobs.
workflow.config_settings.config_args = [studies.snakemake_argument("plan", str(PLAN_FILE))]

# Executors of clusters are given --jobs. There, --retries says how often any job is tried again; here, training is once.
HERE = workflow.is_main_process and workflow.nodes is None
RETRIES = 1 if HERE else None

# Jobs on this machine share its GPUs: Snakemake counts them, and which of them a job has is its lease (salsa/workflow/gpus.py).
# No profile says how many: the number would also be the most that a job can ask of a cluster.
if HERE and "gpu" not in workflow.global_resources:
    if here := studies.gpus_here(PLAN):
        workflow.register_resource("gpu", here)


def beside(stage, name):
    """A file in the folder of a stage's runs, with the wildcard `run`.

    Manifests are declared with `update()`: Snakemake would delete one that another Snakemake, or a job that outlived
    its Snakemake, wrote since the DAG was built. The stage finds it and ends.
    """
    return f"{PLAN.results}/{planning.FOLDERS[stage]}/{{run}}/{name}"


def manifest(path):
    return f"{PLAN.results}/{path}/manifest.json"


def parents(stage):
    """The input function of a stage: its parents' manifests. Existence alone counts, hence `ancient`.

    A finished run needs nothing: without those of its parents that are not there, no missing parent re-runs it.
    """

    def manifests(wildcards):
        path = f"{planning.FOLDERS[stage]}/{wildcards.run}"
        run = PLAN.runs.get(path)
        if run is None:
            sys.exit(f"salsa: {PLAN.results}/{path} is not in the plan of this configuration; see `salsa plan`")
        wanted = [manifest(parent) for parent in dict.fromkeys([*run.parents.values(), *run.after])]
        if os.path.exists(manifest(path)):
            wanted = [name for name in wanted if os.path.exists(name)]
        return [ancient(name) for name in wanted]

    return manifests


def planned(stage, wildcards):
    """The plan's entry of a job's run."""
    return PLAN.runs[f"{planning.FOLDERS[stage]}/{wildcards.run}"]


def execution(stage, name):
    """A threads or resource function of a stage: a value of the run's execution settings."""
    return lambda wildcards: studies.needs(planned(stage, wildcards), name)


def memory(stage):
    """The memory function of a stage, in MB: half as much again with each try."""
    return lambda wildcards, attempt: studies.needs(planned(stage, wildcards), "memory_mb") * (attempt + 1) // 2


def verdicts(wildcards):
    """The group of a judge's job: on a cluster, several that take seconds are one job."""
    return "verdicts" if studies.brief(planned("judge", wildcards)) else None


def launcher(stage):
    """The parameter function of a stage that may need GPUs or several processes: what starts them."""
    return lambda wildcards: studies.launcher(planned(stage, wildcards))


def command(stage, show=False, python="{params.launcher}"):
    """The shell command of a stage. `exec`, so that the job is the stage's process and no shell around it.

    With `show`, what the stage prints goes to the terminal as well as to its log. Snakemake removes a log before each
    try, also that of a run which another Snakemake computes or has finished. So a second name holds on to it, and every
    try appends. `{…:q}` is quoted by Snakemake for the shell, and a doubled brace is no field of its.
    """
    output = ">> >(tee -a -- {log:q}) 2>> {log:q}" if show else ">> {log:q} 2>&1"
    folder = shlex.quote(f"{PLAN.results}/{planning.FOLDERS[stage]}")
    kept = f"{folder}/{{wildcards.run:q}}/{studies.KEPT_LOG}"
    dashed = str(PLAN_FILE).startswith("-")  # which would look like an option
    plan_file = f"./{PLAN_FILE}" if dashed else str(PLAN_FILE)
    plan_file = shlex.quote(plan_file).replace("{", "{{").replace("}", "}}")
    return (
        f"(: >> {kept} && ln -f -- {kept} {{log:q}}) 2> /dev/null || true; "
        f"exec {python} -m {planning.MODULES[stage]} --plan {plan_file} "
        f"--run {planning.FOLDERS[stage]}/{{wildcards.run:q}} {output}"
    )


def study_manifests():
    """What all is for: the studies, and the comparison of a sweep's."""
    comparison = [PLAN.comparison] if PLAN.comparison else []
    return [manifest(path) for path in [*(study["path"] for study in PLAN.studies), *comparison]]


def comparison_name():
    """The folder's name of the plan's comparison, as a regular expression: it lies among the studies."""
    return re.escape(Path(PLAN.comparison).name) if PLAN.comparison else "(?!)"


def conclude():
    """Give the studies their readable names, and say where the results are."""
    for line in studies.conclude(PLAN):
        print(line, file=sys.stderr)


def check_judges():
    """Refuse, before the first job, what would end in a judge that can't be asked."""
    judged = [f"judge/{job.wildcards.run}" for job in workflow.dag.needrun_jobs() if job.rule.name == "judge"]
    try:
        studies.check_judges(PLAN, judged)
    except UserError as error:
        sys.exit(f"salsa: {error}")


def name_failures():
    for line in studies.failures(PLAN):
        print(line, file=sys.stderr)


# Snakemake calls no hook when there is nothing to do.
if workflow.is_main_process and all(map(os.path.exists, study_manifests())):
    conclude()
