"""Read the bytes of a load plan: a pure schedule of requests, and an executor that carries it out.

::

    LoadPlan ──► schedule.py ──► read tasks ──► execute.py ──► arena, or other ranks (exchange/delivery.py)
                 requests.py, coalesce.py       items.py, zip_header.py, buffers.py, threads.py
"""

from shardferry.read.execute import Cooperation, check_files, read_objects, read_plan
from shardferry.read.schedule import count_objects, requests_of_plan
from shardferry.read.verify import verified_bytes, verify_checkpoint

__all__ = [
    "Cooperation",
    "check_files",
    "count_objects",
    "read_objects",
    "read_plan",
    "requests_of_plan",
    "verified_bytes",
    "verify_checkpoint",
]
