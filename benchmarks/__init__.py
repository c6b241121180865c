"""Measurements against peers; never imported by the package."""
