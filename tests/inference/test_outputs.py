"""Predictions as rows, pictures and features, and what becomes of them on the way."""

import csv
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet.inference import feature_files, row_formats
from flax_densenet.inference import outputs as outputs_lib
from flax_densenet.inference.prediction import Prediction
from flax_densenet.system import logs
from flax_densenet.weights import conformal

ODD = ('new\nline.jpg', 'a "quote", \'s\'.jpg', 'bytes \udcff\udcc3.jpg', '写真.jpg')
NAMES = ('ants', 'bees', 'wasps')


def predicted(path, probabilities=(0.25, 0.7, 0.05), **fields):
    values = np.array(probabilities, np.float32)
    return Prediction(path, values, class_names=NAMES, **fields)


def written(form, found, top=2, names=NAMES, *, screen=True, **columns):
    out = io.StringIO()
    out.isatty = lambda: screen
    shown = row_formats.Columns(**columns)
    write = row_formats.FORMATS[form](out, names, top, columns=shown)
    for one in found:
        write(one)
    return out.getvalue()


def test_classes_above_their_thresholds():
    values = {'thresholds': (0.2, 0.9, None)}
    found = [
        predicted('x.jpg', **values),
        predicted('y.jpg', (0.1, 0.88, 0.02), **values),
        predicted('z.jpg', (0.05, 0.95, 0), **values),
        Prediction('bad.jpg', error='is odd'),
    ]
    assert [one.positive for one in found] == [('ants',), (), ('bees',), None]
    lines = written('csv', found, positive=True).splitlines()
    assert lines[0] == 'path,error,class1,probability1,class2,probability2,positive'
    assert [line.split(',')[-1] for line in lines[1:]] == ['ants', '', 'bees', '']
    lines = written('jsonl', found, positive=True).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row.get('positive') for row in rows] == [['ants'], [], ['bees'], None]
    lines = written('table', found, positive=True).splitlines()
    assert 'class (* positive)' in lines[0]
    assert 'bees ' in lines[1] and 'ants* 25.0%' in lines[1]
    assert '*' not in lines[2] and 'bees* ' in lines[3]


def test_csv_parses_back():
    found = [*map(predicted, ODD), Prediction('bad.jpg', error='is "not", an\nimage')]
    lines = list(csv.DictReader(io.StringIO(written('csv', found), newline='')))
    assert [line['path'] for line in lines] == [*ODD, 'bad.jpg']
    for line in lines[:-1]:
        assert [*line.values()][1:] == ['', 'bees', '0.7', 'ants', '0.25']
    assert [*lines[-1].values()][1:] == ['is "not", an\nimage', '', '', '', '']
    assert list(lines[0]) == (
        ['path', 'error', 'class1', 'probability1', 'class2', 'probability2']
    )


def test_json_parses_back():
    found = [*map(predicted, ODD), Prediction('bad.jpg', error='is\nbad')]
    text = written('jsonl', found, top=1)
    assert text.isascii()
    lines = [json.loads(line) for line in text.splitlines()]
    classes = [{'class': 'bees', 'probability': 0.7}]
    assert lines[:-1] == [{'path': path, 'classes': classes} for path in ODD]
    assert lines[-1] == {'path': 'bad.jpg', 'error': 'is\nbad'}


def test_values_are_not_called_probabilities():
    found = [predicted('x', (-3.25, 7.5, 0), is_probability=False)]

    def text(form):
        out = io.StringIO()
        row_formats.FORMATS[form](out, NAMES, 2, 'value')(found[0])
        return out.getvalue()

    head, first = text('table').splitlines()
    assert head.split() == ['path', 'class', 'value', 'next']
    assert first.split() == ['x', 'bees', '7.5', 'wasps', '0']
    assert text('csv').splitlines()[0] == 'path,error,class1,value1,class2,value2'
    assert json.loads(text('jsonl'))['classes'][0] == {'class': 'bees', 'value': 7.5}
    assert repr(found[0]) == "<'x': bees 7.5>"


def test_small_probabilities_stay_numbers():
    (line,) = written('jsonl', [predicted('x', (1.25e-9, 1, 1 / 3))], 3).splitlines()
    values = [row['probability'] for row in json.loads(line)['classes']]
    assert values == [1.0, 0.333333, 1.25e-9]


def columns(text):
    wide = {'写': 2, '真': 2}
    return sum(wide.get(c, 1) for c in text)


def test_the_table_is_aligned():
    found = [*map(predicted, ODD), predicted('/long' * 40 + '/end.jpg', (0, 0, 1))]
    found.append(Prediction('bad.jpg', error='is no image'))
    head, *lines = written('table', found).splitlines()
    assert head.split() == ['path', 'class', 'prob.', 'next']
    assert len(lines) == 5 + 1  # one for each image
    place, following = head.index('class'), head.index('next')
    for line in lines[:-1]:
        assert columns(line) <= 80
        wide = columns(line) - len(line)  # of its letters of two columns
        rest = line[place - wide :]
        assert re.match(r'(ants|bees|wasps) +\d+\.\d%  (ants|bees|wasps) ', rest)
    assert lines[0].split()[-4:] == ['bees', '70.0%', 'ants', '25.0%']
    assert lines[0][following:] == 'ants 25.0%'
    assert lines[0].startswith(r'new\nline.jpg ')
    assert lines[2].startswith(r'bytes \xff\xc3.jpg ')
    assert lines[4].startswith('…') and '/end.jpg  wasps' in lines[4]
    assert lines[-1][place:] == 'error: is no image'
    names = ('x' * 50, 'b', 'c')
    long = Prediction('p', np.array([1, 0, 0], 'f4'), class_names=names)
    head, line = written('table', [long], 1, names).splitlines()
    assert len(head) == len(line) == 80 and 'x' * 27 + '…  100.0%' in line


def test_a_table_for_a_file_or_a_pipe_is_not_cut():
    path = '/long' * 40 + '/end.jpg'
    names = ('x' * 50, 'y' * 40, 'z')
    long = Prediction(path, np.array([0.7, 0.3, 0], 'f4'), class_names=names)
    _, line = written('table', [long], 2, names, screen=False).splitlines()
    assert line.split() == [path, names[0], '70.0%', names[1], '30.0%']


@pytest.mark.parametrize('ending', feature_files.ENDINGS)
def test_features_read_back(tmp_path, ending):
    path = str(tmp_path / f'x{ending}')
    values = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    writer = feature_files.Writer(path)
    for name, row in zip(ODD, values, strict=True):
        writer.write(name, row)
    assert os.listdir(tmp_path) == []
    writer.finish(5)
    assert os.listdir(tmp_path) == [f'x{ending}']
    found, names = feature_files.read(path)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)
    assert names == list(ODD)
    empty = feature_files.Writer(path)  # replaces it
    empty.finish(5)
    found, names = feature_files.read(path)
    assert found.shape == (0, 5) and names == []


def test_features_without_this_program(tmp_path):
    """numpy alone reads the first, safetensors alone the second."""
    for ending in feature_files.ENDINGS:
        writer = feature_files.Writer(str(tmp_path / f'x{ending}'))
        for number in range(3000):  # more names than a block has
            writer.write(f'folder/{number}.jpg' * 3, np.full(2, number))
        writer.finish(2)
    with np.load(tmp_path / 'x.npz', allow_pickle=False) as found:
        assert found['paths'].tolist() == [f'folder/{n}.jpg' * 3 for n in range(3000)]
        assert found['features'][2999].tolist() == [2999, 2999]
    safetensors = pytest.importorskip('safetensors.numpy')
    found = safetensors.load_file(tmp_path / 'x.safetensors')
    assert found['features'].shape == (3000, 2)
    assert bytes(found['paths'][:14]) == b'folder/0.jpgfo'


class Model:
    """Instead of a `Predictor`: no network."""

    class_names = NAMES
    value_name = 'probability'
    feature_size = 2
    scores_unusual = False

    def __init__(self, stop=None):
        self.stop = stop

    def class_index(self, name):
        return NAMES.index(name)

    def stream(self, paths, *, threads, features, cams, cam_class, how):
        for path in paths:
            if path == 'stop':
                raise self.stop
            if path.startswith('bad'):
                yield Prediction(path, error='is bad')
                continue
            yield predicted(
                path,
                features=np.full(2, len(path), 'f4') if features else None,
                image=np.zeros((4, 4, 3), np.uint8) if cams else None,
                cam=np.ones((2, 2), 'f4') if cams else None,
                cam_class=max(cam_class, 0) if cams else None,
            )


class ModelWithSets(Model):
    """One that was trained with `train.unusual`, on 19 validation images."""

    scores_unusual = True

    def check_coverage(self, coverage):
        pass

    def stream(self, paths, **options):
        sets = conformal.ConformalSets((19,), np.float32([0.02] + [0.24] * 18))
        for place, path in enumerate(paths):
            if path == 'bad':
                yield Prediction(path, error='is bad')
                continue
            yield predicted(path, unusual=place - 0.5, sets=sets)


def run(paths, model=None, *, class_name=None, **places):
    with outputs_lib.Outputs(**places) as outputs:
        return outputs_lib.run(model or Model(), paths, outputs, class_name=class_name)


def test_all_outputs(tmp_path, capfd):
    paths = ['a/x.jpg', 'bad.jpg', 'b/x.jpg', '../../../x', ODD[0], ODD[2]]
    paths += ['/' + 'long' * 62 + '.jpg', 'p/..']
    places = {'out': 'rows.jsonl', 'features': 'f.npz', 'explain': 'new/pictures'}
    places = {name: str(tmp_path / place) for name, place in places.items()}
    logs.show_messages(to_errors=True)  # as the command does
    assert run(paths, **places, top=9) == 1
    out, err = capfd.readouterr()
    assert out == ''
    told = '1 of 8 files could not be read; features are of the others only'
    assert err == f'7 images: 7 bees\n{told}\n'
    lines = (tmp_path / 'rows.jsonl').read_text().splitlines()
    assert [json.loads(line)['path'] for line in lines] == paths
    assert len(json.loads(lines[0])['classes']) == 3  # of the 9, as many as there are
    good = [path for path in paths if path != 'bad.jpg']
    values, names = feature_files.read(places['features'])
    assert names == good and values[:, 0].tolist() == [len(path) for path in good]
    mark, *pictures = sorted(os.listdir(places['explain']))
    assert mark == '.flax_densenet'
    assert [name[:6] for name in pictures] == [
        f'00000{n}' for n in (1, 3, 4, 5, 6, 7, 8)
    ]
    assert pictures[:2] == ['000001_x.jpg', '000003_x.jpg']
    with Image.open(tmp_path / 'new/pictures' / pictures[0]) as image:
        assert (image.format, image.size) == ('JPEG', (224 * 2 + 6, 224 + 30))
    assert sorted(os.listdir(tmp_path)) == ['f.npz', 'new', 'rows.jsonl']


def test_unusual_images_and_sets(tmp_path, capfd):
    """In all forms; a table shows the score of those that are unusual."""
    paths, found = ['a', 'b', 'c', 'bad'], {}
    logs.show_messages(to_errors=True)
    for name in ('rows.csv', 'rows.jsonl', 'rows'):
        path = tmp_path / name
        run(paths, ModelWithSets(), out=str(path), top=1, coverage=0.9)
        found[name] = path.read_text().splitlines()
    err = capfd.readouterr().err
    assert err.count('1 of 3 images does not look like the training images') == 3
    assert found['rows.csv'] == [
        'path,error,class1,probability1,unusual,set',
        'a,,bees,0.7,-0.5,bees;ants',
        'b,,bees,0.7,0.5,bees;ants',
        'c,,bees,0.7,1.5,bees;ants',
        'bad,is bad,,,,',
    ]
    first, second, third, fourth = map(json.loads, found['rows.jsonl'])
    assert (first['unusual'], first['is_unusual']) == (-0.5, False)
    assert (third['unusual'], third['is_unusual']) == (1.5, True)
    assert second['set'] == ['bees', 'ants'] and 'set' not in fourth
    table = [re.split('  +', line) for line in found['rows']]
    assert table[0][1:] == ['class', 'prob.', 'unusual', 'also in the set of 0.9']
    assert table[1][1:] == ['bees', '70.0%', 'ants 25.0%']
    assert table[3][1:] == ['bees', '70.0%', '1.5', 'ants 25.0%']
    assert '  error: is bad' in found['rows'][4]


def test_a_coverage_without_sets():
    """Of a prediction, and of a command before anything is computed."""
    with pytest.raises(UserError, match='to add them, run calibrate'):
        predicted('a').classes(0.9)
    assert Prediction('a', error='is bad').classes(0.9) == []
    with pytest.raises(UserError, match='coverage=90 must be between 0 and 1'):
        outputs_lib.Outputs(coverage=90)


def test_standard_output(capfd):
    assert run(['x.jpg', ODD[2]], form='csv', top=1) == 0
    out, err = capfd.readouterr()
    assert err == ''
    assert out.startswith('path,error,class1,probability1\nx.jpg,,bees,0.7\nbytes ')


@pytest.mark.parametrize(
    ('out', 'start'), [('x.csv', 'path,err'), ('x.jsonl', '{"path'), ('x', 'path    ')]
)
def test_the_form_follows_the_name(tmp_path, out, start):
    run(['x.jpg'], out=str(tmp_path / out))
    assert (tmp_path / out).read_text().startswith(start)
    out = out.removesuffix('.jsonl')
    run(['x.jpg'], out=str(tmp_path / out), form='csv', top=9)
    head = (tmp_path / out).read_text().splitlines()[0]
    assert head.startswith('path,err') and head.endswith(',class3,probability3')


@pytest.mark.parametrize('stop', [KeyboardInterrupt(), UserError('no name')])
def test_what_is_done_stays(tmp_path, capfd, stop):
    """An output that is there is not touched by one that was not finished."""
    places = {'out': 'x.csv', 'features': 'f.npz', 'explain': 'pictures'}
    places = {name: str(tmp_path / place) for name, place in places.items()}
    (tmp_path / 'x.csv').write_text('before')
    with pytest.raises(type(stop)):
        run(['a.jpg', 'b.jpg', 'stop'], Model(stop), **places)
    assert (tmp_path / 'x.csv').read_text() == 'before'
    assert len((tmp_path / 'x.csv.part').read_text().splitlines()) == 3
    assert 'x.csv.part has the 2 rows so far' in capfd.readouterr().out
    assert len(list((tmp_path / 'pictures').glob('*.jpg'))) == 2
    assert not (tmp_path / 'f.npz').exists()


def test_stopped_behind_a_row(tmp_path, capfd, monkeypatch):
    """A row that is in the file and was not counted yet is taken out again."""
    make = row_formats.FORMATS['csv']

    def make_stopping(file, *options):
        write = make(file, *options)

        def write_row(found):
            write(found)
            if found.path == 'c.jpg':
                file.flush()
                raise KeyboardInterrupt

        return write_row

    monkeypatch.setitem(row_formats.FORMATS, 'csv', make_stopping)
    with pytest.raises(KeyboardInterrupt):
        run(['a.jpg', 'b.jpg', 'c.jpg'], out=str(tmp_path / 'x.csv'))
    assert len((tmp_path / 'x.csv.part').read_text().splitlines()) == 3
    assert 'x.csv.part has the 2 rows so far' in capfd.readouterr().out


def test_nothing_stays_of_nothing(tmp_path, capfd):
    def none():
        raise UserError('no name')
        yield

    places = {'out': 'x.csv', 'features': 'f.npz', 'explain': 'pictures'}
    with pytest.raises(UserError, match='no name'):
        run(none(), **{name: str(tmp_path / place) for name, place in places.items()})
    with pytest.raises(UserError, match='no name'):
        run(none())
    assert os.listdir(tmp_path) == []
    (tmp_path / 'mine').mkdir()
    with pytest.raises(UserError, match='no name'):
        run(none(), explain=str(tmp_path / 'mine'))
    assert os.listdir(tmp_path) == ['mine']  # the user's own
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize(
    ('places', 'message'),
    [
        ({'top': 0}, '--top=0 must be at least 1'),
        ({'form': 'torch'}, '--format=torch is not one of .* use table, csv, jsonl'),
        ({'out': 'none/x'}, r'--out=none/x cannot be written \(No such file'),
        ({'out': 'here'}, r'--out=here cannot be written \(Is a directory'),
        ({'features': 'x.npy'}, r'--features=x.npy: .* ends with .npz or .safetens'),
        ({'features': 'none/x.npz'}, r'--features=none/x.npz cannot be written'),
        ({'features': 'd.npz'}, r'--features=d.npz cannot be written \(.* a folder'),
        ({'explain': 'here'}, '--explain=here already has files'),
        ({'explain': 'here/file'}, r'--explain=here/file cannot be written \(File'),
        ({'out': 'x.npz', 'features': './x.npz'}, '--out and --features are both'),
        ({'out': '/dev/full'}, r'--out=/dev/full cannot be written \(No space'),
    ],
)
def test_mistakes(tmp_path, monkeypatch, places, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here' / 'file').touch()
    (tmp_path / 'd.npz').mkdir()
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match=message):
        run(['x.jpg'], **places)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_reader_that_goes_away(tmp_path):
    """It is told to the caller as it is, not as a place that cannot be written."""
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        run(['x.jpg'], out=f'/dev/fd/{writing}')
    os.close(writing)


@pytest.mark.parametrize(
    ('out', 'form', 'line'),
    [
        ('x.json', None, 'no format has the ending .json; use .csv, .jsonl or .txt'),
        ('x.tsv', None, 'or name one with --format=table, csv, jsonl'),
        (
            'y.csv',
            'jsonl',
            r'--format=jsonl: --out=.*y.csv ends with .csv; use another',
        ),
        ('y.jsonl', 'table', r'ending or --format=jsonl'),
    ],
)
def test_endings_that_do_not_fit(out, form, line, tmp_path):
    with pytest.raises(UserError, match=line):
        outputs_lib.Outputs(out=str(tmp_path / out), form=form)
    assert not list(tmp_path.iterdir())


def test_endings(tmp_path):
    """A table under other names; any name if the format is given."""
    for name, form, first in (
        ('rows.txt', None, 'x.jpg  '),
        ('rows.CSV', None, 'path,error,'),
        ('rows.json', 'jsonl', '{"path"'),
    ):
        run(['x.jpg'], out=str(tmp_path / name), form=form)
        assert first in (tmp_path / name).read_text()
