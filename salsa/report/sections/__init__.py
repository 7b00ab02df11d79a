"""The sections of a report: a table, a figure or both, with the words that a reader needs for them.

Every `Section` that a module of this folder holds is part of every report that has what it shows: adding a file
is enough. A figure is drawn and a table written by `study`; how they become Markdown, LaTeX, CSV and HTML is in
`formats` and `pages`.
"""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from salsa.report import formats, selection, style
from salsa.workflow.messages import UserError

HEADINGS = (  # in the report's order; a heading of another section's own stands after them
    "Arms",
    "Checks",
    "Claims",
    "Preferences",
    "Rewards and KL",
    "Training and stability",
    "Where the noise is",
    "The space of weights",
    "Judges",
)
CUT = (
    " Intervals of shares are cut at 0 and 1, beyond which a t interval over few replicates may reach; the CSV has "
    "them whole."
)
COLLAPSED = "collapsed"  # the column that `marked` adds
SIDES = (  # columns of an arm and of its kl_coef; an arm that a table has no column for is named
    ("arm", "kl_coef"),
    ("candidate", "kl_coef"),
    ("candidate", "candidate_kl_coef"),
    ("baseline", "baseline_kl_coef"),
    ("baseline", "kl_coef"),
)


def sides(study, row):
    """(arm, kl_coef) of the policies that a row shows, by its columns; a kl_coef of nan is no policy's."""
    return [(row[arm], row[kl_coef]) for arm, kl_coef in SIDES if arm in row and kl_coef in row]


def sides_at_all_kl_coefs(study, row):
    """As `sides`; an arm for which a row names no kl_coef is there at all of them, as (arm, None)."""
    arms = [arm for arm in ("arm", "candidate", "baseline") if arm in row and "kl_coef" not in row]
    return sides(study, row) + [(row[arm], None) for arm in arms if math.isnan(row.get(f"{arm}_kl_coef", math.nan))]


@dataclass(frozen=True)
class Section:
    """A table, a figure or both, and their words.

    Attributes:
        name: of the files tables/<name>.csv and figures/<name>.png, and of the place in the page.
        heading: the part of the report that it stands in.
        caption: (study, tables) -> a sentence that states what the numbers say; `tables` is name -> data frame.
        table: study -> data frame; bounds of a column x are columns x_low and x_high.
        figure: (study, tables) -> matplotlib Figure; None where nothing was measured, and then the report has none.
        reading: (study, tables) -> a sentence on how the figure is to be read; "" where nothing is drawn.
        place: its place under the heading; where two are equal, their names decide.
        left_out: columns that readers find in the CSV alone.
        shares: columns of shares, whose intervals readers see cut at 0 and 1.
        rows: frame -> the rows and columns that readers see; the CSV has all.
        present: study -> whether the study has what the section shows; otherwise it is left out, with its files.
        sides: (study, row) -> the (arm, kl_coef) whose policies the row shows, None being all kl_coefs; None where the
            table says itself which policies have collapsed.
    """

    name: str
    heading: str
    caption: Callable
    table: Callable | None = None
    figure: Callable | None = None
    reading: Callable | None = None
    place: int = 100
    left_out: tuple[str, ...] = ("model", "data")
    shares: tuple[str, ...] = ()
    rows: Callable = lambda frame: frame
    present: Callable = lambda study: True
    sides: Callable | None = sides

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f"section {self.name!r}: its name is no identifier, and so no name of a file and a place")
        if not self.heading or not callable(self.caption):
            raise ValueError(f"section {self.name}: a section has a heading and a caption")
        if self.table is None and self.figure is None:
            raise ValueError(f"section {self.name}: a section has a table, a figure or both")

    @property
    def title(self):
        return self.name.replace("_", " ").capitalize()

    def draw(self, study, tables):
        """The figure in the project's style, and above it, which policies have collapsed; None where there is none."""
        return style.drawn(self.figure, study, tables)

    def shown(self, frame):
        """The `formats.Table` that readers see; its first column says which policies have collapsed, if any."""
        frame = self.rows(self.cut(frame)[0]).drop(columns=list(self.left_out), errors="ignore")
        if self.sides and COLLAPSED in frame:
            frame = frame[[COLLAPSED, *frame.columns.drop(COLLAPSED)]]
        return formats.readable(frame)

    def cut(self, frame):
        """As `formats.cut` has it: the frame with the intervals of its shares cut, and whether one was."""
        return formats.cut(frame, dict.fromkeys(self.shares, (0.0, 1.0)))

    def captioned(self, study, tables):
        """The caption, which says whether an interval was cut."""
        beyond = self.table and self.cut(tables[self.name])[1]
        return self.caption(study, tables) + (CUT if beyond else "")

    def words(self, study, tables):
        """The caption, and how the figure is to be read."""
        reading = self.reading(study, tables) if self.reading else ""
        return " ".join(text for text in (self.captioned(study, tables), reading) if text)


@functools.cache
def sections():
    """name -> Section, in the report's order. UserError where a file has a fault, or its section another's name."""
    by_name = {}
    for module in pkgutil.iter_modules(__path__):
        try:
            contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
        except Exception as error:
            raise UserError(f"salsa/report/sections/{module.name}.py: {error}") from error
        for section in contents.values():
            if isinstance(section, Section) and by_name.setdefault(section.name, section) is not section:
                raise UserError(f"salsa/report/sections/{module.name}.py: another section is called {section.name}")
    return dict(sorted(by_name.items(), key=lambda item: _order(item[1])))


def _order(section):
    place = HEADINGS.index(section.heading) if section.heading in HEADINGS else len(HEADINGS)
    return place, section.heading, section.place, section.name


def sections_of(study):
    """The sections of a study's report, as `sections` returns them."""
    return {name: section for name, section in sections().items() if section.present(study)}


def tables_of(study):
    """name -> data frame of every section's table; a column `collapsed` where rows show collapsed policies.

    A column `seed` stands there where policies are trained with several.
    """
    tables = {name: section.table(study) for name, section in sections_of(study).items() if section.table}
    if len(selection.seeds(study)) == 1:
        tables = {name: frame.drop(columns="seed", errors="ignore") for name, frame in tables.items()}
    return marked(study, tables)


def marked(study, tables):
    """Tables with a column `collapsed`, where a row shows a collapsed policy: which arm, and how many of its policies.

    Tables that show none are as they were.
    """
    if not any(selection.collapse(study, policy) for policy in study.policies):
        return tables
    mark = functools.cache(functools.partial(selection.collapsed, study))
    return {name: _marked(study, sections()[name], frame, mark) for name, frame in tables.items()}


def _marked(study, section, frame, mark):
    if section.sides is None:
        return frame
    rows = frame.to_dict("records")
    marks = ["; ".join(dict.fromkeys(_marks(study, section.sides(study, row), row, mark))) for row in rows]
    return frame.assign(**{COLLAPSED: marks}) if any(marks) else frame


def _marks(study, sides, row, mark):
    for arm, kl_coef in sides:
        arm = selection.arm_of(study, arm) if arm else None
        if arm is not None and not (kl_coef is not None and kl_coef != kl_coef):
            text = mark(arm, kl_coef, row.get("replicate"), row.get("seed"))
            if text:
                yield arm + text
