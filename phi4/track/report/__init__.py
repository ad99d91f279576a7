"""A report of one or several runs as one self-contained HTML page."""

from phi4.track.report.page import page_of, write_report

__all__ = ["page_of", "write_report"]
