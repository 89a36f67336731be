"""A job of its own: loads a checkpoint of four ranks on two, keeps it, and ends. Arguments: Ray's address, checkpoint, name."""

from __future__ import annotations

import sys

import ray

from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig


def main() -> None:
    address, checkpoint, name = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    topology = {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}}
    spec = {"checkpoint": {"location": checkpoint, "model_key": "model"}, "topology": topology}
    result = OptimizerLoadStage(StageConfig.model_validate(spec)).run(keep=name)
    print([rank.gpu_ids for rank in result.report.ranks])
    result.close()


if __name__ == "__main__":
    main()
