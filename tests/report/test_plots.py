"""Pictures hold what they should; the summary's figures are the known ones."""

import numpy as np
import pytest

from flax_densenet import create_model
from flax_densenet.models import summary
from flax_densenet.report import plots
from helpers.marks import exhaustive_after

pytestmark = pytest.mark.drawn

RECORDS = [
    {
        'epoch': epoch,
        'train_accuracy': 0.5 + epoch / 20,
        'test_accuracy': accuracy,
        'train_loss': 1 / epoch,
        'test_loss': 2 / epoch,
    }
    for epoch, accuracy in enumerate([0.5, 0.8, 0.6], start=1)
]


def test_curves():
    figure = plots.plot_curves(RECORDS)
    accuracy, loss = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ['Accuracy', 'Loss']
    lines = {line.get_label(): line for line in accuracy.get_lines()}
    np.testing.assert_allclose(lines['test'].get_ydata(), [50, 80, 60])
    best = lines['best epoch (2): test 80.0%']
    assert (best.get_xdata(), best.get_ydata()) == ([2], [80])
    assert any('best epoch (2)' in line.get_label() for line in loss.get_lines())


@pytest.mark.slow
def test_curves_of_one_epoch(tmp_path):
    plots.save_curves(str(tmp_path), RECORDS[:1])
    assert (tmp_path / 'curves.png').stat().st_size > 1000


def test_samples_show_the_images(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 6, 3), np.uint8)
    batch = {'image': images, 'label': np.array([0, 1, 1, 0, 1])}
    shown = []
    plot = plots.plot_samples

    def keep(images, titles, **heading):
        shown.append((images, titles))
        return plot(images, titles, **heading)

    plots.plot_samples = keep
    try:
        plots.save_samples(
            str(tmp_path), batch, ('ant', '$b'), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 2)
        )
    finally:
        plots.plot_samples = plot
    np.testing.assert_array_equal(shown[0][0], images)
    assert shown[0][1] == ['ant', '$b', '$b', 'ant', '$b']
    assert (tmp_path / 'samples.png').exists()


def test_titles_of_mixed_images():
    names = ('ant', 'bee', 'a very long name of a class')
    make = plots.mixed_title
    assert make(0, 1, 0.7, names) == 'ant 0.70\n+ bee 0.30'
    assert make(1, 1, 0.7, names) == make(1, 0, 1.0, names) == 'bee'
    assert make(0, 1, 0.7, ('a', 'b')) == 'a 0.70 + b 0.30'
    lines = make(2, 2 - 1, 0.254, names).split('\n')
    assert lines == ['a very long … 0.25', '+ bee 0.75']
    present, none = np.array([1, 1, np.nan]), np.array([0, 0, 1.0])
    assert make(present, none, 0.5, ('x', 'y', 'z')) == 'x, y 0.50 + z 0.50'


# Multiply-adds of convolutions and classifier at 224x224, in 1e9; those of the 121 are
# in the summary below.
@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ('variant', 'gmacs'),
    exhaustive_after(
        1,
        [
            ('densenet161', 7.728),
            ('densenet169', 3.360),
            ('densenet201', 4.291),
            ('densenet264', 5.752),
        ],
    ),
)
def test_gmacs(variant, gmacs):
    module = create_model(variant, num_classes=1000)
    rows = summary.count_model(module, (224, 224, 3))
    assert sum(row[3] for row in rows) / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_summary():
    module = create_model('densenet121', num_classes=1000)
    lines = summary.format_summary(module, (224, 224, 3)).splitlines()
    assert lines[-1].split() == ['total', '7,978,856', '2.834']
    table = {line.split()[0]: line.split()[1] for line in lines}
    assert table['denseblock1'] == '56x56x256'
    assert table['transition3'] == '7x7x512'
    assert table['classifier'] == '1000'
