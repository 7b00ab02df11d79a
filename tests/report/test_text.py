"""Text that people and models wrote: it stays text in Markdown, CSV, LaTeX, model cards, figures and the page."""

import csv
import io
import json
import re
import shutil
import subprocess
import unicodedata

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tree import Tree

from salsa.report import formats, study, style, words
from salsa.workflow import config

TURNED = "\u202egnp.\u202c\u2066x\u2069\u200e\u200f\u061c"
HIDDEN = "\x00\x07\x1b[31m\x7f\x85\u200b\ufeff\U000e0041\ud800"
EVIL = f"=cmd|' /C calc'!A0 {TURNED}{HIDDEN}\nsecond | line <script>alert(1)</script> [x](javascript:1) `$y$` _a_ **b**"


def is_clean(text):
    return not any(
        (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in words.TURNS + words.UNSEEN for c in text
    )


class Evil(Tree):
    """A study whose title, arms, claims, prompts, responses and model's path are EVIL; other names are letters."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        told, described = self.settings.config, {"description": f"first line\nsecond | {EVIL}"}
        claimed = {"text": f"+{EVIL}", "meaning": EVIL}
        told["title"] = EVIL
        told["arms"] = {name: arm | described for name, arm in told["arms"].items()}
        told["claims"] = {name: claim | claimed for name, claim in told["claims"].items()}
        told["model"] |= {"source": "hub", "path": words.plain(EVIL).split("\n")[-1]}

    def rows(self, model, reward, gold, text):
        return [row | {"prompt": [EVIL], "responses": [EVIL]} for row in super().rows(model, reward, gold, text)]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Evil(tmp_path_factory.mktemp("evil"), replicates=(0,), prompts=3, arms={"ppo": "0", "salsa": "0.5"},
                    benchmarks=("in_distribution",), planes=())  # fmt: skip
        tree.settings.config["report"] |= {"bootstrap": 40}
        monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
        monkeypatch.setattr(style, "save", lambda figure, folder, name: tree.figures.update({name: figure}))
        made = tree.root / "study"  # not as a run: half a surrogate pair has no address
        study.build(tree.settings, tree.parents, made, config.Execution())
    return tree, made


def texts(folder):
    return {path: path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (
        ".md", ".csv", ".tex", ".html")}  # fmt: skip


def test_nothing_hidden_survives(output):
    tree, folder = output
    found = texts(folder)
    assert len(found) > 50
    for path, text in found.items():
        assert is_clean(text), path
    for figure in tree.figures.values():
        assert all(is_clean(text.get_text()) for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_no_table_of_markdown_is_broken(output):
    _, folder = output
    for path, text in texts(folder).items():
        if path.suffix != ".md":
            continue
        assert "<script" not in text and "[x](" not in text and "**b**" not in text, path
        for block in re.split(r"\n(?!\|)", text):
            rows = [line for line in block.split("\n") if line.startswith("| ")]
            assert len({row.replace("\\|", "").count("|") for row in rows}) <= 1, (path, rows)
    assert "first line second &#124; =cmd&#124;" in (folder / "tables" / "arms.md").read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# =cmd&#124;' /C calc'!A0 gnp.x[31m".replace(
        "[", "&#91;"))  # fmt: skip


def test_no_cell_of_a_csv_is_a_formula(output):
    _, folder = output
    for path, text in texts(folder).items():
        if path.suffix == ".csv":
            rows = list(csv.reader(io.StringIO(text)))
            assert len(rows) == len(text.splitlines()), path
            for cell in (cell for row in rows for cell in row):
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")) or formats._is_number(cell), (path, cell)
    claims = pd.read_csv(folder / "tables" / "claims.csv")
    assert claims["text"].str.startswith("'+=cmd").all()
    rates = pd.read_csv(folder / "tables" / "win_rates.csv")
    assert rates["adjusted_win_rate"].dtype == float


def test_numbers_of_a_csv_stay_numbers(tmp_path):
    frame = pd.DataFrame({"a": ["-1", "+2e5", "-inf", "-x", "=1", "@a", " =1"], "b": [-1.5, 2, 3, 4, 5, 6, -7]})
    formats.write_csv(frame, tmp_path / "t.csv")
    found = pd.read_csv(tmp_path / "t.csv", dtype={"a": str}, keep_default_na=False)
    assert found["a"].tolist() == ["-1", "+2e5", "-inf", "'-x", "'=1", "'@a", "' =1"]
    assert found["b"].tolist() == [-1.5, 2, 3, 4, 5, 6, -7]
    formats.write_csv(frame.rename(columns={"a": "=a\n"}), tmp_path / "t.csv")
    assert list(pd.read_csv(tmp_path / "t.csv")) == ["'=a", "b"]


def test_front_matter_of_a_card_is_the_cards_own(output):
    _, folder = output
    for path in (folder / "cards").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        _, head, body = re.split(r"(?m)^---\n", text, maxsplit=2)
        known = {"language", "library_name", "pipeline_tag", "tags", "base_model", "license", "datasets", "model-index"}
        assert set(yaml.safe_load(head)) <= known
        assert "\n# ppo, kl_coef" in body or "\n# salsa, kl_coef" in body
        assert "<script" not in body


def test_the_page_shows_text(output):
    _, folder = output
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and page.count("<script") == 2
    data = json.loads(page.split('id="reader-data">')[1].split("</script>")[0])
    shown = data["responses"][0][0][0][0][0][0]
    assert shown == words.plain(EVIL) and "\nsecond | line <script>" in shown


def test_latex_of_text_compiles(output, tmp_path):
    _, folder = output
    cells = [
        ["[2pt] x", "\\input{x}"],
        ["*", "100%"],
        ["中文 é <b> \u202eé\n2", "a_b^2"],
        [EVIL.replace("\ud800", ""), "$x$"],
    ]
    table = formats.Table(["a", "b"], cells)
    (tmp_path / "odd.tex").write_text(formats.latex(table, "odd", EVIL), encoding="utf-8")
    text = (tmp_path / "odd.tex").read_text(encoding="utf-8")
    assert "[U+4E2D][U+6587]" in text and "{}[2pt]" in text and "{}*" in text and "\\input" not in text
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    for name in ("arms", "claims", "win_rates"):
        shutil.copy(folder / "tables" / f"{name}.tex", tmp_path)
    lines = [r"\documentclass{article}", r"\usepackage[T1]{fontenc}", r"\usepackage{booktabs,graphicx,longtable}"]
    lines += [r"\begin{document}", *(rf"\input{{{name}}}" for name in ("odd", "arms", "claims", "win_rates"))]
    document = "\n".join([*lines, r"\end{document}"])
    (tmp_path / "all.ltx").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.ltx"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=100).returncode == 0


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_plain_text(text):
    found = words.plain(text)
    found.encode()
    assert is_clean(found) and words.plain(found) == found
    cell = words.markdown(text)
    assert "\n" not in cell and not set("<>|*`[]~$\\") & set(cell)
    assert not re.search(r"(?<![^\W_])_|_(?![^\W_])", cell)


def test_text_that_is_only_text_stays_as_it_is():
    for text in ("Schöne Grüße", "中文", "🙂", "👩‍🚀", "a_b", "5 < 6", "‖ ½ ×", "שלום", "é"):
        assert words.plain(text) == text
    assert words.plain("a\r\nb\rc\u2028d") == "a\nb\nc\nd"
    cells = ["in_distribution", formats.number(0.5, 0.4, 0.6), formats.Bold("-1 [-2, 0]"), "0.5 [0.4]", "**x**"]
    assert formats.markdown(formats.Table(["x"], [[cell] for cell in cells])).split("\n")[2:] == [
        "| in_distribution |",
        "| 0.5 [0.4, 0.6] |",
        "| **-1 [-2, 0]** |",
        "| 0.5 &#91;0.4&#93; |",
        "| &#42;&#42;x&#42;&#42; |",
    ]
