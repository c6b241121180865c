"""`predict`: classes and probabilities for image files."""

import sys

from flax_densenet.cli import arguments, options, trained_model
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError


def run(invocation: options.Invocation) -> int:
    """Predicts; exit status 1 if some of the files could not be read."""
    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.inference import multi_process, predictor

    flags, data = invocation.flags, invocation.fields['data']
    path = trained_model.find(invocation)
    chosen = trained_model.choices(invocation)
    trained_model.check_fields(
        invocation,
        path,
        *('data.batch_size', 'data.threads', 'data.tta'),
        *(f'data.{name}' for name in chosen.data),
    )
    for name in ('batch_size', 'threads'):
        if data[name] < 1:
            raise UserError(f'data.{name}={data[name]} must be at least 1')
    if not flags.files:
        raise UserError('predict needs images: predict MODEL FILES...')
    if flags.explain_class is not None and not flags.explain:
        raise UserError('--explain_class needs --explain=FOLDER')
    how = options.explain_options(invocation, needs='explain')

    def load():
        # Each of several processes predicts with its own devices.
        mesh, tta = mesh_lib.make_local_mesh(), invocation.overrides.get('data.tta')
        return predictor.load_trained(
            path,
            batch_size=data['batch_size'],
            mesh=mesh,
            tta=tta,
            precision=flags.precision,
            choices=chosen,
        )

    if processes.is_first():
        failed = _write(invocation, load, data['threads'], how)
    else:
        model, named = load(), flags.explain_class
        multi_process.serve(
            model,
            threads=data['threads'],
            features=bool(flags.features),
            cams=bool(flags.explain),
            cam_class=-1 if named is None else model.class_index(named),
            how=how,
        )
        failed = 0
    return 1 if processes.broadcast('failed', lambda: failed) else 0


def _write(invocation, load, threads, how):
    """Returns how many files could not be read."""
    from flax_densenet.inference import input_files, multi_process
    from flax_densenet.inference import outputs as outputs_lib

    flags = invocation.flags
    input_files.check(flags.files)
    places = {name: invocation.path(name) for name in ('out', 'explain', 'features')}
    with outputs_lib.Outputs(
        form=flags.format, top=flags.top, coverage=flags.coverage, **places
    ) as outputs:
        model = load()
        if processes.count() > 1:
            model = multi_process.MultiProcessPredictor(model)
        failed = outputs_lib.run(
            model,
            input_files.find(
                flags.files,
                leave_out=places['explain'],
                outputs=[p for p in (places['out'], places['features']) if p],
            ),
            outputs,
            threads=threads,
            class_name=flags.explain_class,
            how=how,
            total=input_files.count(flags.files),
        )
    for name, what in (
        ('out', 'predictions'),
        ('explain', 'heat maps'),
        ('features', 'features'),
    ):
        if places[name]:
            print(f'{what}: {places[name]}', file=sys.stderr)
    return failed


def _place(positionals):
    model, *files = positionals
    return arguments.place_model([model]) + [('files', name) for name in files]


COMMAND = options.Command(
    'predict',
    'Predict the classes of image files.',
    run,
    usage='MODEL FILES...',
    details=(
        'MODEL is the folder of a run, a file of weights or a folder of the Hugging '
        'Face Hub. FILES are images, folders (searched for images at any depth), '
        "patterns such as 'photos/**/*.jpg', or - to read names from standard input. "
        'The exit status is 1 if some files could not be read; the rest are predicted.',
    ),
    examples=(
        ('a table on the screen', 'predict ckpt/birds photos more.jpg'),
        ('a CSV file', 'predict ckpt/birds photos --out=birds.csv --top=1'),
        (
            'sets of classes that are right for 90% of images',
            'predict ckpt/birds photos --coverage=0.9',
        ),
        ('heat maps (Grad-CAM)', 'predict ckpt/birds photos --explain=maps'),
        (
            'finer heat maps',
            'predict ckpt/birds photos --explain=maps --explain_method=layercam',
        ),
        ('weights of another program', 'predict densenet121.pth photos'),
    ),
    flags={
        'Model and images': (
            options.WORKDIR,
            *options.OF_WEIGHTS,
            options.RAW,
            options.PRECISION,
            options.Flag(
                'files',
                'Image, folder, pattern, or - for names on standard input. Can be '
                'given several times.',
                kind=list,
                value='FILES',
            ),
        ),
        'Output': (
            options.Flag(
                'out',
                'File for the predictions.',
                value='FILE',
                default_text='the screen',
                is_path=True,
            ),
            options.Flag(
                'format',
                'table, csv or jsonl.',
                value='FORMAT',
                default_text='as the file ends: .csv, .jsonl or .txt (a table)',
            ),
            options.Flag(
                'top', 'Classes to list per image.', kind=int, default=5, value='N'
            ),
            options.COVERAGE,
            options.Flag(
                'explain',
                'Folder for one heat map per image, which shows where the class is '
                'seen.',
                value='FOLDER',
                is_path=True,
            ),
            options.Flag(
                'explain_class',
                'Class to explain with --explain.',
                value='CLASS',
                default_text='the predicted class',
            ),
            *options.EXPLAIN,
            options.Flag(
                'features',
                'File for the features of each image, .npz or .safetensors.',
                value='FILE',
                is_path=True,
            ),
        ),
    }
    | options.SEVERAL_PROCESSES,
    place=_place,
    fields='Only init_from, data.batch_size, data.threads and data.tta apply; for '
    'weights that do not say how images are prepared, also data.mean, data.std, '
    'data.image_size, data.resize, data.crop_fraction, data.interpolation and '
    'data.channels.',
)
