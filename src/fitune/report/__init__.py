"""Reads recorded runs, compares them, and shows the comparison as tables, pictures and pages."""
