"""Loader actors: their start on a Ray cluster, their placement, and their process group.

In the repository's root this folder is also the package ``actors``: its names are those of `shardferry.actors`.
"""

from typing import TYPE_CHECKING

__all__ = ["Guard", "Loader", "LoaderGroup", "LoaderSettings", "Progress", "start_loaders"]

# The type checker reads the imports; at run time a name is imported on first use: showing progress needs no Ray.
if TYPE_CHECKING:
    from shardferry.actors.guard import Guard
    from shardferry.actors.loader import Loader, LoaderSettings
    from shardferry.actors.loader_group import LoaderGroup, start_loaders
    from shardferry.actors.progress import Progress
else:
    from shardferry._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "shardferry.actors.guard": ["Guard"],
            "shardferry.actors.loader": ["Loader", "LoaderSettings"],
            "shardferry.actors.loader_group": ["LoaderGroup", "start_loaders"],
            "shardferry.actors.progress": ["Progress"],
        },
    )
