"""Downloads folders of weights from the Hugging Face Hub with `huggingface_hub`.

That library keeps them in its cache and handles the token, `HF_ENDPOINT` and
`HF_HUB_OFFLINE`.
"""

import logging
import os
import re

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.system import hub as hub_lib
from flax_densenet.weights import decisions, download, timm_config

_LOGGER = logging.getLogger(__name__)
_SHA256 = re.compile('[0-9a-f]{64}')


def fetch(repo: str, revision: str | None = None) -> str:
    """Downloads `config.json` and the weights of a repository; returns their folder.

    For models of this program it also downloads the statistics, if there are any.

    Args:
      repo: `OWNER/NAME`.
      revision: a branch, a tag or a commit; None for the default branch.

    Raises:
      UserError: huggingface_hub is not installed, or the files cannot be downloaded.
    """
    name = f'hf:{repo}' + (f'@{revision}' if revision else '')
    with errors.extra('hub', name):
        import huggingface_hub
        from huggingface_hub import errors as hub_errors

    def get(file, revision):
        with hub_lib.quiet(name):
            return huggingface_hub.hf_hub_download(
                repo,
                file,
                revision=revision,
                library_name='flax_densenet',
                endpoint=hub_lib.endpoint(),
            )

    try:
        folder = os.path.dirname(get(timm_config.CONFIG_FILE, revision))
        # From the same commit, even if the branch moves meanwhile.
        commit = os.path.basename(folder)
        for file in timm_config.WEIGHT_FILES:
            try:
                _check_digest(name, get(file, commit))
                break
            except hub_errors.LocalEntryNotFoundError:
                raise
            except hub_errors.EntryNotFoundError:
                continue
        else:
            wanted = ' or '.join(timm_config.WEIGHT_FILES)
            raise UserError(f'{name} has a config.json but no {wanted}; use another')
        config = timm_config.read(os.path.join(folder, timm_config.CONFIG_FILE))
        if timm_config.has_statistics(config):
            _check_digest(name, get(decisions.STATISTICS_FILE, commit))
    except UserError:
        raise
    except Exception as error:
        line = explain(name, repo, error)
        if line is None:
            raise
        raise UserError(line) from error
    _LOGGER.info(f'{name}: commit {commit[:12]}, in {folder}')
    return folder


def _check_digest(name, path):
    """Raises unless the SHA-256 of a file matches its name in the cache."""
    known = os.path.basename(os.path.realpath(path))
    if _SHA256.fullmatch(known) and (found := download.digest(path)) != known:
        place = os.path.realpath(path)
        raise UserError(
            f'{name}: the SHA-256 of {place} is {found}, not that of its name; remove '
            'it, and the next call downloads it again'
        )


def explain(name: str, repo: str, error: Exception) -> str | None:
    """The message for an error from huggingface_hub; None for any other error."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    page = f'{hub_lib.endpoint()}/{repo}'
    login = hub_lib.LOGIN
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, hub_errors.GatedRepoError):
        return f'{name} is gated: accept its terms at {page}, and log in with {login}'
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f'{name}: there is no such repository at {hub_lib.endpoint()}, or it is '
            f'private: log in with {login}'
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f'{name}: it has no such branch, tag or commit; see {page}'
    if isinstance(error, hub_errors.HFValidationError):
        return f'{name}: give hf:OWNER/NAME or hf:OWNER/NAME@REVISION'
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        why = f'{page} cannot be reached'
        if hub_lib.is_offline():
            why = f'{hub_lib.OFFLINE} forbids downloading {page}'
        return (
            f'{name} is not in the cache {constants.HF_HUB_CACHE}, and {why}; download '
            f'it elsewhere with `hf download {repo} --local-dir=FOLDER`, and give that '
            'folder instead of the name'
        )
    if isinstance(error, hub_errors.EntryNotFoundError):
        return (
            f'{name} has no {timm_config.CONFIG_FILE}; only folders in the format of '
            'timm or of this program can be read'
        )
    if isinstance(error, hub_errors.HfHubHTTPError):
        if status in (401, 403):
            return f'{name}: {page} refuses it ({status}); log in with {login}'
        text = ' '.join(str(error).split())[:200]
        return f'{name}: {page} answers {status or text}; try again later'
    if isinstance(error, OSError) or type(error).__module__.startswith(
        ('httpx', 'httpcore', 'requests', 'urllib3')
    ):
        text = ' '.join(str(error).split())[:300] or type(error).__name__
        return f'{name}: {text}; try again: nothing incomplete is kept'
    return None
