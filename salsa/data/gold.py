"""The gold judge of a task: a score that PPO never sees. No torch.

- stories: the exact reward of `stories.gold`, in [0, 1]; an empty response scores 0.
- reviews: the classifier's probability that the continuation, read alone, is positive. The probability and not its
  logit: it has the range of the other gold, so that the temperature of preferences and a judge's tie margin mean the
  same in both, and no single phrase can outweigh a whole text. A continuation without a word is no review: it scores 0.
- none (ultra): there is no gold.
"""

from pathlib import Path

import numpy as np

from salsa import runs
from salsa.data import stories

FILE = "gold.json"
CLASSIFIER = "classifier.joblib"


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
    """Write into `folder` what `load` needs."""
    folder = Path(folder)
    runs.write_json(folder / FILE, {"kind": kind})
    if classifier is not None:
        import joblib

        joblib.dump(classifier, folder / CLASSIFIER, compress=3)


def load(prepare_folder):
    """The gold judge of a finished prepare run, or None where the task has none."""
    folder = Path(prepare_folder) / "gold"
    if not (folder / FILE).is_file():
        raise runs.UserError(f"{folder / FILE}: missing; {prepare_folder} is no finished prepare run")
    kind = runs.read_json(folder / FILE)["kind"]
    if kind == "none":
        return None
    if kind == "stories":
        return StoriesGold()
    import joblib

    return ReviewsGold(joblib.load(folder / CLASSIFIER))
