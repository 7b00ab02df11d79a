"""What schemas of settings are made of: types with their bounds, settings of kinds, and how both are read.

A schema is a pydantic dataclass (`dataclass`). The schema of the whole configuration is `salsa.workflow.config`; a kind
of reference, algorithm, judge, benchmark or world has its own settings in its own file, in a class that `of_kinds`
puts together with the others.
"""

import dataclasses
import functools
from dataclasses import field
from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import ConfigDict, Discriminator, StrictBool, Tag, TypeAdapter, ValidationError, model_validator
from pydantic_core import core_schema

from salsa.workflow import bounds, messages
from salsa.workflow.bounds import ADDED, ALWAYS, Items, Range, ReadBy, Text, fault
from salsa.workflow.messages import UserError
from salsa.workflow.weights import POLICY, NamedTwice, of_text

MOST = 10**9  # of rows, and of what else is counted
LARGEST_BATCH = 10**6
LARGEST_SEED = 2**32 - 1  # that numpy and transformers take
PATH = 4096  # characters of the longest path

Count = Annotated[int, Range(0, MOST)]
Batch = Annotated[int, Range(1, LARGEST_BATCH)]
Seed = Annotated[int, Range(0, LARGEST_SEED)]
Share = Annotated[float, Range(0, 1)]
Part = Annotated[float, Range(0, below=1)]
Path = Annotated[str, Text(PATH)]
"""A file, a folder or a hub id."""
Prose = Annotated[str, Text(2000, lines=True)]
"""Sentences, for people."""
Label = Annotated[str, bounds.file_name()]
Switch = StrictBool


class Sum:
    """Marks weights that may be written as text, `1/2 sft0 + 1/2 policy:salsa`, which takes the place of a list."""

    def __get_pydantic_core_schema__(self, source, handler):
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema, handler):
        return {"anyOf": [handler(schema), {"type": "string"}]}

    @staticmethod
    def read(value):
        """The mapping of a text; anything else as it is."""
        if not isinstance(value, str):
            return value
        try:
            return of_text(value)
        except NamedTwice as error:
            raise fault(f"{error} is named twice; name it once, with the sum of its weights") from None
        except ValueError:
            raise fault("no mix; write an ingredient, or a sum such as 1/2 sft0 + 1/2 sft1") from None


Weight = Annotated[str, Range(-1000, 1000, in_text=True)]
"""Of an ingredient; below 0 or above 1, the mix lies beyond its ingredients."""
Ingredient = Annotated[str, Text(100, rf"({POLICY})?{bounds.FILE_NAME}", "no name of an ingredient", empty=False)]
Weights = Annotated[
    Annotated[list[Weight], Tag("[list]")] | Annotated[dict[Ingredient, Weight], Items(at_least=1), Tag("[mapping]")],
    Discriminator(lambda value: "[mapping]" if isinstance(value, dict) else "[list]"),
    Items(),
    Sum(),
]
"""Over sft0, sft1, … as a list, or over ingredients by name, as a mapping or as text."""
Alphas = Annotated[list[Annotated[str, Range(0, 1, in_text=True)]], Items()]
"""Places on the line from sft0 to sft1."""
KlCoef = Annotated[float, Range(0, 10**6)]
KlCoefs = Annotated[list[KlCoef], Items()]
ReplicateNumbers = list[Annotated[int, Range(0, 10**6)]]
Replicates = Annotated[
    Annotated[int, Range(1, 1000), Tag("[number]")] | Annotated[ReplicateNumbers, Items(at_least=1), Tag("[list]")],
    Discriminator(lambda value: "[list]" if isinstance(value, list) else "[number]"),
]
"""The first so many replicates of a study, or those of a list."""
Temperature = Annotated[float, Range(0.01, 100)]
"""Of sampling: logits are divided by it."""
LoraRank = Annotated[int, Range(0, 2**14)]
LoraAlpha = Annotated[float, Range(above=0, at_most=10**6)]
LearningRate = Annotated[float, Range(above=0)]
"""Whatever is above 0: one that is too large is found, and said, by the training that it breaks."""
Labels = Annotated[list[Label], Items()]
EntryName = Annotated[str, bounds.file_name(64)]
Precision = Literal["no", "bf16"]
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]
"""What both Accelerate and transformers know by this name."""

CHECKED = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, defer_build=True)


def dataclass(**options):
    """As pydantic's; a setting that is inherited keeps its description."""

    def make(cls):
        made = pydantic.dataclasses.dataclass(config=CHECKED, **options)(cls)
        for base in made.__mro__[1:]:
            for name, described in getattr(base, "__pydantic_fields__", {}).items():
                made.__pydantic_fields__[name].description = (
                    made.__pydantic_fields__[name].description or described.description
                )
        return made

    return make


def listed(*items):
    """The default of a list."""
    return field(default_factory=lambda: list(items))


class Kind:
    """Settings of a thing that comes in kinds: what its kind does not read may stand there with its default alone."""

    @model_validator(mode="after")
    def _reads_all(self):
        readers = self.readers()
        for f in dataclasses.fields(self):
            kinds = readers.get(f.name, ())
            if kinds and self.kind not in kinds and getattr(self, f.name) != f.default:
                raise fault(
                    f"read by kind {', '.join(kinds)} alone, and this is {self.kind}; leave it out", f.name, self
                )
        return self

    def own_settings(self):
        """Setting -> value, of those that this kind reads and others don't."""
        return {name: getattr(self, name) for name, kinds in self.readers().items() if self.kind in kinds}

    @classmethod
    def readers(cls):
        """Setting -> the kinds that read it, of those that not all kinds read."""
        return {
            name: mark.kinds
            for name, hint in bounds.type_hints(cls).items()
            for mark in bounds.marks(hint)
            if isinstance(mark, ReadBy)
        }


def of_kinds(name, common, records):
    """The schema of a thing that comes in kinds: the settings that all kinds have, and those of each kind's own.

    Args:
        common: a `Kind`, whose `kind` may be any text.
        records: kind -> record, whose `settings` is a schema of the kind's own settings, or None. Kinds that share a
            setting share the class that has it.

    Raises UserError where two classes have one setting, for which of them counts could not be said.
    """
    schemas = list(dict.fromkeys(record.settings for record in records.values() if record.settings))
    bases = [cls for cls in schemas if not any(other is not cls and issubclass(other, cls) for other in schemas)]
    readers, owner = {}, {f.name: common for f in dataclasses.fields(common)}
    for kind, record in records.items():
        for cls in [c for c in (record.settings or Kind).__mro__ if dataclasses.is_dataclass(c)]:
            for setting in cls.__annotations__:
                if owner.setdefault(setting, cls) is not cls:
                    both = f"{owner[setting].__module__} and {cls.__module__}"
                    raise UserError(f"{both}: both have a setting {setting}; give one of them another name")
                readers.setdefault(setting, []).append(kind)
    readers = {setting: tuple(kinds) for setting, kinds in readers.items()}
    kinds = {"kind": Literal[*records]}
    return extended(name, (common, *bases), kinds, readers=classmethod(lambda cls: readers))


def extended(name, bases, annotations, **content):
    """A schema with the settings of others, of the first `bases` first, and with further ones."""
    content |= {"__doc__": bases[0].__doc__, "__module__": bases[0].__module__, "__annotations__": annotations}
    return dataclass()(type(name, bases[::-1], content))


@dataclass(frozen=True)
class KlSchedule(Kind):
    """How kl_coef changes over a run."""

    kind: Literal["fixed", "linear", "adaptive"] = "fixed"
    """fixed | linear: to a share of itself over the run | adaptive: follows a target KL."""
    final: Annotated[Share, ReadBy("linear"), ALWAYS] = 0.0
    """linear: share of kl_coef that is left in the last iteration."""
    target: Annotated[float, Range(above=0, at_most=10**6), ReadBy("adaptive"), ALWAYS] = 6.0
    """adaptive: wanted KL to the reference, nats per response."""
    horizon: Annotated[float, Range(above=0, at_most=10**12), ReadBy("adaptive"), ALWAYS] = 10000.0
    """adaptive: responses in which kl_coef follows (1909.08593)."""


@dataclass()
class Training:
    """The section of an algorithm. What others read of it, and not every algorithm has, stands here as it is without.

    An algorithm whose policy is sampled and trained in turns has the settings of `OnPolicy`.
    """

    seeds: ClassVar[int] = 1  # how often a policy is trained on the same SFT and reward models
    iterations: ClassVar[int] = 1
    batch_size: ClassVar[int] = 1
    samples: ClassVar[int] = 1  # responses to each prompt of an iteration
    kl_schedule: ClassVar = None
    lora_rank: ClassVar[int] = 0


@dataclass()
class Seeded(Training):
    """Of an algorithm that trains, and so comes to another policy with another seed."""

    seeds: Annotated[int, Range(1, 100), ADDED] = 1
    """Policies that are trained for each arm, kl_coef and replicate, on the same SFT models and reward model: with
    seeds 0, 1, … of the prompts' order and of the noise.
    """


@dataclass()
class Adapters(Seeded):
    """Of an algorithm that can train low-rank adapters."""

    lora_rank: LoraRank = 0
    """Low-rank adapters on every linear layer of what is trained; 0: all weights are trained."""
    lora_alpha: LoraAlpha = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""


@dataclass()
class OnPolicy(Adapters):
    """Of an algorithm that samples from its policy and trains it, in turns."""

    iterations: Annotated[int, Range(1, 10**6)] = 40
    """Rounds of sampling and training."""
    batch_size: Batch = 128
    """Responses per iteration, over all processes."""
    kl_schedule: KlSchedule = field(default_factory=KlSchedule)
    """How kl_coef changes over the run."""
    rollouts_every: Annotated[int, Range(1, 10**6)] = 5
    """Iterations between kept rollouts (text), from which gold trajectories are read."""


@functools.cache
def _adapter(schema):
    return TypeAdapter(schema)


def from_dict(schema, values):
    """Build dataclass `schema` from nested dictionaries, with its defaults where they leave something out.

    Raises:
        messages.SettingError: a ValueError of one line, which names the key of an unknown or missing setting, of a
            wrong type, or of a value that its field does not allow.
    """
    try:
        return _adapter(schema).validate_python(values)
    except ValidationError as error:
        raise messages.refusal(error, schema, values) from None


def dump(settings):
    """Settings as nested dictionaries, as they are addressed.

    A setting that was `ADDED` is left out at its default, and one that another kind reads unless it is there `ALWAYS`.
    """
    if isinstance(settings, dict):
        return {name: dump(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [dump(value) for value in settings]
    if not dataclasses.is_dataclass(settings):
        return settings
    hints = bounds.type_hints(type(settings))
    readers = settings.readers() if isinstance(settings, Kind) else {}
    values = {}
    for f in dataclasses.fields(settings):
        value, marks = getattr(settings, f.name), bounds.marks(hints[f.name])
        unread = f.name in readers and settings.kind not in readers[f.name] and ALWAYS not in marks
        if not unread and (ADDED not in marks or value != _default(f)):
            values[f.name] = dump(value)
    return values


def _default(f):
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def defaults(schema):
    """The defaults of a section as nested dictionaries, with OmegaConf's mark ??? where one has to be given."""
    values = {}
    hints = bounds.type_hints(schema)
    for f in dataclasses.fields(schema):
        hint = bounds.base_type(hints[f.name])
        if dataclasses.is_dataclass(hint) and f.default is not None:
            values[f.name] = defaults(hint)
        elif f.default_factory is not dataclasses.MISSING:
            values[f.name] = f.default_factory()
        else:
            values[f.name] = "???" if f.default is dataclasses.MISSING else f.default
    return values
