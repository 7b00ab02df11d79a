"""What is drawn of a study's progress, on terminals of several widths, and what is said of it in plain lines."""

import io
import re

import pytest
from rich.console import Console
from test_progress import begin, finish, of, planned

from salsa.workflow import progress, screen, status
from salsa.workflow.progress import DONE, RUNNING, WAITING, Picture, RunProgress

POLICY = RunProgress(
    "ppo/a", "ppo", "strong_soup, kl_coef 0.3, replicate 1", RUNNING, 41.2, 15.0, 31, 50, 1.2345, 3.401
)
RUNS = [
    RunProgress("corpus/a", "corpus", "stories", DONE, 5.0),
    POLICY,
    RunProgress("reward_model/a", "reward_model", "replicate 2", RUNNING, 3.0, 100.0),
    RunProgress("ppo/b", "ppo", "salsa, kl_coef 0.3, replicate 2", WAITING),
]
PICTURE = Picture(RUNS, 130.0, ["judge"])


def printed(renderable, width):
    console = Console(width=width, height=50, record=True, file=io.StringIO(), force_terminal=True)
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_picture_fits_and_says_what_runs(width):
    text = printed(screen.drawn(PICTURE, "study default", 65.0), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and len(lines) == 1 + 3 + 1 + 3 + (width < 100)
    assert lines[0].rstrip() == "study default · 1 of 4 runs · 1 min 05 s · about 2 min to go, not counting judge"
    place = next(place for place, line in enumerate(lines) if "strong_soup" in line)
    cells = " ".join(lines[place].split())
    if width < 100:  # a long name is wrapped, so that nothing of it is lost
        assert cells == "ppo strong_soup, kl_coef 0.3, 31/50 1.23 3.4 0:41 0:15" and "replicate 1" in lines[place + 1]
    else:
        assert cells == "ppo strong_soup, kl_coef 0.3, replicate 1 31/50 1.23 3.4 0:41 0:15"
    assert re.search(r"ppo +.* 0/2 +1 running *\n", text) and re.search("corpus .* 1/1", text)


def test_many_running_runs_are_counted():
    text = printed(screen.drawn(Picture([POLICY] * 20, None), "study default", most=12), 100)
    assert text.count("strong_soup") == 12 and "… and 8 more" in text and "to go\n" not in text.splitlines()[0]


def test_without_training_there_are_no_columns_of_it():
    text = printed(screen.drawn(Picture([RUNS[2]], 1.0), "study default"), 80)
    assert "iteration" not in text and "replicate 2" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min"), (180000, "2 d 2 h")],
)
def test_durations_in_words(seconds, words):
    assert screen.duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "less than a minute"),
        (70, "about a minute"),
        (90, "about 2 min"),
        (5400, "about 1.5 h"),
        (36000, "about 10 h"),
    ],
)
def test_estimates_in_words(seconds, words):
    assert screen.estimate(seconds) == words


def test_plain_lines_say_when_a_job_starts_and_ends(tmp_path):
    study = planned(tmp_path)
    stream = io.StringIO()
    reporter = screen.Reporter(stream)
    reporter.started("corpus/x")  # before the study is known
    reporter.begin(study, progress.Session("salsa run", "here", 1, 0.0, 2))
    (corpus,) = of(study, "corpus")
    reporter.started(corpus)
    finish(study, corpus)
    reporter.finished(corpus)
    begin(study, of(study, "ppo")[0], "Traceback\nUserError: no room\n")
    reporter.started(of(study, "ppo")[0])
    reporter.failed(of(study, "ppo")[0])
    reporter.end()
    reporter.end()  # Snakemake closes more than once
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in stream.getvalue().splitlines()]
    name = of(study, "ppo")[0]
    assert lines == [
        f"study {study.studies[0]['name']} · 0 of {len(study.runs)} runs",
        "corpus (stories): started",
        f"corpus (stories): done in 0 s (1 of {len(study.runs)})",
        "ppo (ppo, kl_coef 0.3, replicate 0): started",
        f"ppo (ppo, kl_coef 0.3, replicate 0): failed: UserError: no room ({tmp_path}/{name}/log.txt)",
        f"study {study.studies[0]['name']} · 1 of {len(study.runs)} runs · 1 failed · 0 s",
    ]


def test_what_gates_print_in_this_try_is_said(tmp_path):
    study = planned(tmp_path)
    stream = io.StringIO()
    reporter = screen.Reporter(stream)
    reporter.begin(study, progress.Session("salsa run", "here", 1, 0.0, 2))
    (gates, _) = of(study, "gates")
    folder = begin(study, gates, "")
    (folder / ".log.txt").write_text("an earlier try\n")
    reporter.started(gates)
    with open(folder / ".log.txt", "a") as file:
        file.write("gates of it: sound\n")
    reporter.finished(gates)
    assert "gates of it: sound" in stream.getvalue() and "an earlier try" not in stream.getvalue()


def words(study, overrides=()):
    session, lives = progress.session_of(study)
    return list(status.lines(study, progress.Watch(study).look(), session, lives, overrides))


def test_status_names_what_failed_and_the_command_that_goes_on(tmp_path):
    study = planned(tmp_path)
    overrides = [f"results={tmp_path}", "kl_coefs=[0.3]"]
    assert words(study, overrides) == [
        f"nothing of it was run; to start: salsa run results={tmp_path} 'kl_coefs=[0.3]'"
    ]
    finish(study, of(study, "corpus")[0])
    for path in of(study, "sft"):
        begin(study, path, "UserError: no room\n")
    begin(study, of(study, "base")[0], "base: 14%|")
    failed, log, stopped, then = words(study, overrides)
    assert re.fullmatch(r"failed: (sft \(sft\d, replicate \d\)(, )?){3} and 1 more: UserError: no room", failed)
    assert log.startswith(f"  log: {tmp_path}/sft/") and stopped == "stopped while they ran: base (tiny-stories)"
    assert then == f"nothing runs it now; to go on: salsa run results={tmp_path} 'kl_coefs=[0.3]'"


def test_status_says_who_runs_a_study_and_where_a_finished_one_is(tmp_path):
    study = planned(tmp_path)
    study.save()
    progress.hold_session(study, "salsa run kl_coefs=[0.3] -- --cores 2", 2)
    assert words(study)[-1].startswith("run by: salsa run kl_coefs=[0.3] -- --cores 2 (process ")
    while progress._held:
        progress._held.pop().close()
    finish(study, of(study, "corpus")[0])
    assert words(study)[-1] == "nothing runs it now; to go on: salsa run kl_coefs=[0.3] -- --cores 2"
    for path in study.runs:
        finish(study, path)
    assert words(study) == [f"finished: {tmp_path}/{study.studies[0]['path']}"]
