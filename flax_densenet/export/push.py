"""Uploads a folder to the Hugging Face Hub with `huggingface_hub`."""

import dataclasses
import os
import re
from typing import Any

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.export import hub as hub_folder
from flax_densenet.system import hub
from flax_densenet.weights import hub as hub_files
from flax_densenet.weights import timm_config

_NAME = re.compile(r'[\w.-]+/[\w.-]+')


@dataclasses.dataclass(frozen=True)
class Target:
    """A repository to upload to.

    Attributes:
      name: `OWNER/NAME`.
      private: whether only its owner can see it.
      exists: whether it exists already; its visibility then does not change.
    """

    name: str
    private: bool
    exists: bool

    @property
    def url(self) -> str:
        """The address of the repository's page."""
        return f'{hub.endpoint()}/{self.name}'


def find_target(name: str, *, private: bool) -> Target:
    """Looks up the repository before anything is exported.

    Args:
      name: `OWNER/NAME`.
      private: whether the repository must be private.

    Raises:
      UserError: the repository cannot be written to, or is public but must be private.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f'{name}: give the repository as OWNER/NAME')
    with errors.extra('hub', 'push'):
        import huggingface_hub
        from huggingface_hub import errors as hub_errors
    if hub.is_offline():
        raise UserError(f'push needs a network, which {hub.OFFLINE} forbids')
    if huggingface_hub.get_token() is None:
        raise UserError(
            'push needs a Hub token with write access: run `hf auth login`, or set '
            'the environment variable HF_TOKEN'
        )
    try:
        with hub.quiet(name):
            found = _api().model_info(name).private
    except hub_errors.GatedRepoError:
        found = private
    except hub_errors.RepositoryNotFoundError:
        return Target(name, private, False)
    except Exception as error:
        raise _explained(name, error) from error
    if private and not found:
        raise UserError(
            f'{name} exists and is public; make it private in its settings at '
            f'{hub.endpoint()}/{name}/settings, or leave --private out'
        )
    return Target(name, bool(found), True)


def list_files(folder: str) -> dict[str, int]:
    """`{name: bytes}` of the files in a folder that are uploaded.

    Raises:
      UserError: a required file is missing.
    """
    sizes = {}
    for name in hub_folder.FILES:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(
                f'{folder} has no {name}; write the folder with: export MODEL '
                f'{folder} --format=huggingface'
            )
        sizes[name] = os.path.getsize(path)
    for name in hub_folder.OPTIONAL:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            sizes[name] = os.path.getsize(path)
    return sizes


def describe(folder: str, target: Target) -> str:
    """Describes the upload: the repository, the card and the files."""
    sizes = list_files(folder)
    path = os.path.join(folder, hub_folder.README_FILE)
    with open(path, encoding='utf-8') as file:
        card = file.read().rstrip()
    where = 'private' if target.private else 'public: anyone can see and download it'
    state = f'exists; {where}' if target.exists else f'new; {where}'
    left = sorted(set(os.listdir(folder)) - sizes.keys())
    lines = [
        f'{hub_folder.README_FILE}:',
        *(f'  | {line}'.rstrip() for line in card.splitlines()),
        f'to {target.url} ({state}):',
        *(f'  {name}  {_bytes(size)}' for name, size in sizes.items()),
        f'  in all {_bytes(sum(sizes.values()))}',
    ]
    if left:
        lines.append(f'not sent: {errors.list_first(left)}')
    return '\n'.join(lines)


def _bytes(count):
    return f'{count / 1e6:.1f} MB' if count >= 10**5 else f'{count} bytes'


def send(folder: str, target: Target) -> str:
    """Uploads the files in one commit; creates the repository if necessary.

    Returns:
      The address of the commit.

    Raises:
      UserError: the Hub rejects the upload.
    """
    sizes = list_files(folder)
    title = f'Upload {timm_config.WEIGHT_FILES[0]} with flax_densenet'
    try:
        with hub.quiet(target.name):
            if not target.exists:
                _api().create_repo(target.name, private=target.private, exist_ok=True)
            done = _api().upload_folder(
                repo_id=target.name,
                folder_path=folder,
                allow_patterns=list(sizes),
                commit_message=title,
            )
    except Exception as error:
        raise _explained(target.name, error) from error
    return str(done.commit_url)


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi(endpoint=hub.endpoint(), library_name='flax_densenet')


def _explained(name, error):
    """A `UserError` for a known error of the library, else the error itself."""
    line = hub_files.explain(name, name, error)
    return error if line is None else UserError(line)
