"""The gold judge of a task: a score that PPO never sees. No torch.

- stories: the exact reward of `stories.gold`, in [0, 1]; an empty response scores 0.
- reviews: the classifier's probability that the continuation, read alone, is positive. The probability and not its
  logit: it has the range of the other gold, so that the temperature of preferences and a judge's tie margin mean the
  same in both, and no single phrase can outweigh a whole text. A continuation without a word is no review: it scores 0.
- none (ultra): there is no gold.
"""

import zipfile
from pathlib import Path

import numpy as np

from salsa.data import reviews, stories
from salsa.workflow import runs

FILE = "gold.json"
CLASSIFIER = "classifier.npz"  # the numbers; the terms they belong to are in FILE


class Gold:
    """A gold judge; `kind` is stories or reviews."""

    kind = ""

    def score(self, prompts, responses):
        """Scores of the last response of each conversation.

        Args:
            prompts: N lists of chat messages, the last of each from the user.
            responses: N texts.

        Returns: float64 array (N,), each in [0, 1].
        """
        raise NotImplementedError


class StoriesGold(Gold):
    kind = "stories"

    def score(self, prompts, responses):
        pairs = zip(prompts, responses, strict=True)
        return np.array([stories.gold(messages[-1]["content"], response) for messages, response in pairs], float)


class ReviewsGold(Gold):
    kind = "reviews"

    def __init__(self, classifier):
        self.classifier = classifier

    def score(self, prompts, responses):
        if not responses:
            return np.zeros(0)
        probabilities = self.classifier.predict_proba(responses)[:, 1].astype(np.float64)
        return np.where([bool(response.strip()) for response in responses], probabilities, 0.0)


def save(folder, kind, classifier=None):
    """Write into `folder` what `load` needs: of a classifier its terms and numbers, as data that can run nothing."""
    folder = Path(folder)
    if classifier is None:
        runs.write_json(folder / FILE, {"kind": kind})
        return
    terms, numbers = reviews.numbers_of(classifier)
    runs.write_json(folder / FILE, {"kind": kind, "terms": terms})
    np.savez_compressed(folder / CLASSIFIER, **numbers)


def load(prepare_folder):
    """The gold judge of a finished prepare run, or None where the task has none. UserError where it can't be read."""
    folder = Path(prepare_folder) / "gold"
    if not (folder / FILE).is_file():
        raise runs.UserError(f"{folder / FILE}: missing; {prepare_folder} is no finished prepare run")
    saved = runs.read_json(folder / FILE)
    if saved["kind"] == "none":
        return None
    if saved["kind"] == "stories":
        return StoriesGold()
    try:
        with np.load(folder / CLASSIFIER, allow_pickle=False) as numbers:
            return ReviewsGold(reviews.classifier_of(saved["terms"], numbers))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise runs.UserError(
            f"{folder / CLASSIFIER}: not the numbers of gold's classifier ({reason}); remove {prepare_folder} and run "
            "again"
        ) from None
