"""What the libraries of the Hub log, as lines of this program."""

import importlib
import logging
import sys

import pytest

from flax_densenet.system import hub

LOGGING = 'huggingface_hub.utils.logging'
ATTEMPT = "'no route' thrown while requesting HEAD https://hub.example/a/b/config.json"


def test_attempts_are_one_line(capfd, monkeypatch):
    """Also of the first request, while the library sets its logger up."""
    pytest.importorskip('huggingface_hub')
    logger = logging.getLogger('huggingface_hub')
    before = list(logger.handlers)
    monkeypatch.setattr(logger, 'handlers', [])
    monkeypatch.delitem(sys.modules, LOGGING, raising=False)
    with hub.quiet('hf:a/b'):
        importlib.import_module(LOGGING)
        for attempt in range(3):
            logging.getLogger('huggingface_hub.file').warning(ATTEMPT)
            logging.getLogger('huggingface_hub.file').warning(f'Retrying in {attempt}s')
        logging.getLogger('datasets.load').warning('Using the latest\ncached version')
        logging.getLogger('datasets.load').info('of no concern')
    out, err = capfd.readouterr()
    assert not err and out.splitlines() == [
        'hf:a/b: https://hub.example cannot be reached (no route); trying again',
        'hf:a/b: Using the latest cached version',
    ]
    assert len(logger.handlers) == 1  # the library's own
    logger.handlers = before
