"""A new kind of thing is one file and one preset: those of docs/extending.md, in a copy of the checkout."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from checkout import ROOT, tracked
from test_study import SMALL

from salsa import anchors, data, judges
from salsa.algorithms import policy_gradient
from salsa.report import sections

WHOLE_FILE = re.compile(r"`((?:salsa|conf)/[\w/]+\.\w+)`:\n\n```\w+\n(.*?)```", re.DOTALL)
DOCS = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(WHOLE_FILE.findall(DOCS))
CHOSEN = [
    "arm=[ppo,trimmed,reinforce]",
    "benchmark=[in_distribution,sums]",
    "judge=[gold,concise]",
]
TINY = [
    *(override for override in SMALL if not override.startswith(("arm=", "dpo."))),
    "reward_model.pairs=64",
    "reinforce.iterations=2",
    "reinforce.batch_size=8",
    "reinforce.rollouts_every=1",
    "benchmarks.in_distribution.prompts=6",
    "benchmarks.sums.prompts=6",
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the checkout to which the files of the docs are added."""
    folder = tmp_path_factory.mktemp("house") / "checkout"
    for name in tracked():
        if not name.startswith(("results/", "tests/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for name, text in FILES.items():
        assert not (folder / name).exists(), f"docs/extending.md adds {name}, which is there"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def salsa(house, *arguments, timeout=120):
    environment = os.environ | {"PYTHONPATH": str(house), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "salsa", *arguments]
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=timeout)


def test_a_study_with_a_new_kind_of_each_thing(house, tmp_path):
    done = salsa(
        house,
        *("run", f"results={tmp_path / 'results'}", *CHOSEN, *TINY),
        *("--", "--cores", "2", "--directory", str(tmp_path)),
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (study,) = (path for path in (tmp_path / "results" / "studies").iterdir() if not path.is_symlink())
    tables = {path.stem: pd.read_csv(path) for path in (study / "tables").glob("*.csv")}

    arms = tables["arms"].set_index("arm")
    assert arms["reference"]["trimmed"] == "sft0 with 10% of the weights of 1/2 sft0 + 1/2 sft1"
    assert arms["algorithm"].to_dict() == {"ppo": "PPO", "trimmed": "PPO", "reinforce": "REINFORCE"}
    (card,) = (path.read_text(encoding="utf-8") for path in (study / "cards").glob("reinforce-*"))
    assert "A policy that REINFORCE trained in the study" in card and "PPO trained" not in card
    final = tables["frontier"].query("iteration == 2")
    assert set(final["arm"]) == {"ppo", "trimmed", "reinforce"} and final["gold_reward"].notna().all()
    pairs = {(row.judge, row.candidate, row.baseline) for row in tables["win_rates"].itertuples()}
    compared = [("ppo", "sft0"), ("trimmed", "sft0"), ("trimmed", "ppo"), ("reinforce", "sft0")]
    assert pairs == {(judge, *pair) for judge in ("gold", "concise") for pair in compared}
    assert set(tables["win_rates"]["benchmark"]) == {"in_distribution"}  # `sums` is scored alone
    assert {"gold", "concise"} <= set(tables["judges"]["judge"])
    scores = tables["scores"].set_index(["benchmark", "measure", "arm"])["score"]
    assert scores["sums", "words", "reinforce"] > 0 and ("sums", "exact", "sft0") in scores.index

    counts = tables["word_counts"].set_index("arm")["words"]
    assert set(counts.index) == {"ppo", "trimmed", "reinforce"} and counts.min() > 0
    assert (study / "figures" / "word_counts.png").stat().st_size > 1000
    page = (study / "report.html").read_text(encoding="utf-8")
    assert '<article id="word_counts">' in page and "words per response. Bars are means" in page
    check_frames(house, study)


def check_frames(house, study):
    """What `salsa.load` says of the study's policies."""
    program = "import sys, salsa; print(salsa.load(sys.argv[1]).policies[['arm', 'algorithm', 'reference']].to_csv())"
    environment = os.environ | {"PYTHONPATH": str(house)}
    command = [sys.executable, "-c", program, str(study)]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split(",")[1:]) for line in done.stdout.splitlines()[1:] if line}
    assert rows == {("ppo", "ppo", "soup"), ("trimmed", "ppo", "trimmed"), ("reinforce", "reinforce", "soup")}


@pytest.fixture
def changed(house):
    """A function that changes a file of the house for the time of a test."""
    before = {}

    def change(name, old, new):
        before[name] = text = (house / name).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (house / name).write_text(text.replace(old, new), encoding="utf-8")

    yield change
    for name, text in before.items():
        (house / name).write_text(text, encoding="utf-8")


REFERENCE, BENCHMARK, JUDGE, ALGORITHM, SECTION = (
    "salsa/anchors/trimmed.py",
    "salsa/data/benchmarks/sums.py",
    "salsa/judges/concise.py",
    "salsa/algorithms/reinforce.py",
    "salsa/report/sections/word_counts.py",
)


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        (REFERENCE, "    words=lambda", "    # lambda", f"{REFERENCE}: Reference.__init__() missing 1"),
        (REFERENCE, "{reference.kept:.0%}", "{reference.share:.0%}", "the words of kind trimmed fail ("),
        (REFERENCE, 'kind="trimmed"', 'kind="soup"', f"{REFERENCE}: its REFERENCE is of the kind 'soup'"),
        (REFERENCE, "kept: schema", "rate: schema", "salsa.anchors.ema and salsa.anchors.trimmed: both have a setting"),
        (BENCHMARK, ", score=score", "", f"{BENCHMARK}: benchmark sums: neither compared nor scored"),
        (JUDGE, ", open=open_judge", "", f"{JUDGE}: Judge.__init__() missing 1"),
        (ALGORITHM, "VERSION = 1", "REVISION = 1", f"{ALGORITHM}: has no VERSION"),
        (ALGORITHM, "    advantages=adv", "    # adv", f"{ALGORITHM}: PolicyGradient.__init__() missing 1"),
        (ALGORITHM, "    loss=loss", "    # loss", f"{ALGORITHM}: PolicyGradient.__init__() missing 1"),
        (ALGORITHM, "Settings(policy_gradient.Settings)", "Settings", f"{ALGORITHM}: algorithm reinforce: its"),
        (SECTION, "    caption=", "    # ", f"{SECTION}: Section.__init__() missing 1"),
        ("conf/arm/trimmed.yaml", "kept: 0.1", "kept: 0", "arms.trimmed.reference.kept=0: keeps nothing of the soup"),
    ],
)  # fmt: skip
def test_a_fault_in_a_file_ends_the_planning(house, changed, name, old, new, said):
    changed(name, old, new)
    done = salsa(house, "plan", *CHOSEN)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"salsa: {said}") and len(done.stderr.splitlines()) == 1


def test_settings_of_an_algorithm_that_trains_nothing_are_refused(house):
    done = salsa(house, "plan", "arm=[reinforce]", "ppo.epochs=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "salsa: ppo.epochs: no arm of this study is trained by ppo; leave it out\n"


def test_snakemake_says_a_fault_in_one_line_too(house, changed):
    changed(REFERENCE, "    words=lambda", "    # lambda")
    command = [*(sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run"), "--quiet", "all"]
    done = subprocess.run(command, cwd=house, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"salsa: {REFERENCE}: Reference" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "heading, record",
    [
        ("A kind of reference", anchors.Reference),
        ("A benchmark", data.Benchmark),
        ("A judge", judges.Judge),
        ("An algorithm", policy_gradient.PolicyGradient),
        ("A table and a figure", sections.Section),
    ],
)
def test_the_docs_explain_each_field_of_a_record(heading, record):
    text = DOCS.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = "".join(line for line in text.splitlines() if line.startswith("| `"))
    lacking = [f.name for f in dataclasses.fields(record) if f"`{f.name}`" not in table]
    assert lacking == []
