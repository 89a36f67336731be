"""Input and reports as pydantic models: the stage's spec, and the JSON that each command prints.

In the repository's root this folder is also the package ``schemas``: its names are those of `shardferry.schemas`.
"""

from typing import TYPE_CHECKING

__all__ = [
    "ActorsSpec",
    "Balance",
    "CheckpointSpec",
    "HandoffSpec",
    "HeldBySpec",
    "InspectReport",
    "PlanReport",
    "RankPlan",
    "RankReport",
    "ReadSpec",
    "RuleSpec",
    "StageConfig",
    "StageReport",
    "TensorReport",
    "TimeoutsSpec",
    "TopologySpec",
]

# The type checker reads the imports; at run time a name is imported on first use: the schema of a report needs no torch.
if TYPE_CHECKING:
    from shardferry.schemas.inspect_report import InspectReport, TensorReport
    from shardferry.schemas.plan_report import Balance, PlanReport, RankPlan
    from shardferry.schemas.stage_config import (
        ActorsSpec,
        CheckpointSpec,
        HandoffSpec,
        HeldBySpec,
        ReadSpec,
        RuleSpec,
        StageConfig,
        TimeoutsSpec,
        TopologySpec,
    )
    from shardferry.schemas.stage_report import RankReport, StageReport
else:
    from shardferry._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "shardferry.schemas.inspect_report": ["InspectReport", "TensorReport"],
            "shardferry.schemas.plan_report": ["Balance", "PlanReport", "RankPlan"],
            "shardferry.schemas.stage_config": [
                "ActorsSpec",
                "CheckpointSpec",
                "HandoffSpec",
                "HeldBySpec",
                "ReadSpec",
                "RuleSpec",
                "StageConfig",
                "TimeoutsSpec",
                "TopologySpec",
            ],
            "shardferry.schemas.stage_report": ["RankReport", "StageReport"],
        },
    )
