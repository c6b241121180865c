"""`report`: the page of a run or a sweep, or a comparison of several runs."""

import os

from flax_densenet.cli import (
    arguments,
    crossval,
    options,
    own_images,
    trained_model,
)
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.system import terminal


def run(invocation: options.Invocation):
    """Writes `report.html`, `sweep.html` or `compare.html`."""
    from flax_densenet.report import compare, render
    from flax_densenet.sweeps import page as sweep_page
    from flax_densenet.sweeps import record as sweep_record

    render.check_installed('report')
    names = invocation.flags.workdir or [options.default_workdir(invocation.recipe)]
    workdirs = [folder for name in names for folder in compare.find_runs(name)]
    out = invocation.path('out')
    _check_out(out)
    if len(workdirs) == 1 and sweep_record.is_sweep(workdirs[0]):
        _check_of_one(invocation, 'a sweep')
        path = out or os.path.join(workdirs[0], sweep_page.FILE)
        sweep_page.save(workdirs[0], sweep_record.load(workdirs[0]), path)
        terminal.say(f'{path}: open it in a browser')
        return
    if len(workdirs) > 1:
        _check_of_one(invocation, 'several runs')
        if not processes.is_first():
            return
        folder = os.path.dirname(workdirs[0].rstrip(os.sep))
        path = out or os.path.join(folder, compare.FILE)
        private = invocation.overrides.get('report.private')
        compare.save(workdirs, path, private=private)
        terminal.say(f'{path}: {len(workdirs)} runs compared')
        return
    _report_on_run(invocation, workdirs[0])


def _check_out(out):
    """Raises if --out is a file of another kind: data, a model, ..."""
    if out and os.path.isfile(out) and not out.lower().endswith(('.html', '.htm')):
        raise UserError(
            f'--out={out} would overwrite a file that is not a page; name a new file, '
            'or one that ends with .html'
        )


def _check_of_one(invocation, what):
    """Raises for flags that apply only to the report of one run."""
    allowed = ('report.private',) if what == 'several runs' else ()
    set_here = [
        f'--config.{name}' for name in invocation.overrides if name not in allowed
    ]
    of_one = ('figures', 'precision', 'class_names', 'outputs')
    for name in (*of_one, *(flag.name for flag in options.EXPLAIN)):
        if invocation.flags[name].value:
            set_here.append(f'--{name}')
    if set_here:
        raise UserError(
            f'{set_here[0]} is for the report of one run, and this is one of {what}; '
            'leave it out, or name one run'
        )


def _report_on_run(invocation, workdir):
    from flax_densenet.evaluation import precisions, results
    from flax_densenet.report import figures, page

    how = options.explain_options(invocation)
    options_of_page = {
        'path': invocation.path('out'),
        'how': how,
        'private': invocation.overrides.get('report.private'),
    }
    pooled = crossval.measure(invocation, workdir, report=True, **options_of_page)
    if pooled is not None:
        found = pooled.results
        path = options_of_page['path'] or os.path.join(workdir, page.REPORT_FILE)
    else:
        trained, path, settings = trained_model.load(invocation, workdir, 'report.')
        trained_model.check_others(invocation, trained, path)
        trained, source, found, trained_on = precisions.of_data(
            trained, path, settings, invocation.flags.precision
        )
        found = trained_model.add_others(invocation, trained, settings, found)
        own = own_images.are_measured(
            invocation, trained, source=source, trained_on=trained_on
        )
        if not own and not options_of_page['path']:
            name = own_images.name_of(settings.data, trained.metadata['data'])
            options_of_page['path'] = os.path.join(workdir, f'report-{name}.html')
        path = page.save_report(
            *(workdir, trained, source, found),
            trained_on=trained_on,
            weights=path,
            own=own,
            **options_of_page,
        )
        if not own:
            names = [results.EVAL_FILE, results.PREDICTIONS_FILE]
            terminal.say(own_images.describe(workdir, names))
    terminal.say(f'{path}: open it in a browser')
    folder = invocation.path('figures')
    if folder and processes.is_first():
        names = figures.save(folder, workdir, found)
        terminal.say(f'{folder}: {", ".join(names)}')


def _place(positionals):
    if len(positionals) == 1:
        return arguments.place_measured(positionals[0])
    return [('workdir', name) for name in positionals]


COMMAND = options.Command(
    'report',
    'Write the report of a run or a sweep, or compare several runs.',
    run,
    usage='RUN...',
    details=(
        'For one RUN, measures its best checkpoint and writes report.html into its '
        'folder, or report-NAME.html for other data (--config.data.source).',
        'For a sweep, writes sweep.html. For several runs, or a pattern such '
        "as 'ckpt/*', writes compare.html, which shows their curves and settings.",
    ),
    examples=(
        ('the report of one run', 'report ckpt/birds'),
        ('figures for a paper', 'report ckpt/birds --figures=figures'),
        (
            'without pictures and paths',
            'report ckpt/birds --config.report.private=True',
        ),
        ('compare runs', 'report ckpt/a ckpt/b --out=compare.html'),
    ),
    flags={
        'Runs': (
            options.Flag(
                'workdir',
                'Folder of a run, several separated by commas, or a pattern. Can be '
                'given several times.',
                kind=list,
                value='RUN',
                default_text='ckpt/NAME, with the name of the recipe',
                is_path=True,
            ),
            *options.OF_WEIGHTS,
            options.RAW,
            options.MEASURED_PRECISION,
            options.OTHERS,
        ),
        'Output': (
            options.Flag(
                'out',
                'File to write.',
                value='FILE',
                default_text='report.html or sweep.html in the folder of the run or '
                'sweep; compare.html next to several runs',
                is_path=True,
            ),
            options.Flag(
                'figures',
                'Folder for figures for a paper, as SVG and PDF, for one run: curves, '
                'confusion matrix, ROC curves and reliability diagram.',
                value='FOLDER',
                is_path=True,
            ),
        ),
    }
    | {'Maps': options.EXPLAIN}
    | options.SEVERAL_PROCESSES,
    place=_place,
    fields='Only init_from, data.* and report.* apply; everything else comes from the '
    'model.',
)
