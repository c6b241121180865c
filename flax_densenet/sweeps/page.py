"""`sweep.html`: a sweep on one page, and its last words on the terminal.

Both are made of `sweep.json` alone, so `report` makes them on any machine.
"""

import datetime
import os
import shlex

from flax_densenet.report import render
from flax_densenet.sweeps import record as sweep_record
from flax_densenet.sweeps import space
from flax_densenet.sweeps import table as sweep_table
from flax_densenet.system import program

FILE = 'sweep.html'


def save(workdir: str, kept: sweep_record.SweepRecord) -> list[sweep_table.Row]:
    """Writes the page, and `sweep.csv` beside it.

    Returns:
      The rows of the table, the best first.

    Raises:
      UserError: the page cannot be written.
    """
    rows = sweep_table.make_rows(kept)
    slices = [_slice(rows, name) for name in kept.fields]
    charts = {
        'figure': kept.figure,
        'runs': [_curves(kept, row) for row in rows],
        'fields': [found for found in slices if len(set(found['values'])) > 1],
        'importances': kept.importances,
    }
    best = _best(rows)
    render.save_page(
        os.path.join(workdir, FILE),
        'sweep.html',
        charts,
        rows=rows,
        name=os.path.basename(os.path.abspath(workdir)),
        fields=kept.fields,
        figure_name=kept.figure,
        show=lambda figure: sweep_table.show(figure, kept.figure),
        runs=sum(row.count for row in rows),
        hours=sum(row.seconds for row in rows) / 3600,
        counts=[(state, _count(rows, state)) for state in sweep_record.STATES],
        best=best,
        close=_close(rows),
        slices=[found['name'] for found in charts['fields']],
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
            f'{sweep_table.show(best.mean, kept.figure)}{spread} of {best.count} '
            + ('seed' if best.count == 1 else 'seeds')
        )
        if close := _close(rows):
            lines.append(close)
        lines.append('chosen by the test images, which flatters: measure it on others')
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


def _count(rows, state):
    return sum(row.setting.state == state for row in rows)


def _close(rows):
    """A line where the first two differ by less than seeds do, else nothing."""
    done = [row for row in rows if row.setting.state == 'done']
    if len(done) < 2 or None in (done[0].spread, done[1].spread):
        return ''
    if done[0].mean - done[1].mean >= max(done[0].spread, done[1].spread):
        return ''
    return (
        f'trial {os.path.basename(done[1].folder)} is behind it by less than seeds '
        'differ: the two may be as good as each other'
    )


def _commands(workdir, kept, row):
    """What to do with the best setting, `[(what, parts of a command)]`."""
    run = os.path.join(workdir, row.folder, f'seed{row.best_seed}')
    fields = row.setting.fields | {space.SEED: row.best_seed}
    # A tuple that is given twice would be both, one behind the other.
    again = [
        part
        for part in kept.arguments
        if part.lstrip('-').partition('=')[0].removeprefix('config.') not in fields
    ]
    again += [f'--config.{name}={text}' for name, text in fields.items()]
    found = [
        ('train it again', [*again, '--workdir=ckpt/best']),
        ('a page on its best run', ['report', run]),
    ]
    return [
        (what, [*program.words(), *map(shlex.quote, parts)]) for what, parts in found
    ]


def _curves(kept, row):
    """What the page draws of a setting by epoch."""
    short = dict(zip(kept.fields, kept.short_fields, strict=True))
    fields = row.setting.fields.items()
    texts = [f'{short[name]}={text}' for name, text in fields]
    return {
        'name': ' '.join([os.path.basename(row.folder), *texts]),
        'state': row.setting.state,
        'figures': [run.figures for run in row.setting.runs.values()],
    }


def _slice(rows, name):
    """What the page draws of the settings over one field."""
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
    """Whether numbers lie too far apart for an even axis."""
    if not values or isinstance(values[0], str) or min(values) <= 0:
        return False
    return max(values) / min(values) >= 20
