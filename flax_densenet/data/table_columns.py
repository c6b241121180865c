"""Finds the columns of a table with the image, its part and its group."""

from collections.abc import Iterable

from flax_densenet.data import cells as cells_lib
from flax_densenet.errors import UserError

_words = str.split
_NAME_COLUMNS = ('image', 'image index', 'filename', 'file', 'path', 'image_id', 'name')
_NAME_KEYS = _words(
    'imageindex imagename imagepath imagefile imagefilename imageid filename filepath '
    'file path image img imgname imgpath imgid imgfile idcode isicid dicomid photo '
    'picture uuid id name column1'
)
_GROUP_KEYS = _words(
    'patient patientid patientname patientno patientnumber subject subjectid '
    'participant participantid person personid individual individualid animal animalid '
    'mouse mouseid caseid donor donorid lesionid group groupid mrn pid patno '
    'patientkey patientmrn subjectno subjectnumber subjectname participantno '
    'volunteer volunteerid empianon anonpatientid writer writerid'
)


def is_group_key(key: str) -> bool:
    """Whether the name of a column, from `cells.key`, is that of patients."""
    return key in _GROUP_KEYS


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
          options: `data.groups`.
        """
        name = self._group_column(taken, options)
        if name is None:
            return None, None
        cells = self.columns[name]
        blank = [i for i, cell in enumerate(cells) if cells_lib.is_missing(cell)]
        own = {i: f'\0{i}' for i in blank}
        groups = cells_lib.hash_names([own.get(i, c) for i, c in enumerate(cells)])
        if len(set(groups.tolist())) == 1:
            if options.startswith('column:'):
                raise UserError(
                    f'data.groups={options}: all images are of one group, which '
                    'cannot be split; name another column or set data.groups=none'
                )
            self.notes.append(
                f'all images have the same {name}, so they are split image by image'
            )
            return name, None
        if blank:
            self.notes.append(
                f'{len(blank)} images have no {name} (line {self.lines[blank[0]]}); '
                'each counts as a separate group'
            )
        return name, groups

    def _group_column(self, taken, options):
        if options.startswith('column:'):
            name = options.removeprefix('column:')
            if name not in self.columns:
                raise UserError(
                    f'data.groups={options}: the table has no such column; it has '
                    f'{", ".join(self.columns)[:200]}'
                )
            return name
        if options != 'auto':
            return None
        return group_of([name for name in self.columns if name not in taken])

    def is_group(self, name):
        """Whether a column is one of patients by its name."""
        return self.keys[name] in _GROUP_KEYS


def is_group(name: str) -> bool:
    """Whether the name of a column or field is that of groups."""
    return cells_lib.key(name) in _GROUP_KEYS


def group_of(names: Iterable[str]) -> str | None:
    """The column with the owner of each image, such as `Patient ID`; None for none."""
    by_key = {cells_lib.key(name): name for name in reversed(list(names))}
    return next((by_key[key] for key in _GROUP_KEYS if key in by_key), None)
