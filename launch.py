"""Trains, evaluates and describes DenseNets.

  python launch.py --config=configs/densenet121.py --config.data.source=folder:photos
  python launch.py --mode=eval --workdir=ckpt/densenet121
  python launch.py --mode=summary --config=configs/cifar.py
  python launch.py --mode=export --workdir=ckpt/densenet121 --format=torch --out=x.pth

Any field of configs/base.py can be set: --config.optimizer.learning_rate=1e-3.
"""

import difflib
import glob
import os
import pathlib
import sys
import threading

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from flax_densenet import faults
from flax_densenet.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A file with get_config(); fields by --config.NAME=VALUE.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run; by default ckpt/<name of the config>. Of --mode=report also '
    'several: a,b or a pattern.',
)
_MODE = flags.DEFINE_string('mode', 'train', 'train, eval, report, summary or export.')
_FORMAT = flags.DEFINE_string(
    'format', 'safetensors', 'Of --mode=export: torch, safetensors or keras.'
)
_OUT = flags.DEFINE_string('out', None, 'File that --mode=export writes.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'One process of several: finds the others by the cluster.'
)

_BASE = pathlib.Path(__file__).parent / 'configs' / 'base.py'


def _plain(config):
    """A ConfigDict as nested dicts of plain values; tuples stay tuples."""
    fields = config.to_dict()
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }


def _train(config, workdir, overrides):
    from flax_densenet import signals, train

    if _DISTRIBUTED.value:  # each process would hear a signal at another step
        train.fit(config, workdir)
        return
    with signals.stop_gently() as stop:
        train.fit(config, workdir, stop=stop)


def _evaluate(config, workdir, overrides):
    """Measures the best checkpoint; only data.* fields can be changed."""
    from flax_densenet import results

    trained, path, fields = _load(config, workdir, overrides, 'eval')
    source, found, trained_on = _collect(trained, path, fields)
    which = f'weights of {path}'
    if trained.step is not None:
        which = (
            f'best checkpoint: epoch {trained.metadata["epoch"]}, step {trained.step}'
        )
    what = 'test images' if source.has_test or trained_on else 'images'
    where = f'{len(found.labels)} {what} of {fields["source"]}, {which}'
    results.save(workdir, found, {'data': fields['source'], 'model': which})
    print(results.format_figures(found, where))
    print(f'{results.EVAL_FILE} and {results.PREDICTIONS_FILE} are in {workdir}')


def _collect(trained, path, fields):
    """The data, what the model says of it, and whether it was trained on it."""
    from flax_densenet import results

    found = results.find_examples(trained, path, fields)
    source, examples, class_names, trained_on = found
    loading = {name: fields[name] for name in ('batch_size', 'threads', 'workers')}
    return (
        source,
        results.collect(trained, examples, class_names, **loading),
        trained_on,
    )


def _report(config, workdir, overrides):
    """Writes the page of a run, or one that compares the runs of several folders."""
    from flax_densenet import compare, page

    workdirs = _workdirs(workdir)
    if len(workdirs) > 1:
        path = _OUT.value or os.path.join(os.path.dirname(workdirs[0]), compare.FILE)
        compare.save(workdirs, path)
        print(f'{path}: {len(workdirs)} runs beside each other')
        return
    trained, path, fields = _load(config, workdirs[0], overrides, 'report')
    source, found, trained_on = _collect(trained, path, fields)
    path = page.save_report(workdirs[0], trained, source, found, trained_on=trained_on)
    print(f'{path}: open it in a browser')


def _workdirs(names):
    """The folders of `a,b` and of patterns such as `ckpt/*`; those without a run go."""
    if os.path.isdir(names):  # a comma or a star of its own name
        return [names]
    found = []
    for name in names.split(','):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        runs = [match for match in matches if glob.has_magic(name) and _is_run(match)]
        if glob.has_magic(name) and not runs:
            raise UserError(f'--workdir={name}: no folder of a run has such a name')
        found += runs or matches
    return found


def _is_run(folder):
    return os.path.isfile(os.path.join(folder, 'metrics.jsonl'))


def _load(config, workdir, overrides, mode):
    """A trained model, where it is from, and the data fields it is used with."""
    from flax_densenet import evaluate, sharding

    path = _trained_path(config, workdir)
    wrong = [n for n in overrides if not n.startswith(('data.', 'init_from'))]
    if wrong:
        raise UserError(
            f'--config.{wrong[0]}: --mode={mode} takes it from {path}; only data.* '
            'fields can be set'
        )
    mesh = sharding.make_mesh()
    trained = evaluate.load_trained(path, 'best', mesh=mesh)
    fields = {**config['data'], **trained.metadata['data']}
    fields |= {
        name.removeprefix('data.'): value
        for name, value in overrides.items()
        if name.startswith('data.')
    }
    fields['image_size'] = fields['image_size'] or trained.metadata['image_size']
    sharding.check_batch_size(fields['batch_size'], mesh)
    return trained, path, fields


def _trained_path(config, workdir):
    """The workdir where it has a checkpoint, else the weights of init_from."""
    from flax_densenet import checkpoint

    if config['init_from'] and not checkpoint.has_checkpoint(workdir):
        return config['init_from']
    return workdir


def _export(config, workdir, overrides):
    """Writes the best checkpoint, or init_from's weights, to one file."""
    from flax_densenet import evaluate, export

    if not _OUT.value:
        raise UserError('--mode=export needs --out=FILE')
    export.check_format(_OUT.value, _FORMAT.value)
    path = _trained_path(config, workdir)
    trained = evaluate.load_trained(path, 'best')
    export.save(_OUT.value, trained, _FORMAT.value)
    print(f'{_OUT.value}: the model of {path} for {_FORMAT.value}')


def _summarise(config, workdir, overrides):
    from flax_densenet import data, finetune, model, report, transfer, weights

    found = weights.load(config['init_from']) if config['init_from'] else None
    fields = transfer.settle_model(config['model'], found)
    images = transfer.settle_data(config['data'], found)
    size = images['image_size']
    if not size:
        kind = images['source'].partition(':')[0]
        size = data.DEFAULT_IMAGE_SIZES.get(kind, 224)
    # Made for 1000 classes unless there are weights, since a summary reads no data.
    classes = found.num_classes if found else 1000
    module = model.create_model(num_classes=classes, **fields)
    plan = finetune.make_plan(module, **finetune.plan_fields(config))
    shape = (size, size, images['channels'])
    print(f'{fields["variant"]} with {classes} classes')
    print(report.format_summary(module, shape, rates=plan.rates))
    if str(plan):
        print(plan)


MODES = {
    'train': _train,
    'eval': _evaluate,
    'report': _report,
    'summary': _summarise,
    'export': _export,
}


def _parse(argv):
    """Parses the flags; a wrong one is a UserError of one line."""
    files = [a for a in argv[1:] if a.startswith('--config=')]
    rest = [a for a in argv[1:] if not a.startswith('--config=')]
    if not files:
        files = [f'--config={_BASE}']
    path = files[-1].removeprefix('--config=').partition(':')[0]
    if not os.path.isfile(path):
        raise UserError(f'--config={path}: there is no such file')
    _check_field_names(rest)
    # ml_collections wants the file before the fields, and looks into sys.argv too.
    sys.argv = [argv[0], *files, *rest]
    try:
        left = flags.FLAGS(sys.argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(' '.join(str(error).split())) from error
    if len(left) > 1:
        raise UserError(f'{left[1]} is not a flag; flags start with --')
    if _MODE.value not in MODES:
        raise UserError(f'--mode={_MODE.value} is not known; use {", ".join(MODES)}')


def _check_field_names(arguments):
    """Raises for a --config.NAME that configs/base.py does not have."""
    config = base.get_config()
    sections = [name for name in config if isinstance(config[name], ConfigDict)]
    known = [name for name in config if name not in sections]
    known += [f'{name}.{field}' for name in sections for field in config[name]]
    for argument in arguments:
        name = argument.lstrip('-').partition('=')[0]
        if name.startswith('config.') and name.removeprefix('config.') not in known:
            close = difflib.get_close_matches(name.removeprefix('config.'), known)
            section = name.split('.')[1]
            fields = [n for n in known if n.startswith(section + '.')] or known
            raise UserError(
                f'--{name} is not a field; '
                + (f'did you mean {close[0]}? ' if close else '')
                + f'There are {", ".join(fields)}'
            )


def _set_up_jax():
    """Memory and compilation cache, before JAX starts its backend."""
    import jax

    from flax_densenet import cpu_kernels

    cpu_kernels.keep_memory()
    if _MODE.value == 'train' and _CONFIG.value.train.deterministic:
        before = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{before} --xla_gpu_deterministic_ops=true'.strip()
    # Keeps compiled steps for the next start; the environment's choice comes first.
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        cache = cpu_kernels.cache_folder() / 'xla'
        jax.config.update('jax_compilation_cache_dir', str(cache))
    if _MODE.value in ('train', 'eval', 'report') and jax.default_backend() == 'cpu':
        # The first time it is compiled for some seconds: begun here, it is ready when
        # the data is.
        threading.Thread(target=cpu_kernels.load, daemon=True).start()


def main(argv):
    """Runs the mode and returns the exit status.

    A user's mistake and a full disk or memory become one line and 2; Ctrl-C and SIGTERM
    give 130 and 143.
    """
    try:
        _parse(argv)
        if _DISTRIBUTED.value:
            import jax

            jax.distributed.initialize()
        _set_up_jax()
        name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
        workdir = _WORKDIR.value or os.path.join('ckpt', name.stem)
        overrides = config_flags.get_override_values(flags.FLAGS['config'])
        MODES[_MODE.value](_plain(_CONFIG.value), workdir, overrides)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(str(stopped) or 'stopped by Ctrl-C', file=sys.stderr)
        return getattr(stopped, 'exit_status', 130)
    except (MemoryError, OSError, RuntimeError) as error:
        if (line := faults.explain(error)) is None:
            raise
        print(f'error: {line}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
