"""Read the bytes of a load plan: a pure schedule of requests, and an executor that carries it out.

::

    LoadPlan ──► schedule.py ──► read tasks ──► execute.py ──► arena, or other ranks (exchange/delivery.py)
                 requests.py, coalesce.py       items.py, zip_header.py, buffers.py, threads.py
"""
