"""Whether two model folders' tokenizers read texts alike: only then is a token's id the same token. No torch."""

import json

from salsa.rl.folders import loading, read_object
from salsa.workflow.messages import UserError

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")


def check_same(first, other, advice="only like models can be averaged"):
    """UserError, naming the first difference, where two folders' tokenizers read texts, or end them, differently."""
    mine, its = (
        {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()} for folder in (first, other)
    )
    if mine != its:
        if not (mine and its):
            raise UserError(f"{first if its else other}: has no tokenizer; {advice}")
        mine, its = map(_tokenizer, (first, other))
        for part in mine:
            difference = _difference(mine[part], its[part])
            if difference:
                where = f"{other}: its tokenizer differs from that of {first} in {part}"
                raise UserError(f"{where}: {difference}; {advice}")
    mine, its = map(_end_token, (first, other))
    if None not in (mine, its) and mine != its:
        raise UserError(f"{other}: its tokenizer's eos_token is {its!r}, that of {first} is {mine!r}; {advice}")


def _tokenizer(folder):
    """The parts in which equal tokenizers agree, as this version writes them: vocabulary and text processing."""
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
    vocabulary = model.pop("vocab", {})  # a dictionary, or for Unigram a list
    return {
        "vocabulary": vocabulary if isinstance(vocabulary, dict) else dict(enumerate(vocabulary)),
        "merges": model.pop("merges", []),
        "model": {**model, "dropout": None},
        "added tokens": added,
        "normalizer": content["normalizer"],
        "pre-tokenizer": content["pre_tokenizer"],
    }


def _difference(mine, its):
    """The first difference between two parts of tokenizers, in words; None where they are equal."""
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
