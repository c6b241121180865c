"""Documentation, messages and docstrings keep to plain, standard English."""

import re

import pytest

from helpers.paths import ROOT

# Phrases that no longer occur, and what to write.
PHRASES = {
    r'says so': 'prints a warning',
    r'(is|are) told of': 'is reported',
    r'tells? of\b': 'describes, reports',
    r'where no \w+ (is|are)\b': 'if there is no',
    r'(what|which) is promised': 'the guarantees',
    r'stands? in (the|docs|recipes|results)': 'is listed in',
    r'go(es|ing)? on from': 'resume from',
    r'gives way to': 'is skipped in favor of',
    r'surest': 'most confident',
    r'\bhow sure\b': 'confidence',
    r'\b(the|its|these|test|no) figures\b': 'metrics',
    r'\bbeside (torch|Keras|timm|plain)': 'compared with',
    r'first so many': 'the first N',
    r'\banew\b': 'again, recreate',
    r'\bmend(s|ed)?\b': 'fix',
    r'bring it again': 'copy it again',
    r'\bflatters?\b': 'is optimistic',
    r'(is|are|stays?) whole\b': 'complete, intact',
    r'nobody comes': 'no process joins',
    r'is no (class|number|text|heading|record|array)\b': 'is not a',
    r'at hand\b': 'available',
    r'colour|normalis': 'color, normalize',
    r'by which\b': 'so, with which',
}
PLACES = (
    *('README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md', 'docs/*.md'),
    *('configs/*.py', 'flax_densenet/**/*.py', 'flax_densenet/**/*.jinja'),
    *('flax_densenet/**/*.html', 'flax_densenet/**/*.js', 'examples/*.py'),
)


def read_all():
    for place in PLACES:
        for path in sorted(ROOT.glob(place)):
            # Sentences run over several lines of code.
            text = path.read_text(encoding='utf-8')
            text = re.sub(r"'\s*\n\s*f?'", '', text)
            yield path.relative_to(ROOT), re.sub(r'\s+', ' ', text)


@pytest.fixture(scope='module')
def texts():
    found = dict(read_all())
    assert len(found) > 200
    return found


@pytest.mark.parametrize('phrase', PHRASES)
def test_phrases_do_not_occur(texts, phrase):
    places = [
        f'{path}: ...{text[max(match.start() - 30, 0) : match.end() + 30]}...'
        for path, text in texts.items()
        for match in re.finditer(phrase, text, re.I)
        if 'colour_jitter' not in text[match.start() - 5 : match.end() + 10]
    ]
    assert not places, (f'write: {PHRASES[phrase]}', *places)
