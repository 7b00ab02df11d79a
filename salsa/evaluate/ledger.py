"""What a judge is asked, and the files that grow line by line while it answers."""

import json
import threading
from dataclasses import dataclass

from salsa import runs


@dataclass(frozen=True)
class Comparison:
    """One question for a judge: which of two responses to a prompt is better, shown in this order.

    Attributes:
        model_a, model_b: the names of the candidate and of the baseline.
        row_a, row_b: their rows of responses.jsonl, of one prompt.
        order: 1 where model_b is shown first.
        turn: 1 or 2 where each turn of a conversation is judged by itself; None: the whole is judged at once.
    """

    model_a: str
    model_b: str
    row_a: dict
    row_b: dict
    order: int
    turn: int | None = None

    @property
    def question(self):
        """What names the comparison in a line of verdicts.jsonl or answers.jsonl."""
        named = {
            "prompt_id": self.row_a["prompt_id"],
            "benchmark": self.row_a["benchmark"],
            "model_a": self.model_a,
            "model_b": self.model_b,
            "order": self.order,
        }
        return named if self.turn is None else named | {"turn": self.turn}


def key(line):
    """What tells the questions of a judge run apart; of a `Comparison.question`, or of a line that holds one."""
    return tuple(line.get(name) for name in ("model_a", "model_b", "benchmark", "prompt_id", "turn", "order"))


class Ledger:
    """A JSONL file of answers to comparisons, written line by line as they come, by several threads.

    A killed process loses no line that was appended: what it left is in `lines` when the file is opened again, without
    a torn last line, which is cut off. `finish` puts the lines in the order of the comparisons, whatever order they
    came in.

    Raises UserError where the file holds a line on another comparison.
    """

    def __init__(self, path, comparisons):
        self.path = path
        self.places = {key(comparison.question): place for place, comparison in enumerate(comparisons)}
        self.lines = _complete_lines(path)
        if any(key(line) not in self.places for line in self.lines):
            raise runs.UserError(f"{path}: holds lines of another run; remove {path.parent} or choose another --output")
        self._lock = threading.Lock()

    def append(self, line):
        text = json.dumps(line, ensure_ascii=False) + "\n"
        with self._lock, open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            self.lines.append(line)

    def finish(self):
        """Replace the file, atomically, by its lines in the order of comparisons and attempts."""
        self.lines.sort(key=lambda line: (self.places[key(line)], line.get("attempt", 0)))
        runs.write_jsonl(self.path, self.lines)


def _complete_lines(path):
    if not path.exists():
        return []
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return runs.read_jsonl(path)
