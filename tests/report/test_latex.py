"""The tables as LaTeX: pdflatex sets all of them, in one document, as they were written."""

import shutil
import subprocess

import pytest
from tree import LengthGold, Tree

from salsa.report import formats, sections, study
from salsa.workflow import runs

NAME = r"a_b 50 % & #1 $x$ {y} ~ ^ \z"
SIGNS = "KL(p ‖ q) ½ ¾ α β √KL ≤ ≥ − ± × → …"
DOCUMENT = r"""\documentclass{{article}}
\usepackage[utf8]{{inputenc}}
\usepackage[T1]{{fontenc}}
\usepackage{{booktabs,graphicx,longtable}}
\begin{{document}}
{}
\end{{document}}
"""


def nasty(rows):
    return formats.Table([NAME, SIGNS], [[f"{NAME} {i}", SIGNS] for i in range(rows)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every table of a study, and two of names and signs that LaTeX would read as its own."""
    tree = Tree(tmp_path_factory.mktemp("latex"), judges=("gold", "vader"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(study, "gold_judge", lambda prepare: LengthGold())
        found, output = study.read(tree.settings, tree.parents), tree.root / "study"
    frames = sections.tables_of(found)
    for name, frame in frames.items():
        section = sections.sections()[name]
        formats.write(frame, section.shown(frame), output / "tables", name, section.caption(found, frames))
    for name, rows in {"nasty": 3, "long": formats.LONGEST + 1}.items():
        runs.write_atomically(output / "tables" / f"{name}.tex", formats.latex(nasty(rows), name, f"{NAME} {SIGNS}"))
    return output / "tables"


def test_every_table_compiles(folder):
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-base, texlive-latex-recommended)")
    names = sorted(path.stem for path in folder.glob("*.tex"))
    assert {"nasty", "long", "arms", "claims", "win_rates", "paper_table", "sources"} <= set(names)
    document = DOCUMENT.format("\n\\clearpage\n".join(rf"\input{{{name}}}" for name in names))
    (folder / "all_tables.ltx").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all_tables.ltx"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300)
    log = (folder / "all_tables.log").read_text(encoding="utf-8", errors="replace")
    problems = [line for line in log.splitlines() if line.startswith("!") or "not set up" in line]
    assert done.returncode == 0 and problems == [], problems
    assert "Missing character" not in log


def test_a_wide_table_is_fitted_and_a_long_one_goes_on(folder):
    short, long = ((folder / f"{name}.tex").read_text(encoding="utf-8") for name in ("nasty", "long"))
    assert short.count(r"\resizebox") == 1 and r"\begin{table}[htbp]" in short and short.startswith("% \\usepackage")
    assert r"\begin{longtable}" in long and r"\resizebox" not in long and r"\begin{table}" not in long


def test_signs_and_names_are_escaped(folder):
    text = (folder / "nasty.tex").read_text(encoding="utf-8")
    assert not set(text) - set(map(chr, range(128)))
    escaped = r"a\_b 50 \% \& \#1 \$x\$ \{y\}"
    assert text.count(escaped) == 1 + 1 + 3  # caption, header, rows
    assert r"KL(p $\|$ q) $\frac{1}{2}$" in text and r"$\surd$KL" in text
