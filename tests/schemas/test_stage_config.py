"""Specs: what is accepted, and what the error says where it isn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from shardferry.config import LoadRequest, ReadOptions
from shardferry.errors import SpecError
from shardferry.handoff.transports import TRANSPORTS, stage_transport_names
from shardferry.schemas import StageConfig

DESIGN = """
checkpoint: {location: ckpt/step-1000, optimizer_key: optim}
topology:
  mesh: {dp_replicate: 1, dp_shard: 2, tp: 2}
  rules:
    - {match: "*.attention.w[qkv].weight", placements: {dp_shard: "Shard(0)", tp: "Shard(0)"}}
    - {match: "*.attention.wo.weight",     placements: {dp_shard: "Shard(0)", tp: "Shard(1)"}}
  default: {dp_shard: "Shard(0)"}
actors:   {device: auto, gpus_per_actor: 1, placement: PACK}
read:     {memory_budget: 1GiB, concurrency: 16, strategy: auto}
handoff:  {transport: auto}
timeouts: {start_s: 120, load_s: 3600, handoff_s: 600}
"""


def test_the_documented_spec(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text(DESIGN)
    config = StageConfig.from_file(tmp_path / "stage.yaml")
    assert config.topology is not None
    layout = config.topology.layout()
    assert layout.mesh.axes == (("dp_replicate", 1), ("dp_shard", 2), ("tp", 2))
    assert layout.placements("layers.3.attention.wq.weight") == (Replicate(), Shard(0), Shard(0))
    assert layout.placements("layers.3.attention.wo.weight") == (Replicate(), Shard(0), Shard(1))
    assert layout.placements("norm.weight") == (Replicate(), Shard(0), Replicate())
    assert config.read.memory_budget == 1024**3
    assert StageConfig.model_validate_json(config.model_dump_json()) == config


def test_transports_are_those_of_the_registry() -> None:
    for name in stage_transport_names():
        assert StageConfig.model_validate({"handoff": {"transport": name}}).handoff.transport == name
    schema = StageConfig.model_json_schema()["$defs"]["HandoffSpec"]["properties"]["transport"]
    assert schema["enum"] == list(stage_transport_names())
    assert schema["default"] == StageConfig().handoff.transport == "auto"
    for name in ["pigeon", "", 5, None, ["auto"]]:
        with pytest.raises(SpecError) as refused:
            StageConfig.from_values({"handoff": {"transport": name}}, source="stage.yaml")
        assert str(refused.value) == (
            f"stage.yaml: handoff.transport: Input should be 'auto', 'in_process', 'shared_memory', 'cuda_ipc', 'object_store', 'collective' or 'nixl' (found {name!r})"
        )


def test_arenas_on_gpus_go_by_transports_that_take_them() -> None:
    for transport in (transport for transport in TRANSPORTS if transport.crosses_processes):
        values = {"actors": {"device": "cuda"}, "handoff": {"transport": transport.name}}
        if not transport.needs_host_arena:
            assert StageConfig.model_validate(values).handoff.transport == transport.name
            continue
        with pytest.raises(SpecError, match=rf"handoff\.transport {transport.name} needs arenas on the host"):
            StageConfig.from_values(values, source="stage.yaml")


def test_what_is_asked_of_the_checkpoint() -> None:
    values = {
        "optimizer_key": "app.optim",
        "model_key": "app.model",
        "rename": {"_orig_mod.*": "*"},
        "include": ["layers.*"],
        "keys": "allow_missing",
        "dtype": "cast",
        "wanted_dtypes": {"exp_avg*": "bfloat16"},
    }
    request = StageConfig.model_validate({"checkpoint": values}).checkpoint.request()
    assert (request.optimizer_key, request.model_key) == ("app.optim", "app.model")
    assert request.selection.wanted_names(["_orig_mod.head.bias"]) == {"_orig_mod.head.bias": ("head.bias",)}
    assert [request.selection.selects(fqn) for fqn in ("layers.0.weight", "head.weight")] == [True, False]
    assert (request.keys.allow_missing, request.keys.ignore_unexpected) == (True, False)
    assert (request.wanted_dtype("exp_avg_sq"), request.wanted_dtype("step")) == (torch.bfloat16, None)


def test_who_holds_what() -> None:
    topology = {
        "mesh": {"pp": 2, "ep": 4, "dp": 1},
        "rules": [
            {"match": "*.experts", "placements": {"ep": "Shard(0)"}},
            {"match": "*", "state": "row_*", "placements": {}},
        ],
        "held_by": [
            {"match": "layers.0.*", "ranks": {"pp": [0]}},
            {"match": "layers.*", "ranks": {"pp": [1]}},
            {"match": "*.expert3.*", "ranks": {"ep": [3]}},
        ],
    }
    config = StageConfig.model_validate({"topology": topology})
    assert config.topology is not None
    layout = config.topology.layout()

    def holders(fqn: str) -> list[int]:
        return [rank for rank in range(8) if layout.rank(rank).holds(fqn)]

    assert holders("embedding.weight") == list(range(8))
    assert holders("layers.0.weight") == [0, 1, 2, 3]
    assert holders("layers.1.expert3.weight") == [7]
    assert layout.placements("layers.0.weight") == (Replicate(), Replicate(), Replicate())
    assert layout.entry_placements("layers.0.weight", "exp_avg") is None
    assert layout.entry_placements("layers.0.weight", "row_var") == (Replicate(), Replicate(), Replicate())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            {"topology": {"mesh": {"pp": 2}, "held_by": [{"match": "*", "ranks": {"pp": [2]}}]}},
            r"topology: held_by '\*': pp: \[2\] are not coordinates of an axis of 2; give some of 0 to 1",
            id="holder",
        ),
        pytest.param(
            {"checkpoint": {"rename": {"a.*": "b"}}}, r"checkpoint: rename: 'a\.\*' has 1 stars, 'b' has 0", id="rename"
        ),
        pytest.param(
            {"checkpoint": {"keys": ["strict", "allow_missing"]}},
            r"checkpoint: keys: strict goes with no other",
            id="keys",
        ),
        pytest.param(
            {"checkpoint": {"keys": "lenient"}},
            r"checkpoint\.keys\.0: .*'ignore_unexpected' \(found 'lenient'\)",
            id="policy",
        ),
        pytest.param(
            {"checkpoint": {"include": "a.*"}}, r"checkpoint\.include: .* a list \(found 'a\.\*'\)", id="one-glob"
        ),
        pytest.param({"checkpoint": {"rename": {"a": ""}}}, r"rename: 'a' to '': an empty name", id="no-name"),
        pytest.param(
            {"checkpoint": {"wanted_dtypes": {"*": "float31"}}}, r"'float31' is not a torch dtype", id="dtype"
        ),
        pytest.param({"checkpoint": {"wanted_dtypes": {"*": "int8"}}}, r"state can't be converted to int8", id="lossy"),
        pytest.param(
            {"checkpoint": {"wanted_dtypes": {"*": "bits8"}}}, r"can't be converted to bits8", id="no-numbers"
        ),
        pytest.param({"chekpoint": {}}, r"chekpoint: unknown field .* known are checkpoint, topology", id="section"),
        pytest.param(
            {"read": {"concurency": 3}}, r"read\.concurency: unknown field .*known are .*concurrency", id="field"
        ),
        pytest.param(
            {"topology": {"mesh": {"dp": 2}, "rules": [{"match": "*", "placement": {}}]}},
            r"topology\.rules\.0\.placement: unknown field .* known are match, placements",
            id="field-of-a-rule",
        ),
        pytest.param(
            {"topology": {"mesh": {"dp": 2}, "default": {"tp": "Shard(0)"}}},
            r"topology: default: axis 'tp' is not in the mesh, which has dp",
            id="axis",
        ),
        pytest.param(
            {"topology": {"mesh": {"dp": 2}, "rules": [{"match": "*", "placements": {"dp": "Shrd(0)"}}]}},
            r"rules\[0\]: 'Shrd\(0\)' is not a placement; write 'Shard\(<dim>\)' or 'Replicate'",
            id="placement",
        ),
        pytest.param({"topology": {"mesh": {"dp": 0}}}, r"topology\.mesh\.dp: .*greater than 0 \(found 0\)", id="size"),
        pytest.param(
            {"topology": {"mesh": {"dp": 1 << 20, "tp": 2}}},
            r"topology\.mesh: makes 2097152 ranks; the most are",
            id="ranks",
        ),
        pytest.param({"topology": {"mesh": {"": 2}}}, r"topology\.mesh: an axis has no name", id="nameless-axis"),
        pytest.param({"actors": {"gpus_per_actor": float("inf")}}, r"gpus_per_actor: .*finite", id="infinite-gpus"),
        pytest.param({"topology": {"mesh": {}}}, r"topology\.mesh: .*at least 1", id="no-axis"),
        pytest.param(
            {"actors": {"device": "tpu"}}, r"actors\.device: .*'auto', 'cpu' or 'cuda' \(found 'tpu'\)", id="device"
        ),
        pytest.param({"actors": {"gpus_per_actor": 1.5}}, r"actors\.gpus_per_actor: 1\.5 GPUs: above 1", id="gpus"),
        pytest.param(
            {"read": {"memory_budget": "1MiB"}}, r"read\.memory_budget: .*the least is 8388608 bytes", id="budget"
        ),
        pytest.param({"timeouts": {"load_s": 0}}, r"timeouts\.load_s: .*greater than 0", id="timeout"),
        pytest.param({"timeouts": {"load_s": float("inf")}}, r"timeouts\.load_s: .*finite", id="no-deadline"),
        pytest.param(
            {"actors": {"device": "cuda"}, "handoff": {"transport": "shared_memory"}},
            r"shared_memory needs arenas on the host",
            id="device-and-transport",
        ),
        pytest.param({"handoff": {"transport": "pigeon"}}, r"handoff\.transport: .*found 'pigeon'", id="transport"),
    ],
)
def test_wrong_specs_name_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        StageConfig.from_values(values, source="stage.yaml")
    assert str(caught.value).startswith("stage.yaml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("topology: {mesh: [", "not readable as a spec", id="not-yaml"),
        pytest.param("- a\n- b", "is a list, not a spec with the fields checkpoint", id="a-list"),
        pytest.param("", "is a NoneType", id="empty"),
        pytest.param("read: {concurrency: 1}\nread: {}", "the key 'read' is given twice", id="key-twice"),
        pytest.param("\0\1", "not readable as a spec", id="binary"),
    ],
)
def test_files_that_are_no_spec(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        StageConfig.from_file(path)


def test_defaults_are_those_of_the_core() -> None:
    config = StageConfig()
    assert config.read.options(config.timeouts.load_s) == ReadOptions()
    assert config.checkpoint.request() == LoadRequest()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"stage\.yaml: can't be read: No such file or directory; give the file"):
        StageConfig.from_file(tmp_path / "stage.yaml")
    with pytest.raises(SpecError, match="can't be read: Is a directory; give the file"):
        StageConfig.from_file(tmp_path)


def test_how_to_read_in_the_cores_terms() -> None:
    read = {"memory_budget": "20MiB", "concurrency": 12, "max_gap": "1KiB", "max_request": "2MiB"}
    options = StageConfig.model_validate({"read": read}).read.options(10.0)
    assert (options.concurrency, options.memory_budget, options.load_s) == (12, 20 << 20, 10.0)
    assert (options.max_gap, options.max_request, options.max_attempts) == (1024, 2 << 20, 5)
