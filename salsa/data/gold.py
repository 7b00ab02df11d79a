"""The gold judge of a world: a score that no policy is trained on, and that each world defines. No torch."""

from pathlib import Path

from salsa import data
from salsa.workflow import runs
from salsa.workflow.messages import UserError

FILE = "gold.json"
NONE = "none"  # in place of a world's kind, where it has no gold


class Gold:
    """A gold judge."""

    def score(self, prompts, responses):
        """Scores of the last response of each conversation.

        Args:
            prompts: N lists of chat messages, the last of each from the user.
            responses: N texts.

        Returns: float64 array (N,), each in [0, 1].
        """
        raise NotImplementedError


def save(folder, kind, **content):
    """Write into `folder` the kind of world whose gold it is, or NONE, and plain data that `load` needs."""
    runs.write_json(Path(folder) / FILE, {"kind": kind, **content})


def load(prepare_folder):
    """The gold judge of a finished prepare run, or None where the task has none. UserError if it can't be read."""
    folder = Path(prepare_folder) / "gold"
    if not (folder / FILE).is_file():
        raise UserError(f"{folder / FILE}: missing; {prepare_folder} is no finished prepare run")
    kind = runs.read_json(folder / FILE)["kind"]
    return None if kind == NONE else data.world_kinds()[kind].gold(folder)
