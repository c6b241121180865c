"""Several labels an image: the table, the loss, the areas, a run."""

import csv
import pathlib
import time

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet import losses as losses_lib
from flax_densenet.data import dataset, label_table
from flax_densenet.evaluation import evaluate
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.train import fit
from flax_densenet.weights import trained
from helpers.runs import tiny_config, write_images


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_table(tmp_path):
    found = label_table.read(
        write(
            tmp_path / 't.csv',
            'note,Image,Patient ID,red,green\n'
            'x,a.png,7,1,0\ny,b.png,9,,1.0\nz,c.png,7,-1,nan\n',
        )
    )
    assert found.images == ['a.png', 'b.png', 'c.png']
    assert found.names == ('red', 'green')
    np.testing.assert_array_equal(found.values, [[1, 0], [np.nan, 1], [np.nan] * 2])
    assert found.groups[0] == found.groups[2] != found.groups[1]
    assert found.ignored == ('note',)


def test_lists_of_findings(tmp_path):
    text = (
        'Image Index,Finding Labels,Follow-up #,Patient ID,View Position\n'
        '1.png,Cardiomegaly|Effusion,0,1,PA\n2.png,No Finding,0,2,AP\n'
        '3.png,Effusion,0,1,PA\n'
    )
    found = label_table.read(write(tmp_path / 't.csv', text))
    assert found.names == ('Cardiomegaly', 'Effusion')
    assert found.values.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert found.groups[0] == found.groups[2] != found.groups[1]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'has no rows'),
        ('image,a\n', 'has no rows'),
        ('image,a\nx.png,2\n', 'no column holds only 0, 1 and empty cells'),
        ('image,a\nx.png,1\nx.png,0\n', 'the image x.png is there more than once'),
        ('image,a\nx.png,1,5\n', 'line 2 has 3 cells, the heading 2'),
        ('image,a,split\nx.png,1,maybe\n', 'split=maybe is not known'),
    ],
)
def test_bad_tables(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        label_table.read(write(tmp_path / 't.csv', text))
    with pytest.raises(UserError, match=r'none.csv cannot be read \(No such file'):
        label_table.read(str(tmp_path / 'none.csv'))


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'image,a\nx.png,1\n\xff.png,0\n', r'not text in UTF-8 \(byte 16\); save it'),
        ('image,a\nx.png,1\n'.encode('utf-16')[:-1], 'not text in UTF-8'),
        (b'PK\x03\x04' + bytes(50), 'is an Excel file or an archive; save the table'),
        (b'image,a\nx\0.png,1\n', 'line 2 holds a zero byte|line contains NUL'),
        (b'image,a\n' + b'x' * 200_000 + b',1\n', 'cannot be read .field larger than'),
        (b'image,a,b,a\nx.png,1,0,1\n', 'the column a occurs twice; rename one'),
        (b'image\nx.png\n', 'has one column; commas must separate the cells'),
        (b'image;a\nx.png\n', 'line 2 has 1 cells|has one column'),
        (b'image,a\n\n\nx.png,1\ny.png\n', 'line 5 has 1 cells, the heading 2'),
        (b'image,a\n"x\n.png",1\ny.png\n', 'line 4 has 1 cells, the heading 2'),
        (b'image,a\n"x.png,1\ny.png,1\n', 'has 1 cells'),
        (b'\x89PNG\r\n\x1a\n' + bytes(range(256)), 'not text in UTF-8 .byte 0'),
        (
            b'image,' + b'a,' * 300 + b'\nx' + b',7' * 300 + b',\n',
            'the column a occurs',
        ),
    ],
)
def test_hostile_tables(content, message, tmp_path):
    path = tmp_path / 't.csv'
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        label_table.read(str(path))
    assert '\n' not in str(raised.value) and len(str(raised.value)) < 400


def test_tables_as_programs_write_them(tmp_path):
    """A byte order mark, CRLF, quotes, spaces, empty lines, a comma at the end."""
    path = tmp_path / 't.csv'
    text = '\ufeffimage,ill,,\r\n"a, b.png", 1 ,,\r\n\r\n  c.png,0,,\r\n'
    path.write_bytes(text.encode())
    found = label_table.read(str(path))
    assert (found.images, found.names) == (['a, b.png', 'c.png'], ('ill',))
    assert found.values.tolist() == [[1], [0]]


@pytest.mark.slow
def test_an_image_twice_in_a_large_table(tmp_path):
    """Found at once, not by comparing each row with each."""
    rows = [f'{number}.png,1' for number in range(100_000)]
    path = tmp_path / 't.csv'
    path.write_text('\n'.join(['image,a', *rows, rows[-1]]))
    start = time.process_time()
    with pytest.raises(UserError, match='the image 99999.png is there more than once'):
        label_table.read(str(path))
    taken = time.process_time() - start
    start = time.process_time()
    assert len(list(csv.reader(path.read_text().splitlines()))) == 100_002
    reference = time.process_time() - start
    assert taken < 200 * reference, (taken, reference)


def test_losses_by_hand():
    logits = np.array([[2.0, -1.0, 5.0], [0.5, 0.5, 0.5]], np.float32)
    target = np.array([[1, 1, np.nan], [np.nan] * 3], np.float32)
    losses, correct = losses_lib.measure(logits, target)
    expected = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0))) / 2
    np.testing.assert_allclose(losses, [expected, 0], rtol=1e-6)
    np.testing.assert_allclose(correct, [0.5, 1.0])


def test_auroc_by_hand():
    """The share of pairs of one with and one without, in which the first is higher."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((40, 2))
    target = rng.integers(0, 2, (40, 2)).astype(np.float32)
    target[:10, 1] = np.nan
    target[:, 0] = np.where(np.arange(40) < 3, 1, target[:, 0])
    found = metrics_lib.auroc(scores, target)
    for score, label, area in zip(scores.T, target.T, found, strict=True):
        pairs = score[label == 1][:, None] > score[label == 0]
        assert area == pytest.approx(pairs.mean())
    alike = metrics_lib.auroc(scores, np.stack([target[:, 0], np.ones(40)], -1))
    assert alike == [pytest.approx(found[0]), None]
    assert metrics_lib.mean_auroc(alike) == found[0]
    assert metrics_lib.mean_auroc([None]) is None


@pytest.fixture
def table(tmp_path):
    """120 images of 40 patients; a label is a color that shines, some not known."""
    rng = np.random.default_rng(0)
    folder = tmp_path / 'scans' / 'part 1'
    folder.mkdir(parents=True)
    lines = ['image,patient,red,blue']
    for number in range(120):
        on = rng.integers(0, 2, 2)
        pixels = rng.integers(0, 60, (12, 12, 3), np.uint8)
        pixels[..., 0] += np.uint8(150 * on[0])
        pixels[..., 2] += np.uint8(150 * on[1])
        Image.fromarray(pixels).save(folder / f'{number}.png')
        red = '' if number % 5 == 0 else on[0]
        lines.append(f'{number}.png,p{number // 3},{red},{on[1]}')
    return write(tmp_path / 'labels.csv', '\n'.join(lines)), tmp_path / 'scans'


def load(table, **fields):
    path, folder = table
    return dataset.load_source(f'folder:{folder}', labels=path, image_size=8, **fields)


def test_patients_stay_together(table):
    source = load(table)
    assert source.multi_label and source.class_names == ('red', 'blue')
    assert (len(source.train), len(source.test)) == (96, 24)
    patients = [
        {
            int(part.name(i).split('/')[-1].removesuffix('.png')) // 3
            for i in range(len(part))
        }
        for part in (source.train, source.test)
    ]
    assert not patients[0] & patients[1]
    assert [len(p) for p in patients] == [32, 8]
    example = source.train[0]
    assert example['label'].dtype == np.float32 and example['label'].shape == (2,)


def test_a_split_of_patients_outlasts_one(table):
    def tested(source):
        return {source.test.name(i).split('/')[-1] for i in range(len(source.test))}

    before = tested(load(table))
    path, folder = table
    with open(path) as file:
        lines = [line for line in file if ',p0,' not in line]
    write(pathlib.Path(path), ''.join(lines))
    gone = {'0.png', '1.png', '2.png'}
    assert len(before - gone ^ tested(load(table))) <= 3


def test_images_that_are_not_there(table):
    path, folder = table
    (folder / 'part 1' / '7.png').unlink()
    with pytest.raises(UserError, match='1 of its 120 images are not in .* is 7.png'):
        load(table)
    source = load(table, bad_images='skip')
    assert source.skipped == ('7.png is missing',)
    assert len(source.train) + len(source.test) == 119
    (folder / 'part 2').mkdir()
    (folder / 'part 2' / '8.png').write_bytes((folder / 'part 1/8.png').read_bytes())
    with pytest.raises(UserError, match='8.png is in several folders; name it in'):
        load(table, bad_images='skip')
    with pytest.raises(UserError, match='needs data.source=folder:PATH'):
        dataset.load_source('digits', labels=path)


@pytest.mark.slow
def test_a_run(table, tmp_path, capsys):
    path, folder = table
    config = tiny_config(
        **{
            'data.source': f'folder:{folder}', 'data.labels': path,
            'data.batch_size': 32, 'train.epochs': 6, 'optimizer.learning_rate': 1e-2,
        }
    )  # fmt: skip
    best = fit.fit(config, str(tmp_path / 'run')).best
    out = capsys.readouterr().out
    assert f'data.labels={path}: 2 labels (red, blue) of 120 images' in out
    assert f'Test_auroc: {best["test_mean_auroc"]:.3f}, Lr' in out
    assert best['test_mean_auroc'] > 0.9
    assert set(best['test_auroc']) == {'red', 'blue'}
    loaded = trained.load_trained(str(tmp_path / 'run'))
    assert loaded.metadata['multi_label']
    source = load(table)
    options = dict(batch_size=8, mesh=loaded.mesh, mean=(0.485, 0.456, 0.406))
    metrics = evaluate.evaluate(
        loaded.module,
        loaded.variables,
        source.test,
        std=(0.229, 0.224, 0.225),
        **options,
    )
    assert metrics['mean_auroc'] == pytest.approx(best['test_mean_auroc'], abs=1e-9)
    assert metrics['loss'] == pytest.approx(best['test_loss'], rel=1e-5)


def test_labels_are_matched_by_name(table):
    source = load(table)
    names = ('green', 'blue', 'red')
    examples = evaluate.match_classes(source.train, source.class_names, names)
    label, matched = source.train[3]['label'], examples[3]['label']
    np.testing.assert_array_equal(matched, [np.nan, label[1], label[0]])
    assert examples.labels.shape == (len(source.train), 3)


def test_one_class_an_image_as_before(tmp_path):
    photos = write_images(tmp_path / 'photos', {'a': 5, 'b': 5})
    source = dataset.load_source(f'folder:{photos}', image_size=8)
    assert not source.multi_label and source.train[0]['label'].dtype == np.int32
