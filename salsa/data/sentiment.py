"""Gold of the reviews: a classifier of sentiment, trained on reviews that nothing else sees.

A continuation's gold is the probability that it is positive, read alone. It is the probability and not its logit,
because it then has the same range as the stories' gold, so that the temperature of preferences and a judge's tie margin
mean the same, and because no single phrase can outweigh a whole text. A continuation without a word scores 0.
"""

import zipfile
from pathlib import Path

import numpy as np

from salsa.data import gold
from salsa.data.splits import normalised, split_of
from salsa.workflow import runs
from salsa.workflow.messages import UserError

CLASSIFIER = "classifier.npz"  # the numbers; the terms they belong to are in gold.FILE
FRAGMENT = 20  # words of a fragment where the task's response_words is 0: a Rotten Tomatoes review's median
FRAGMENTS = 4  # at most so many of an IMDb review, so that long reviews do not outweigh the others
HELD_OUT = 0.2  # share of the reviews that test the classifier
IN_DOMAIN_WEIGHT = 5.0  # of a Rotten Tomatoes fragment, where an IMDb fragment has 1


class Sentiment(gold.Gold):
    """A fitted classifier as gold."""

    def __init__(self, classifier):
        self.classifier = classifier

    def score(self, prompts, responses):
        if not responses:
            return np.zeros(0)
        probabilities = self.classifier.predict_proba(responses)[:, 1].astype(np.float64)
        return np.where([bool(response.strip()) for response in responses], probabilities, 0.0)


def save(folder, kind, classifier):
    """Write a classifier's terms and numbers, as plain data: loading them runs no code."""
    tfidf, regression = (step for _, step in classifier.steps)
    numbers = {"idf": tfidf.idf_, "coefficients": regression.coef_, "intercept": regression.intercept_}
    gold.save(folder, kind, terms=tfidf.get_feature_names_out().tolist())  # in the order of the features
    np.savez_compressed(Path(folder) / CLASSIFIER, **numbers)


def load(folder):
    """The `Sentiment` that `save` wrote. UserError where it can't be read."""
    try:
        terms = runs.read_json(folder / gold.FILE)["terms"]
        with np.load(folder / CLASSIFIER, allow_pickle=False) as numbers:
            return Sentiment(classifier_of(terms, numbers))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{folder / CLASSIFIER}: not the numbers of gold's classifier ({reason}); remove {folder.parent} and run "
            "again"
        ) from None


def fragments(text, words):
    """At most FRAGMENTS windows of `words` words, evenly over the text, without a last one under half as long."""
    split = text.split()
    starts = range(0, max(len(split) - words // 2, 1), words)
    if len(starts) > FRAGMENTS:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, FRAGMENTS).round()]
    return [" ".join(split[start : start + words]) for start in starts]


def train(task, reviews):
    """Fit the gold classifier on the splits of `reviews` that nothing else sees.

    Returns (scikit-learn pipeline, facts): TF-IDF of one and two words and a logistic regression, and its accuracy
    on the continuations of held-out Rotten Tomatoes reviews and on fragments of held-out IMDb reviews.
    """
    words = task.response_words or FRAGMENT
    train, test = _fragments(reviews, task.opening_words, words)
    pipeline = _pipeline(min_df=2)
    weights = [IN_DOMAIN_WEIGHT if source == "rotten_tomatoes" else 1.0 for _, _, source in train]
    pipeline.fit([t for t, _, _ in train], [y for _, y, _ in train], logisticregression__sample_weight=weights)
    facts = {"fragment_words": words, "train_fragments": len(train)}
    for source in ("rotten_tomatoes", "imdb"):
        rows = [row for row in test if row[2] == source]
        right = pipeline.predict([t for t, _, _ in rows]) == np.array([y for _, y, _ in rows])
        facts[f"held_out_accuracy_{source}"] = round(float(right.mean()), 4)
        facts[f"held_out_fragments_{source}"] = len(rows)
    return pipeline, facts


def _pipeline(**options):
    """TF-IDF, with `options`, and a logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w[\w']*\b", **options),
        LogisticRegression(C=2.0, max_iter=300),
    )


def classifier_of(terms, numbers):
    """The classifier that was saved, with the same predictions to the last bit. ValueError where parts don't fit."""
    idf, coefficients, intercept = (numbers[name] for name in ("idf", "coefficients", "intercept"))
    if (idf.shape, coefficients.shape, intercept.shape) != ((len(terms),), (1, len(terms)), (1,)):
        raise ValueError(f"{len(terms)} terms, and {idf.shape}, {coefficients.shape} and {intercept.shape} numbers")
    classifier = _pipeline(vocabulary=terms)
    tfidf, regression = (step for _, step in classifier.steps)
    tfidf.idf_ = idf
    regression.coef_, regression.intercept_, regression.classes_ = coefficients, intercept, np.array([0, 1])
    return classifier


def _fragments(rows, opening_words, words):
    """Training and test fragments as (text, label, source); a review's fragments are all in one of the two."""
    cut = {
        "rotten_tomatoes": (rows["gold"], lambda text: [" ".join(text.split()[opening_words:][:words])]),
        "imdb": (rows["gold_imdb"], lambda text: fragments(text, words)),
    }
    parts = {"train": [], "test": []}
    for source, (reviews, pieces) in cut.items():
        for text, label in reviews:
            part = split_of(normalised(text), {"test": HELD_OUT, "train": 1.0}, "reviews gold")
            parts[part] += [(piece, label, source) for piece in pieces(text)]
    return parts["train"], parts["test"]
