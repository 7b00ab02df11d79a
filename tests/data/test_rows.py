"""The one reader of local rows: its forms, what it refuses in one line, and that no bytes make it do anything else."""

import bz2
import gc
import gzip
import json
import lzma
import os
import subprocess
import sys

import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salsa import data
from salsa.data import prepare, rows, sources
from salsa.data.worlds import ultra
from salsa.workflow import config, runs
from salsa.workflow.runs import UserError

PREFERENCE = ultra.PREFERENCE.required


def compressed(content):
    """Without the time, which would be in a test's name, and differ between the processes that run tests."""
    return gzip.compress(content, mtime=0)


def pair(i, **more):
    return {"prompt": f"ask {i}", "chosen": "yes it is", "rejected": "no", **more}


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def read(path):
    return [row for _, row in rows.read(path)]


def refused(path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def parquet(path, values):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(values), path)


@pytest.mark.parametrize("capitals", [str, str.upper, str.title])
def test_every_form_gives_the_same_rows(tmp_path, capitals):
    values = [pair(i, chosen=[{"role": "assistant", "content": f"é {i}"}], metadata={"a": i / 3}) for i in range(700)]
    text = lines(values)
    forms = {
        "a.jsonl": text.encode(),
        "b.jsonl.gz": compressed(text.encode()),
        "c.json": json.dumps(values, indent=1, ensure_ascii=False).encode(),
        "d.json.gz": compressed(json.dumps(values).encode()),
        "e.json": text.encode(),  # many programs name lines so
        "f.ndjson": b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n \n").encode(),
        "g.json": b"\xef\xbb\xbf \n" + json.dumps(values).encode() + b"\n\n",
        "h": text.rstrip("\n").encode(),
        "j.jsonl": b"\xef\xbb\xbf \n" + json.dumps(values, indent=2).encode(),  # an array, all the same
    }
    for name, content in forms.items():
        path = tmp_path / capitals(name)
        path.write_bytes(content)
        assert read(path) == values, name
    parquet(tmp_path / capitals("i.parquet"), values)
    assert read(tmp_path / capitals("i.parquet")) == values


def test_an_array_is_read_in_pieces(tmp_path, monkeypatch):
    values = [pair(i, note="x" * (i % 50), deep=[{"a": [i, '"]},{']}] * (i % 3)) for i in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=2))
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(rows, "CHUNK", size)
        assert read(tmp_path / "a.json") == values


def test_the_stage_prepare_writes_the_same_bytes_whatever_the_form(tmp_path):
    messages = [{"role": "user", "content": "ask 3"}, {"role": "assistant", "content": None}]
    values = [pair(i, metadata={"score_chosen": 1.0, "score_rejected": i % 7}) for i in range(120)]
    values += [pair(200, chosen=None), pair(201, rejected="  "), pair(3)]
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "so"}]}
        for i in range(60)
    ]
    chats.append({"messages": messages})
    written = set()
    for name in ("p.jsonl", "p.jsonl.gz", "p.json", "p.parquet"):
        files = {}
        for setting, content in (("preference_file", values), ("sft_file", chats)):
            path = tmp_path / name / setting / name
            path.parent.mkdir(parents=True)
            if name.endswith("parquet"):
                parquet(path, content)
            elif name.endswith(".json"):
                path.write_text(json.dumps(content))
            else:
                path.write_bytes((gzip.compress if name.endswith("gz") else bytes)(lines(content).encode()))
            files[setting] = str(path)
        task = config.Task(kind="ultra", **files)
        ultra.check(task)
        output = tmp_path / name / "out"
        prepare.prepare(config.PrepareSettings(task), {}, output, None)
        made = {path.relative_to(output): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
        written.add(tuple(made.items()))
    assert len(written) == 1
    counts = json.loads(dict(next(iter(written)))[next(p for p, _ in next(iter(written)) if p.name == "counts.json")])
    assert counts["files"]["preference_file"]["dropped"] == {"tie": 17, "no_text": 1, "empty": 1, "duplicate_prompt": 1}
    assert counts["files"]["sft_file"] == {"read": 61, "kept": 60, "dropped": {"no_text": 1}}


@pytest.mark.parametrize(
    "name", ["p[1]", "p*", "q?", "a b", "ä", "x{1}", "%41", "a,b", "#h", "a::b", "~", "$HOME", "'\""]
)
def test_a_path_is_taken_as_it_is(tmp_path, name):
    for folder, word in ((name, "wanted"), ("p1", "sibling"), ("px", "sibling"), ("qx", "sibling")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prefs.jsonl").write_text(lines([pair(word)]))
    path = str(tmp_path / name / "prefs.jsonl")
    benchmark = config.Benchmark("preference_file", file=path)
    assert data.record(benchmark).local_files(benchmark) == {"file": path}
    assert read(path) == [pair("wanted")]


def test_a_pattern_is_no_path(tmp_path):
    (tmp_path / "prefs1.jsonl").write_text(lines([pair(1)]))
    for pattern in ("prefs*.jsonl", "prefs?.jsonl", "prefs[1].jsonl"):
        with pytest.raises(UserError, match="no such file; a pattern is not expanded, name one file"):
            sources.is_hub_id(str(tmp_path / pattern))
    (tmp_path / "prefs*.jsonl").write_text(lines([pair("star")]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "prefs*.jsonl")
    assert read(tmp_path / "prefs*.jsonl") == read(tmp_path / "link.jsonl") == [pair("star")]


def test_what_lies_where_a_hub_dataset_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.is_hub_id("org/name") and sources.is_hub_id("org/name@v1.0")
    for value in ("data/prefs.csv", "data/prefs.jsonl.zst", "org/prefs.JSONL"):
        with pytest.raises(UserError, match="no such file"):
            sources.is_hub_id(value)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for value in ("org/name", "org/name@main"):
        with pytest.raises(
            UserError, match=r"org/name: a folder, not a file; give one of its files \(none holds rows\)"
        ):
            sources.is_hub_id(value)
    (tmp_path / "org" / "name" / "train.Parquet").touch()
    (tmp_path / "org" / "name" / "README.md").touch()
    with pytest.raises(UserError, match=r"give one of its files \(train.Parquet\)"):
        sources.local_files("file")(config.Benchmark("preference_file", file="org/name"))
    (tmp_path / "org" / "file").write_text(lines([pair(1)]))
    assert not sources.is_hub_id("org/file")
    with pytest.raises(UserError, match="a file lies at org/file"):
        sources.is_hub_id("org/file@main")
    (tmp_path / "org" / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="a link to a file that is not there"):
        sources.is_hub_id("org/link")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl:1: the file is empty"),
        ("a.jsonl.gz", b"", "a.jsonl.gz:1: the file is empty"),
        ("a.json", b"[ ]", "a.json:1: the file is empty"),
        ("a.jsonl", "ä".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.jsonl", b'{"a": "\xff"}', "a.jsonl:1: not UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', "a.json: row 2: not UTF-8"),
        ("a.jsonl", b"PAR1", "name it .parquet"),
        ("a.jsonl", compressed(b"{}"), "name it .jsonl.gz"),
        ("a.jsonl.gz", compressed(compressed(b"{}")), "compressed twice"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz: not compressed; name it without .gz"),
        ("a.parquet.gz", b"PAR1", "a.parquet.gz: not compressed; name it without .gz"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "compressed by zstd; decompress it"),
        ("a.jsonl", bz2.compress(b"{}"), "compressed by bzip2; decompress it"),
        ("a.jsonl.xz", lzma.compress(b"{}"), "compressed by xz; decompress it"),
        ("a.jsonl.zip", b"PK\x03\x04", "a ZIP archive; unpack it"),
        ("a.arrow", b"ARROW1\0\0", "Arrow by its content; save it as Parquet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.jsonl", b"prompt,chosen\r\na,b\r\n", "a.jsonl:1: not JSON (Expecting value); give one row a line, as JSON"),
        (
            "a.jsonl",
            b'{\n  "a": 1\n}\n',
            "a.jsonl:1: not JSON (Expecting property name enclosed in double quotes); give",
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": 1}{"a": 2}', "a.jsonl:2: not JSON (Extra data); give each row a line of its own"),
        (
            "a.jsonl",
            b'{"a": 1},\n',
            "a.jsonl:1: not JSON (Extra data); give each row a line of its own, with",
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": 1,}\n', "a.jsonl:2: not JSON (Expecting property name"),
        ("a.jsonl", b'{"a": 1}\n\0\0', "a.jsonl:2: not JSON (Expecting value); mend or remove it"),
        ("a.jsonl.gz", compressed(b'{"a": 1}\n' * 99)[:-9], "can't be read"),
        ("a.jsonl.gz", compressed(b'{"a": 1}\n')[:-6] + b"abcdef", "can't be read"),
        ("a.parquet", b"PAR1 and no more PAR1", "not a Parquet file"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.parquet.gz", compressed(b"PAR1"), "compressed Parquet"),
        ("a.jsonl", b'{"a": 1}\n\n[1]', "a.jsonl:3: not a JSON object but list; mend or remove it"),
        ("a.jsonl", b"[[1]]", "a.jsonl: row 1: not a JSON object but list"),
        ("a.json", b"[{}, 7]", "a.json: row 2: not a JSON object but int"),
        ("a.json", b'[{"a": 1}', "a.json: row 2: not JSON (the array doesn't end)"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "a.json: row 2: not JSON (no comma before it)"),
        ("a.json", b'[{"a": 1},]', "a.json: row 2: not JSON"),
        ("a.json", b'[{"a": 1}] {}', "a.json: row 2: not JSON (more text after the array)"),
        ("a.json", b'[{"a": 1', "a.json: row 1: not JSON"),
        ("a.jsonl", b'{"a": {"b": 1, "b": 2}}', "a.jsonl:1: the key 'b' stands twice in one object; remove one"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl:1: not JSON (Exceeds the limit"),
        ("a.jsonl", b'{"a": ' + b"[" * 200_000, "a.jsonl:1: nested too deep"),
        ("a.json", b'[{"a": ' + b"[" * 200_000, "a.json: row 1: nested too deep"),
        ("a.jsonl", b'{"a": "\x00"}', "a.jsonl:1: not JSON (Invalid control character"),
        ("a\nb.jsonl", b"{", "a\\nb.jsonl"),
    ],
)
def test_what_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_who_stops_reading_leaves_nothing_open(tmp_path, recwarn):
    """A reader that is dropped in the middle of an array says nothing on stderr and holds no file."""
    (tmp_path / "a.json").write_text(json.dumps([pair(i) for i in range(9)]))
    for _ in rows.read(tmp_path / "a.json"):
        break
    with pytest.raises(UserError, match="row 1: no key 'messages'"):
        ultra.check_file(tmp_path / "a.json", ultra.FILES["sft_file"])
    gc.collect()
    assert not recwarn.list


def test_a_row_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST", 1000)
    monkeypatch.setattr(rows, "CHUNK", 100)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b" " * 100_000)
    (tmp_path / "a.json").write_bytes(b'[{}, {"a": "' + b" " * 100_000)
    assert "a.jsonl:2: longer than" in refused(tmp_path / "a.jsonl")
    assert "a.json: row 2: not JSON, or longer than" in refused(tmp_path / "a.json")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "a pipe or a device" in refused(tmp_path / "pipe.jsonl")
    assert "a folder, not a file; give one of its files (pipe.jsonl)" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "none.jsonl")
    assert "no such file" in refused(tmp_path / "pipe.jsonl" / "x.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "can't be read" in refused(tmp_path / "loop.jsonl")
    for value in (
        "/dev/zero",
        "x" * 300 + ".jsonl",
        "a\0b.jsonl",
        "~nobody_here/p.jsonl",
        "a\nb",
        "s3://b/p.jsonl",
        "",
    ):
        with pytest.raises(UserError) as error:
            sources.is_hub_id(value)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_no_permission(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").chmod(0)
    assert "can't be read (Permission denied)" in refused(tmp_path / "a.jsonl")


def test_a_parquet_file_of_odd_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {"prompt": ["a", None], "when": pyarrow.array([2**62, 1], pyarrow.timestamp("ns")), "n": [1, 2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert [row for _, row in rows.read(tmp_path / "a.parquet", ("prompt",))] == [{"prompt": "a"}, {"prompt": None}]
    with pytest.raises(UserError, match="no column messages but prompt, when, n"):
        list(rows.read(tmp_path / "a.parquet", ("messages",)))
    twice = pyarrow.table([[1], [2]], names=["prompt", "prompt"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    assert "two columns 'prompt'; remove one" in refused(tmp_path / "b.parquet")


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text(lines([pair(i) for i in range(100)]))
    opened = []
    real = rows.read
    monkeypatch.setattr(rows, "read", lambda *arguments: opened.append(arguments) or real(*arguments))
    for seed in (0, 1):
        ultra.check(config.Task(kind="ultra", preference_file=str(path), seed=seed))
    assert len(opened) == 1
    path.write_text(lines([pair(i) for i in range(200)]))
    ultra.check(config.Task(kind="ultra", preference_file=str(path)))
    assert len(opened) == 2 and ultra.sizes(config.Task(kind="ultra", preference_file=str(path)))["prompts"] > 30


def test_a_file_that_changed_since_the_plan(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(lines([pair(i) for i in range(100)]))
    task = config.Task(kind="ultra", preference_file=str(path))
    files = {"preference_file": sources.describe(path)}
    prepare.prepare(config.PrepareSettings(task, files), {}, tmp_path / "out", None)
    path.write_text(lines([pair(i) for i in range(101)]))
    with pytest.raises(UserError, match=r"p\.jsonl: changed since the run was planned \(preference_file\); plan again"):
        prepare.prepare(config.PrepareSettings(task, files), {}, tmp_path / "two", None)
    assert not (tmp_path / "two").exists()
    made = config.Benchmark("preference_file", file=str(path))
    sources.check_unchanged(made, files | {"file": sources.describe(path)})  # whatever became of its task's files
    with pytest.raises(UserError, match=r"p\.jsonl: changed since the run was planned \(file\)"):
        sources.check_unchanged(made, {"file": files["preference_file"]})
    with pytest.raises(UserError, match=r"org/gone: changed since the run was planned \(file\)"):
        sources.check_unchanged(config.Benchmark("preference_file", file="org/gone"), {"file": sources.describe(path)})


GOOD = lines(
    [pair(i, metadata={"score_chosen": 1.5, "note": "é \ud83d"}, list=[1, None, True]) for i in range(6)]
).encode()
MUTATION = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "double", "swap"]),
    st.integers(0, len(GOOD) - 1),
    st.integers(0, len(GOOD) - 1),
    st.sampled_from(
        [
            b"\xff",
            b"\0",
            b"\n",
            b'"',
            b"{",
            b"]",
            b",",
            b"null",
            b"NaN",
            b"1e999",
            b"\\ud800",
            b"\xef\xbb\xbf",
            b"[" * 5000,
        ]
    ),
)


def mutated(content, mutations):
    for kind, at, other, piece in mutations:
        at, other = sorted((at % (len(content) + 1), other % (len(content) + 1)))
        if kind == "flip":
            content = content[:at] + bytes(255 - byte for byte in content[at : at + 1]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[min(other, at + 40) :]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "double":
            content = content[:other] + content[at:other] + content[other:]
        else:
            content = content[:at] + content[other:] + content[at:other]
    return content


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_mutated_bytes_are_rows_or_one_line(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("mutated")
    good = {"a.json": b"[" + GOOD.strip().replace(b"\n", b",") + b"]", "a.jsonl.gz": compressed(GOOD)}.get(name, GOOD)
    if name == "a.parquet":
        parquet(folder / name, [pair(i) for i in range(6)])
        good = (folder / name).read_bytes()

    @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(MUTATION, min_size=1, max_size=3))
    def attempt(mutations):
        path = folder / name
        path.write_bytes(mutated(good, mutations))
        try:
            made = [ultra.preference(row) for row in read(path)]
        except UserError as error:
            assert "\n" not in str(error)
        else:
            runs.write_jsonl(folder / "written.jsonl", made)
            assert "\\ud" not in (folder / "written.jsonl").read_text()

    attempt()


def test_the_reader_starts_no_library(tmp_path):
    (tmp_path / "p.jsonl").write_text(lines([pair(i) for i in range(100)]))
    code = (
        "import sys; from salsa.data.worlds import ultra; from salsa.workflow import config;"
        f"ultra.check(config.Task(kind='ultra', preference_file={str(tmp_path / 'p.jsonl')!r}));"
        "assert not {'datasets', 'pyarrow', 'pandas', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
