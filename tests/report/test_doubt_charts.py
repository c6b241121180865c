"""The section of the report about uncertainty."""

import re
import types

import numpy as np
import pytest

from flax_densenet.evaluation import conformal, doubt
from flax_densenet.report import doubt_charts, render
from flax_densenet.weights import decisions, unusual

NAMES = ('ants', 'bees', '<wasps>')


def results(*, several=False, others=None, scored=True):
    random = np.random.default_rng(0)
    labels = random.integers(3, size=200)
    logits = random.normal(size=(200, 3)) + 2 * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    given = np.eye(3)[labels] if several else labels
    made = decisions.Decisions(
        *(1, '', 3, '', 'val', 100),
        sets=conformal.fit(probabilities[:100], given[:100]),
        unusual=unusual.Unusual('energy', 0.0, 1.0, 0.95, 0, 100) if scored else None,
    )
    scores = random.normal(size=100) if scored else None
    measured = doubt.measure(
        probabilities[100:], given[100:], made, scores=scores, others=others
    )
    return types.SimpleNamespace(
        doubt=measured,
        unusual=scores,
        others=others,
        class_names=NAMES,
        decisions=made,
        multi_label=several,
    )


def test_section_is_drawn():
    others = doubt.Others('cats & dogs', np.full(20, 9.0))
    found = results(others=others)
    section = doubt_charts.section(found)
    assert len(section['charts']) == 4
    text = ''.join(section['charts'])
    assert 'cats &amp; dogs' in text and 'limit' in text
    assert 'Target 90%: ' in text and 'NaN' not in text and 'nan' not in text
    row = next(row for row in section['shown'] if row['asked'] == 0.9)
    lowest = min(zip(row['classes'], NAMES, strict=True))
    assert row['lowest'] == f'{lowest[1]} ({render.percent(lowest[0])})'
    page = render.make_environment().get_template('doubt.html')
    text = page.render(doubt=section, whats='classes', multi_label=False)
    assert '20 images of cats &amp; dogs' in text and '&lt;wasps&gt;' in text
    assert f'{render.percent(row["coverage"])}</td>' in text and 'interval' in text
    section['sets_halved'] = True
    text = page.render(doubt=section, whats='classes', multi_label=False)
    assert 'of random halves' in text and 'interval' not in text
    assert not re.search(r'[a-z]\.[A-Z]', text)  # sentences are apart


@pytest.mark.parametrize('several, scored', [(True, True), (False, False)])
def test_what_there_is(several, scored):
    section = doubt_charts.section(results(several=several, scored=scored))
    assert len(section['charts']) == 3
    assert ('risk' in section) != several
    page = render.make_environment().get_template('doubt.html')
    text = page.render(doubt=section, whats='classes', multi_label=several)
    assert ('score of unusual images' in text) == scored


def test_nothing_to_show():
    """Of runs of earlier versions."""
    found = types.SimpleNamespace(doubt={'risk': {}}, decisions=None)
    assert doubt_charts.section(found) is None
