"""Which files names, folders, patterns and lists mean."""

import io
import itertools
import os

import pytest

from flax_densenet import UserError
from flax_densenet.inference import input_files
from flax_densenet.system import result_folders


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in (
        *('b.jpg', 'a.PNG', 'note.txt', '.hidden.jpg', 'z/1.jpg', 'z/deep/2.tiff'),
        *('c/3.webp', '.git/4.jpg', '__MACOSX/5.jpg', 'with[1].jpg', 'raw.data'),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*patterns, **options):
    input_files.check(patterns)
    return list(input_files.find(patterns, **options))


def test_a_folder(tree):
    names = ['a.PNG', 'b.jpg', 'c/3.webp', 'with[1].jpg', 'z/1.jpg', 'z/deep/2.tiff']
    assert found(str(tree)) == [f'{tree}/{name}' for name in names]
    assert found('.') == [f'./{name}' for name in names]
    assert found('z/') == ['z/1.jpg', 'z/deep/2.tiff']


def test_names(tree):
    """As they are, whatever they end with and whether they are there or not."""
    names = ['raw.data', 'none.jpg', 'with[1].jpg', '.hidden.jpg', 'b.jpg', 'b.jpg']
    assert found(*names) == names
    assert input_files.count(names) == 6
    assert [input_files.count([name]) for name in ('z', '*.jpg', '-')] == [None] * 3


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [
        ('*', ['a.PNG', 'b.jpg', 'with[1].jpg']),
        ('*/*.jpg', ['z/1.jpg']),
        ('**/*.jpg', ['b.jpg', 'with[1].jpg', 'z/1.jpg']),
        ('z/**', ['z/1.jpg', 'z/deep/2.tiff']),
        ('?/**/[12].*', ['z/1.jpg', 'z/deep/2.tiff']),
        ('**/deep/**/*', ['z/deep/2.tiff']),
        ('.git/*.jpg', ['.git/4.jpg']),
        ('__MAC*/*', None),
        ('*.gif', None),
    ],
)
def test_patterns(tree, pattern, names):
    if names is None:
        with pytest.raises(UserError, match='matches no image; looked for names end'):
            input_files.check([pattern])
        return
    assert found(pattern) == names
    assert found(f'{tree}/{pattern}') == [f'{tree}/{name}' for name in names]


def test_links(tree):
    """Links are followed, but not round in circles; a dead one is a file to report."""
    os.symlink('..', tree / 'z/up')
    os.symlink('../z', tree / 'c/other')
    os.symlink('nowhere', tree / 'c/dead.jpg')
    os.mkfifo(tree / 'c/pipe.jpg')
    expected = ['c/3.webp', 'c/dead.jpg', 'c/other/1.jpg', 'c/other/deep/2.tiff']
    below = [n for n in found('.') if n.startswith('./c')]
    # By the link's link back up there is one more way to `tree`, and no third.
    assert [n for n in below if '/up/' not in n] == [f'./{n}' for n in expected]
    assert len(found('**/*.jpg')) == len(set(found('**/*.jpg'))) < 20
    assert [n for n in found('c/**/*') if '/up/' not in n] == expected


def test_no_image(tree):
    (tree / 'empty').mkdir()
    with pytest.raises(UserError, match='--files=empty holds no image'):
        input_files.check(['b.jpg', 'empty'])
    with pytest.raises(UserError, match='--files= is empty'):
        input_files.check([''])
    with pytest.raises(UserError, match='given twice'):
        input_files.check(['-', '-'])


def test_a_folder_that_cannot_be_listed(tree, monkeypatch):
    """Given by name it is a mistake; met on the way it is a row like a bad file."""
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == 'deep':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refusing)
    assert found('z') == ['z/1.jpg', 'z/deep']
    assert found('z/**/*') == ['z/1.jpg']
    with pytest.raises(UserError, match=r'z/deep: the folder cannot be listed \(Perm'):
        input_files.check(['z/deep'])


def test_standard_input(tree, monkeypatch):
    def give(text):
        monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(text)))

    give(b'one.jpg\r\n\ntwo \xff.jpg\nlast')
    assert found('-', 'b.jpg') == ['one.jpg', 'two \udcff.jpg', 'last', 'b.jpg']
    give(b'\n\n')
    input_files.check(['-'])  # not read ahead of time
    with pytest.raises(UserError, match='no names on standard input'):
        list(input_files.find(['-']))


def test_results_are_left_out(tree):
    for pattern in ('.', '**/*'):
        names = found(pattern, leave_out=str(tree / 'z/../z'))
        assert 'z/' not in ' '.join(names) and len(names) == 4


@pytest.mark.parametrize('pattern', ['.', '**/*'])
def test_results_of_another_time_are_left_out(tree, pattern, capsys):
    result_folders.mark(str(tree / 'z'))
    names = found(pattern)
    assert 'z/' not in ' '.join(names) and len(names) == 4
    if pattern == '.':
        assert 'left out ./z, with results of this program' in capsys.readouterr().out
    assert 'z/1.jpg' in found('z')  # asked for by name


@pytest.mark.parametrize(('pattern', 'tenth'), [('.', 6), ('**/*.jpg', 7)])
def test_no_more_is_listed_than_is_needed(tree, pattern, tenth, monkeypatch):
    """A tree of any size takes no more memory than one of its folders."""
    for number in range(50):
        (tree / f'folder{number:02}').mkdir()
        (tree / f'folder{number:02}' / 'x.jpg').touch()
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(
        os, 'scandir', lambda path: listed.append(path) or scandir(path)
    )
    names = list(itertools.islice(input_files.find([pattern]), 10))
    assert os.path.normpath(names[-1]) == f'folder{tenth:02}/x.jpg'
    assert len(listed) < 30


@pytest.mark.parametrize('pattern', ['z', 'z/*', 'z/**/*'])
def test_files_passed_over_are_counted(tree, pattern, capsys):
    for number in range(3):
        (tree / 'z' / f'{number}.psd').write_bytes(b'x')
    assert 'z/1.jpg' in found(pattern)
    said = capsys.readouterr()
    assert f'--files={pattern}: skipped 3 .psd' in said.out and not said.err
