"""How a table is written: every number as CSV; rounded, "mean [low, high]", as Markdown and LaTeX.

A cell that readers see is text that people wrote, which each format escapes, or a `Number`, which stays as it is. What
the numbers are is in `sections`.
"""

import math
from dataclasses import dataclass

import pandas as pd

from salsa.report import selection, words
from salsa.workflow import runs
from salsa.workflow.messages import UserError

NAMES = ("claim", "arm", "benchmark", "judge", "candidate", "baseline")  # columns that are never numbers
CALLED = ("claim", "arm")  # columns by which readers find a row
SYMBOLS = {  # what pdflatex does not know by itself
    "‖": r"$\|$",
    "½": r"$\frac{1}{2}$",
    "¾": r"$\frac{3}{4}$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "√": r"$\surd$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "−": r"$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "…": r"\ldots{}",
}
NOTHING = "\ue000"  # a sign of no script, for an empty group
SYMBOLS |= {NOTHING: "{}", "<": r"\textless{}", ">": r"\textgreater{}"}
TYPED = "–—‘’‚“”„•€™"  # which pdflatex sets as they are
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: "\\" + character for character in "%&_#${}"}
LONGEST = 45  # rows that a page holds
FITTED = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{"  # as wide as the text at most


class Number(str):
    """A cell that is a number, perhaps with its interval: never escaped, and sorted as numbers are."""


class Bold(Number):
    """A number that readers are to see first: one whose interval excludes 0."""


class Verdict(str):
    """A cell that is the verdict on a claim, which pages colour."""


@dataclass(frozen=True)
class Table:
    """What readers see of a frame: names of columns, and rows of `Number` or text.

    `names` are the rows' places in a page, which its links lead to; "" for a row that no link leads to.
    """

    columns: list[str]
    rows: list[list[str]]
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, columns):
        """A table of name -> cells, without the columns that have no value."""
        columns = {name: cells for name, cells in columns.items() if any(cells)}
        return cls(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])

    def numeric(self):
        """For each column, whether it holds numbers alone."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [any(column) and all(isinstance(x, Number) or not x for x in column) for column in columns]


def without_constants(table):
    """(the table without the columns that say the same in all of its rows, the names and cells of these columns).

    What rows are called by stays (`CALLED`, or else the first column), and so do verdicts and numbers with an interval.
    """
    if len(table.rows) < 2:
        return table, {}
    cells = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
    constants = {name: column[0] for name, column in cells.items() if name not in CALLED and _is_constant(column)}
    if len(constants) == len(cells):
        del constants[table.columns[0]]
    kept = [name for name in cells if name not in constants]
    rows = [list(row) for row in zip(*(cells[name] for name in kept), strict=True)]
    return Table(kept, rows, table.names), constants


def _is_constant(column):
    return len(set(column)) == 1 and "[" not in column[0] and not isinstance(column[0], Verdict)


def cut(frame, limits):
    """(the frame with the bounds of some columns' intervals cut, whether one lay beyond).

    `limits` is column -> (least, most). A t interval over a few replicates may reach where no share can lie.
    """
    shown, beyond = frame.copy(), False
    for column, (least, most) in limits.items():
        for bound in (f"{column}_low", f"{column}_high"):
            if bound in frame:
                shown[bound] = frame[bound].clip(least, most)
                beyond |= bool((shown[bound] != frame[bound]).where(frame[bound].notna(), False).any())
    return shown, beyond


def number(x, low=math.nan, high=math.nan):
    """A cell of three significant digits, with its interval where that is known; empty for nan and None."""
    interval = f" [{selection.number(low)}, {selection.number(high)}]" if low == low else ""
    return Number(selection.number(x) + interval)


def readable(frame):
    """The `Table` of a frame: numbers rounded, `x`, `x_low`, `x_high` (or ci_low, ci_high) joined to one cell.

    A standard error, `x_se`, is joined to its `x` too. Columns without any value are left out.
    """
    columns = {}
    for name in frame.columns:
        if name.endswith(("_low", "_high")) or (name.endswith("_se") and name.removesuffix("_se") in frame):
            continue
        if f"{name}_se" in frame:
            cells = [_with_error(*values) for values in zip(frame[name], frame[f"{name}_se"], strict=True)]
            columns[name.replace("_", " ")] = cells
            continue
        bounds = ("ci_low", "ci_high") if name == "adjusted_win_rate" else (f"{name}_low", f"{name}_high")
        bounds = [frame[bound] for bound in bounds if bound in frame]
        cells = [_cell(*values) for values in zip(frame[name], *bounds, strict=True)]
        columns[name.replace("_", " ")] = cells
    return Table.of(columns)


def _with_error(x, error):
    return Number(number(x) + (f" ± {number(error)}" if error == error else ""))


def _cell(x, *bounds):
    return x if isinstance(x, str) else number(x, *bounds)


def markdown(table):
    """A Markdown table, every cell one line; all but numbers is escaped."""
    if not table.rows:
        return "(no rows)"
    rows = [[_markdown_cell(cell) for cell in row] for row in [table.columns, *table.rows]]
    rows.insert(1, ["---"] * len(table.columns))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _markdown_cell(cell):
    if isinstance(cell, Bold):
        return f"**{cell}**"
    return cell if isinstance(cell, Number) else words.markdown(cell)


def latex(table, name, caption):
    """A booktabs table, everything escaped: in a float, or, where it is longer than a page, a longtable.

    A table without rows is a comment: LaTeX sets none without columns.
    """
    if not table.rows:
        return f"% no rows: {caption}\n"
    frame = pd.DataFrame(table.rows, columns=table.columns, dtype=object).map(_latex_cell).rename(columns=_latex_cell)
    escaped = _latex_cell(caption).translate(str.maketrans(LATEX))
    columns = "".join("p{4cm}" if frame[column].str.len().max() > 40 else "l" for column in frame)
    long = len(frame) > LONGEST
    text = frame.to_latex(
        index=False,
        escape=True,
        caption=escaped,
        label=f"tab:{name}",
        position=None if long else "htbp",
        column_format=columns,
        longtable=long,
    )
    text = text.translate(str.maketrans(SYMBOLS))
    if not long:
        text = text.replace(r"\begin{tabular}", FITTED + r"\begin{tabular}").replace(
            r"\end{tabular}", r"\end{tabular}}"
        )
    needed = "booktabs,longtable" if long else "booktabs,graphicx"
    return f"% \\usepackage{{{needed}}}\n" + text


def _latex_cell(cell):
    """A cell's text as one line that begins with nothing that LaTeX takes for an option of the line before it.

    What pdflatex has no sign for becomes [U+4E2D].
    """
    text = words.line(words.plain(cell))
    text = "".join(c if ord(c) < 0x180 or c in SYMBOLS or c in TYPED else f"[U+{ord(c):04X}]" for c in text)
    return NOTHING + text if text.startswith(("[", "*")) else text


def write_csv(frame, path):
    """Write the `csv` of a frame."""
    runs.write_atomically(path, csv(frame))


def csv(frame):
    """CSV of full precision, with empty cells for missing numbers; no text breaks a line or is a formula."""
    frame = frame.map(lambda cell: _csv_cell(cell) if isinstance(cell, str) else cell).rename(columns=_csv_cell)
    return frame.to_csv(index=False, lineterminator="\n")


def read_csv(path):
    """A table as `write_csv` wrote it. Names stay text: an arm may be called 1, true or nan.

    Raises `UserError` where there is no such table.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such table; run the study again")
    return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def _csv_cell(text):
    """Text that a spreadsheet shows and does not compute: an apostrophe is put before what would be a formula."""
    text = words.line(words.plain(text))
    return "'" + text if text.lstrip().startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def write(frame, table, folder, name, caption):
    """Write one table as <name>.csv, which holds the frame, and as .md and .tex, which show `table`."""
    write_csv(frame, folder / f"{name}.csv")
    runs.write_atomically(folder / f"{name}.md", f"{caption}\n\n{markdown(table)}\n")
    runs.write_atomically(folder / f"{name}.tex", latex(table, name, caption))
