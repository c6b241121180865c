// An image file to pixels: upright, laid over white, in the numbers of the file.

import { Told } from './told.js';
import { decodeSize } from './prepare.js';

// Above so many pixels an image is made smaller by the canvas; phones allow no larger.
const LARGE = 16e6;

/** The pixels of an image file (ImageData, RGBA, opaque) for a model. */
export async function readPicture(file, model) {
  const bitmap = await decode(file);
  const { width, height } = bitmap;
  let shrink = 1;
  if (width * height > LARGE) {
    const least = 2 * decodeSize(model); // twice the size: no visible difference
    shrink = Math.max(1, Math.floor(Math.min(width, height) / least));
  }
  const canvas = document.createElement('canvas');
  canvas.width = Math.floor(width / shrink);
  canvas.height = Math.floor(height / shrink);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  if (context === null) throw new Told(`${file.name} is too large for this browser.`);
  context.imageSmoothingQuality = 'high';
  context.fillStyle = 'white';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  try {
    return context.getImageData(0, 0, canvas.width, canvas.height);
  } catch {
    throw new Told(`${file.name} is too large for this browser.`);
  }
}

async function decode(file) {
  try {
    // Turned upright by its EXIF data, which is the default; colour profiles stay out
    // of it, as in training.
    return await createImageBitmap(file, { colorSpaceConversion: 'none' });
  } catch {
    throw new Told(`${file.name} is not an image that this browser can read.`);
  }
}
