"""The driver: the stage, its command line, the dry run and the reports.

In the repository's root this folder is also the package ``pipeline``: its names are those of `shardferry.pipeline`.
"""

from typing import TYPE_CHECKING

__all__ = ["Loading", "OptimizerLoadStage", "StageResult", "progress"]

# The type checker reads the imports; at run time a name is imported on first use: the command line starts without Ray and torch.
if TYPE_CHECKING:
    from shardferry.pipeline.display import progress
    from shardferry.pipeline.loading import Loading
    from shardferry.pipeline.result import StageResult
    from shardferry.pipeline.stage import OptimizerLoadStage
else:
    from shardferry._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "shardferry.pipeline.display": ["progress"],
            "shardferry.pipeline.loading": ["Loading"],
            "shardferry.pipeline.result": ["StageResult"],
            "shardferry.pipeline.stage": ["OptimizerLoadStage"],
        },
    )
