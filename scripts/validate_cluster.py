"""Check a Ray cluster launcher's file against Ray's schema, without a cluster and without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jsonschema
import ray
import yaml


def problem_with(config: Any) -> str | None:
    """What Ray would refuse, in words; None where it would accept.

    Ray has no public function for this: `ray up` calls these two, in this order. They are touched here only.
    """
    try:
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        return f"not checked: Ray {ray.__version__} keeps its validation elsewhere, adapt {__file__}: {error}"
    if not isinstance(config, dict) or "provider" not in config:
        return "no cluster config: it has no provider"
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        return f"{error.json_path.removeprefix('$.')}: {error.message}"
    except Exception as error:  # whatever type Ray chose, its words are the finding
        return f"{type(error).__name__}: {error}"
    return None


def main(paths: list[str]) -> int:
    status = 0
    for path in paths:
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            problem = f"not readable as YAML: {error}"
        else:
            problem = problem_with(config)
        if problem is None:
            print(f"{path}: accepted by Ray's schema")
        else:
            print(f"{path}: {problem}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["cluster.yaml"]))
