"""Loaded state and a live model with its optimizer: which layout the model wants, and how the state gets into it."""

from shardferry.optimizer.install import fit, load_into
from shardferry.optimizer.live import LiveGroup, LiveModel, LiveParameter
from shardferry.optimizer.live_layout import live_layout
from shardferry.optimizer.loaded_state import LoadedState
from shardferry.optimizer.wrappers import torch_optimizers

__all__ = [
    "LiveGroup",
    "LiveModel",
    "LiveParameter",
    "LoadedState",
    "fit",
    "live_layout",
    "load_into",
    "torch_optimizers",
]
