"""Small settings, images and models, and readers of runs' files."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from configs import base
from flax_densenet import create_model, init_variables
from flax_densenet import settings as settings_lib
from flax_densenet.data import pipeline
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.report import finished, plots
from flax_densenet.train import fit, training_run
from flax_densenet.weights import trained as trained_lib

# Everything that could depend on where a run stops is switched on.
HARD = {
    'model.dropout_rate': 0.1,
    'model.drop_path_rate': 0.3,
    'data.augment': 'shift_flip',
    'data.batch_size': 100,
    'data.test_fraction': 0.7,
    'optimizer.name': 'lamb',
    'optimizer.decay': 'kernels',
    'optimizer.weight_decay': 0.02,
    'optimizer.schedule': 'one_cycle',
    'train.loss': 'focal',
    'train.label_smoothing': 0.1,
    'train.ema': 0.6,
    'train.epochs': 5,
}


def write_images(root, counts, *, size=(40, 30), seed=0):
    """Writes `root/CLASS/N.jpg`, `counts` per class; each class has its own color."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 80, (size[1], size[0], 3), np.uint8)
            pixels[..., number % 3] += 150
            Image.fromarray(pixels).save(root / name / f'{index:03}.jpg')
    return root


def plain(config):
    """Converts a config to dicts, as `fit` expects."""
    return {
        name: value.to_dict() if hasattr(value, 'to_dict') else value
        for name, value in config.items()
    }


def tiny_config(**overrides):
    """configs/base.py with a network that compiles in seconds, on 8x8 digits."""
    config = base.get_config()
    config.model.variant = 'BC-L10k4'
    config.data.image_size = 8
    config.data.batch_size = 128
    config.optimizer.learning_rate = 3e-3
    config.train.epochs = 2
    config.train.tensorboard = False
    config.train.report = False
    config.update_from_flattened_dict(overrides)
    # Not if other weights define the network.
    if config.model.variant is not None and 'model.block_sizes' not in overrides:
        config.model.block_sizes = (1, 1)
    return plain(config)


def train_with_pages(config, workdir):
    """Trains, and writes pictures and the report, like the command."""
    result = fit.fit(config, str(workdir), save_samples=plots.save_samples)
    finished.write(str(workdir), **result.report_options())
    return result


def change_settings(run, **fields):
    """Changes settings of a prepared run, by name."""
    config = settings_lib.to_config(run.settings)
    for field, value in fields.items():
        section, _, name = field.partition('.')
        config[section][name] = value
    run.settings = settings_lib.from_config(config)


def tiny_trained(source, *, seed=0, **metadata):
    """A `trained.Trained` with initial parameters, as if trained on `source`."""
    mesh = mesh_lib.make_mesh()
    module = create_model(
        'BC-L10k4', num_classes=len(source.class_names), block_sizes=(1, 1)
    )
    return trained_lib.Trained(
        module=module,
        variables=mesh_lib.replicate(init_variables(module, seed), mesh),
        metadata={
            'model': {'variant': 'BC-L10k4', 'block_sizes': [1, 1]},
            'class_names': list(source.class_names),
            'image_size': source.train.image_size,
            'mean': [0.5, 0.4, 0.3],
            'std': [0.2, 0.25, 0.3],
            'data': {'source': source.name},
            'multi_label': source.multi_label,
            'epoch': 3,
        }
        | metadata,
        metrics={},
        step=7,
        mesh=mesh,
    )


def make_weights(path, *, classes=3, scale=1.0, **metadata):
    """Writes a weight file of this package with an untrained network."""
    from flax_densenet.export import formats

    module = create_model('BC-L10k4', num_classes=classes)
    variables = jax.tree.map(lambda x: x * scale, init_variables(module, 0))
    metadata = {
        'model': {'variant': 'BC-L10k4'},
        'class_names': [f'class {n}' for n in range(classes)],
        'image_size': 12,
        'mean': [0.5] * 3,
        'std': [0.2] * 3,
        'data': {'mean': [0.5] * 3, 'std': [0.2] * 3, 'channels': 3},
    } | metadata
    mesh = mesh_lib.make_mesh()
    trained = trained_lib.Trained(module, variables, metadata, {}, None, mesh)
    formats.save(str(path), trained, 'safetensors')
    return str(path)


def final_arrays(workdir):
    """Everything in the latest checkpoint, read without this package."""
    folders = (workdir / 'checkpoints').iterdir()
    latest = max(int(path.name) for path in folders if path.name.isdigit())
    folder = workdir.absolute() / 'checkpoints' / str(latest)
    with ocp.StandardCheckpointer() as checkpointer:
        return latest, {
            name: checkpointer.restore(folder / name) for name in ('model', 'train')
        }


def read_records(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_equal_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


class Stopped(Exception):
    pass


def stop_after(monkeypatch, steps):
    """Makes the next call of `fit` raise `Stopped` after this many steps."""
    make = pipeline.train_batches

    def train_batches(*args, **kwargs):
        class Batches:
            def __init__(self):
                self.inner = make(*args, **kwargs)
                self.left = steps

            def __next__(self):
                self.left -= 1
                if self.left < 0:
                    raise Stopped
                return next(self.inner)

            def close(self):
                self.inner.close()

        return Batches()

    monkeypatch.setattr(pipeline, 'train_batches', train_batches)


def reuse_steps(monkeypatch):
    """Makes runs with the same settings and devices share a compiled step."""
    compile_step, made = training_run.compile_step, {}

    def reuse(run, state, frozen, start=0):
        shapes = training_run.example_shapes(run, start)
        key = run.module, run.mesh, frozen, run.settings, str(shapes)
        if key not in made:
            made[key] = compile_step(run, state, frozen, start)
        return made[key]

    monkeypatch.setattr(training_run, 'compile_step', reuse)
