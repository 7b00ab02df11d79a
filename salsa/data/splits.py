"""Which split a row belongs to, and in which order a split takes its rows: both by hashes of the row's own text.

So splits never overlap, whatever their sizes and seeds, and a larger split begins with the smaller one.
"""

import hashlib
import statistics
import unicodedata

from salsa.data.messages import user


def split_of(text, shares, salt):
    """The name of the split that `text` belongs to, or None where the shares leave a rest.

    Args:
        text: what identifies a row.
        shares: split name -> share of all rows; in the order given, at most 1 in sum.
        salt: a name that makes the hashes of different tasks independent.
    """
    point = int.from_bytes(hashlib.sha256(f"{salt}/{text}".encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return None


def ordered(texts, seed, salt):
    """The texts in a random order that depends on the seed, and for each text on nothing but that text."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{salt}/{seed}/{text}".encode()).digest())


def normalised(text):
    """What two texts have in common that differ in case, white space and the spelling of accents (NFC, NFD) alone."""
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())


def with_sampled_preferences(demonstrations, prompts):
    """The rows of each split of a world whose preferences are sampled from the SFT models and labelled by gold.

    Args:
        demonstrations: split -> rows {"messages"}.
        prompts: split -> texts of one user message each.
    """
    rows = {split: demonstrations(split) for split in ("demonstrations", "validation")}
    names = {"preferences": "preference_prompts", "prompts": "prompts", "evaluation": "evaluation"}
    for split, name in names.items():
        rows[name] = [{"id": f"{split}-{i}", "prompt": [user(text)]} for i, text in enumerate(prompts(split))]
    return rows


def mean_gold(judge, rows):
    """Split -> the mean gold of the last answers of its demonstrations; None where it has none."""
    means = {}
    for split in ("demonstrations", "validation"):
        told = [row["messages"] for row in rows[split]]
        scores = judge.score([messages[:-1] for messages in told], [messages[-1]["content"] for messages in told])
        means[split] = round(statistics.fmean(scores), 4) if told else None
    return means
