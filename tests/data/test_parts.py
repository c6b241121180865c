"""Parts of a set under all names that people give them; classes that are none."""

import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, parts
from flax_densenet.system import result_folders
from helpers.runs import write_images


def load(folder, **fields):
    return dataset.load_source(f'folder:{folder}', **{'image_size': 8, **fields})


def counts(source):
    return len(source.train), len(source.test), source.has_test


def write(folder, **classes):
    return write_images(folder, classes or {'a': 3, 'b': 2}, size=(8, 8))


@pytest.mark.parametrize(
    ('role', 'names'),
    [
        (
            'train',
            'train Train TRAINING train_set seg_train training-set train2017 TrainData '
            'images_train train_images Train_v2 trn ILSVRC2012_img_train data.train',
        ),
        (
            'val',
            'val valid Validation validate dev VAL_SET images-val seg_val val2017 '
            'development validset',
        ),
        ('test', 'test Testing test_set TestImages seg_test eval test-224 evaluation'),
        ('other', 'seg_pred predict unlabeled'),
        (None, 'cat trains test_tube valley devil latest a 0 raintree contest'),
    ],
)
def test_roles(role, names):
    assert {name: parts.role(name) for name in names.split()} == dict.fromkeys(
        names.split(), role
    )


@pytest.mark.parametrize(
    ('train', 'held_out'),
    [
        ('Training', 'Testing'),
        ('TRAIN', 'VAL'),
        ('train_set', 'dev_set'),
        ('seg_train/seg_train', 'seg_test/seg_test'),
        ('birds-train', 'birds-valid'),
        ('asl_alphabet_train/asl_alphabet_train', 'asl_alphabet_test'),
        ('train/images', 'validate/images'),
        ('archive/train', 'archive/test'),
        ('a/b/Train Set', 'a/b/Test Set'),
    ],
)
def test_parts_of_many_names(train, held_out, tmp_path, capsys):
    write(tmp_path / train, a=3, b=2)
    write(tmp_path / held_out, a=1, b=1)
    source = load(tmp_path)
    assert source.class_names == ('a', 'b') and counts(source) == (5, 2, True)
    out = capsys.readouterr().out
    assert '5 images in ' in out and '2 in ' in out and 'chooses the best' in out


def test_three_parts(tmp_path, capsys):
    write(tmp_path / 'train', a=6, b=6)
    write(tmp_path / 'Validation', a=2, b=1)
    write(tmp_path / 'test', a=4, b=4)
    (tmp_path / 'extra').mkdir()
    source = load(tmp_path)
    assert counts(source) == (12, 8, True)
    assert '/Validation/' in source.val.name(0) and '/test/' in source.test.name(0)
    assert source.selection is source.val and len(source.val) == 3
    out = capsys.readouterr().out
    assert '3 in Validation, which chooses the best epoch, 8 in test, which is m' in out
    assert 'left out besides the parts: the folders extra' in out


def test_a_part_without_classes(tmp_path, capsys):
    write(tmp_path / 'train', a=6, b=6)
    write(tmp_path, test=5)
    write(tmp_path / 'pred', images=3)
    source = load(tmp_path)
    assert not source.has_test and len(source.train) + len(source.test) == 12
    assert 'test is left out: its images are directly in it' in capsys.readouterr().out
    write(tmp_path / 'val', a=2)
    assert counts(load(tmp_path)) == (12, 2, True)
    assert 'val has no images for 1 of 2 classes (b)' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('folders', 'message'),
    [
        (('val/a', 'val/b', 'test/a', 'test/b'), r'\(test, val\) look like parts'),
        (('one/a', 'one/b', 'two/a', 'two/b'), r'\(one, two\) hold the same folders'),
        (('a/train', 'a/val', 'b/train', 'b/val'), 'hold the same parts .train, val'),
        (('train_1/a', 'train_2/a', 'test/a'), 'train_1 and train_2 all look like'),
        (('train/a', 'train/b', 'photos/c'), 'train holds folders like a'),
        (('train', 'val/a', 'val/b'), 'train holds images but no folders of classes'),
        (('train/a', 'train/b', 'val/A', 'val/b'), "'A' of val is written 'a' in"),
        (('train/a b', 'train/c', 'val/a_b', 'val/c'), "'a_b' of val is written"),
        (('train/e\u0301', 'train/c', 'val/\xe9', 'val/c'), 'another Unicode form'),
        (('d/train/a', 'd/val/a', 'docs/x'), 'folder d holds parts of a set .train, v'),
        (('a/train', 'a/test', 'b/train'), 'the folder a holds parts of a set'),
        (('part_1', 'part_2'), r'.part_1, part_2. look like pieces of a set'),
        (('x/Fold 1', 'x/Fold 02', 'x/Fold 3'), 'look like pieces of a set'),
        (('train/images_001', 'train/images_002', 'val/images_001'), 'like pieces'),
    ],
)
def test_folders_that_are_no_classes(folders, message, tmp_path):
    for folder in folders:
        write((tmp_path / folder).parent, **{(tmp_path / folder).name: 2})
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_classes_with_numbers(tmp_path):
    write(tmp_path / 'grades', grade1=5, grade2=5)
    assert load(tmp_path / 'grades').class_names == ('grade1', 'grade2')
    write(tmp_path / 'one', fold1=5, plane=5)
    assert load(tmp_path / 'one').class_names == ('fold1', 'plane')


def test_classes_that_look_like_little(tmp_path, capsys):
    """One class called train, and folders below classes that differ: as before."""
    write(tmp_path, train=5, plane=5)
    write(tmp_path / 'plane', left=1, right=1)
    assert load(tmp_path).class_names == ('plane', 'train')
    assert '2 images are in subfolders' in capsys.readouterr().out


def test_one_part_alone_tells_of_the_others(tmp_path, capsys):
    write(tmp_path / 'train', a=5, b=5)
    write(tmp_path / 'test', a=1, b=1)
    load(tmp_path / 'train')
    assert 'next to train there is test, which is not used' in (capsys.readouterr().out)


@pytest.mark.parametrize(
    'file',
    [
        *('ckpt/run/metrics.jsonl', 'run/metrics.jsonl', 'ckpt/w-eval/eval.json'),
        *('ckpt/run/lr_find.json', 'sweep/sweep.json', 'packed/pack.json'),
        *('ckpt/run/environment.json', 'maps/.flax_densenet'),
    ],
)
def test_results_are_no_class(file, tmp_path, capsys):
    write(tmp_path, a=5, b=5)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text('')
    path.with_name('samples.png').write_bytes(b'')
    assert load(tmp_path).class_names == ('a', 'b')
    top = file.partition('/')[0]
    assert f'left out: {top}, with results' in capsys.readouterr().out


def test_results_in_a_class_and_in_the_folder_of_a_run(tmp_path, capsys):
    """`predict photos/a --explain=photos/a/maps`, `train photos --workdir=photos`."""
    write(tmp_path, a=5, b=5)
    write(tmp_path / 'a' / 'maps', more=3)
    result_folders.mark(str(tmp_path / 'a' / 'maps'))
    (tmp_path / 'metrics.jsonl').write_text('')
    for name in ('checkpoints', 'events', 'wandb', 'hub'):
        (tmp_path / name).mkdir()
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / 'hub' / name).write_text('')
    source = load(tmp_path)
    assert source.class_names == ('a', 'b')
    assert len(source.train) + len(source.test) == 10
    said = capsys.readouterr().out
    assert 'left out: checkpoints, events, hub, wandb, with results' in said
    assert f'left out {tmp_path}/a/maps, with results' in said


def test_a_class_is_no_part_of_a_run_elsewhere(tmp_path):
    write(tmp_path, events=5, b=5)
    assert load(tmp_path).class_names == ('b', 'events')


def test_results_beside_the_classes_of_a_part(tmp_path):
    write(tmp_path, **{'train/a': 3, 'train/b': 3, 'val/a': 2, 'val/maps': 2})
    result_folders.mark(str(tmp_path / 'val' / 'maps'))
    assert len(load(tmp_path).test) == 2


def test_files_passed_over_are_counted(tmp_path, capsys):
    write(tmp_path, a=5, b=5)
    for number in range(3):
        (tmp_path / 'a' / f'{number}.psd').write_bytes(b'x')
    (tmp_path / 'b' / 'notes').write_text('x')
    (tmp_path / 'b' / 'x.zip').write_text('x')
    (tmp_path / 'labels.csv').write_text('x')
    (tmp_path / 'z.png').write_bytes(b'')
    load(tmp_path)
    out = capsys.readouterr().out
    assert 'skipped 3 .psd, 1 .zip, 1 no ending, 1 .csv' in out
    assert '.psd: convert them to JPEG or PNG' in out and '.zip: unpack them' in out
    assert '1 images are not in a class folder' in out
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / '1.psd').write_bytes(b'x')
    with pytest.raises(UserError, match='the folder c holds no images but 1 .psd'):
        load(tmp_path)


def test_classes_that_differ_in_case_are_reported(tmp_path, capsys):
    write(tmp_path, Cat=3, cat=3, dog=3)
    assert load(tmp_path).class_names == ('Cat', 'cat', 'dog')
    assert "the classes 'Cat' and 'cat' differ only in" in capsys.readouterr().out


def test_parts_are_named_by_their_paths(tmp_path, capsys):
    for part, count in ('training', 4), ('validation', 2), ('testing', 1):
        write(tmp_path / part / 'images', a=count, b=count)
    load(tmp_path)
    assert (
        '8 images in training/images to train on, 4 in validation/images, which '
        'chooses the best epoch, 2 in testing/images, which is measured once, at '
        'the end'
    ) in capsys.readouterr().out
    load(tmp_path, known_classes=('a', 'b'))  # to measure a model
    line = '8 images in training/images, 4 in validation/images, 2 in testing/images\n'
    assert line in capsys.readouterr().out
