"""Results of `benchmarks.gpu`: reads and writes them, and makes medians and a table."""

import json
import pathlib

from benchmarks import sidebyside


def read(path):
    """The lines of a results file; empty if there is no file."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, lines):
    pathlib.Path(path).write_text(''.join(json.dumps(line) + '\n' for line in lines))


def merge(lines, part, found):
    """Replaces the lines that a part measured again."""

    def names(lines):
        return {line.get('contender') or line.get('failed') for line in lines}

    again = {name for name in names(found) if name and not name.startswith('torch')}
    if part in ('torch', 'batch', 'profile'):
        return [line for line in lines if line['part'] != part] + found
    kept = [line for line in lines if line['part'] != part or not names([line]) & again]
    # Lines of torch stay as long as they share rounds with a line of ours.
    ours = {
        line.get('group')
        for line in kept
        if line.get('contender') and not line['contender'].startswith('torch')
    }
    return [
        line for line in kept if line['part'] != part or line.get('group') in ours
    ] + found


def _find(lines, figure='images_per_second', **wanted):
    return [
        line
        for line in lines
        if line.get('figure') == figure
        and all(line.get(name) == value for name, value in wanted.items())
    ]


def _ratio(lines, line, peer):
    """The ratio of a line of ours to the peer's, in shared rounds; or None."""
    same = {name: line[name] for name in ('part', 'task', 'group')}
    theirs = _find(lines, contender=peer, **same)
    if not theirs or len(theirs[0]['values']) != len(line['values']):
        return None
    return sidebyside.ratio(line['values'], theirs[0]['values'])


def best_way(lines):
    """The way with the best ratio to torch.compile or, without it, the best speed."""
    return _best(lines, 'ways')


def best_flags(lines):
    return _best(lines, 'flags')


def _best(lines, part):
    found = {}
    for line in _find(lines, part=part):
        if not line['contender'].startswith('torch'):
            ratio = _ratio(lines, line, 'torch_compile')
            speed = sidebyside.summarize(line['values'])['median']
            found[line['contender']] = (ratio['median'] if ratio else 0, speed)
    return max(found, key=found.get) if found else None


def _bandwidth(lines):
    """Gigabytes per second of a copy, or None."""
    found = _find(lines, figure='gb_per_second')
    return sidebyside.summarize(found[-1]['values'])['median'] if found else None


def _least_mb(lines):
    """The least MB per image of a training step (`hlo_bytes.least`)."""
    return next(
        line['facts']['least_mb']
        for line in lines
        if 'least_mb' in line.get('facts', {})
    )


def medians(lines):
    """The metrics in the last line that a run prints; None if not measured."""
    best, copied = best_way(lines), _bandwidth(lines)
    # The best of XLA's flags counts as ours.
    ours = _find(lines, part='flags', task='train') or _find(
        lines, part='ways', contender=best
    )
    ours = [line for line in ours if not line['contender'].startswith('torch')]
    found = dict.fromkeys(
        (
            *('gpu_train_vs_torch_compile', 'gpu_train_vs_torch'),
            *('gpu_inference_vs_torch_compile', 'images_per_second'),
            *('bandwidth_share', 'bandwidth_share_of_least', 'largest_batch'),
            *('torch_largest_batch', 'best_way', 'best_flags', 'device'),
        )
    )

    def median(line):
        return sidebyside.summarize(line['values'])['median']

    if ours:
        flags = best_flags(lines)
        chosen = [line for line in ours if line['contender'] in (flags, best)]
        top = (chosen or ours)[0]
        found['best_way'] = top.get('way', best)
        found['device'] = top['facts'].get('device')
        if top['part'] == 'flags':
            found['best_flags'] = top['contender']
        found['images_per_second'] = round(median(top), 1)
        found['gpu_train_vs_torch_compile'] = _rounded(
            _ratio(lines, top, 'torch_compile')
        )
        if copied:
            rate = median(top) / copied / 1e3
            found['bandwidth_share'] = round(rate * top['facts']['mb_per_image'], 3)
            found['bandwidth_share_of_least'] = round(rate * _least_mb(lines), 3)
    for line in _find(lines, part='torch', task='train', contender='ours'):
        found['gpu_train_vs_torch'] = _rounded(_ratio(lines, line, 'torch'))
    inference = [
        _ratio(lines, line, 'torch_compile')
        for line in _find(lines, part='torch', task='infer')
        if not line['contender'].startswith('torch')
    ]
    inference = [ratio for ratio in inference if ratio]
    if inference:
        best = max(inference, key=lambda ratio: ratio['median'])
        found['gpu_inference_vs_torch_compile'] = _rounded(best)
    for line in lines:
        if 'largest' in line:
            torch = line['contender'].startswith('torch')
            name = 'torch_largest_batch' if torch else 'largest_batch'
            found[name] = max(found[name] or 0, line['largest'])
    return found


def _rounded(ratio):
    return round(ratio['median'], 3) if ratio else None


def _speeds(lines, part, task):
    out = [
        '| | images/s: median (lowest to highest) | to torch.compile | to torch '
        '| memory, GiB | MB an image | compiling, s |',
        '|---|---|---|---|---|---|---|',
    ]
    for line in _find(lines, part=part, task=task):
        speed, facts = sidebyside.summarize(line['values']), line['facts']
        ratios = [_ratio(lines, line, peer) for peer in ('torch_compile', 'torch')]
        same = {name: line[name] for name in ('part', 'task', 'group', 'contender')}
        peak = max(_find(lines, 'peak_gib', **same)[0]['values'])
        cells = [
            line['contender'],
            f'{speed["median"]:.1f} ({speed["lowest"]:.1f} to {speed["highest"]:.1f})',
            *('' if r is None else f'{r["median"]:.2f}' for r in ratios),
            f'{peak:.1f}' if peak else '',
            f'{facts["mb_per_image"]:.0f}' if 'mb_per_image' in facts else '',
            f'{facts.get("compile_s", "")}',
        ]
        out.append('| ' + ' | '.join(cells) + ' |')
    return out


def _failures(lines, part):
    return [
        f'- {line["failed"]} failed: `{line["reason"]}`'
        for line in lines
        if line['part'] == part and 'failed' in line
    ]


def _batches(lines):
    out = ['| | largest batch | too large |', '|---|---|---|']
    for line in lines:
        if 'largest' in line:
            more = line['too_large'] or ''
            out.append(f'| {line["contender"]} | {line["largest"]} | {more} |')
    return out


def _profile(lines, most=25):
    out = []
    for line in lines:
        if 'operations' in line:
            total = sum(ms for ms, _, _ in line['operations'])
            out += [f'{line["way"]}, {total:.1f} ms a step:', '']
            out += ['| ms | calls | operation |', '|---|---|---|']
            for ms, calls, name in line['operations'][:most]:
                out.append(f'| {ms:.2f} | {calls:.0f} | {name} |')
    return out


def table(lines):
    """A Markdown table for each part with lines."""
    facts = [line['facts'] for line in lines if line.get('facts')]
    devices = sorted({fact['device'] for fact in facts})
    versions = sorted({fact['version'] for fact in facts if 'version' in fact})
    out = [f'{", ".join(devices)}; {", ".join(versions)}.', ''] if facts else []
    copied = _bandwidth(lines)
    if copied:
        out += [
            f'A copy within the memory moves {copied:.0f} GB/s, read and written. A '
            f'training step must move {_least_mb(lines):.0f} MB an image at the least.',
            '',
        ]
    parts = {
        'Ways to build the block, training': ('ways', _speeds(lines, 'ways', 'train')),
        'XLA flags, for the best way, training': (
            'flags',
            _speeds(lines, 'flags', 'train'),
        ),
        'Beside torch, training': ('torch', _speeds(lines, 'torch', 'train')),
        'Beside torch, inference': ('torch', _speeds(lines, 'torch', 'infer')),
        'Largest batch': ('batch', _batches(lines)),
        "Where a training step's time goes": ('profile', _profile(lines)),
    }
    for title, (part, rows) in parts.items():
        if any(line['part'] == part for line in lines):
            out += [f'### {title}', '', *rows, '', *_failures(lines, part), '']
    return '\n'.join(out).rstrip() + '\n'


def write_table(path, text):
    """Replaces the text between the marks."""
    begin, end = '<!-- table: begin -->\n', '<!-- table: end -->'
    head, rest = path.read_text().split(begin)
    path.write_text(head + begin + text + end + rest.split(end)[1])
