// Many pictures at once: a row of a table for each, and all of it as CSV.

import { percent } from './words.js';

const $ = (id) => document.getElementById(id);

let classes = [];
let rows = []; // {file, found: [{label, share}], error: text}, in the order given

export function hideTable() {
  $('many').hidden = true;
}

/** An empty table; `open` is called with a file that is clicked. */
export function startTable(count, labels, open) {
  [classes, rows] = [labels, []];
  $('many').hidden = false;
  $('many-title').textContent = `${count} pictures`;
  $('rows').replaceChildren();
  $('rows').onclick = ({ target }) => {
    const button = target.closest('button');
    if (button) open(rows[button.value].file);
  };
}

/** A row with classes, the likeliest first, or with the reason why there are none. */
export function addRow(file, found, error = '') {
  const row = $('rows').insertRow();
  const name = row.insertCell();
  if (found) {
    const button = document.createElement('button');
    Object.assign(button, { type: 'button', value: rows.length });
    button.textContent = file.name;
    name.append(button);
    row.insertCell().textContent = found[0].label;
    row.insertCell().textContent = percent(found[0].share);
  } else {
    name.textContent = file.name;
    const reason = row.insertCell();
    Object.assign(reason, { colSpan: 2, className: 'bad', textContent: error });
  }
  rows.push({ file, found, error });
}

/** The table as CSV text (RFC 4180), with the probabilities of all classes. */
export function toCsv() {
  const quote = (value) => `"${String(value).replaceAll('"', '""')}"`;
  const shares = classes.map((label) => `probability_${label}`);
  const lines = [['file', 'error', 'class', ...shares]];
  for (const { file, found, error } of rows) {
    const share = new Map(found?.map((one) => [one.label, one.share]));
    const all = classes.map((label) => share.get(label) ?? '');
    lines.push([file.name, error, found?.[0].label ?? '', ...all]);
  }
  return lines.map((line) => `${line.map(quote).join(',')}\r\n`).join('');
}

/** Hands the browser a file to save. */
export function download(name, text) {
  const link = document.createElement('a');
  // The mark tells spreadsheets that this is UTF-8.
  link.href = URL.createObjectURL(new Blob(['\ufeff', text], { type: 'text/csv' }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
