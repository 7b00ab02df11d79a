"""Which split a row belongs to, and the order of rows in a split: both follow from hashes of the row's own text.

So splits never overlap, whatever their sizes and seeds, and a larger split begins with the smaller one.
"""

import hashlib
import statistics
import unicodedata

from salsa.data.messages import user


def split_of(text, shares, salt):
    """The name of the split that `text` belongs to, or None where the shares sum to less than 1 and leave it out.

    Args:
        text: identifies a row.
        shares: split name -> share of all rows, at most 1 in sum; their order matters.
        salt: a name that makes the hashes of different tasks independent.
    """
    point = int.from_bytes(hashlib.sha256(f"{salt}/{text}".encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return None


def ordered(texts, seed, salt):
    """The texts in a random order: the seed and a text alone decide its place relative to other texts."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{salt}/{seed}/{text}".encode()).digest())


def normalised(text):
    """The text without differences of case, white space and the spelling of accents (NFC, NFD)."""
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())


def with_sampled_preferences(demonstrations, prompts):
    """Split -> rows, for a world whose preferences are sampled from the SFT models and labelled by gold.

    Args:
        demonstrations: split -> rows {"messages"}.
        prompts: split -> texts, each of one user message.
    """
    rows = {split: demonstrations(split) for split in ("demonstrations", "validation")}
    names = {"preferences": "preference_prompts", "prompts": "prompts", "evaluation": "evaluation"}
    for split, name in names.items():
        rows[name] = [{"id": f"{split}-{i}", "prompt": [user(text)]} for i, text in enumerate(prompts(split))]
    return rows


def mean_gold(judge, rows):
    """Split -> the mean gold of the last answers of its demonstrations; None for a split without any."""
    means = {}
    for split in ("demonstrations", "validation"):
        conversations = [row["messages"] for row in rows[split]]
        answers = [messages[-1]["content"] for messages in conversations]
        scores = judge.score([messages[:-1] for messages in conversations], answers)
        means[split] = round(statistics.fmean(scores), 4) if answers else None
    return means
