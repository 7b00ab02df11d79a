"""What `salsa run` and `salsa status` show, with the real Snakemake and stages that only write a manifest."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from test_workflow import ROOT, TINY, Place

PATIENCE = 300  # seconds; a study of 16 jobs takes a few
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CONCLUSION = "results/studies/default-"


def command(*arguments):
    return [sys.executable, "-m", "salsa", *arguments]


def environment(place):
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(place.folder / "fake"), str(ROOT)]), "TERM": "xterm"}


def run(place, *arguments):
    """Run salsa with its output in a pipe, to its end; returns (exit code, lines)."""
    done = subprocess.run(
        command(*arguments),
        env=environment(place),
        cwd=place.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout.splitlines()


class Terminal:
    """A command on a terminal of its own, 100 columns wide."""

    def __init__(self, place, *arguments):
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(place),
            cwd=place.folder,
            stdin=follower,
            stdout=follower,
            stderr=follower,
        )
        os.close(follower)
        self.leader, self.bytes = leader, b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        try:
            while data := os.read(self.leader, 65536):
                self.bytes += data
        except OSError:  # the last of its processes has ended
            pass

    @property
    def text(self):
        return ESCAPES.sub("", self.bytes.decode("utf-8", "replace"))

    def wait_for(self, pattern):
        until = time.monotonic() + PATIENCE
        while not re.search(pattern, self.text):
            assert self.process.poll() is None and time.monotonic() < until, self.text
            time.sleep(0.1)

    def end(self):
        code = self.process.wait(timeout=PATIENCE)
        self.reader.join(10)
        return code


def unfinished(place, stage):
    """The folders of a stage's runs that have begun."""
    folders = [place.folder / "results" / path for path in place.calls() if path.startswith(f"{stage}/")]
    return [folder for folder in folders if not (folder / "manifest.json").exists()]


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """A study of which the responses failed, in a pipe."""
    place = Place(tmp_path_factory.mktemp("failed"))
    (place.folder / "fail_respond").touch()
    place.code, place.lines = run(place, "run", *TINY.split(), "--", "--cores", "4")
    return place


def test_in_a_pipe_each_job_is_two_lines_and_no_screen_is_drawn(failed):
    text = "\n".join(failed.lines)
    assert failed.code == 1 and "\x1b" not in text and "rule ppo" not in text
    own = [line for line in failed.lines if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert len(own) == 1 + 2 * 11 + 2 * 2 + 1 + 1  # first, what ended, what failed, what the gates print, last
    assert any(
        re.search(r" ppo \(salsa, kl_coef 0\.3, replicate 0\): done in \d+ s \(1?\d of 16", line) for line in own
    )
    assert len(failed.lines) < len(own) + 10
    assert any("respond (ppo, kl_coef 0.3, replicate 0): failed: UserError: respond was told" in line for line in own)


def test_status_names_what_failed_and_the_command_that_goes_on(failed):
    before = sorted(failed.folder.rglob("*"))
    code, lines = run(failed, "status", *TINY.split())
    assert code == 0 and sorted(failed.folder.rglob("*")) == before  # nothing is written
    assert lines[0].startswith("study default · 11 of 16 runs · 2 failed")
    assert any(re.match(r"ppo .* 2/2", line) for line in lines)
    assert any(
        line.startswith("failed: respond (") and line.endswith("UserError: respond was told to fail") for line in lines
    )
    assert (
        lines[-1]
        == f"nothing runs it now; to go on: salsa run '{TINY.replace(' ', chr(39) + ' ' + chr(39))}' -- --cores 4"
    )


def test_a_terminal_shows_one_picture_and_ends_with_the_answer(failed, tmp_path):
    place = failed.copy(tmp_path / "copy")
    (place.folder / "fail_respond").unlink()
    (place.folder / "hold_ppo").touch()
    overrides = [*TINY.split(), "ppo.learning_rate=1e-5"]
    terminal = Terminal(place, "run", *overrides, "--", "--cores", "4")
    terminal.wait_for(r"ppo +\S+ +0/2 +2 running")
    terminal.wait_for(r"ppo +ppo, kl_coef 0\.3, replicate 0 +0/50")
    while len(folders := unfinished(place, "ppo")) < 2:
        time.sleep(0.1)
    for folder in folders:
        row = {"iteration": 11, "score": 0.123, "kl_to_reference": 4.567, "seconds": 2.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    terminal.wait_for(r"salsa, kl_coef 0\.3, replicate 0 +12/50 +0\.123 +4\.57 +\d+:\d\d +1:16")
    code, lines = run(place, "status", *overrides)
    assert code == 0 and any(re.match(r"ppo .* 0/2 +2 running", line) for line in lines)
    assert lines[-1].startswith("run by: salsa run ") and f"process {terminal.process.pid}" in lines[-1]
    (place.folder / "hold_ppo").unlink()
    assert terminal.end() == 0, terminal.text
    last = terminal.text.rstrip().replace("\r", "").split("\n")[-4:]
    assert any(CONCLUSION in line for line in last) and "Finished jobid" not in terminal.text
    assert re.search(r"study \S+ · 16 of 16 runs · [\dmin ]+ s", terminal.text)
    assert run(place, "status", *overrides)[1][-1].startswith("finished: results/studies/default-")
    for options in (["-n"], ["--summary"], ["--unlock"], ["--list-rules"]):  # which run no job
        assert not any("beside it" in line for line in run(place, "run", *overrides, "--", *options)[1]), options
    code, lines = run(place, "run", *overrides)
    assert code == 0 and any(CONCLUSION in line for line in lines) and len(lines) < 8


def test_snakemake_s_own_words_are_there_for_who_asks(failed):
    code, lines = run(failed, "run", *TINY.split(), "--", "-n", "--cores", "2")
    assert code == 0 and "rule respond:" in lines
