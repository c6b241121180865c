"""Keeps a long run from growing with each save.

tensorstore's `KvStore.Spec.to_json` (0.1.75 to 0.1.86 at least) never gives back four
objects of what it returns, and orbax calls it for each array of each save: 0.2 kB, 140
kB a save of the 121's 600 arrays. A spec's `repr` has the same values, and keeps
nothing.

>>> import tensorstore
>>> patch_to_json()
>>> tensorstore.KvStore.Spec({'driver': 'file', 'path': '/run/'}).to_json()
{'driver': 'file', 'path': '/run/'}
"""

import ast
import contextlib
import functools

import tensorstore


@functools.cache
def patch_to_json():
    """Replaces that method for the program's whole life; once is enough."""
    spec = tensorstore.KvStore.Spec
    original = spec.to_json

    def to_json(self, include_defaults=False):
        """The spec as JSON's dicts, lists and values."""
        text = repr(self).removeprefix('KvStore.Spec')
        # It writes letters beyond ASCII, and quotes in quotes, in a way of its own.
        if not include_defaults and '\\' not in text:
            with contextlib.suppress(ValueError, SyntaxError):  # no longer Python's way
                return ast.literal_eval(text)
        return original(self, include_defaults)

    spec.to_json = to_json
