// What an exporter wrote into `metadata_props` of an .onnx file. onnxruntime-web does
// not hand it out (microsoft/onnxruntime#16547), so it is read from the bytes: protobuf,
// of which two messages are needed, and the weights are skipped.

import { Told } from './told.js';

const METADATA_PROPS = 14; // of ModelProto
const KEY = 1; // of StringStringEntryProto
const VALUE = 2;
const RESIZES = ['stretch', 'crop'];
const INTERPOLATIONS = ['bilinear', 'bicubic'];

// Yields [number, bytes] of the fields of a message that have a length.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; factor < 2 ** 64; factor *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
    throw new RangeError('no varint');
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else throw new RangeError('no wire type of protobuf 3');
  }
  if (at > bytes.length) throw new RangeError('cut short');
}

/** The `metadata_props` of an .onnx file (Uint8Array), as a Map of strings. */
export function readMetadata(bytes) {
  const text = new TextDecoder();
  const found = new Map();
  for (const [number, entry] of fields(bytes)) {
    if (number !== METADATA_PROPS) continue;
    const { [KEY]: key, [VALUE]: value } = Object.fromEntries(fields(entry));
    found.set(text.decode(key), text.decode(value));
  }
  return found;
}

// A side in pixels, or `HEIGHT,WIDTH`.
function readSize(text) {
  const [height, width = height, ...more] = text.split(',').map(Number);
  return more.length ? { height: NaN } : { height, width };
}

/** What the page needs to know of a model, checked; `name` is that of its file. */
export function readModel(name, bytes) {
  let metadata;
  try {
    metadata = readMetadata(bytes);
  } catch {
    throw new Told(`${name} is not a whole .onnx file.`);
  }
  const get = (key, parse, fits) => {
    const text = metadata.get(key);
    if (text === undefined) {
      throw new Told(
        `${name} says nothing of its ${key}: it needs the metadata that ` +
          'flax_densenet writes when it exports a model.',
      );
    }
    try {
      const value = parse(text);
      if (fits(value)) return value;
    } catch {} // JSON that is none
    throw new Told(`${name} has a ${key} that cannot be used: ${text.slice(0, 100)}`);
  };
  const positive = (n) => Number.isInteger(n) && n > 0;
  const isText = (value) => typeof value === 'string';
  return {
    name,
    bytes: bytes.length,
    labels: get('labels', JSON.parse, (all) => all.length > 0 && all.every(isText)),
    ...get('image_size', readSize, (size) => Object.values(size).every(positive)),
    channels: get('channels', Number, (n) => n === 1 || n === 3),
    resize: get('resize', String, (one) => RESIZES.includes(one)),
    cropFraction: get('crop_fraction', Number, (n) => n > 0 && n <= 1),
    interpolation: get('interpolation', String, (one) => INTERPOLATIONS.includes(one)),
    multiLabel: metadata.get('multi_label') === 'true',
    variant: metadata.get('variant') ?? name,
  };
}
