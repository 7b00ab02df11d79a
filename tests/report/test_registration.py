"""Registered files: what git knows of them, when the first run started, and what an override has changed."""

import dataclasses
import subprocess
from types import SimpleNamespace

import pytest

from salsa.report import provenance
from salsa.workflow import compose, config, plan, runs, schema

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
    monkeypatch.setattr("salsa.workflow.repository.ROOT", tmp_path)
    return tmp_path


def study(overrides=(), files=(CLAIMS,), commit=None):
    """A study as provenance sees it, whose landscape was the first run that counts."""
    chosen = any(override.startswith(("experiment=", "arm=")) for override in overrides)
    composed = compose.compose([*([] if chosen else ["arm=[ppo,salsa]"]), *overrides])[0].config
    rows = [row("ppo", AFTER, "salsa"), row("landscape", FIRST, None, commit), row("sft", BEFORE), row("ppo", None)]
    return SimpleNamespace(config=dataclasses.replace(composed, registered=list(files)), runs=rows)


def row(stage, started, arm=None, commit=None):
    return {"stage": stage, "started": started, "arm": arm, "git_commit": commit}


def sentences(*arguments, **options):
    return provenance.registration(study(*arguments, **options)).sentences


def test_committed_before_the_first_run(repository):
    registration = provenance.registration(study())
    opening, sentence, same, _ = registration.sentences
    assert opening == f"Registered in 1 file; the first run started {FIRST}."
    digest = runs.file_sha256(repository / CLAIMS)
    assert sentence.startswith(f"{CLAIMS} (sha256 {digest[:12]}): committed before the first run (commit ")
    assert f" of {BEFORE})." in sentence
    assert same == "The study's settings are those of these files." and registration.in_advance


def test_committed_after_the_first_run(repository):
    (repository / CLAIMS).write_text("claims: {}  # other\n")
    git(repository, "commit", "-qam", "Change", date=AFTER)
    registration = provenance.registration(study())
    assert ": NOT committed before the first run (commit " in registration.sentences[1]
    assert not registration.in_advance


def test_changed_since_it_was_committed(repository):
    (repository / CLAIMS).write_text("claims: {}  # other\n")
    registration = provenance.registration(study())
    assert "NOT committed before the first run, for it was changed after commit " in registration.sentences[1]
    assert not registration.in_advance


def test_never_committed(repository):
    (repository / "conf" / "new.yaml").write_text("looks: []\n")
    registration = provenance.registration(study(files=["conf/new.yaml"]))
    sentence = registration.sentences[1]
    assert sentence.endswith("or nothing was committed.") and provenance.UNKNOWN in sentence
    assert not registration.in_advance


def test_without_a_repository_or_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.UNKNOWN in sentences()[1]
    assert sentences()[-1] == "By which commit of the code the verdicts are decided is not known."


def test_a_file_that_is_gone(repository):
    assert sentences(files=["conf/gone.yaml"])[1] == "conf/gone.yaml: there is no such file any more."


def test_no_run_says_when_it_started(repository):
    own = study()
    own.runs = [row("ppo", None, "salsa")]
    registration = provenance.registration(own)
    assert registration.sentences[0].endswith("when the first run started is not known.")
    assert "whether that was before the first run is not known" in registration.sentences[1]
    assert not registration.in_advance


def test_every_run_of_a_policy_counts_as_a_first_run():
    rows = [row("ppo", AFTER, "salsa"), row("mix", FIRST, "warp"), row("sft", BEFORE), row("mix", BEFORE)]
    assert provenance.first_run(SimpleNamespace(runs=rows)) == rows[1]
    assert provenance.first_run(SimpleNamespace(runs=rows[2:])) == {}


@pytest.mark.parametrize(
    "overrides, differing",
    [(["kl_coefs=[0.05,0.1]"], "kl_coefs"), (["claims.stable.smallest_effect=0.4", "claim_kl_coef=0.3"],
                                             "claims, claim_kl_coef")],
)  # fmt: skip
def test_overrides_of_what_was_registered_are_said(repository, overrides, differing):
    registration = provenance.registration(study(overrides))
    assert registration.sentences[2] == f"The study differs from these files in {differing}."
    assert not registration.in_advance


def test_claims_of_an_arms_file_are_registered_with_that_file(repository):
    assert provenance.differing(study(["arm=[ppo,salsa]"]).config) == []
    arm = "conf/arm/strong_soup.yaml"  # names itself the positive control
    assert provenance.differing(study(["arm=[ppo,salsa,strong_soup]"]).config) == ["claims"]
    assert provenance.differing(study(["arm=[ppo,salsa,strong_soup]"], [CLAIMS, arm]).config) == []


REVIEWS = [CLAIMS, "conf/experiment/reviews.yaml"]


def test_an_experiment_is_composed_by_its_file(repository):
    own = study(["experiment=reviews", "name=other", "title=Other", "results=elsewhere", "report.samples=1"], REVIEWS)
    assert provenance.registration(own).sentences[3] == "The study's settings are those of these files."


def test_every_setting_of_an_experiment_is_registered(repository):
    own = study(["experiment=reviews", "ppo.iterations=7", "evaluate.samples=3", "seed=5"], REVIEWS)
    assert provenance.differing(own.config) == ["seed", "evaluate.samples", "ppo.iterations"]


def test_many_settings_are_counted(repository):
    names = "The study differs from these files in a, b, c, d, e, f and 2 more."
    assert provenance.registration(study()).differing == []
    assert provenance._difference(SimpleNamespace(differing=list("abcdefgh"))) == names


@pytest.mark.parametrize("experiment", ["decisive", "reviews"])
def test_what_a_study_keeps_of_its_configuration_is_what_was_registered(experiment):
    """A planned study holds neither sections that no arm reads nor paths, and at a look only its first replicates."""
    planned = plan.plan(compose.compose([f"experiment={experiment}"]))
    for each in planned.studies:
        for path in each["looks"]:
            kept = schema.from_dict(config.Config, planned.runs[path].settings["config"])
            kept.registered = [CLAIMS, f"conf/experiment/{experiment}.yaml"]
            assert list(provenance.differing(kept)) == []


def test_replicates_that_are_no_look_differ():
    files = [CLAIMS, "conf/experiment/decisive.yaml"]
    own = study(["experiment=decisive", "replicates=[0,1,2,3,4,5,6,7,8,9]", "looks=[8,10]"], files).config
    assert {"replicates", "looks"} <= set(provenance.differing(own))


# The code that decides.


@pytest.fixture
def code(repository, monkeypatch):
    """The repository with code that decides in its first commit; yields what tells its last commit."""
    for folder in provenance.DECIDING:
        (repository / folder).mkdir(parents=True)
        (repository / folder / "a.py").write_text("a\n")
    git(repository, "add", "salsa")
    git(repository, "commit", "-qm", "Decide")
    monkeypatch.setattr(runs, "git_commit", lambda: head(repository))
    return repository


def head(repository):
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()


def test_code_that_has_not_changed_since_the_first_run(code):
    first = head(code)
    (code / "README.md").write_text("a\n")
    git(code, "add", "README.md")
    git(code, "commit", "-qm", "Say more")
    assert sentences(commit=first)[-1] == (
        f"The verdicts are decided by the code of commit {head(code)[:12]}; since that of the first run "
        f"({first[:12]}), neither salsa/report nor salsa/evaluate has changed."
    )


def test_code_that_has_changed_since_the_first_run(code, monkeypatch):
    first = head(code)
    (code / "salsa" / "report" / "a.py").write_text("b\n")
    git(code, "commit", "-qam", "Decide otherwise")
    last = sentences(commit=first + "-dirty")[-1]
    assert f"({first[:12]} with uncommitted changes), 1 commit changed salsa/report or salsa/evaluate." in last
    now = head(code)
    monkeypatch.setattr(runs, "git_commit", lambda: f"{now}-dirty")
    assert f"{now[:12]} with uncommitted changes; since" in sentences(commit=first)[-1]


def test_a_first_run_of_an_unknown_commit(code):
    for commit in (None, "0" * 40):
        assert sentences(commit=commit)[-1].endswith("has changed since the first run is not known.")


def test_nothing_is_said_where_nothing_is_registered(repository):
    registration = provenance.registration(study(files=()))
    assert registration.sentences == [] and not registration.in_advance
