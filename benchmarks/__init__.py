"""Comparisons with other libraries; never imported by the package."""
