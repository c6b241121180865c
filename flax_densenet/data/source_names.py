"""Names of data sources that can be shown to others."""

import os


def public_source(source: str | None) -> str | None:
    """A data source without the folders that it lies in, which are private.

    >>> public_source('folder:/home/somebody/photos/birds')
    'folder:birds'
    """
    if not source:
        return None
    kind, colon, path = source.partition(':')
    if kind not in ('folder', 'packed', 'tar') or not colon:
        return source
    return f'{kind}:{os.path.basename(os.path.normpath(path))}'
