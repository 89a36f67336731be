"""What people and files give us, and what we report, as pydantic models."""

from schemas.plan_report import Balance, PlanReport, RankPlan
from schemas.stage_config import (
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
from schemas.stage_report import RankReport, StageReport

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
