"""Charts as SVG that pages embed, so that no script has to draw them.

Colors are classes of `style.css`, so a chart follows the page's light and dark themes
and prints well. Tooltips are `<title>` elements, which browsers show after a delay and
the page's script at once.

>>> plot = Plot(Axis('epoch', 1, 3), Axis('loss', 0, 1), label='Loss by epoch')
>>> plot.line([1, 2, 3], [0.9, 0.5, 0.4], 's0')
>>> str(plot).startswith('<svg class="plot" viewBox="0 0 440 290"')
True
"""

import dataclasses
import html
import math

COLORS = 10  # classes s0 to s9 of style.css
_TOP, _RIGHT, _BOTTOM = 22, 20, 44  # margins in units of the picture
_LETTER = 7.4  # width of a digit


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
      title: title with the unit.
      low, high: the ends, in the unit of the values; positive if `log`.
      ticks: `(value, text)`; by default chosen from the ends.
      whole: only integers as ticks, for epochs.
    """

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False
    whole: bool = False

    def place(self, value: float) -> float:
        """A value as a share of the axis."""
        low, high, value = (
            math.log10(x) if self.log else x for x in (self.low, self.high, value)
        )
        return (value - low) / (high - low or 1)

    def marks(self) -> tuple[tuple[float, str], ...]:
        """The ticks that lie on the axis."""
        if self.ticks:
            return self.ticks
        if self.log:
            first, last = (
                math.floor(math.log10(self.low)),
                math.ceil(math.log10(self.high)),
            )
            factors = (1,) if last - first > 3 else (1, 2, 5)
            values = [f * 10.0**n for n in range(first, last + 1) for f in factors]
        else:
            step = _step(self.high - self.low)
            if self.whole:
                step = max(step, 1)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            values = [n * step for n in range(first, last + 1)]
        inside = [x for x in values if -1e-9 <= self.place(x) <= 1 + 1e-9]
        return tuple((x, format_number(x)) for x in inside)


def _step(span, most=6):
    """The distance between ticks: 1, 2 or 5 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(span / most)) if span > 0 else 1.0
    return next((f * unit for f in (1, 2, 5, 10) if span <= f * unit * most), unit)


def format_number(value: float) -> str:
    """A number as short as it can be: `0.25`, `1,000`, `3e-04`, `6.1e+11`.

    >>> format_number(613008460351.58)
    '6.1e+11'
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'
    return f'{value:.2g}'


def margin(y: Axis) -> float:
    """The room that the texts of an axis take on the left."""
    longest = max((len(text) for _, text in y.marks()), default=1)
    return 32 + max(_LETTER * longest, 14)


class Plot:
    """A chart to which marks are added; `str` gives the SVG.

    Args:
      label: description of the chart for screen readers.
      width, height: size of the picture, in units of about a pixel.
      left: where the plot begins at the earliest, to align it with another one.
    """

    def __init__(
        self,
        x: Axis,
        y: Axis,
        *,
        label: str,
        width: int = 440,
        height: int = 290,
        left: float = 0,
    ):
        self.x, self.y, self.label = x, y, label
        self.width, self.height = width, height
        self.left = max(left, margin(y))
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The position of a point in the picture."""
        across = self.width - self.left - _RIGHT
        down = self.height - _TOP - _BOTTOM
        right = self.left + across * self.x.place(x)
        return round(right, 1), round(_TOP + down * (1 - self.y.place(y)), 1)

    def line(self, xs, ys, style: str, *, title='', group='', dashed=False, dots=False):
        """A line through points; those without a finite value are gaps.

        Args:
          style: classes of style.css, `s0` to `s9` or `soft`.
          group: name of the lines that a legend button hides together.
        """
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(xs, ys, strict=True):
            if y is None or not math.isfinite(y):
                runs.append([])
            else:
                runs[-1].append(self.at(x, y))
        path = ''.join(
            'M' + 'L'.join(f'{x:g} {y:g}' for x, y in run) for run in runs if run
        )
        inside = f'<path class="line{" dashed" * dashed}" d="{path}"/>'
        if dots:
            inside += ''.join(
                f'<circle cx="{x:g}" cy="{y:g}" r="2.6"/>'
                for run in runs
                for x, y in run
            )
        self._group(inside, style, title, group)

    def points(self, xs, ys, style: str, *, titles=(), sizes=(), errors=()):
        """Points with titles, sizes (radii) and half lengths of error bars."""
        marks = []
        for place, (x, y) in enumerate(zip(xs, ys, strict=True)):
            right, down = self.at(x, y)
            radius = sizes[place] if sizes else 4
            mark = f'<circle cx="{right:g}" cy="{down:g}" r="{radius:g}"/>'
            if errors and errors[place]:
                low = self.at(x, y - errors[place])[1]
                high = self.at(x, y + errors[place])[1]
                mark += f'<path class="line thin" d="M{right:g} {low:g}V{high:g}"/>'
            title = f'<title>{html.escape(titles[place])}</title>' if titles else ''
            marks.append(f'<g class="point">{title}{mark}</g>')
        self._group(''.join(marks), style, '', '')

    def bars(self, edges, heights, style: str, *, titles=()):
        """Bars from the bottom; there is one more of `edges` than of `heights`."""
        bars = []
        for place, height in enumerate(heights):
            left, top = self.at(edges[place], height)
            right, bottom = self.at(edges[place + 1], self.y.low)
            title = f'<title>{html.escape(titles[place])}</title>' if titles else ''
            bars.append(
                f'<rect x="{left:g}" y="{top:g}" width="{max(right - left - 1, 1):g}" '
                f'height="{max(bottom - top, 0):g}">{title}</rect>'
            )
        self._group(''.join(bars), f'bars {style}', '', '')

    def mark(self, x: float, text: str):
        """A dotted vertical line, with a text above the plot."""
        right, top = self.at(x, self.y.high)
        anchor = 'end' if self.x.place(x) > 0.5 else 'start'
        bottom = self.height - _BOTTOM
        self.parts.append(
            f'<path class="rule" d="M{right:g} {top:g}V{bottom:g}"/>'
            f'<text class="note" x="{right:g}" y="{top - 7:g}" '
            f'text-anchor="{anchor}">{html.escape(text)}</text>'
        )

    def tips(self, xs, texts):
        """Columns that show their text as tooltips."""
        places = [self.at(x, self.y.low)[0] for x in xs]
        middles = [(a + b) / 2 for a, b in zip(places, places[1:], strict=False)]
        edges = [self.left, *middles, self.width - _RIGHT]
        height = self.height - _TOP - _BOTTOM
        for place, text in enumerate(texts):
            left, right = edges[place], edges[place + 1]
            self.parts.append(
                f'<rect class="tip" x="{left:.1f}" y="{_TOP}" height="{height}" '
                f'width="{max(right - left, 0.5):.1f}"><title>{html.escape(text)}'
                '</title></rect>'
            )

    def _group(self, inside, style, title, group):
        told = f'<title>{html.escape(title)}</title>' if title else ''
        name = f' data-group="{html.escape(group, quote=True)}"' if group else ''
        self.parts.append(f'<g class="{style}"{name}>{told}{inside}</g>')

    def _axes(self):
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        lines, texts = [], []
        for value, text in self.x.marks():
            x = self.at(value, self.y.low)[0]
            lines.append(f'M{x:g} {_TOP}V{bottom}')
            texts.append(
                f'<text x="{x:g}" y="{bottom + 15}" text-anchor="middle">'
                f'{html.escape(text)}</text>'
            )
        for value, text in self.y.marks():
            y = self.at(self.x.low, value)[1]
            lines.append(f'M{self.left:g} {y:g}H{right}')
            texts.append(
                f'<text x="{self.left - 6:g}" y="{y + 4:g}" text-anchor="end">'
                f'{html.escape(text)}</text>'
            )
        middle = (self.left + right) / 2, (_TOP + bottom) / 2
        return (
            f'<path class="net" d="{"".join(lines)}"/><g class="ticks">{"".join(texts)}'
            f'<text class="name" x="{middle[0]:g}" y="{self.height - 8}" '
            f'text-anchor="middle">{html.escape(self.x.title)}</text>'
            f'<text class="name side" text-anchor="middle" transform="translate(13 '
            f'{middle[1]:g}) rotate(-90)">{html.escape(self.y.title)}</text></g>'
        )

    def __str__(self):
        label = html.escape(self.label, quote=True)
        return (
            f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{label}">{self._axes()}{"".join(self.parts)}</svg>'
        )
