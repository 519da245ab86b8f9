"""One self-contained HTML page of the results of evaluations: `vlv evaluate report`."""

from .page import write_report
from .runs import ReportSettings

__all__ = ["ReportSettings", "write_report"]
