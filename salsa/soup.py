"""Weight averages ("soups") of models that share an architecture.

Weights are averaged in one place, `_Mixer`: it reads a piece of a tensor from each ingredient's safetensors file,
accumulates in float32 and rounds once to the stored dtype, for all rows of a grid of weights. `soups` writes a model
folder a row, from one reading of the ingredients and in the memory of a few pieces, whatever the models' size; PPO
copies `mixed_tensors` straight into a model, so that a grid of references costs no disk.

Left out: SLERP, task arithmetic and the like. Source: Model soups (2203.05482); SALSA (2411.01798) averages two.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import queue
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch

from salsa.rl.folders import INDEX, SINGLE, configuration, load_config, loading, read_object, shards, stored
from salsa.workflow import failures
from salsa.workflow.runs import UserError

PIECE = 2**18  # numbers averaged at once: an ingredient, the total and the result stay in a core's cache
THREADS = 16  # at most; more would wait for the disk, each with buffers of its own
# safetensors' names of the types that can be averaged or, without a fraction, compared.
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
# Keys of config.json in which two models of one architecture may differ without changing what the weights compute.
VOLATILE = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "id2label", "initializer_range", "label2id",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
DROPOUT = re.compile("dropout|pdrop")  # in keys: while training alone
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
EXPONENT = re.compile(r"e[+-]?\d{3}", re.IGNORECASE)
LARGEST_WEIGHT = 1000  # a soup lies between its ingredients, or not far beyond
ALIKE = "only like models can be averaged"


def parse_weights(weights, count):
    """Weights (numbers, decimals or fractions like "1/3") as floats.

    Raises UserError unless there are `count` of them and they sum to 1 within 1e-6.
    """
    shown = " ".join(str(weight)[:20] for weight in weights)
    try:
        if any(EXPONENT.search(str(weight)) for weight in weights):  # which would take all memory as a fraction
            raise ValueError
        parsed = [Fraction(str(weight)) for weight in weights]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"weights {shown}: each must be a decimal or a fraction") from None
    if len(parsed) != count:
        raise UserError(f"{len(parsed)} weights for {count} models; give one for each")
    if abs(sum(parsed) - 1) > Fraction(1, 10**6):
        raise UserError(f"weights sum to {float(sum(parsed)):.6g}; they must sum to 1")
    if any(abs(weight) > LARGEST_WEIGHT for weight in parsed):
        raise UserError(f"weights {shown}: each must lie within ±{LARGEST_WEIGHT}")
    return [float(weight) for weight in parsed]


def check_ingredients(models, loaded=False):
    """Raise UserError, naming the first difference, unless tensors, architecture and tokenizers of all agree.

    What is compared is what would be loaded: versions of transformers write the same in several ways.

    Args:
        loaded: whether the first has been loaded, and so is known to be whole.
    """
    first, *others = models = [Path(folder) for folder in models]
    reference, *aligned = _aligned(models)  # of headers alone: refused before gigabytes are read
    for name, tensor in reference.items():
        if tensor.dtype not in TYPES:
            remedy = "which can't be averaged; save the model in another type"
            raise UserError(f"{first}: tensor {name} is {tensor.dtype}, {remedy}")
    for other, tensors in zip(others, aligned, strict=True):
        for name in sorted(set(reference) | set(tensors)):
            mine, its = _describe(reference.get(name)), _describe(tensors.get(name))
            if mine != its:
                raise UserError(f"{other}: tensor {name} is {its}, in {first} it is {mine}; {ALIKE}")
        _check_configurations(first, other)
        _check_tokenizers(first, other)
    if not loaded and configuration(first).get("model_type"):
        from salsa.rl import models as loader  # which reads soups, and so this module

        whole_numbers = {name for name, tensor in reference.items() if not TYPES[tensor.dtype].is_floating_point}
        loader.check_whole(first, besides=whole_numbers)


def _describe(tensor):
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def shapes(folder):
    """Tensor name -> shape (a tuple) of a model folder, from the files' headers alone."""
    return {name: tensor.shape for name, tensor in stored(folder).items()}


def _aligned(models):
    """`folders.stored` of each model, by the first one's names.

    A head that is tied to the embedding may be stored as either, or as both: by the names that the first model has,
    it is found in each. UserError where it is stored as both, and they differ: then it is not tied.
    """
    stored_by_each = [stored(folder) for folder in models]
    if all(tensors.keys() == stored_by_each[0].keys() for tensors in stored_by_each):
        return stored_by_each
    tied = tied_names(models[0])  # name -> the name of the tensor that it is
    for folder, tensors in zip(models, stored_by_each, strict=True):
        for name, source in tied.items():
            if name in tensors and source in tensors and not _same(tensors[name], tensors[source]):
                raise UserError(
                    f"{folder}: tensors {name} and {source} differ, which {models[0]} ties (tie_word_embeddings); "
                    f"{ALIKE}"
                )
    for tensors in stored_by_each[1:]:
        for name, source in tied.items():
            for one, other in ((name, source), (source, name)):
                if one in stored_by_each[0] and one not in tensors and other in tensors:
                    tensors[one] = tensors[other]
        for name in {*tied, *tied.values()} - stored_by_each[0].keys():
            tensors.pop(name, None)
    return stored_by_each


def tied_names(folder):
    """Names of tensors that a model's configuration makes one with another -> the other's name; none where unknown."""
    try:
        config = load_config(folder)
    except UserError:
        return {}
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}
    with loading(folder), torch.device("meta"):
        return dict(AutoModelForCausalLM.from_config(config).all_tied_weights_keys)


def _same(one, other):
    """Whether two stored tensors are equal, byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.dtype not in TYPES:
        return one == other
    size = TYPES[one.dtype].itemsize
    buffers = torch.empty(2, PIECE * size, dtype=torch.uint8)
    with contextlib.ExitStack() as stack:
        files = _open_all(stack, [one, other])
        for start, count in _pieces(one.shape):
            pair = buffers[:, : count * size]
            for tensor, buffer in zip((one, other), pair, strict=True):
                _read(files[tensor.path], buffer, tensor.start + start * size)
            if not torch.equal(*pair):
                return False
    return True


def _check_configurations(first, other):
    """UserError, naming the first key, where two folders' configurations make different models."""
    mine, its = (_compared(configuration(folder)) for folder in (first, other))
    if mine != its:
        with contextlib.suppress(UserError):  # of no class that transformers has: compared as they are written
            mine, its = (_compared(_loaded(folder)) for folder in (first, other))
    for key in sorted(set(mine) | set(its)):
        if mine.get(key) != its.get(key):
            raise UserError(f"{other}: config.json has {key} = {its.get(key)!r}, {first} has {mine.get(key)!r}")


def _loaded(folder):
    """A configuration as transformers loads it, with defaults, and without the keys that its class doesn't know."""
    config = load_config(folder)
    known = type(config)().to_dict()
    return {key: value for key, value in config.to_dict().items() if key in known}


def _compared(values):
    """The entries of a configuration that count, several ways of writing one made the same."""
    values = {key: value for key, value in values.items() if key not in VOLATILE and not DROPOUT.search(key)}
    for key, value in values.items():
        if key == "eos_token_id" and value is not None:
            values[key] = sorted({str(i): i for i in value}.values(), key=str) if isinstance(value, list) else [value]
        elif isinstance(value, dict):
            values[key] = _compared(value)
    if "rope_type" in values:
        values.pop("type", None)  # an older name of it
    return values


def _check_tokenizers(first, other):
    """UserError, naming the first difference, where two folders' tokenizers read texts, or end them, differently."""
    mine, its = (
        {name: (folder / name).read_bytes() for name in TOKENIZERS if (folder / name).is_file()}
        for folder in (first, other)
    )
    if mine != its:
        if not (mine and its):
            raise UserError(f"{first if its else other}: has no tokenizer; {ALIKE}")
        mine, its = map(_tokenizer, (first, other))
        for part in mine:
            difference = _difference(mine[part], its[part])
            if difference:
                raise UserError(f"{other}: its tokenizer differs from that of {first} in {part}: {difference}; {ALIKE}")
    mine, its = map(_end_token, (first, other))
    if None not in (mine, its) and mine != its:
        raise UserError(f"{other}: its tokenizer's eos_token is {its!r}, that of {first} is {mine!r}; {ALIKE}")


def _tokenizer(folder):
    """What makes two tokenizers the same, as this version writes it: vocabulary and text processing, no padding."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        with loading(folder / "tokenizer.json"):
            text = Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
    else:
        from transformers import AutoTokenizer

        with loading(f"{folder}: the tokenizer"):
            text = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer.to_str()
    content = json.loads(text)
    added = {token.pop("id"): token for token in content["added_tokens"]}
    model = content["model"]
    vocabulary = model.pop("vocab", {})  # by its tokens, or (Unigram) a list
    return {
        "vocabulary": vocabulary if isinstance(vocabulary, dict) else dict(enumerate(vocabulary)),
        "merges": model.pop("merges", []),
        "model": {**model, "dropout": None},
        "added tokens": added,
        "normalizer": content["normalizer"],
        "pre-tokenizer": content["pre_tokenizer"],
    }


def _difference(mine, its):
    """Where two parts of tokenizers differ first, in words; None where they don't."""
    if mine == its:
        return None
    if not isinstance(mine, dict) or not isinstance(its, dict):
        return f"{str(its)[:60]} and {str(mine)[:60]}"
    key = next(key for key in [*mine, *its] if mine.get(key) != its.get(key))
    return f"{key!r} is {str(its.get(key))[:60]}, in the first {str(mine.get(key))[:60]}"


def _end_token(folder):
    """The end token that a folder's tokenizer_config.json names, or None."""
    path = folder / "tokenizer_config.json"
    token = read_object(path).get("eos_token") if path.is_file() else None
    return token.get("content") if isinstance(token, dict) else token


class _Mixer:
    """Averages pieces of tensors with every row of a grid of weights, in buffers that are made once.

    Args:
        grid: rows of weights, one for each ingredient.
    """

    def __init__(self, grid):
        self.grid = grid
        count = len(grid[0])
        self.raw = torch.empty(count + 1, 8 * PIECE, dtype=torch.uint8)  # as stored; the last is a result's
        self.floats = torch.empty(count + 1, PIECE)  # in float32; the last is the total

    def averages(self, name, ingredients, files, start, count):
        """Yield `count` numbers of the average from number `start` on, in the stored dtype, for each row of the grid.

        Args:
            ingredients: where each model stores the tensor.
            files: open files by their paths.

        What was yielded last is overwritten by the next. Tensors that are no floats (buffers) can't be averaged: they
        must be equal, else UserError.
        """
        dtype = TYPES[ingredients[0].dtype]
        raw = self.raw[:, : count * dtype.itemsize]
        for tensor, buffer in zip(ingredients, raw, strict=False):
            _read(files[tensor.path], buffer, tensor.start + start * dtype.itemsize)
        *parts, result = raw.view(dtype)
        if not dtype.is_floating_point:
            if any(not torch.equal(parts[0], part) for part in parts[1:]):
                raise UserError(f"tensor {name} is {dtype} and differs between the models; it can't be averaged")
            yield from itertools.repeat(parts[0], len(self.grid))
            return
        *floats, total = self.floats[:, :count]
        for part, converted in zip(parts, floats, strict=True):
            converted.copy_(part)
        for weights in self.grid:
            # Always in the ingredients' order: a sum in float32 has other bits in another, and a soup of a grid or of
            # several threads shall be the one that is made alone.
            torch.mul(floats[0], weights[0], out=total)
            for converted, weight in zip(floats[1:], weights[1:], strict=True):
                total.add_(converted, alpha=weight)
            if not total.sum().isfinite():  # hardly ever: 0 times infinity is no number, and so what isn't used isn't
                total.zero_()
                for converted, weight, tensor in zip(floats, weights, ingredients, strict=True):
                    if weight and not converted.isfinite().all():
                        raise UserError(
                            f"{tensor.path}: tensor {name} holds NaN or infinity; save the model again, or give it no "
                            "weight"
                        )
                    if weight:
                        total.add_(converted, alpha=weight)
            yield result.copy_(total)


def _pieces(shape):
    """(first number, numbers) of the pieces of a tensor."""
    size = math.prod(shape)
    return [(start, min(PIECE, size - start)) for start in range(0, size, PIECE)]


def _read(file, tensor, offset):
    """Fill a tensor of bytes from a file. Mapping the file instead would count its pages as this process's memory."""
    view = memoryview(tensor.numpy())
    while view:
        done = os.preadv(file.fileno(), [view], offset)
        if not done:
            raise UserError(f"{file.name}: ends too early; was it changed meanwhile?")
        view, offset = view[done:], offset + done


def _write(file, view, offset):
    """Write all of a memory view of bytes; one call may write less."""
    while view:
        done = os.pwrite(file.fileno(), view, offset)
        view, offset = view[done:], offset + done


def _open_all(stack, tensors):
    """Path -> open file, closed with the stack, of stored tensors."""
    # Unbuffered, for pieces are read at their offsets: a buffer would copy each once more.
    return {path: stack.enter_context(open(path, "rb", buffering=0)) for path in {tensor.path for tensor in tensors}}


def mixed_tensors(models, weights, names=None):
    """Yield (name, tensor) of the weighted average, one tensor at a time, in the ingredients' stored dtype.

    Args:
        models: folders that `check_ingredients` accepts.
        weights: floats that sum to 1, one for each folder.
        names: which tensors, in which order; all of the first model by default.

    Tensors that are no floats (buffers) can't be averaged: they must be equal, else UserError.
    """
    models = _aligned([Path(folder) for folder in models])
    mixer = _Mixer([weights])
    with contextlib.ExitStack() as stack:
        files = _open_all(stack, itertools.chain(*(model.values() for model in models)))
        for name in names if names is not None else models[0]:
            ingredients = [model[name] for model in models]
            dtype, shape = TYPES[ingredients[0].dtype], ingredients[0].shape
            tensor = torch.empty(shape, dtype=dtype)
            for start, count in _pieces(shape):
                (average,) = mixer.averages(name, ingredients, files, start, count)
                tensor.view(-1)[start : start + count] = average
            yield name, tensor


def soup(models, weights, output):
    """Write the weighted average of model folders as a model folder: `soups` with one output."""
    soups(models, [weights], [output])


def soups(models, grid, outputs):
    """Write weighted averages of model folders, as model folders that `from_pretrained` loads.

    Args:
        models: two or more folders of one architecture, dtype and tokenizer. Each is read once.
        grid: a row of weights for each output: one for each model, decimals or fractions, that sum to 1 within 1e-6.
            None may be left out.
        outputs: folders that don't exist yet, or are empty.

    Everything but the weights (configuration, tokenizer, how weights are cut into files) is the first model's. Each
    weight is w0*x0, plus w1*x1, … in float32, rounded once. torch.get_num_threads() pieces are in work at once, which
    changes no result. Raises UserError before anything is written when the ingredients don't fit together, an output
    exists or the disk is too small; whatever else fails, no part of an output is left.
    """
    models, outputs = [Path(folder) for folder in models], [Path(folder).resolve() for folder in outputs]
    grid = [parse_weights(weights, len(models)) for weights in grid]
    if not grid or len(grid) != len(outputs):
        raise UserError(f"{len(grid)} rows of weights for {len(outputs)} outputs; give each output its --weights")
    check_ingredients(models)
    _check_outputs(outputs)
    # Under another name until it is whole: a run that is killed leaves no folder that looks like a model.
    partial = [output.with_name(f".{output.name}.partial") for output in outputs]
    for folder in partial:  # of an earlier attempt that was killed
        shutil.rmtree(folder, ignore_errors=True)
    _check_room(models[0], outputs)
    try:
        for folder in partial:
            folder.mkdir(parents=True)
            for path in _companions(models[0]):
                shutil.copy2(path, folder / path.name)
        _write_weights(models, grid, partial)
        for folder, output in zip(partial, outputs, strict=True):
            if output.exists():
                output.rmdir()
            os.replace(folder, output)
    except OSError as error:
        raise UserError(f"{error.filename or outputs[0]}: {error.strerror}; try another --output") from None
    finally:
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)


def _check_outputs(outputs):
    """UserError where an output holds something, or two are one or lie in each other."""
    for output in outputs:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output}: exists and is not empty; choose another --output")
    for one, other in itertools.permutations(outputs, 2):
        if other == one or one in other.parents:
            raise UserError(f"{other}: is, or lies in, another output ({one}); choose another --output")


def _check_room(model, outputs):
    """UserError where the outputs, each as large as the model, don't fit on their disks."""
    size = sum(path.stat().st_size for path in [*_companions(model), *set(shards(model).values())])
    disks = {}
    for output in outputs:
        folder = next(folder for folder in [output, *output.parents] if folder.exists())
        disks.setdefault(folder.stat().st_dev, []).append(folder)
    for folders in disks.values():
        free = shutil.disk_usage(folders[0]).free
        if len(folders) * size > free:
            raise UserError(
                f"{folders[0]}: {len(folders)} x {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free; make "
                "room, or choose another --output"
            )


def _companions(folder):
    """The files of a model folder that a soup of it takes over: all but weights, and the manifest of the run."""
    index = {path.name for path in folder.glob("*.index.json")}
    if not (folder / SINGLE).is_file():
        index.discard(INDEX)
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in index | {"manifest.json"}
    ]


def _write_weights(models, grid, outputs):
    """Write the averages into the outputs' folders, in files and at places where the first model has its tensors."""
    models = _aligned(models)
    threads = torch.get_num_threads()
    mixers = [_Mixer(grid) for _ in range(min(threads, THREADS))]
    torch.set_num_threads(1)  # threads of torch's own, within each of ours, would be too many
    try:
        for path in sorted({tensor.path for tensor in models[0].values()}):
            _write_file(path, models, mixers, outputs)
    finally:
        torch.set_num_threads(threads)


def _write_file(path, models, mixers, outputs):
    """Write one file of the first model anew in each output, a thread a mixer: the same header, then the averages."""
    names = [name for name, tensor in models[0].items() if tensor.path == path]
    free = queue.SimpleQueue()
    for mixer in mixers:
        free.put(mixer)
    with contextlib.ExitStack() as stack:
        files = _open_all(stack, [model[name] for model in models for name in names])
        targets = [stack.enter_context(open(output / path.name, "wb", buffering=0)) for output in outputs]
        # Names, types and places are the first model's, so that a thread can write its piece without any other's.
        header = files[path].read(min(models[0][name].start for name in names))
        for target in targets:
            _write(target, memoryview(header), 0)

        def write_piece(piece):
            name, (start, count) = piece
            ingredients = [model[name] for model in models]
            mixer = free.get()
            try:
                averages = mixer.averages(name, ingredients, files, start, count)
                for target, average in zip(targets, averages, strict=True):
                    offset = ingredients[0].start + start * average.itemsize
                    _write(target, memoryview(average.view(torch.uint8).numpy()), offset)
            finally:
                free.put(mixer)

        pieces = [(name, piece) for name in names for piece in _pieces(models[0][name].shape)]
        pool = stack.enter_context(ThreadPoolExecutor(len(mixers)))  # ends before the files are closed
        for _ in pool.map(write_piece, pieces):  # the first error ends this, and cancels what hasn't begun
            pass


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="salsa soup",
        description="Average the weights of model folders. Repeat --weights and --output, in pairs, for several soups "
        "from one reading.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folders of one architecture")
    parser.add_argument(
        "--weights", nargs="+", action="append", required=True, metavar="W", help="decimals or fractions; sum 1"
    )
    parser.add_argument("--output", action="append", required=True, metavar="DIR")
    words = sys.argv[1:] if argv is None else argv
    # With a space in front, which a number may have, argparse takes a negative fraction for no option.
    arguments = parser.parse_args([f" {word}" if re.match(r"-[\d.]", str(word)) else word for word in words])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so what is half-written goes
    try:
        soups(arguments.models, arguments.weights, arguments.output)
    except (UserError, OSError, MemoryError) as error:
        sys.exit(f"{parser.prog}: {failures.describe(error) or error}")


if __name__ == "__main__":
    main()
