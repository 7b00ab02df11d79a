"""`salsa status`: where a study stands that runs elsewhere, or died; what failed and why, and the command that goes on.

It reads the plan and the results folder alone, and writes nothing.
"""

import shlex
import time
from pathlib import Path

from rich.console import Console

from salsa.workflow import progress, screen, stages, studies
from salsa.workflow.bounds import printable
from salsa.workflow.progress import DONE, RUNNING


def show(plan, overrides):
    """Print the picture of a plan, and what is to be said of it. `overrides`: those that it was made from."""
    session, lives = progress.session_of(plan)
    watch = progress.Watch(plan, session.capacity, session.by_job) if session else progress.Watch(plan)
    picture = watch.look()
    seconds = time.time() - session.started if lives else None
    Console(highlight=False).print(screen.drawn(picture, screen.title(plan), seconds))
    for line in lines(plan, picture, session, lives, overrides):
        print(printable(line))


def lines(plan, picture, session, lives, overrides):
    """What failed, whether anything runs the study, and what to do."""
    yield from screen.troubles(picture, plan.results)
    command = shlex.join(["salsa", "run", *overrides])
    if picture.count() == picture.count(DONE):
        yield from finished(plan)
    elif lives:
        yield f"run by: {session.command} (process {session.process} on {session.host})"
    elif picture.count(RUNNING):
        yield "its jobs run, but no process that would start the others is known here"
    elif picture.count(DONE):
        yield f"nothing runs it now; to go on: {session.command if session else command}"
    else:
        yield f"nothing of it was run; to start: {command}"


def finished(plan):
    """Where the results of a finished plan are."""
    for study in plan.studies:
        folder = Path(plan.results) / studies.reached(plan, study)
        pages = [folder / name for name in ("report.html", stages.STUDY.page) if (folder / name).exists()]
        yield f"finished: {pages[0] if pages else folder}"
    if plan.comparison:
        yield f"comparison: {Path(plan.results) / plan.comparison / stages.COMPARISON.page}"
