"""Libraries that only a few tests compare with, imported when a test first uses them.

Each process of pytest-xdist collects all test files, and imports what they import.
"""

import importlib
import types


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith('_'):  # pytest looks for such ones when it collects
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)

    def __setattr__(self, name, value):
        patch = f"monkeypatch.setattr('{self.__name__}.{name}', ...)"
        raise TypeError(f'the module itself would keep its {name}; use {patch}')


def module(name):
    """Stands for the module `name`, whose public names can be read."""
    return _Module(name)
