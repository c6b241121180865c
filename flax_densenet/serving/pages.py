"""The HTML pages of the server, from the templates."""

import pathlib
import secrets
from typing import Any

import jinja2
from starlette.responses import HTMLResponse

_TEMPLATES = pathlib.Path(__file__).with_name('templates')
# Nothing from other hosts, and only the scripts and styles of the template.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Pages:
    """Renders the templates, with class names and other texts escaped."""

    def __init__(self):
        """Reads the templates."""
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined
        )
        self._templates = {
            path.name: environment.from_string(path.read_text('utf-8'))
            for path in _TEMPLATES.glob('*.html')
        }

    def render(self, name: str, **values: Any) -> HTMLResponse:
        """A page, with a policy that blocks all external content.

        Args:
          name: file name of the template.
          **values: what the template uses besides `nonce`.
        """
        nonce = secrets.token_urlsafe(16)
        text = self._templates[name].render(nonce=nonce, **values)
        headers = {'Content-Security-Policy': _POLICY.format(nonce)}
        return HTMLResponse(text, headers=headers)
