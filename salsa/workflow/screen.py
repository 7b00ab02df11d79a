"""How the progress of a study is drawn: one picture that a terminal keeps up to date, or plain lines in a file.

`progress.Watch` says where the runs stand, and Snakemake, through the logger plugin `salsa`
(snakemake_logger_plugin_salsa), when its jobs start and end. Left out: what is said of a finished study
(`studies.conclude`).
"""

import sys
import threading
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salsa.workflow import jobs, progress, stages
from salsa.workflow.bounds import printable
from salsa.workflow.progress import DONE, FAILED, RUNNING, STOPPED

EVERY = 1.0  # seconds between two looks at the results
MOST = 12  # running runs that are shown one by one
NAMED = 3  # runs with one fault that are named; of others, how many
COLOURS = {RUNNING: "cyan", FAILED: "red", STOPPED: "yellow"}

active = None  # the reporter of this process, where the logger plugin made one


def duration(seconds):
    """Seconds in words, to two units: 45 s, 2 min 05 s, 3 h 20 min, 2 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    if seconds < 24 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // (24 * 3600)} d {seconds % (24 * 3600) // 3600} h"


def estimate(seconds):
    """An estimate of seconds in words, no finer than it can be: about 5 min, about 1.5 h."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"about {seconds / unit:.2g} {name}" if unit > 60 else f"about {seconds / unit:.0f} {name}"
    return "less than a minute" if seconds < 45 else "about a minute"


def to_go(picture):
    """The time to go in words; nothing where nothing is known of it, or nothing is left."""
    if picture.left is None or picture.count() == picture.count(DONE):
        return ""
    unknown = f", not counting {', '.join(picture.unknown)}" if picture.unknown else ""
    return f"{estimate(picture.left)} to go{unknown}"


def headline(picture, title, seconds=None):
    """A line on all runs: how many are done, since when, and how long it takes."""
    parts = [title, f"{picture.count(DONE)} of {picture.count()} runs"]
    parts += [f"{picture.count(state)} {state}" for state in (FAILED, STOPPED) if picture.count(state)]
    parts += ["" if seconds is None else duration(seconds), to_go(picture)]
    return " · ".join(part for part in parts if part)


def drawn(picture, title, seconds=None, most=MOST):
    """The picture as rich draws it: a line on all, a bar for each stage, and the runs that run now."""
    running = picture.of(RUNNING)
    parts = [Text(headline(picture, title, seconds), style="bold"), _stages(picture)]
    if running:
        parts += [Text(""), _running(running[:most])]
        parts += [Text(f"… and {len(running) - most} more", style="dim")] * (len(running) > most)
    return Group(*parts)


def _stages(picture):
    table = Table.grid(padding=(0, 2), expand=False)
    table.add_column(no_wrap=True)
    table.add_column(width=24)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, states in picture.stages().items():
        total, done = states.total(), states[DONE]
        bar = ProgressBar(total=total, completed=done, width=24, complete_style="green", finished_style="green")
        others = [Text(f"{states[state]} {state}", COLOURS[state]) for state in COLOURS if states[state]]
        style = "dim" if done == total else ""
        table.add_row(Text(name, style), bar, Text(f"{done}/{total}", style), Text(", ").join(others))
    return table


def _running(running):
    """A row for each run that runs now."""
    table = Table.grid(padding=(0, 2))
    training = any(run.iterations for run in running)
    names = ["stage", "run", *["iteration", "score", "KL"] * training, "so far", "to go"]
    for name in names:
        table.add_column(justify="left" if name in ("stage", "run") else "right", no_wrap=name != "run")
    table.add_row(*(Text(name, "dim") for name in names))
    for run in running:
        trained = [_iteration(run), _number(run.score), _number(run.kl)] * training
        times = [_clock(run.seconds), "" if run.left is None else _clock(run.left)]
        table.add_row(run.stage, Text(run.name), *trained, *times)
    return table


def _clock(seconds):
    """Seconds as a narrow column holds them: 0:41, 12:05, 3:20:00."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _iteration(run):
    return "" if run.iterations is None else f"{run.iteration or 0}/{run.iterations}"


def _number(value):
    return "" if value is None else f"{value:.3g}"


def troubles(picture, results):
    """Lines on the runs that failed, with the last line of their logs, and on those that were stopped."""
    alike = {}  # (stage, reason) -> the runs that failed for it
    for run in picture.of(FAILED):
        alike.setdefault((run.stage, run.reason), []).append(run)
    for (_, reason), failed in alike.items():
        yield f"failed: {_few(failed)}: {reason}"
        yield f"  log: {results}/{failed[0].path}/{jobs.LOG}"
    if stopped := picture.of(STOPPED):
        yield f"stopped while they ran: {_few(stopped)}"


def _few(several):
    """The names of the first runs, and how many others there are."""
    called = ", ".join(called_in_text(run.stage, run.name) for run in several[:NAMED])
    return called + (f" and {len(several) - NAMED} more" if len(several) > NAMED else "")


def called_in_text(stage, name):
    return f"{stage} ({name})"


class Reporter:
    """What the logger plugin tells of a study's jobs; this one says it in plain lines.

    Args:
        stream: where to write; by default, standard error.
    """

    def __init__(self, stream=None):
        self.stream, self.watch, self.plan = stream, None, None
        self.began, self.logged = time.time(), {}  # the latter: path -> bytes of its log before this try
        self.concluded = False  # whether the studies' results were named, so that no word is left to say of them

    def begin(self, plan, session):
        """A study's jobs are about to be run."""
        watch = progress.Watch(plan, session.capacity, session.by_job)
        watch.since = self.began = time.time()
        self.plan, self.watch = plan, watch
        self._begun(watch.look())

    def _begun(self, picture):
        self.say(headline(picture, title(self.plan)))

    def started(self, path):
        """A job was started, or sent to a cluster."""
        if self.watch and path in self.plan.runs:
            self.watch.job_started(path)
            log = self.watch.results / path / jobs.KEPT_LOG
            self.logged[path] = log.stat().st_size if log.exists() else 0
            self._started(path)

    def _started(self, path):
        self.say(f"{self._called(path)}: started")

    def finished(self, path):
        """A job has ended, and its run is finished."""
        if self.watch and path in self.plan.runs:
            self._finished(path, self.watch.job_finished(path))
            if stages.ALL[self.plan.runs[path].stage].printed:
                for line in self._printed(path):
                    self.say(line)

    def _finished(self, path, seconds):
        picture = self.watch.look()
        ahead = ", ".join(filter(None, [f"{picture.count(DONE)} of {picture.count()}", to_go(picture)]))
        self.say(f"{self._called(path)}: done in {duration(seconds)} ({ahead})")

    def failed(self, path):
        """A job has failed: Snakemake may try it again."""
        if self.watch and path in self.plan.runs:
            log = self.watch.results / path / jobs.LOG
            lines = jobs.last_lines(log, 1) if log.exists() else []
            reason = lines[0] if lines else "it said nothing"
            self.watch.job_failed(path, reason)
            self.say(f"{self._called(path)}: failed: {reason} ({log})", "red")

    def _printed(self, path):
        """What a run has printed in this try."""
        with open(self.watch.results / path / jobs.KEPT_LOG, encoding="utf-8", errors="replace") as file:
            file.seek(self.logged.get(path, 0))
            return [printable(line) for line in file.read().splitlines() if line]

    def _called(self, path):
        return called_in_text(self.plan.runs[path].stage, self.watch.names[path])

    def say(self, text, style=None):
        """Write a line."""
        stream = self.stream or sys.stderr
        print(f"{time.strftime('%H:%M:%S')} {text}", file=stream, flush=True)

    def end(self):
        """The last job has ended."""
        if self.watch:
            picture, self.watch = self.watch.look(), None
            self.say(headline(picture, title(self.plan), time.time() - self.began))


class Screen(Reporter):
    """Keeps one picture on a terminal up to date; what is said stands above it."""

    def __init__(self):
        super().__init__()
        self.console, self.live, self.picture = Console(stderr=True), None, None
        self.looked, self.lock = 0.0, threading.Lock()

    def _begun(self, picture):
        self.picture = picture
        self.live = Live(
            get_renderable=self.draw, console=self.console, transient=True, refresh_per_second=2, redirect_stdout=True
        )
        self.live.start()

    def draw(self):
        """The picture as it is now; what is in the results is looked at once in a while."""
        with self.lock:
            if self.watch and time.time() - self.looked > EVERY:
                self.picture, self.looked = self.watch.look(), time.time()
        room = max(1, self.console.size.height - len(self.picture.stages()) - 5)
        return drawn(self.picture, title(self.plan), time.time() - self.began, min(MOST, room))

    def _started(self, path):
        pass  # the picture shows it

    def _finished(self, path, seconds):
        pass

    def say(self, text, style=None):
        self.console.print(Text(text, style or ""), soft_wrap=False)

    def end(self):
        if self.live:
            self.live.stop()
            self.live = None
        super().end()


def title(plan):
    """The names of a plan's studies; of many, how many."""
    called = list(dict.fromkeys(study["name"] for study in plan.studies))
    if len(plan.studies) == 1:
        return f"study {called[0]}"
    return f"{len(plan.studies)} studies of {', '.join(called)}"


def reporter():
    """The reporter that suits standard error: a screen on a terminal that can move its cursor, else plain lines."""
    return Screen() if Console(stderr=True).is_terminal and not Console(stderr=True).is_dumb_terminal else Reporter()
