'use strict';
// The images of a row of predictions.csv, from its card on the page or from the data.
function contents(row) {
  const card = document.querySelector(`.card[data-row="${row}"]`);
  if (card) {
    return {
      heading: card.querySelector('b').textContent, path: card.dataset.path,
      panels: [...card.querySelectorAll('.panel')].map(panel => ({
        image: panel.querySelector('img').src, caption: panel.querySelector('small').textContent })),
    };
  }
  const extra = data.extra[row];
  return extra && {
    heading: extra.heading, path: extra.name,
    panels: [{ image: extra.image, caption: 'Original' }, ...extra.maps],
  };
}

const box = document.getElementById('box');
let opened = { list: [], place: 0 };

// list: what contents() gives; the arrow keys go through it.
function enlarge(list, place) {
  opened = { list, place: (place + list.length) % list.length };
  const item = list[opened.place];
  document.getElementById('box-heading').textContent = item.heading;
  document.getElementById('box-path').textContent = item.path;
  document.getElementById('box-copy').dataset.copy = item.path;
  document.getElementById('box-panels').replaceChildren(...item.panels.map(panel => {
    const image = make('img', { src: panel.image, alt: panel.caption });
    sharpen(image);
    return make('div', { className: 'panel' }, image, make('small', {}, panel.caption));
  }));
  if (!box.open) box.showModal();
}
for (const button of box.querySelectorAll('[data-move]')) {
  button.addEventListener('click', () => enlarge(opened.list, opened.place + Number(button.dataset.move)));
}
box.querySelector('[data-close]').addEventListener('click', () => box.close());
box.addEventListener('click', event => { if (event.target === box) box.close(); });
box.addEventListener('keydown', event => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (move) enlarge(opened.list, opened.place + move);
});
for (const card of document.querySelectorAll('.card')) {
  card.querySelector('.zoom').addEventListener('click', () => {
    const all = [...card.parentElement.querySelectorAll('.card')];
    enlarge(all.map(one => contents(one.dataset.row)), all.indexOf(card));
  });
}

const highlight = document.getElementById('roc-class');
if (highlight) {
  highlight.addEventListener('change', () => {
    for (const line of document.querySelectorAll('#roc g[data-group]')) {
      const on = line.dataset.group === highlight.value;
      line.classList.toggle('chosen', on);
      if (on) line.parentElement.append(line);
    }
  });
}

if (data.confusion) {
  const c = data.confusion, names = c.kept.map(place => data.names[place]);
  const matrix = document.getElementById('confusion');
  const pick = { true: document.getElementById('cell-true'), predicted: document.getElementById('cell-predicted') };
  for (const select of Object.values(pick)) {
    c.kept.forEach((place, row) => select.add(new Option(names[row], place)));
    select.addEventListener('change', () => open(Number(pick.true.value), Number(pick.predicted.value)));
  }
  for (const button of document.querySelectorAll('[data-cell]')) {
    button.addEventListener('click', () => open(...button.dataset.cell.split(',').map(Number)));
  }
  if (matrix.tagName === 'svg') {
    matrix.addEventListener('click', event => {
      const area = matrix.getBoundingClientRect();
      const at = (value, start, size) => Math.min(c.kept.length - 1, Math.floor((value - start) / size * c.kept.length));
      open(c.kept[at(event.clientY, area.top, area.height)], c.kept[at(event.clientX, area.left, area.width)]);
    });
  }
  for (const button of document.querySelectorAll('.choice button')) {
    button.addEventListener('click', () => {
      matrix.classList.toggle('shares', button.value === 'shares');
      for (const other of document.querySelectorAll('.choice button')) other.ariaPressed = String(other === button);
    });
  }

  function open(trueClass, predicted, quiet) {
    const cell = document.getElementById('cell');
    const row = c.kept.indexOf(trueClass), column = c.kept.indexOf(predicted);
    const count = c.matrix[row][column], items = c.cells[trueClass + ',' + predicted] || [];
    const images = `${count.toLocaleString('en')} image${count === 1 ? '' : 's'}`;
    const title = trueClass === predicted ? `${names[row]}, predicted correctly`
      : `Actual ${names[row]}, predicted ${names[column]}`;
    const shown = items.map(item => contents(item.row) || {
      heading: `${title} (${item.probability})`, path: item.name,
      panels: item.image ? [{ image: item.image, caption: 'As the network sees it' }] : [],
    });
    const grid = make('div', { className: 'grid' }, ...items.map((item, place) => {
      const button = make('button', { type: 'button', className: 'zoom', title: item.name });
      button.ariaLabel = 'Enlarge ' + item.name;
      if (item.image) {
        const image = make('img', { src: item.image, alt: item.name });
        sharpen(image);
        button.append(image);
      } else button.append(item.name.split('/').pop());
      button.addEventListener('click', () => enlarge(shown, place));
      return make('figure', {}, button, make('figcaption', { title: item.name }, item.probability,
        make('span', { className: 'path' }, item.name.split('/').pop())));
    }));
    cell.replaceChildren(make('h3', {}, `${title}: ${images}`), grid);
    if (items.length && items.length < count) {
      cell.append(make('p', { className: 'soft' }, `The ${items.length} most confident; predictions.csv has all.`));
    }
    pick.true.value = trueClass;
    pick.predicted.value = predicted;
    for (const button of document.querySelectorAll('[data-cell]')) {
      button.ariaPressed = String(button.dataset.cell === `${trueClass},${predicted}`);
    }
    if (!quiet) cell.scrollIntoView({ block: 'nearest' });
  }
  const first = c.pairs[0];
  if (first) open(first.true, first.predicted, true); else open(c.kept[0], c.kept[0], true);
}

const choice = document.getElementById('choice');
if (choice) {
  const slider = document.getElementById('threshold'), select = document.getElementById('choice-class');
  const reset = document.getElementById('choice-reset'), numbers = document.getElementById('choice-numbers');
  const number = count => count.toLocaleString('en');
  // Three digits, or more near 0 and 1 and between scores that lie close together.
  function write(value) {
    const own = String(value).split('.')[1]?.length ?? 0, edge = Math.min(value, 1 - value);
    const near = edge > 0 ? 2 + Math.ceil(-Math.log10(edge)) : 0;
    return value.toFixed(Math.max(3, Math.min(9, Math.max(own, near))));
  }
  const row = () => data.choices[select ? select.value : 0];
  const own = () => row().thresholds[row().start].toFixed(3);

  function update() {
    const { positives, negatives, thresholds, found, alarms } = row(), at = slider.valueAsNumber;
    const hits = found[at], wrong = alarms[at], missed = positives - hits, left = negatives - wrong;
    const shares = [
      [hits, positives, `${number(hits)} of ${number(positives)} found, ${number(missed)} missed`],
      [left, negatives, `${number(wrong)} false alarm${wrong === 1 ? '' : 's'} of ${number(negatives)} negatives`],
      [hits, hits + wrong, `${number(hits)} of ${number(hits + wrong)} positive decisions right`],
      [left, missed + left, `${number(left)} of ${number(missed + left)} negative decisions right`],
    ].map(([part, all, words]) => [all ? (100 * part / all).toFixed(1) + '%' : '-', words]);
    shares.forEach(([share, words], place) => {
      const [, value, note] = numbers.children[place].children;
      value.textContent = share;
      note.textContent = words;
    });
    const shown = at === row().start ? own() : write(thresholds[at]);
    document.getElementById('threshold-value').textContent = shown;
    slider.ariaValueText = `${shown}: sensitivity ${shares[0][0]}, specificity ${shares[1][0]}`;
    reset.disabled = at === row().start;
  }
  function start() {
    slider.max = row().thresholds.length - 1;
    slider.value = row().start;
    reset.textContent = `Back to ${own()}`;
    update();
  }
  slider.addEventListener('input', update);
  reset.addEventListener('click', () => { start(); slider.focus(); });
  if (select) select.addEventListener('change', start);
  choice.hidden = false;
  start();
}
