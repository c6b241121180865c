"""One HTML file of a template in `templates/`, with all that it needs inside.

The page holds its pictures, plotly's library and its numbers; it asks no host for
anything, and a policy in its head forbids it to. What is text stands in it as HTML, so
it reads and prints without JavaScript; the scripts draw the charts, sort the tables and
open the cells of the confusion matrix.
"""

import importlib.resources
import json
import os

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.system import atomic


def percent(share: float) -> str:
    """0.123 as `12.3 %`."""
    return f'{share * 100:.1f} %'


def figure(value: float | None) -> str:
    """`0.843`; a dash where there is none."""
    return '-' if value is None else f'{value:.3f}'


def check_installed(what: str):
    """Raises where the packages of the extra `report` are missing.

    Args:
      what: the file that needs them.
    """
    with errors.extra('report', what):
        import jinja2  # noqa: F401
        import plotly  # noqa: F401


def save_page(path, template, charts, **values):
    """Renders a page beside its place and moves it there, so that it is whole.

    Args:
      path: of the page.
      template: in `templates/`, with a script of the same name.
      charts: what the scripts draw; JSON can hold it.
      **values: of the template.

    Raises:
      UserError: the page cannot be written.
    """
    check_installed(os.path.basename(path))
    import jinja2
    import markupsafe
    from plotly.offline import get_plotlyjs

    pages = importlib.resources.files('flax_densenet.report') / 'templates'

    def text(name):
        return markupsafe.Markup((pages / name).read_text('utf-8'))

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('flax_densenet.report'),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {'percent': percent, 'figure': figure}
    # Inside a script element only this could end it.
    numbers = json.dumps(charts, separators=(',', ':')).replace('<', '\\u003c')
    page = environment.get_template(template).render(
        style=text('style.css'),
        script=text(template.replace('.html', '.js')),
        common=text('charts.js'),
        plotly=markupsafe.Markup(get_plotlyjs()),
        charts=markupsafe.Markup(numbers),
        **values,
    )
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
