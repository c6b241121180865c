"""Data sets of the Hugging Face Hub, and folders of parquet files in their layout."""

import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import sys
from typing import Any

import numpy as np

from flax_densenet import errors
from flax_densenet.data import (
    arrow_reader,
    group_columns,
    group_names,
    label_options,
    notes,
    parts,
    path_groups,
    readers,
    subgroup_columns,
)
from flax_densenet.errors import UserError, list_first
from flax_densenet.system import atomic, hub
from flax_densenet.system import paths as paths_lib

_NAME = re.compile(r'[\w.-]+(/[\w.-]+)?')
# The library's error for a set with several configurations, or none of that name.
_CONFIGS = re.compile(r'(?:available configs|Available): \[(.*?)\]')
_SHARD = re.compile(r'(.+?)[-_.]\d+(?:-of-\d+)?(?:-[0-9a-f]+)?')


def find(
    name: str,
    *,
    table: label_options.Options | None = None,
    known_classes: Any = None,
    **_unused,
) -> readers.Listing:
    """Finds the images of a data set on the Hub; downloads it once.

    Args:
      name: `DATASET[:CONFIG[:SPLIT]]`, such as `cifar100`, `OWNER/NAME:CONFIG` or
        `OWNER/NAME::test`. No code of a data set is run.
      table: options; `columns` names the label and `groups` the groups.

    Raises:
      UserError: there is no such data set, or it does not have one image and one label.
    """
    field = f'data.source=hf:{name}'
    dataset, _, rest = name.partition(':')
    config, _, split = rest.partition(':')
    if os.path.isdir(dataset):
        raise UserError(
            f'{field}: {dataset} is a folder here; for its parquet files give '
            f'data.source=parquet:{dataset}'
        )
    if not _NAME.fullmatch(dataset):
        raise UserError(f'{field}: give hf:OWNER/NAME, or hf:OWNER/NAME:CONFIG')
    files = _load(field, dataset, config or None)
    return _listing(field, files, split, table, known_classes, _cache_folders())


def _load(field, dataset, config):
    """Files in Arrow's stream format for each split, from the `datasets` library."""
    with errors.extra('datasets', field):
        import datasets
    try:
        with hub.quiet(field), _bars_on_terminals(datasets):
            found = datasets.load_dataset(dataset, config)
    except Exception as error:
        line = _explain(field, dataset, error)
        if line is None:
            raise
        raise UserError(line) from error
    return {
        split: [file['filename'] for file in part.cache_files]
        for split, part in found.items()
    }


@contextlib.contextmanager
def _bars_on_terminals(datasets):
    """Keeps the library's progress bars out of files; it also draws them there."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if is_terminal or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _cache_folders():
    import datasets
    from huggingface_hub import constants

    folders = datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE
    return tuple(os.path.realpath(folder) for folder in folders)


def _explain(field, name, error):
    """The line for an error of the library; None for any other error."""
    import datasets

    text = ' '.join(str(error).split())[:300] or type(error).__name__
    page = f'{hub.endpoint()}/datasets/{name}'
    if 'scripts are no longer supported' in text:
        return (
            f'{field} is defined by a program, which is not run; if the Hub has a copy '
            f'in parquet, get it with `hf download --repo-type=dataset {name} '
            '--revision=refs/convert/parquet --local-dir=FOLDER`, and give '
            'data.source=parquet:FOLDER'
        )
    if found := _CONFIGS.search(text):
        configs = [f'hf:{name}:{c}' for c in re.findall("'(.*?)'", found[1])]
        return f'{field}: give one of {list_first(configs)}'
    if 'is a gated dataset' in text:
        return (
            f'{field} is gated: accept its terms at {page}, and log in with {hub.LOGIN}'
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f'{field}: there is no such data set at {hub.endpoint()}, or it is '
            f'private: log in with {hub.LOGIN}'
        )
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status in (401, 403):
        return f'{field}: {page} refuses it ({status}); log in with {hub.LOGIN}'
    lost = 'LocalEntryNotFoundError' in text or _is_of_connection(error)
    if hub.is_offline() or lost:
        why = f'{page} cannot be reached ({text})'
        if hub.is_offline():
            why = f'{hub.OFFLINE} forbids downloading it'
        return (
            f'{field} is not in the cache {datasets.config.HF_DATASETS_CACHE}, and '
            f'{why}; download it elsewhere with `hf download --repo-type=dataset '
            f'{name} --local-dir=FOLDER`, and give data.source=parquet:FOLDER'
        )
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        # The cause is in the error before it.
        text = ' '.join(str(error.__cause__ or error).split())[:300]
        return (
            f'{field}: its files cannot be read ({text}); try again, after removing '
            f'its folder in {datasets.config.HF_DATASETS_CACHE} if that does not help'
        )
    if isinstance(error, ValueError | OSError) or _is_of_library(error):
        return f'{field}: cannot be loaded ({text})'
    return None


def _is_of_library(error):
    return type(error).__module__.startswith(
        ('datasets', 'huggingface_hub', 'httpx', 'httpcore', 'requests')
    )


def _is_of_connection(error):
    """Whether an error, or its cause, means that a host did not respond."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or (
            _is_of_library(error)
            and type(error).__name__
            in ('ConnectError', 'ConnectTimeout', 'ReadTimeout', 'RemoteProtocolError')
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def find_parquet(
    name: str,
    *,
    table: label_options.Options | None = None,
    known_classes: Any = None,
    **_,
) -> readers.Listing:
    """Finds the images of a folder of parquet files.

    Their splits are recognized by file names (`train-00000-of-00002.parquet`) or
    folders. They are copied once into Arrow files, which allow random access.

    Args:
      name: the folder, or one file.

    Raises:
      UserError: there is no such folder, or its files do not have one image and one
        label.
    """
    field = f'data.source=parquet:{name}'
    root = pathlib.Path(paths_lib.resolve(name, 'data.source=parquet:'))
    found = [root] if root.is_file() else sorted(root.rglob('*.parquet'))
    if not found:
        raise UserError(f'{field}: there are no parquet files')
    splits = collections.defaultdict(list)
    for path in found:
        splits[_split_of(path, root)].append(path)
    table = table or label_options.Options()
    files = {
        split: [_to_arrow(field, of_split, table)] for split, of_split in splits.items()
    }
    return _listing(field, files, '', table, known_classes, ())


def _split_of(path, root):
    """The split of a file, from its name or a parent folder."""
    stem = path.stem
    if shard := _SHARD.fullmatch(stem):
        stem = shard[1]
    if parts.role(stem):
        return stem
    inside = path.relative_to(root).parts[:-1] if path != root else ()
    return next((part for part in reversed(inside) if parts.role(part)), 'train')


def _to_arrow(field, paths, table):
    """Writes the used columns of parquet files to a file in Arrow's stream format."""
    import pyarrow as pa
    from pyarrow import parquet

    key = hashlib.sha256(repr(table.columns).encode())
    for path in paths:
        about = path.stat()
        key.update(f'{path.resolve()}{about.st_size}{about.st_mtime_ns}'.encode())
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    place = os.path.join(base, 'flax_densenet', 'parquet', f'{key.hexdigest()}.arrow')
    try:
        schema = parquet.read_schema(paths[0])
        columns = _columns(field, schema, table)
        schemas = [parquet.read_schema(p) for p in paths] if columns.others else []
        shared = [n for n in columns.others if _is_in_all(n, schemas)]
        columns = dataclasses.replace(columns, others=tuple(shared))
        if more := '\0'.join([columns.group or ''] + shared).rstrip('\0'):
            place = place.replace('.arrow', f'-{_short_hash(more)}.arrow')
        if os.path.isfile(place):
            return place
        os.makedirs(os.path.dirname(place), exist_ok=True)
        used = pa.schema([schema.field(name) for name in columns.used], schema.metadata)
        notes.say(f'{field}: copied to {place} and read from there')
        with (
            atomic.replacing(place, 'wb') as file,
            pa.ipc.new_stream(file, used) as writer,
        ):
            for path in paths:
                with parquet.ParquetFile(path) as source:
                    for batch in source.iter_batches(256, columns=used.names):
                        writer.write_table(
                            pa.table(batch).select(used.names).cast(used)
                        )
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise UserError(
            f'{field}: the files of {paths[0].name} cannot be read together ({reason})'
        ) from error
    return place


def _columns(field, schema, table):
    return arrow_reader.find_columns(
        field, schema, table.columns, table.groups, table.subgroups
    )


def _is_in_all(name, schemas):
    """Whether all files have a column, of one type."""
    if any(name not in schema.names for schema in schemas):
        return False
    return len({schema.field(name).type for schema in schemas}) == 1


def _short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _listing(field, files, split, table, known_classes, folders):
    """The listing of splits, with their parts."""
    table = table or label_options.Options()
    if split:
        if split not in files:
            raise UserError(f'{field}: it has the splits {", ".join(files)}')
        files = {split: files[split]}
    roles = {name: parts.role(name) for name in files}
    train = [n for n, role in roles.items() if role == parts.TRAIN] or list(files)[:1]
    schema = _schema_of(files[train[0]][0])
    columns = _columns(field, schema, table)
    labeled_splits = [
        n for n in files if n not in train and _is_labeled(files[n], columns)
    ]
    # The first of each kind; val chooses if there is test as well.
    others = [
        [n for n in labeled_splits if roles[n] == role][:1]
        for role in (parts.VAL, parts.TEST)
    ]
    others = [name for found in others for name in found]
    used = train + others
    reader = _make_reader(field, [files[n] for n in used], used, columns, folders)
    starts = np.cumsum([0, *reader.counts])
    images = np.arange(starts[-1])
    if not columns.several:
        images = images[reader.labels != -1]
    if missing := starts[-1] - len(images):
        notes.say(f'{field}: {missing} images without a label are left out')
    _say_splits(field, train, others, [n for n in files if n not in used])
    if len(reader.class_names) < (1 if known_classes else 2):
        raise UserError(f'{field}: has {len(reader.class_names)} class; two are needed')
    ends = starts[len(train) :]
    of_train, *rest = np.split(images, np.searchsorted(images, ends[:-1]))
    groups, grouped_by = _find_groups(field, reader, table.groups)
    kinds = arrow_reader.class_names(schema, columns.others)
    line = subgroup_columns.add_of_columns(
        reader, table.subgroups, reader.others(kinds), field, reader.paths()
    )
    if line:
        notes.say(line)
    return readers.Listing(
        reader,
        list(reader.class_names),
        of_train,
        rest[-1] if rest else None,
        groups=groups,
        val=rest[0] if len(rest) == 2 else None,
        grouped_by=grouped_by,
    )


def _say_splits(field, train, others, aside):
    line = f'{field}: trains on {"+".join(train)}'
    if len(others) == 2:
        line += f', {others[0]} chooses the best epoch, tests once on {others[1]}'
    elif others:
        line += f', tests on {others[0]}'
    if aside:
        line += f'; not used: {list_first(aside)}'
        if not field.startswith('data.source=parquet'):
            line += f'; to measure on it: hf:DATASET:CONFIG:{aside[0]}'
    notes.say(line)


def _find_groups(field, reader, groups):
    """The group of each image, from a column or paths, and its origin for messages."""
    column = reader.columns.group
    if column is None:
        return path_groups.find(reader.paths(), groups, field)
    owners = reader.owners()
    if groups == 'auto' and (line := group_columns.describe_doubt(column, owners)):
        notes.say(f'{field}: {line}')
        return path_groups.find(reader.paths(), groups, field)
    numbers, lines = group_names.number(owners, f'the column {column}', column)
    if len(set(numbers.tolist())) > 1:
        for line in lines:
            notes.say(f'{field}: {line}')
        return numbers, f'the column {column}'
    if groups == 'auto':
        notes.say(f'{field}: all images have the same {column}, so it groups none')
        return path_groups.find(reader.paths(), groups, field)
    raise UserError(
        f'data.groups={groups}: all images are of one group, which cannot be split; '
        'name another column or set data.groups=none'
    )


def _make_reader(field, files, splits, columns, folders):
    try:
        return arrow_reader.ArrowReader(files, splits, columns, folders)
    except UserError as error:
        raise UserError(f'{field}: {error}') from error


def _schema_of(file):
    import pyarrow as pa

    with pa.memory_map(file) as source:
        return pa.ipc.open_stream(source).schema


def _is_labeled(files, columns):
    """Whether a split has the columns, and known labels: hidden ones are all -1."""
    names = _schema_of(files[0]).names
    if columns.image not in names or columns.label not in names:
        return False
    if columns.several:
        return True
    import pyarrow as pa

    for file in files:
        with pa.memory_map(file) as source:
            values = pa.ipc.open_stream(source).read_all().column(columns.label)
            if any(v not in (-1, None) for v in values.to_pylist()):
                return True
    return False
