"""Let ranks agree on each step, and bring boxes to the ranks that want them.

::

    agreement.py (all go on, or all raise) ── rank_info.py ──► strategy.py (direct or cooperative)
    delivery.py ──► peer_memory.py (same node)  or  point_to_point.py (other nodes, over the process group)
"""

from shardferry.exchange.agreement import Agreement
from shardferry.exchange.delivery import Delivery, open_delivery
from shardferry.exchange.rank_info import RankInfo
from shardferry.exchange.strategy import ChosenStrategy, choose_strategy, plan_cooperation

__all__ = [
    "Agreement",
    "ChosenStrategy",
    "Delivery",
    "RankInfo",
    "choose_strategy",
    "open_delivery",
    "plan_cooperation",
]
