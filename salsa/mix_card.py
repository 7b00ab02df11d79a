"""The README.md of a mix of models: what was mixed and how, its digests, and the metadata that the hub reads.

Paths are those that were given; of a model that a run made, they begin at the results folder. A licence, languages and
base models are named where the ingredients' own cards, or their place in the hub's cache, say them.
"""

import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from salsa.rl.folders import configuration, shards
from salsa.workflow import runs
from salsa.workflow.bounds import printable

README = "README.md"
CACHED = re.compile(r"models--(?P<id>[^/]+(?:--[^/]+)?)/snapshots/(?P<revision>[^/]+)$")  # a folder of the hub's cache
FRONT_MATTER = re.compile(r"\s*---\s*?\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
TASKS = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}
LINEAR = (
    "Every weight is the sum of the models' weights, each times its model's share, in float32 and rounded once to the "
    "stored type (Model soups, arXiv:2203.05482; as a reference for RLHF: SALSA, arXiv:2411.01798)."
)


@dataclass
class Card:
    """The cards of mixes of the same models.

    Attributes:
        folders: of the models, in the order of their weights.
        title: what the mixes are, in a line.
        method: how they are made, in sentences.
        names: what the models are called in a study; None: nothing but their folders.
        options: those of `salsa soup` beside models, weights and output.
        origin: the folder of a model that is no ingredient and has a part in the mixes, or None.
        tags: for the hub, beside "merge".
    """

    folders: list
    title: str
    method: str
    names: list | None = None
    options: tuple = ()
    origin: Path | None = None
    tags: tuple = ("model-soup",)

    def text(self, weights, details=""):
        """The card of one mix.

        Args:
            weights: of the models, as they were given.
            details: what else there is to say of this mix, as Markdown.
        """
        command = ["salsa", "soup", *map(place, self.folders), "--weights", *map(str, weights), *self.options]
        parts = [
            f"---\n{self._metadata.to_yaml()}\n---",
            f"# {self.title}",
            f"{self.method} All else, such as configuration and tokenizer, is the first model's.",
            self._ingredients(weights),
            details,
            "## Digests\n\nThe sha256 of the models' files of weights, as `sha256sum --check` reads them:",
            _block("\n".join(f"{digest}  {printable(name)}" for name, digest in self._digests)),
            "## How to make it again",
            _block(printable(shlex.join([*command, "--output", "FOLDER"]))),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _ingredients(self, weights):
        """The models and their weights, as a table; with their names where they have any."""
        rows = [
            [name, code(place(folder)), weight]
            for name, folder, weight in zip(self.names or [""] * len(weights), self.folders, weights, strict=True)
        ]
        if self.origin:
            rows.append(["origin", code(place(self.origin)), ""])
        if any(name for name, *_ in rows):
            return table(["name", "model", "weight"], rows)
        return table(["model", "weight"], [row[1:] for row in rows])

    def write(self, folder, *arguments):
        """Write the card of one mix into its folder; `arguments`: those of `text`."""
        text = self.text(*arguments)
        (folder / README).write_bytes(text.encode(errors=runs.ESCAPED))

    @property
    def _all(self):
        return [*self.folders, *([self.origin] if self.origin else [])]

    @cached_property
    def _digests(self):
        """(place, sha256) of each file of weights."""
        files = [(folder, path) for folder in self._all for path in sorted(set(shards(folder).values()))]
        files = {f"{place(folder)}/{path.name}": path for folder, path in files}
        with ThreadPoolExecutor() as threads:
            return list(zip(files, threads.map(runs.file_sha256, files.values()), strict=True))

    @cached_property
    def _metadata(self):
        """The metadata of the hub's form."""
        cards = [_card_of(folder) for folder in self._all]
        sources = [hub_id(folder) or card.get("base_model") for folder, card in zip(self._all, cards, strict=True)]
        base_models = dict.fromkeys(name for source in sources for name in _names(source))
        licences, languages = ([_names(card.get(key)) for card in cards] for key in ("license", "language"))
        architecture = (configuration(self.folders[0]).get("architectures") or [""])[0]
        return ModelCardData(
            base_model=list(base_models) or None,
            base_model_relation="merge" if base_models else None,
            license=_same(licences),
            language=_same(languages),
            library_name="transformers",
            pipeline_tag=next((task for end, task in TASKS.items() if architecture.endswith(end)), None),
            tags=["merge", *self.tags, "salsa"],
        )


def place(folder):
    """What a model folder is called in a card: of a run's model, `stage/run/model`; of the hub's, its id."""
    folder = Path(folder)
    if runs.manifest_of(folder.parent):
        return Path(*folder.resolve().parts[-3:]).as_posix()
    return hub_id(folder) or str(folder)


def hub_id(folder):
    """The id on the hub of a folder in the hub's cache; None of any other."""
    cached = CACHED.search(Path(folder).as_posix())
    return cached["id"].replace("--", "/", 1) if cached else None


def _card_of(folder):
    """The metadata of a model's own card, a dictionary; empty where it has none that can be read."""
    try:
        front = FRONT_MATTER.match((Path(folder) / README).read_text(encoding="utf-8"))
        metadata = yaml.safe_load(front[1]) if front else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # a file of others
        metadata = {}
    return metadata if isinstance(metadata, dict) else {}


def _names(value):
    """The texts in a card's entry, which may be one or a list of them."""
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]


def _same(entries):
    """What all ingredients' cards say, or None where they say different things, or nothing."""
    agreed = entries[0] if all(entry == entries[0] for entry in entries) else []
    return agreed[0] if len(agreed) == 1 else agreed or None


def table(columns, rows):
    """A Markdown table of cells that are Markdown themselves."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def code(text):
    """Any text as code within a table's cell, which it can't leave."""
    return "`" + printable(str(text)).replace("`", "'").replace("|", "\\|") + "`"


def _block(text):
    """Any text as a block of code, which it can't leave."""
    return "```\n" + text.replace("```", "'''") + "\n```"
