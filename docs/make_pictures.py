"""Makes the pictures of README.md and docs/ from a real run and real measurements.

    python docs/make_pictures.py ckpt/small

The run is that of docs/train.md. Chromium takes pictures of its report, light and dark;
`docs/images/benchmark.svg` is drawn from the training table of docs/benchmarks.md.
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
NAMES = {
    'ours': 'flax_densenet',
    'torch': 'PyTorch',
    'keras': 'Keras on JAX',
    'linen': 'plain Flax',
}


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


def draw_benchmark():
    """Bars of images per second in training, with their range."""
    text = (DOCS / 'benchmarks.md').read_text(encoding='utf-8')
    table = text.partition('### Training step, DenseNet-121')[2].partition('###')[0]
    rows = []
    for name, label in NAMES.items():
        found = re.search(
            rf'^\| {name} \| ([\d.]+) \(([\d.]+) to ([\d.]+)\)', table, re.M
        )
        rows.append((label, *map(float, found.groups())))
    scale = 380 / max(high for *_, high in rows)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 210" '
        'font-family="system-ui, sans-serif" font-size="15">',
        '<style>text{fill:#24292f}.b{fill:#8c959f}.o{fill:#3f51b5}.r{stroke:#24292f}'
        '@media(prefers-color-scheme:dark){text{fill:#e6edf3}.b{fill:#6e7681}'
        '.o{fill:#8c9eff}.r{stroke:#e6edf3}}</style>',
        '<text x="0" y="18">Training DenseNet-121, images per second (more is better)'
        '</text>',
    ]
    for place, (label, middle, low, high) in enumerate(rows):
        y, kind = 36 + 44 * place, 'b' if place else 'o'
        lines += [
            f'<text x="135" y="{y + 20}" text-anchor="end">{html.escape(label)}</text>',
            f'<rect class="{kind}" x="145" y="{y}" width="{middle * scale:.0f}" '
            'height="30" rx="3"/>',
            f'<path class="r" d="M{145 + low * scale:.0f} {y + 15}H'
            f'{145 + high * scale:.0f}" stroke-width="2"/>',
            f'<text x="{155 + high * scale:.0f}" y="{y + 20}">{middle:.1f}</text>',
        ]
    IMAGES.joinpath('benchmark.svg').write_text('\n'.join([*lines, '</svg>', '']))


if __name__ == '__main__':
    IMAGES.mkdir(exist_ok=True)
    take_pictures(pathlib.Path(sys.argv[1]))
    draw_benchmark()
