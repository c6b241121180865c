"""Outputs never replace what a command reads, or any image."""

import os

import pytest

from flax_densenet.errors import UserError
from flax_densenet.inference import input_files
from helpers.commands import make_main
from helpers.runs import write_images


@pytest.fixture
def main(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'photos', {'a': 2})
    for name in ('x.safetensors', 'names.csv', 'labels.csv', 'mine.py'):
        (tmp_path / name).write_text('kept')
    os.link('photos/a/000.jpg', 'scan')
    return make_main(monkeypatch, capfd)


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        ('predict run scan --out=scan', '--out=scan would overwrite --files=scan, wh'),
        ('predict run photos/a/000.jpg --out=scan', 'overwrite --files=photos/a/000.j'),
        (
            'predict run photos --out=photos/a/001.jpg --format=csv',
            '--out=photos/a/001.jpg would overwrite an image; name another file',
        ),
        (
            'predict x.safetensors photos --features=x.safetensors',
            '--features=x.safetensors would overwrite --workdir=x.safetensors',
        ),
        (
            'predict run photos --class_names=names.csv --out=./names.csv',
            'would overwrite --class_names=names.csv, which predict reads; name ',
        ),
        ('export x.safetensors x.safetensors', 'would overwrite --workdir=x.safet'),
        (
            'report run --config.data.labels=labels.csv --out=labels.csv',
            'would overwrite --config.data.labels=labels.csv, which report reads',
        ),
        ('report run --out=mine.py', 'would overwrite a file that is not a page'),
    ],
)
def test_what_is_read_is_not_overwritten(main, arguments, line, tmp_path):
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    status, _, err = main(*arguments.split())
    assert status == 2 and line in err and 'Traceback' not in err, err
    assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}


def test_an_output_among_names_on_standard_input(main):
    """They are read one by one, after the outputs are open."""
    found = input_files.find(['photos', 'scan'], outputs=['scan', 'new.csv'])
    with pytest.raises(UserError, match='scan: the output would overwrite an image'):
        list(found)
    assert len(list(input_files.find(['photos'], outputs=['new.csv']))) == 2
