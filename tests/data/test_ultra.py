"""Given preferences and conversations: canonical rows, what is dropped, real files, malformed files."""

import gzip
import json
import os
import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from salsa import data
from salsa.data import sources
from salsa.data.sources import is_hub_id
from salsa.data.splits import normalised
from salsa.data.worlds import ultra
from salsa.workflow import config
from salsa.workflow.runs import UserError

REAL = Path(os.environ.get("SALSA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set SALSA_TEST_DATA to a folder that has it")
USER, ANSWER, OTHER = (
    {"role": "user", "content": "What is a fox?"},
    {"role": "assistant", "content": "An animal."},
    {"role": "assistant", "content": "A plant."},
)


def check(settings):
    data.record(settings).check(settings)


def files_of(settings):
    return data.record(settings).local_files(settings)


def ask(benchmark):
    return data.record(benchmark).questions(benchmark, config.Task(kind="ultra"))


def pair(prompt="What is a fox?", chosen="An animal.", rejected="A plant.", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        pair(),
        pair(chosen=[USER, ANSWER], rejected=[USER, OTHER], score_chosen=8.0, score_rejected=7.0),
        pair([USER], [ANSWER], [OTHER], metadata={"score_chosen": 8.0, "score_rejected": 7.0}),
    ],
)
def test_both_forms_of_a_preference_become_one(row):
    assert ultra.preference(row) == {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(metadata={"score_chosen": 7.0, "score_rejected": 7.0}), "tie"),
        (pair(score_chosen=7.0, score_rejected=7.0), "tie"),
        (pair(rejected=" An animal."), "identical"),
        (pair(rejected="An animal.\u200b"), "identical"),
        (pair(chosen=" "), "empty"),
        (pair(prompt=""), "empty"),
        (pair(chosen=[USER, ANSWER], rejected=[{**USER, "content": "Hm?"}, OTHER]), "different_prompts"),
        (pair(chosen=[USER, ANSWER, USER], rejected=[USER, OTHER]), "empty"),
    ],
)
def test_what_is_dropped_and_why(row, reason):
    assert ultra.preference(row) == reason


def test_every_row_is_kept_or_counted_and_splits_share_no_prompt(tmp_path):
    rows = [pair(f"Question {i}?", "yes", "no") for i in range(300)] + [pair("question  1?"), pair(chosen="A plant.")]
    sft = [{"messages": [{**USER, "content": f"Question {i}?"}, ANSWER]} for i in range(290, 400)]
    sft.append({"messages": [USER]})
    task = config.Task(
        kind="ultra",
        preference_file=write(tmp_path / "p.jsonl.gz", rows),
        sft_file=write(tmp_path / "s.jsonl", sft),
        evaluation_file=write(tmp_path / "e.jsonl", [pair("Question 7?"), pair("New?"), pair("Newer?")]),
    )
    check(task)
    splits, counts = ultra.prepare(task)
    assert counts["files"] == {
        "preference_file": {"read": 302, "kept": 300, "dropped": {"duplicate_prompt": 1, "identical": 1}},
        "evaluation_file": {"read": 3, "kept": 2, "dropped": {"in_other_file": 1}},
        "sft_file": {"read": 111, "kept": 100, "dropped": {"in_other_file": 10, "no_answer": 1}},
    }
    first = {name: [(row.get("messages") or row["prompt"])[0]["content"] for row in splits[name]] for name in splits}
    assert set(first) == {"demonstrations", "validation", "preferences", "prompts", "evaluation"}
    together = [text for texts in first.values() for text in texts]
    assert len(set(together)) == len(together) and len(first["demonstrations"]) + len(first["validation"]) == 100


def test_parquet_and_jsonl_give_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [pair(f"Question {i}?", [ANSWER], [OTHER]) for i in range(60)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    made = [
        ultra.prepare(config.Task(kind="ultra", preference_file=path, prompts=5))
        for path in (write(tmp_path / "p.jsonl", rows), str(tmp_path / "p.parquet"))
    ]
    assert made[0] == made[1] and len(made[0][0]["prompts"]) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: the file is empty"),
        ("\n\n", ":1: the file is empty"),
        (json.dumps(pair()) + "\n{oops\n", ":2: not JSON"),
        ("[1]\n", ": row 1: not a JSON object but int"),
        (json.dumps(pair()) + '\n{"prompt": "a", "chosen": "b"}\n', ":2: no key 'rejected'"),
        (json.dumps(pair(prompt=3)), ":1: 'prompt' has the wrong form"),
        (json.dumps(pair(chosen=[{"role": "user"}])), ":1: 'chosen' has the wrong form"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        check(config.Task(kind="ultra", preference_file=str(path)))
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_broken_gzip_encoding_and_parquet(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair()).encode() * 99)[:-9])
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=r"mend|save it as UTF-8|name it without .gz") as error:
            ultra.check_file(path, ultra.FILES["evaluation_file"])
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_texts_and_conversations_may_stand_in_one_file(tmp_path):
    path = write(tmp_path / "p.jsonl", [pair(), pair("Else?", [ANSWER], [OTHER])])
    with sources.opened(path, ultra.PREFERENCE, (), "preference_file") as rows:
        made = [ultra.preference(row) for _, row in rows]
    assert [row["chosen"] for row in made] == [[ANSWER], [ANSWER]]


def test_files_and_hub_ids(tmp_path):
    path = write(tmp_path / "p.jsonl", [pair()])
    task = config.Task(kind="ultra", sft_file="org/name", preference_file=path)
    assert files_of(task) == {"preference_file": path}
    assert files_of(config.Task(kind="stories")) == sources.contents(config.Corpus(kind="none")) == {}
    assert files_of(config.Benchmark(kind="preference_file", file=path)) == {"file": path}
    assert is_hub_id("HuggingFaceH4/ultrachat_200k")
    for missing in ("data/p.jsonl", "data/p.jsonl.gz", "/p", "./p/q", "~/p", "p.parquet", "just_a_name", "a/b/c"):
        with pytest.raises(UserError):
            is_hub_id(missing)


def test_settings_without_files():
    with pytest.raises(UserError, match="preference_file is empty"):
        check(config.Task(kind="ultra"))
    with pytest.raises(UserError, match="needs `file`"):
        check(config.Benchmark(kind="mt_bench"))


def test_hub_without_access_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*arguments, **more):
        raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(
        UserError, match=r"org/name: not readable from the hub \(offline\).*huggingface-cli login.*local"
    ):
        ultra.prepare(config.Task(kind="ultra", preference_file="org/name"))


def test_hub_rows_go_through_the_same_checks(tmp_path, monkeypatch):
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    good = [pair(f"Question {i}?", "yes", "no", image=i) for i in range(50)]
    commit, asked, rows = "a" * 40, [], [*good, pair(chosen=None)]

    def load(name, split, revision=None):
        asked.append((name, split, revision))
        path = tmp_path / commit / f"{len(asked)}.arrow"  # as the library's cache
        path.parent.mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
        return datasets.Dataset.from_file(str(path), split=split)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, revision=None: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = config.Task(kind="ultra", preference_file="o/prefs@v1.2")
    _, counts = ultra.prepare(task)
    assert asked == [("o/prefs", "train", "v1.2")] and ultra.sizes(task) is None
    hub = {"dataset": "o/prefs@v1.2", "split": "train", "commit": commit}
    assert counts["files"]["preference_file"] == {"read": 51, "kept": 50, "dropped": {"no_text": 1}, "hub": hub}
    rows = [{"prompt": 3, "chosen": "x", "rejected": "y"}]
    with pytest.raises(UserError, match=r"o/prefs@v1.2: row 1: 'prompt' has the wrong form: int"):
        ultra.prepare(task)
    rows = [{"prompt": "q", "chosen": "x", "image": 3}]
    with pytest.raises(UserError, match=r"o/prefs@v1.2: no column 'rejected' but prompt, chosen, image"):
        ultra.prepare(task)
    for kind, keys in (("mt_bench", "no column 'category'"), ("arena_hard", "no column 'cluster'")):
        with pytest.raises(UserError, match=keys):
            ask(config.Benchmark(kind, file="o/bench"))


def test_benchmarks_as_the_hub_has_them(monkeypatch):
    datasets = pytest.importorskip("datasets")
    mt = [{"prompt": ["One?", "Two?"], "prompt_id": i, "category": "math", "reference": ["1", "2"]} for i in (7,)]
    hard = [{"question_id": "q", "cluster": "c", "category": "v0.1", "turns": [{"content": "Hard?"}]}]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, revision: ["train"])
    for kind, row, expected in (
        ("mt_bench", mt, {"id": "mt_bench-7", "turns": ["One?", "Two?"], "category": "math", "reference": ["1", "2"]}),
        ("arena_hard", hard, {"id": "arena_hard-q", "turns": ["Hard?"], "category": "c", "reference": None}),
    ):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, split, revision, row=row: datasets.Dataset.from_list(row)
        )
        made = ask(config.Benchmark(kind, file="o/bench"))
        assert made.rows == [expected]
        assert made.facts == {"hub": {"dataset": "o/bench", "split": "None", "commit": None}}  # made here, not fetched
        turns = data.benchmark_kinds()[kind].turns(config.Benchmark(kind, file="o/bench"))
        assert turns == (1 if kind == "arena_hard" else None)


def test_a_hub_that_is_lost_between_two_questions_does_not_change_the_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    names = iter([["train_prefs"], ["train_sft", "test_sft"]])

    def split_names(name, revision):
        try:
            return next(names)
        except StopIteration:
            raise ConnectionError("offline") from None

    rows = {"o/prefs": [pair("Q?", "yes", "no")], "o/chat": [{"messages": [USER, ANSWER]}]}
    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: datasets.Dataset.from_list(rows[name]))
    with pytest.raises(UserError, match="o/chat: not readable from the hub"):
        ultra.prepare(config.Task(kind="ultra", preference_file="o/prefs", sft_file="o/chat"))


def test_hub_splits(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {
        "train_prefs": [pair(f"Question {i}?", "yes", "no") for i in range(50)],
        "train_sft": [{"messages": [{**USER, "content": f"Talk {i}"}, ANSWER]} for i in range(5)],
        "test_sft": [{"messages": [{**USER, "content": f"Test {i}"}, ANSWER]} for i in range(3)],
    }
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, revision: list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: datasets.Dataset.from_list(rows[split]))
    splits, _ = ultra.prepare(config.Task(kind="ultra", preference_file="o/prefs", sft_file="o/chat"))
    assert (len(splits["demonstrations"]), len(splits["validation"])) == (5, 3)
    with pytest.raises(UserError, match="o/prefs: no split"):
        sources.from_hub("o/prefs", ("nothing",))


@needs_real
def test_real_ultrafeedback():
    folder = REAL / "ultrafeedback"
    task = config.Task(
        kind="ultra",
        preference_file=str(folder / "train_1000.jsonl.gz"),
        evaluation_file=str(folder / "eval_200.jsonl.gz"),
        evaluation=50,
    )
    check(task)
    splits, counts = ultra.prepare(task)
    read = counts["files"]["preference_file"]
    assert read["read"] == 1000 and read["dropped"]["tie"] + read["dropped"]["identical"] == 114
    assert read["kept"] + sum(read["dropped"].values()) == 1000
    assert {name: len(rows) > 20 for name, rows in splits.items()} == dict.fromkeys(splits, True)
    assert len(splits["evaluation"]) == 50
    assert set(splits["preferences"][0]) == {"prompt", "chosen", "rejected"}


def test_references_of_mt_bench_are_of_three_categories(tmp_path):
    questions = [
        {"question_id": 1, "category": "math", "turns": ["1 + 1?", "2 + 2?"], "reference": ["two", "four"]},
        {"question_id": 2, "category": "math", "turns": ["1 + 2?", "2 + 3?"], "reference": ["three"]},
        {"question_id": 3, "category": "writing", "turns": ["Loop.", "Twice."], "reference": None},
        {"question_id": 4, "category": "roleplay", "turns": ["Be a pirate.", "Go on."], "reference": ["a note", ""]},
    ]
    answers = [{"question_id": i, "choices": [{"turns": [f"{i}a", f"{i}b"]}]} for i in (1, 4)]
    mt = config.Benchmark(
        "mt_bench", file=write(tmp_path / "q.jsonl", questions), reference_file=write(tmp_path / "a.jsonl", answers)
    )
    rows, read, dropped, _ = ask(mt)
    found = {row["id"]: row["reference"] for row in rows}
    assert found == {
        "mt_bench-1": ["1a", "1b"],
        "mt_bench-2": ["three", ""],
        "mt_bench-3": None,
        "mt_bench-4": None,
    }
    assert (read, dropped) == (4, {"empty_or_repeated": 0})


def question(i, turns=("One?", "Two?"), category="writing", **more):
    return {"question_id": i, "category": category, "turns": [f"{turn} ({i})" for turn in turns], **more}


def answers(i, *turns):
    return {"question_id": i, "choices": [{"turns": list(turns)}]}


@pytest.mark.parametrize(
    ("questions", "references", "message"),
    [
        (
            [question(1), question(2, ("One?",))],
            None,
            "q.jsonl:2: 1 turn, where the questions before have 2; make it two",
        ),
        ([question(1), question(1, ("Other?", "Two?"))], None, "q.jsonl:2: the id 1 is also that of q.jsonl:1"),
        ([question(1), question(2.5)], None, "q.jsonl:2: 'question_id' has the wrong form: float"),
        ([question(1), question([2])], None, "q.jsonl:2: 'question_id' has the wrong form: list"),
        ([question(1), question(2, category=3)], None, "q.jsonl:2: 'category' has the wrong form: int"),
        (
            [question(1) | {"turns": "One?"}],
            None,
            "q.jsonl:1: 'turns' has the wrong form: 'One?'; it is a list of texts",
        ),
        ([question(1) | {"turns": [3]}], None, "q.jsonl:1: 'turns' has the wrong form: int"),
        ([question(1, ("", ""))], None, None),
        ([{"question_id": 1, "category": "c", "turns": [" "]}], None, "q.jsonl: none of its 1 questions can be used"),
        ([question(1, reference="x")], None, "q.jsonl:1: 'reference' has the wrong form"),
        ([question(1)], [answers(9, "a", "b")], "r.jsonl: answers no question of q.jsonl; compare"),
        ([question(1), question("1", ("Other?", "Two?"))], None, "q.jsonl:2: the id 1 is also that of q.jsonl:1"),
        ([question(1), question(True)], None, "q.jsonl:2: 'question_id' has the wrong form: bool"),
        (
            [question(1, category="math")],
            [answers(1, "a")],
            "r.jsonl:1: 1 reference answers to question 1, which has 2",
        ),
        (
            [question(1, category="math"), question(2, category="coding")],
            [answers(1, "a", "b")],
            "r.jsonl: no answer to question 2 of coding (q.jsonl:2); add it, or leave the file out",
        ),
        (
            [question(1, category="math")],
            [answers(1, "a", "b"), answers(1, "c", "d")],
            "r.jsonl:2: question 1 is answered in r.jsonl:1 too; remove one",
        ),
        ([question(1)], [{"question_id": 1, "choices": []}], "r.jsonl:1: 'choices' has the wrong form: list"),
        ([question(1)], [{"question_id": 1}], "r.jsonl:1: no key 'choices' but question_id; each row needs"),
        ([question(1)], [answers({"a": 1}, "a")], "r.jsonl:1: 'question_id' has the wrong form: dict"),
        ([question(1)], [answers(1, "\ud83d", "b")], "r.jsonl:1: 'choices' has an answer that can't be used"),
    ],
)
def test_faults_of_questions_are_found_while_planning(tmp_path, monkeypatch, questions, references, message):
    monkeypatch.chdir(tmp_path)
    write(Path("q.jsonl"), questions)
    mt = config.Benchmark("mt_bench", file="q.jsonl")
    if references is not None:
        mt.reference_file = write(Path("r.jsonl"), references)
    for found_by in (check, lambda settings: ask(settings)):
        if message is None or ("none of its" in message and found_by is not check):
            found_by(mt)
            continue
        with pytest.raises(UserError) as error:
            found_by(mt)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_part_of_the_questions_goes_with_all_reference_answers(tmp_path):
    """81, "81" and the 81.0 of pandas are one id; the answers to questions that are left out are counted."""
    for identifier, other in ((81, "81"), ("81", 81), (81.0, 81)):
        file = write(tmp_path / "q.jsonl", [question(identifier, category="math")])
        references = write(tmp_path / "r.jsonl", [answers(other, "a", "b"), answers(82, "c"), answers(83, "d")])
        made, _, _, facts = ask(config.Benchmark("mt_bench", file=file, reference_file=references))
        assert [(row["id"], row["reference"]) for row in made] == [("mt_bench-81", ["a", "b"])]
        assert facts == {"references_unused": 2}
    file = write(tmp_path / "q.jsonl", [question(float("nan"))])  # of pandas, where there is none
    assert ask(config.Benchmark("mt_bench", file=file)).rows[0]["id"] == "mt_bench-0"


def test_prompts_that_differ_in_the_spelling_of_accents_are_one(tmp_path):
    forms = [pair(unicodedata.normalize(form, "Où est le café ?")) for form in ("NFC", "NFD")]
    counts = ultra.check_file(write(tmp_path / "p.jsonl", forms), ultra.FILES["preference_file"])
    assert counts == {"read": 2, "kept": 1, "dropped": {"duplicate_prompt": 1}}


ODD = (
    None,
    True,
    -1,
    float("nan"),
    10**30,
    "",
    " ",
    "\ud800",
    "\u200b",
    [],
    {},
    [[]],
    [None],
    ["x"],
    [USER],
    [1, 2],
    "a\nb",
)
ODD += ([{"role": "user"}], [{"role": "user", "content": None}], [{"from": "human", "value": "q"}], {"type": "image"})


def changed(value, rng):
    """Rows with one value, at a random place in them, exchanged, removed, repeated or renamed."""
    value = json.loads(json.dumps(value))
    inner, key = value, rng.randrange(len(value))
    while isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
        inner = inner[key]
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    kind = rng.choice(["exchange", "exchange", "exchange", "remove", "again"])
    if kind == "exchange":
        inner[key] = rng.choice(ODD)
    elif kind == "remove":
        del inner[key]
    elif isinstance(inner, list):
        inner.append(inner[key])
    else:
        inner[f"{key}_"] = inner.pop(key)
    return value


@pytest.mark.parametrize("name", ["preference_file", "sft_file", "evaluation_file", "file", "reference_file", "hard"])
def test_changed_rows_are_kept_dropped_or_refused_in_one_line(tmp_path, name):
    rng = random.Random(name)
    said = [{"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": f"a {i}"}]}]} for i in range(5)]
    said = [{"messages": [{**USER, "content": f"s {i}"}, *row["messages"][1:]]} for i, row in enumerate(said * 8)]
    whole = {
        "preference_file": [pair([{**USER, "content": f"p {i}"}], [ANSWER], [OTHER], metadata={}) for i in range(60)],
        "sft_file": said,
        "evaluation_file": [{"prompt": f"e {i}"} for i in range(4)],
        "file": [question(i, category="math", reference=["a", "b"]) for i in range(4)],
        "reference_file": [answers(i, "a", "b") for i in range(4)],
        "hard": [{"uid": str(i), "cluster": "c", "prompt": f"h {i}"} for i in range(4)],
    }
    texts = Counter()
    for _ in range(60):
        rows = whole | {name: changed(whole[name], rng)}
        files = {key: write(tmp_path / f"{key}.jsonl", values) for key, values in rows.items()}
        if name in ("file", "reference_file"):
            made = config.Benchmark("mt_bench", file=files["file"], reference_file=files["reference_file"])
        elif name == "hard":
            made = config.Benchmark("arena_hard", file=files["hard"])
        else:
            made = config.Task(kind="ultra", **{key: files[key] for key in list(whole)[:3]})
        try:
            check(made)
        except UserError as error:
            assert str(error).isprintable() and str(tmp_path) in str(error)
            texts["refused"] += 1
            continue
        kept = ultra.prepare(made)[0] if made.kind == "ultra" else ask(made).rows
        json.dumps(kept, ensure_ascii=False, allow_nan=False).encode()  # what check lets pass, the stage writes
        texts["kept"] += 1
    assert min(texts["kept"], texts["refused"]) > 1


def test_questions_that_stand_twice_are_dropped(tmp_path):
    questions = [
        question(1),
        question(2),
        {**question(1), "question_id": 3},
        question(1),
        {**question(4), "turns": ["a", ""]},
    ]
    questions[2]["turns"] = [turn.upper() + " " for turn in questions[2]["turns"]]
    mt = config.Benchmark("mt_bench", file=write(tmp_path / "q.jsonl", questions))
    made, read, dropped, _ = ask(mt)
    assert {row["id"] for row in made} == {"mt_bench-1", "mt_bench-2"} and read == 5
    assert dropped == {"empty_or_repeated": 3} and data.record(mt).turns(mt) == 2
    hard = [
        {"uid": i, "cluster": "c", "prompt": text} for i, text in enumerate(["Hard?", "hard?", "\u200b", "Harder?"])
    ]
    hard.append({"uid": 9, "cluster": None, "prompt": "Hardest?"})
    made, read, dropped, _ = ask(config.Benchmark("arena_hard", file=write(tmp_path / "h.jsonl", hard)))
    assert {row["id"] for row in made} == {"arena_hard-0", "arena_hard-3"} and read == 5
    assert dropped == {"empty_or_repeated": 2, "no_text": 1}


def turns_of(rows):
    return {
        normalised(message["content"])
        for row in rows
        for message in row.get("messages") or row["prompt"]
        if message["role"] == "user"
    }


def test_no_question_is_in_two_splits_wherever_it_stands(tmp_path):
    def system(*conversation, text="Be brief."):
        return [{"role": "system", "content": text}, *conversation]

    def asked(i):
        return {"role": "user", "content": f"Question {i}?"}

    pairs = [pair(f"Question {i}?") for i in range(40)]
    for i in range(40, 80):  # one question behind two system messages, and as a second turn behind other questions
        for text in ("Be brief.", "Be long."):
            pairs.append(pair("x", system(asked(i), ANSWER, text=text), system(asked(i), OTHER, text=text)))
        before = [{"role": "user", "content": f"First {i}?"}, ANSWER, asked(i)]
        pairs.append(pair("x", [*before, ANSWER], [*before, OTHER]))
    sft = [{"messages": system(asked(i), ANSWER)} for i in range(20, 60)]
    sft += [{"messages": [{"role": "user", "content": f"Hello {i}"}, ANSWER, asked(i), ANSWER]} for i in range(100)]
    evaluation = [{"prompt": system(asked(i))} for i in range(70, 90)]
    files = {
        "preference_file": write(tmp_path / "p.jsonl", pairs),
        "sft_file": write(tmp_path / "s.jsonl", sft),
        "evaluation_file": write(tmp_path / "e.jsonl", evaluation),
    }
    for names in (("preference_file",), tuple(files)):
        splits, counts = ultra.prepare(config.Task(kind="ultra", **{name: files[name] for name in names}))
        seen = [turns_of(rows) for rows in splits.values()]
        assert sum(map(len, seen)) == len(set().union(*seen))
        for read in counts["files"].values():
            assert read["read"] == read["kept"] + sum(read["dropped"].values())
    assert counts["files"]["sft_file"]["dropped"] == {"in_other_file": 40 + 90}
    assert counts["files"]["evaluation_file"]["dropped"] == {"in_other_file": 10}
    assert counts["files"]["preference_file"]["dropped"]["in_other_split"] > 10


def test_sizes_are_what_prepare_makes(tmp_path):
    rows = [pair(f"Question {i}?") for i in range(90)]
    task = config.Task(kind="ultra", preference_file=write(tmp_path / "p.jsonl", rows), prompts=3)
    splits, _ = ultra.prepare(config.Task(kind="ultra", preference_file=task.preference_file))
    assert ultra.sizes(task) == {name: len(values) for name, values in splits.items()}
    with pytest.raises(UserError, match=r"q\.jsonl: no rows for \w+ \(demonstrations"):
        check(config.Task(kind="ultra", preference_file=write(tmp_path / "q.jsonl", rows[:2])))
    with pytest.raises(UserError, match=r"r\.jsonl: none of its 1 rows can be used \(empty 1\)"):
        check(config.Benchmark("preference_file", file=write(tmp_path / "r.jsonl", [pair(" ")])))


@needs_real
def test_real_mt_bench():
    folder = REAL / "mt_bench"
    mt = config.Benchmark(
        "mt_bench",
        file=str(folder / "question.jsonl"),
        reference_file=str(folder / "reference_answer_gpt-4.jsonl"),
    )
    check(mt)
    rows, read, dropped, _ = ask(mt)
    assert read == len({row["id"] for row in rows}) == 80 and dropped == {"empty_or_repeated": 0}
    assert {len(row["turns"]) for row in rows} == {2}
    assert Counter(row["category"] for row in rows) == dict.fromkeys(
        ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), 10
    )
    with_reference = [row for row in rows if row["reference"]]
    assert Counter(row["category"] for row in with_reference) == {"reasoning": 10, "math": 10, "coding": 10}
    questions = {row["question_id"]: row for row in lines(folder / "question.jsonl")}
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in lines(folder / "reference_answer_gpt-4.jsonl")}
    for row in rows:
        number = int(row["id"].removeprefix("mt_bench-"))
        assert row["turns"] == questions[number]["turns"] and row["category"] == questions[number]["category"]
        assert row["reference"] == answers.get(number)
    alone, *_ = ask(config.Benchmark("mt_bench", file=str(folder / "question.jsonl")))
    assert [row["turns"] for row in alone] == [row["turns"] for row in rows]  # the order is the seed's
    assert sum(row["reference"] is not None for row in alone) == 29  # one question has no note of its own


@needs_real
def test_real_arena_hard():
    path = REAL / "arena_hard" / "question_v0.1.jsonl"
    hard = config.Benchmark("arena_hard", file=str(path))
    check(hard)
    rows, read, dropped, _ = ask(hard)
    assert read == len(rows) == 500 and dropped == {"empty_or_repeated": 0}
    questions = {f"arena_hard-{row['uid']}": row for row in lines(path)}
    assert len({row["category"] for row in rows}) == 250
    for row in rows:
        question = questions.pop(row["id"])
        assert (row["turns"], row["category"]) == ([question["prompt"]], question["cluster"])
        assert row["reference"] is None


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
