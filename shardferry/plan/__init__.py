"""Turn a catalog and layouts into load plans, with the proof that every wanted element is read exactly once. Pure.

::

    Catalog x RankLayout ──► planner.py ──► LoadPlan (one rank) ──► cooperative.py ──► CooperativePlan (who reads what for whom)
                               │  match_keys.py, state_layout.py, cover.py               split.py, rank_layouts.py
"""

from shardferry.plan.cooperative import CooperativePlan, CooperativeRead, assign_reads
from shardferry.plan.load_plan import LoadPlan, Manifest, PlannedTensor, PlannedValue, ReadItem
from shardferry.plan.match_keys import KeyReport
from shardferry.plan.planner import plan_load, plan_tensors

__all__ = [
    "CooperativePlan",
    "CooperativeRead",
    "KeyReport",
    "LoadPlan",
    "Manifest",
    "PlannedTensor",
    "PlannedValue",
    "ReadItem",
    "assign_reads",
    "plan_load",
    "plan_tensors",
]
