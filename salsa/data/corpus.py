"""Stage corpus: the text that a model is pretrained on, as corpus.jsonl {"text"}.

What the tasks see is no part of it: held-out pairs of the stories, and gold's reviews.
"""

from salsa.data import reviews, stories
from salsa.workflow import config, runs
from salsa.workflow.runs import UserError

VERSION = 1


def make(settings, parents, output, execution):
    """Write corpus.jsonl and counts.json; returns the counts."""
    corpus = settings.corpus
    if corpus.kind == "stories":
        texts = stories.corpus(corpus.documents, corpus.seed)
        runs.write_json(output / "words.json", sorted(stories.words()))  # a word-level tokenizer's whole vocabulary
        counts = {"read": 0, "generated": len(texts), "dropped": {}}
    elif corpus.kind == "reviews":
        texts, counts = reviews.corpus(corpus.documents, corpus.seed)
    else:
        raise UserError(f"data.corpus.kind is {corpus.kind!r}; a corpus is made for stories or reviews")
    if not texts:
        raise UserError("the corpus is empty: raise data.corpus.documents")
    counts = {**counts, "documents": len(texts), "words": sum(len(text.split()) for text in texts)}
    runs.write_jsonl(output / "corpus.jsonl", [{"text": text} for text in texts])
    runs.write_json(output / "counts.json", counts)
    return counts


if __name__ == "__main__":
    runs.command(
        "corpus",
        VERSION,
        make,
        config.CorpusSettings,
        description=__doc__,
        writes=("corpus.jsonl", "counts.json"),
        may_write=("words.json",),
    )
