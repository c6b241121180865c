"""Images and labels in Arrow tables, as the `datasets` library writes them.

The columns are found by their features, which the schema's metadata describe: one
`Image`, and one `ClassLabel` or list of `ClassLabel`.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_densenet.data import group_columns, notes, readers, subgroup_columns
from flax_densenet.errors import UserError, list_first

_MOST_WORDS = 1000  # kinds of text in a column that may divide the images
_LABEL_NAMES = ('label', 'labels', 'class', 'target')


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that are used.

    Attributes:
      image, label: names of these columns.
      names: names of the classes; None to use the sorted values.
      several: whether an image can have several labels.
      group: the column with the group of each image, such as the patient, or None.
      others: columns of numbers and words that may divide the images.
    """

    image: str
    label: str
    names: tuple[str, ...] | None
    several: bool
    group: str | None = None
    others: tuple[str, ...] = ()

    @property
    def used(self) -> list[str]:
        """The names of all these columns."""
        group = [self.group] if self.group else []
        return [self.image, self.label, *group, *self.others]


def find_columns(
    field: str,
    schema: Any,
    chosen: tuple[str, ...],
    groups: str = 'none',
    subgroups: str = 'none',
) -> Columns:
    """Finds the columns of a table with the image, the label and the group.

    Args:
      field: name of the source in messages.
      schema: the Arrow schema.
      chosen: `data.label_columns`.
      groups: `data.groups`.
      subgroups: `data.subgroups`.

    Raises: UserError: there is no image column, or not exactly one label column.
    """
    features = _features(schema)
    images = [n for n, f in features.items() if _kind(f) == 'Image']
    if not images:  # files of another program
        images = [n for n in schema.names if _holds_images(schema.field(n).type)]
    if len(images) != 1:
        raise UserError(
            f'{field}: has {len(images)} image columns ({list_first(schema.names)}); '
            'only data sets with one can be used'
        )
    labels = {n: _class_names(f) for n, f in features.items() if _class_names(f)}
    if chosen:
        if len(chosen) != 1 or chosen[0] not in schema.names:
            raise UserError(
                f'data.label_columns={chosen}: {field} has the columns '
                f'{list_first(schema.names)}; name one of them'
            )
        label = chosen[0]
    elif labels:
        label = _only(field, list(labels))
    else:
        plain = [n for n in schema.names if n != images[0] and n in _LABEL_NAMES]
        if not plain:
            raise UserError(
                f'{field}: has no class labels ({list_first(schema.names)}); '
                'name their column with data.label_columns="(\'NAME\',)"'
            )
        label = _only(field, plain)
        notes.say(
            f'{field}: its column {label} has no class names, so the classes are its '
            'values'
        )
    several = _is_list(schema.field(label).type)
    group = _find_group(field, schema.names, {images[0], label}, groups)
    taken = images[0], label, group
    plain = [n for n in schema.names if n not in taken and _is_plain(schema, n)]
    others = tuple(subgroup_columns.candidates(plain, subgroups))
    return Columns(images[0], label, labels.get(label), several, group, others)


def _is_plain(schema, name):
    """Whether a column holds numbers or words."""
    import pyarrow as pa

    kind = schema.field(name).type
    tests = 'is_string', 'is_large_string', 'is_integer', 'is_floating', 'is_boolean'
    return any(getattr(pa.types, test)(kind) for test in tests)


def _find_group(field, names, taken, groups):
    """The column of groups, or None."""
    if groups.startswith('column:'):
        name = groups.removeprefix('column:')
        if name not in names:
            raise UserError(
                f'data.groups={groups}: {field} has the columns {list_first(names)}; '
                'name one of them'
            )
        return name
    if groups != 'auto':
        return None
    return group_columns.group_of([name for name in names if name not in taken])


def _only(field, names):
    if len(names) > 1:
        raise UserError(
            f'{field}: has {len(names)} columns of labels ({", ".join(names)}); choose '
            f'one with data.label_columns="(\'{names[0]}\',)"'
        )
    return names[0]


def _features(schema):
    """The features that the `datasets` library stored for each column."""
    try:
        about = json.loads((schema.metadata or {})[b'huggingface'])
        found = about['info']['features']
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(feature):
    return feature.get('_type') if isinstance(feature, dict) else None


def _class_names(feature):
    """The class names of a `ClassLabel` or a list of them, else None."""
    if _kind(feature) in ('Sequence', 'List', 'LargeList'):
        feature = feature.get('feature')
    elif isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    names = feature.get('names') if _kind(feature) == 'ClassLabel' else None
    if isinstance(names, list) and names and all(isinstance(n, str) for n in names):
        return tuple(names)
    return None


def _holds_images(kind):
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index('bytes') >= 0 and kind.get_field_index('path') >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind):
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


@dataclasses.dataclass
class ArrowReader(readers.Reader):
    """Images in files of Arrow's stream format, which are mapped into memory.

    Attributes:
      Attributes: files: the files of each split.
      splits: names of the splits.
      columns: the columns with the images and the labels.
      folders: folders that images may be files in; others are refused.
    """

    files: list[list[str]]
    splits: list[str]
    columns: Columns
    folders: tuple[str, ...] = ()
    labels: np.ndarray = dataclasses.field(init=False)
    class_names: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self):
        values = [v for t in self._tables for v in t.column('label').to_pylist()]
        self.class_names, self.labels = _number(values, self.columns)

    def owners(self) -> list[str] | None:
        """The group of each image, '' if unknown; None if there is no such column."""
        if self.columns.group is None:
            return None
        found = [v for t in self._tables for v in t.column('group').to_pylist()]
        return ['' if v is None else str(v) for v in found]

    def others(self, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The cells of the columns that may divide the images.

        Texts of very many kinds are left out.

        Args:
          names: of the values of columns of classes, which are numbers.
        """
        import pyarrow as pa

        found = {}
        for name in self.columns.others:
            parts = [table.column(f'other {name}') for table in self._tables]
            kinds = {part.type for part in parts if not pa.types.is_null(part.type)}
            if any(pa.types.is_string(k) or pa.types.is_large_string(k) for k in kinds):
                kind_counts = [part.combine_chunks().unique() for part in parts]
                if max(map(len, kind_counts)) > _MOST_WORDS:
                    continue
            values = [value for part in parts for value in part.to_pylist()]
            if known := names.get(name):
                values = [
                    known[v] if v is not None and 0 <= v < len(known) else None
                    for v in values
                ]
            found[name] = list(map(subgroup_columns.to_cell, values))
        return found

    def paths(self) -> list[str]:
        """The path of each image in the data set; empty if it has none."""
        found = [v for t in self._tables for v in t.column('path').to_pylist()]
        return [path or '' for path in found]

    def __getstate__(self):
        """Other processes map the files themselves."""
        return {k: v for k, v in vars(self).items() if not k.startswith('_')}

    @functools.cached_property
    def _tables(self):
        return [_open(files, self.columns) for files in self.files]

    @property
    def counts(self) -> list[int]:
        """The number of images in each split."""
        return [len(table) for table in self._tables]

    def _place(self, index):
        for split, table in zip(self.splits, self._tables, strict=True):
            if index < len(table):
                return split, table, index
            index -= len(table)
        raise IndexError(index)

    def __getitem__(self, index):
        _, table, row = self._place(int(index))
        content = table.column('bytes')[row].as_py()
        if content is not None:
            return content
        path = table.column('path')[row].as_py() or ''
        real = os.path.realpath(path)
        if any(real.startswith(os.path.join(f, '')) for f in self.folders):
            return real
        raise UserError(
            'has no bytes, and its path is not below the folder of the data set'
        )

    def keys(self, indices):
        places = (self._place(int(index)) for index in indices)
        return [f'{split}[{row}]'.encode() for split, _, row in places]

    def name(self, index):
        split, table, row = self._place(int(index))
        path = table.column('path')[row].as_py()
        return f'{split}[{row}]' + (f' ({os.path.basename(path)})' if path else '')


def _open(files, columns):
    """One table of `bytes`, `path`, `label`, `group` if known, and `other NAME`."""
    import pyarrow as pa
    from pyarrow import compute

    tables = []
    for file in files:
        with pa.memory_map(file) as source:
            tables.append(
                pa.ipc.open_stream(source).read_all().replace_schema_metadata(None)
            )
    own = [n for n in columns.used if all(n in t.column_names for t in tables)]
    table = pa.concat_tables([one.select(own) for one in tables])
    images = table.column(columns.image)
    if pa.types.is_struct(images.type):
        content = compute.struct_field(images, 'bytes')
        path = compute.struct_field(images, 'path')
    else:
        content, path = images, pa.chunked_array([pa.nulls(len(table), pa.string())])
    found = {'bytes': content, 'path': path, 'label': table.column(columns.label)}
    if columns.group:
        found['group'] = table.column(columns.group)
    for name in columns.others:  # a split may lack some
        missing = pa.chunked_array([pa.nulls(len(table))])
        found[f'other {name}'] = table.column(name) if name in own else missing
    return pa.table(found)


def class_names(schema: Any, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What the numbers of columns of classes mean, by column."""
    features = _features(schema)
    found = {name: _class_names(features.get(name)) for name in names}
    return {name: known for name, known in found.items() if known}


def _number(values, columns):
    """The class names, and the labels as numbers: `[N]`, or `[N, L]` of 0 and 1."""
    names = columns.names
    if columns.several:
        if names is None:
            names = tuple(sorted({str(v) for row in values for v in row or ()}))
            values = [[names.index(str(v)) for v in row or ()] for row in values]
        labels = np.zeros((len(values), len(names)), np.float32)
        for row, numbers in enumerate(values):
            if numbers is None:
                labels[row] = np.nan
            for number in numbers or ():
                labels[row, _check(number, names)] = 1
        return names, labels
    if names is None:
        known = [v for v in values if v is not None]
        names = tuple(map(str, sorted(set(known))))
        values = [-1 if v is None else names.index(str(v)) for v in values]
    numbers = [-1 if v is None else v for v in values]
    return names, np.array(
        [n if n == -1 else _check(n, names) for n in numbers], np.int32
    )


def _check(number, names):
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise UserError(f'a label is {number!r}, but there are {len(names)} classes')
    return number
