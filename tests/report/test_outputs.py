"""The same study gives the same files, whatever the hash seed, language, time zone and a user's matplotlibrc are."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from tree import Tree

from salsa.report import study, style
from salsa.report.sections import sections

ROOT = Path(__file__).parents[2]
SETTINGS = (
    {"text.usetex": True}, {"savefig.bbox": "tight"}, {"font.family": "serif"}, {"axes.unicode_minus": False},
    {"savefig.dpi": 20}, {"axes.prop_cycle": matplotlib.cycler("color", ["r"])}, {"figure.facecolor": "black"},
    {"lines.marker": "o"}, {"axes.formatter.use_locale": True}, {"savefig.format": "svg"}, {"path.simplify": False},
    {"axes.xmargin": 0.5}, {"mathtext.fontset": "cm"}, {"figure.autolayout": True}, {"pdf.compression": 0},
)  # fmt: skip


class Uneven(Tree):
    """Gold and rewards whose sums hang, in their last digits, on the order in which they are added."""

    def rows(self, model, reward, gold, text):
        found = super().rows(model, reward, gold, text)
        return [row | {"gold": row["gold"] + math.sin(7 * i + gold), "reward": row["reward"] + math.cos(i * gold + i)}
                for i, row in enumerate(found)]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    made = Uneven(tmp_path_factory.mktemp("small"), replicates=(0, 1), arms={"ppo": "0", "salsa": "0.5"}, prompts=30,
                iterations=6, benchmarks=("in_distribution",), planes=())  # fmt: skip
    made.settings.config["report"] |= {"bootstrap": 40}
    return made


def started(tree, place, seed, drawn=False, **environment):
    place.mkdir()
    told = {"settings": vars(tree.settings), "parents": {role: str(path) for role, path in tree.parents.items()}}
    (place / "tree.json").write_text(json.dumps(told), encoding="utf-8")
    words = [sys.executable, str(ROOT / "tests/report/outputs.py"), "tree.json", "out", *["--figures"] * drawn]
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def files(process):
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode(errors="replace")
    return json.loads(out)


def test_hash_seeds_and_foreign_surroundings(tree, tmp_path):
    plain = files(started(tree, tmp_path / "plain", 0, drawn=True))
    assert {"study/figures/frontier.png", "comparison/figures/comparison.pdf"} <= set(plain)
    hostile = tmp_path / "hostile.rc"
    hostile.write_text("text.usetex: True\naxes.formatter.use_locale: True\nsavefig.bbox: tight\n", encoding="utf-8")
    odd = {"MATPLOTLIBRC": str(hostile), "MPLBACKEND": "TkAgg", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "C",
           "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}  # fmt: skip
    process = started(tree, tmp_path / "odd", 5, drawn=True, **odd)
    assert files(process) == plain
    tables = {name: digest for name, digest in plain.items() if "figures" not in name and "report.html" not in name}
    for seed in (1, 2):
        found = files(started(tree, tmp_path / str(seed), seed))
        assert {name: found[name] for name in tables} == tables


def test_a_matplotlibrc_that_is_no_utf8_ends_nothing(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes("# Schriftgröße\nfont.size: 30\n".encode("latin-1"))
    code = "import salsa.report, matplotlib; assert matplotlib.rcParams['font.size'] == 10"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "no such backend"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.fixture(scope="module")
def found(tree):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
        return study.read(tree.settings, tree.parents)


def drawn(found, folder):
    style.save(sections()["loss_line"].draw(found, {}), folder, "loss_line")
    return [(folder / f"loss_line.{kind}").read_bytes() for kind in ("png", "pdf")]


def test_no_setting_of_the_user_changes_a_figure(found, tmp_path):
    plain = drawn(found, tmp_path / "plain")
    everything = {key: value for setting in SETTINGS for key, value in setting.items()}
    with matplotlib.rc_context(everything):
        assert drawn(found, tmp_path / "all") == plain
        assert matplotlib.rcParams["text.usetex"]  # the user's settings are as they were
    assert matplotlib.rcParams["font.size"] == 10


def test_dollar_signs_are_text(found, tmp_path):
    with style.own_style():
        figure = style.blank(3, 1)
        figure.text(0.5, 0.5, r"$\frac{1}{0}$ and $\badmacro$")
    style.save(figure, tmp_path, "odd")  # as mathematics, it would end in a ValueError
