"""Registered files: what git knows of them, when the first run started, and what an override has changed."""

import dataclasses
import subprocess
from types import SimpleNamespace

import pytest

from salsa.report import provenance
from salsa.workflow import compose, runs, stages

BEFORE, FIRST, AFTER = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"
CLAIMS = "conf/claims.yaml"


def git(folder, *arguments, date=BEFORE):
    identity = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date, "HOME": str(folder), "PATH": "/usr/bin:/bin"}
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *names, *arguments], cwd=folder, env=identity, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one committed file, which stands in the place of the project's."""
    (tmp_path / "conf").mkdir()
    (tmp_path / CLAIMS).write_text("claims: {}\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", CLAIMS)
    git(tmp_path, "commit", "-qm", "Register")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    return tmp_path


def study(overrides=(), files=(CLAIMS,)):
    """A study as provenance sees it, whose runs of policies started on two days."""
    config = compose.compose(list(overrides))[0].config
    rows = [{"stage": "ppo", "started": AFTER}, {"stage": "ppo", "started": FIRST}, {"stage": "sft", "started": BEFORE}]
    return SimpleNamespace(config=dataclasses.replace(config, registered=list(files)), runs=rows)


def test_committed_before_the_first_run(repository):
    own = study()
    opening, sentence, same = provenance.sentences(own)
    assert opening == f"Registered in 1 file; the first run started {FIRST}."
    digest = runs.file_sha256(repository / CLAIMS)
    assert sentence.startswith(f"{CLAIMS} (sha256 {digest[:12]}): committed before the first run (commit ")
    assert f" of {BEFORE})." in sentence
    assert same == "The study's claims, kl_coefs and looks are those of these files."


def test_committed_after_the_first_run(repository):
    (repository / CLAIMS).write_text("claims: {}  # other\n")
    git(repository, "commit", "-qam", "Change", date=AFTER)
    assert ": NOT committed before the first run (commit " in provenance.sentences(study())[1]


def test_changed_since_it_was_committed(repository):
    (repository / CLAIMS).write_text("claims: {}  # other\n")
    assert "NOT committed before the first run, for it was changed after commit " in provenance.sentences(study())[1]


def test_never_committed(repository):
    (repository / "conf" / "new.yaml").write_text("looks: []\n")
    sentence = provenance.sentences(study(files=["conf/new.yaml"]))[1]
    assert sentence.endswith("or nothing was committed.") and provenance.UNKNOWN in sentence


def test_without_a_repository_or_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.UNKNOWN in provenance.sentences(study())[1]


def test_a_file_that_is_gone(repository):
    assert provenance.sentences(study(files=["conf/gone.yaml"]))[1] == "conf/gone.yaml: there is no such file any more."


@pytest.mark.parametrize(
    "overrides, differing",
    [(["kl_coefs=[0.05,0.1]"], "kl_coefs"), (["claims.stable.smallest_effect=0.4", "claim_kl_coef=0.05"],
                                             "claims, claim_kl_coef")],
)  # fmt: skip
def test_overrides_of_what_was_registered_are_said(repository, overrides, differing):
    last = provenance.sentences(study(overrides))[-1]
    assert last == f"The study differs from these files in {differing}: overrides have changed what they say."


def test_an_experiment_is_composed_by_its_file(repository):
    files = [CLAIMS, "conf/experiment/reviews.yaml"]
    own = study(["experiment=reviews"], files)
    assert provenance.sentences(own)[-1] == "The study's claims, kl_coefs and looks are those of these files."


def test_nothing_is_said_where_nothing_is_registered(repository):
    assert provenance.sentences(study(files=())) == []
