"""`sweep.html`: a sweep on one page, and its summary on the terminal.

Both are made only from `sweep.json`, so `report` makes them on any machine.
"""

import datetime
import os
import pathlib
import shlex

from flax_densenet.checkpoints import epoch_records
from flax_densenet.report import charts, render
from flax_densenet.report import page as report_page
from flax_densenet.sweeps import record as sweep_record
from flax_densenet.sweeps import space
from flax_densenet.sweeps import table as sweep_table
from flax_densenet.system import program

FILE = 'sweep.html'


def save(
    workdir: str, kept: sweep_record.SweepRecord, path: str | None = None
) -> list[sweep_table.Row]:
    """Writes the page, and `sweep.csv` into the sweep's folder.

    Args:
      path: of the page; None for `sweep.html` in the sweep's folder.

    Returns:
      The rows of the table, the best first.

    Raises:
      UserError: the page cannot be written.
    """
    rows = sweep_table.make_rows(kept)
    slices = [_slice(rows, name) for name in kept.fields]
    slices = [found for found in slices if len(set(found['values'])) > 1]
    shares = kept.figure.endswith('accuracy')
    unit = kept.figure[0].upper() + kept.figure[1:]
    best = _best(rows)
    chart, clipped = _draw_curves(kept, rows, unit, shares)
    path = path or os.path.join(workdir, FILE)
    folder = os.path.dirname(os.path.abspath(path))
    render.save_page(
        path,
        'sweep.html',
        {},
        rows=rows,
        links={row.folder: _link(workdir, row, folder) for row in rows},
        curves=chart,
        clipped=clipped,
        slices=[
            charts.figure(
                found['name'],
                charts.scatter(found, unit=unit, percent=shares),
                id=f'field{place}',
            )
            for place, found in enumerate(slices)
        ],
        importances=kept.importances,
        name=os.path.basename(os.path.abspath(workdir)),
        fields=kept.fields,
        figure_name=kept.figure,
        part=epoch_records.WORDS[kept.part],
        show=lambda figure: sweep_table.show(figure, kept.figure),
        runs=sum(row.count for row in rows),
        hours=sum(row.seconds for row in rows) / 3600,
        counts=[(state, _count(rows, state)) for state in sweep_record.STATES],
        best=best,
        close=_close(rows),
        commands=_commands(workdir, kept, best) if best else [],
        made=datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
    )
    sweep_table.save(workdir, kept, rows)
    return rows


def format_end(
    workdir: str, kept: sweep_record.SweepRecord, rows: list[sweep_table.Row]
) -> str:
    """The table, the best setting, and what to do with it."""
    lines = [sweep_table.format_rows(kept, rows)]
    if best := _best(rows):
        spread = ''
        if best.spread is not None:
            spread = f' ± {sweep_table.show(best.spread, kept.figure)}'
        lines.append(
            f'best: {str(best.setting) or "the only setting"}: {kept.figure} '
            f'{sweep_table.show(best.mean, kept.figure)}{spread} over {best.count} '
            + ('seed' if best.count == 1 else 'seeds')
        )
        if close := _close(rows):
            lines.append(close)
        lines.append(_describe_choice(kept, best))
        for what, parts in _commands(workdir, kept, best):
            lines.append(f'{what}: {" ".join(parts)}')
    if failed := _count(rows, 'failed'):
        lines.append(f'{failed} failed; --retry_failed trains them again')
    lines.append(f'{FILE} and {sweep_table.FILE} are in {workdir}')
    return '\n'.join(lines)


def _best(rows):
    """The row of the best finished setting, or None."""
    done = [row for row in rows if row.setting.state == 'done']
    return done[0] if done else None


def _describe_choice(kept, best):
    """A line on the images that chose the best setting, and its result on others."""
    if kept.part == epoch_records.TEST:
        return (
            'chosen on the test images, so these metrics are optimistic: measure it on '
            'other images'
        )
    line = 'chosen on the validation images, so these metrics are optimistic'
    if best.test is None:
        return line
    value = sweep_table.show(best.test, kept.figure)
    what = 'AUROC' if kept.figure == 'mean AUROC' else 'accuracy'
    return (
        f'{line}; on the test images, which were not used for any choice, its {what} '
        f'is {value}'
    )


def _count(rows, state):
    return sum(row.setting.state == state for row in rows)


def _close(rows):
    """A line if the first two differ by less than seeds do, else ''."""
    done = [row for row in rows if row.setting.state == 'done']
    if len(done) < 2 or None in (done[0].spread, done[1].spread):
        return ''
    if done[0].mean - done[1].mean >= max(done[0].spread, done[1].spread):
        return ''
    return (
        f'trial {os.path.basename(done[1].folder)} is behind it by less than seeds '
        'differ: the two may be equally good'
    )


def _commands(workdir, kept, row):
    """What to do with the best setting, `[(what, parts of a command)]`."""
    run = os.path.join(workdir, row.folder, f'seed{row.best_seed}')
    # Not the best seed, whose luck would not carry over to other images.
    fields = {k: v for k, v in row.setting.fields.items() if k != space.SEED}
    # A tuple that is given twice would be both, one behind the other.
    again = [
        part
        for part in kept.arguments
        if part.lstrip('-').partition('=')[0].removeprefix('config.') not in fields
    ]
    again += [f'--config.{name}={text}' for name, text in fields.items()]
    found = [
        ('train this setting', [*again, '--workdir=ckpt/best']),
        ('write a report on its best run', ['report', run]),
    ]
    return [
        (what, [*program.words(), *map(shlex.quote, parts)]) for what, parts in found
    ]


def _link(workdir, row, folder):
    """A page or picture of a setting's best run, relative to a folder; or ''."""
    for name in (report_page.REPORT_FILE, 'curves.png'):
        path = os.path.join(workdir, row.folder, f'seed{row.best_seed}', name)
        if row.best_seed and os.path.isfile(path):
            return pathlib.PurePath(os.path.relpath(path, folder)).as_posix()
    return ''


_COLORED = 8  # settings with separate colors


def _draw_curves(kept, rows, unit, shares):
    """The chart of all runs by epoch, and whether its axis leaves out their start."""
    short = dict(zip(kept.fields, kept.short_fields, strict=True))
    lines, named = [], []
    for place, row in enumerate(rows):
        texts = [f'{short[name]}={text}' for name, text in row.setting.fields.items()]
        name = ' '.join([os.path.basename(row.folder), *texts])
        style = f's{place}' if place < _COLORED else 'faint'
        if row.setting.runs and place < _COLORED:
            named.append((style, name))
        for seed, run in row.setting.runs.items():
            line = {'name': f'{name}, seed {seed}', 'style': style, 'group': name}
            line |= {'x': list(range(1, len(run.figures) + 1)), 'y': run.figures}
            line['dashed'] = row.setting.state == 'pruned'
            lines.append(line | {'muted': place >= _COLORED})
    if not lines:
        return '', False
    low = _low_of(rows)
    # The best last, so that it is on top.
    chart = charts.by_epoch(
        lines[::-1],
        title=unit,
        unit=unit,
        percent=shares,
        low=low,
        width=720,
        height=340,
    )
    below = charts.legend(named, button=True)
    return charts.figure(unit, chart, below, id='curves'), low is not None


def _low_of(rows):
    """The start of the axis: long runs rise far and differ little at their end."""
    finished = [
        run.figures
        for row in rows
        if row.setting.state == 'done'
        for run in row.setting.runs.values()
        if len(run.figures) >= 12
    ]
    return min((f[len(f) // 4] for f in finished), default=None)


def _slice(rows, name):
    """The values that the page plots over one field."""
    there = [row for row in rows if row.count and name in row.setting.fields]
    values = [_number(row.setting.fields[name]) for row in there]
    if None in values:
        values = [row.setting.fields[name] for row in there]
    return {
        'name': name,
        'values': values,
        'figures': [row.mean for row in there],
        'spreads': [row.spread or 0 for row in there],
        'names': [os.path.basename(row.folder) for row in there],
        'done': [row.setting.state == 'done' for row in there],
        'log': _is_log(values),
    }


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None


def _is_log(values):
    """Whether numbers are too far apart for a linear axis."""
    if not values or isinstance(values[0], str) or min(values) <= 0:
        return False
    return max(values) / min(values) >= 20
