"""Snakemake's logger plugin `salsa`: one live picture of a study on a terminal, and two lines a job elsewhere.

`salsa run` chooses it; `snakemake --logger salsa …` does so by hand. Snakemake finds it by the beginning of its
package's name. It hands on what Snakemake says of jobs to `salsa.workflow.screen`; what is asked for in Snakemake's own
words (-n, --quiet, --verbose, --printshellcmds, and what runs no job) is said in these.
"""

import logging
import sys

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

# What Snakemake says while jobs run, and no event says: all else is in the picture, or in the log that it keeps.
NOTHING = "Nothing to be done"
SAID = ("Terminating processes", "Will exit after finishing", NOTHING)
# Errors that the lines on failed jobs say better.
SAID_BETTER = (
    "Exiting because a job execution failed",
    "WorkflowError:\nAt least one job did not complete",
    "RuleException:\nCalledProcessError",
    "Cannot restore",  # the manifest of a run that has none
)
NOISE = ("Assuming unrestricted shared filesystem",)


class LogHandler(LogHandlerBase):
    """Turns Snakemake's records into calls of a `screen.Reporter`."""

    def __post_init__(self):
        # Snakemake imports every logger plugin that there is, also where another one is chosen: then a fault in a file
        # that adds a kind of something is for the workflow to say.
        from salsa.workflow import screen, stages

        settings, self.stages = self.common_settings, stages.ALL
        self.text = ColorizingTextHandler(
            nocolor=settings.nocolor,
            stream=sys.stdout if settings.stdout else sys.stderr,
            formatter=DefaultFormatter(settings.quiet, settings.show_failed_logs),
            filter=DefaultFilter(
                settings.quiet, settings.debug_dag, settings.verbose, settings.dryrun, settings.printshellcmds
            ),
        )
        own_words = settings.dryrun or settings.quiet or settings.verbose or settings.printshellcmds
        self.reporter = None if own_words or settings.debug_dag else screen.reporter()
        screen.active = self.reporter
        self.paths = {}  # number of a job -> path of its run
        self.runs_jobs = False

    def emit(self, record):
        try:
            self._handle(record)
        except Exception:
            self.handleError(record)

    def _handle(self, record):
        event = getattr(record, "event", None)
        self.runs_jobs = self.runs_jobs or event == LogEvent.WORKFLOW_STARTED
        if ended := getattr(record, "ended", None):
            self.close()
            ended.set()
        elif self.reporter is None or not self.runs_jobs:
            if not str(record.msg).startswith(NOISE):
                self.text.handle(record)
        elif event == LogEvent.JOB_INFO and "run" in (record.wildcards or {}):
            path = f"{self.stages[record.rule_name].folder}/{record.wildcards['run']}"
            self.paths[record.jobid] = path
            self.reporter.started(path)
        elif event == LogEvent.JOB_FINISHED and record.job_id in self.paths:
            self.reporter.finished(self.paths[record.job_id])
        elif event == LogEvent.JOB_ERROR and record.jobid in self.paths:
            self.reporter.failed(self.paths[record.jobid])
        elif event in (None, LogEvent.ERROR):
            self._say(record)

    def _say(self, record):
        text = str(record.msg)
        wanted = record.levelno >= logging.WARNING or text.startswith(SAID)
        concluded = text.startswith(NOTHING) and self.reporter.concluded
        if wanted and not concluded and not text.startswith(SAID_BETTER):
            self.reporter.say(text, "red" if record.levelno >= logging.ERROR else None)

    def close(self):
        if self.reporter:
            self.reporter.end()
        super().close()

    writes_to_stream = True
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False
