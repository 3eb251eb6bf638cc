"""The findings of an evaluation for people: a page, Markdown for a model card, a table of cases."""

from synthcube.evaluation.report.folder import (
    CASES,
    MARKDOWN,
    PAGE,
    require_own_report,
    write_report,
)

__all__ = ["CASES", "MARKDOWN", "PAGE", "require_own_report", "write_report"]
