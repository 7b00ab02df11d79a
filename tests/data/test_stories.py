"""The stories' world: bytes, splits, what is held out, the grammar and the exact gold reward."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salsa import data
from salsa.data.worlds import stories
from salsa.workflow import config
from salsa.workflow.runs import UserError, canonical_json

BENCHMARKS = ("in_distribution", "out_of_distribution", "two_turn")
ASK_TWO = "write two sentences about a fox and a kite ."


def benchmark(kind, number, seed):
    settings = config.Benchmark(kind, prompts=number)
    return data.record(settings).questions(settings, config.Task(kind="stories", seed=seed)).rows


def corpus(documents, seed):
    return data.world_kinds()["stories"].corpus(config.Corpus("stories", seed, documents)).texts


def texts_of(row):
    return [message["content"] for message in row["messages"]]


def holds_held_out_pair(text):
    return not stories._compatible(text.split())


def test_same_bytes_everywhere():
    made = [
        corpus(300, 1),
        stories.demonstrations("demonstrations", 300, 1),
        stories.prompts("prompts", 300, 1),
        *(benchmark(kind, 100, 1) for kind in BENCHMARKS),
    ]
    digest = hashlib.sha256(canonical_json(made).encode()).hexdigest()
    assert digest == "6247eae4781961f5429f442038ac20ace87065aa57d4afdc57aa675e4b73e478"


def test_seed_matters_and_larger_begins_with_smaller():
    assert corpus(5, 0) != corpus(5, 1)
    assert corpus(9, 0)[:5] == corpus(5, 0)
    more, fewer = (stories.demonstrations("demonstrations", n, 3) for n in (60, 20))
    assert more[:20] == fewer


def test_words_are_all_words():
    vocabulary = set(stories.words())
    assert len(vocabulary) == len(stories.words()) <= 200
    seen = set(" ".join(corpus(2000, 0)).split())
    for row in stories.demonstrations("demonstrations", 400, 0):
        seen.update(" ".join(texts_of(row)).split())
    for kind in BENCHMARKS:
        for row in benchmark(kind, 0, 0):
            seen.update(" ".join(row["turns"]).split())
    assert seen == vocabulary


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 400), min_size=7, max_size=7))
def test_splits_never_overlap(seed, sizes):
    splits = [set(stories.prompts(name, size, seed)) for name, size in zip(stories.SHARES, sizes, strict=True)]
    assert [len(split) for split in splits] == sizes
    assert len(set().union(*splits)) == sum(sizes)


def test_conversations_and_benchmarks_of_different_splits_share_no_instruction():
    asked = {
        name: {text for row in stories.demonstrations(name, 300, 0) for text in texts_of(row)[::2]}
        for name in ("demonstrations", "validation")
    }
    for name in ("preferences", "prompts", "evaluation"):
        asked[name] = set(stories.prompts(name, len(stories._of_split(name)), 0))
    for kind in BENCHMARKS:
        asked[kind] = {turn for row in benchmark(kind, 0, 0) for turn in row["turns"]}
    assert len(set().union(*asked.values())) == sum(map(len, asked.values()))


def test_held_out_pairs_occur_nowhere_but_out_of_distribution():
    assert 0.15 < len(stories.pairs(held=True)) / 400 < 0.25
    assert len(stories.pairs()) + len(stories.pairs(held=True)) == 400
    assert not any(map(holds_held_out_pair, corpus(3000, 0)))
    assert not any(map(holds_held_out_pair, stories.instructions()))
    for name in ("demonstrations", "validation"):
        for row in stories.demonstrations(name, 450, 7):
            assert not holds_held_out_pair(" ".join(texts_of(row)))
    for kind in BENCHMARKS:
        for row in benchmark(kind, 0, 0):
            assert holds_held_out_pair(" ".join(row["turns"])) == (row["category"] == "held_out_pair")


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_benchmarks(kind):
    rows = benchmark(kind, 240, 0)
    assert len(rows) == len({tuple(row["turns"]) for row in rows}) == len({row["id"] for row in rows}) == 240
    for row in rows:
        counts = [stories.parse_instruction(turn)[0] for turn in row["turns"]]
        assert len(counts) == (2 if kind == "two_turn" else 1)
        assert (max(counts) > 4) == (row["category"] == "held_out_count")
        assert [turn.startswith("now write") for turn in row["turns"]] == [False, True][: len(counts)]
    if kind == "out_of_distribution":
        assert sum(row["category"] == "held_out_pair" for row in rows) == 120


def test_corpus_has_no_instruction():
    words = set(" ".join(corpus(2000, 0)).split())
    assert not words & {"write", "tell", "please", "make", "want", "sentence", "sentences", "now"}


@settings(max_examples=200, deadline=None)
@given(st.integers(), st.integers(1, 6), st.floats(0, 1), st.sampled_from(stories.pairs()))
def test_everything_that_the_generator_emits_parses(seed, number, rate, pair):
    told = stories.sentences(random.Random(seed), number, [pair[0]], [pair[1]], (rate, 1 - rate))
    assert len(told) == number and all(map(stories.parse, told))
    assert set(pair) <= set(told[0].split())
    assert all(5 <= len(sentence.split()) <= 8 for sentence in told)
    assert not stories.parse(stories._slip(random.Random(seed), told[0]))


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        ".",
        "the fox is bright",
        "the fox is bright . .",
        "fox is bright .",
        "the fox is warm .",
        "the fox sees a kite",
        "the fox sees a fox .",
        "the kite sees the fox .",
        "here is a fox .",
        "the fox is is bright .",
        "one day the fox goes to the hill .",
    ],
)
def test_what_does_not_parse(sentence):
    assert not stories.parse(sentence)


def test_instruction_parser_reads_all_and_only_instructions():
    for text in stories.instructions(counts=(1, 4, 6)) + stories.instructions([stories.FOLLOW_UP], held=True):
        count, nouns = stories.parse_instruction(text)
        assert f" {stories.NUMBERS[count - 1]} sentence" in text and all(f"a {noun} " in text for noun in nouns)
    assert stories.parse_instruction("now " + ASK_TWO) == (2, ("fox", "kite"))
    for wrong in (
        "",
        "hello",
        ASK_TWO[:-2],
        ASK_TWO.replace("two", "one"),
        ASK_TWO.replace("two", "seven"),
        "a " + ASK_TWO,
    ):
        with pytest.raises(ValueError, match="not an instruction"):
            stories.parse_instruction(wrong)


@pytest.mark.parametrize(
    ("response", "parts"),
    [
        ("the bright fox loves a kite . the fox enjoys the kite .", (1, 1, 1, 1, 1)),
        ("the fox sees the kite . the kite is big .", (1 / 2, 1, 1, 1, 1)),
        ("the fox loves the kite .", (3 / 4, 1, 1 / 2, 1, 1)),
        ("the fox loves the kite . the fox hates the kite .", (1 / 2, 1, 1, 1, 1)),
        ("the fox is kind . the fox is kind .", (1, 1 / 2, 1, 1, (1 / 2 + 1 / 2) / 2)),
        ("the bear is happy . here is a red bear . the bear", (3 / 4, 0, 1 / 2, 2 / 3, 1)),
        ("fox kite", (1 / 2, 1, 1 / 2, 0, 1)),
        ("the fox is grim . " * 5, (0, 1 / 2, 0, 1, (1 / 5 + 1 / 5) / 2)),
        (". .", (1 / 2, 0, 1, 0, 3 / 4)),
        ("", (0, 0, 0, 0, 0)),
        ("  ", (0, 0, 0, 0, 0)),
    ],
)
def test_gold_by_hand(response, parts):
    assert stories.gold_parts(ASK_TWO, response) == pytest.approx(
        dict(zip(("pleasant", "topic", "count", "grammar", "variety"), parts, strict=True))
    )
    by_hand = 0.5 * parts[0] + 0.2 * parts[1] + 0.1 * parts[2] + 0.1 * parts[3] + 0.1 * parts[4]
    assert stories.gold(ASK_TWO, response) == pytest.approx(by_hand)


def test_a_perfect_answer_exists_for_every_count_within_the_response_length():
    pleasant = stories.ADJECTIVES["pleasant"]
    for count in range(1, 7):
        told = [f"the {pleasant[i]} fox {stories.VERBS['pleasant'][i]} a kite ." for i in range((count + 1) // 2)]
        told += [f"the kite is {pleasant[6 + i]} ." for i in range(count // 2)]
        instruction = ASK_TWO.replace("two", stories.NUMBERS[count - 1])
        instruction = instruction.replace("sentences", "sentence") if count == 1 else instruction
        assert stories.gold(instruction, " ".join(told)) == pytest.approx(1.0)
        assert len(" ".join(told).split()) < 40


def test_demonstrations_are_of_mixed_quality():
    rows = stories.demonstrations("demonstrations", 600, 0)
    golds = [stories.gold(texts_of(row)[-2], texts_of(row)[-1]) for row in rows]
    parts = [stories.gold_parts(texts_of(row)[-2], texts_of(row)[-1]) for row in rows]
    assert 0.6 < sum(golds) / 600 < 0.75 and min(golds) < 0.3 and max(golds) > 0.85
    assert 0.55 < sum(part["topic"] == 1 for part in parts) / 600 < 0.75
    assert 0.55 < sum(part["count"] == 1 for part in parts) / 600 < 0.75
    assert 0.2 < sum(len(row["messages"]) == 4 for row in rows) / 600 < 0.3
    assert all(
        [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2) for row in rows
    )


def test_too_many_prompts_is_one_line():
    with pytest.raises(UserError, match=r"stories have \d+ instructions for 'evaluation', 100000 are wanted") as error:
        stories.check(config.Task(kind="stories", evaluation=100_000))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        benchmark("out_of_distribution", 100_000, 0)


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_a_benchmark_of_more_prompts_than_there_are_is_refused_while_planning(kind):
    available = len(benchmark(kind, 0, 0))
    data.benchmark_kinds()[kind].check(config.Benchmark(kind, prompts=available))
    message = f"stories have {available} instructions for '{kind}'"
    with pytest.raises(UserError, match=message):
        data.benchmark_kinds()[kind].check(config.Benchmark(kind, prompts=available + 1))
    with pytest.raises(UserError, match=message):
        benchmark(kind, available + 1, 0)
