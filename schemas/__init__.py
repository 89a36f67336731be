"""What people and files give us, and what we report, as pydantic models."""

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
