"""Exports a trained model as a StableHLO program, which JAX runs without this package.

    from jax import export

    program = export.deserialize(open('birds.stablehlo', 'rb').read())
    probabilities = program.call(images)  # uint8 [n, 224, 224, 3]

With a score of unusual images, the program returns `(probabilities, unusual)`;
`results` in `metadata.json` names what it returns.

The file holds the output of `jax.export`, including the parameters, followed by a zip
archive with `metadata.json`: the class names and the preparation of images. JAX ignores
what follows its part, and zip readers ignore what precedes the archive.

    json.loads(zipfile.ZipFile('birds.stablehlo').read('metadata.json'))['class_names']

Newer JAX releases can read such a file for at least six months, and so can releases up
to three weeks older than the one that wrote it. Older ones often refuse it. To keep a
model for longer, keep the run or a weight file and export it again. A program contains
only arithmetic: it cannot read files or start programs, but it can use all the time and
memory of the machine, so only load files that you trust.
"""

import contextlib
import datetime
import json
import re
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.export import precision as precision_lib
from flax_densenet.inference import programs
from flax_densenet.models import folded
from flax_densenet.system import atomic
from flax_densenet.weights import trained as trained_lib

INPUTS = ('images', 'normalized')
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
METADATA = 'metadata.json'
# In bytes. The names of a million classes take about 16 MB.
_MOST_METADATA = 2**26
_WINDOW = (
    'read by the JAX that wrote it, by newer releases for at least 6 months, and by '
    'releases up to 3 weeks older'
)


def save(
    path: str,
    trained: trained_lib.Trained,
    *,
    inputs: str = 'images',
    precision: str = 'float32',
    any_size: bool = False,
):
    """Writes a trained model to a file, atomically.

    The program takes any number of images at a time and runs on CPUs, GPUs and TPUs.

    Args:
      path: the file.
      trained: the model.
      inputs: `images` or `normalized`.
        With `images`, the program maps uint8 images `[N, H, W, C]` from 0 to 255
        (uint16 from 0 to 65535 if the model uses more than 8 bits) to float32
        probabilities `[N, num_classes]`. It includes normalization and test-time
        augmentation.
        With `normalized`, it maps float32 images `[N, H, W, C]`, normalized as
        `(image / 255 - mean) / std`, to float32 logits `[N, num_classes]`.
        If the model has a score of unusual images, the program returns a tuple with
        the score, float32 `[N]`, as its second part.
      precision: precision of the stored kernels. `bfloat16` and `float16` halve the
        size of the file and lose digits. The program still computes in `model.dtype`.
      any_size: accept images of any height and width that the network supports, instead
        of only the model's image size; see `Network.takes_any_size`.

    Raises:
      UserError: the extra `export` is not installed, an argument is invalid, or a
        kernel has values that float16 cannot represent.
    """
    _check_installed()
    for name, value, known in (
        ('inputs', inputs, INPUTS),
        ('precision', precision, precision_lib.PRECISIONS),
    ):
        if value not in known:
            raise UserError(f'{name}={value} is not known; use {", ".join(known)}')
    if any_size and not trained.module.takes_any_size():
        raise UserError(
            'any_size=True is not possible for RDNet or with model.padding=same'
        )
    program = _export(trained, inputs, precision, any_size).serialize()
    metadata = _describe(trained, inputs, precision) | {'any_size': any_size}
    with atomic.replacing(path, 'w+b') as file:
        file.write(program)
        with zipfile.ZipFile(file, 'a', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(METADATA, json.dumps(metadata, indent=1))


def load(path: str) -> tuple[Callable[[Any], jax.Array], dict[str, Any]]:
    """Loads a file that `save` wrote.

    Returns:
      A function of images, in the form that `inputs` in the metadata names; it is
      compiled for each number of images. And the metadata of the model, with `inputs`,
      `results` (what the function returns: an array for one name, a tuple for two),
      `precision`, `written_with_jax`, `written_on` and `compatibility`, and, if there
      are conformal sets, `set_thresholds` as in ONNX files.

    Raises:
      UserError: the file does not exist or is corrupt, this JAX cannot read it, or
        `flatbuffers` is not installed.
    """
    _check_installed()
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(METADATA).file_size > _MOST_METADATA:
                raise ValueError(f'{METADATA} is too large')
            metadata = json.loads(archive.read(METADATA))
        if not isinstance(metadata, dict):
            raise ValueError(f'{METADATA} is not an object')
        with open(path, 'rb') as file:
            content = file.read()
    except FileNotFoundError as error:
        raise UserError(f'{path}: there is no such file') from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, RecursionError) as error:
        raise UserError(
            f'{path} is not a valid file of --format=stablehlo ({error})'
        ) from error
    from jax import export

    written_with = str(metadata.get('written_with_jax'))
    try:
        program = export.deserialize(bytearray(content))
        if _version(written_with) > _version(jax.__version__):
            program.mlir_module()  # takes seconds; raises if it is too new
    except Exception as error:  # flatbuffers and MLIR raise many kinds
        raise UserError(
            f'{path} cannot be read by JAX {jax.__version__}: it was written with JAX '
            f'{written_with}, and is {_WINDOW}'
        ) from error
    return jax.jit(program.call), metadata


def _version(text):
    return [int(number) for number in re.findall(r'\d+', text)[:3]]


def _check_installed():
    with errors.extra('export', '--format=stablehlo'):
        import flatbuffers  # noqa: F401


def _export(trained, inputs, precision, any_size=False):
    from jax import export

    module, preparation = trained.module, trained.preparation
    if 'kernel' in module.fields():
        module = module.clone(kernel='xla')  # only this package has the native kernel
    options = programs.options_of(trained)
    stored = _store(folded.fold(module, trained.variables), precision)
    stored |= programs.arrays_of(trained)
    score = options['unusual']

    def widen(array):
        wide = jnp.promote_types(array.dtype, jnp.float32)
        return jnp.asarray(array).astype(wide)

    def function(images):
        arrays = jax.tree.map(widen, stored)
        if inputs == 'images':
            found = programs.predict_probabilities(module, arrays, images, **options)
            return (
                found.probabilities
                if score is None
                else (found.probabilities, found.unusual)
            )
        maps = folded.features(module, arrays, images)
        pooled = module.apply(arrays['head'], maps, method='pool')
        logits = module.apply(arrays['head'], maps, method='head').astype(jnp.float32)
        finished = logits
        if trained.calibration:
            finished = trained.calibration.apply(logits, xp=jnp)
        if score is None:
            return finished
        known = score.with_arrays(arrays['unusual'])
        given = arrays['head'], known, pooled, logits
        return finished, programs.score_of(module, *given)

    (height, width), channels = preparation.shape, preparation.channels
    shape, constraints = f'batch, {height}, {width}, {channels}', ()
    if any_size:
        least = module.smallest_image_size()
        shape = f'batch, height, width, {channels}'
        constraints = (f'height >= {least}', f'width >= {least}')
    images = jax.ShapeDtypeStruct(
        export.symbolic_shape(shape, constraints=constraints),
        preparation.dtype if inputs == 'images' else jnp.float32,
    )
    with _without_places():
        return export.export(jax.jit(function), platforms=PLATFORMS)(images)


@contextlib.contextmanager
def _without_places():
    """Keeps source locations, with folders of this machine, out of the program."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update('jax_traceback_in_locations_limit', 0)
    try:
        yield
    finally:
        jax.config.update('jax_traceback_in_locations_limit', before)


def _store(arrays, precision):
    """Converts kernels to `precision`; small vectors stay."""

    def store(array):
        small = precision == 'float32' or np.ndim(array) < 2
        return array if small else precision_lib.convert(array, precision, 'a kernel')

    return jax.tree.map(store, arrays)


def _describe(trained, inputs, precision):
    decisions, more = trained.decisions, {}
    results = ['probabilities' if inputs == 'images' else 'logits']
    if decisions and decisions.unusual:
        results.append('unusual')
    if decisions and decisions.sets:
        more['set_thresholds'] = decisions.sets.table()
    return (
        trained.metadata
        | more
        | {
            'inputs': inputs,
            'results': results,
            'precision': precision,
            'written_with_jax': jax.__version__,
            'written_on': datetime.date.today().isoformat(),
            'compatibility': _WINDOW,
        }
    )
