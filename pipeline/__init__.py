"""The driver: the stage, its command line, its deliveries and reports.

In the repository's root this folder is also the package ``pipeline``: its names are those of `shardferry.pipeline`.
"""

from typing import TYPE_CHECKING

__all__ = ["Loading", "OptimizerLoadStage", "StageResult"]

# For the type checker, and at run time when a name is first used: the command line doesn't wait for Ray and torch.
if TYPE_CHECKING:
    from shardferry.pipeline.loading import Loading, StageResult
    from shardferry.pipeline.stage import OptimizerLoadStage
else:
    from shardferry._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "shardferry.pipeline.loading": ["Loading", "StageResult"],
            "shardferry.pipeline.stage": ["OptimizerLoadStage"],
        },
    )
