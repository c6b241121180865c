// What the page does: takes files, asks the model, shows what it says.

import { hasCamera, takePicture } from './camera.js';
import { describeRuntime, loadClassifier } from './classifier.js';
import { addRow, download, hideTable, startTable, toCsv } from './many.js';
import { readPicture } from './picture.js';
import { findBox, prepare } from './prepare.js';
import { Told } from './told.js';
import { describeSize, percent } from './words.js';

const SHOWN = 5; // classes
const NAMED = 6; // of many classes, as examples
const NO_MODEL =
  'There is no model yet: put model.onnx beside this page and load it again, or drop ' +
  'an .onnx file here.';
const $ = (id) => document.getElementById(id);

let classifier = null; // the model in use
let pictures = []; // the files in view
let working = Promise.resolve(); // what is asked for happens in turn
let asked = 0; // what was overtaken by something newer is not begun

function say(text) {
  $('status').textContent = text;
}

function fail(text) {
  $('error').textContent = text;
  $('error').hidden = !text;
  if (text) say('');
}

// What the page waits for.
function invite() {
  document.body.classList.remove('starting');
  document.body.classList.toggle('no-model', !classifier);
  $('invite').textContent = !classifier
    ? 'Drop a model here, an .onnx file of flax_densenet, or'
    : pictures.length
      ? 'Others? Drop them here, paste one, or'
      : 'Drop pictures here, paste one, or';
}

// Does the task after those before it; what it throws becomes the line on the page.
function inTurn(task) {
  working = working.then(async () => {
    try {
      await task();
    } catch (error) {
      fail(error instanceof Told ? error.message : `Something went wrong: ${error}`);
    }
  });
  return working;
}

async function fetchModel() {
  say('Loading the model …');
  let answer;
  try {
    answer = await fetch('model.onnx', { cache: 'no-cache' });
  } catch {
    throw new Told('There is no model: the server of this page does not answer.');
  }
  if (!answer.ok) throw new Told(NO_MODEL);
  await useModel('model.onnx', await answer.arrayBuffer());
}

async function useModel(name, buffer) {
  say(`Loading ${name} …`);
  const loaded = await loadClassifier(name, new Uint8Array(buffer));
  await classifier?.release();
  classifier = loaded;
  showModel(loaded.model);
  invite();
  fail('');
  say('');
}

async function look(file) {
  const { model, classify } = classifier;
  fail('');
  say('The model is looking …');
  $('result').classList.add('waiting');
  try {
    const begin = performance.now();
    const image = await readPicture(file);
    const pixels = prepare(image, model);
    const middle = performance.now();
    const found = await classify(pixels);
    const end = performance.now();
    show(found, [middle - begin, end - middle]);
    showPicture(file, image, pixels);
    say('');
  } catch (error) {
    $('result').hidden = true;
    throw error;
  } finally {
    $('result').classList.remove('waiting');
  }
}

function show(found, [before, run]) {
  const [best] = found;
  $('verdict').textContent = classifier.model.multiLabel
    ? 'What is in it'
    : `Most likely ${best.label}, ${percent(best.share)}`;
  $('classes').replaceChildren(...found.slice(0, SHOWN).map(makeRow));
  const rest = found.length - SHOWN;
  const words = rest === 1 ? 'other class is' : 'other classes are';
  const others = rest > 0 ? `${rest} ${words} less likely. ` : '';
  const [all, first, second] = [before + run, before, run].map((ms) => ms.toFixed(0));
  $('time').textContent =
    `${others}It took ${all} ms: ${first} ms to prepare the picture, ` +
    `${second} ms for the model.`;
}

function makeRow({ label, share }) {
  const item = document.createElement('li');
  const [name, number, track] = ['name', 'share', 'track'].map((kind) => {
    const part = document.createElement('span');
    part.className = kind;
    return part;
  });
  name.textContent = label;
  number.textContent = percent(share);
  track.append(document.createElement('i'));
  track.firstChild.style.width = `${100 * share}%`;
  item.append(name, number, track);
  return item;
}

// The picture, in it what the model gets of it, and beside it what that becomes.
function showPicture(file, { width, height }, pixels) {
  const { model } = classifier;
  const { channels } = model;
  URL.revokeObjectURL($('picture').src);
  $('picture').src = URL.createObjectURL(file);
  $('picture').classList.toggle('tiny', width < 128);
  const [left, top, right, bottom] = findBox(width, height, model);
  const whole = right - left >= width - 1 && bottom - top >= height - 1;
  const place = {
    left: left / width,
    top: top / height,
    width: (right - left) / width,
    height: (bottom - top) / height,
  };
  for (const [key, share] of Object.entries(place)) {
    $('square').style[key] = `${100 * share}%`;
  }
  $('square').hidden = whole;

  const canvas = $('seen');
  canvas.width = model.width;
  canvas.height = model.height;
  canvas.classList.toggle('tiny', Math.min(model.width, model.height) < 64);
  const image = new ImageData(model.width, model.height);
  for (let i = 0; i < model.width * model.height; i++) {
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = pixels[channels * i + (c % channels)];
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
  const part = whole ? 'the whole picture' : 'the part in the frame';
  const gray = channels === 1 ? ' in gray' : '';
  const seen = `${model.width}\u00a0×\u00a0${model.height}`; // on one line
  $('meaning').textContent = `The model gets ${part}, as ${seen} pixels${gray}.`;

  const isNew = $('result').hidden;
  $('result').hidden = false;
  document.body.classList.add('has-picture');
  invite();
  if (isNew) $('result').scrollIntoView({ block: 'nearest' });
}

function showModel(model) {
  const { labels } = model;
  let named = `${labels.length} classes`;
  if (labels.length > 2 * NAMED) {
    named += `, such as ${labels.slice(0, NAMED).join(', ')}`;
  } else if (labels.length > 1) {
    named += `: ${labels.slice(0, -1).join(', ')} and ${labels.at(-1)}`;
  } else {
    named = `one class: ${labels[0]}`;
  }
  const way = model.multiLabel
    ? 'It judges each for itself, so that none or several can be in a picture.'
    : 'It chooses among these alone, also when the picture shows something else.';
  $('about').textContent = `This model, ${model.variant}, knows ${named}. ${way}`;
  const share = Number((100 * model.cropFraction).toFixed(1));
  const isSquare = model.width === model.height;
  const shape = isSquare ? 'a square' : 'a rectangle';
  const whole = isSquare ? 'the shorter side' : 'the largest that fits';
  const crop = `${shape} in the middle, ${share} % of ${whole}`;
  const color = model.channels === 1 ? 'gray' : 'color';
  const facts = {
    File: `${model.name}, ${describeSize(model.bytes)}`,
    Network: model.variant,
    Picture:
      `${model.width} × ${model.height} pixels, ${color}; ` +
      `${model.resize === 'crop' ? crop : 'the whole picture'}, ${model.interpolation}`,
    'Runs in': `${describeRuntime()}, on this machine's processor`,
  };
  $('facts').replaceChildren(
    ...Object.entries(facts).flatMap(([term, fact]) => {
      const pair = [document.createElement('dt'), document.createElement('dd')];
      pair[0].textContent = term;
      pair[1].textContent = fact;
      return pair;
    }),
  );
}

// Several pictures, in a table; `isOvertaken` tells of others that were given since.
async function lookAtMany(files, isOvertaken) {
  const { model, classify } = classifier;
  fail('');
  $('result').hidden = true;
  document.body.classList.add('has-picture');
  startTable(files.length, model.labels, (file) =>
    inTurn(async () => {
      await look(file);
      $('result').scrollIntoView({ block: 'nearest' });
    }),
  );
  for (const [place, file] of files.entries()) {
    if (isOvertaken()) return;
    say(`The model is looking at picture ${place + 1} of ${files.length} …`);
    try {
      addRow(file, await classify(prepare(await readPicture(file), model)));
    } catch (error) {
      if (!(error instanceof Told)) throw error;
      addRow(file, null, error.message);
    }
  }
  invite();
  say('');
}

// Files that were dropped, pasted or chosen: a model, pictures or both.
function take(files) {
  const all = [...(files ?? [])];
  if (!all.length) return;
  const isModel = (file) => /\.onnx$/i.test(file.name);
  const model = all.find(isModel);
  const given = all.filter((file) => !isModel(file));
  if (given.length) pictures = given;
  const mine = ++asked;
  inTurn(async () => {
    if (model) await useModel(model.name, await model.arrayBuffer());
    if (!classifier) throw new Told(NO_MODEL);
    if (mine !== asked) return;
    if (pictures.length > 1) {
      await lookAtMany(pictures, () => mine !== asked);
    } else if (pictures.length) {
      hideTable();
      await look(pictures[0]);
    }
  });
}

// What the camera sees, judged frame by frame until one is taken.
async function useCamera() {
  const watch = (video) =>
    inTurn(async () => {
      const image = await readPicture(video);
      const [best] = await classifier.classify(prepare(image, classifier.model));
      $('live').textContent = `${best.label}, ${percent(best.share)}`;
    });
  $('live').textContent = '\u00a0';
  try {
    const file = await takePicture(watch);
    if (file) take([file]);
  } catch (error) {
    fail(error instanceof Told ? error.message : `Something went wrong: ${error}`);
  }
}

for (const [button, input] of [
  ['choose', 'file'],
  ['choose-model', 'model'],
  ['choose-first', 'model'],
]) {
  $(button).addEventListener('click', () => $(input).click());
}
for (const input of ['file', 'photo', 'model']) {
  $(input).addEventListener('change', () => {
    take($(input).files);
    $(input).value = ''; // so that the same file can be chosen again
  });
}
$('camera').addEventListener('click', () => {
  const isPhone = matchMedia('(pointer: coarse)').matches; // has an app of its own
  if (isPhone) $('photo').click();
  else useCamera();
});
$('download').addEventListener('click', () => {
  download('predictions.csv', toCsv());
});
document.addEventListener('paste', (event) => take(event.clipboardData.files));
document.addEventListener('dragover', (event) => {
  event.preventDefault();
  document.body.classList.add('over');
});
document.addEventListener('dragleave', (event) => {
  if (!event.relatedTarget) document.body.classList.remove('over');
});
document.addEventListener('drop', (event) => {
  event.preventDefault();
  document.body.classList.remove('over');
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  else fail('That was no file: save the picture first, then drop it here.');
});
inTurn(fetchModel).then(invite);
hasCamera().then((has) => document.body.classList.toggle('has-camera', has));
