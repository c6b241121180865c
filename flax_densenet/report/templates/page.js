'use strict';
// Shared by the pages: tips of charts, legends that hide lines, sortable tables.
const data = JSON.parse(document.getElementById('page-data').textContent);

// What browsers show of a <title> after a while is shown at once.
const tip = document.getElementById('tip');
const texts = new Map();
function show(event) {
  const mark = event.target.closest('svg.plot *');
  const holder = mark && mark.closest('.tip, .point, g, rect');
  if (holder && !texts.has(holder)) {
    const title = [...holder.children].find(child => child.tagName === 'title');
    texts.set(holder, title ? title.textContent : '');
    if (title) { holder.setAttribute('aria-label', title.textContent); title.remove(); }
  }
  const text = holder && texts.get(holder);
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const { clientX: x, clientY: y } = event;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - width - 8)) + 'px';
  tip.style.top = (y + height + 20 > innerHeight ? y - height - 12 : y + 14) + 'px';
}
for (const name of ['pointermove', 'pointerdown']) document.addEventListener(name, show);
document.addEventListener('scroll', () => { tip.hidden = true; }, { passive: true });

for (const button of document.querySelectorAll('.legend button')) {
  button.addEventListener('click', () => {
    const on = button.ariaPressed !== 'true', name = button.dataset.group;
    for (const one of document.querySelectorAll('[data-group]')) {
      if (one.dataset.group !== name) continue;
      if (one.tagName === 'BUTTON') one.ariaPressed = String(on);
      else one.style.display = on ? '' : 'none';
    }
  });
}

for (const button of document.querySelectorAll('.copy')) {
  button.addEventListener('click', async () => {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Select the text and press Ctrl+C';
    }
    setTimeout(() => { button.textContent = before; }, 1500);
  });
}

for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows];
      const numbers = rows.every(row => key(row) === '' || !Number.isNaN(Number(key(row))));
      // Numbers begin with the largest, names with A.
      const now = head.getAttribute('aria-sort');
      const down = now ? now === 'ascending' : numbers;
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
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
function sharpen(image) {
  const mark = () => image.classList.toggle('small', image.naturalWidth < 64);
  if (image.complete && image.naturalWidth) mark(); else image.addEventListener('load', mark);
}
for (const image of document.images) sharpen(image);

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
