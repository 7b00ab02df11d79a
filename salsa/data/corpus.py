"""Stage corpus: the text that a model is pretrained on, as corpus.jsonl {"text"}.

It holds nothing that must stay unseen: no held-out pairs of the stories, and none of gold's reviews.
"""

from salsa import data
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 1


def make(settings, parents, output, execution):
    """Write corpus.jsonl and counts.json, and words.json where the world has few words; returns the counts."""
    corpora = {kind: world.corpus for kind, world in data.world_kinds().items() if world.corpus}
    kind = settings.corpus.kind
    if kind not in corpora:
        raise UserError(f"data.corpus.kind is {kind!r}; a corpus is made for {' or '.join(corpora)}")
    texts, counts, words = corpora[kind](settings.corpus)
    if words:
        runs.write_json(output / "words.json", words)
    if not texts:
        raise UserError("the corpus is empty: raise data.corpus.documents")
    counts = {**counts, "documents": len(texts), "words": sum(len(text.split()) for text in texts)}
    runs.write_jsonl(output / "corpus.jsonl", [{"text": text} for text in texts])
    runs.write_json(output / "counts.json", counts)
    return counts


if __name__ == "__main__":
    stages.CORPUS.command(make, VERSION, __doc__)
