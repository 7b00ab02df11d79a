"""The JSON schema of presets, from which an editor completes and checks a file of conf/ while it is typed.

A preset holds a part of the configuration: nothing is required, an unknown key is refused, and an interpolation such as
${ppo.temperature} may stand for any value. Left out: rules over several settings, which `salsa plan` says.
"""

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from salsa.workflow import bounds, config

DIALECT = "http://json-schema.org/draft-07/schema#"  # which all editors know
INTERPOLATION = {
    "pattern": bounds.INTERPOLATION,
    "patternErrorMessage": "Of another type, and no interpolation such as ${ppo.temperature}.",  # an editor's own key
}
DEFAULTS = {
    "description": "Hydra's list of the presets that this one starts from, or takes in the place of others.",
    "type": "array",
    "items": {"type": ["string", "object"]},
}
HYDRA = {"description": "Hydra's own settings, of `salsa run` with its flags.", "type": "object"}


class Partial(GenerateJsonSchema):
    """Schemas of which nothing is required, and whose numbers, switches and choices may be interpolations."""

    def field_is_required(self, field, total):
        return False

    def field_title_should_be_set(self, schema):
        return False

    def int_schema(self, schema):
        return super().int_schema(schema) | {"type": ["integer", "string"]} | INTERPOLATION

    def float_schema(self, schema):
        return super().float_schema(schema) | {"type": ["number", "string"]} | INTERPOLATION

    def bool_schema(self, schema):
        return {"type": ["boolean", "string"]} | INTERPOLATION

    def literal_schema(self, schema):
        return {"anyOf": [super().literal_schema(schema), {"type": "string"} | INTERPOLATION]}


def of_presets():
    """The schema of presets of the whole configuration; those of one arm, one judge, … are `#/$defs/arms`, ….

    The names in `$defs` are those of the packages that presets name (`# @package arms.salsa`).
    """
    schema = TypeAdapter(config.Config).json_schema(schema_generator=Partial)
    sections = schema["$defs"]
    for name, group in schema["properties"].items():
        if "patternProperties" in group:
            group["additionalProperties"] = False
            (entry,) = group["patternProperties"].values()
            sections[name] = _with(sections[entry["$ref"].rpartition("/")[2]], defaults=DEFAULTS)
    return {"$schema": DIALECT} | _with(schema, defaults=DEFAULTS, hydra=HYDRA)


def _with(schema, **properties):
    return schema | {"properties": properties | schema["properties"]}
