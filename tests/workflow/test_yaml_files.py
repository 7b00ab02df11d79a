"""What is wrong with a YAML file is one line with its number, soon, and nothing in it runs."""

import shutil
import time

import pytest

from salsa.workflow import compose, overriding, yaml_files
from salsa.workflow.runs import UserError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n"
for before, after in zip("abcdefghi", "bcdefghij", strict=True):
    BOMB += f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n"
MALFORMED = {  # content -> the line, and what is said
    "unclosed": (b"name: x\nkl_coefs: [0.1,\nseed: 1\n", 3, "no YAML"),
    "tab": (b"ppo:\n\tepochs: 1\n", 2, "no YAML"),
    "quote": (b'name: "x\nseed: 1\n', 2, "in what begins in line 1"),
    "colon": (b"a: b: c\n", 1, "no YAML"),
    "undefined": (b"seed: *nothing\n", 1, "undefined alias"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", 2, "another document"),
    "doubled": (b"ppo:\n  epochs: 1\n  warmup: 1\n  epochs: 2\n", 4, "'epochs' stands there twice, first in line 2"),
    "bomb": (BOMB.encode(), 1, "4412961516 values, with aliases written out"),
    "itself": (b"a: 1\nb: &b [*b]\n", 2, "an alias of itself"),
    "deep": (b"a:\n  " + b"[" * 5000 + b"]" * 5000, 2, "nested more than 50 deep"),
    "python": (
        b"a: 1\nb: !!python/object/apply:os.system ['touch ran']\n",
        2,
        "a tag, !!python/object/apply:os.system",
    ),
    "tag": (b"a: !env HOME\n", 1, "a tag, !env"),
    "latin": (b"a: 1\nb: \xe9\n", 2, "not UTF-8"),
    "nul": (b"a: 1\nb: \0\n", 2, "the character U+0000: special characters are not allowed"),
    "mark": (b"\xef\xbb\xbfa: 1\n", 1, "byte-order mark"),
    "utf-16": ("a: 1\n".encode("utf-16"), 1, "byte-order mark"),
    "empty": (b"# nothing\n", 1, "holds nothing"),
    "list": (b"\n- seed: 1\n", 2, "no mapping"),
    "text": (b"seed=1\n", 1, "no mapping"),
    "number": (b"1: 2\n", 1, "the key 1 is no text"),
    "switch": (b"a: 1\non: 2\n", 2, "the key on is no text"),
    "list as key": (b"[a]: 2\n", 1, "the key … is no text"),
    "tab after colon": (b"a: 1\nseed:\t3\n", 2, "no YAML"),
    "octal": (b"seed: 010\n", 1, "YAML reads 010 as 8"),
    "sixtieths": (b"seed: 1:30\n", 1, "YAML reads 1:30 as 90"),
    "yes": (b"a: 1\ntitle: Yes\n", 2, "YAML reads Yes as True"),
    "digits": (b"seed: " + b"9" * 5000, 1, "a number of 5000 characters"),
    "merged text": (b"a: 1\nppo:\n  <<: 3\n", 3, "expected a mapping"),
    "merged twice": (b"a:\n  <<: {b: 1}\n  <<: {b: 2}\n", 3, "the key '<<' stands there twice"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_wrong_is_one_line(name, tmp_path, monkeypatch):
    content, line, says = MALFORMED[name]
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        yaml_files.check(path)
    text = str(error.value)
    assert text.startswith(f"{path}:{line}: ") and says in text and "\n" not in text
    assert time.monotonic() - started < 5 and not (tmp_path / "ran").exists()


def test_a_file_that_is_mended_is_read_again(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("a: [")
    with pytest.raises(UserError):
        yaml_files.check(path)
    path.write_text("a: &a {b: 1}\nc: {<<: *a}\nd: *a\n")
    assert yaml_files.check(path) is None
    with pytest.raises(UserError, match="No such file"):
        yaml_files.check(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["unclosed", "doubled", "bomb", "python", "list", "latin", "tab after colon"])
def test_files_of_the_configuration_are_looked_at(name, tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    shutil.copytree(overriding.CONF, conf)
    monkeypatch.setattr(overriding, "CONF", conf)
    content, line, says = MALFORMED[name]
    (conf / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        compose.compose(["experiment=mine"])
    assert f"experiment/mine.yaml:{line}: " in str(error.value) and says in str(error.value)
    assert compose.compose([])  # which doesn't read that file


@pytest.mark.parametrize(
    "text", ["title: 'on'", "seed: 10", "a: 0.05", "a: -0", "a: 12e3", "a: true", "a: '010'", "a: 0x10"]
)
def test_numbers_and_switches_that_mean_what_they_look_like_pass(text, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    assert yaml_files.check(tmp_path / "file.yaml") is None
