'use strict';
const accent = () => color('accent');
const second = () => color('second');

if (charts.curves) {
  const c = charts.curves;
  const pair = name => ['train', 'test'].filter(part => c[part + '_' + name]).map(part => ({
    name: part === 'train' ? 'training' : 'test', x: c.epoch, y: c[part + '_' + name],
    color: part === 'train' ? accent : second,
  }));
  const shares = pair('accuracy').map(line => ({ ...line, y: percent(line.y) }));
  curves('accuracy', shares, c.best, 'accuracy, %', { unit: ' %' });
  curves('loss', pair('loss'), c.best, 'cross-entropy', {});
  curves('rate', [{ name: 'learning rate', x: c.epoch, y: c.learning_rate, color: accent }], c.best,
    'learning rate', { layout: { showlegend: false, yaxis: rateAxis([c.learning_rate]) } });
  if (c.test_mean_auroc) {
    curves('auroc', [{ name: 'test', x: c.epoch, y: c.test_mean_auroc, color: second }], c.best,
      'mean AUROC', { layout: { showlegend: false } });
  }
}

if (charts.calibration) {
  const bins = name => charts.calibration[name].bins.filter(bin => bin.count);
  draw('reliability', () => ({
    data: [
      { type: 'scatter', mode: 'lines', x: [0, 1], y: [0, 1], name: 'as sure as right',
        line: { color: color('soft'), dash: 'dot', width: 1 }, hoverinfo: 'skip' },
      ...[['before', 'as it is', second], ['after', 'with temperature', accent]].map(([key, name, of]) => ({
        type: 'scatter', mode: 'lines+markers', name,
        x: bins(key).map(bin => bin.confidence), y: bins(key).map(bin => bin.accuracy),
        customdata: bins(key).map(bin => bin.count),
        marker: { color: of(), size: bins(key).map(bin => 5 + 9 * Math.sqrt(bin.count / total(key))) },
        line: { color: of(), width: 2 },
        hovertemplate: 'sure %{x:.1%}, right %{y:.1%}, %{customdata} images',
      })),
    ],
    layout: {
      xaxis: { title: { text: 'how sure the model is' }, range: [0, 1.02], tickformat: '.0%' },
      yaxis: { title: { text: 'how often it is right' }, range: [0, 1.02], tickformat: '.0%' },
    },
  }));
  function total(key) { return charts.calibration[key].bins.reduce((sum, bin) => sum + bin.count, 0); }
}

if (charts.roc.length) {
  const few = charts.roc.length <= 10;
  const palette = ['#1f77b4', '#d95f02', '#2a9d6f', '#b5478f', '#8c6d1f', '#6a5acd', '#c0392b', '#17889b', '#7f7f7f', '#557a1f'];
  let chosen = few ? null : charts.roc[0].name;
  const choice = document.getElementById('roc-class');
  const show = draw('roc', () => ({
    data: [
      { type: 'scatter', mode: 'lines', x: [0, 1], y: [0, 1], showlegend: false, hoverinfo: 'skip',
        line: { color: color('soft'), dash: 'dot', width: 1 } },
      ...charts.roc.map((row, place) => {
        const on = few || row.name === chosen;
        return {
          type: 'scatter', mode: 'lines', name: `${row.name} (${row.auroc.toFixed(3)})`, showlegend: on,
          x: row.false_positive_rate, y: row.true_positive_rate, opacity: on ? 1 : 0.35,
          line: { color: few ? palette[place] : on ? second() : color('soft'), width: on ? 2 : 1 },
          hovertemplate: 'found %{y:.1%}, false alarms %{x:.1%}',
        };
      }),
    ],
    layout: {
      xaxis: { title: { text: 'others taken for it (false positive rate)' }, range: [-0.01, 1.01], tickformat: '.0%' },
      yaxis: { title: { text: 'found (true positive rate)' }, range: [0, 1.02], tickformat: '.0%' },
      legend: { orientation: 'v', x: 1, xanchor: 'right', y: 0.02, yanchor: 'bottom', bgcolor: 'rgba(0,0,0,0)' },
    },
  }));
  if (show && choice && !few) {
    for (const row of charts.roc) choice.add(new Option(`${row.name} (${row.auroc.toFixed(3)})`, row.name));
    choice.closest('p').hidden = false;
    choice.addEventListener('change', () => { chosen = choice.value; redraw(); });
  }
}

if (charts.confusion) {
  const c = charts.confusion;
  const names = c.kept.map(place => charts.names[place]);
  const short = names.map(name => name.length > 18 ? name.slice(0, 17) + '…' : name);
  let shares = true;
  const rows = c.matrix.map(row => Math.max(row.reduce((sum, count) => sum + count, 0), 1));
  const few = names.length <= 20;
  const places = names.map((_, place) => place);
  // On a phone's width names below the columns would leave no room for them.
  const labeled = few && (window.innerWidth > 560 || names.length <= 4);
  const matrix = draw('confusion', () => ({
    data: [{
      type: 'heatmap', x: places, y: places, z: c.matrix.map((row, y) => row.map(count => count / rows[y])),
      customdata: c.matrix.map((row, y) => row.map((count, x) => [names[y], names[x], count])),
      text: c.matrix.map((row, y) => row.map(count => !count ? '' : shares ? Math.round(count / rows[y] * 100) : count)),
      texttemplate: few ? '%{text}' : '', zmin: 0, zmax: 1, xgap: few ? 1 : 0, ygap: few ? 1 : 0,
      colorscale: [[0, color('card')], [0.001, mix(0.08)], [1, accent()]], showscale: false,
      hovertemplate: 'is %{customdata[0]}<br>said %{customdata[1]}<br>%{customdata[2]} images, %{z:.1%} of the row<extra></extra>',
    }],
    layout: {
      margin: { l: 40, r: 8, t: 8, b: 40 },
      xaxis: { title: { text: 'what the model says' }, tickvals: places, ticktext: short, showticklabels: labeled,
        showgrid: false, zeroline: false, constrain: 'domain', tickangle: Math.max(...short.map(name => name.length)) > 4 ? -45 : 0 },
      yaxis: { title: { text: 'what it is' }, tickvals: places, ticktext: short, showticklabels: few,
        autorange: 'reversed', showgrid: false, zeroline: false, scaleanchor: 'x', constrain: 'domain' },
    },
  }));
  // The accent color over the card, as one opaque color.
  function mix(share) {
    const read = name => color(name).match(/[0-9a-f]{2}/gi).map(part => parseInt(part, 16));
    const [over, under] = [read('accent'), read('card')];
    return 'rgb(' + over.map((value, i) => Math.round(value * share + under[i] * (1 - share))) + ')';
  }
  matrix.on('plotly_click', event => open(c.kept[event.points[0].y], c.kept[event.points[0].x]));
  for (const button of document.querySelectorAll('.pairs button')) {
    button.addEventListener('click', () => open(Number(button.dataset.true), Number(button.dataset.predicted)));
  }
  for (const button of document.querySelectorAll('.choice button')) {
    button.addEventListener('click', () => {
      shares = button.value === 'shares';
      for (const other of document.querySelectorAll('.choice button')) other.ariaPressed = String(other === button);
      redraw();
    });
  }
  const pick = { true: document.getElementById('cell-true'), predicted: document.getElementById('cell-predicted') };
  for (const select of Object.values(pick)) {
    c.kept.forEach((place, row) => select.add(new Option(names[row], place)));
    select.addEventListener('change', () => open(Number(pick.true.value), Number(pick.predicted.value)));
  }

  function open(trueClass, predicted) {
    const cell = document.getElementById('cell');
    const row = c.kept.indexOf(trueClass), column = c.kept.indexOf(predicted);
    const count = c.matrix[row][column];
    const items = c.cells[trueClass + ',' + predicted] || [];
    const head = document.createElement('h3');
    const right = trueClass === predicted;
    head.textContent = right ? `${names[row]}, and the model says so: ${count} images`
      : `${names[row]}, but the model says ${names[column]}: ${count} images`;
    if (count === 1) head.textContent = head.textContent.replace(/images$/, 'image');
    const grid = document.createElement('div');
    grid.className = 'grid';
    for (const item of items) {
      const figure = document.createElement('figure');
      if (item.image) {
        const image = new Image();
        image.src = item.image;
        image.alt = item.name;
        image.addEventListener('load', () => image.classList.toggle('small', image.naturalWidth < 64));
        figure.append(image);
      }
      const caption = document.createElement('figcaption');
      const name = document.createElement('span');
      name.className = 'name';
      name.textContent = item.name.split('/').pop();
      caption.append(`${(item.probability * 100).toFixed(1)} %`, name);
      caption.title = item.name;
      figure.append(caption);
      grid.append(figure);
    }
    cell.replaceChildren(head, grid);
    if (items.length < count) {
      const more = document.createElement('p');
      more.className = 'soft';
      more.textContent = `The ${items.length} surest answers; predictions.csv has all.`;
      cell.append(more);
    }
    pick.true.value = trueClass;
    pick.predicted.value = predicted;
    cell.scrollIntoView({ block: 'nearest' });
  }
}
