"""Which columns of a table name the image, its part and whose image it is."""

from collections import Counter

import numpy as np

from flax_densenet.data import cells as cells_lib
from flax_densenet.data import parts as parts_lib
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
    'mouse mouseid caseid donor donorid lesionid group groupid'
)
_SPLIT_KEYS = _words(
    'split splits datasplit fold set subset dataset partition phase part usage stage '
    'splitname traintest trainvaltest'
)
_BINARY_SPLITS = {
    **dict.fromkeys(('istrain', 'istraining', 'intrain'), parts_lib.TRAIN),
    **dict.fromkeys(('isvalid', 'isval', 'isvalidation'), parts_lib.VAL),
    **dict.fromkeys(('istest', 'istesting', 'intest'), parts_lib.TEST),
}
_NUMBER_OF = {parts_lib.TRAIN: 0, parts_lib.VAL: 1, parts_lib.TEST: 2}
_UNUSED = 3


class Columns:
    """A table's columns, and what was guessed about them.

    Attributes:
      field: how messages call the table.
      columns: `{name: cells}`.
      lines: the line of each row in the file.
      notes: what was guessed, a line each.
      keys: the columns' names as they are compared.
    """

    def __init__(self, field, table, is_image):
        self.field, self.is_image = field, is_image
        self.columns, self.lines = table.columns, table.lines
        self.notes = list(table.notes)
        self.keys = {name: cells_lib.key(name) for name in table.columns}

    def is_index(self, name):
        """A column without a name, as pandas and R write row numbers."""
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

    def find_split(self, images):
        """The column of parts and int64 `[N]` of them; None where there is none."""
        lower = {name.lower(): name for name in self.columns}
        if 'split' in lower:
            name = lower['split']
            roles = cells_lib.roles(self.columns[name])
            if None in roles:
                row = roles.index(None)
                raise UserError(
                    f'{self.field}: split={self.columns[name][row]} is not known '
                    f'(line {self.lines[row]}); use train, val and test'
                )
            return name, self._number_parts(name, roles)
        found = []
        for name in self.columns:
            if name == images or self.is_index(name):
                continue
            roles = cells_lib.roles(self.columns[name])
            if None not in roles and {parts_lib.TRAIN} < set(roles):
                found.append((name, roles))
            elif (part := _BINARY_SPLITS.get(self.keys[name])) is not None:
                values, odd = cells_lib.yes_or_no(self.columns[name])
                if not odd and set(values) == {0.0, 1.0}:
                    found.append((name, self._binary_roles(part, values)))
            elif self.keys[name] in _SPLIT_KEYS and parts_lib.TRAIN in roles:
                row = roles.index(None) if None in roles else None
                if row is not None:
                    raise UserError(
                        f'{self.field}: {name}={self.columns[name][row]} is not known '
                        f'(line {self.lines[row]}); use train, val and test, or rename '
                        'the column'
                    )
        if not found:
            return None, None
        found.sort(key=lambda item: self.keys[item[0]] not in _SPLIT_KEYS)
        if len(found) > 1 and found[0][1] != found[1][1]:
            raise UserError(
                f'{self.field}: the columns {found[0][0]} and {found[1][0]} both tell '
                'of parts, and differ; call the right one split'
            )
        name, roles = found[0]
        self.notes.append(
            f'the column {name} is taken as the split; rename it if it is none'
        )
        return name, self._number_parts(name, roles)

    def _binary_roles(self, part, values):
        if part == parts_lib.TRAIN:
            return [parts_lib.TRAIN if value else parts_lib.TEST for value in values]
        return [part if value else parts_lib.TRAIN for value in values]

    def _number_parts(self, name, roles):
        counts = Counter(roles)
        number = dict(_NUMBER_OF)
        if parts_lib.VAL not in counts:
            number[parts_lib.TEST] = 1
        pieces = [f'{counts[parts_lib.TRAIN]} images to train on']
        for part in (parts_lib.VAL, parts_lib.TEST):
            if counts[part]:
                what = 'which chooses the best epoch'
                if number[part] == 2:
                    what = 'which is set aside and not used'
                pieces.append(f'{counts[part]} of {part}, {what}')
        if counts[parts_lib.OTHER]:
            pieces.append(f'{counts[parts_lib.OTHER]} of other parts, left out')
        self.notes.append(f'by its column {name}: {"; ".join(pieces)}')
        return np.array([number.get(role, _UNUSED) for role in roles])

    def find_group(self, taken, options):
        if options.startswith('column:'):
            name = options.removeprefix('column:')
            if name not in self.columns:
                raise UserError(
                    f'data.groups={options}: the table has no such column; it has '
                    f'{", ".join(self.columns)[:200]}'
                )
        elif options == 'auto':
            by_key = {self.keys[n]: n for n in reversed(self.columns) if n not in taken}
            name = next((by_key[key] for key in _GROUP_KEYS if key in by_key), None)
        else:
            return None
        if name is None:
            return None
        count = len(set(self.columns[name]))
        self.notes.append(
            f'images of one {name} ({count} of them) stay on one side of the split; '
            'data.groups=none splits image by image'
        )
        return name
