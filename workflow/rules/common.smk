"""The plan, and the functions that the rules read it with.

`--config overrides="…"` takes Hydra's overrides, `--config points=FILE` a list of lists of them, and `--config
plan=FILE` what was planned before.
"""

import os
import re
import shlex
import sys
import threading
from pathlib import Path

from snakemake.logging import logger

sys.path.insert(0, workflow.basedir)

from salsa.workflow.bounds import printable
from salsa.workflow.messages import UserError

try:
    from salsa.workflow import failures, forget, interrupts, jobs, progress, repository, screen, stages, studies
    from salsa.workflow import plan as planning
except UserError as error:  # a file that adds a kind of something has a fault
    sys.exit(f"salsa: {error}")


def read_plan():
    """The plan of the configuration, and its file. Jobs that run elsewhere read the plan that the session wrote."""
    if repository.INSTALLED and "conda" in map(str, workflow.deployment_settings.deployment_method):
        sys.exit("salsa: the environments that conda makes hold no salsa; clone the repository, and run from there")
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
        from salsa.workflow import compose, overriding

        if config.get("points"):
            composed = compose.compose_points(overriding.read_points(config["points"]))
        else:
            composed = compose.compose(shlex.split(config.get("overrides") or ""))
        jobs.check_sections()
        plan = planning.plan(composed)
        return plan, plan.save()
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"salsa: {printable(failures.describe(error) or error)}")


jobs.use_environment()
PLAN, PLAN_FILE = read_plan()
STAGES = stages.ALL.values()
HAS_LOOKS = any(map(planning.has_looks, PLAN.studies))
ANNOUNCED = set()  # the looks of which it was said what they found, and whether that nothing is left to do
# Snakemake hands these arguments on to the processes that it starts for jobs.
workflow.config_settings.config_args = [jobs.snakemake_argument("plan", str(PLAN_FILE))]

# Executors of clusters are given --jobs. There, --retries says how often any job is tried again; here, training is once.
HERE = workflow.is_main_process and workflow.nodes is None
RETRIES = 1 if HERE else None

# Jobs here ignore Ctrl-C: this process tells them to stop, each once, and ends when they have saved what they have done.
STOP = interrupts.Driver(lambda: workflow.scheduler, logger, here=HERE)
IGNORING = "trap '' INT; " if HERE else ""

# Jobs on this machine share its GPUs: Snakemake counts them, and which of them a job has is its lease (salsa/workflow/gpus.py).
# No profile says how many: the number would also be the most that a job can ask of a cluster.
if HERE and "gpu" not in workflow.global_resources:
    if here := jobs.gpus_here(PLAN):
        workflow.register_resource("gpu", here)


def beside(stage, name):
    """A file in the folder of a stage's runs, with the wildcard `run`.

    Manifests are declared with `update()`: Snakemake would delete one that another Snakemake, or a job that outlived
    its Snakemake, wrote since the DAG was built. The stage finds it and ends.
    """
    return f"{PLAN.results}/{stage.folder}/{{run}}/{name}"


def manifest(path):
    return f"{PLAN.results}/{path}/manifest.json"


def parents(stage):
    """The input function of a stage: its parents' manifests. Existence alone counts, hence `ancient`.

    A finished run needs nothing: without those of its parents that are not there, no missing parent re-runs it.
    """

    def manifests(wildcards):
        path = f"{stage.folder}/{wildcards.run}"
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
    return PLAN.runs[f"{stage.folder}/{wildcards.run}"]


def resource(stage, name):
    """A threads or resource function of a stage."""
    return lambda wildcards: jobs.resource(planned(stage, wildcards), name)


def memory(stage):
    """The memory function of a stage, in MB: half as much again with each try."""
    return lambda wildcards, attempt: jobs.resource(planned(stage, wildcards), "memory_mb") * (attempt + 1) // 2


def group(stage):
    """The group function of a stage: on a cluster, several jobs that take seconds are one."""
    return lambda wildcards: stage.group(planned(stage, wildcards).settings)


def command(stage):
    """The parameter function of a stage: its shell command. `exec`, so that the job is the stage and no shell around it.

    A parameter, because Snakemake evaluates a rule's own command when the job runs, and the loop over the stages is
    over then. Snakemake removes a log before each try, also that of a run which another Snakemake computes or has
    finished. So a second name holds on to it, and every try appends.
    """

    def text(wildcards):
        run = planned(stage, wildcards)
        folder = f"{PLAN.results}/{stage.folder}/{wildcards.run}"
        kept, log = (shlex.quote(f"{folder}/{name}") for name in (jobs.KEPT_LOG, jobs.LOG))
        printed = stage.printed and screen.active is None  # which prints it when the job has ended
        output = f">> >(tee -a -- {log}) 2>> {log}" if printed else f">> {log} 2>&1"
        dashed = str(PLAN_FILE).startswith("-")  # which would look like an option
        plan_file = shlex.quote(f"./{PLAN_FILE}" if dashed else str(PLAN_FILE))
        return (
            f"{IGNORING}(: >> {kept} && ln -f -- {kept} {log}) 2> /dev/null || true; "
            f"exec {jobs.launcher(run)} -m {stage.module} --plan {plan_file} "
            f"--run {shlex.quote(f'{stage.folder}/{wildcards.run}')} {output}"
        )

    return text


def reached(study):
    """The path of the look that a study has reached."""
    try:
        return studies.reached(PLAN, study)
    except UserError as error:
        sys.exit(f"salsa: {error}")


def look(study):
    """The input function of `all` for a study: the manifest of the look that it has reached.

    Snakemake asks again when a look is finished, for it is a checkpoint: then another may follow, which adds its runs.
    """

    def manifest_of_look(wildcards):
        path = reached(study)
        if runs_jobs():
            announce(study)
            conclude_at_once()
        if path != study["path"] and not jobs.finished(PLAN, path):
            checkpoints.study.get(run=Path(path).name)
        return manifest(path)

    return manifest_of_look


def heed_signals():
    """Let Ctrl-C and SIGTERM stop the jobs. Snakemake's scheduler, when it is made, takes SIGTERM for itself."""
    if workflow.is_main_process:
        STOP.listen()


def limit_no_rate():
    """Let jobs start when others end, at any rate, where nobody has set one (`--max-jobs-per-timespan`).

    For a limit, 100 jobs a second by default, Snakemake 9 looks at all jobs again a second later, and each job that ends begins
    one more endless series of that: after 300 jobs they take a third of a core.
    """
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    if HERE and limit and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


def runs_jobs():
    """Whether this Snakemake is the one that runs jobs: not one that shows, draws or unlocks."""
    return workflow.is_main_process and workflow.executor_plugin is not None and not workflow.dryrun


def announce(study):
    """Say once what was found at the last finished look of a study, before it goes on; the look's job links its name."""
    path = studies.latest(PLAN, study)
    if path and path not in ANNOUNCED and path != reached(study):
        ANNOUNCED.add(path)
        print(f"study {study['name']}: {PLAN.results}/{path}", file=sys.stderr)
        print(f"  {studies.look_words(PLAN, path)}", file=sys.stderr)


def wanted():
    """What all is for: the studies, and the comparison of a sweep's."""
    comparison = [manifest(PLAN.comparison)] if PLAN.comparison else []
    return [look(study) for study in PLAN.studies] + comparison


def all_done():
    """Whether nothing is left to do."""
    paths = [reached(study) for study in PLAN.studies] + ([PLAN.comparison] if PLAN.comparison else [])
    return all(jobs.finished(PLAN, path) for path in paths)


def run_names(stage):
    """The names of a report's folders, as a regular expression: those of comparisons lie among the studies'."""
    if stage is not stages.COMPARISON:
        return "[^/]+"
    return re.escape(Path(PLAN.comparison).name) if PLAN.comparison else "(?!)"


def conclude():
    """Give the studies their readable names, and say what they found and where the results are."""
    for line in studies.conclude(PLAN):
        print(line, file=sys.stderr)


def conclude_at_once():
    """Conclude when nothing is left to do, of which Snakemake tells no hook: the names may lead to other studies."""
    begun = workflow.scheduler is not None  # then the end of the jobs is told
    if all_done() and not begun and not forces() and "nothing" not in ANNOUNCED:
        ANNOUNCED.add("nothing")
        conclude()
        if screen.active:
            screen.active.concluded = True


def begin():
    """Record that this process runs the plan's jobs, for `salsa status`, and show their progress."""
    command = os.environ.get(progress.COMMAND) or shlex.join(["snakemake", *sys.argv[1:]])
    by_job = not workflow.local_exec
    threads = workflow.nodes if by_job else workflow.cores
    gpus = workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else 0
    session = progress.hold_session(PLAN, command, threads, gpus, by_job)
    if screen.active:
        screen.active.begin(PLAN, session)


def end():
    """Let the progress end before what is said last: records wait for the thread that shows them."""
    if screen.active:
        ended = threading.Event()
        logger.info("", extra={"ended": ended})
        ended.wait(10)


def forces():
    """Whether Snakemake is told to run jobs whatever is finished."""
    settings = workflow.dag_settings
    return bool(settings.forcerun or settings.forceall or settings.forcetargets)


def check_forced():
    """Refuse to force runs that are finished: their stages would find them so, and Snakemake would call them done."""
    if forces():
        rules = {stage.name: stage.folder for stage in STAGES}
        asked = [
            f"{rules[job.rule.name]}/{job.wildcards.run}"
            for job in workflow.dag.needrun_jobs()
            if job.rule.name in rules
        ]
        finished = [path for path in PLAN.runs if path in asked and jobs.finished(PLAN, path)]
        if finished:
            sys.exit(printable(f"salsa: {forget.refusal(PLAN.results, finished)}"))


def check_judges():
    """Refuse, before the first job, what would end in a judge that can't be asked."""
    judged = [f"judge/{job.wildcards.run}" for job in workflow.dag.needrun_jobs() if job.rule.name == "judge"]
    try:
        jobs.check_judges(PLAN, judged)
    except UserError as error:
        sys.exit(f"salsa: {error}")


def name_failures():
    """Say why runs failed, or end where they were told to stop."""
    STOP.exit_if_told()
    for line in jobs.failures(PLAN):
        print(line, file=sys.stderr)


heed_signals()
