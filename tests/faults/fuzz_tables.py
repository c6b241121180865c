"""Tables of labels with the images that they name, as training reads them."""

import os
import pathlib
import shutil
import tempfile
import zlib

import numpy as np
from PIL import Image

from faults import fuzz_bytes, fuzz_seeds
from flax_densenet.data import dataset

COUNT = 12
_NAMES = [f'{i:03}.png' for i in range(COUNT)]
_words = str.split


class Tables:
    """Tables of all kinds for a folder of images: `dataset.load_source`.

    Most are made of columns that people have, with odd cells among them; the others are
    bytes that were damaged.
    """

    name = 'input'
    tokens = (
        *bytes.split(
            b'image label split fold train val patient_id NA -1 1.0 yes 000 000.png'
        ),
        *(b',', b';', b'\t', b'|', b'"', b'\n', b'\r', b'\0', b'sep=;\n', b'#', b'{'),
        *(b'\xff\xfe', b'\xfe\xff', b'\xff\xfe\0\0', b'\xef\xbb\xbf', b"['a', 'b']"),
        *(b'9' * 400, b'1e400', b'\xd9\xa1', b'../000.png', b'/x/000.png'),
    )
    _images = (
        _NAMES,
        [name[:-4] for name in _NAMES],
        [str(i) for i in range(COUNT)],
        [f'{i}.0' for i in range(COUNT)],
        [f'x/{name}' for name in _NAMES],
        [name.upper() for name in _NAMES],
        [*_NAMES[:-1], _NAMES[0]],
    )
    # A name and the cells that it draws from.
    _columns = (
        *(('sick', '0 1'), ('mass', '0 1 -1'), ('edema', '1.0 0.0 NA')),
        *(('flag', 'yes no'), ('mark', 'x ,'), ('sign', '+ -'), ('all', '1')),
        *(('label', 'cat dog bird'), ('class', '0 1 2'), ('label', '0 1')),
        *(('dx', 'nv mel none'), ('label', 'Cat cat dog'), ('grade', '1 2 2.5')),
        *(('tags', 'a|b a b'), ('labels', 'a;b a b'), ('Finding Labels', 'a|b |')),
        *(('split', 'train val test'), ('Fold', '0 1 2'), ('set', 'TRAIN valid')),
        *(('is_train', '0 1'), ('train', '1'), ('test', '0'), ('split', '1 0')),
        *(('patient_id', 'p1 p2 p3 p4'), ('mrn', '1 2 ,'), ('subject', 'p')),
        *(('', '1 2 3'), ('sex', 'M F'), ('age', '30 41 55'), ('x', '1e9 nan inf')),
    )
    _odd = _words('? x 2 -1 NaN é 1,5 "" \'a\' 1e400 ١ \ufeff \u2028') + [
        '',
        ' ',
        'a b',
    ]
    _options = (
        *({}, {}, {}, {'label_kind': 'classes'}, {'label_kind': 'labels'}),
        *({'split': 'none'}, {'split': 'column:Fold=0,1,2'}, {'groups': 'none'}),
        *({'split': 'column:split'}, {'groups': 'column:mrn'}, {'groups': 'path:p(.)'}),
        *({'blank_labels': 'negative', 'uncertain_labels': 'negative'},),
        *({'label_columns': ('label',)}, {'label_columns': ('sick', 'mass')}),
        *({'bad_images': 'skip'}, {'known_classes': ('cat', 'dog')}),
    )

    def __init__(self):
        self.seeds = [*fuzz_seeds.TABLES]
        self._folder = None

    def make(self, rng) -> bytes:
        if rng.random() < 0.35:
            return fuzz_bytes.damage(rng, self.seeds, self.tokens)
        chosen = rng.sample(self._columns, rng.choice((1, 1, 2, 2, 3, 4)))
        images = rng.choice(self._images)
        columns = [(rng.choice(('image', 'id', 'Path', 'file', '')), images)]
        for name, cells in chosen:
            cells = cells.replace(',', ' ').split(' ')
            columns.append((name, [rng.choice(cells) for _ in range(COUNT)]))
        if rng.random() < 0.2:
            rng.shuffle(columns)
        separator = rng.choice((',', ',', ',', ';', '\t', ' '))
        rows = [[name for name, _ in columns]] if rng.random() < 0.9 else []
        rows += [list(row) for row in zip(*(c for _, c in columns), strict=True)]
        for _ in range(rng.choice((0, 0, 0, 1, 1, 3))):
            row = rng.choice(rows)
            row[rng.randrange(len(row))] = rng.choice(self._odd)
        text = '\n'.join(separator.join(row) for row in rows)
        if rng.random() < 0.1:
            text = rng.choice(('# a\n', 'sep=;\n', '\n', '\ufeff')) + text
        encoding = rng.choice(('utf-8',) * 8 + ('utf-16', 'utf-16-le', 'utf-32'))
        return text.encode(encoding)

    def run(self, raw, path):
        if self._folder is None:
            self._folder = self._make_images(os.path.dirname(path))
        pathlib.Path(path).write_bytes(raw)
        options = dict(self._options[zlib.crc32(raw) % len(self._options)])
        if raw in self.seeds:
            options = {}
        source = dataset.load_source(
            f'folder:{self._folder}',
            options.pop('known_classes', None),
            labels=path,
            image_size=4,
            duplicates='ignore',
            **options,
        )
        self._check(source)
        return source

    def _make_images(self, folder):
        folder = tempfile.mkdtemp(dir=folder)
        one = os.path.join(folder, _NAMES[0])
        Image.new('RGB', (4, 4)).save(one)
        for name in _NAMES[1:]:
            shutil.copy(one, os.path.join(folder, name))
        return folder

    def _check(self, source):
        """What is true of every source, however odd its table."""
        train, test = source.train.indices.tolist(), source.test.indices.tolist()
        names = [source.train.name(i) for i in range(len(train))]
        names += [source.test.name(i) for i in range(len(test))]
        assert len(set(names)) == len(names) <= COUNT, 'an image is there twice'
        assert source.class_names and all(source.class_names)
        assert len(set(source.class_names)) == len(source.class_names)
        for examples in source.train, source.test:
            labels = np.asarray(examples.labels)
            if source.multi_label:
                assert labels.shape[1:] == (len(source.class_names),)
                assert np.isin(labels[~np.isnan(labels)], (0, 1)).all()
            else:
                assert ((labels >= 0) & (labels < len(source.class_names))).all()
