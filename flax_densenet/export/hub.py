"""Writes folders for the Hugging Face Hub, which timm can load.

    config.json         for timm, with our metadata
    model.safetensors   the weights, with timm's names
    README.md           the model card, with the header that the Hub reads
    statistics.safetensors
                        the score of unusual images and the sets of classes, if any

`timm.create_model('local-dir:FOLDER', pretrained=True)` computes the same logits, and
`weight_file.load(FOLDER)` reads the model with its metadata. `huggingface_hub` can
upload the folder.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.export import model_card
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import timm_config, weight_file
from flax_densenet.weights import trained as trained_lib

README_FILE = model_card.HUB_FILE
FILES = (timm_config.CONFIG_FILE, timm_config.WEIGHT_FILES[0], README_FILE)
OPTIONAL = (decisions_lib.STATISTICS_FILE,)


def write(
    folder: str,
    trained: trained_lib.Trained,
    write_weights: Callable[[str, trained_lib.Trained], None],
    *,
    readme: str | None = None,
    license: str | None = None,
):
    """Creates a folder with the files.

    Args:
      folder: a new folder.
      trained: the model.
      write_weights: called with a path and `trained`; writes our safetensors file.
      readme: the model card; by default one without facts about the run.
      license: license of the weights, for config.json and the default card.

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
    if trained.decisions:
        decisions_lib.save_statistics(folder, trained.decisions)
    if readme is None:
        readme = model_card.render(trained, license=license, hub=True)
    with open(os.path.join(folder, README_FILE), 'w', encoding='utf-8') as file:
        file.write(readme)


def _resolved_fields(trained):
    """The model with all preparation fields in its metadata."""
    preparation = trained_lib.preparation_of(trained.metadata)
    names = ('resize', 'crop_fraction', 'interpolation', 'channels', 'bit_depth')
    fields = {name: getattr(preparation, name) for name in names}
    fields['window'] = list(preparation.window or ())
    data = trained.metadata['data'] | fields
    return dataclasses.replace(trained, metadata=trained.metadata | {'data': data})


def _metadata_of(path) -> dict[str, Any]:
    """The metadata in one of our safetensors files."""
    import safetensors

    with safetensors.safe_open(path, 'numpy') as file:
        return json.loads(file.metadata()[weight_file.METADATA])


def _num_features(trained):
    return int(trained.variables['params']['classifier']['kernel'].shape[0])


def check(folder: str):
    """Checks that a folder does not exist, or that an export may replace it.

    Raises:
      UserError: the folder has content that this program did not write.
    """
    if not os.path.lexists(folder):
        return
    remedy = 'use another --out'
    if os.path.islink(folder) or not os.path.isdir(folder):
        raise UserError(f'--out={folder} exists and is not a folder; {remedy}')
    names = sorted(os.listdir(folder))
    for name in names:
        if name not in (*FILES, *OPTIONAL):
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
    """Moves a new file or folder into place, replacing an existing one.

    Args:
      made: the new file or folder, on the same disk, in a folder that will be removed.
      path: the destination.

    Raises:
      OSError: it cannot be moved; the existing file or folder then stays.
    """
    if not os.path.isdir(made) or not os.path.isdir(path):
        os.replace(made, path)
        return
    # A folder cannot replace one that is not empty.
    before = os.path.join(tempfile.mkdtemp(dir=os.path.dirname(made)), 'before')
    os.rename(path, before)
    try:
        os.rename(made, path)
    except OSError:
        os.rename(before, path)
        raise
