"""Views on a stage's report: a Chrome trace, and an HTML page.

::

    StageReport ──► timeline.py ──► trace.py
                                └─► page.py ──► charts.py (plotly)
"""

from __future__ import annotations

import importlib.util

from shardferry.errors import SpecError
from shardferry.schemas.stage_report import FailedStage, StageReport


def check_html() -> None:
    """Raises SpecError: plotly, which draws the page, is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise SpecError("--html: needs plotly, which is not installed: pip install 'shardferry[html]'")


def page_of(report: StageReport | FailedStage) -> str:
    """The HTML page of a run. It imports plotly, which may not be installed: see `check_html`."""
    from shardferry.pipeline.exports.page import html_page

    return html_page(report)
