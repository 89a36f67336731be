"""Let ranks agree on each step, and bring boxes to the ranks that want them.

::

    agreement.py (all go on, or all raise) ── rank_info.py ──► strategy.py (direct or cooperative)
    delivery.py ──► peer_memory.py (same node)  or  point_to_point.py (other nodes, over the process group)
"""
