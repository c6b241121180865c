// A model in onnxruntime-web: WebAssembly on the CPU, in a thread of its own.

import * as ort from './ort.js';
import { readModel } from './metadata.js';
import { Told } from './told.js';

ort.env.wasm.wasmPaths = { wasm: new URL('ort.wasm', import.meta.url).href };
ort.env.wasm.proxy = true; // in a worker: the page answers while the model computes
// Several threads need memory that they share, which browsers give only to pages that
// their server isolates (two headers, see README.md); one thread works everywhere.
const cores = navigator.hardwareConcurrency ?? 1;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, cores) : 1;
ort.env.logLevel = 'error';

const INPUT = 'image';
const OUTPUT = 'probabilities';

/** The version of onnxruntime-web, and how many threads it takes. */
export function describeRuntime() {
  const threads = ort.env.wasm.numThreads;
  return `onnxruntime-web ${ort.env.versions.web}, ${threads} thread${
    threads > 1 ? 's' : ''
  }`;
}

/** A model from the bytes of its file; Told with the reason where it cannot be used. */
export async function loadClassifier(name, bytes) {
  const model = readModel(name, bytes);
  let session;
  try {
    session = await ort.InferenceSession.create(bytes, {
      executionProviders: ['wasm'],
    });
  } catch (error) {
    throw new Told(`${name} cannot be loaded: ${firstLine(error)}`);
  }
  const wrong = findFault(session, model);
  if (wrong) {
    await session.release();
    throw new Told(`${name} is not a model for this page: ${wrong}.`);
  }
  return {
    model,
    classify: (pixels) => classify(session, model, pixels),
    release: () => session.release(),
  };
}

function findFault(session, { height, width, channels, labels }) {
  const [input] = session.inputMetadata;
  const wanted = [1, height, width, channels];
  if (session.inputNames.length !== 1 || input.name !== INPUT) {
    return `its inputs are ${session.inputNames.join(', ')}, not ${INPUT} alone`;
  }
  if (!fits(input, 'uint8', wanted)) {
    const shape = ['batch', ...wanted.slice(1)].join(', ');
    return `its ${INPUT} is ${describe(input)}, not uint8 [${shape}]`;
  }
  const output = session.outputMetadata.find((one) => one.name === OUTPUT);
  if (!output) {
    return `its outputs are ${session.outputNames.join(', ')}, none is ${OUTPUT}`;
  }
  if (!fits(output, 'float32', [1, labels.length])) {
    return `its ${OUTPUT} are ${describe(output)} for ${labels.length} classes`;
  }
  return null;
}

// Sizes that have a name, such as batch, fit every number.
function fits({ isTensor, type, shape }, wantedType, wanted) {
  return (
    isTensor &&
    type === wantedType &&
    shape.length === wanted.length &&
    shape.every((n, i) => typeof n !== 'number' || n < 0 || n === wanted[i])
  );
}

function describe({ isTensor, type, shape }) {
  return isTensor ? `${type} [${shape.join(', ')}]` : 'no tensor';
}

/** [{label, share}] of all classes, the likeliest first. */
async function classify(session, { height, width, channels, labels }, pixels) {
  const shape = [1, height, width, channels];
  // A copy, as what goes to a worker is gone from here.
  const image = new ort.Tensor('uint8', pixels.slice(), shape);
  let shares;
  try {
    shares = (await session.run({ [INPUT]: image }, [OUTPUT]))[OUTPUT].data;
  } catch (error) {
    throw new Told(`The model cannot compute this picture: ${firstLine(error)}`);
  }
  if (shares.length !== labels.length) {
    const numbers = `${shares.length} numbers for ${labels.length} classes`;
    throw new Told(`The model gives ${numbers}.`);
  }
  const found = labels.map((label, i) => ({ label, share: shares[i] }));
  return found.sort((one, other) => other.share - one.share);
}

function firstLine(error) {
  return String(error?.message ?? error).split('\n')[0].slice(0, 200);
}
