"""What runs, soups, exports and publications write is as readable as the umask says, whatever safetensors thinks."""

import contextlib
import os
import stat

import pytest
from conftest import EXECUTION, move, random_llama, save_model

from salsa import soup
from salsa.workflow import runs

MODES = {0o022: (0o644, 0o755), 0o002: (0o664, 0o775), 0o077: (0o600, 0o700)}  # umask -> of files, of folders


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder):
    """The permissions of the files in a folder, and those of it and its folders."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]  # filelock's own
    files = {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()}
    return files, {stat.S_IMODE(path.stat().st_mode) for path in [folder, *paths] if path.is_dir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Two model folders that their owner alone may read."""
    root, first = tmp_path_factory.mktemp("saved"), random_llama(tokenizer, 0)
    with umask(0o077):
        return [save_model(model, tokenizer, root / str(i)) for i, model in enumerate((first, move(first, 1, 0.1)))]


@pytest.mark.parametrize("mask", MODES)
def test_a_run_is_as_readable_as_the_umask_says(tmp_path, tokenizer, mask):
    def write(settings, parents, output, execution):
        save_model(random_llama(tokenizer, 0), tokenizer, output / "model")
        runs.write_json(output / "evaluation.json", {})

    with umask(mask):
        runs.execute("sft", 1, write, EXECUTION, {}, tmp_path / "run", EXECUTION)
    runs.verify(tmp_path / "run")
    files, folders = MODES[mask]
    assert modes(tmp_path / "run") == ({files}, {folders})


@pytest.mark.parametrize("mask", MODES)
def test_so_are_copies_and_soups_of_models_that_are_not(tmp_path, saved, mask):
    with umask(mask):
        runs.copy_files(saved[0], tmp_path / "copy")
        soup.soup(saved, ["1/2", "1/2"], tmp_path / "soup")
    files, folders = MODES[mask]
    assert modes(tmp_path / "copy") == modes(tmp_path / "soup") == ({files}, {folders})
