"""Renders a template in `templates/` to one self-contained HTML file.

The page contains its pictures, charts and numbers; it loads nothing from other hosts,
and a policy in its head forbids that. Text is HTML and charts are SVG, so it can be
read and printed without JavaScript; the scripts sort tables, show tooltips and open
images.
"""

import functools
import importlib.resources
import json
import os
import unicodedata
from typing import Any

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.system import atomic


def isolate(name: str) -> str:
    """A name that others can stand beside, in whatever direction it is written."""
    if any(unicodedata.bidirectional(letter) in ('R', 'AL') for letter in name):
        return f'\u2068{name}\u2069'
    return name


def percent(share: float | None) -> str:
    """0.123 as `12.3%`; a dash for None."""
    return '-' if share is None else f'{share * 100:.1f}%'


def probability(share: float) -> str:
    """As `percent`, but never certain: `>99.9%` or `<0.1%`.

    >>> probability(0.99999), probability(0.5)
    ('>99.9%', '50.0%')
    """
    if 0.9995 <= share < 1:
        return '>99.9%'
    return '<0.1%' if 0 < share < 0.0005 else percent(share)


def figure(value: float | None) -> str:
    """`0.843`, `6.1e+11`; a dash for None."""
    if value is None:
        return '-'
    return f'{value:.3f}' if abs(value) < 1e4 else f'{value:.2g}'


def check_installed(what: str):
    """Raises if the packages of the extra `report` are missing.

    Args:
      what: the file that needs them.
    """
    with errors.extra('report', what):
        import jinja2  # noqa: F401


@functools.cache  # with the templates that it compiled
def make_environment() -> Any:
    """The `jinja2.Environment` of the templates."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('flax_densenet.report'),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        'percent': percent,
        'probability': probability,
        'figure': figure,
        'calibration_error': metrics_lib.calibration_error,
        'markup': markupsafe.Markup,
    }
    return environment


def save_page(path, template, data, *, private=False, **values):
    """Renders a page to a temporary file and renames it, so that it is complete.

    Args:
      path: path of the page.
      template: name in `templates/`, with a script of the same name.
      data: JSON values that the scripts read.
      private: the page must not contain pictures.
      **values: values for the template.

    Raises:
      UserError: the page cannot be written.
    """
    check_installed(os.path.basename(path))
    import markupsafe

    pages = importlib.resources.files('flax_densenet.report') / 'templates'

    def text(name):
        return markupsafe.Markup((pages / name).read_text('utf-8'))

    environment = make_environment()
    # Inside a script element, only this could end it.
    numbers = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')
    page = environment.get_template(template).render(
        style=text('style.css'),
        script=text(template.replace('.html', '.js')),
        common=text('page.js'),
        data=markupsafe.Markup(numbers),
        private=private,
        **values,
    )
    if private and 'data:image' in page:
        raise AssertionError('a private page contains a picture')
    try:
        folder = os.path.dirname(path) or '.'
        os.makedirs(folder, exist_ok=True)
        # File names that are not UTF-8 get a replacement character.
        options = {'encoding': 'utf-8', 'errors': 'replace'}
        with atomic.replacing(path, **options) as file:
            file.write(page)
    except OSError as error:
        raise UserError(
            f'{path} cannot be written ({error.strerror}); use another --workdir'
        ) from error
