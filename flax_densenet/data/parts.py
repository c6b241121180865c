"""Recognizes the names of parts: training, validation and test.

Names are compared without case, digits and separators, and without words that data sets
add before or after them: `seg_train`, `Training Set`, `val2017`, `test-images`.
"""

import re
import unicodedata
from collections.abc import Iterable

TRAIN, VAL, TEST, OTHER = 'train', 'val', 'test', 'other'
USED = (TRAIN, VAL, TEST)
_WORDS = {
    TRAIN: 'train training trn',
    VAL: 'val valid vali validation validate validating valset dev devel development',
    TEST: 'test testing tst eval evaluation evaluate holdout heldout',
    OTHER: 'pred prediction predictions predict submission inference unlabeled '
    'unlabelled unlabel unsup unsupervised extra',
}
_ROLE_OF = {word: role for role, words in _WORDS.items() for word in words.split()}
_BEFORE = (
    'seg|segmented|img|imgs|image|images|picture|pictures|photo|photos|pic|pics|data|'
    'dataset|the|my|split|splits|part|subset|phase|set|ilsvrc|imagenet|cropped|resized|'
    'cls|official|is|in|full|small|final|new'
)
_BEHIND = (
    'set|sets|data|dataset|images|image|imgs|img|pictures|photos|photo|pics|split|part|'
    'subset|phase|folder|dir|files|samples|examples|cropped|resized|jpg|jpeg|png|small|'
    'full|final|new|all|v|px|x|labeled|labelled|cls'
)
_PATTERN = re.compile(
    rf'(?:{_BEFORE})*?({"|".join(sorted(_ROLE_OF, key=len, reverse=True))})'
    rf'(?:{_BEHIND})*'
)
# Words for the numbered pieces of a large data set.
_PIECE = re.compile(
    r'(parts?|folds?|splits?|batch|chunk|shard|subset|piece|vol(?:ume)?|images?|imgs?|'
    r'photos|pictures|archive|download)[\W_]*\d+\s*',
    re.IGNORECASE,
)
# Spellings that take precedence over any other.
PLAIN = {TRAIN: ('train', 'training'), VAL: ('val', 'valid', 'validation')}
PLAIN[TEST] = ('test',)


def role(name: str) -> str | None:
    """`train`, `val`, `test`, `other` (unused), or None for any other name.

    >>> [role(n) for n in ('seg_train', 'Validation Set', 'TESTING', 'cat', 'trains')]
    ['train', 'val', 'test', None, None]
    """
    letters = re.sub(r'[\W\d_]+', '', name).lower()
    found = _PATTERN.fullmatch(letters)
    return _ROLE_OF[found[1]] if found else None


def by_role(names: Iterable[str]) -> dict[str, list[str]]:
    """`{role: names}` for the names that have a role, the plainest spelling first.

    Words that are shared by several names are left out: in `birds_train` and
    `birds_test`, the rest determines the part.
    """
    found: dict[str, list[str]] = {}
    shared: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for name in sorted(names):
        if (part := role(name)) is not None:
            found.setdefault(part, []).append(name)
            continue
        words = [word for word in re.split(r'[\W\d_]+', name.lower()) if word]
        for place in {0, len(words) - 1} if len(words) > 1 else ():
            if part := _ROLE_OF.get(words[place]):
                rest = tuple(words[:place] + words[place + 1 :])
                shared.setdefault(rest, []).append((part, name))
    for same in shared.values():
        if {TRAIN} < {part for part, _ in same}:
            for part, name in same:
                found.setdefault(part, []).append(name)
    for part, spellings in found.items():
        plain = PLAIN.get(part, ())
        spellings.sort(key=lambda n: plain.index(n) if n in plain else len(plain))
    return found


def is_clear(part: str, names: list[str]) -> bool:
    """Whether the first of a part's names takes precedence as the plainest."""
    return len(names) == 1 or names[0] in PLAIN.get(part, ())


def are_pieces(names: Iterable[str]) -> bool:
    """Whether all names are one word for a piece of a data set and a number.

    >>> are_pieces(['part_1', 'part_2']), are_pieces(['images_001', 'Images 002'])
    (True, True)
    >>> are_pieces(['grade1', 'grade2']), are_pieces(['part_a', 'part_b'])
    (False, False)
    """
    found = [_PIECE.fullmatch(name) for name in names]
    return all(found) and len({one[1].lower() for one in found if one}) == 1


def plain_case(name: str) -> str:
    """A name without case, blanks, `_` and `-`, and with accents in one encoding.

    >>> plain_case('Hot_Dog ') == plain_case('hot dog')
    True
    """
    name = unicodedata.normalize('NFKC', name)
    return re.sub(r'[\s_-]+', '', name).casefold()


def find_similar(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that are equal after `plain_case`; None if there are none."""
    plain: dict[str, str] = {}
    for name in names:
        if plain.setdefault(plain_case(name), name) != name:
            return plain[plain_case(name)], name
    return None
