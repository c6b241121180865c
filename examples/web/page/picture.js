// An image file to pixels: upright, laid over white, in the numbers of the file.

import { Told } from './told.js';

// What the canvases of phones allow; a larger image is made as small by the canvas.
const MOST_PIXELS = 16e6;
const LONGEST = 16384;

/** The pixels of an image file: ImageData, RGBA, opaque. */
export async function readPicture(file) {
  const bitmap = await decode(file);
  const { width, height } = bitmap;
  const byPixels = Math.sqrt(MOST_PIXELS / (width * height));
  const scale = Math.min(1, byPixels, LONGEST / Math.max(width, height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.floor(width * scale));
  canvas.height = Math.max(1, Math.floor(height * scale));
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
    // Turned upright by its EXIF data, which is the default; color profiles stay out
    // of it, as in training.
    return await createImageBitmap(file, { colorSpaceConversion: 'none' });
  } catch {
    throw new Told(`${file.name} is not an image that this browser can read.`);
  }
}
