"""Makes the pictures of README.md and docs/ from a real run and real measurements.

    python docs/make_pictures.py ckpt/small

The run is that of docs/train.md. Chromium takes pictures of its report, light and dark;
`docs/images/benchmark.svg` is drawn from the first table of docs/benchmarks.md;
without a run nothing else is made.
"""

import html
import pathlib
import re
import sys

from playwright import sync_api

DOCS = pathlib.Path(__file__).resolve().parent
IMAGES = DOCS / 'images'
WIDTH, HEIGHT = 1280, 960
SECTION_HEIGHT = 700
# Charts of benchmark.svg, and the column of the table behind the name.
CHARTS = (
    ('Training, images per second (more is better)', 0),
    ('Inference, images per second (more is better)', 2),
)


def take_pictures(run: pathlib.Path):
    """The top of the report in both color schemes, and its parts in light."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path='/usr/bin/chromium', args=['--no-sandbox']
        )
        for scheme in ('light', 'dark'):
            page = browser.new_page(
                viewport={'width': WIDTH, 'height': HEIGHT}, color_scheme=scheme
            )
            page.goto((run / 'report.html').resolve().as_uri())
            page.wait_for_timeout(1500)  # charts
            page.screenshot(path=IMAGES / f'report_{scheme}.png')
            if scheme == 'light':
                take_sections(page)
        browser.close()


def take_sections(page):
    """A picture of each section that docs/train.md shows, by its heading."""
    for heading, name in (
        ('Confusion matrix', 'confusion'),
        ('Most confident mistakes', 'mistakes'),
    ):
        section = page.locator('section', has=page.get_by_role('heading', name=heading))
        box = section.first.bounding_box()
        box['height'] = min(box['height'], SECTION_HEIGHT)
        path = IMAGES / f'{name}.jpg'
        page.screenshot(path=path, clip=box, full_page=True, type='jpeg', quality=80)


def read_benchmark() -> list[tuple[str, list[tuple[float, float, float] | None]]]:
    """Rows of the first table of docs/benchmarks.md: who, and what `CHARTS` shows.

    Each figure is a median with the lowest and the highest, or None where a contender
    does not do that.
    """
    text = (DOCS / 'benchmarks.md').read_text(encoding='utf-8')
    rows = []
    for line in re.findall(r'^\| (.+) \|$', text.partition('| Ratio')[0], re.M):
        who, *cells = map(str.strip, line.split('|'))
        figures = []
        for _, column in CHARTS:
            found = re.match(r'([\d.]+) \(([\d.]+) to ([\d.]+)\)', cells[column])
            figures.append(found and tuple(map(float, found.groups())))
        if any(figures):
            rows.append((who, figures))
    return rows


def draw_benchmark():
    """Bars of images per second with their range: training, then inference."""
    rows, lines, y = read_benchmark(), [], 18
    for number, (title, _) in enumerate(CHARTS):
        shown = [(who, figures[number]) for who, figures in rows if figures[number]]
        scale = 300 / max(high for _, (_, _, high) in shown)
        lines.append(f'<text class="t" x="0" y="{y}">{html.escape(title)}</text>')
        y += 14
        for who, (middle, low, high) in shown:
            kind = 'o' if who.startswith('flax_densenet') else 'b'
            lines += [
                f'<text x="275" y="{y + 18}" text-anchor="end">{html.escape(who)}'
                '</text>',
                f'<rect class="{kind}" x="285" y="{y}" width="{middle * scale:.0f}" '
                'height="26" rx="3"/>',
                f'<path class="r" d="M{285 + low * scale:.0f} {y + 13}H'
                f'{285 + high * scale:.0f}" stroke-width="2"/>',
                f'<text x="{295 + high * scale:.0f}" y="{y + 18}">{middle:g}</text>',
            ]
            y += 34
        y += 26
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {y - 20}" '
        'font-family="system-ui, sans-serif" font-size="15">',
        '<style>text{fill:#24292f}.t{font-weight:600}.b{fill:#8c959f}.o{fill:#3f51b5}'
        '.r{stroke:#24292f}@media(prefers-color-scheme:dark){text{fill:#e6edf3}'
        '.b{fill:#6e7681}.o{fill:#8c9eff}.r{stroke:#e6edf3}}</style>',
    ]
    IMAGES.joinpath('benchmark.svg').write_text(
        '\n'.join([*head, *lines, '</svg>', ''])
    )


if __name__ == '__main__':
    IMAGES.mkdir(exist_ok=True)
    for run in sys.argv[1:]:
        take_pictures(pathlib.Path(run))
    draw_benchmark()
