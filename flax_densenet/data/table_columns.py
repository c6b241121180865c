"""Finds the columns of a table with the image, its part and its group."""

from flax_densenet.data import cells as cells_lib
from flax_densenet.data import group_columns, group_hints, group_names
from flax_densenet.errors import UserError

_words = str.split
_NAME_COLUMNS = ('image', 'image index', 'filename', 'file', 'path', 'image_id', 'name')
_NAME_KEYS = _words(
    'imageindex imagename imagepath imagefile imagefilename imageid filename filepath '
    'file path image img imgname imgpath imgid imgfile idcode isicid dicomid photo '
    'picture uuid id name column1'
)


class Columns:
    """A table's columns, and guesses about them.

    Attributes:
      field: name of the table in messages.
      columns: `{name: cells}`.
      lines: the line number of each row in the file.
      notes: a line about each guess.
      keys: the normalized names of the columns.
    """

    def __init__(self, field, table, is_image):
        self.field, self.is_image = field, is_image
        self.columns, self.lines = table.columns, table.lines
        self.notes = list(table.notes)
        self._freed: frozenset[str] = frozenset()
        self.keys = {name: cells_lib.key(name) for name in table.columns}

    def is_index(self, name):
        """A column without a name, such as row numbers of pandas and R."""
        return not name or name.lower().startswith('unnamed:')

    def find_images(self):
        lower = {name.lower(): name for name in self.columns}
        first = next(iter(self.columns))
        by_name = next((lower[n] for n in _NAME_COLUMNS if n in lower), None)
        chosen = by_name or first
        if self._count_images(chosen):
            return chosen
        best = max(self.columns, key=self._count_images)
        if self._count_images(best):
            self.notes.append(f'the images are those of the column {best!r}')
            return best
        if by_name:
            return by_name
        by_key = {key: name for name, key in reversed(self.keys.items())}
        named = next((by_key[key] for key in _NAME_KEYS if key in by_key), None)
        if named is None and self.is_index(first):
            named = next((n for n in self.columns if not self.is_index(n)), first)
        return named or first

    def _count_images(self, name, most=50):
        """How many of the first cells name an image."""
        if self.is_image is None:
            return 0
        return sum(map(self.is_image, set(self.columns[name][:most])))

    def find_group(self, taken, options):
        """The column of groups and their numbers, int64 `[N]`; None if there is none.

        Args:
          taken: columns with other roles.
          options: `label_options.Options`.
        """
        names = {*self.columns} - {*taken, *options.columns}
        chosen = group_columns.choose(
            {n: c for n, c in self.columns.items() if n in names and n},
            has_labels=bool(options.columns),
        )
        self._freed = chosen.freed
        name, is_named = chosen.name, options.groups.startswith('column:')
        if is_named:
            name = self._named_group(options.groups)
        elif options.groups == 'auto':
            self.notes += chosen.notes
        if name is None or not (is_named or options.groups == 'auto'):
            return None, None
        groups, notes = group_names.number(
            self.columns[name], f'the column {name}', name, self.lines
        )
        if len(set(groups.tolist())) == 1:
            if is_named:
                raise UserError(
                    f'data.groups={options.groups}: all images are of one group, which '
                    'cannot be split; name another column or set data.groups=none'
                )
            self.notes.append(
                f'all images have the same {name}, so they are split image by image'
            )
            return name, None
        self.notes += notes
        return name, groups

    def _named_group(self, setting):
        name = setting.removeprefix('column:')
        if name not in self.columns:
            raise UserError(
                f'data.groups={setting}: the table has no such column; it has '
                f'{", ".join(self.columns)[:200]}'
            )
        return name

    def is_group(self, name):
        """Whether a column is one of patients by its name and its values."""
        return group_columns.is_group(name) and name not in self._freed

    def hint_at_groups(self, unused, images):
        """A line about an unused column that may name patients, if no path does."""
        if cells_lib.owners(self.columns[images]) is None:
            self.notes += group_hints.find({n: self.columns[n] for n in unused})
