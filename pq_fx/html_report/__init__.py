"""A report as one HTML file: no network, no other files, readable without JavaScript, in light and dark."""

from __future__ import annotations

from pq_fx.html_report.page import page
from pq_fx.html_report.source import Subject, find_subject

__all__ = ["Subject", "find_subject", "page"]
