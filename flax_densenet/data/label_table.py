"""Reads tables of labels or classes (CSV).

There is one row per image. A column names the image (`image`, `filename`, `Image
Index`, `id`, ...). The other columns can be

* a column for each of several labels, with 1 and 0 (also yes and no, TRUE and FALSE);
  empty cells, NA and -1 (uncertain) mean unknown, unless the options set another
  meaning, such as a target between 0 and 1 (see `soft_labels`);
* one column of names separated by bars, such as `Finding Labels` of the NIH chest
  X-rays, or by semicolons or commas;
* one column `label`, `class`, `diagnosis`, ... with the class of each image, by name or
  number.

Images of one patient (`Patient ID`, `subject_id`, `lesion_id`, ...) never go to both
sides of a split. A column of train, val and test defines the parts (see
`split_column`).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np

from flax_densenet.data import cells as cells_lib
from flax_densenet.data import (
    class_names,
    group_columns,
    label_lists,
    label_options,
    soft_labels,
    split_column,
    table_columns,
    table_text,
)
from flax_densenet.data import parts as parts_lib
from flax_densenet.errors import UserError
from flax_densenet.system import paths

_words = str.split
_CLASS_KEYS = _words(
    'label labels class classes classname classid category categoryname target '
    'diagnosis dx species breed level grade y kind type variety disease severity '
    'groundtruth gt labelname tag'
)
_ODD = 0.05  # share of invalid cells that count as mistakes in labels


@dataclasses.dataclass(frozen=True)
class Labels:
    """A table of labels.

    Attributes:
      images: N names of images.
      names: L names of labels, or the names of the classes.
      values: float32 `[N, L]` of 0, 1, NaN and soft targets, or int32 `[N]`, the
        classes.
      groups: int64 `[N]`, the group of each image, or None.
      grouped_by: origin of the groups, for messages.
      parts: int64 `[N]`, 0 for training, 1 for validation, 2 for testing, 3 for unused;
        or None.
      ignored: columns with none of these roles.
      notes: a line about each guess.
      others: cells of the ignored columns.
    """

    images: list[str]
    names: tuple[str, ...]
    values: np.ndarray
    groups: np.ndarray | None
    parts: np.ndarray | None
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()
    grouped_by: str = ''
    others: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def read(
    path: str,
    options: label_options.Options | None = None,
    is_image: Callable[[str], bool] | None = None,
) -> Labels:
    """Reads a CSV file.

    Args: is_image: function that tells whether there is an image with a name.

    Raises:
      UserError: the file cannot be read, names an image twice, or has no labels.
    """
    field = f'data.labels={path}'
    path = paths.resolve(path, 'data.labels=')
    table = table_text.read(path, field, is_image)
    return _Reading(field, table, options or label_options.Options(), is_image).take()


class _Reading(table_columns.Columns):
    """A table while the roles of its columns are determined."""

    def __init__(self, field, table, options, is_image):
        super().__init__(field, table, is_image)
        self.options = options
        self._why_not: dict[str, str] = {}

    def take(self) -> Labels:
        images = self.find_images()
        self._check_twice(images)
        split, parts = split_column.find(self, images, self.options.split)
        group, groups = self.find_group({images, *split}, self.options)
        others = {images, group, *split}
        left = [n for n in self.columns if n not in others and not self.is_index(n)]
        self.images = images
        used, names, values = self._find_labels(self._may_be_labels(left))
        ignored = [name for name in left if name not in used]
        self.notes += [self._why_not[n] for n in ignored if n in self._why_not]
        is_split = parts is None and self.options.for_training
        if is_split and groups is None and self.options.groups == 'auto':
            self.hint_at_groups(ignored, images)
        return Labels(
            images=list(self.columns[images]),
            names=tuple(names),
            values=values,
            groups=groups,
            parts=parts,
            ignored=tuple(ignored),
            others={name: self.columns[name] for name in ignored},
            notes=tuple(self.notes),
            grouped_by=f'the column {group}' if group else '',
        )

    def _check_twice(self, images):
        cells = self.columns[images]
        if '' in cells:
            raise UserError(
                f'{self.field}: line {self.lines[cells.index("")]}: the image cell is '
                'empty; name the image or remove the row'
            )
        twice = next((x for x, n in Counter(cells).items() if n > 1), None)
        if twice is None:
            return
        lines = [self.lines[i] for i, cell in enumerate(cells) if cell == twice][:2]
        raise UserError(
            f'{self.field}: the image {twice} is there more than once (lines '
            f'{lines[0]} and {lines[1]}); a table has one row for each image, with a '
            'column for each of several labels, or their names between bars in one'
        )

    def _may_be_labels(self, left):
        """Columns that do not hold numbers of folds or patients."""
        for name in filter(self.is_group, left):
            if line := group_columns.describe_label(name, self.columns[name]):
                self._why_not[name] = line
        return [
            name
            for name in left
            if not split_column.looks_like_parts(name, self.columns[name])
            and not self.is_group(name)
        ]

    def _find_labels(self, left):
        """The used columns, the names of labels or classes, and the values."""
        kind, chosen = self.options.kind, list(self.options.columns)
        absent = [name for name in chosen if name not in self.columns]
        if absent:
            raise UserError(
                f'data.label_columns: {self.field} has no column {absent[0]}; it has '
                f'{", ".join(self.columns)[:200]}'
            )
        among = chosen or left
        if kind != 'classes' and (found := self._find_list(among, bool(chosen))):
            return self._take_list(*found)
        binary, odd = self._find_binary(among)
        if kind == 'labels' or (chosen and len(chosen) > 1 and kind == 'auto'):
            self._check_odd(among if chosen else odd, odd)
            return self._take_binary(binary)
        classes = [n for n in among if chosen or self.keys[n] in _CLASS_KEYS]
        if kind == 'classes':
            if not classes and len(among) == 1:
                classes = among
            return self._take_classes(classes, binary, among)
        named = [name for name in classes if name not in binary and name not in odd]
        if not chosen:
            named = [name for name in named if not self._is_unique(name)]
        if binary and named:
            raise UserError(
                f'{self.field}: {named[0]} holds classes and {binary[0]} yes and no; '
                'set data.label_kind=classes or data.label_kind=labels'
            )
        self._check_odd(odd, odd)
        if binary:
            return self._take_binary(binary)
        if not named and len(among) == 1:
            named = among
        return self._take_classes(named, binary, among)

    def _is_unique(self, name):
        cells = self.columns[name]
        return len(cells) > 4 and len(set(cells)) == len(cells)

    def _find_list(self, among, chosen):
        """A column of lists and the separator of its names, or None."""
        for name in among:
            separator = label_lists.find(
                name,
                self.keys[name],
                self.columns[name],
                chosen=chosen,
                several=self.options.kind == 'labels',
            )
            if separator:
                return name, separator
        return None

    def _take_list(self, column, separator):
        cells = self.columns[column]
        names, values = label_lists.read(cells, separator)
        if not names:
            raise UserError(f'{self.field}: the column {column} names no label')
        self._check_spelling(column, names)
        self._say_counts(names, values)
        if line := label_lists.describe(column, separator):
            self.notes.append(line)
        if line := label_lists.describe_blank(column, cells, separator):
            self.notes.append(line)
        return {column}, names, values

    def _find_binary(self, among):
        """Columns of yes and no, and `{column: invalid cells}` of those nearly so."""
        binary, nearly = [], {}
        for name in among:
            cells = self.columns[name]
            values, odd = cells_lib.yes_or_no(cells)
            if not odd and not cells_lib.says_nothing(cells):
                binary.append(name)
                continue
            told = sum(v in (0.0, 1.0) for v in values)
            few = len(odd) <= max(1, _ODD * len(cells))
            if odd and few and told >= 4 * len(odd):
                nearly[name] = odd
            elif odd and told > len(odd):
                self._why_not[name] = (
                    f'the column {name} is not used: {len(odd)} of its cells are '
                    f'neither yes nor no, such as {cells[odd[0]]!r} in line '
                    f'{self.lines[odd[0]]}'
                )
        return binary, nearly

    def _check_odd(self, columns, odd):
        for name in columns:
            if name in odd:
                rows = odd[name]
            else:
                rows = cells_lib.yes_or_no(self.columns[name])[1]
            if rows:
                cell = self.columns[name][rows[0]]
                more = f' ({len(rows)} such cells)' if len(rows) > 1 else ''
                raise UserError(
                    f'{self.field}: line {self.lines[rows[0]]}, column {name}: '
                    f'{cell!r} is neither yes nor no{more}; write 1, 0 or nothing, or '
                    'name the columns of the labels as data.label_columns'
                )

    def _take_binary(self, names):
        if not names:
            raise self._no_labels()
        raw = [cells_lib.yes_or_no(self.columns[name])[0] for name in names]
        values = np.array(raw, np.float32).T
        blank, uncertain = np.isnan(values), values == -1
        meaning = dict(unknown=np.nan, negative=0.0, positive=1.0)
        values[blank] = meaning[self.options.blank]
        if self.options.uncertain == 'soft':
            self._soften(values, uncertain, names)
        else:
            values[uncertain] = meaning[self.options.uncertain]
        self._check_negatives(values, blank, uncertain)
        self._say_counts(names, values)
        for what, where, field, value, known in (
            (
                *('empty cells', blank, 'blank_labels', self.options.blank),
                label_options.MEANINGS,
            ),
            (
                *('cells of -1', uncertain, 'uncertain_labels', self.options.uncertain),
                label_options.OF_UNCERTAIN,
            ),
        ):
            if where.any():
                if value == 'soft':
                    value += ' ({:g} to {:g})'.format(*self.options.soft)
                self.notes.append(
                    f'{int(where.sum())} {what} are read as {value}; data.{field} is '
                    f'one of {", ".join(known)}'
                )
        self.notes += filter(None, map(split_column.describe_label, names))
        if len(names) == 1:
            self.notes.append(
                f'{names[0]} is read as one yes/no label (a sigmoid), not as two '
                'classes; data.label_kind=classes reads it as classes'
            )
        elif (np.nansum(values, -1) == 1).all() and not np.isnan(values).any():
            self.notes.append(
                'each image has exactly one of the labels; data.label_kind=classes '
                'reads them as classes'
            )
        return set(names), names, values

    def _soften(self, values, uncertain, names):
        images = self.columns[self.images]
        for row, place in np.argwhere(uncertain).tolist():
            values[row, place] = soft_labels.draw(
                images[row], names[place], self.options.soft
            )

    def _check_negatives(self, values, blank, uncertain):
        """Raises if every image has a label, but some may be meant to have none."""
        if not self.options.for_training or (values == 0).any():
            return
        for what, where, field in (
            ('no 0, but cells of -1', uncertain, 'uncertain_labels'),
            ('no 0, but empty cells', blank, 'blank_labels'),
        ):
            if where.any() and np.isnan(values[where]).any():
                raise UserError(
                    f'{self.field}: its labels have {what}, which are read as unknown, '
                    f'so no image is negative; if they mean no, set data.{field}='
                    'negative'
                )

    def _say_counts(self, names, values, most=20):
        """For each label, how many images have it, do not have it, or are unknown."""
        pieces, soft = [], soft_labels.are_soft(values).sum(0)
        for place, name in enumerate(names[:most]):
            column = values[:, place]
            yes, no = int((column == 1).sum()), int((column == 0).sum())
            unknown = len(column) - yes - no - int(soft[place])
            pieces.append(f'{name} {yes}/{no}/{unknown}')
            if soft.any():
                pieces[-1] += f'/{soft[place]}'
        more = ', ...' if len(names) > most else ''
        what = 'positive/negative/unknown' + '/soft' * bool(soft.any())
        self.notes.append(f'{what}: {", ".join(pieces)}{more}')
        same = [
            name
            for name, column in zip(names, values.T, strict=True)
            if not ((column == 1).any() and (column == 0).any())
        ]
        if same and self.options.for_training:
            self.notes.append(
                'labels without positive or without negative images cannot be learned: '
                f'{", ".join(same[:5])}{", ..." if len(same) > 5 else ""}'
            )

    def _take_classes(self, named, binary, among):
        if len(named) > 1:
            whole = [n for n in named if self.keys[n] in ('label', 'class', 'target')]
            if len(whole) != 1:
                raise UserError(
                    f'{self.field}: {" and ".join(named[:3])} may all be the class; '
                    'name one as data.label_columns'
                )
            named = whole
        if not named and len(binary) > 1:
            return self._take_one_hot(binary)
        if not named:
            named = binary
        if not named:
            raise self._no_labels()
        column = named[0]
        cells = self.columns[column]
        self._check_classes(column, cells)
        cells, names = self._class_names(column, cells)
        place = {name: index for index, name in enumerate(names)}
        values = np.array([place[cell] for cell in cells], np.int32)
        counts = np.bincount(values)
        pieces = [f'{n} {c}' for n, c in zip(names[:20], counts[:20], strict=True)]
        more = ', ...' if len(names) > 20 else ''
        self.notes.append(
            f'the column {column} is read as the class of each image: '
            f'{", ".join(pieces)}{more}; data.label_kind=labels reads several labels'
        )
        return {column}, names, values

    def _check_classes(self, column, cells):
        """Raises for a cell without a class; `none` is one if the user set classes."""
        are_words = self.options.kind == 'classes'
        for row, cell in enumerate(cells):
            if not cells_lib.is_missing(cell):
                continue
            may_be = cells_lib.may_be_class(cell)
            if may_be and are_words:
                continue
            remedy = 'fill it in or remove the row'
            if may_be:
                remedy += f'; data.label_kind=classes takes {cell!r} as a class'
            raise UserError(
                f'{self.field}: line {self.lines[row]}, column {column}: '
                f'{cell!r} is not a class; {remedy}'
            )
        if words := sorted({cell for cell in cells if cells_lib.is_missing(cell)}):
            self.notes.append(f'{", ".join(words)} is read as a class')

    def _class_names(self, column, cells):
        """Cells, with numbers without `.0`, and the sorted names."""
        cells, names = class_names.find(self.field, column, cells)
        self._check_spelling(column, names)
        named = self.keys[column] in _CLASS_KEYS or column in self.options.columns
        most = len(cells) - 1 if named else len(cells) / 2
        if not self.options.for_training:  # one class, or one image per class
            return cells, names
        if len(names) < 2 or (len(cells) > 4 and len(names) > most):
            raise UserError(
                f'{self.field}: the column {column} has {len(names)} different values '
                f'for {len(cells)} images: no column holds only 0, 1 and empty cells, '
                'or classes; name it as data.label_columns'
            )
        return cells, names

    def _check_spelling(self, column, names):
        similar = parts_lib.find_similar(names)
        if similar and len(similar[0]) == 1:  # in a set of characters
            self.notes.append(f'{similar[0]!r} and {similar[1]!r} are two classes')
        elif similar:
            raise UserError(
                f'{self.field}: {similar[0]!r} and {similar[1]!r} of the column '
                f'{column} differ only in case or blanks; write them alike'
            )

    def _take_one_hot(self, names):
        values = np.array([cells_lib.yes_or_no(self.columns[n])[0] for n in names]).T
        wrong = np.flatnonzero((values == 1).sum(-1) != 1)
        if len(wrong):
            raise UserError(
                f'{self.field}: line {self.lines[wrong[0]]} has not exactly one of the '
                'labels, so these are not classes; set data.label_kind=labels'
            )
        return set(names), names, np.argmax(values == 1, -1).astype(np.int32)

    def _no_labels(self):
        return UserError(
            f'{self.field}: no column holds only 0, 1 and empty cells, and none called '
            f'label or class the classes; it has {", ".join(self.columns)[:200]}; name '
            'the right one as data.label_columns'
        )
