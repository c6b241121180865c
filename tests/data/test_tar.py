"""Tar shards as webdataset writes them: the images that are in them, nothing else."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, images
from flax_densenet.data import tar as tar_lib
from flax_densenet.data.packed import plan as pack_plan
from flax_densenet.data.packed import writer as pack_writer
from helpers.runs import write_images


def write_tar(path, members):
    """`{name: bytes}` to a tar; a TarInfo in place of bytes goes in as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope='module')
def jpegs(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp('x'), {'ants': 6, 'bees': 6})
    return [path.read_bytes() for path in sorted(folder.rglob('*.jpg'))]


def samples(jpegs, labels, *, kind='cls', first=0):
    members = {}
    for index, (content, label) in enumerate(zip(jpegs, labels, strict=False)):
        key = f'{first + index:05}'
        if kind == 'json':
            members[f'{key}.json'] = json.dumps({'label': label, 'more': [1]}).encode()
        members[f'{key}.jpg'] = content
        if kind == 'cls':
            members[f'{key}.cls'] = f'{label}\n'.encode()
    return members


def load(path, **fields):
    return dataset.load_source(f'tar:{path}', **{'image_size': 16, **fields})


@pytest.mark.parametrize('kind', ['cls', 'json'])
@pytest.mark.parametrize('named', [False, True])
def test_images_and_labels(jpegs, kind, named, tmp_path):
    labels = [index // 3 for index in range(12)]
    said = [f'class {label}' for label in labels] if named else labels
    root = tmp_path / 'tars'
    write_tar(root / 'b-0001.tar', samples(jpegs[7:], said[7:], kind=kind, first=7))
    write_tar(root / 'b-0000.tar', samples(jpegs[:7], said[:7], kind=kind))
    reader, names, ends = tar_lib.load(str(root))
    assert ends == [12] and reader.labels.tolist() == labels
    assert names == ([f'class {n}' for n in range(4)] if named else list('0123'))
    assert [reader[index] for index in range(12)] == jpegs
    assert reader.name(8) == f'{root}/b-0001.tar/00008.jpg'
    (root / 'classes.txt').write_text('a\nb\nc\nd\n')
    assert tar_lib.load(str(root))[1] == (names if named else list('abcd'))
    # A source like any other, packed like any other.
    pack_writer.pack(f'tar:{root}', str(tmp_path / 'packed'))
    one = load(root, duplicates='ignore')
    other = dataset.load_source(f'packed:{tmp_path}/packed', image_size=16)
    assert one.class_names == other.class_names
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert mine.indices.tolist() == theirs.indices.tolist()
        for index in range(len(mine)):
            expected = images.load_image(
                jpegs[mine.indices[index]], one.train.preparation
            )
            for example in (mine[index], theirs[index]):
                np.testing.assert_array_equal(example['image'], expected)
                assert example['label'] == labels[mine.indices[index]]
            assert os.path.join(root, theirs.name(index)) == mine.name(index)


@pytest.mark.parametrize(
    'names',
    [
        ('train/1.tar', 'val/1.tar'),
        ('in-train-0.tar', 'in-validation-0.tar'),
        ('Training Set/1.tar', 'dev_set/1.tar'),
        ('x-TRAINING-0.tar', 'x-TestSet-0.tar'),
    ],
)
def test_parts(jpegs, names, tmp_path):
    write_tar(tmp_path / names[0], samples(jpegs, [0, 1] * 4))
    write_tar(tmp_path / names[1], samples(jpegs[8:], [1, 0, 1]))
    source = load(tmp_path)
    assert source.has_test
    assert source.train.labels.tolist() == [0, 1] * 4
    assert source.test.labels.tolist() == [1, 0, 1]
    made = pack_writer.pack(f'tar:{tmp_path}', str(tmp_path / 'packed'))
    assert (made.count('train'), made.count('test')) == (8, 3)


def test_three_parts(jpegs, tmp_path, capsys):
    for place in ('{}/1.tar', 'x-{}-0.tar'):
        root = tmp_path / place[0]
        write_tar(root / place.format('train'), samples(jpegs, [0, 1] * 4))
        write_tar(root / place.format('test'), samples(jpegs[8:], [1]))
        write_tar(root / place.format('val'), samples(jpegs[9:], [1, 0, 1]))
        source = load(root)
        assert source.val.labels.tolist() == [1, 0, 1]
        assert source.test.labels.tolist() == [1]
        assert '3 choose the best epoch (' in (out := capsys.readouterr().out)
        assert '1 are measured once, at the end (' in out


def test_parts_within_a_tar(jpegs, tmp_path, capsys):
    members = {}
    for name, chosen in (('test', [1]), ('train', [0, 1] * 2), ('val', [1, 0])):
        inside = samples(jpegs, chosen)
        members |= {f'set/{name}/{key}': value for key, value in inside.items()}
    write_tar(tmp_path / 'all.tar', members)
    source = load(tmp_path / 'all.tar')
    assert source.train.labels.tolist() == [0, 1, 0, 1]
    assert source.val.labels.tolist() == [1, 0] and source.has_test
    assert [source.val.name(i)[-13:] for i in (0, 1)] == [
        'val/00000.jpg',
        'val/00001.jpg',
    ]
    assert source.test.name(0).endswith('set/test/00000.jpg')
    assert '2 of val, which chooses the best epoch, 1 of test, which is measured' in (
        capsys.readouterr().out
    )


def test_groups_in_the_json(jpegs, tmp_path, capsys):
    """A field of patients is found; another one is named; names come after them."""
    members = {}
    for index, content in enumerate(jpegs):
        about = {'label': index % 2, 'patient_id': f'p{index // 3}', 'site': index // 6}
        members[f'{index:05}.jpg'] = content
        members[f'{index:05}.json'] = json.dumps(about).encode()
    write_tar(tmp_path / 'x.tar', members)
    source = load(tmp_path / 'x.tar', val_fraction=0.3)
    assert 'grouped by the field patient_id: 0 of 4 groups are in more than one' in (
        capsys.readouterr().out
    )
    inside = [set(part.groups) for part in source.parts.values()]
    assert [len(part) for part in inside] == [2, 1, 1]
    assert len(set.union(*inside)) == 4
    assert list(source.train.subgroups) == ['site']
    for part in source.parts.values():
        numbers = [int(part.name(n)[-9:-4]) // 6 for n in range(len(part))]
        assert part.subgroups['site'].tolist() == list(map(str, numbers))
    assert not load(tmp_path / 'x.tar', subgroups='none').test.subgroups
    with pytest.raises(UserError, match='no column age to divide .* patient_id, site'):
        load(tmp_path / 'x.tar', subgroups='age')
    source = load(tmp_path / 'x.tar', groups='column:site')
    assert len(source.test) == len(source.train) == 6
    assert load(tmp_path / 'x.tar', groups='none').train.groups is None
    with pytest.raises(UserError, match='without the field age in their JSON'):
        load(tmp_path / 'x.tar', groups='column:age')
    source = load(tmp_path / 'x.tar', groups=r'path:000(\d)')
    assert "grouped by '0' and the like" in capsys.readouterr().out
    assert len(source.train) + len(source.test) == 12


def test_nothing_is_written(jpegs, tmp_path):
    """Names that lead outside are names."""
    members = {}
    for index, key in enumerate(('../../out', '/etc/out', 'a/../../b', 'c')):
        members |= {f'{key}.jpg': jpegs[index], f'{key}.cls': b'%d' % (index % 2)}
    root = tmp_path / 'deep' / 'tars'
    write_tar(root / 'x.tar', members)
    make = tmp_path / 'packed'
    pack_writer.pack(
        f'tar:{root}', str(make), options=pack_plan.Options(shard_mib=0.001)
    )
    source = dataset.load_source(f'packed:{make}', image_size=8, test_fraction=0.5)
    assert len(source.train) + len(source.test) == 4
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file()}
    assert there - {'deep/tars/x.tar'} == {
        f'packed/{path.name}' for path in make.iterdir()
    }
    assert not os.path.exists('/etc/out.jpg')


def link(name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, '/etc/passwd'
    return member


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ({'a.jpg': b'x'}, 'a has no label; add a.cls or a.json'),
        ({'a.cls': b'1'}, r'a has 0 images \(cls\); each key needs one'),
        ({'a.jpg': b'x', 'a.png': b'x', 'a.cls': b'1'}, 'a has 2 images'),
        ({'a.jpg': b'x', 'a.cls': b''}, 'a.cls does not name a class; give a number'),
        ({'a.jpg': b'x', 'a.cls': b'\xff'}, 'a.cls cannot be read as a label'),
        ({'a.jpg': b'x', 'a.cls': b'9' * 5000}, 'a.cls cannot be read as a label'),
        ({'a.jpg': b'x', 'a.cls': b'1000000'}, 'a.cls does not name a class'),
        (
            {'a.jpg': b'x', 'a.json': b'{"x": 1}'},
            'a.json does not name a class.* its field la',
        ),
        ({'a.jpg': b'x', 'a.json': b'{"label": true}'}, 'a.json does not name a class'),
        ({'a.jpg': b'x', 'a.json': b'[' * 10**5}, 'a.json cannot be read as a label'),
        ({'a.jpg': b'x', 'a.cls': b' ' * 2**21}, 'a.cls is too large to be a label'),
        ({'a.jpg': link('a.jpg'), 'a.cls': b'1'}, 'a.jpg is not a regular file'),
        ({'a.jpg': b'x', 'a.cls': b'0'}, 'has 1 classes; at least two'),
        ({}, 'has 0 classes; at least two'),
        (
            {'a.jpg': b'x', 'a.cls': b'0', 'b.jpg': b'x', 'b.cls': b'bee'},
            'some labels are numbers, some are names',
        ),
        (
            {'a.jpg': b'x', 'a.cls': b'0', 'b.jpg': b'x', 'b.cls': b'1'},
            'x.tar/a.jpg is not an image',
        ),
    ],
)
def test_tars_that_are_refused(members, message, tmp_path):
    write_tar(tmp_path / 'x.tar', members)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert '\n' not in str(error.value)


def test_damaged_tars(jpegs, tmp_path):
    path = write_tar(tmp_path / 'x.tar', samples(jpegs, [0, 1] * 6))
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(UserError, match='x.tar is truncated within 00000.jpg; copy'):
        load(tmp_path)
    path.write_bytes(b'no tar' * 500)
    with pytest.raises(UserError, match='x.tar is not a valid uncompressed tar file'):
        load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match='holds no .tar files'):
        load(tmp_path)
    with pytest.raises(UserError, match='there is no such folder or tar file'):
        load(tmp_path / 'nowhere')
    for name in ('train-0.tar', 'val-0.tar', 'other.tar'):
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(UserError, match='some val and some neither; put them into'):
        load(tmp_path)


def test_fuzz(jpegs, tmp_path):
    """A changed tar gives images or one line."""
    path = write_tar(tmp_path / 'x.tar', samples(jpegs, [0, 1] * 6))
    whole, rng, said = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        content = bytearray(whole)
        # The headers, which are a small part of it.
        for _ in range(rng.integers(1, 4)):
            content[512 * rng.integers(len(content) // 512) + rng.integers(345)] ^= 1
        path.write_bytes(content[: rng.integers(1, 2 * len(content))])
        try:
            reader, _, _ = tar_lib.load(str(tmp_path))
            assert all(len(reader[index]) for index in range(len(reader)))
        except UserError as error:
            said += 1
            assert '\n' not in str(error)
    assert said > 20


def test_bad_images_are_left_out(jpegs, tmp_path):
    contents = [*jpegs[:5], jpegs[5][:300], *jpegs[6:]]
    write_tar(tmp_path / 'x.tar', samples(contents, [0, 1] * 6))
    with pytest.raises(UserError, match='x.tar/00005.jpg cannot be decoded'):
        load(tmp_path)
    source = load(tmp_path, bad_images='skip')
    assert len(source.train) + len(source.test) == 11 and len(source.skipped) == 1


def test_cut_between_two_images(jpegs, tmp_path):
    """What is there is whole; that some is missing shows by the end that is missing."""
    path = write_tar(tmp_path / 'tars' / 'a.tar', samples(jpegs, range(12)))
    with tarfile.open(path) as tar:
        end = tar.getmember('00009.jpg').offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match='a.tar has no end of a tar file; copy it'):
        tar_lib.load(str(path))


@pytest.mark.parametrize(
    ('train', 'held_out'),
    [
        ('data/train/0.tar', 'data/val/0.tar'),
        ('shards/seg_train-0.tar', 'shards/seg_test-0.tar'),
        ('Training/0.tar', 'Testing/0.tar'),
        ('my_train_set-000.tar', 'my_val_set-000.tar'),
    ],
)
def test_parts_of_many_names(train, held_out, jpegs, tmp_path, capsys):
    write_tar(tmp_path / train, samples(jpegs, [0, 1, 0]))
    write_tar(tmp_path / held_out, samples(jpegs[4:], [1, 0]))
    source = load(tmp_path)
    assert (len(source.train), len(source.test), source.has_test) == (3, 2, True)
    told = f'3 images to train on ({train}), 2 choose the best epoch ({held_out})'
    assert told in capsys.readouterr().out


def test_names_of_classes_one_folder_down(jpegs, tmp_path):
    for part in 'train', 'val':
        write_tar(tmp_path / 'x' / part / '0.tar', samples(jpegs, [0, 1]))
    (tmp_path / 'x' / 'classes.txt').write_text('cat\ndog\n')
    assert load(tmp_path).class_names == ('cat', 'dog')


def test_classes_of_one_part(jpegs, tmp_path, capsys):
    write_tar(tmp_path / 'train.tar', samples(jpegs, [0, 1]))
    write_tar(tmp_path / 'val.tar', samples(jpegs[4:], [0, 2]))
    load(tmp_path)
    assert 'warning: 1 classes have no image to train on' in capsys.readouterr().out
    members = {'a.jpg': jpegs[0], 'a.cls': b'Cat', 'b.jpg': jpegs[1], 'b.cls': b'dog'}
    write_tar(tmp_path / 'train.tar', members)
    write_tar(tmp_path / 'val.tar', members | {'a.cls': b'cat'})
    with pytest.raises(UserError, match="written 'Cat' in some tars and 'cat'"):
        load(tmp_path)


def test_tars_that_are_no_set(jpegs, tmp_path, capsys):
    for name in 'val-0.tar', 'test-0.tar':
        write_tar(tmp_path / 'a' / name, samples(jpegs, [0, 1]))
    with pytest.raises(UserError, match='called val and test, and none train'):
        load(tmp_path / 'a')
    for name in 'train/0.tar', 'trainval/0.tar', 'val/0.tar':
        write_tar(tmp_path / 'b' / name, samples(jpegs, [0, 1]))
    load(tmp_path / 'b')
    assert 'left out besides the parts: the folders trainval' in capsys.readouterr().out
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'x.tar.gz').write_bytes(b'')
    with pytest.raises(UserError, match=r'no .tar files .*but 1 .gz .*unpack them'):
        load(tmp_path / 'c')
    write_tar(tmp_path / 'd.tar', {'cat/1.jpg': jpegs[0]})
    with pytest.raises(UserError, match='a tar of class folders is read unpacked'):
        load(tmp_path / 'd.tar')
    write_tar(tmp_path / 'e.tar', samples(jpegs, [0, 1, 0]) | {'__MACOSX/0.jpg': b'x'})
    assert len(load(tmp_path / 'e.tar').train) == 2
