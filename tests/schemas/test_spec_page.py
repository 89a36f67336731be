"""docs/spec.md says what the models of the spec say."""

from __future__ import annotations

from pydantic import BaseModel

from shardferry.schemas import stage_config
from shardferry.schemas.spec_page import spec_page
from tests.support.commands import REPOSITORY

PAGE = (REPOSITORY / "docs" / "spec.md").read_text(encoding="utf-8")
SECTIONS = {
    "checkpoint": stage_config.CheckpointSpec,
    "topology": stage_config.TopologySpec,
    "topology.rules[]": stage_config.RuleSpec,
    "topology.held_by[]": stage_config.HeldBySpec,
    "actors": stage_config.ActorsSpec,
    "read": stage_config.ReadSpec,
    "handoff": stage_config.HandoffSpec,
    "handoff.keep": stage_config.KeepSpec,
    "timeouts": stage_config.TimeoutsSpec,
}


def rows(section: str) -> dict[str, list[str]]:
    """The cells of a section's rows, by field."""
    text = PAGE.split(f"## `{section}`\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.replace("\\|", "or").strip("| ").split(" | ")] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def test_the_page_is_up_to_date() -> None:
    assert spec_page() == PAGE, "docs/spec.md is out of date; run scripts/spec"


def test_every_model_is_a_section() -> None:
    models = {
        one
        for one in vars(stage_config).values()
        if isinstance(one, type) and issubclass(one, BaseModel) and one.__module__ == stage_config.__name__
    }
    assert models - {stage_config.Spec, stage_config.StageConfig} == set(SECTIONS.values())


def test_every_field_has_a_type_a_default_and_a_description() -> None:
    found = {section: rows(section) for section in SECTIONS}
    assert {section: list(table) for section, table in found.items()} == {
        section: list(model.model_fields) for section, model in SECTIONS.items()
    }
    for table in found.values():
        for name, (_, field_type, default, _, description) in table.items():
            assert field_type, name
            assert default, name
            assert len(description) > len("."), name


def test_every_number_has_a_unit() -> None:
    lacking = [
        f"{section}.{name}"
        for section in SECTIONS
        for name, (_, field_type, _, unit, _) in rows(section).items()
        if any(word in field_type for word in ("integer", "number", "size")) and not unit
    ]
    assert lacking == ["topology.held_by[].ranks"]  # coordinates


def test_types_defaults_and_units_in_words() -> None:
    assert rows("read")["memory_budget"][1:4] == ["size", "`1GiB`", "bytes"]
    assert rows("read")["concurrency"][1:4] == ["integer, 1 to 1024", "`16`", "requests"]
    assert rows("read")["node_bandwidth"][1:4] == ["size or null", "`null`", "bytes/s"]
    assert rows("timeouts")["load_s"][1:4] == ["number, > 0", "`3600`", "seconds"]
    assert rows("checkpoint")["keys"][1:3] == ["list of `strict` or `allow_missing` or `ignore_unexpected`", "`strict`"]
    assert rows("topology")["mesh"][2] == "required"
