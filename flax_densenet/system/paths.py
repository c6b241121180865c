"""Paths as people write them: `~`, environment variables, `file://`, addresses.

Whatever takes a path from a flag, a field or a caller passes it through `resolve`, so
that the same spelling leads to the same place everywhere.
"""

import os
import re
import urllib.parse
import urllib.request

from flax_densenet.errors import UserError

# What stands before a path in `data.source`; the name of a TFDS set is no path.
SOURCE_KINDS = ('folder', 'tar', 'packed', 'parquet')
# One letter is a drive of Windows.
_URL = re.compile(r'([a-z][a-z0-9+.-]+)://', re.IGNORECASE)
# Programs that clean up paths make one slash of two.
_BUCKET = re.compile(r'(gs|s3|gcs|az|abfss?|hdfs|https?|ftp):/', re.IGNORECASE)
_VARIABLE = re.compile(r'\$(\w+|\{[^}]*\})')


def resolve(text: str | os.PathLike, field: str) -> str:
    """Resolves a path to a local path.

    An existing literal path is not expanded.

    Args:
      text: the path; may begin with `~`, `~name` or `file://` and contain `$NAME` or
        `${NAME}`.
      field: as the user knows it, with its equals sign: `--workdir=`.

    Raises:
      UserError: it is an address of a bucket or the web, or names a user or a variable
        that does not exist.

    >>> resolve('file:///data/my%20photos', '--files='), resolve('a/b', '--files=')
    ('/data/my photos', 'a/b')
    >>> resolve('gs://bucket/run', '--workdir=')
    Traceback (most recent call last):
    flax_densenet.errors.UserError: --workdir=gs://bucket/run: gs:// is not \
supported; use a local path, or mount the bucket as a folder
    """
    text = os.fspath(text)
    if not text or os.path.lexists(text):
        return text
    path = expand(text)
    if found := _URL.match(path) or _BUCKET.match(path):
        scheme = found[1].lower()
        remedy = 'use a local path, or mount the bucket as a folder'
        if scheme in ('http', 'https', 'ftp'):
            remedy = 'download it first and give the local path'
        if scheme == 'file':
            remedy = 'only files of this machine are read: file:///PATH'
        raise UserError(f'{field}{text}: {scheme}:// is not supported; {remedy}')
    if os.path.lexists(path):
        return path
    if path.startswith('~') and _is_home(text):
        user = re.split(r'[/\\]', path)[0]
        raise UserError(
            f'{field}{text}: no home folder is known for {user}; give the full path, '
            f'or ./{path} for a name with ~'
        )
    if found := _VARIABLE.search(path):
        raise UserError(
            f'{field}{text}: the environment has no variable {found[1].strip("{}")}; '
            'set it or give the full path'
        )
    return path


def expand(text: str) -> str:
    """`resolve` without errors: parts that cannot be expanded are kept."""
    if re.match('file:/', text, re.IGNORECASE):
        parts = urllib.parse.urlsplit(text)
        if parts.netloc.lower() in ('', 'localhost'):
            return urllib.request.url2pathname(parts.path)
        return text
    # First, since a variable may hold a path with ~.
    return os.path.expanduser(os.path.expandvars(text))


def _is_home(text):
    return text.startswith(('~', '$'))


def resolve_source(source: str, field: str = 'data.source=') -> str:
    """`data.source` with its path resolved: `folder:~/photos`.

    Raises:
      UserError: as `resolve`.
    """
    kind, colon, name = source.partition(':')
    if kind in SOURCE_KINDS and colon:
        return f'{kind}:{resolve(name, f"{field}{kind}:")}'
    return source


def real_source(source: str) -> str:
    """`data.source` with its real path, for comparisons.

    >>> real_source('folder:/data/../data/./photos/')
    'folder:/data/photos'
    >>> real_source('tfds:mnist')
    'tfds:mnist'
    """
    kind, colon, name = source.partition(':')
    if kind in SOURCE_KINDS and name:
        return f'{kind}:{os.path.realpath(expand(name))}'
    return source
