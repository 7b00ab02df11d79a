"""What readers open of a study: report.md, report.html, claims.md and samples.md, from the same values.

report.html is one file that opens by double click, with a reader of responses and verdicts side by side. It loads
nothing: figures are embedded, the script and the style are the project's own, and the page's content security policy
lets no other script run and no address be reached. Left out: every number, which `sections` and `claims` compute, and
what is concluded from them, which `conclusions` says.
"""

import base64
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from html import escape

import markupsafe

from salsa.evaluate import decisions
from salsa.report import claims, conclusions, formats, opening, reader, selection, words
from salsa.report.glossary import Glossary
from salsa.report.sections import claims as claims_section
from salsa.report.sections import gates, manipulation, sections, sections_of
from salsa.workflow import runs

MARKUP = {ord(character): f"&#{ord(character)};" for character in "|*_`[]~$\\#"}  # after `escape`
BREAKS = re.compile(r"(?<=\w[_/-])(?=\w)")
LONG = 40  # characters of a cell that takes a line of its own, where a table is narrow
ALONE = ("arms", "gates")  # sections with a place of their own


@dataclass(frozen=True)
class Exhibit:
    """A section of one study."""

    name: str
    title: str
    words: str
    figure: bool
    table: formats.Table | None


def write(study, tables, output, drawn):
    """Write the pages into the study's folder.

    Args:
        tables: name -> data frame.
        drawn: the names of the figures, which are in the folder already.
    """
    values = report(study, tables, drawn)
    runs.write_atomically(output / "report.md", markdown(values))
    runs.write_atomically(output / "report.html", html(study, values, output / "figures"))
    runs.write_atomically(output / "claims.md", conclusions.text(study, tables["claims"], tables["win_rates"]))
    runs.write_atomically(output / "samples.md", samples(study))


def report(study, tables, drawn):
    """The values of report.md and report.html, by their names in the templates; `drawn`: the figures' names."""
    gold = tables["gates"].dropna(subset="gold_sft0").to_dict("records")
    return {
        "title": words.title(study),
        "question": words.QUESTION,
        "answer": opening.answer(study, tables),
        "facts": facts(study),
        "sight": conclusions.sight(study, tables["claims"]),
        "summary": conclusions.summary(study, tables["claims"]),
        "manipulation": manipulation.sentence(study, tables["manipulation"]),
        "warnings": conclusions.warnings(study),
        "stated": conclusions.stated(study),
        "registered": study.registration.sentences,
        "origins": conclusions.hypotheses(study, tables["claims"]),
        "titles": claims.ORIGINS,
        "effects": conclusions.numbers(claims.tested_rows(tables["claims"])),
        "reading": claims_section.reading(study, tables) + claims_section.cut(tables["claims"]),
        "gold": gold,
        "checks": gates.listed(gates.checks(study, tables)),
        **{name: exhibit(study, tables, drawn, sections()[name]) for name in ALONE},
        "parts": parts(study, tables, drawn),
        "runs": study.runs,
        "command": words.command(study),
        "reproduction": words.reproduction(study),
    }


def facts(study):
    """What a reader needs first of a study's settings and runs: name -> text."""
    settings = words.facts(study)
    first = settings.pop("model and data")
    return {"model and data": first} | opening.facts(study) | settings


def parts(study, tables, drawn):
    """heading -> the exhibits below it; a section whose table has no rows is left out with its figure."""
    by_heading = {}
    for name, section in sections_of(study).items():
        if name not in ALONE and (name not in tables or len(tables[name])):
            by_heading.setdefault(section.heading, []).append(exhibit(study, tables, drawn, section))
    return by_heading


def exhibit(study, tables, drawn, section):
    table = section.shown(tables[section.name]) if section.table else None
    return Exhibit(section.name, section.title, section.words(study, tables), section.name in drawn, table)


def markdown(values):
    """The whole of report.md."""
    template = words.template("report.md.jinja", autoescape=False)
    return template.render(**values, markdown=formats.markdown, number=formats.number)


def html(study, values, figures):
    """The whole of report.html; `figures` is the folder of PNG files."""
    style, script = (
        markupsafe.Markup((words.TEMPLATES / f"report.{kind}").read_text("utf-8")) for kind in ("css", "js")
    )
    glossary = Glossary()
    return words.template("report.html.jinja", autoescape=True).render(
        **values | first_screen(values["origins"]) | {"runs": [run(row) for row in study.runs]},
        marked=glossary.text,
        words=lambda: glossary.marked,  # once all texts before have been marked
        without_constants=formats.without_constants,
        classes=classes,
        breakable=breakable,
        label=functools.partial(reader.label, study),
        pictures={path.stem: data_uri(path) for path in figures.glob("*.png")},
        reader=reader.embedded(reader.reader(study)),
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
    )


def first_screen(origins):
    """The claims that the first screen tells with their effects, and those that it only names."""
    listed = [claim for origin, hypotheses in origins.items() for claim in hypotheses if origin != "positive_control"]
    untested = [claim for claim in listed if claim.verdict == decisions.NOT_TESTED]
    return {"short": [claim for claim in listed if claim not in untested], "untested": untested}


def classes(cell, numeric):
    """The classes of a cell of a table in the page."""
    if isinstance(cell, formats.Verdict):
        return f"verdict-cell {cell.replace(' ', '-')}" if cell else "verdict-cell"
    return "number" if numeric else "long" if len(cell) > LONG else ""


def breakable(text):
    """A text whose long names may break after underscores, slashes and hyphens; a number stays whole."""
    return text if isinstance(text, formats.Number) else markupsafe.Markup("<wbr>").join(BREAKS.split(str(text)))


def content_hash(text):
    """The source expression of a content security policy that allows this inline text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def data_uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def run(row):
    """A row of the table of runs, as text."""
    numbers = {name: formats.number(row[name]) for name in ("wall_seconds", "peak_memory_mib", "kl_coef")}
    settings = json.dumps(json.loads(row["settings"]), indent=1, ensure_ascii=False)
    return {name: "" if value is None else str(value) for name, value in row.items()} | numbers | {"settings": settings}


def samples(study):
    """The whole of samples.md: the first prompts of each benchmark, by id, answered by sft0 and every arm."""
    replicate, count = study.replicates[0], study.config.report.samples
    answers, first = {"sft0": _by_prompt(selection.sft0_responses(study, replicate))}, {}
    for policy in study.ordered:
        if policy.replicate == replicate:
            first.setdefault(policy.arm, policy)  # at the arm's first kl_coef, with the first training seed
    for arm, policy in first.items():
        mark = selection.collapsed(study, arm, policy.kl_coef, replicate, policy.seed)
        answers[f"{arm}, kl_coef {policy.kl_coef:g}{mark}"] = _by_prompt(policy.responses)
    prompts = {key: row for rows in answers.values() for key, row in rows.items()}
    benchmarks = {
        name: sorted((row for key, row in prompts.items() if key[0] == name), key=words.natural)[:count]
        for name in study.benchmarks
    }
    return words.template("samples.md.jinja", autoescape=False).render(
        count=count, replicate=replicate, benchmarks=benchmarks, answers=answers, cell=cell, turns=turns,
        number=formats.number,
    )  # fmt: skip


def _by_prompt(rows):
    """(benchmark, prompt's id) -> the row of the first response to it."""
    return {(row["benchmark"], row["prompt_id"]): row for row in rows if row["sample"] == 0}


def cell(text):
    """A model's text as one cell of a Markdown table: neither HTML, nor markup, nor a pipe survives."""
    return escape(words.plain(str(text)), quote=False).translate(MARKUP).replace("\n", "<br>").replace("\t", " ")


def turns(texts):
    if len(texts) == 1:
        return cell(texts[0])
    return "<br>".join(f"({number}) {cell(text)}" for number, text in enumerate(texts, 1))
