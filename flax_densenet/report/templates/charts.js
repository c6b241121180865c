'use strict';
// Shared by the pages: colors of the theme, charts that follow it, sortable tables.
const charts = JSON.parse(document.getElementById('charts').textContent);
const drawn = [];

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
}

// make() gives {data, layout} with the colors of the moment.
function draw(id, make) {
  const place = document.getElementById(id);
  if (!place) return null;
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  const show = () => {
    const { data, layout } = make();
    return Plotly.react(place, data, merge({
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
      font: { color: color('text'), family: getComputedStyle(document.body).fontFamily, size: 12 },
      margin: { l: 52, r: 16, t: 28, b: 44 },
      xaxis: axis(), yaxis: axis(),
      legend: { orientation: 'h', y: 1.02, yanchor: 'bottom', x: 0 },
      hoverlabel: { bgcolor: color('card'), bordercolor: color('line'), font: { color: color('text') } },
      dragmode: false,
    }, layout), options);
  };
  show();
  drawn.push(show);
  return place;
}

function axis() {
  return { gridcolor: color('line'), zerolinecolor: color('line'), linecolor: color('line'), automargin: true };
}

function merge(base, more) {
  const found = { ...base };
  for (const [name, value] of Object.entries(more || {})) {
    const both = [found[name], value].every(v => v && typeof v === 'object' && !Array.isArray(v));
    found[name] = both ? merge(found[name], value) : value;
  }
  return found;
}

function redraw() { for (const show of drawn) show(); }

// Numbers from 0 to 1 as percentages where a chart shows them so.
function percent(values) { return values.map(value => value * 100); }

for (const query of ['(prefers-color-scheme: dark)', 'print']) {
  window.matchMedia(query).addEventListener('change', redraw);
}
window.addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details')) details.open = true;
});

for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows];
      const numbers = rows.every(row => key(row) === '' || !Number.isNaN(Number(key(row))));
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        // Cells without a value stay at the end.
        if (x === '' || y === '') return (x === '') - (y === '');
        const sign = down ? -1 : 1;
        return sign * (numbers ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
      };
      table.tBodies[0].append(...rows.sort(order));
    });
  });
}

// Images of few pixels are shown as they are, not smeared.
for (const image of document.images) {
  const mark = () => image.classList.toggle('small', image.naturalWidth < 64);
  if (image.complete) mark(); else image.addEventListener('load', mark);
}

// Lines by epoch, [{name, x, y, color, dash, width, group, unnamed}], and the best epoch.
function curves(id, lines, best, title, options) {
  return draw(id, () => ({
    data: lines.map(line => ({
      type: 'scatter', mode: line.x.length > 60 ? 'lines' : 'lines+markers', name: line.name,
      x: line.x, y: line.y, legendgroup: line.group, showlegend: !line.unnamed, line: { color: line.color(), dash: line.dash, width: line.width ?? 2 }, marker: { size: 5 },
      hovertemplate: '%{y:.4~g}' + (options.unit || ''),
    })),
    layout: merge({
      hovermode: 'x unified',
      xaxis: { title: { text: 'epoch' }, tick0: 0, dtick: epochStep(lines), rangemode: 'tozero' },
      yaxis: { title: { text: title } },
      shapes: best ? [{ type: 'line', x0: best, x1: best, yref: 'paper', y0: 0, y1: 1,
        line: { color: color('soft'), width: 1, dash: 'dot' } }] : [],
      annotations: best ? [{ x: best, y: 0, yref: 'paper', yanchor: 'bottom', xanchor: 'right', showarrow: false,
        text: 'best: epoch ' + best, font: { color: color('soft'), size: 11 }, textangle: -90 }] : [],
    }, options.layout),
  }));
}

// From 0 up: a constant rate alone would get an axis around it.
function rateAxis(columns) {
  return { range: [0, 1.1 * Math.max(...columns.flat())], exponentformat: 'e' };
}

// Whole epochs: 1, 2, 5, 10, 20, ... apart, ten marks at most.
function epochStep(lines) {
  const last = Math.max(...lines.flatMap(line => line.x));
  for (let unit = 1; ; unit *= 10) for (const step of [1, 2, 5]) if (last <= 10 * step * unit) return step * unit;
}
