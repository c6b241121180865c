"""Trains, evaluates, describes and uses DenseNets.

  python launch.py --config=configs/densenet121.py --config.data.source=folder:photos
  python launch.py --mode=eval --workdir=ckpt/densenet121
  python launch.py --mode=summary --config=configs/cifar.py
  python launch.py --mode=lr_find --config=configs/cifar.py
  python launch.py --mode=sweep --sweep='optimizer.learning_rate=1e-4,1e-3'
  python launch.py --mode=export --workdir=ckpt/densenet121 --format=torch --out=x.pth
  python launch.py --mode=predict --workdir=ckpt/densenet121 --files='photos/**/*.jpg'
  python launch.py --mode=serve --workdir=ckpt/densenet121
  python launch.py --mode=pack --config.data.source=folder:photos --out=packed

Any field of configs/base.py can be set: --config.optimizer.learning_rate=1e-3.
"""

import copy
import difflib
import functools
import os
import pathlib
import sys
import threading

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from flax_densenet import errors
from flax_densenet.distributed import processes
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
_MODE = flags.DEFINE_string(
    'mode',
    'train',
    'train, eval, report, predict, serve, lr_find, sweep, summary, export or pack.',
)
_FORMAT = flags.DEFINE_string(
    'format',
    None,
    'Of --mode=export: safetensors (default), torch, keras, onnx, stablehlo or '
    'huggingface. Of --mode=predict: csv or jsonl, by default as the name of --out '
    'ends, else table.',
)
_OUT = flags.DEFINE_string(
    'out',
    None,
    'File of --mode=export, of --mode=predict in place of the screen, or of the page '
    'of several runs; folder of --mode=pack.',
)
_FILES = flags.DEFINE_multi_string(
    'files',
    [],
    'Of --mode=predict: an image, a folder, a pattern with * or **, or - for names on '
    'standard input. May be given several times. Of --mode=export: images to try the '
    'file on, in place of those of data.source.',
)
_INPUTS = flags.DEFINE_string(
    'inputs',
    None,
    'Of --mode=export: images (uint8 to probabilities, the usual one of onnx and '
    'stablehlo) or normalized (floats to logits, of all other formats).',
)
_PRECISION = flags.DEFINE_string(
    'precision',
    'float32',
    'Of --mode=export: of the stored weights; float16 or bfloat16, half of the file; '
    'int8 computes in integers, of onnx.',
)
_TOP = flags.DEFINE_integer('top', 5, 'Classes that --mode=predict names an image.')
_EXPLAIN = flags.DEFINE_string(
    'explain', None, 'Folder for --mode=predict: a picture of where each class is seen.'
)
_EXPLAIN_CLASS = flags.DEFINE_string(
    'explain_class', None, 'What --explain looks for, else the most likely class.'
)
_FEATURES = flags.DEFINE_string(
    'features', None, 'File of --mode=predict for features: .npz or .safetensors.'
)
_LICENSES = {
    'license': flags.DEFINE_string(
        'license',
        None,
        "Of --mode=export: of the weights, as 'cc-by-4.0'; on the card.",
    ),
    'data_license': flags.DEFINE_string(
        'data_license', None, 'Of --mode=export: of the data; on the card.'
    ),
}
_HOST = flags.DEFINE_string(
    'host', '127.0.0.1', 'Of --mode=serve: 127.0.0.1 is for this machine alone.'
)
_PORT = flags.DEFINE_integer('port', 8000, 'Of --mode=serve; 0 takes a free one.')
_ALLOWED_HOSTS = flags.DEFINE_list(
    'allowed_hosts',
    [],
    'Of --mode=serve: names that a proxy passes on, as hub.example.org or '
    '*.example.org, separated by commas.',
)
_ROOT_PATH = flags.DEFINE_string(
    'root_path', '', 'Of --mode=serve: what a proxy puts before the paths.'
)
_LIMITS = {
    'max_megabytes': flags.DEFINE_float(
        'max_megabytes', 20.0, 'Of --mode=serve: largest file that is received.'
    ),
    'max_megapixels': flags.DEFINE_float(
        'max_megapixels', 64.0, 'Of --mode=serve: largest image that is decoded.'
    ),
    'max_requests': flags.DEFINE_integer(
        'max_requests', 32, 'Of --mode=serve: images received and computed at a time.'
    ),
    'request_timeout_s': flags.DEFINE_float(
        'request_timeout_s', 30.0, 'Of --mode=serve: time for an image to arrive.'
    ),
}
_PACKING = {
    'shard_mib': flags.DEFINE_float(
        'shard_mib', 256.0, 'Of --mode=pack: MiB (or 2048 images) that fill a shard.'
    ),
    'max_side': flags.DEFINE_integer(
        'max_side',
        0,
        'Of --mode=pack: images whose shorter side has more pixels are made so small '
        'and saved as JPEG; 0 keeps all files as they are.',
    ),
    'quality': flags.DEFINE_integer(
        'quality', 90, 'Of --mode=pack: of these JPEGs, 1 to 100.'
    ),
}
_STEPS = flags.DEFINE_integer('steps', 100, 'Of --mode=lr_find, 40 or more.')
_SWEEP = flags.DEFINE_multi_string(
    'sweep',
    [],
    'Of --mode=sweep: FIELD=VALUE,VALUE to try each; FIELD=LOW..HIGH to search, with '
    "--trials; 'FIELD=VALUE FIELD=VALUE; FIELD=VALUE' for fields that change together, "
    'or @FILE with such a set in each line. Several make a grid; train.seed=0,1,2 '
    'trains each setting with these seeds.',
)
_TRIALS = flags.DEFINE_integer(
    'trials', None, 'Of --mode=sweep: settings to search for, instead of the grid.'
)
_PRUNE = flags.DEFINE_string(
    'prune',
    'none',
    'Of --mode=sweep: median or halving end settings early that fall behind others.',
)
_RETRY = flags.DEFINE_bool(
    'retry_failed', False, 'Of --mode=sweep: trains settings again that failed.'
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    False,
    'One process of several, which the cluster starts, one a machine or a GPU: finds '
    f'the others by {processes.LAUNCHERS}, Open MPI 5 with mpi4py installed, '
    'Kubernetes with the package kubernetes; elsewhere --coordinator, '
    '--num_processes and --process_id tell. Under Slurm and Open MPI each process has '
    'one GPU. Of --mode=train, eval, report, predict, lr_find.',
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address',
    None,
    'Of --distributed: HOST:PORT of process 0, the same for all processes; or '
    'JAX_COORDINATOR_ADDRESS in the environment.',
)
flags.DEFINE_alias('coordinator', 'coordinator_address')
_PROCESSES = {
    'num_processes': flags.DEFINE_integer(
        'num_processes', None, 'Of --distributed: how many there are.'
    ),
    'process_id': flags.DEFINE_integer(
        'process_id', None, 'Of --distributed: which one this is, from 0.'
    ),
    'initialization_timeout': flags.DEFINE_integer(
        'initialization_timeout', 300, 'Of --distributed: seconds to wait for all.'
    ),
    'heartbeat_timeout_seconds': flags.DEFINE_integer(
        'heartbeat_timeout_seconds',
        30,
        'Of --distributed: a process that does not answer for so long ends the others.',
    ),
}

_BASE = pathlib.Path(__file__).parent / 'configs' / 'base.py'


def _plain(config):
    """A ConfigDict as nested dicts of plain values; tuples stay tuples."""
    fields = config.to_dict()
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }


def _train(config, workdir, overrides):
    from flax_densenet.system import signals
    from flax_densenet.train import fit

    with signals.stop_gently() as stop:
        fit.fit(config, workdir, stop=stop)


def _evaluate(config, workdir, overrides):
    """Measures the best checkpoint; only data.* fields can be changed."""
    from flax_densenet.evaluation import results
    from flax_densenet.models import tta as tta_lib

    trained, path, fields = _load(config, workdir, overrides, 'eval')
    source, found, trained_on = results.of_data(trained, path, fields)
    which = f'weights of {path}'
    if trained.step is not None:
        which = (
            f'best checkpoint: epoch {trained.metadata["epoch"]}, step {trained.step}'
        )
    which += tta_lib.describe(fields['tta'])
    what = 'test images' if source.has_test or trained_on else 'images'
    where = f'{len(found.labels)} {what} of {fields["source"]}, {which}'
    results.save(workdir, found, {'data': fields['source'], 'model': which})
    print(results.format_metrics_table(found, where))
    print(f'{results.EVAL_FILE} and {results.PREDICTIONS_FILE} are in {workdir}')


def _report(config, workdir, overrides):
    """Writes the page of a run or a sweep, or one that compares several runs."""
    from flax_densenet.evaluation import results
    from flax_densenet.report import compare, page
    from flax_densenet.sweeps import page as sweep_page
    from flax_densenet.sweeps import record as sweep_record

    workdirs = compare.find_runs(workdir)
    if len(workdirs) == 1 and sweep_record.is_sweep(workdirs[0]):
        sweep_page.save(workdirs[0], sweep_record.load(workdirs[0]))
        path = os.path.join(workdirs[0], sweep_page.FILE)
        print(f'{path}: open it in a browser')
        return
    if len(workdirs) > 1:
        if not processes.is_first():
            return
        path = _OUT.value or os.path.join(os.path.dirname(workdirs[0]), compare.FILE)
        compare.save(workdirs, path)
        print(f'{path}: {len(workdirs)} runs beside each other')
        return
    trained, path, fields = _load(config, workdirs[0], overrides, 'report')
    source, found, trained_on = results.of_data(trained, path, fields)
    path = page.save_report(workdirs[0], trained, source, found, trained_on=trained_on)
    print(f'{path}: open it in a browser')


def _load(config, workdir, overrides, mode):
    """A trained model, where it is from, and the data fields it is used with."""
    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.weights import trained as trained_lib

    path = _trained_path(config, workdir)
    _check_data_alone(overrides, path, mode)
    mesh = mesh_lib.make_mesh()
    trained = trained_lib.load_trained(path, 'best', mesh=mesh)
    fields, _ = _data_fields(config, trained, overrides)
    mesh_lib.check_batch_size(fields['batch_size'], mesh)
    return trained.with_tta(fields['tta']), path, fields


def _check_data_alone(overrides, path, mode):
    """Raises where anything is set that a trained model has decided."""
    wrong = [n for n in overrides if not n.startswith(('data.', 'init_from'))]
    if wrong:
        raise UserError(
            f'--config.{wrong[0]}: --mode={mode} takes it from {path}; only data.* '
            'fields can be set'
        )


def _data_fields(config, trained, overrides):
    """Of config.data: those of the model but for what is set, and what is set."""
    chosen = {
        name.removeprefix('data.'): value
        for name, value in overrides.items()
        if name.startswith('data.')
    }
    fields = {**config['data'], **trained.metadata['data'], **chosen}
    fields['image_size'] = fields['image_size'] or trained.metadata['image_size']
    return fields, chosen


def _trained_path(config, workdir):
    """The workdir where it has a checkpoint, else the weights of init_from."""
    from flax_densenet.checkpoints import reader as checkpoint_reader
    from flax_densenet.weights import weight_file

    start = config['init_from']
    if start and not checkpoint_reader.has_checkpoint(workdir):
        if not os.path.exists(os.path.expanduser(start)):
            raise UserError(f'--config.init_from={start}: there is no such file')
        return start
    if not weight_file.is_weights(workdir):
        checkpoint_reader.find_step(workdir, 'latest')  # raises where there is none
    return workdir


def _export(config, workdir, overrides):
    """Writes the best checkpoint, or weights of init_from, to a file that was tried."""
    from flax_densenet.export import formats, release
    from flax_densenet.weights import trained as trained_lib

    if not _OUT.value:
        raise UserError('--mode=export needs --out=FILE')
    file_format = _FORMAT.value or 'safetensors'
    options = formats.Options(
        _INPUTS.value, _PRECISION.value, license=_LICENSES['license'].value
    )
    formats.check_format(_OUT.value, file_format, options)
    path = _trained_path(config, workdir)
    _check_data_alone(overrides, path, 'export')
    trained = trained_lib.load_trained(path, 'best')
    shipped = release.Release(
        trained,
        None if trained.step is None else path,
        file_format,
        options,
        _LICENSES['data_license'].value,
    )
    shipped.check(_OUT.value)
    samples = _samples(config, path, trained, overrides)
    facts = release.run(_OUT.value, shipped, samples)
    print(f'{_OUT.value}: the model of {path}')
    for name, value in facts:
        print(f'  {name}: {value}')


def _samples(config, path, trained, overrides):
    """Images to try an exported file on: --files, the run's own, or scikit-learn's."""
    from flax_densenet.export import sample_images
    from flax_densenet.weights import trained as trained_lib

    integers = _PRECISION.value == 'int8'
    preparation = trained_lib.preparation_of(trained.metadata)
    if _FILES.value:
        return sample_images.of_files(_FILES.value, preparation)
    fields, chosen = _data_fields(config, trained, overrides)
    try:
        if 'source' in trained.metadata['data'] or 'source' in chosen:
            return sample_images.of_data(trained, path, fields, whole=integers)
    except UserError:
        if chosen or integers:
            raise
    if integers:
        raise UserError(
            '--precision=int8 looks at images to find the range of each feature map: '
            'add --config.data.source=folder:PHOTOS or --files=PATTERN'
        )
    return sample_images.of_library(preparation)


_OF_PREDICT = ('init_from', 'data.batch_size', 'data.threads', 'data.tta')


def _predict(config, workdir, overrides):
    """Predicts for --files; exit status 1 where some of them could not be read."""
    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.inference import multi_process, predictor

    path = _trained_path(config, workdir)
    wrong = [name for name in overrides if name not in _OF_PREDICT]
    if wrong:
        raise UserError(
            f'--config.{wrong[0]}: --mode=predict takes it from {path}; only '
            f'{", ".join(_OF_PREDICT[1:-1])} and {_OF_PREDICT[-1]} can be set'
        )
    for name in ('batch_size', 'threads'):
        if config['data'][name] < 1:
            raise UserError(f'data.{name}={config["data"][name]} must be at least 1')
    if not _FILES.value:
        raise UserError("--mode=predict needs --files=NAME, as 'photos/**/*.jpg'")
    if _EXPLAIN_CLASS.value is not None and not _EXPLAIN.value:
        raise UserError('--explain_class needs --explain=FOLDER')
    threads = config['data']['threads']

    def load():
        # Of several processes each predicts with its own devices.
        batch_size, mesh = config['data']['batch_size'], mesh_lib.make_local_mesh()
        tta = overrides.get('data.tta')
        return predictor.load_trained(path, batch_size=batch_size, mesh=mesh, tta=tta)

    if processes.is_first():
        failed = _write_predictions(load, threads)
    else:
        model, named = load(), _EXPLAIN_CLASS.value
        multi_process.serve(
            model,
            threads=threads,
            features=bool(_FEATURES.value),
            cams=bool(_EXPLAIN.value),
            cam_class=-1 if named is None else model.class_index(named),
        )
        failed = 0
    return 1 if processes.broadcast('failed', lambda: failed) else 0


def _write_predictions(load, threads):
    """Returns how many files could not be read."""
    from flax_densenet.inference import input_files, multi_process
    from flax_densenet.inference import outputs as outputs_lib

    input_files.check(_FILES.value)
    places = dict(explain=_EXPLAIN.value, features=_FEATURES.value)
    with outputs_lib.Outputs(
        out=_OUT.value, form=_FORMAT.value, top=_TOP.value, **places
    ) as outputs:
        model = load()
        if processes.count() > 1:
            model = multi_process.MultiProcessPredictor(model)
        return outputs_lib.run(
            model,
            input_files.find(_FILES.value, leave_out=_EXPLAIN.value),
            outputs,
            threads=threads,
            class_name=_EXPLAIN_CLASS.value,
            total=input_files.count(_FILES.value),
        )


def _serve(config, workdir, overrides):
    """Serves the best checkpoint, or init_from's weights, until it is told to end."""
    import jax

    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.serving import guard, server
    from flax_densenet.weights import trained as trained_lib

    path = _trained_path(config, workdir)
    wrong = [name for name in overrides if name != 'init_from']
    if wrong:
        raise UserError(f'--config.{wrong[0]}: --mode=serve takes it from {path}')
    server.check_installed()

    limits = guard.Limits(**{name: flag.value for name, flag in _LIMITS.items()})
    # Before the model is loaded, since a port may be taken.
    listener = server.listen(_HOST.value, _PORT.value)
    access = server.make_access(listener, _ALLOWED_HOSTS.value, _ROOT_PATH.value)
    # One device: a batch of a few images does not divide over several.
    mesh = mesh_lib.make_mesh(jax.local_devices()[:1])
    trained = trained_lib.load_trained(path, 'best', mesh=mesh)
    name = pathlib.Path(path).resolve().name
    server.run(trained, listener, name=name, limits=limits, access=access)


def _find_learning_rate(config, workdir, overrides):
    from flax_densenet.train import lr_finder

    lr_finder.find(config, workdir, steps=_STEPS.value)


def _sweep(config, workdir, overrides):
    """Trains a grid of settings, or searches for them."""
    from flax_densenet.sweeps import runner as sweep_runner
    from flax_densenet.system import signals

    shared = copy.deepcopy(_CONFIG.value)
    if 'train.report' not in overrides:  # a page for each run, some seconds each
        shared.train.report = False
    if not _WORKDIR.value:
        workdir += '-sweep'
    given = [a for a in sys.argv[1:] if a.lstrip('-').startswith('config')]
    given = [a for a in given if a != f'--config={_BASE}']
    with signals.stop_gently() as stop:
        sweep_runner.run(
            _plain(shared),
            workdir,
            _SWEEP.value,
            override=functools.partial(_override, shared),
            trials=_TRIALS.value,
            prune=_PRUNE.value,
            retry=_RETRY.value,
            arguments=given,
            stop=stop,
        )


def _override(config, fields):
    """A config with some fields changed, by name as text, as flags change them."""
    arguments = [f'--config.{name}={text}' for name, text in fields.items()]
    values, config = flags.FlagValues(), copy.deepcopy(config)
    try:
        _check_field_names(arguments)
        config_flags.DEFINE_config_dict(
            'config', config, flag_values=values, sys_argv=['', *arguments]
        )
        values(['', *arguments])
    except (flags.Error, TypeError, ValueError) as error:  # UserError is one too
        said = ' '.join(str(error).removeprefix('flag ').split())
        raise UserError(f'--sweep: {said.replace("--config.", "")}') from error
    return _plain(config)


_OF_PACK = ('data.source', 'data.labels', 'data.bad_images', 'data.threads')


def _pack(config, workdir, overrides):
    """Packs folder:PATH or tar:PATH into --out; checks packed:DIR, without --out."""
    from flax_densenet.data.packed import manifest
    from flax_densenet.data.packed import plan as pack_plan
    from flax_densenet.data.packed import writer as pack_writer

    wrong = [name for name in overrides if name not in _OF_PACK]
    if wrong:
        raise UserError(
            f'--config.{wrong[0]}: has no effect on --mode=pack; only '
            f'{", ".join(_OF_PACK)} can be set'
        )
    fields = config['data']
    kind, _, name = fields['source'].partition(':')
    if kind == 'packed' and not _OUT.value:
        print(
            f'{name}: all files are intact; '
            f'{manifest.describe(pack_writer.verify(name))}'
        )
        return
    if not _OUT.value:
        raise UserError('--mode=pack needs --out=FOLDER')
    if not 1 <= fields['threads'] <= 1024:
        raise UserError(f'data.threads={fields["threads"]} must be from 1 to 1024')
    if fields['bad_images'] not in ('error', 'skip'):
        raise UserError(
            f'data.bad_images={fields["bad_images"]} is not known; use error, skip'
        )
    packing = pack_plan.Options(**{name: flag.value for name, flag in _PACKING.items()})
    names = ('labels', 'bad_images', 'threads')
    made = pack_writer.pack(
        fields['source'],
        _OUT.value,
        options=packing,
        **{name: fields[name] for name in names},
    )
    print(f'{_OUT.value}: {manifest.describe(made)}')
    print(f'use it with --config.data.source=packed:{_OUT.value}')


def _summarize(config, workdir, overrides):
    from flax_densenet.data import dataset
    from flax_densenet.models import factory, summary
    from flax_densenet.train import finetune
    from flax_densenet.weights import transfer, weight_file

    found = weight_file.load(config['init_from']) if config['init_from'] else None
    fields = transfer.resolve_model(config['model'], found)
    images = transfer.resolve_data(config['data'], found)
    size = images['image_size']
    if not size:
        kind = images['source'].partition(':')[0]
        size = dataset.DEFAULT_IMAGE_SIZES.get(kind, 224)
    # Made for 1000 classes unless there are weights, since a summary reads no data.
    classes = found.num_classes if found else 1000
    module = factory.create_model(num_classes=classes, **fields)
    plan = finetune.make_plan(module, **finetune.plan_fields(config))
    shape = (size, size, images['channels'])
    print(f'{fields["variant"]} with {classes} classes')
    print(summary.format_summary(module, shape, rates=plan.rates))
    if str(plan):
        print(plan)


_ALONE = ('summary', 'export', 'serve', 'sweep')  # of MODES, those for one process
MODES = {
    'train': _train,
    'eval': _evaluate,
    'report': _report,
    'summary': _summarize,
    'export': _export,
    'predict': _predict,
    'serve': _serve,
    'lr_find': _find_learning_rate,
    'sweep': _sweep,
    'pack': _pack,
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
        said = str(error).strip()
        if 'Traceback' in said:  # of a config that raised
            *before, said = said.splitlines()
            if said.startswith('ValueError: '):  # its argument, which it refuses
                said = said.removeprefix('ValueError: ')
            elif place := [line for line in before if line.startswith('  File ')]:
                said = f'{said} ({place[-1]})'
            said = f'{files[-1]}: {said}'
        raise UserError(' '.join(said.split())) from error
    if len(left) > 1:
        hint = 'flags start with --'
        if _FILES.value:  # the shell took the pattern for its own
            hint = "a pattern of --files stands in quotes: --files='photos/*.jpg'"
        raise UserError(f'{left[1]} is not a flag; {hint}')
    if _MODE.value not in MODES:
        raise UserError(f'--mode={_MODE.value} is not known; use {", ".join(MODES)}')
    if _SWEEP.value and _MODE.value != 'sweep':
        raise UserError('--sweep needs --mode=sweep')
    if not _DISTRIBUTED.value:
        given = _COORDINATOR, _PROCESSES['num_processes'], _PROCESSES['process_id']
        if any(flag.value is not None for flag in given):
            raise UserError('--coordinator and its like need --distributed')
    elif _MODE.value in _ALONE:
        raise UserError(
            f'--distributed: --mode={_MODE.value} is one process; start it without'
        )


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

    from flax_densenet.kernels import cpu as cpu_kernels

    cpu_kernels.keep_memory()
    training = _MODE.value in ('train', 'sweep')
    if training and _CONFIG.value.train.deterministic:
        before = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{before} --xla_gpu_deterministic_ops=true'.strip()
    # Keeps compiled steps for the next start; the environment's choice comes first.
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        cache = cpu_kernels.cache_folder() / 'xla'
        jax.config.update('jax_compilation_cache_dir', str(cache))
    # By default what compiles within a second is not kept: prediction's programs.
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
    if (
        _MODE.value not in ('summary', 'export', 'pack')
        and jax.default_backend() == 'cpu'
    ):
        # The first time it is compiled for some seconds: begun here, it is ready when
        # the data is.
        threading.Thread(target=cpu_kernels.load, daemon=True).start()


def main(argv):
    """Runs the mode; returns the exit status.

    A user's mistake and a full disk or memory become one line and 2; Ctrl-C gives 130,
    SIGTERM 143 and a reader that went away (`| head`) 141, as shells name them. With
    several processes all of them end with the line and the status of the first that
    fails; one that dies without a word ends the others with 2.
    """
    # Names of files need not be text; a line about one must not end the run.
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')
    status, line = 0, ''
    try:
        status = _run(argv) or 0
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except UserError as error:
        status, line = 2, f'error: {error}'
    except KeyboardInterrupt as stopped:
        status = getattr(stopped, 'exit_status', 130)
        line = str(stopped) or 'interrupted'
    except BrokenPipeError:
        # What is still to be flushed at the end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.end(141, 'the reader of standard output went away')
        return 141
    except (MemoryError, OSError, RuntimeError) as error:
        if (said := errors.explain_system_error(error)) is None:
            raise
        status, line = 2, f'error: {said}'
    if line and (processes.is_first() or line.startswith('error: ')):
        print(line, file=sys.stderr)
    processes.end(status, line)
    return status


def _run(argv):
    _parse(argv)
    if _DISTRIBUTED.value:
        processes.start(
            coordinator_address=_COORDINATOR.value,
            **{name: flag.value for name, flag in _PROCESSES.items()},
        )
    _set_up_jax()
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
    workdir = _WORKDIR.value or os.path.join('ckpt', name.stem)
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    return MODES[_MODE.value](_plain(_CONFIG.value), workdir, overrides)


if __name__ == '__main__':
    with processes.Defects():
        ended = main(sys.argv)
    sys.exit(ended)
