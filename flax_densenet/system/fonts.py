"""Finds fonts for the letters of a text, among those of matplotlib and the system.

No font has all of Chinese, Japanese, Korean, Arabic, Devanagari and emoji, and class
names can be in any of them.
"""

import functools
from collections.abc import Iterable

# In the order of preference; fonts that are not installed are skipped.
_FAMILIES = (
    *('DejaVu Sans', 'Noto Sans', 'Noto Sans CJK SC', 'Noto Sans CJK JP'),
    *('Noto Sans CJK KR', 'Noto Sans SC', 'Noto Sans JP', 'Noto Sans KR'),
    *('Noto Sans Arabic', 'Noto Naskh Arabic', 'Noto Sans Devanagari'),
    *('Noto Sans Hebrew', 'Noto Sans Thai', 'Noto Sans Bengali', 'Noto Sans Tamil'),
    *('Noto Sans Symbols2', 'Noto Sans Symbols', 'Noto Emoji', 'Symbola'),
    *('WenQuanYi Zen Hei', 'Source Han Sans', 'IPAexGothic', 'NanumGothic'),
    *('PingFang SC', 'Hiragino Sans', 'Apple SD Gothic Neo', 'Geeza Pro'),
    *('Kohinoor Devanagari', 'Arial Unicode MS', 'Microsoft YaHei', 'Yu Gothic'),
    *('Malgun Gothic', 'Segoe UI', 'Nirmala UI', 'Segoe UI Symbol', 'Segoe UI Emoji'),
)


def families(texts: Iterable[str]) -> list[str]:
    """Names of fonts for matplotlib that together have all letters, if any font does.

    Args:
      texts: all texts to draw.
    """
    return _choose(texts)[0]


def missing(texts: Iterable[str]) -> list[str]:
    """The letters of texts that no font has, so that pictures show boxes instead."""
    return _choose(texts)[1]


def _choose(texts):
    missing = {letter for text in texts for letter in text if letter.isprintable()}
    chosen = ['DejaVu Sans']
    for family, path, number in _installed():
        if not missing:
            break
        found = {letter for letter in missing if ord(letter) in _letters(path, number)}
        if found:
            missing -= found
            chosen += [family] if family not in chosen else []
    return chosen, sorted(missing)


def best_file(text: str) -> tuple[str, int]:
    """The font file with most letters of a text, and the font's index in it."""
    wanted = {letter for letter in text if letter.isprintable()}

    def count(font):
        return sum(ord(letter) in _letters(*font[1:]) for letter in wanted)

    _, path, number = max(_installed(), key=count)
    return path, number


@functools.cache
def _installed():
    """`(family, path, number in the file)` of installed fonts, regular ones only."""
    from matplotlib import font_manager

    paths = {}
    for entry in font_manager.fontManager.ttflist:
        regular = entry.style == 'normal' and entry.weight in (400, 'normal', 'regular')
        if regular and entry.name in _FAMILIES:
            paths.setdefault(entry.name, (entry.fname, getattr(entry, 'index', 0)))
    return tuple((name, *paths[name]) for name in _FAMILIES if name in paths)


@functools.lru_cache(64)
def _letters(path, number):
    """The code points that a font has."""
    from matplotlib import ft2font

    try:
        font = ft2font.FT2Font(path, face_index=number)
    except TypeError:  # an earlier matplotlib reads the first font of a file
        font = ft2font.FT2Font(path)
    return frozenset(font.get_charmap())
