"""What people look at: tables for the terminal, pictures of predictions."""

from im2json.report.table import before_after_table, table

__all__ = ["before_after_table", "table"]
