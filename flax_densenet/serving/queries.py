"""The options of /predict, checked."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence

from starlette.exceptions import HTTPException

from flax_densenet.errors import UserError
from flax_densenet.inference import explain as explain_lib
from flax_densenet.inference import prediction
from flax_densenet.serving import batcher

OPTIONS = ('top', 'explain', 'class', 'method', 'coverage')
_PICTURES = {'': '', '0': '', '1': 'overlay', 'overlay': 'overlay', 'map': 'map'}


@dataclasses.dataclass(frozen=True)
class Query:
    """What a request asks for.

    Attributes:
      top: number of classes.
      picture: `overlay`, `map` or nothing.
      of: index of the class that the picture explains, `batcher.MOST_LIKELY`, or None.
      coverage: coverage of the set of classes; None without a set.
      how: the method of the map.
    """

    top: int
    picture: str
    of: int | None
    coverage: float | None = None
    how: explain_lib.Options = explain_lib.DEFAULT


def parse(
    query: Mapping[str, str],
    *,
    class_names: Sequence[str],
    methods: Mapping[str, explain_lib.Options],
    has_sets: bool,
) -> Query:
    """Reads and checks the options of a request.

    Args:
      class_names: of the model.
      methods: those that are served, by name, the default first.
      has_sets: whether the model has sets of classes.

    Raises:
      HTTPException: 400, with what is wrong.
    """
    for name in query:
        if name not in OPTIONS:
            raise HTTPException(
                400, f'{name[:80]}= is not known; there are {", ".join(OPTIONS)}'
            )
    top = query.get('top', '5')
    # A number of a thousand digits would also be slow to parse.
    if not re.fullmatch('[0-9]{1,6}', top) or int(top) < 1:
        raise HTTPException(400, f'top={top[:20]} must be an integer of at least 1')
    picture = _PICTURES.get(query.get('explain', ''))
    if picture is None:
        raise HTTPException(
            400, f'explain={query["explain"][:20]} must be 0, 1 (overlay) or map'
        )
    of = batcher.MOST_LIKELY if picture else None
    if 'class' in query:
        if not picture:
            raise HTTPException(
                400, 'class= names the class for a heat map, which needs explain=1'
            )
        if query['class'] not in class_names:
            raise HTTPException(400, _unknown_class(query['class'], class_names))
        of = class_names.index(query['class'])
    how = _parse_method(query, picture, methods)
    return Query(int(top), picture, of, _parse_coverage(query, has_sets), how)


def _parse_method(query, picture, methods):
    if 'method' not in query:
        return next(iter(methods.values()))
    if not picture:
        raise HTTPException(
            400, 'method= selects the method for a heat map, which needs explain=1'
        )
    try:
        found = explain_lib.make(query['method']).method
    except UserError as error:
        raise HTTPException(400, str(error)) from error
    if found not in methods:
        raise HTTPException(
            400,
            f'method={found} is not served here; use {", ".join(methods)}; '
            'the flag --explain_method of serve adds methods',
        )
    return methods[found]


def _parse_coverage(query, has_sets):
    if 'coverage' not in query:
        return None
    text = query['coverage']
    if not re.fullmatch(r'0?\.[0-9]{1,6}', text) or not float(text):
        raise HTTPException(
            400, f'coverage={text[:20]} must be between 0 and 1, such as 0.9'
        )
    if not has_sets:
        raise HTTPException(400, f'coverage={text}: {prediction.NO_SETS}')
    return float(text)


def _unknown_class(name, names):
    close = difflib.get_close_matches(name[:80], names, 1)
    hint = f'did you mean {close[0]}?' if close else 'GET /model lists the classes'
    return f'class={name[:80]} is not a class of the model; {hint}'
