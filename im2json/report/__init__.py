"""Show results to people: tables for the terminal, pictures of predictions, HTML pages and model cards."""

from im2json.report.table import before_after_table, table

__all__ = ["before_after_table", "table"]
