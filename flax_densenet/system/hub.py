"""The Hugging Face Hub as set up by the environment, and the logs of its library."""

import contextlib
import logging
import os
import re

OFFLINE = 'HF_HUB_OFFLINE'
LOGIN = '`hf auth login` or the environment variable HF_TOKEN'
_LOGGER = logging.getLogger(__name__)
_LIBRARIES = ('huggingface_hub', 'datasets')
# One line for each attempt of a request, and what concerns the authors of a data set.
_ATTEMPT = re.compile(
    r"'(?P<reason>.*)' thrown while requesting \w+ (?P<url>\S+)", re.S
)
_NO_MATTER = (
    *('Retrying in', 'Repo card metadata block', 'You are sending unauthenti'),
    'Using the latest cached version of the dataset',  # the next one tells which
)
_CACHED = re.compile(
    r'Found the latest cached dataset configuration .* at (?P<place>.*) '
    r'\(last modified on (?P<time>.*)\)\.'
)


def is_offline() -> bool:
    """Whether the user forbids connections, with `HF_HUB_OFFLINE`."""
    return os.environ.get(OFFLINE, '').upper() in ('1', 'ON', 'YES', 'TRUE')


def endpoint() -> str:
    """The address of the Hub: `HF_ENDPOINT`, by default https://huggingface.co."""
    from huggingface_hub import constants

    # The library reads it once, when it is imported.
    return os.environ.get('HF_ENDPOINT', '').rstrip('/') or constants.ENDPOINT


@contextlib.contextmanager
def quiet(name: str):
    """Redirects the libraries' logs to this program's logger, without repetitions.

    For a failed request, they log two lines for each of six attempts.

    Args:
      name: the requested name, as the user knows it.
    """
    # It is set up when it is first imported, which would undo this.
    with contextlib.suppress(ImportError):
        import huggingface_hub.utils.logging  # noqa: F401
    once = _Once(name)
    before = {}
    for library in _LIBRARIES:
        logger = logging.getLogger(library)
        before[logger] = logger.handlers, logger.propagate
        logger.handlers, logger.propagate = [once], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in before.items():
            logger.handlers, logger.propagate = handlers, propagate


class _Once(logging.Handler):
    """Passes on each warning once; of several attempts only the first."""

    def __init__(self, name):
        super().__init__(logging.WARNING)
        self._name, self._known = name, set()

    def emit(self, record):
        text = ' '.join(record.getMessage().split())
        if text.startswith(_NO_MATTER):
            return
        if found := _ATTEMPT.match(text):
            host = '/'.join(found['url'].split('/')[:3])
            text = f'{host} cannot be reached ({found["reason"][:200]}); trying again'
        if found := _CACHED.fullmatch(text):
            text = f'using the cached copy of {found["time"]}, in {found["place"]}'
        if text not in self._known:
            self._known.add(text)
            _LOGGER.warning(f'{self._name}: {text}')
