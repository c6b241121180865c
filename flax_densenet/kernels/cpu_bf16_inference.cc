// A dense block and the stem in bfloat16, for inference.
//
// Features are in chunks of 32 channels, [C / 32][pixels][32], so that 16 pixels of a
// chunk form a tile in memory. The first norm and ReLU of a layer are applied to 32 pixels
// at a time, rounded once to bfloat16, and multiplied by the 1x1. Its bias and ReLU follow
// while the sums are in L1, and the result goes into a band of the image with a border of
// zeros. The 3x3 is nine shifted products over that band; only two of its rows are kept
// for the next band. The bottleneck therefore never leaves the cache.

#include <cmath>
#include <functional>
#include <vector>

#include "cpu_bf16.h"
#include "cpu_parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int PT = 2 * ROWS;           // pixels of a product
constexpr int64_t BAND = 192 * 1024;   // bytes of a padded band
constexpr int64_t TURN = 1024 * 1024;  // bytes of the features of one turn

// Reads what packed_bfloat16.py wrote.
struct Packed {
  const float* vectors;
  const bf16* weights;
  const float* vector(int n) {
    const float* now = vectors;
    vectors += up(n, DEPTH);
    return now;
  }
  Weights matrix(int steps, int columns) {
    const Weights w{weights, steps, (columns + COLUMNS - 1) / COLUMNS};
    weights += (size_t)w.steps * w.tiles * TILE;
    return w;
  }
};

struct Layer {
  const float *a, *b, *bias;  // norm1, and of the 1x1
  Weights w1, w2;
};

struct Tail {
  const float *a, *b;
  Weights w;
};

struct Block {
  int N, H, W, C0, L, G, M, F;
  int Ct, mid, line, image;
  std::vector<Layer> layers;
  Tail tail;
  int C(int l) const { return C0 + l * G; }
  // Positions of a padded band: lines share their border, and the last products read
  // beyond the end.
  int positions(int rows) const { return (rows + 2) * line + 2 + 2 * PT; }
};

// The features of some images, or of some rows of one image, with what a thread needs.
struct Scratch {
  Aligned<bf16> y, z, features;
  std::vector<int32_t> chunk_steps, tap_steps, place;
  alignas(64) float sums[PT * 2 * COLUMNS];
};

// The place in a band of each pixel of `images` images with `rows` rows, from row -1 on.
void set_places(const Block& s, int images, int rows, Scratch& t) {
  const int slot = s.positions(rows);
  room(t.place, (size_t)images * rows * s.W);
  int32_t* place = t.place.data();
  for (int n = 0; n < images; ++n)
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < s.W; ++c) *place++ = n * slot + (r + 1) * s.line + c + 1;
}

void set_steps(const Block& s, int size, Scratch& t) {
  const int chunks = steps_of(s.Ct);
  room(t.chunk_steps, chunks);
  for (int k = 0; k < chunks; ++k) t.chunk_steps[k] = k * PT * DEPTH;
  room(t.tap_steps, 9 * s.mid);
  for (int tap = 0; tap < 9; ++tap)
    for (int k = 0; k < s.mid; ++k)
      t.tap_steps[tap * s.mid + k] =
          (k * size + tap / 3 * s.line + tap % 3) * DEPTH;
}

// The 1x1 of the pixels p to `last` of X, whose chunks are `length` pixels long, into a
// band of `size` places.
void bottleneck(const Block& s, const Layer& layer, int C, const bf16* X, int length,
                int p, int last, int shift, int size, Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int chunks = steps_of(C);
  bf16* y = t.y.data();
  for (; p < last; p += PT) {
    const int n = std::min(PT, last - p), mt = n > ROWS ? 2 : 1;
    for (int k = 0; k < chunks; ++k)
      normalize(X + ((size_t)k * length + p) * DEPTH, n, layer.a + k * DEPTH,
                layer.b + k * DEPTH, y + (size_t)k * PT * DEPTH);
    for (int j = 0; j < s.mid; ++j) {
      multiply({y, t.chunk_steps.data(), 2 * DEPTH, layer.w1.panel(j), chunks, t.sums,
                2 * COLUMNS},
               mt, 2);
      const F b0 = load(layer.bias + j * DEPTH), b1 = load(layer.bias + j * DEPTH + 16);
      bf16* z = t.z.data() + ((size_t)j * size - shift) * DEPTH;
      for (int i = 0; i < n; ++i) {
        const float* c = t.sums + i * 2 * COLUMNS;
        store(z + (size_t)t.place[p + i] * DEPTH,
              relu(narrow(load(c) + b0, load(c + 16) + b1)));
      }
    }
  }
}

// Stores `n` channels, starting at channel c, in their chunks.
FD_INLINE void scatter(const bf16* from, int n, int c, bf16* X, int length, int p) {
  while (n > 0) {
    const int count = std::min(n, DEPTH - c % DEPTH);
    std::memcpy(X + ((size_t)(c / DEPTH) * length + p) * DEPTH + c % DEPTH, from,
                sizeof(bf16) * count);
    from += count, c += count, n -= count;
  }
}

// The 3x3 of `rows` rows of a band that begins at place `z`, to the pixels from p on.
void convolve(const Block& s, const Layer& layer, int C, bf16* X, int length, int p,
              int rows, const bf16* z, Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int end = rows * s.line - 1;  // the last place is of the border
  for (int j = 0; j < layer.w2.panels(); ++j) {
    const int nt = layer.w2.tiles_of(j), c = C + j * 2 * COLUMNS;
    const int width = std::min(s.G - j * 2 * COLUMNS, 2 * COLUMNS);
    const bool chunk = width == DEPTH && c % DEPTH == 0;
    for (int q = 0; q < end; q += PT) {
      const int n = std::min(PT, end - q);
      multiply({z + (size_t)q * DEPTH, t.tap_steps.data(), 2 * DEPTH, layer.w2.panel(j),
                9 * s.mid, t.sums, 2 * COLUMNS},
               n > ROWS ? 2 : 1, nt);
      for (int i = 0; i < n; ++i) {
        const int row = (q + i) / s.line, column = (q + i) % s.line;
        if (column == s.W) continue;
        const float* sums = t.sums + i * 2 * COLUMNS;
        const S v = narrow(load(sums), load(sums + 16));
        const int to = p + row * s.W + column;
        if (chunk) {
          store(X + ((size_t)(c / DEPTH) * length + to) * DEPTH, v);
        } else {
          bf16 values[DEPTH];
          store(values, v);
          scatter(values, width, c, X, length, to);
        }
      }
    }
  }
}

// One layer for rows r0 to r1 of an image, in bands of `rows` rows.
void layer_by_bands(const Block& s, int l, bf16* X, int length, int first, int r0,
                    int r1, int rows, Scratch& t) {
  const Layer& layer = s.layers[l];
  const int C = s.C(l), size = s.positions(rows);
  bf16* z = t.z.data();
  X += (size_t)first * DEPTH;
  int done = std::max(r0 - 1, 0);
  if (r0 == 0)
    for (int k = 0; k < s.mid; ++k)
      std::memset(z + (size_t)k * size * DEPTH, 0, sizeof(bf16) * DEPTH * s.line);
  for (int r = r0; r < r1; r += rows) {
    const int end = std::min(r1, r + rows), need = std::min(s.H, end + 1);
    for (int k = 0; k < s.mid; ++k) {
      bf16* chunk = z + (size_t)k * size * DEPTH;
      if (r > r0)
        std::memmove(chunk, chunk + (size_t)rows * s.line * DEPTH,
                     sizeof(bf16) * 2 * s.line * DEPTH);
      if (end == s.H)
        std::memset(chunk + (size_t)((end - r + 1) * s.line + 1) * DEPTH, 0,
                    sizeof(bf16) * s.line * DEPTH);
    }
    bottleneck(s, layer, C, X, length, done * s.W, need * s.W, r * s.line, size, t);
    done = need;
    convolve(s, layer, C, X, length, r * s.W, end - r, z, t);
  }
}

// One layer for entire images, with their bands one after another.
void layer_by_images(const Block& s, int l, bf16* X, int length, int images,
                     Scratch& t) {
  const Layer& layer = s.layers[l];
  const int C = s.C(l), slot = s.positions(s.H);
  bottleneck(s, layer, C, X, length, 0, images * s.image, 0, images * slot, t);
  for (int n = 0; n < images; ++n)
    convolve(s, layer, C, X, length, n * s.image, s.H,
             t.z.data() + (size_t)n * slot * DEPTH, t);
}

// The unused channels of a chunk are multiplied by zero, so they must be finite.
void clear(const Block& s, bf16* X, int length) {
  if (s.C0 % DEPTH || s.G % DEPTH)
    std::memset(X, 0, sizeof(bf16) * steps_of(s.Ct) * length * DEPTH);
}

// [pixels, C0] to chunks.
void copy_input(const Block& s, const bf16* x, int n, bf16* X, int length) {
  for (int i = 0; i < n; ++i, x += s.C0) scatter(x, s.C0, 0, X, length, i);
}

// The last norm of the pixels p to `last`: out [pixels, Ct].
void finish_norm(const Block& s, const bf16* X, int length, int p, int last, bf16* out) {
  for (int k = 0; k < steps_of(s.Ct); ++k) {
    const float *a = s.tail.a + k * DEPTH, *b = s.tail.b + k * DEPTH;
    const F a0 = load(a), a1 = load(a + 16), b0 = load(b), b1 = load(b + 16);
    for (int i = p; i < last; ++i) {
      const bf16* x = X + ((size_t)k * length + i) * DEPTH;
      store_part(out + (size_t)i * s.Ct + k * DEPTH,
                 narrow(widen(x) * a0 + b0, widen(x + 16) * a1 + b1),
                 s.Ct - k * DEPTH);
    }
  }
}

FD_INLINE F positive(F v) {
  const F zero = {};
  return v > zero ? v : zero;
}

// Norm, ReLU, mean of 2x2 pixels and 1x1, for the pixels p to `last` of the result.
void finish_transition(const Block& s, const bf16* X, int length, int p, int last,
                       bf16* out, Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int H2 = s.H / 2, W2 = s.W / 2, chunks = steps_of(s.Ct);
  bf16* y = t.y.data();
  for (; p < last; p += PT) {
    const int n = std::min(PT, last - p);
    int from[PT];
    for (int i = 0; i < n; ++i) {
      const int row = (p + i) / W2, image = row / H2;
      from[i] = (image * s.H + row % H2 * 2) * s.W + (p + i) % W2 * 2;
    }
    for (int k = 0; k < chunks; ++k) {
      const float *a = s.tail.a + k * DEPTH, *b = s.tail.b + k * DEPTH;
      const F a0 = load(a), a1 = load(a + 16), b0 = load(b), b1 = load(b + 16);
      for (int i = 0; i < n; ++i) {
        const bf16* x = X + ((size_t)k * length + from[i]) * DEPTH;
        F low = {}, high = {};
        for (int place : {0, 1, s.W, s.W + 1}) {
          low += positive(widen(x + place * DEPTH) * a0 + b0);
          high += positive(widen(x + place * DEPTH + 16) * a1 + b1);
        }
        store(y + ((size_t)k * PT + i) * DEPTH, narrow(low * 0.25f, high * 0.25f));
      }
    }
    for (int j = 0; j < s.tail.w.panels(); ++j) {
      const int nt = s.tail.w.tiles_of(j), c = j * 2 * COLUMNS;
      multiply({y, t.chunk_steps.data(), 2 * DEPTH, s.tail.w.panel(j), chunks, t.sums,
                2 * COLUMNS},
               n > ROWS ? 2 : 1, nt);
      for (int i = 0; i < n; ++i) {
        const float* sums = t.sums + i * 2 * COLUMNS;
        store_part(out + (size_t)(p + i) * s.F + c, narrow(load(sums), load(sums + 16)),
                   s.F - c);
      }
    }
  }
}

void prepare(const Block& s, int places, int size, Scratch& t) {
  room(t.y, (size_t)steps_of(s.Ct) * PT * DEPTH);
  room(t.z, (size_t)s.mid * places * DEPTH);
  std::fill_n(t.z.data(), (size_t)s.mid * places * DEPTH, bf16{0});
  set_steps(s, size, t);
}

// Rows of a band.
int band_rows(const Block& s) {
  const int64_t fit = BAND / (2LL * DEPTH * s.mid * s.line) - 2;
  return (int)std::max<int64_t>(1, std::min<int64_t>(fit, s.H));
}

void finish(const Block& s, const bf16* X, int length, int p, int last, bf16* out,
            Scratch& t) {
  if (s.F) {
    finish_transition(s, X, length, p, last, out, t);
  } else {
    finish_norm(s, X, length, p, last, out);
  }
}

// Each thread takes a few images through the block, so that their features stay in cache.
void by_turns(const Block& s, ffi::ThreadPool& pool, int threads, const bf16* x,
              bf16* out) {
  const int chunks = steps_of(s.Ct), rows = band_rows(s);
  const bool whole = rows == s.H;
  const int64_t fit = TURN / (2LL * DEPTH * chunks * s.image);
  const int turn =
      std::max(1, (int)std::min<int64_t>(whole ? fit : 1, (s.N + threads - 1) / threads));
  const int image_out = s.F ? (s.H / 2) * (s.W / 2) : s.image;
  const int channels = s.F ? s.F : s.Ct, length = turn * s.image;
  const int places = (whole ? turn : 1) * s.positions(rows);
  parallel(pool, (s.N + turn - 1) / turn, [&](int i) {
    static thread_local Scratch t;
    const TileConfig tiles;
    const int first = i * turn, count = std::min(turn, s.N - first);
    bf16* X = room(t.features, (size_t)chunks * length * DEPTH);
    prepare(s, places, whole ? count * s.positions(rows) : places, t);
    set_places(s, whole ? count : 1, s.H, t);
    clear(s, X, length);
    copy_input(s, x + (size_t)first * s.image * s.C0, count * s.image, X, length);
    for (int l = 0; l < s.L; ++l) {
      if (whole) {
        layer_by_images(s, l, X, length, count, t);
      } else {
        layer_by_bands(s, l, X, length, 0, 0, s.H, rows, t);
      }
    }
    finish(s, X, length, 0, count * image_out, out + (size_t)first * image_out * channels,
           t);
  });
}

// With fewer images than threads, several threads share the rows of each image.
void by_rows(const Block& s, ffi::ThreadPool& pool, int threads, const bf16* x,
             bf16* out) {
  const int parts = std::min(s.H, (threads + s.N - 1) / s.N), all = s.N * parts;
  const int length = s.N * s.image, rows = band_rows(s), places = s.positions(rows);
  const int image_out = s.F ? (s.H / 2) * (s.W / 2) : s.image;
  static thread_local Aligned<bf16> features;
  bf16* X = room(features, (size_t)steps_of(s.Ct) * length * DEPTH);
  clear(s, X, length);
  std::vector<Scratch> scratch(all);
  Crew crew(pool, all);
  crew.run([&](int i) {
    prepare(s, places, places, scratch[i]);
    set_places(s, 1, s.H, scratch[i]);
    const int a = (int)((int64_t)length * i / all), b = (int)((int64_t)length * (i + 1) / all);
    copy_input(s, x + (size_t)a * s.C0, b - a, X + (size_t)a * DEPTH, length);
  });
  for (int l = 0; l < s.L; ++l)
    crew.run([&](int i) {
      const TileConfig tiles;
      const int n = i / parts, part = i % parts;
      layer_by_bands(s, l, X, length, n * s.image, s.H * part / parts,
                     s.H * (part + 1) / parts, rows, scratch[i]);
    });
  const int total = s.N * image_out;
  crew.run([&](int i) {
    const TileConfig tiles;
    finish(s, X, length, (int)((int64_t)total * i / all),
           (int)((int64_t)total * (i + 1) / all), out, scratch[i]);
  });
}

using BF = ffi::Buffer<ffi::BF16>;

// x [N, H, W, C0], `vectors`: per layer norm1's a and b, and the 1x1's bias; the tail's
// a and b. `weights`: per layer the 1x1 and the 3x3; the transition.
// -> [N, H / 2, W / 2, features], with features = 0 [N, H, W, Ct]
ffi::Error BlockPacked(ffi::ThreadPool pool, int64_t layers, int64_t bottleneck,
                       int64_t growth, int64_t features, BF x,
                       ffi::Buffer<ffi::F32> vectors, BF weights,
                       ffi::ResultBuffer<ffi::BF16> out) {
  const auto d = x.dimensions();
  Block s{(int)d[0], (int)d[1], (int)d[2], (int)d[3], (int)layers, (int)growth,
          (int)bottleneck, (int)features};
  s.Ct = s.C(s.L);
  s.mid = steps_of(s.M);
  s.line = s.W + 1;
  s.image = s.H * s.W;
  Packed from{vectors.typed_data(), weights.typed_data()};
  for (int l = 0; l < s.L; ++l) {
    Layer layer;
    layer.a = from.vector(s.C(l)), layer.b = from.vector(s.C(l));
    layer.bias = from.vector(s.M);
    layer.w1 = from.matrix(steps_of(s.C(l)), up(s.M, 2 * COLUMNS));
    layer.w2 = from.matrix(9 * s.mid, s.G);
    s.layers.push_back(layer);
  }
  s.tail.a = from.vector(s.Ct), s.tail.b = from.vector(s.Ct);
  if (s.F) s.tail.w = from.matrix(steps_of(s.Ct), s.F);
  if (from.vectors != vectors.typed_data() + vectors.element_count() ||
      from.weights != weights.typed_data() + weights.element_count())
    return ffi::Error::InvalidArgument("dense block: packed by other rules");
  const int threads = (int)pool.num_threads();
  if (s.N < threads) {
    by_rows(s, pool, threads, x.typed_data(), out->typed_data());
  } else {
    by_turns(s, pool, threads, x.typed_data(), out->typed_data());
  }
  return ffi::Error::Success();
}

// ---- the stem: 7x7 convolution of stride 2, 3x3 max pooling of stride 2, bias, ReLU

constexpr int K7 = 7;

struct Stem {
  int N, H, W, C, Hc, Wc, F, H2, W2;         // image, convolution, result
  int low_h, low_w, pool_low_h, pool_low_w;  // paddings
  const float* bias;
  Weights w;
};

struct StemScratch {
  Aligned<bf16> band;
  Aligned<float> ring, best;
};

void narrow_row(const float* from, int n, bf16* to) {
  int i = 0;
  for (; i + DEPTH <= n; i += DEPTH) store(to + i, narrow(load(from + i), load(from + i + 16)));
  if (i < n) {
    alignas(64) float rest[DEPTH] = {};
    std::memcpy(rest, from + i, sizeof(float) * (n - i));
    store_part(to + i, narrow(load(rest), load(rest + 16)), n - i);
  }
}

// Rows i0 to i1 of one image's result. Rows of the convolution live in a ring of three.
void stem_rows(const Stem& s, const float* x, int i0, int i1, bf16* y, StemScratch& t) {
  const Multipliers& multiply = multipliers();
  const int wide = up(s.Wc, ROWS), Fp = s.w.tiles * COLUMNS;
  const int line = (2 * (wide - 1) + K7) * s.C + DEPTH;
  const int r0 = std::max(0, 2 * i0 - s.pool_low_h);
  const int r1 = std::min(s.Hc, 2 * (i1 - 1) - s.pool_low_h + 3);
  const int in_rows = 2 * (r1 - r0 - 1) + K7;
  bf16* band = room(t.band, (size_t)in_rows * line);
  float* ring = room(t.ring, (size_t)3 * wide * Fp);
  float* best = room(t.best, (size_t)wide * Fp);
  for (int r = 0; r < in_rows; ++r) {
    const int h = 2 * r0 - s.low_h + r;
    bf16* to = band + (size_t)r * line;
    std::memset(to, 0, sizeof(bf16) * line);
    if (h < 0 || h >= s.H) continue;
    const int count = std::min(s.W, (line - DEPTH) / s.C - s.low_w);
    narrow_row(x + (size_t)h * s.W * s.C, count * s.C, to + s.low_w * s.C);
  }
  int32_t steps[K7];
  for (int r = 0; r < K7; ++r) steps[r] = r * line;
  int done = r0;
  for (int i = i0; i < i1; ++i) {
    const int top = 2 * i - s.pool_low_h;
    for (; done < std::min(s.Hc, top + 3); ++done) {
      const bf16* a = band + (size_t)2 * (done - r0) * line;
      float* to = ring + (size_t)(done % 3) * wide * Fp;
      for (int j = 0; j < s.w.panels(); ++j)
        for (int q = 0; q < wide; q += PT)
          multiply({a + 2 * q * s.C, steps, 4 * s.C, s.w.panel(j), K7,
                    to + (size_t)q * Fp + j * 2 * COLUMNS, Fp},
                   q + PT <= wide ? 2 : 1, s.w.tiles_of(j));
    }
    const int low = std::max(0, top), high = std::min(s.Hc, top + 3);
    for (int k = 0; k < s.Wc * Fp; k += 16) {
      F v = load(ring + (size_t)(low % 3) * wide * Fp + k);
      for (int r = low + 1; r < high; ++r) {
        const F other = load(ring + (size_t)(r % 3) * wide * Fp + k);
        v = other > v ? other : v;
      }
      store(best + k, v);
    }
    for (int q = 0; q < s.W2; ++q) {
      const int left = std::max(0, 2 * q - s.pool_low_w);
      const int right = std::min(s.Wc, 2 * q - s.pool_low_w + 3);
      for (int c = 0; c < s.F; c += DEPTH) {
        F v[2];
        for (int half = 0; half < 2; ++half) {
          const int at = std::min(c + 16 * half, Fp - 16);
          v[half] = load(best + (size_t)left * Fp + at);
          for (int k = left + 1; k < right; ++k) {
            const F other = load(best + (size_t)k * Fp + at);
            v[half] = other > v[half] ? other : v[half];
          }
          v[half] += load(s.bias + c + 16 * half);
        }
        store_part(y + ((size_t)i * s.W2 + q) * s.F + c, relu(narrow(v[0], v[1])),
                   s.F - c);
      }
    }
  }
}

// x [N, H, W, C], where 7 * C <= 32 -> y [N, H', W', F]
ffi::Error StemPacked(ffi::ThreadPool pool, int64_t height, int64_t width, int64_t low_h,
                      int64_t low_w, int64_t pool_low_h, int64_t pool_low_w,
                      ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> vectors, BF weights,
                      ffi::ResultBuffer<ffi::BF16> y) {
  const auto d = x.dimensions(), e = y->dimensions();
  Stem s{(int)d[0], (int)d[1], (int)d[2], (int)d[3], (int)height, (int)width, (int)e[3],
         (int)e[1], (int)e[2], (int)low_h, (int)low_w, (int)pool_low_h, (int)pool_low_w};
  Packed from{vectors.typed_data(), weights.typed_data()};
  s.bias = from.vector(s.F);
  s.w = from.matrix(K7, s.F);
  if (from.vectors != vectors.typed_data() + vectors.element_count() ||
      from.weights != weights.typed_data() + weights.element_count() || K7 * s.C > DEPTH)
    return ffi::Error::InvalidArgument("stem: packed by other rules");
  const int threads = (int)pool.num_threads();
  const int parts = std::min(s.H2, s.N < threads ? (threads + s.N - 1) / s.N : 1);
  parallel(pool, s.N * parts, [&](int u) {
    static thread_local StemScratch scratch;
    const TileConfig tiles;
    const int n = u / parts, part = u % parts;
    stem_rows(s, x.typed_data() + (size_t)n * s.H * s.W * s.C, s.H2 * part / parts,
              s.H2 * (part + 1) / parts, y->typed_data() + (size_t)n * s.H2 * s.W2 * s.F,
              scratch);
  });
  return ffi::Error::Success();
}

}  // namespace

FD_HANDLER(DenseBlockForwardPackedBfloat16, BlockPacked, FD_BLOCK_SIZES);
FD_HANDLER(StemForwardPackedBfloat16, StemPacked, FD_STEM_SIZES);

FLAX_DENSENET_BFLOAT16_PATH
