'use strict';
const palette = ['#d95f02', '#1f77b4', '#2a9d6f', '#b5478f', '#8c6d1f', '#6a5acd', '#17889b', '#c0392b'];
const accuracy = charts.figure === 'test accuracy';
const shown = values => accuracy ? percent(values) : values;
const title = charts.figure + (accuracy ? ', %' : '');
const unit = accuracy ? ' %' : '';
const short = text => text.length > 48 ? text.slice(0, 47) + '…' : text;

// The best last, so that it lies on top; its name still stands first.
const lines = charts.runs.flatMap((run, place) => run.figures.map((values, seed) => ({
  name: short(run.name), group: run.name, unnamed: seed > 0 || place >= palette.length,
  x: values.map((_, epoch) => epoch + 1), y: shown(values),
  color: () => palette[place] ?? color('soft'), dash: run.state === 'pruned' ? 'dot' : 'solid', width: place < palette.length ? 2 : 0.7,
}))).reverse();
if (lines.length) {
  // Long runs differ little at their end and rise far at their start.
  const whole = charts.runs.filter(run => run.state === 'done').flatMap(run => run.figures);
  const long = whole.filter(values => values.length >= 12);
  const low = shown(long.map(values => values[Math.floor(values.length / 4)]));
  const high = shown(charts.runs.flatMap(run => run.figures.map(values => Math.max(...values))));
  const range = low.length ? [Math.min(...low), 1.01 * Math.max(...high)] : undefined;
  document.getElementById('clipped').hidden = !range;
  curves('curves', lines, null, title, { unit,
    layout: { hovermode: 'closest', legend: { traceorder: 'reversed' }, yaxis: { range } } });
}

charts.fields.forEach((field, place) => draw('field' + place, () => ({
  data: [true, false].map(done => {
    const chosen = field.done.flatMap((there, row) => there === done ? [row] : []);
    const of = values => chosen.map(row => values[row]);
    return {
      type: 'scatter', mode: 'markers', x: of(field.values), y: shown(of(field.figures)), text: of(field.names),
      error_y: { type: 'data', array: shown(of(field.spreads)), visible: done, color: color('soft'), thickness: 1 },
      marker: { size: 9, color: color(done ? 'accent' : 'soft'), symbol: done ? 'circle' : 'circle-open' },
      hovertemplate: 'trial %{text}: %{x}, %{y:.4~g}' + unit + '<extra></extra>', showlegend: false,
    };
  }),
  layout: {
    xaxis: { title: { text: field.name }, type: field.log ? 'log' : typeof field.values[0] === 'string' ? 'category' : 'linear', exponentformat: 'e' },
    yaxis: { title: { text: title } },
  },
})));

const shares = Object.entries(charts.importances).reverse();
if (shares.length) {
  document.getElementById('importances').hidden = false;
  draw('importances', () => ({
    data: [{ type: 'bar', orientation: 'h', x: shares.map(([, share]) => share * 100), y: shares.map(([name]) => short(name)),
      marker: { color: color('accent') }, hovertemplate: '%{x:.1f} %<extra></extra>' }],
    layout: { xaxis: { title: { text: 'share of the differences between results, % (fANOVA)' }, rangemode: 'tozero' } },
  }));
}
