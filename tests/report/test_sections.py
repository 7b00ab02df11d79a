"""Sections of a report: a file of one's own is part of every report, and one without its words ends the planning."""

import importlib
import pathlib
import sys
from types import SimpleNamespace

import jinja2
import pandas as pd
import pytest
from tree import EVIL, Tree

from salsa.report import sections
from salsa.workflow import jobs, runs

ROOT = pathlib.Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TOY = DOCS.partition("`salsa/report/sections/word_counts.py`:\n\n```python\n")[2].partition("```")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose files are sections too."""
    monkeypatch.setattr(sections, "__path__", [*sections.__path__, str(tmp_path / "own")])
    (tmp_path / "own").mkdir()
    sections.sections.cache_clear()
    importlib.invalidate_caches()
    yield tmp_path / "own"
    for name in [name for name in sys.modules if name.startswith(f"{sections.__name__}.own_")]:
        del sys.modules[name]
    sections.sections.cache_clear()


def test_a_file_of_ones_own_is_part_of_the_report(folder, tmp_path, monkeypatch):
    (folder / "own_words.py").write_text(TOY)
    tree = Tree(tmp_path, replicates=(0,), prompts=2, planes=())
    output = tree.build(monkeypatch, drawn=True)
    found = pd.read_csv(output / "tables" / "word_counts.csv").set_index("arm")["words"]
    assert found["ppo"] == len(f"a ppo story | {EVIL}".split())
    assert {"word_counts.md", "word_counts.tex"} <= {path.name for path in (output / "tables").iterdir()}
    assert (output / "figures" / "word_counts.png").stat().st_size > 1000
    report, page = ((output / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    assert report.index("### Lengths and ends") < report.index("### Word counts") < report.index("## The space of")
    assert (
        "words per response. Bars are means over all responses of an arm.\n\n![Word counts](figures/word_counts.png)"
        in report
    )
    assert '<article id="word_counts">' in page and "Bars are means over all responses of an arm." in page


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("    caption=lambda study, tables: f\"{words.spread(tables['word_counts']['words'])} words per response.\",\n",
         "", "own_words.py: Section.__init__() missing 1 required positional argument: 'caption'"),
        ('"Training and stability"', '""', "own_words.py: section word_counts: a section has a heading and a caption"),
        ("    table=word_counts,\n    figure=bars,\n", "", "word_counts: a section has a table, a figure or both"),
        ('name="word_counts"', 'name="word counts"', "'word counts': its name is no identifier"),
        ('name="word_counts"', 'name="frontier"', "own_words.py: another section is called frontier"),
        ("salsa.report.frames", "salsa.report.fames", "own_words.py: No module named 'salsa.report.fames'"),
    ],
)  # fmt: skip
def test_one_with_a_fault_ends_the_planning(folder, old, new, said):
    assert TOY.count(old) == 1
    (folder / "own_words.py").write_text(TOY.replace(old, new))
    with pytest.raises(runs.UserError) as caught:
        jobs.check_sections()
    assert said in str(caught.value) and str(caught.value).startswith("salsa/report/sections/")


def test_the_order_of_the_report():
    found = sections.sections()
    headings = list(dict.fromkeys(section.heading for section in found.values()))
    assert headings == list(sections.HEADINGS)
    assert list(found)[-3:] == ["judges", "judge_pairs", "sources"]


def test_each_table_has_a_caption_in_snakemakes_report():
    template = jinja2.Template((ROOT / "workflow" / "report" / "tables.rst").read_text(encoding="utf-8"))
    tables = [name for name, section in sections.sections().items() if section.table] + ["comparison", "against_ppo"]
    for table in tables:
        snakemake = SimpleNamespace(wildcards=SimpleNamespace(table=table))
        assert template.render(snakemake=snakemake).strip() not in ("", table)
        assert "their chosen kl_coefs" not in template.render(snakemake=snakemake)
