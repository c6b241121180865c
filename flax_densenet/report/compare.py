"""`compare.html`: several runs in one page, their curves and where they differ."""

import glob
import json
import os

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import run_folder
from flax_densenet.errors import UserError
from flax_densenet.report import page, render

FILE = 'compare.html'


def find_runs(names: str) -> list[str]:
    """The folders that `a,b` or a pattern such as `ckpt/*` means.

    Of what a pattern matches, folders without a run are left out.

    Raises:
      UserError: a pattern matches no folder of a run.
    """
    if os.path.isdir(names):  # a comma or a star of its own name
        return [names]
    found = []
    for name in names.split(','):
        if not glob.has_magic(name):
            found.append(name)
            continue
        runs = [match for match in sorted(glob.glob(name)) if _is_run(match)]
        if not runs:
            raise UserError(f'--workdir={name}: no folder of a run has such a name')
        found += runs
    return found


def _is_run(folder):
    return os.path.isfile(os.path.join(folder, run_folder.METRICS_FILE))


def save(workdirs: list[str], path: str):
    """Writes a page that lays the curves of several runs over each other.

    Args:
      path: of the page.

    Raises:
      UserError: a folder holds no run, or the page cannot be written.
    """
    runs = [run_folder.load_run(workdir) for workdir in workdirs]
    for workdir, run in zip(workdirs, runs, strict=True):
        if not run.records:
            raise UserError(
                f'--workdir={workdir} holds no run with a finished epoch; leave it '
                'out, or train there first'
            )
    names = _short_names(workdirs)
    fields = [run_folder.flatten(run.config) for run in runs]
    every = sorted(set().union(*fields))
    differing = [
        (field, [row.get(field, '') for row in fields])
        for field in every
        if len({json.dumps(row.get(field)) for row in fields}) > 1
    ]
    folder = os.path.dirname(os.path.abspath(path))
    rows = [
        {'name': name, **_summarize(run, workdir, folder)}
        for name, run, workdir in zip(names, runs, workdirs, strict=True)
    ]
    charts = {
        'runs': [
            {'name': name, 'curves': run_folder.curves(run.records)}
            for name, run in zip(names, runs, strict=True)
        ]
    }
    values = {
        'rows': rows,
        'differing': differing,
        'names': names,
        'areas': any('test_mean_auroc' in row['best'] for row in rows),
    }
    render.save_page(path, 'compare.html', charts, **values)


def _summarize(run, workdir, folder):
    """A run's row of the table, with a link from `folder` to its own page."""
    own = os.path.join(os.path.abspath(workdir), page.REPORT_FILE)
    return {
        'link': os.path.relpath(own, folder) if os.path.exists(own) else '',
        'best': max(run.records, key=checkpoint_reader.rank),
        'epochs': len(run.records),
        'hours': sum(row['seconds'] for row in run.records) / 3600,
        'speed': run_folder.median(run.records, 'images_per_second'),
        'memory': max(row['peak_memory_gib'] for row in run.records),
        'device': run.environment.get('device', ''),
    }


def _short_names(workdirs):
    """The folders' names; whole paths where two are alike."""
    names = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    return names if len(set(names)) == len(names) else list(workdirs)
