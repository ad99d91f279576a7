"""A run, or several side by side, as one HTML page that needs nothing but itself."""

from phi4.track.report.page import page_of, write_report

__all__ = ["page_of", "write_report"]
