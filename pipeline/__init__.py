"""The driver: the stage, its command line, its deliveries and reports."""

from pipeline.loading import Loading, StageResult
from pipeline.stage import OptimizerLoadStage

__all__ = ["Loading", "OptimizerLoadStage", "StageResult"]
