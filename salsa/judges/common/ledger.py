"""What a judge is asked, and the files that grow line by line while it answers."""

import json
import re
import sys
from dataclasses import dataclass

from salsa.workflow import runs
from salsa.workflow.messages import UserError


@dataclass(frozen=True)
class Comparison:
    """One question for a judge: which of two responses to a prompt is better, shown in this order.

    Attributes:
        model_a, model_b: the names of the candidate and of the baseline.
        row_a, row_b: their rows of responses.jsonl, of one prompt.
        order: 1 where model_b is shown first.
        turn: 1 or 2 where each turn of a conversation is judged by itself; None: the conversation is judged as a whole.
        sample: the number of both responses where a prompt has several of each model; None: it has one.
    """

    model_a: str
    model_b: str
    row_a: dict
    row_b: dict
    order: int
    turn: int | None = None
    sample: int | None = None

    @property
    def question(self):
        """The fields that name the comparison in a line of verdicts.jsonl or answers.jsonl."""
        fields = {
            "prompt_id": self.row_a["prompt_id"],
            "benchmark": self.row_a["benchmark"],
            "model_a": self.model_a,
            "model_b": self.model_b,
            "order": self.order,
        }
        optional = {"sample": self.sample, "turn": self.turn}
        return fields | {name: value for name, value in optional.items() if value is not None}


def key(line):
    """A hashable name of a `Comparison.question`, or of a line that holds one, unique within a judge's run."""
    names = ("model_a", "model_b", "benchmark", "prompt_id", "sample", "turn", "order")
    return tuple(line.get(name) for name in names)


class Ledger:
    """A JSONL file of answers to comparisons, written line by line as they come.

    A killed process loses no line that was appended: `lines` holds them when the file is opened again. A torn last line
    is cut off. A line that can't be used, from an older version or a damaged disk, goes into a file beside this one,
    with a note, and its question is asked again. Of several lines on one question and attempt, the last counts.
    `finish` puts the lines in the order of the comparisons, whatever order they came in.

    Args:
        path: the file.
        comparisons: all comparisons of the run.
        usable: line (a dictionary) -> whether it holds what it must; it may raise KeyError and TypeError.

    Raises UserError where the file holds a line on another comparison.
    """

    def __init__(self, path, comparisons, usable):
        self.path, self._usable = path, usable
        self.places = {key(comparison.question): place for place, comparison in enumerate(comparisons)}
        self.lines = self._read() if path.exists() else []

    def _read(self):
        content = self.path.read_bytes()
        *complete, torn = content.split(b"\n")
        lines, unusable = {}, []
        for number, text in enumerate(complete, 1):
            line = self._parsed(text)
            if line is None:
                unusable.append((number, text))
            elif key(line) not in self.places:
                folder = self.path.parent
                raise UserError(
                    f"{self.path}: holds lines of another run (the first is line {number}); remove {folder} or choose "
                    "another --output"
                )
            else:
                lines[key(line), line.get("attempt", 0)] = line
        if unusable:
            self._set_aside(unusable)
        if torn or len(lines) < len(complete):
            runs.write_atomically(self.path, "".join(map(_text, lines.values())))
        return list(lines.values())

    def _parsed(self, text):
        """The line that a text holds, or None where it can't be used."""
        try:
            line = json.loads(text)
            is_line = isinstance(line, dict) and {"prompt_id", "benchmark", "model_a", "model_b", "order"} <= set(line)
            hash(key(line) if is_line else None)
            return line if is_line and self._usable(line) else None
        except (ValueError, RecursionError, KeyError, TypeError):
            return None

    def _set_aside(self, unusable):
        aside = self.path.with_name(f"{self.path.name}.set_aside")
        with open(aside, "ab") as file:
            file.writelines(text + b"\n" for _, text in unusable)
        print(
            f"{self.path}: {len(unusable)} lines can't be used, the first is line {unusable[0][0]}; set aside in "
            f"{aside.name}, and what they were about is judged again",
            file=sys.stderr,
            flush=True,
        )

    def append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_text(line))
        self.lines.append(line)

    def finish(self):
        """Replace the file, atomically, by its lines in the order of comparisons and attempts."""
        self.lines.sort(key=lambda line: (self.places[key(line)], line.get("attempt", 0)))
        runs.write_atomically(self.path, "".join(map(_text, self.lines)))


def _text(line):
    """The line as JSON. Half a surrogate pair, which UTF-8 can't hold, becomes an escape."""
    text = json.dumps(line, ensure_ascii=False)
    return (json.dumps(line) if re.search("[\ud800-\udfff]", text) else text) + "\n"
