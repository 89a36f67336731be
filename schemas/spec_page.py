"""Turn the models of the stage's spec into docs/spec.md: every field with its type, default, unit and description.

``scripts/spec`` writes the page; tests/schemas/test_spec_page.py compares it with the models.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shardferry.schemas.stage_config import StageConfig

_HEAD = """\
# The stage's spec

This page is generated from `schemas/stage_config.py` by `scripts/spec`; do not edit it.

A spec is a YAML or JSON file, or a `shardferry.schemas.StageConfig` in Python. Every section may be left out; without `topology` the trainers
are asked for their layout. An unknown field is an error (`SpecError`) that names the field's path and the fields that exist.

`load_optimizer_state` has keywords of the same names and defaults: the fields of `checkpoint` but `cache`, the fields of `read` but the
three bandwidths, and `load_s`. With them an unknown name is a `SpecError` too.

- **FQN**: the name of a parameter, such as `layers.0.wq.weight`. A *saved* FQN is the name in the checkpoint; a *wanted* FQN is the name in the
  target's model. **Glob**: a name with the shell's `*`, `?` and `[...]`.
- **Sizes** are integers in bytes, or text with a unit: `64KiB`, `1GiB`, `50GB`.
"""
_SIZE = "size"
_UNITS = {  # of numbers that are neither sizes nor seconds
    "concurrency": "requests",
    "cpus_per_actor": "CPUs",
    "gpus_per_actor": "GPUs",
    "max_attempts": "attempts",
    "memory_fraction": "of the memory",
    "mesh": "ranks",
    "retries": "attempts",
}
_DOCUMENT = re.compile(r"docs/([a-z_]+\.md)")
_BYTE_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def spec_page() -> str:
    """The text of docs/spec.md."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    definitions = StageConfig.model_json_schema()["$defs"]
    for path, model in _models(StageConfig, ""):
        if not path:
            continue
        yield f"## `{path}`\n\n{model.__doc__}\n"
        yield "| field | type | default | unit | description |\n|---|---|---|---|---|"
        properties = definitions[model.__name__]["properties"]
        for name, field in model.model_fields.items():
            field_type = _type_of(properties[name], definitions)
            cells = [
                f"`{name}`",
                field_type,
                _default(field, properties[name]),
                _unit(name, field_type),
                _description(field),
            ]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


def _models(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and the models in its fields, each with its path in a spec."""
    yield path, model
    for name, field in model.model_fields.items():
        inner, is_list = _inner_model(field.annotation)
        if inner is not None:
            yield from _models(inner, f"{path}.{name}".lstrip(".") + ("[]" if is_list else ""))


def _inner_model(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model in a field's annotation, if there is one, and whether the field is a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for argument in getattr(annotation, "__args__", ()):
        inner, _ = _inner_model(argument)
        if inner is not None:
            return inner, getattr(annotation, "__origin__", None) is tuple
    return None, False


def _type_of(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The words for a JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _type_of(definitions[name], definitions) if "enum" in definitions[name] else "section"
    if "enum" in schema:
        return " | ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        if any("pattern" in choice for choice in schema["anyOf"]):  # pydantic's ByteSize
            choices = [_SIZE, *(_type_of(one, definitions) for one in schema["anyOf"] if one.get("type") == "null")]
        else:
            choices = [_type_of(one, definitions) for one in schema["anyOf"]]
        return " | ".join(choices)
    if schema["type"] == "array":
        return f"list of {_plural(_type_of(schema['items'], definitions))}"
    if schema["type"] == "object":
        values = schema["additionalProperties"]
        return "map" if values is True else f"map of string to {_type_of(values, definitions)}"
    return str(schema["type"]) + _bounds(schema)


def _plural(word: str) -> str:
    return word if "`" in word else f"{word}s"


def _bounds(schema: dict[str, Any]) -> str:
    """The bounds of a number, in words."""
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        return f", {least} to {most}"
    if least is not None:
        return f", >= {least}"
    return ", > 0" if schema.get("exclusiveMinimum") == 0 else ""


def _default(field: FieldInfo, schema: dict[str, Any]) -> str:
    if field.is_required():
        return "required"
    value = schema["default"]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if "$ref" not in schema and schema.get("anyOf") and isinstance(value, int) and not isinstance(value, bool):
        return f"`{_size(value)}`"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A default as a spec would have it."""
    words: dict[Any, str] = {None: "null", True: "true", False: "false", "": "''"}
    if isinstance(value, list | dict):
        return str(value)
    return words.get(value, str(value)) if isinstance(value, bool | str | None) else f"{value:g}"


def _size(nbytes: int) -> str:
    for unit, factor in _BYTE_UNITS:
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor}{unit}"
    return str(nbytes)


def _unit(name: str, field_type: str) -> str:
    if name.endswith("_s"):
        return "seconds"
    if field_type.startswith(_SIZE):
        return "bytes/s" if name.endswith("_bandwidth") else "bytes"
    return _UNITS.get(name, "")


def _description(field: FieldInfo) -> str:
    """The description as a sentence, with links to the other pages."""
    text = _DOCUMENT.sub(r"[docs/\1](\1)", field.description or "")
    is_word = text.partition(" ")[0].isalpha()
    return (text[:1].upper() + text[1:] if is_word else text) + "."


if __name__ == "__main__":
    sys.stdout.write(spec_page())
