// Puts the page and onnxruntime-web into one folder: node build.js [FOLDER]
//
// Nothing is compiled. Both files of onnxruntime-web get names whose kind every server
// knows: many send .mjs as plain bytes, which browsers refuse to run.

import { copyFileSync, cpSync, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const PARTS = {
  'ort.js': 'onnxruntime-web/wasm',
  'ort.wasm': 'onnxruntime-web/ort-wasm-simd-threaded.wasm',
};

const here = fileURLToPath(new URL('.', import.meta.url));
const folder = process.argv[2] ?? join(here, 'dist');
mkdirSync(folder, { recursive: true });
cpSync(join(here, 'page'), folder, { recursive: true });
for (const [name, part] of Object.entries(PARTS)) {
  copyFileSync(fileURLToPath(import.meta.resolve(part)), join(folder, name));
}
console.log(`${folder} is ready; put model.onnx into it and serve it`);
