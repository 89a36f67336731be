"""Views on a report: a Chrome trace, and an HTML page.

::

    StageReport ──► timeline.py ──► trace.py
                                └─► page.py ──► charts.py (plotly)
     2 x StageReport ──► comparison.py ──► page.py
"""

from __future__ import annotations

from shardferry.schemas.plan_report import PlanReport
from shardferry.schemas.stage_report import FailedStage, StageReport


def page_of(report: StageReport | FailedStage | PlanReport, other: StageReport | FailedStage | None = None) -> str:
    """The HTML page of a run, or of a dry run. It imports plotly, which may not be installed.

    Args:
        other: another run, which is shown beside the first one where both have succeeded.
    """
    from shardferry.pipeline.exports.page import html_page

    return html_page(report, other if isinstance(other, StageReport) else None)
