"""Folders as the Hugging Face Hub has them: what timm loads, and all that we know.

    config.json         for timm, and our own metadata
    model.safetensors   the weights, under timm's names
    README.md           the model card, with the header that the Hub reads

`timm.create_model('local-dir:FOLDER', pretrained=True)` gives the same logits, and
`weight_file.load(FOLDER)` what was saved. `huggingface_hub` can upload the folder as
it is.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.export import model_card
from flax_densenet.weights import timm_config, weight_file
from flax_densenet.weights import trained as trained_lib

README_FILE = model_card.HUB_FILE
FILES = (timm_config.CONFIG_FILE, timm_config.WEIGHT_FILES[0], README_FILE)


def write(
    folder: str,
    trained: trained_lib.Trained,
    write_weights: Callable[[str, trained_lib.Trained], None],
    *,
    readme: str | None = None,
    license: str | None = None,
):
    """Makes a folder with the three files.

    Args:
      folder: not there yet.
      write_weights: called with a path and `trained`; writes a safetensors file of ours
        there.
      readme: the model card; by default one without the run's workdir.
      license: of the weights, for config.json and that card.

    Raises:
      UserError: the format cannot hold the model.
    """
    trained = _resolved_fields(trained)
    os.mkdir(folder)
    path = os.path.join(folder, timm_config.WEIGHT_FILES[0])
    write_weights(path, trained)
    config = timm_config.make(
        trained.module,
        _metadata_of(path),
        trained_lib.preparation_of(trained.metadata),
        num_features=_num_features(trained),
        license=license,
    )
    with open(os.path.join(folder, timm_config.CONFIG_FILE), 'w') as file:
        json.dump(config, file, indent=2)
        file.write('\n')
    if readme is None:
        readme = model_card.render(trained, license=license, hub=True)
    with open(os.path.join(folder, README_FILE), 'w', encoding='utf-8') as file:
        file.write(readme)


def _resolved_fields(trained):
    """A trained model that says of every field how images are prepared."""
    preparation = trained_lib.preparation_of(trained.metadata)
    names = ('resize', 'crop_fraction', 'interpolation', 'channels')
    fields = {name: getattr(preparation, name) for name in names}
    data = trained.metadata['data'] | fields
    return dataclasses.replace(trained, metadata=trained.metadata | {'data': data})


def _metadata_of(path) -> dict[str, Any]:
    """What was embedded in a file of ours."""
    import safetensors

    with safetensors.safe_open(path, 'numpy') as file:
        return json.loads(file.metadata()[weight_file.METADATA])


def _num_features(trained):
    return int(trained.variables['params']['classifier']['kernel'].shape[0])


def check(folder: str):
    """Raises where a folder is there that `place` would not replace.

    Raises:
      UserError: it holds something that this program did not write.
    """
    if not os.path.lexists(folder):
        return
    remedy = 'use another --out'
    if os.path.islink(folder) or not os.path.isdir(folder):
        raise UserError(f'--out={folder} is there, and no folder; {remedy}')
    names = sorted(os.listdir(folder))
    for name in names:
        if name not in FILES:
            raise UserError(
                f'--out={folder} holds {name}, which an export would remove; {remedy}'
            )
    config = os.path.join(folder, timm_config.CONFIG_FILE)
    if names and not (
        os.path.isfile(config) and timm_config.OURS in timm_config.read(config)
    ):
        raise UserError(f'--out={folder} was not exported by this program; {remedy}')
    model_card.check(os.path.join(folder, README_FILE))


def place(made: str, path: str):
    """Moves a file or folder that was made to its place, over one of before.

    Args:
      made: on the same disk, in a folder that will be removed.

    Raises:
      OSError: it cannot be moved; what was there is there again.
    """
    if not os.path.isdir(made) or not os.path.isdir(path):
        os.replace(made, path)
        return
    # A folder cannot take the place of one that is not empty.
    before = os.path.join(tempfile.mkdtemp(dir=os.path.dirname(made)), 'before')
    os.rename(path, before)
    try:
        os.rename(made, path)
    except OSError:
        os.rename(before, path)
        raise
