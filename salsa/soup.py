"""Weight averages ("soups") of models that share an architecture.

`mixed_tensors` is the one place where weights are averaged: it streams one tensor of each ingredient at a time from
safetensors files, accumulates in float32 and rounds once to the stored dtype. `soup` writes the stream as a model
folder; PPO copies it straight into a model, so that a grid of references costs no disk.

Left out: SLERP, task arithmetic and the like. Source: Model soups (2203.05482); SALSA (2411.01798) averages two.
"""

import argparse
import json
import os
import shutil
import struct
import sys
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from salsa.runs import UserError, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Keys of config.json in which two models of one architecture may differ without changing what the weights mean.
VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "attention_dropout"}


def parse_weights(weights, count):
    """Weights (numbers, decimals or fractions like "1/3") as floats.

    Raises UserError unless there are `count` of them and they sum to 1 within 1e-6.
    """
    try:
        parsed = [Fraction(str(weight)) for weight in weights]
    except (ValueError, ZeroDivisionError):
        raise UserError(f"weights {' '.join(map(str, weights))}: each must be a decimal or a fraction") from None
    if len(parsed) != count:
        raise UserError(f"{len(parsed)} weights for {count} models; give one for each")
    if abs(sum(parsed) - 1) > Fraction(1, 10**6):
        raise UserError(f"weights sum to {float(sum(parsed)):.6g}; they must sum to 1")
    return [float(weight) for weight in parsed]


def shards(folder):
    """Tensor name -> safetensors file of a model folder. Raises UserError where there are no weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so no model folder")
    if (folder / INDEX).is_file():
        files = {name: folder / file for name, file in read_json(folder / INDEX)["weight_map"].items()}
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise UserError(f"{path}: missing, though {INDEX} names it")
        return files
    if not (folder / SINGLE).is_file():
        raise UserError(f"{folder}: no weights in safetensors ({SINGLE})")
    with _open(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def _open(path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: can't be read ({error}); save or download the model again") from None


def check_ingredients(models):
    """Raise UserError, naming the first difference, unless tensors, architecture and tokenizers of all agree."""
    first = Path(models[0])
    names = _headers(first)
    for other in map(Path, models[1:]):
        theirs = _headers(other)
        for name in sorted(set(names) | set(theirs)):
            if names.get(name) != theirs.get(name):
                raise UserError(
                    f"{other}: tensor {name} is {_describe(theirs.get(name))}, "
                    f"in {first} it is {_describe(names.get(name))}; only like models can be averaged"
                )
        mine, its = (_configuration(folder) for folder in (first, other))
        for key in sorted(set(mine) | set(its)):
            if mine.get(key) != its.get(key):
                raise UserError(f"{other}: config.json has {key} = {its.get(key)!r}, {first} has {mine.get(key)!r}")
        if _tokenizer(first) != _tokenizer(other):
            raise UserError(f"{other}: its tokenizer differs from that of {first}; only like models can be averaged")


def _describe(header):
    return "missing" if header is None else f"{header[0]} {list(header[1])}"


def _headers(folder):
    found = {}
    for path in sorted(set(shards(folder).values())):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (an open file is no dictionary)
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def shapes(folder):
    """Tensor name -> shape (a tuple) of a model folder, from the files' headers alone."""
    return {name: shape for name, (_, shape) in _headers(folder).items()}


def _configuration(folder):
    return {key: value for key, value in read_json(folder / "config.json").items() if key not in VOLATILE}


def _tokenizer(folder):
    """What makes two tokenizers the same: vocabulary and text processing, not padding or templates."""
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        return {key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    if (folder / "tokenizer.model").is_file():
        return (folder / "tokenizer.model").read_bytes()
    return None


def mixed_tensors(models, weights, names=None):
    """Yield (name, tensor) of the weighted average, one tensor at a time, in the ingredients' stored dtype.

    Args:
        models: folders that `check_ingredients` accepts.
        weights: floats that sum to 1, one for each folder.
        names: which tensors, in which order; all of the first model by default.

    Tensors that are no floats (buffers) can't be averaged: they must be equal, else UserError.
    """
    models = [Path(folder) for folder in models]
    files = [shards(folder) for folder in models]
    handles = {path: _open(path) for path in {p for index in files for p in index.values()}}
    try:
        for name in names if names is not None else files[0]:
            ingredients = (handles[index[name]].get_tensor(name) for index in files)
            yield name, _average(name, ingredients, weights)
    finally:
        for handle in handles.values():
            handle.__exit__(None, None, None)


def _average(name, ingredients, weights):
    total = None
    for tensor, weight in zip(ingredients, weights, strict=True):
        if total is None:
            first, dtype = tensor, tensor.dtype
            total = tensor.float().mul(weight) if dtype.is_floating_point else tensor
        elif dtype.is_floating_point:
            total.add_(tensor.float(), alpha=weight)
        elif not torch.equal(tensor, first):
            raise UserError(f"tensor {name} is {dtype} and differs between the models; it can't be averaged")
    return total.to(dtype)


def soup(models, weights, output):
    """Write the weighted average of model folders as a model folder that `from_pretrained` loads.

    Args:
        models: two or more folders of one architecture, dtype and tokenizer.
        weights: one for each, decimals or fractions, that sum to 1 within 1e-6. None may be left out.
        output: a folder that doesn't exist yet, or is empty.

    Everything but the weights (configuration, tokenizer) is the first model's. Raises UserError before anything is
    written when the ingredients don't fit together.
    """
    models, output = [Path(folder) for folder in models], Path(output)
    weights = parse_weights(weights, len(models))
    check_ingredients(models)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; choose another --output")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_folder(models, weights, partial)
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_folder(models, weights, output):
    for path in sorted(models[0].iterdir()):
        if path.is_file() and path.suffix not in {".safetensors", ".bin", ".pt", ".gguf"}:
            shutil.copy2(path, output / path.name)
    (output / "manifest.json").unlink(missing_ok=True)  # of the run that made the ingredient, not of this folder
    index, headers = shards(models[0]), _headers(models[0])
    for path in sorted(set(index.values())):
        names = [name for name, file in index.items() if file == path]
        _write_safetensors(output / path.name, {n: headers[n] for n in names}, mixed_tensors(models, weights, names))


def _write_safetensors(path, headers, tensors):
    """Write tensors as they come. safetensors' own `save_file` wants all of them in memory at once."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in headers.items():
        size = sizes[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in tensors:
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="salsa soup", description="Average the weights of model folders.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folders of one architecture")
    parser.add_argument("--weights", nargs="+", required=True, metavar="W", help="decimals or fractions; sum 1")
    parser.add_argument("--output", required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        soup(arguments.models, arguments.weights, arguments.output)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
