"""The sections of the report on settings and on what to do next."""

import datetime
import shlex

from flax_densenet import settings
from flax_densenet.checkpoints import run_folder
from flax_densenet.data import images
from flax_densenet.report import render
from flax_densenet.system import program
from flax_densenet.weights import weight_file


def next_steps(workdir):
    """Commands for the next steps with a trained model, `[(what, command)]`."""
    folder = shlex.quote(workdir)
    return [
        (what, ' '.join([*program.words(), *parts]))
        for what, parts in (
            ('Predict the classes of other images', ['predict', folder, 'PHOTOS']),
            ('Try it in a browser', ['serve', folder]),
            ('Measure it on other labeled images', ['eval', folder, 'PHOTOS']),
            ('Export it for other programs', ['export', folder, '--out=model.onnx']),
            ('Compare it with other runs', ['report', folder, 'OTHER_RUN']),
        )
    ]


def changed(fields):
    """The settings that differ from their defaults."""
    usual = run_folder.flatten(settings.to_config(settings.from_config({})))
    # A run fills these in if they are open.
    filled = vars(images.Preparation()) | {
        'window': [],
        'mean': weight_file.IMAGENET_MEAN,
        'std': weight_file.IMAGENET_STD,
    }
    usual |= {
        f'data.{name}': value
        for name, value in filled.items()
        if usual.get(f'data.{name}', True) in (None, 0, '', ())
    }

    def plain(value):
        return list(value) if isinstance(value, tuple) else value

    return {
        name: value
        for name, value in fields.items()
        if plain(value) != plain(usual.get(name))
    }


def facts(run):
    """Hardware, software, time and cost of the training, by name."""
    found, environment = {}, run.environment
    if run.records:
        seconds = sum(row['seconds'] for row in run.records)
        found['Epochs'] = str(len(run.records))
        found['Training time'] = str(datetime.timedelta(seconds=round(seconds)))
        speed = run_folder.median(run.records, 'images_per_second')
        found['Training speed'] = f'{speed:,.1f} images/s (median epoch)'
        waited = run_folder.median(run.records, 'input_wait_share')
        found['Waiting for input'] = f'{render.percent(waited)} of the time'
        peak = max(row['peak_memory_gib'] for row in run.records)
        found['Peak memory'] = f'{peak:.2f} GiB'
    if environment:
        many = environment['devices']
        found['Device'] = environment['device'] + (f' × {many}' if many > 1 else '')
        named = {'system': 'System', 'python': 'Python', 'jax': 'JAX', 'flax': 'Flax'}
        found |= {
            title: environment[name]
            for name, title in named.items()
            if environment.get(name)
        }
        if commit := environment.get('commit'):
            edited = ', with local changes' if commit.endswith('+') else ''
            found['Code'] = f'commit {commit[:10]}{edited}'
    return found
