"""Turn a catalog and layouts into load plans, with the proof that every wanted element is read exactly once. Pure.

::

    Catalog x RankLayout ──► planner.py ──► LoadPlan (one rank) ──► cooperative.py ──► CooperativePlan (who reads what for whom)
                               │  match_keys.py, state_layout.py, cover.py               split.py, rank_layouts.py
"""
