"""Finds the rows of a table for training, validation and testing."""

import re
from collections import Counter

import numpy as np

from flax_densenet.data import cells as cells_lib
from flax_densenet.data import parts as parts_lib
from flax_densenet.errors import UserError

_words = str.split
_KEYS = _words(
    'split splits datasplit fold set subset dataset partition phase part usage stage '
    'splitname traintest trainvaltest'
)
# In these columns, numbers are parts or folds and never labels; a stage may be a label.
_NEVER_LABELS = _words(
    'split splits datasplit fold set subset dataset partition splitname traintest '
    'trainvaltest foldid kfold foldnumber foldindex'
)
# The same for columns with one of these words in their names: `outer_fold`.
_FOLD_WORDS = frozenset(_words('fold folds kfold cv'))
# With a cell of train, these columns may be a split; a column of classes may not.
_OFTEN_PARTS = _words('role cohort mode tvt purpose use assignment')
_MOST_NUMBERS = 20
_BINARY = {
    **dict.fromkeys(('istrain', 'istraining', 'intrain'), parts_lib.TRAIN),
    **dict.fromkeys(('isvalid', 'isval', 'isvalidation'), parts_lib.VAL),
    **dict.fromkeys(('istest', 'istesting', 'intest'), parts_lib.TEST),
}
_NUMBER_OF = {parts_lib.TRAIN: 0, parts_lib.VAL: 1, parts_lib.TEST: 2}
UNUSED = 3


def check(setting: str):
    """Raises `UserError` for an invalid value of `data.split`."""
    if setting in ('auto', 'none'):
        return
    if not setting.startswith('column:') or setting == 'column:':
        raise UserError(
            f'data.split={setting} is not known; use auto, none, column:NAME or '
            'column:NAME=TRAIN,VAL,TEST'
        )


def find(table, images: str, setting: str) -> tuple[set[str], np.ndarray | None]:
    """Finds the column of parts.

    Args:
      table: `table_columns.Columns`.
      images: the column of the images.
      setting: `data.split`.

    Returns:
      The columns that name parts, and int64 `[N]` (see `label_table.Labels`), or
      None.
    """
    if setting == 'none':
        return set(), None
    if setting.startswith('column:'):
        return _find_named(table, setting)
    lower = {name.lower(): name for name in table.columns}
    if 'split' in lower:
        name = lower['split']
        roles = cells_lib.roles(table.columns[name])
        _check_roles(table, name, roles)
        return {name}, _number(table, name, roles)
    found = _find_by_words(table, images) or _find_one_hot(table, images)
    if not found:
        _say_unclear(table, images)
        return set(), None
    found.sort(key=lambda item: table.keys[item[0][0]] not in _KEYS)
    if len(found) > 1 and found[0][1] != found[1][1]:
        raise UserError(
            f'{table.field}: the columns {found[0][0][0]} and {found[1][0][0]} both '
            'name parts, and differ; choose one: data.split=column:NAME'
        )
    names, roles = found[0]
    several = len(names) > 1
    table.notes.append(
        f'the column{"s" * several} {" and ".join(names)} {"are" if several else "is"} '
        'taken as the split; data.split=none takes none'
    )
    return set(names), _number(table, ' and '.join(names), roles)


def describe_label(name: str) -> str:
    """A line about a label column that may name parts, such as `train`; else empty."""
    part = parts_lib.role(name)
    if part not in parts_lib.USED:
        return ''
    return (
        f'the column {name} is read as a label; if it tells the part, set '
        f'data.split=column:{name}={"1,0" if part == parts_lib.TRAIN else "0,1"}'
    )


def looks_like_parts(name: str, cells) -> bool:
    """Whether a column numbers or names parts or folds, so that it is not a label."""
    if _is_named_like_parts(name) and _are_few_numbers(cells):
        return True
    return len(_used_roles(cells)) > 1


def _is_named_like_parts(name):
    words = re.split(r'[\W\d_]+', name.lower())
    return cells_lib.key(name) in _NEVER_LABELS or bool(_FOLD_WORDS & set(words))


def _used_roles(cells):
    """The parts that cells name, unless they are too many different ones."""
    different = set(cells)
    if len(different) > _MOST_NUMBERS:
        return set()
    return set(cells_lib.roles(different)) & set(parts_lib.USED)


def _are_few_numbers(cells):
    different = {cell for cell in cells if not cells_lib.is_missing(cell)}
    if not 1 < len(different) <= _MOST_NUMBERS:
        return False
    numbers = [cells_lib.number(cell) for cell in different]
    return all(n is not None and n == int(n) for n in numbers)


def _check_roles(table, name, roles):
    if None not in roles:
        return
    row = roles.index(None)
    cells = table.columns[name]
    raise UserError(
        f'{table.field}: {name}={cells[row]} is not known (line {table.lines[row]}); '
        f'use train, val and test, or name them: {_example(name, cells)}, or set '
        'data.split=none'
    )


def _example(name, cells):
    """An example of naming the values, with those of the column if there are few."""
    values = sorted({_plain(cell): cell for cell in reversed(cells)}.values())
    values = [value for value in values if not cells_lib.is_missing(value)]
    by_part = [[v for v in values if parts_lib.role(v) == p] for p in parts_lib.USED]
    if _are_few_numbers(cells):
        plain = sorted(map(_plain, values), key=int)
        # Of many folds, one each to choose the epoch and to measure.
        last = plain[-2:] if len(plain) > 2 else plain[-1:]
        values = ['+'.join(plain[: -len(last)]), *last]
    elif by_part[0] and any(by_part[1:]):
        values = ['+'.join(same) for same in by_part if same]
    elif 2 <= len(values) <= 3:
        # Sorted as train, val and test, if their first letters are enough.
        values.sort(
            key=lambda value: (
                not value.lower().startswith('tr'),
                not value.lower().startswith(('v', 'd')),
            )
        )
    else:
        values = ['TRAIN', 'VAL', 'TEST']
    return f'data.split=column:{name}={",".join(values)}'


def _find_by_words(table, images):
    """`[((column,), role of each row)]` for the columns that name parts."""
    found = []
    for name in table.columns:
        if name == images or table.is_index(name):
            continue
        roles = cells_lib.roles(table.columns[name])
        all_parts = None not in roles and {parts_lib.TRAIN} < set(roles)
        if all_parts or _is_measured(table, name, roles):
            found.append(((name,), roles))
        elif (part := _BINARY.get(table.keys[name])) is not None:
            values, odd = cells_lib.yes_or_no(table.columns[name])
            if not odd and set(values) == {0.0, 1.0}:
                found.append(((name,), _binary_roles(part, values)))
        elif table.keys[name] in _KEYS and parts_lib.TRAIN in roles:
            _check_roles(table, name, roles)
            found.append(((name,), roles))
    return found


def _is_measured(table, name, roles):
    """Whether a table without training rows names the part to measure."""
    if table.options.for_training or table.keys[name] not in _KEYS:
        return False
    return None not in roles and bool({parts_lib.VAL, parts_lib.TEST} & set(roles))


def _binary_roles(part, values):
    if part == parts_lib.TRAIN:
        return [parts_lib.TRAIN if value else parts_lib.TEST for value in values]
    return [part if value else parts_lib.TRAIN for value in values]


def _find_one_hot(table, images):
    """The same for columns train, val and test, of which each row has one."""
    names, sides = [], []
    for name in table.columns:
        part = parts_lib.role(name) if name != images else None
        if part not in parts_lib.USED:
            continue
        values, odd = cells_lib.yes_or_no(table.columns[name])
        if odd or not set(values) <= {0.0, 1.0}:
            return []
        names.append(name)
        sides.append((part, values))
    if len(names) < 2 or len({part for part, _ in sides}) < len(names):
        return []
    if parts_lib.TRAIN not in {part for part, _ in sides}:
        return []
    rows = zip(*(values for _, values in sides), strict=True)
    chosen = [[i for i, value in enumerate(row) if value] for row in rows]
    if any(len(places) != 1 for places in chosen):
        return []
    return [(tuple(names), [sides[places[0]][0] for places in chosen])]


def at_random(options) -> str:
    """The end of a line: what is done if the data's own parts are not used."""
    return ', and a part is split off at random' if options.for_training else ''


def _say_unclear(table, images):
    instead = f'so the column is not used{at_random(table.options)}'
    for name, cells in table.columns.items():
        if name == images or table.is_index(name) or name in table.options.columns:
            continue
        values = sorted(set(cells))
        roles = _used_roles(cells)
        if len(roles) > 1 or (
            parts_lib.TRAIN in roles and table.keys[name] in _OFTEN_PARTS
        ):
            _say_looks_like_split(table, name, instead)
        elif _is_named_like_parts(name) and 2 <= len(values) <= _MOST_NUMBERS:
            table.notes.append(
                f'the values of the column {name} '
                f'({", ".join(values[:5])}{", ..." if len(values) > 5 else ""}) do not '
                f'identify the parts, {instead}; to use it, name its values for train, '
                f'val and test, such as {_example(name, cells)}'
            )


def _say_looks_like_split(table, name, instead):
    """The line about a column of parts, some cells of which are something else."""
    cells = table.columns[name]
    roles = cells_lib.roles(cells)
    why = 'no cell is of train'
    if None in roles:
        row = roles.index(None)
        what = repr(cells[row]) if cells[row] else 'an empty cell'
        why = f'{what} is not a part (line {table.lines[row]})'
    table.notes.append(
        f'the column {name} looks like a split, but {why}, {instead}; '
        f'{_example(name, cells)} uses it and leaves out rows with other values'
    )


def _find_named(table, setting):
    name, values = setting.removeprefix('column:'), None
    if name not in table.columns and '=' in name:
        name, _, values = name.rpartition('=')
    if name not in table.columns:
        raise UserError(
            f'data.split={setting}: the table has no such column; it has '
            f'{", ".join(table.columns)[:200]}'
        )
    cells = table.columns[name]
    if values is None:
        roles = cells_lib.roles(cells)
        _check_roles(table, name, roles)
    else:
        roles = _roles_of_values(setting, cells, values)
    return {name}, _number(table, name, roles)


def _roles_of_values(setting, cells, values):
    """Roles from the user's `TRAIN,VAL,TEST`: one value each, or several with `+`."""
    wanted = values.split(',')
    if not 2 <= len(wanted) <= 3:
        raise UserError(
            f'data.split={setting}: give the values of train and val, or of train, val '
            'and test, such as column:fold=0,1,2 or column:fold=0+1+2,3,4'
        )
    role_of = {}
    for part, text in zip(parts_lib.USED, wanted, strict=False):
        for value in text.split('+'):
            if role_of.setdefault(_plain(value), part) != part:
                raise UserError(f'data.split={setting}: {value} is given for two parts')
    present = {_plain(cell) for cell in cells}
    absent = [value for value in role_of if value and value not in present]
    if absent:
        raise UserError(
            f'data.split={setting}: no cell is {absent[0]}; the column holds '
            f'{", ".join(sorted(present))[:200]}'
        )
    return [role_of.get(_plain(cell), parts_lib.OTHER) for cell in cells]


def _plain(cell):
    """A cell as it is compared: 1.0 equals 1."""
    number = cells_lib.number(cell)
    if number is not None and number == int(number):
        return str(int(number))
    return cell.strip().lower()


def _number(table, name, roles):
    """The number of each row's part, with a line about the parts.

    Raises:
      UserError: no row is of train, or none is of any part if a model is measured.
    """
    counts = Counter(roles)
    used = [part for part in parts_lib.USED if counts[part]]
    if not used or (table.options.for_training and not counts[parts_lib.TRAIN]):
        remedy = 'set data.split=none to split the images at random'
        if len(used) > 1 and name in table.columns:
            remedy = f'use {_example(name, table.columns[name])}, or {remedy}'
        elif not table.options.for_training:
            remedy = 'set data.split=none to measure all'
        raise UserError(
            f'{table.field}: no row of its column {name} is of '
            f'{"train" if table.options.for_training else "train, val or test"}; '
            f'{remedy}'
        )
    table.notes.append(
        f'by its column {name}: {"; ".join(describe_counts(counts, table.options))}'
    )
    return number_roles(roles)


def number_roles(roles) -> np.ndarray:
    """int64 `[N]`: 0 for train, 1 and 2 for the others there are, or `UNUSED`."""
    number = dict(_NUMBER_OF)
    if parts_lib.VAL not in roles:
        number[parts_lib.TEST] = 1
    return np.array([number.get(role, UNUSED) for role in roles], np.int64)


def describe_counts(counts: Counter, options) -> list[str]:
    """Pieces of a line: the images of each part, and what the part is for."""
    used = [part for part in parts_lib.USED if counts[part]]
    first, *what = options.purposes(max(len(used), 2))
    if counts[parts_lib.TRAIN]:
        pieces = [f'{counts[parts_lib.TRAIN]} images{first or " of train"}']
    else:  # a table that is only measured
        pieces, used, what = [], ['', *used], [''] * len(used)
    for part, purpose in zip(used[1:], what, strict=False):
        images = '' if pieces else ' images'
        pieces.append(f'{counts[part]}{images} of {part}{purpose}')
    if len(pieces) == 1 and first:
        pieces.append('none of val or test, so a part of them is split off')
    if counts[parts_lib.OTHER]:
        pieces.append(f'{counts[parts_lib.OTHER]} of other parts, left out')
    return pieces
