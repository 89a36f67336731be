"""Where a checkpoint's bytes are: a protocol for byte ranges of files, one file per kind of storage, and retries.

::

    open.py ──► pyarrow.py | local.py | obstore.py | fsspec.py ──► retry.py ──► base.py
"""
