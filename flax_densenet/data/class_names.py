"""The names of classes in the cells of a column: words, or numbers as written."""

import decimal
import re

from flax_densenet.data import cells as cells_lib
from flax_densenet.errors import UserError

# Whole numbers, also as pandas writes them beside missing cells: 1.0, or 1,0.
_WHOLE = re.compile(r'(-?[0-9]+)(?:\.0*|,00?)?')


def find(field: str, column: str, cells) -> tuple[list[str], list[str]]:
    """The name of each cell's class, and the sorted names.

    `1` and `1.0` are one class. Zeros at the beginning belong to the name: `001`. Cells
    that are not plain numbers, such as `1E2`, `1_0` and `1,000`, are kept as written.

    Args: field, column: of the table and the column, in messages.

    Raises:
      UserError: two cells are the same number in different spellings, or all cells are
        numbers and some have decimals.
    """
    different = set(cells)
    numbers = [cells_lib.number(cell) for cell in different]
    if None not in numbers:
        pairs = zip(different, numbers, strict=True)
        broken = sorted(cell for cell, n in pairs if n is not None and n != int(n))
        if broken:
            raise UserError(
                f'{field}: the column {column} holds numbers such as {broken[0]}, '
                'which are not classes'
            )
    whole = {cell: _WHOLE.fullmatch(cell) for cell in different}
    name_of = {cell: match[1] if match else cell for cell, match in whole.items()}
    names = sorted(set(name_of.values()))
    _check_numbers(field, column, [n for n in names if _WHOLE.fullmatch(n)])
    if all(whole.values()):
        names.sort(key=decimal.Decimal)  # of any length
    else:
        # Among words, `1.0` is a name as it is, unless `1` is there as well.
        taken = {cell for cell in different if name_of[cell] == cell}
        name_of = {c: n if n in taken else c for c, n in name_of.items()}
        names = sorted(set(name_of.values()))
    return [name_of[cell] for cell in cells], names


def _check_numbers(field, column, names):
    first: dict[decimal.Decimal, str] = {}
    for name in names:
        other = first.setdefault(decimal.Decimal(name), name)
        if other != name:
            raise UserError(
                f'{field}: {other!r} and {name!r} of the column {column} are the same '
                'number; write them alike'
            )
