"""Weight averages ("soups") and other linear combinations of models that share an architecture.

Weights are averaged in one place, `_Mixer`: it reads a piece of a tensor from each ingredient's safetensors file,
accumulates in float32 and rounds once to the stored dtype, for all rows of a grid of weights. `soups` writes one model
folder per row from one reading of the ingredients. Its memory is that of a few pieces per thread, whatever the size of
the models. Training copies `mixed_tensors` straight into a model, so that a grid of references costs no disk.

The other methods of mixing (salsa.mixes) choose coefficients and are written here, too: `combinations` takes
coefficients that differ between tensors, adds up in float64, for the terms of task vectors cancel each other, and
`task_products` reads what SLERP computes its coefficients from.

Left out: methods that are no linear combination of whole tensors (TIES, DARE and the like). Sources: Model soups
(2203.05482); SALSA (2411.01798) averages two.
"""

import contextlib
import itertools
import math
import os
import queue
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch

from salsa import mix_card
from salsa.rl import tokenizers
from salsa.rl.folders import INDEX, SINGLE, configuration, load_config, loading, shards, stored
from salsa.workflow import bounds, failures, interrupts
from salsa.workflow.messages import Parser, UserError

# Numbers averaged at once in float32, and half as many in float64. An ingredient, the total and the result (1 MiB each)
# then stay in a core's cache, where each row of the grid finds them again; larger pieces would be read from memory once
# per row.
PIECE = 2**18
THREADS = 16  # at most; more would only wait for the disk, and each has buffers of its own
# safetensors' names of the types that can be averaged (floats) or must be equal (all others).
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
DROPOUT = re.compile("dropout|pdrop")  # in keys of config.json that matter in training alone
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
LARGEST_WEIGHT = 1000  # a soup lies between its ingredients, or not far beyond
ALIKE = "only like models can be averaged"


def parse_weights(weights, count):
    """Weights (numbers, decimals or fractions like "1/3") as floats.

    Raises UserError unless there are `count` of them and they sum to 1 within 1e-6.
    """
    shown = " ".join(str(weight)[:20] for weight in weights)
    parsed = [bounds.fraction(weight) for weight in weights]
    if None in parsed:
        raise UserError(f"weights {shown}: each must be a decimal or a fraction")
    if len(parsed) != count:
        raise UserError(f"{len(parsed)} weights for {count} models; give one for each")
    if abs(sum(parsed) - 1) > Fraction(1, 10**6):
        raise UserError(f"weights sum to {float(sum(parsed)):.6g}; they must sum to 1")
    if any(abs(weight) > LARGEST_WEIGHT for weight in parsed):
        raise UserError(f"weights {shown}: each must lie within ±{LARGEST_WEIGHT}")
    return [float(weight) for weight in parsed]


def check_ingredients(models, loaded=False):
    """Raise UserError, naming the first difference, unless tensors, architecture and tokenizers of all agree.

    Configurations and tokenizers are compared as they would be loaded, because versions of transformers write the same
    one in several ways.

    Args:
        loaded: whether the first model was loaded before, so that no weight of it can be missing.
    """
    first, *others = models = [Path(folder) for folder in models]
    reference, *aligned = _aligned(models)  # reads headers alone, so that gigabytes are read only of models that fit
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
        tokenizers.check_same(first, other)
    if not loaded and configuration(first).get("model_type"):
        from salsa.rl import models as loader  # here, because it imports this module

        whole_numbers = {name for name, tensor in reference.items() if not TYPES[tensor.dtype].is_floating_point}
        loader.check_whole(first, besides=whole_numbers)


def _describe(tensor):
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def shapes(folder):
    """Tensor name -> shape (a tuple) of a model folder, from the files' headers alone."""
    return {name: tensor.shape for name, tensor in stored(folder).items()}


def _aligned(models):
    """`folders.stored` of each model, by the names that the first model has.

    A head that is tied to the embedding may be stored under either name or under both, so it is looked up under both.
    Raises UserError where a model stores both, and they differ: then they are not tied.
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
    """Name of a tensor that the model's configuration ties to another -> the other's name; {} for an unknown class."""
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
        for start, count in _pieces(one.shape, PIECE):
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
        # Configurations of a class that transformers doesn't have are compared as they are written.
        with contextlib.suppress(UserError):
            mine, its = (_compared(_loaded(folder)) for folder in (first, other))
    for key in sorted(set(mine) | set(its)):
        if mine.get(key) != its.get(key):
            raise UserError(f"{other}: config.json has {key} = {its.get(key)!r}, {first} has {mine.get(key)!r}")


def _loaded(folder):
    """A configuration as transformers loads it, with defaults and without keys that its class doesn't know."""
    config = load_config(folder)
    defaults = type(config)().to_dict()
    return {key: value for key, value in config.to_dict().items() if key in defaults}


def _compared(values):
    """The entries of a configuration that matter, each in one of the ways in which it may be written."""
    values = {key: value for key, value in values.items() if key not in VOLATILE and not DROPOUT.search(key)}
    for key, value in values.items():
        if key == "eos_token_id" and value is not None:
            values[key] = sorted({str(i): i for i in value}.values(), key=str) if isinstance(value, list) else [value]
        elif isinstance(value, dict):
            values[key] = _compared(value)
    if "rope_type" in values:
        values.pop("type", None)  # the older name of rope_type
    return values


class _Mixer:
    """Combines pieces of tensors with every row of a grid of coefficients, in buffers that are made once.

    The buffers are all the memory that averaging takes: of two models, 9 MiB for each thread's mixer.

    Args:
        count: the number of ingredients.
        precision: the type in which they are added up: float32 or float64.

    `piece` is how many numbers it takes at most.
    """

    def __init__(self, count, precision):
        self.piece = _piece(precision)
        # Ingredients as they are stored, of at most 8 bytes a number, and last the result.
        self.raw = torch.empty(count + 1, 8 * self.piece, dtype=torch.uint8)
        # Ingredients in the sum's type, converted once for all rows of the grid, and last the total. A sum in bfloat16,
        # with its 8 bits of precision, would be rounded after every term.
        self.floats = torch.empty(count + 1, self.piece, dtype=precision)

    def averages(self, name, grid, ingredients, files, start, count):
        """Yield, for each row of the grid, `count` numbers of the average from number `start` on, in the stored dtype.

        Args:
            grid: rows of this tensor's coefficients, with one for each ingredient.
            ingredients: where each model stores the tensor.
            files: open files by their paths.

        Each yielded piece is overwritten by the next, so it has to be written or copied at once. Tensors that are no
        floats (buffers) can't be averaged: they must be equal, else UserError.
        """
        *parts, result = _read_parts(self.raw, ingredients, files, start, count)
        if not result.is_floating_point():
            if any(not torch.equal(parts[0], part) for part in parts[1:]):
                raise UserError(f"tensor {name} is {result.dtype} and differs between the models; it can't be averaged")
            yield from itertools.repeat(parts[0], len(grid))
            return
        *floats, total = self.floats[:, :count]
        for part, converted in zip(parts, floats, strict=True):
            converted.copy_(part)
        for weights in grid:
            # Always in the order of the ingredients: another order gives a float32 sum other bits, and a soup must not
            # depend on the grid or on the number of threads that it was made with.
            torch.mul(floats[0], weights[0], out=total)
            for converted, weight in zip(floats[1:], weights[1:], strict=True):
                total.add_(converted, alpha=weight)
            # Rarely. 0 times infinity is nan: add up again without ingredients of weight 0, which may hold anything.
            if not total.sum().isfinite():
                total.zero_()
                for converted, weight, tensor in zip(floats, weights, ingredients, strict=True):
                    if weight:
                        _check_finite(converted, name, tensor)
                        total.add_(converted, alpha=weight)
            yield result.copy_(total)


class _Multiplier:
    """Inner products of pieces of task vectors, in buffers that are made once and no larger than a mixer's.

    Args:
        count: the number of models, with the origin.
        from_origin: whether the last model is the origin of the task vectors; else this is 0.
    """

    def __init__(self, count, from_origin):
        self.piece = _piece(torch.float64)
        self.raw = torch.empty(count, 8 * self.piece, dtype=torch.uint8)
        self.vectors = torch.empty(count, self.piece, dtype=torch.float64)
        self.from_origin = from_origin

    def products(self, name, ingredients, files, start, count):
        """The inner products of `count` numbers of the task vectors, from number `start` on: (M, M) float64."""
        parts = _read_parts(self.raw, ingredients, files, start, count)
        vectors = self.vectors[:, :count]
        for part, vector in zip(parts, vectors, strict=True):
            vector.copy_(part)
        if self.from_origin:
            vectors, origin = vectors[:-1], vectors[-1]
            vectors -= origin
        products = vectors @ vectors.T
        if not products.sum().isfinite():
            for part, tensor in zip(parts, ingredients, strict=True):
                _check_finite(part.float(), name, tensor, "leave it out")
        return products


def _check_finite(numbers, name, tensor, otherwise="give it no weight"):
    """UserError where a piece of an ingredient's tensor, in float32, is not finite."""
    if not numbers.isfinite().all():
        remedy = f"save the model again, or {otherwise}"
        raise UserError(f"{tensor.path}: tensor {name} holds NaN or infinity; {remedy}")


def _piece(precision):
    """How many numbers are averaged at once in a type of floats."""
    return max(1, 4 * PIECE // precision.itemsize)


def _pieces(shape, piece):
    """(place of its first number, how many numbers) of each piece of a tensor, of at most `piece` numbers."""
    size = math.prod(shape)
    return [(start, min(piece, size - start)) for start in range(0, size, piece)]


def _read_parts(raw, ingredients, files, start, count):
    """Read `count` numbers of each ingredient's tensor into a row of `raw` (bytes); all rows, in the stored dtype."""
    dtype = TYPES[ingredients[0].dtype]
    raw = raw[:, : count * dtype.itemsize]
    for tensor, buffer in zip(ingredients, raw, strict=False):
        _read(files[tensor.path], buffer, tensor.start + start * dtype.itemsize)
    return raw.view(dtype)


def _read(file, tensor, offset):
    """Fill a tensor of bytes from a file, starting at the byte `offset`."""
    # Not memory-mapped: pages of a mapped file count as this process's memory, up to the size of all models. preadv
    # reads into the buffer, and leaves no position in the file that threads would share.
    view = memoryview(tensor.numpy())
    while view:
        done = os.preadv(file.fileno(), [view], offset)
        if not done:
            raise UserError(f"{file.name}: ends too early; was it changed meanwhile?")
        view, offset = view[done:], offset + done


def _write(file, view, offset):
    """Write all of a memory view of bytes at `offset`; one call of pwrite may write less."""
    while view:
        done = os.pwrite(file.fileno(), view, offset)
        view, offset = view[done:], offset + done


def _open_all(stack, tensors):
    """Path -> open file, for each file of some stored tensors; the stack closes them."""
    # Unbuffered, because pieces are read at their offsets: a buffer would copy each once more.
    return {path: stack.enter_context(open(path, "rb", buffering=0)) for path in {tensor.path for tensor in tensors}}


def mixed_tensors(models, weights, names=None):
    """Yield (name, tensor) of the weighted average, one tensor at a time, in the dtype that the ingredients have.

    Only one tensor and the buffers of a mixer are in memory at a time.

    Args:
        models: folders that `check_ingredients` accepts.
        weights: floats that sum to 1, one for each folder.
        names: names of the tensors, in the order wanted; None: all of the first model's.

    Tensors that are no floats (buffers) can't be averaged: they must be equal, else UserError.
    """
    models = _aligned([Path(folder) for folder in models])
    mixer = _Mixer(len(models), torch.float32)
    with contextlib.ExitStack() as stack:
        files = _open_all(stack, itertools.chain(*(model.values() for model in models)))
        for name in names if names is not None else models[0]:
            ingredients = [model[name] for model in models]
            dtype, shape = TYPES[ingredients[0].dtype], ingredients[0].shape
            tensor = torch.empty(shape, dtype=dtype)
            for start, count in _pieces(shape, mixer.piece):
                (average,) = mixer.averages(name, [weights], ingredients, files, start, count)
                tensor.view(-1)[start : start + count] = average
            yield name, tensor


def soup(models, weights, output, describe=None):
    """Write the weighted average of model folders as a model folder: `soups` with one output."""
    soups(models, [weights], [output], describe)


def soups(models, grid, outputs, describe=None):
    """Write weighted averages of model folders, as model folders that `from_pretrained` loads.

    Args:
        models: two or more folders of one architecture, dtype and tokenizer. Each is read once.
        grid: a row of weights for each output, with a weight for each model: decimals or fractions that sum to 1 within
            1e-6.
        outputs: folders that don't exist yet, or are empty.
        describe: as `combinations` takes it; None: the card of an average.

    Everything but the weights (configuration, tokenizer, how weights are split into files) is the first model's. Each
    weight is w0*x0, plus w1*x1, … in float32, rounded once. torch.get_num_threads() pieces are averaged at a time,
    which changes no result. Raises UserError before anything is written when the ingredients don't fit together, an
    output exists or the disk is too small. Whatever else fails, no part of an output is left.
    """
    parsed = parse_grid(models, grid, outputs)
    card = mix_card.Card(list(models), f"The weight average of {len(models)} models", mix_card.LINEAR)
    describe = describe or (lambda number, folder: card.write(folder, grid[number]))
    combinations(models, outputs, lambda: lambda name: parsed, describe, torch.float32)


def parse_grid(models, grid, outputs):
    """Rows of weights as floats; UserError unless there is one for each output, as `parse_weights` wants it."""
    rows = [parse_weights(weights, len(models)) for weights in grid]
    if not rows or len(rows) != len(outputs):
        raise UserError(f"{len(rows)} rows of weights for {len(outputs)} outputs; give each output its --weights")
    return rows


def combinations(models, outputs, choose, describe, precision=torch.float64):
    """Write linear combinations of model folders, whose coefficients may differ between tensors; else as `soups`.

    Args:
        choose: a function without arguments, which is called when the models are known to fit together, before anything
            is written. It returns a function: name of a tensor -> a row of coefficients (floats) for each output, with
            one for each model.
        describe: a function: number of an output, its folder -> None, which writes its card there.
        precision: the type in which terms are added up, before the sum is rounded to the stored dtype.
    """
    models, outputs = [Path(folder) for folder in models], [Path(folder).resolve() for folder in outputs]
    prepare(models, outputs)
    grid_of, partial = choose(), _partial(outputs)
    try:
        for folder in partial:
            folder.mkdir(parents=True)
            for path in _companions(models[0]):
                shutil.copyfile(path, folder / path.name)  # permissions are those of new files
        _write_weights(models, grid_of, precision, partial)
        for number, folder in enumerate(partial):
            describe(number, folder)
        for folder, output in zip(partial, outputs, strict=True):
            if output.exists():
                output.rmdir()
            os.replace(folder, output)
    except OSError as error:
        raise UserError(f"{error.filename or outputs[0]}: {error.strerror}; try another --output") from None
    finally:
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)


def prepare(models, outputs):
    """Remove what a killed attempt left; UserError unless models fit together, and outputs are new and have room."""
    models, outputs = [Path(folder) for folder in models], [Path(folder).resolve() for folder in outputs]
    check_ingredients(models)
    _check_outputs(outputs)
    for folder in _partial(outputs):
        shutil.rmtree(folder, ignore_errors=True)
    _check_room(models[0], outputs)


def _partial(outputs):
    """The names of outputs until they are whole, so that a killed run leaves no folder that looks like a model."""
    return [output.with_name(f".{output.name}.partial") for output in outputs]


def task_products(models, origin=None):
    """The inner products <θ_i − θ_origin, θ_j − θ_origin> of models, of each tensor of floats by itself.

    Files are read a piece at a time, in float64 from the difference on, in the memory that `soups` takes.

    Args:
        models: folders that `check_ingredients` accepts, together with `origin`.
        origin: the folder that the task vectors start at; None: they start at 0, and are the weights themselves.

    Returns name -> (M, M) float64, which the number of threads doesn't change. Raises UserError where a weight is not
    finite.
    """
    aligned = _aligned([Path(folder) for folder in [*models, *([origin] if origin else [])]])
    shapes_of = {name: tensor.shape for name, tensor in aligned[0].items() if TYPES[tensor.dtype].is_floating_point}
    totals = {name: torch.zeros(len(models), len(models), dtype=torch.float64) for name in shapes_of}
    pieces = [(name, piece) for name, shape in shapes_of.items() for piece in _pieces(shape, _piece(torch.float64))]
    with contextlib.ExitStack() as stack:
        files = _open_all(stack, itertools.chain(*(model.values() for model in aligned)))

        def multiply(multiplier, name, start, count):
            return multiplier.products(name, [model[name] for model in aligned], files, start, count)

        multipliers = stack.enter_context(_one_a_thread(lambda: _Multiplier(len(aligned), origin is not None)))
        for (name, _), products in zip(pieces, _in_threads(stack, multipliers, multiply, pieces), strict=True):
            totals[name] += products  # in the order of the pieces
    return totals


def _check_outputs(outputs):
    """UserError where an output holds something, or is or lies in another output."""
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
    """The files of a model folder that a soup of it copies: all but weights, its card and the manifest of its run."""
    index = {path.name for path in folder.glob("*.index.json")}
    if not (folder / SINGLE).is_file():
        index.discard(INDEX)
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in index | {"manifest.json", mix_card.README}
    ]


@contextlib.contextmanager
def _one_a_thread(make):
    """Yield what `make()` makes, once for each thread that computes; within this context torch has one of its own."""
    threads = torch.get_num_threads()
    workers = [make() for _ in range(min(threads, THREADS))]
    torch.set_num_threads(1)  # each of our threads would start as many of torch's own
    try:
        yield workers
    finally:
        torch.set_num_threads(threads)


def _in_threads(stack, workers, work, pieces):
    """Yield `work(worker, name, start, count)` of each piece (name, (start, count)), in order, a thread per worker.

    The first error ends it, and cancels pieces that wait. The threads end with the stack's context, which closes files
    later when they were opened earlier.
    """
    free = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def borrow(piece):
        name, (start, count) = piece
        worker = free.get()
        try:
            return work(worker, name, start, count)
        finally:
            free.put(worker)

    return stack.enter_context(ThreadPoolExecutor(len(workers))).map(borrow, pieces)


def _write_weights(models, grid_of, precision, outputs):
    """Write the averages into the outputs' folders, with the files and places that the first model's tensors have."""
    models = _aligned(models)
    with _one_a_thread(lambda: _Mixer(len(models), precision)) as mixers:
        for path in sorted({tensor.path for tensor in models[0].values()}):
            _write_file(path, models, grid_of, mixers, outputs)


def _write_file(path, models, grid_of, mixers, outputs):
    """Write one of the first model's files anew in each output: its header, then the averages, a thread per mixer."""
    names = [name for name, tensor in models[0].items() if tensor.path == path]
    with contextlib.ExitStack() as stack:
        files = _open_all(stack, [model[name] for model in models for name in names])
        targets = [stack.enter_context(open(output / path.name, "wb", buffering=0)) for output in outputs]
        # With the first model's names, types and places, a thread can write its piece without waiting for the others.
        header = files[path].read(min(models[0][name].start for name in names))
        for target in targets:
            _write(target, memoryview(header), 0)

        def write_piece(mixer, name, start, count):
            ingredients = [model[name] for model in models]
            averages = mixer.averages(name, grid_of(name), ingredients, files, start, count)
            for target, average in zip(targets, averages, strict=True):
                offset = ingredients[0].start + start * average.itemsize
                _write(target, memoryview(average.view(torch.uint8).numpy()), offset)

        pieces = [(name, piece) for name in names for piece in _pieces(models[0][name].shape, mixers[0].piece)]
        for _ in _in_threads(stack, mixers, write_piece, pieces):
            pass


METHODS = ("linear", "slerp", "greedy")
READ_BY = {"weights": ("linear", "slerp"), "origin": ("slerp",), "step": ("slerp",), "validation": ("greedy",)}


def main(argv=None):
    """The command line; a user's mistake ends it with one line."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else argv
    # With a space in front, which a number may have, argparse does not take a negative fraction for an option.
    arguments = parser.parse_args([f" {word}" if re.match(r"-[\d.]", str(word)) else word for word in words])
    interrupts.raise_told()
    try:
        _mix(arguments)
    except (UserError, OSError, MemoryError) as error:
        sys.exit(f"{parser.prog}: {failures.describe(error) or error}")


def _parser():
    parser = Parser(
        prog="salsa soup",
        description="Mix the weights of model folders. Repeat --weights and --output, in pairs, for several mixes from "
        "one reading.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folders of one architecture")
    parser.add_argument("--weights", nargs="+", action="append", metavar="W", help="decimals or fractions; sum 1")
    parser.add_argument("--output", action="append", required=True, metavar="DIR")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="linear",
        help="linear: the average (default) | slerp: along an arc, tensor by tensor | greedy: the uniform average of "
        "those models that do not raise the loss on --validation",
    )
    parser.add_argument("--origin", metavar="DIR", help="slerp: the model that task vectors start at; without it, 0")
    parser.add_argument("--step", type=float, metavar="S", help="slerp: share of the way from the origin (default 1)")
    parser.add_argument("--validation", metavar="FILE", help='greedy: JSONL of held-out conversations, {"messages": …}')
    return parser


def _mix(arguments):
    """Make what the command line asks for. UserError for an option that its method doesn't read, or needs."""
    for option, methods in READ_BY.items():
        if getattr(arguments, option) is not None and arguments.method not in methods:
            raise UserError(f"--{option} is read by --method {' and '.join(methods)} alone; leave it out")
    if arguments.method == "greedy":
        return _mix_greedily(arguments)
    if arguments.weights is None:
        raise UserError("no weights; give --weights, one for each model")
    if arguments.method == "slerp":
        return _mix_by_slerp(arguments)
    return soups(arguments.models, arguments.weights, arguments.output)


def _mix_by_slerp(arguments):
    from salsa.mixes import slerp

    models, origin = arguments.models, arguments.origin
    step = 1.0 if arguments.step is None else arguments.step
    if not 0 < step <= slerp.LONGEST_STEP:
        raise UserError(f"--step {step:g}: must be above 0, and at most {slerp.LONGEST_STEP}")
    if origin is None and step != 1:
        raise UserError(f"--step {step:g}: has no origin to start from; give --origin")
    if origin is not None and Path(origin).resolve() in {Path(model).resolve() for model in models}:
        raise UserError(f"--origin {origin}: is one of the models, and has no direction from itself; give it once")
    angles = slerp.write(models, arguments.weights, arguments.output, origin, step)
    for output, of_output in zip(arguments.output, angles, strict=True):
        print(f"{output}: {slerp.report(of_output)}")


def _mix_greedily(arguments):
    from salsa import mix  # here, because it imports this module

    if arguments.validation is None:
        raise UserError("--method greedy measures models; give --validation FILE.jsonl, held-out conversations")
    if len(arguments.output) > 1:
        raise UserError("--method greedy makes one soup; give one --output")
    taken = mix.greedily(arguments.models, arguments.validation, arguments.output[0])
    print(f"{arguments.output[0]}: the average of {', '.join(taken)}")


if __name__ == "__main__":
    main()
