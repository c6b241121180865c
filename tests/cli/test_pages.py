"""`report`: where its pages are written, and what it refuses to ignore."""

import shutil

import pytest

from flax_densenet.report import page
from helpers import commands
from helpers.paths import ROOT


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A run, its copy and a sweep, whose pages have no pictures."""
    nothing = {'mistakes': [], 'uncertain': [], 'extra': []}
    monkeypatch.setattr(page, '_pick_pictures', lambda found, kept: dict(nothing))
    monkeypatch.chdir(tmp_path)
    for name, source in (('one', 'run'), ('two', 'run'), ('sweep', 'sweep')):
        shutil.copytree(ROOT / 'tests' / 'data' / 'v0' / source, name)
    (tmp_path / 'sweep/trials/001/seed0/report.html').write_text('here')
    return tmp_path


@pytest.mark.slow
def test_out_names_every_page(results, monkeypatch, capfd):
    run = commands.make_main(monkeypatch, capfd)
    for number, folders in enumerate((['one'], ['one', 'two'], ['sweep'])):
        path = results / 'pages' / f'{number}.html'
        status, out, err = run('report', *folders, f'--out={path}')
        assert (status, err) == (0, '') and str(path) in out
        assert path.read_text('utf-8').startswith('<!doctype html>')
    assert 'href="../sweep/trials/001/seed0/report.html"' in path.read_text('utf-8')
    assert not list(results.glob('*/report.html')) + list(results.glob('*.html'))


@pytest.mark.parametrize(
    'flag',
    [
        *('--figures=x', '--precision=bfloat16', '--class_names=a,b'),
        *('--outputs=sigmoid', '--config.data.source=digits'),
    ],
)
@pytest.mark.parametrize('folders', [['one', 'two'], ['sweep']])
def test_what_is_for_one_run_is_not_ignored(results, folders, flag, monkeypatch, capfd):
    run = commands.make_main(monkeypatch, capfd)
    status, out, err = run('report', *folders, flag)
    assert (status, out) == (2, '')
    name = flag.partition('=')[0]
    assert err.startswith(f'error: {name} is for the report of one run')
