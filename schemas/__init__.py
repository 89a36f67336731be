"""What people and files give us, and what we report, as pydantic models.

In the repository's root this folder is also the package ``schemas``: its names are those of `shardferry.schemas`.
"""

from typing import TYPE_CHECKING

__all__ = [
    "ActorsSpec",
    "Balance",
    "CheckpointSpec",
    "HandoffSpec",
    "HeldBySpec",
    "PlanReport",
    "RankPlan",
    "RankReport",
    "ReadSpec",
    "RuleSpec",
    "StageConfig",
    "StageReport",
    "TimeoutsSpec",
    "TopologySpec",
]

# For the type checker, and at run time when a name is first used: a report's schema needs no torch.
if TYPE_CHECKING:
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
