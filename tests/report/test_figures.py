"""Figures for papers: SVG and PDF, and letters of all names."""

import io
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib import font_manager

from flax_densenet import UserError
from flax_densenet.evaluation import results
from flax_densenet.inference import overlay
from flax_densenet.report import figures, plots
from flax_densenet.system import fonts, result_folders
from helpers.pages import write_run

NAMES = ('蜜蜂', 'ミツバチ', '꿀벌', 'نحلة', 'मधुमक्खी', 'пчёлы', '$b_1$ <i> & x')
_CJK = any(f.name.startswith('Noto Sans CJK') for f in font_manager.fontManager.ttflist)
_needs_noto = pytest.mark.skipif(
    not _CJK, reason='fonts-noto-core and fonts-noto-cjk are not installed'
)


def found(names, count=120, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % len(names)
    logits = rng.normal(size=(count, len(names))).astype(np.float32)
    logits[np.arange(count), labels] += 2
    return results.Results([], names, logits, labels)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_files(tmp_path):
    write_run(tmp_path / 'run')
    names = figures.save(str(tmp_path / 'out'), str(tmp_path / 'run'), found(NAMES))
    stems = ('curves', 'confusion', 'roc', 'reliability')
    assert names == [f'{stem}.{end}' for stem in stems for end in ('svg', 'pdf')]
    for name in names:
        content = (tmp_path / 'out' / name).read_bytes()
        if name.endswith('pdf'):
            assert content.startswith(b'%PDF')
            continue
        text = ' '.join(ElementTree.fromstring(content).itertext())
        if name != 'curves.svg' and name != 'reliability.svg':
            # Names are text, not markup nor mathematics.
            assert all(one in text for one in NAMES), name
    again = tmp_path / 'again'
    figures.save(str(again), str(tmp_path / 'run'), found(NAMES))
    assert (again / 'roc.pdf').read_bytes() == (tmp_path / 'out/roc.pdf').read_bytes()
    # No class of a later training; a folder of the user's own may be one.
    assert result_folders.has_results(str(again))
    (again / result_folders.MARK).unlink()
    figures.save(str(again), str(tmp_path / 'run'), found(NAMES))
    assert not result_folders.has_results(str(again))
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        figures.save(str(tmp_path / 'file'), str(tmp_path / 'run'), found(NAMES))


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 12, 30])
def test_names_do_not_overlap(count):
    names = tuple(f'a rather long name of class {n}' for n in range(count))
    figure = figures.plot_confusion(found(names, 5 * count))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        for one, other in zip(boxes, boxes[1:], strict=False):
            assert not one.overlaps(other)
        assert min(box.x0 for box in boxes) >= 0 and min(box.y0 for box in boxes) >= 0


@pytest.mark.slow
def test_roc_of_many_classes_shows_their_mean():
    names = tuple(map(str, range(20)))
    figure = figures.plot_roc(found(names, 400))
    (label,) = [text.get_text() for text in figure.legends[0].get_texts()]
    assert label.startswith('mean of 20 classes (0.9')


@pytest.mark.exhaustive
@pytest.mark.slow
@_needs_noto
@pytest.mark.drawn
def test_all_letters_have_a_font(tmp_path):
    """Matplotlib warns of each letter that it draws as a box."""
    chosen = fonts.families(NAMES)
    assert chosen[0] == 'DejaVu Sans' and len(chosen) > 2
    batch = {'image': np.zeros((7, 8, 8, 3), np.uint8), 'label': np.arange(7)}
    mean = std = (0.5, 0.5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        figures.save(str(tmp_path), str(tmp_path), found(NAMES))
        with plots.fonts_for(NAMES):
            figure = plots.plot_samples(batch['image'], NAMES)
            figure.savefig(io.BytesIO(), format='png')
    plots.save_samples(str(tmp_path), batch, NAMES, mean=mean, std=std)
    for name in NAMES:  # captions of Pillow, which has one font at a time
        path, number = fonts.best_file(name)
        assert {ord(letter) for letter in name} <= fonts._letters(path, number)
        box = np.ones((1, 1)), np.zeros((8, 8, 3), np.uint8)
        assert overlay.picture(box[1], box[0], name).width > 200
