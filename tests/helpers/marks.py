"""Parameters of tests of which `make test`, or `make test-slow`, runs the first."""

import pytest


def slow_after(count, values):
    """The first `count` values; `make test-slow` runs the others as well."""
    return _mark_after(count, values, pytest.mark.slow)


def exhaustive_after(count, values):
    """The first `count` values; `make test-exhaustive` runs the others."""
    return _mark_after(count, values, pytest.mark.exhaustive)


def _mark_after(count, values, mark):
    values = list(values)
    return values[:count] + [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=mark)
        for v in values[count:]
    ]
