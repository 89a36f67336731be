"""The driver: the stage, its command line, its deliveries and reports."""

from shardferry.pipeline.loading import Loading, StageResult
from shardferry.pipeline.stage import OptimizerLoadStage

__all__ = ["Loading", "OptimizerLoadStage", "StageResult"]
