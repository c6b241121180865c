// How an image becomes the one that a model takes, in the numbers of
// flax_densenet/images.py. A canvas resizes as its browser likes, so the resizing is
// done here, as Pillow does it: to the same 8-bit values. Where Pillow 13 begins with the
// columns (images twice as tall as wide, results that are not square) they may be one
// off.

const FILTERS = {
  bilinear: { reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    reach: 2,
    weight: (x) => {
      const [a, d] = [-0.5, Math.abs(x)];
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
};
const BITS = 22; // Pillow's weights are whole numbers, of 2^22

/**
 * The part of an image that the model gets: [left, top, right, bottom] in pixels of the
 * image, with fractions. All of it for `stretch`, a part in its middle for `crop`.
 */
export function findBox(width, height, model) {
  const { resize, cropFraction } = model;
  if (resize === 'stretch') return [0, 0, width, height];
  const sides = [width, height];
  const wanted = [model.width, model.height];
  const whole = wanted.map((n) => Math.trunc(n / cropFraction));
  const limit = whole[0] * height < whole[1] * width ? 1 : 0;
  const parts = sides.map((n, i) => {
    const exact = (whole[limit] * n) / sides[limit];
    const shape = whole[0] === whole[1] ? Math.trunc(exact) : roundToEven(exact);
    const start = roundToEven((shape - wanted[i]) / 2);
    return { start, end: start + wanted[i], scale: n / shape };
  });
  return [
    ...parts.map(({ start, scale }) => start * scale),
    ...parts.map(({ end, scale }) => end * scale),
  ];
}

/**
 * An image to what the model takes.
 *
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGBA, opaque.
 * @param {object} model of readModel.
 * @returns {Uint8Array} [height, width, channels]
 */
export function prepare({ data, width, height }, model) {
  const { channels, interpolation } = model;
  let rgb;
  if (width === model.width && height === model.height) {
    rgb = dropAlpha(data);
  } else {
    const [left, top, right, bottom] = findBox(width, height, model);
    const filter = FILTERS[interpolation];
    const across = makeTaps(width, left, right, model.width, filter);
    const down = makeTaps(height, top, bottom, model.height, filter);
    rgb = resizeColumns(resizeRows(data, width, height, across), model.width, down);
  }
  return channels === 1 ? toGray(rgb) : rgb;
}

// For each pixel of the result the first pixel that it is made of, and their weights.
function makeTaps(length, start, end, count, { reach, weight }) {
  [start, end] = [Math.fround(start), Math.fround(end)];
  const scale = Math.fround(end - start) / count;
  const stretch = Math.max(scale, 1); // antialiasing
  return Array.from({ length: count }, (_, place) => {
    const center = start + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach * stretch + 0.5));
    const last = Math.min(length, Math.trunc(center + reach * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, i) =>
      weight((i + first - center + 0.5) * (1 / stretch)),
    );
    const sum = weights.reduce((a, b) => a + b, 0);
    const whole = weights.map((w) => {
      const share = (w / sum) * 2 ** BITS;
      return Math.trunc(share + (share < 0 ? -0.5 : 0.5));
    });
    return { first, weights: Int32Array.from(whole) };
  });
}

function clip(sum) {
  return Math.min(255, Math.max(0, sum >> BITS));
}

// RGBA [height, width] to RGB [height, taps].
function resizeRows(data, width, height, taps) {
  const out = new Uint8Array(height * taps.length * 3);
  let at = 0;
  for (let row = 0; row < height; row++) {
    for (const { first, weights } of taps) {
      let from = (row * width + first) * 4;
      let [red, green, blue] = [2 ** (BITS - 1), 2 ** (BITS - 1), 2 ** (BITS - 1)];
      for (let i = 0; i < weights.length; i++, from += 4) {
        red += data[from] * weights[i];
        green += data[from + 1] * weights[i];
        blue += data[from + 2] * weights[i];
      }
      out[at++] = clip(red);
      out[at++] = clip(green);
      out[at++] = clip(blue);
    }
  }
  return out;
}

// RGB [height, width] to RGB [taps, width].
function resizeColumns(data, width, taps) {
  const line = width * 3;
  const out = new Uint8Array(taps.length * line);
  taps.forEach(({ first, weights }, row) => {
    for (let column = 0; column < line; column++) {
      let sum = 2 ** (BITS - 1);
      for (let i = 0; i < weights.length; i++) {
        sum += data[(first + i) * line + column] * weights[i];
      }
      out[row * line + column] = clip(sum);
    }
  });
  return out;
}

function dropAlpha(data) {
  return Uint8Array.from({ length: (data.length / 4) * 3 }, (_, i) => {
    return data[Math.floor(i / 3) * 4 + (i % 3)];
  });
}

// Pillow's luma, of 2^16.
function toGray(rgb) {
  return Uint8Array.from({ length: rgb.length / 3 }, (_, i) => {
    const [red, green, blue] = rgb.subarray(3 * i, 3 * i + 3);
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
  });
}

// As Python rounds: a half to the even neighbor.
function roundToEven(x) {
  const below = Math.floor(x);
  const rest = x - below;
  if (rest !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}
