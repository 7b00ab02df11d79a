"""Model folders before they are loaded: their configurations, the files of their weights, and what is wrong with them.

Planning, soups and every stage that loads a model ask here, so that a folder is refused for the same reason, and in the
same words, wherever it is given. Only headers are read here; models.py loads.
"""

import contextlib
import json
import pickle
import struct
from pathlib import Path
from typing import NamedTuple

from salsa.workflow import failures
from salsa.workflow.messages import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# How architectures name the number of tokens that they hold. Those without positions (Mamba) have no such limit.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
FLOATS = {"F64", "F32", "F16", "BF16"}  # the types of weights that can be trained, as safetensors names them
LARGEST_HEADER = 100 * 2**20  # bytes that safetensors allows
AGAIN = "save or download the model again"
OWN_CODE = (
    "needs code of its own (trust_remote_code), and no model's code is run here; save it as a class that transformers "
    "has, or choose another model"
)


class Stored(NamedTuple):
    """Where a tensor is stored: its file, its type as safetensors names it, its shape, its first byte in the file."""

    path: Path
    dtype: str
    shape: tuple
    start: int


def read_object(path):
    """The object in a JSON file. Raises UserError where the file holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({one_line(error)}); {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; {AGAIN}")
    return content


def configuration(folder):
    """The content of config.json in a model folder. Raises UserError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder}: holds an adapter alone; merge it into its model, and give that")
        raise UserError(f"{folder}: no config.json, so no model folder; give one that save_pretrained wrote")
    return read_object(folder / "config.json")


def positions(config):
    """The number of tokens that a model of this configuration (a dictionary) holds; None where it has no limit."""
    return limit(config)[1]


def limit(config):
    """The key by which a configuration names the number of tokens that its model holds, and this number; or Nones."""
    for values in (config, config.get("text_config")):
        for name in POSITIONS if isinstance(values, dict) else ():
            number = values.get(name)
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                return name, number
    return None, None


def check(folder, pickled=False, headers=True):
    """Raise UserError unless a folder's configuration and headers are those of a model that can be used.

    Args:
        pickled: whether weights may be pickles (model.pickled_weights); pickles are not opened here.
        headers: whether the headers of the files of weights are read.

    Returns the configuration.
    """
    folder = Path(folder)
    config = configuration(folder)
    where = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds an adapter (adapter_config.json); merge it into its model, and give that")
    for values in (config, config.get("text_config")):
        if not isinstance(values, dict):
            continue
        if values.get("quantization_config"):
            raise UserError(f"{where}: quantization_config: weights are quantized; give the model as it was before")
        if values.get("is_encoder_decoder"):
            raise UserError(f"{where}: is_encoder_decoder: no causal language model; choose one with a decoder alone")
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if values.get(key) not in (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"):
                raise UserError(
                    f"{where}: {key}={values[key]!r}: code that torch doesn't bring, which is not run here; remove it"
                )
    if pickled and has_pickles(folder):
        return config
    if not headers:
        shards(folder, headers)
        return config
    for name, tensor in stored(folder).items():
        if tensor.dtype not in FLOATS and name.endswith("weight"):
            raise UserError(
                f"{tensor.path}: tensor {name} is {tensor.dtype}: weights are quantized, or none; give the model as it "
                "was before"
            )
    return config


def has_pickles(folder):
    """Whether the weights of a folder are pickles only."""
    names = {path.name for path in Path(folder).iterdir()}
    return not names & {INDEX, SINGLE} and bool(names & {PICKLE, PICKLE_INDEX})


def shards(folder, headers=True):
    """The safetensors file of each tensor in a model folder, by name. Raises UserError where there are no weights.

    Without `headers`, a single file is not opened and its tensors are not named.
    """
    folder = Path(folder)
    configuration(folder)
    if (folder / SINGLE).is_file():  # which transformers prefers to an index
        return dict.fromkeys(_header(folder / SINGLE)[0] if headers else (), folder / SINGLE)
    if not (folder / INDEX).is_file():
        if has_pickles(folder) or any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            otherwise = ", or take it in with model.pickled_weights=true" if has_pickles(folder) else ""
            raise UserError(
                f"{folder}: its weights are pickles, which can run code; save it with safetensors "
                f"(save_pretrained){otherwise}"
            )
        raise UserError(f"{folder}: no weights in safetensors ({SINGLE}); {AGAIN}")
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: has no weight_map; {AGAIN}")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{folder / INDEX}: {name} is in {file!r}, which is no file of this folder; {AGAIN}")
        files[name] = folder / file
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise UserError(f"{path}: missing, though {INDEX} names it")
    return files


def stored(folder):
    """Where each tensor of a model folder is stored (`Stored`), by name; only headers are read."""
    tensors, files = {}, shards(folder)
    for path in sorted(set(files.values())):
        header, start = _header(path)
        for name, entry in header.items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is in {tensors[name].path.name} too; {AGAIN}")
            tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
    for name, path in files.items():
        if name not in tensors:
            raise UserError(f"{path}: has no tensor {name}, though {INDEX} says so; {AGAIN}")
    return tensors


def _header(path):
    """The header of a safetensors file, {name: {dtype, shape, data_offsets}}, and the first byte of its weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # the header is sound, and the file as long as the header says
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, LARGEST_HEADER)))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: can't be read ({one_line(error)}); {AGAIN}") from None
    header.pop("__metadata__", None)
    if not header:
        raise UserError(f"{path}: holds no tensor; {AGAIN}")
    return header, 8 + length


def one_line(error):
    """The text of an error, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


@contextlib.contextmanager
def loading(place, remedy=AGAIN):
    """A context in which any error becomes a UserError of one line: the files of others can fail in any way.

    transformers' warnings are hidden, since whoever loads refuses or mends what they warn of. Messages name what is
    loaded, `place`, and end with a `remedy`.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{place}: a pickle that is damaged, or holds more than tensors and so could run code; {AGAIN}"
            ) from None
        if "trust_remote_code" in str(error):
            raise UserError(f"{place}: {OWN_CODE}") from None
        if failures.describe(error):  # the machine's fault, which is reported in words of its own
            raise
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise UserError(f"{place}: can't be loaded ({kind}{one_line(error)}); {remedy}") from None
    finally:
        logging.set_verbosity(before)


def load_config(folder):
    """The configuration of a model folder as transformers reads it. No code of the folder is run.

    Raises UserError where transformers does not know the model, or needs code of its folder.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = configuration(folder)
    where = Path(folder) / "config.json"
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise UserError(f"{where}: auto_map: {OWN_CODE}")
        what = f"model_type {kind!r} is none that this transformers knows" if kind else "has no model_type"
        raise UserError(f"{where}: {what}; update transformers, or choose another model")
    with loading(where, "mend it, or save the model again"):
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
