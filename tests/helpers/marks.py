"""Parameters of tests of which `make test` runs the first."""

import pytest


def slow_after(count, values):
    """The first `count` values; `make test-slow` runs the others as well."""
    values = list(values)
    return values[:count] + [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow)
        for v in values[count:]
    ]
