"""The package as a package index has it: the source distribution holds the checkout, and its wheel works without one.

The wheel is installed into an environment of its own, which finds the libraries of the tests' environment, but not the
checkout; it is used in an empty folder of a repository that is another project's.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import in_process
import pytest
from checkout import tracked
from test_study import SMALL, study_of

ROOT = Path(__file__).parents[2]
FEWER = [f"benchmarks.{name}.prompts=6" for name in ("in_distribution", "out_of_distribution", "two_turn")]
FEWER += [
    "registered=[conf/claims.yaml]",
    *("data.task.demonstrations=200", "data.task.evaluation=32", "data.task.prompts=64"),
    "reward_model.pairs=64",
    *(override for override in SMALL if not override.startswith("dpo.")),
]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
ALL_BUT_THE_LAST = """
import sys

sys.path.append(sys.argv[1])
import in_process

from salsa.workflow import compose, plan

made = plan.plan(compose.compose(sys.argv[2:]))
in_process.execute_all(made, lambda path, run: run.stage != "study")
"""


def checked(command, folder, **options):
    """What a command prints, which must succeed; it knows nothing of the checkout that the tests run from."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source distribution of a copy of the checkout, and the folder of what was built."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "copy" / name)
    checked([sys.executable, "-c", BUILD.format("sdist"), str(folder)], folder / "copy")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def empty(source):
    """An empty folder in another project's repository, whose environment has the wheel installed."""
    project = source.parent / "project"
    environment = project / ".venv"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))  # whose own .pth files are not read
    checked([sys.executable, "-c", BUILD.format("wheel"), str(source.parent)], source)
    (wheel,) = source.parent.glob("*.whl")
    install = [sys.executable, "-m", "pip", f"--python={environment}/bin/python", "install", "--quiet"]
    checked([*install, "--no-deps", "--no-index", str(wheel)], project)
    checked(["git", "init", "--quiet"], project)
    checked(["git", *("-c", "user.name=a"), *("-c", "user.email=a@b"), "commit", "-qm", "A", "--allow-empty"], project)
    (project / "empty").mkdir()
    return project / "empty"


def test_the_source_distribution_is_the_checkout(source):
    missing = [name for name in tracked() if not (source / name).is_file()]
    assert missing == []


def test_an_installed_wheel_makes_a_study(empty):
    salsa, python = empty.parent / ".venv" / "bin" / "salsa", empty.parent / ".venv" / "bin" / "python"
    where = checked(
        [python, "-c", "import salsa, hydra_plugins.salsa_launcher as l; print(salsa.__file__, l.__file__)"], empty
    )
    assert all(Path(path).is_relative_to(empty.parent / ".venv") for path in where.split())
    assert "reward_model" in checked([salsa, "plan", *FEWER], empty) and list(empty.iterdir()) == []

    checked([python, "-c", ALL_BUT_THE_LAST, str(Path(in_process.__file__).parent), *FEWER], empty)
    printed = checked([salsa, "run", *FEWER, "--", "--cores", "2"], empty)
    study = study_of(empty / "results")
    assert f"{study.relative_to(empty)}/report.html" in printed and (study / "report.html").is_file()
    manifest = json.loads((study / "manifest.json").read_text())
    assert manifest["git_commit"] is None and manifest["packages"]["salsa"]
    version = f"version {manifest['packages']['salsa']}"
    assert version in (study / "report.md").read_text() and version in (study / "runs.csv").read_text()
    assert checked([salsa, "verify"], empty).startswith("18 finished runs, 0 damaged")
