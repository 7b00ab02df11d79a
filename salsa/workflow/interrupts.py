"""What Ctrl-C and SIGTERM do: to a stage, and to the process that runs the jobs of a study.

A stage that is told to stop saves what it needs to go on, and ends with 128 and the signal's number: 130 after SIGINT,
which Ctrl-C sends, and 143 after SIGTERM. The process that runs the jobs (`Driver`) starts no further ones, hands the
request on to those that run as SIGTERM, and ends when they have ended; asked again, it ends them at once. A signal that
a process was started to ignore stays ignored, as SIGINT is after `nohup … &` in a script.

Only the standard library is imported at the top: every stage begins here.
"""

import contextlib
import os
import select
import signal
import sys
import threading

from salsa.workflow.failures import KEPT

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = f"salsa: interrupted; {KEPT}"
AGAIN = 0.5  # seconds between two looks for jobs that were being started when the first were told to stop
SHOW_CURSOR = "\x1b[?25h"


class Told(SystemExit):
    """The process was told to stop by a signal, whose exit code this is."""

    def __init__(self, number):
        super().__init__(exit_code(number))
        self.number = number


def exit_code(number):
    """The exit code of a process that a signal ended, as shells say it."""
    return 128 + number


def handle(handler, signals=SIGNALS):
    """Let `handler` have those of the signals that this process does not ignore; returns signal -> handler before."""
    heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


def restore(handlers):
    """Take back what `handle` did."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raise_told():
    """Let signals raise `Told`: an exception, which removes half-written folders and closes files."""

    def tell(number, _):
        raise Told(number)

    return handle(tell)


def ignore_interrupts():
    """Let this process, and those that it starts, ignore SIGINT: whoever started it hands the request on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Driver:
    """What the process that runs a study's jobs does when it is told to stop.

    Its jobs ignore SIGINT, which a terminal sends to all processes at once; so each of them is told once, whoever was
    sent the signal. A thread does the work, because a handler may interrupt what it needs itself: locks, prints.

    Args:
        scheduler: a function that returns Snakemake's scheduler, None before there is one.
        logger: Snakemake's logger, whose reports of jobs that were stopped are left out.
        here: whether jobs are processes of this machine. Those of a cluster are cancelled by Snakemake itself, whose
            way to stop is an exception; the cluster then sends SIGTERM.

    Attributes:
        number: the signal that came first, or None.
    """

    def __init__(self, scheduler, logger, here):
        self.scheduler, self.logger, self.here = scheduler, logger, here
        self.number = None
        self.told = set()
        self.requests, self.sender = os.pipe()
        threading.Thread(target=self._serve, daemon=True).start()

    def listen(self):
        """Heed the signals; again, where Snakemake has put handlers of its own in their place."""
        handle(self._note, SIGNALS if self.here else SIGNALS[:1])

    def _note(self, number, _):
        first, self.number = self.number is None, self.number or number
        if self.scheduler() is None:  # nothing runs yet
            os.write(2, f"{INTERRUPTED}\n".encode())
            raise SystemExit(exit_code(number))
        os.write(self.sender, bytes([number]))
        if first and not self.here:
            raise KeyboardInterrupt

    def _serve(self):
        os.read(self.requests, 1)
        self.logger.addFilter(lambda record: hasattr(record, "ended"))  # which says that the progress is to end
        if self.here:
            count = len(_children())
            jobs = f"{count} job{'s' * (count != 1)}"
            self._say(f"salsa: stopping {jobs}, which save what they have done (Ctrl-C again ends them at once)")
            self.scheduler().exit_gracefully()
        else:
            self._say("salsa: cancelling the cluster's jobs, which save what they have done")
        while True:
            if self.here:
                self._tell(_children())
            ready, _, _ = select.select([self.requests], [], [], AGAIN)
            if ready:
                self._end_at_once(os.read(self.requests, 1)[0])

    def _tell(self, jobs):
        """Send SIGTERM to each job once: a second one would end the launcher of several processes too early."""
        for job in jobs:
            if job not in self.told:
                self.told.add(job)
                _send(job, signal.SIGTERM)

    def _end_at_once(self, number):
        if self.here:
            for process in _children(recursive=True):
                _send(process, signal.SIGKILL)
        self._say((SHOW_CURSOR if sys.stderr.isatty() else "") + INTERRUPTED)
        os._exit(exit_code(number))

    def _say(self, line):
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            print(line, file=sys.stderr, flush=True)

    def exit_if_told(self):
        """When the jobs have ended: end this process, if it was told to, with the one line that a person needs."""
        if self.number is not None:
            self._say(INTERRUPTED)
            sys.exit(exit_code(self.number))


def _children(recursive=False):
    """The processes that this one has started, and with `recursive` those that these have started."""
    import psutil  # of Snakemake, in whose process alone this is called

    return psutil.Process().children(recursive=recursive)


def _send(process, number):
    import psutil

    with contextlib.suppress(psutil.Error):  # it has just ended
        process.send_signal(number)
