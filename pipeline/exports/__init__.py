"""Views on a report: a Chrome trace, and an HTML page.

::

    StageReport ──► timeline.py ──► trace.py
                                └─► page.py ──► charts.py (plotly)
"""

from __future__ import annotations

from shardferry.schemas.plan_report import PlanReport
from shardferry.schemas.stage_report import FailedStage, StageReport


def page_of(report: StageReport | FailedStage | PlanReport) -> str:
    """The HTML page of a run, or of a dry run. It imports plotly, which may not be installed."""
    from shardferry.pipeline.exports.page import html_page

    return html_page(report)
