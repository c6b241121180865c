// A dense block in training in bfloat16, forward and backward.
//
// dense_block.py explains the mathematics. Features, the outputs of the 1x1s and the
// operands of all products are bfloat16; sums, statistics, gradients of features and all
// parameters are float32. The gradients of weights are products over pixels: one operand
// is transposed, the other is interleaved in pairs of pixels, 32 pixels at a time.
//
// A layer without bottleneck is also a single product, with the columns of all nine taps:
// the C features of a pixel times [C, 9 * G]. The results are summed over neighboring
// pixels.
//
// Work is divided into one contiguous part per thread, and the parts are added in order,
// so results on one machine are bit-identical in every run.

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "cpu_bf16_training.h"
#include "cpu_parallel.h"
#include "cpu_together.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int PB = 256;               // pixels of a step of the 1x1's weight gradient
constexpr int64_t BAND = 192 * 1024;  // bytes of a padded band
constexpr int64_t PLAIN_BAND = 640 * 1024;  // the same, of sums

struct Block {
  int N, H, W, C0, L, G, M, T;
  int64_t P;
  bool plain;                       // no bottleneck; M is 9 * G
  int Ct, mid, grown, line, image;  // chunks of the bottleneck and of the growth
  int rows, bands, group, units;    // rows of a band, bands of an image, images of a unit
  int C(int l) const { return C0 + l * G; }
  int positions(int r) const { return (r + 2) * line + 2 + 2 * PT; }
  int64_t pixel(int t) const { return P * t / T; }
  int unit(int t) const { return (int)((int64_t)units * t / T); }
  int sums() const { return up(M, COLUMNS); }  // of all taps of a pixel
  int slot() const { return positions(rows); }
  int places() const { return group * slot(); }

  Block(int n, int h, int w, int c0, int layers, int growth, int bottleneck, int threads)
      : N(n), H(h), W(w), C0(c0), L(layers), G(growth), plain(bottleneck == 0) {
    M = plain ? 9 * G : bottleneck;
    P = (int64_t)N * H * W;
    Ct = C0 + L * G, mid = steps_of(M), grown = steps_of(G);
    line = W + 1, image = H * W;
    const int64_t fit =
        (plain ? PLAIN_BAND / (4LL * sums() * (W + 2)) : BAND / (2LL * CHUNK * mid * line)) -
        2;
    bands = (int)((H + std::max<int64_t>(fit, 1) - 1) / std::max<int64_t>(fit, 1));
    bands = std::max(bands, std::min(H, (threads + N - 1) / N));
    rows = (H + bands - 1) / bands;
    bands = (H + rows - 1) / rows;
    group = 1;
    if (bands == 1 && !plain) {
      const int64_t images = BAND / (2LL * CHUNK * mid * positions(H));
      group = (int)std::max<int64_t>(1, std::min<int64_t>(images, (N + threads - 1) / threads));
    }
    units = bands > 1 ? N * bands : (N + group - 1) / group;
    T = std::max(1, std::min(threads, units));
  }
};

// One image's rows, or a few whole images.
struct Unit {
  int first, images, r0, count;
  Unit(const Block& s, int u) {
    if (s.bands > 1) {
      first = u / s.bands, images = 1, r0 = u % s.bands * s.rows;
      count = std::min(s.H, r0 + s.rows) - r0;
    } else {
      first = u * s.group, images = std::min(s.group, s.N - first), r0 = 0, count = s.H;
    }
  }
};

// What dropout leaves of a chunk of new channels: the low and the high half.
FD_INLINE void apply(const Drop& drop, int64_t p, int c, F& low, F& high) {
  if (!drop.any()) return;
  const float all = drop.of_image(p);
  low *= all, high *= all;
  if (!drop.mask) return;
  typedef uint8_t B __attribute__((vector_size(16)));
  B halves[2] = {};
  std::memcpy(halves, drop.mask + p * drop.G + c, std::min<int64_t>(CHUNK, drop.G - c));
  low *= __builtin_convertvector(halves[0], F);
  high *= __builtin_convertvector(halves[1], F);
}

struct Scratch {
  Aligned<bf16> y, z, zt, dg, dgv, dh, dhv;
  std::vector<int32_t> chunk_steps, tap_steps, grad_steps, pixel_steps;
  Aligned<float> dw, taps;
  std::vector<double> s1, s2;
  alignas(64) float sums[PT * 2 * COLUMNS];
  alignas(64) bf16 patch[PT * CHUNK];
  void reset(size_t weights, int channels) {
    dw.assign(weights, 0.0f);
    s1.assign(up(channels, CHUNK), 0.0), s2.assign(up(channels, CHUNK), 0.0);
  }
};

// Fills a band with a border of zeros: fill(to, pixel) writes one chunk of one pixel.
template <class Fill>
FD_INLINE void load_band(const Block& s, const Unit& unit, bf16* chunk, Fill fill) {
  std::memset(chunk, 0, sizeof(bf16) * CHUNK * s.places());
  for (int n = 0; n < unit.images; ++n)
    for (int r = std::max(0, unit.r0 - 1); r < std::min(s.H, unit.r0 + unit.count + 1); ++r) {
      bf16* to = chunk + ((size_t)n * s.slot() + (r - unit.r0 + 1) * s.line + 1) * CHUNK;
      const int64_t p = ((int64_t)(unit.first + n) * s.H + r) * s.W;
      for (int x = 0; x < s.W; ++x) fill(to + (size_t)x * CHUNK, p + x);
    }
}

// relu(norm2(h)) of a band; h is [chunks][P][32].
void load_z(const Block& s, const Unit& unit, const bf16* h, const Affine& f, bf16* z) {
  for (int k = 0; k < s.mid; ++k) {
    const bf16* hk = h + (size_t)k * s.P * CHUNK;
    const F a0 = load(&f.a[k * CHUNK]), a1 = load(&f.a[k * CHUNK] + 16);
    const F b0 = load(&f.b[k * CHUNK]), b1 = load(&f.b[k * CHUNK] + 16);
    load_band(s, unit, z + (size_t)k * s.places() * CHUNK, [&](bf16* to, int64_t p) {
      const bf16* x = hk + p * CHUNK;
      store(to, relu(narrow(widen(x) * a0 + b0, widen(x + 16) * a1 + b1)));
    });
  }
}

// relu(norm1(x)) of a chunk of `n` pixels to rows of 32.
FD_INLINE void load_y(const Block& s, const bf16* X, int64_t p, int n, int k, int C,
                      const Affine& f, bf16* y) {
  const bf16* x = X + p * s.Ct + k * CHUNK;
  const F a0 = load(&f.a[k * CHUNK]), a1 = load(&f.a[k * CHUNK] + 16);
  const F b0 = load(&f.b[k * CHUNK]), b1 = load(&f.b[k * CHUNK] + 16);
  const int valid = C - k * CHUNK;
  for (int i = 0; i < n; ++i, x += s.Ct, y += CHUNK) {
    alignas(64) bf16 part[CHUNK];
    const bf16* from = x;
    if (valid < CHUNK) load_part(x, valid, part), from = part;
    store(y, relu(narrow(widen(from) * a0 + b0, widen(from + 16) * a1 + b1)));
  }
}

void set_steps(const Block& s, Scratch& t) {
  const int chunks = steps_of(s.Ct);
  room(t.chunk_steps, std::max(chunks, s.mid));
  for (int k = 0; k < (int)t.chunk_steps.size(); ++k) t.chunk_steps[k] = k * PT * CHUNK;
  room(t.tap_steps, 9 * s.mid);
  room(t.grad_steps, 9 * s.grown);
  for (int tap = 0; tap < 9; ++tap) {
    const int shift = tap / 3 * s.line + tap % 3;
    for (int k = 0; k < s.mid; ++k)
      t.tap_steps[tap * s.mid + k] = (k * s.places() + shift) * CHUNK;
    for (int k = 0; k < s.grown; ++k)
      t.grad_steps[tap * s.grown + k] = (k * s.places() + shift) * CHUNK;
  }
  const int most = std::max(PB, up(s.places(), PT)) / PT + 1;
  room(t.pixel_steps, most);
  for (int i = 0; i < most; ++i) t.pixel_steps[i] = i * PT;
}

// The 1x1 of some pixels: its output h, and the moments of h.
void forward_1x1(const Block& s, int64_t first, int64_t last, const bf16* X, int C,
                 const Affine& f, const Weights& w, bf16* h, Moments& moments,
                 Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int chunks = steps_of(C);
  bf16* y = room(t.y, (size_t)steps_of(s.Ct) * PT * CHUNK);
  for (int64_t p = first; p < last; p += PT) {
    const int n = (int)std::min<int64_t>(PT, last - p);
    for (int k = 0; k < chunks; ++k) load_y(s, X, p, n, k, C, f, y + (size_t)k * PT * CHUNK);
    for (int j = 0; j < s.mid; ++j) {
      multiply({y, t.chunk_steps.data(), 2 * CHUNK, w.panel(j), chunks, t.sums, PT},
               n > ROWS ? 2 : 1, 2);
      bf16* to = h + ((size_t)j * s.P + p) * CHUNK;
      for (int i = 0; i < n; ++i) {
        const float* c = t.sums + i * PT;
        store(to + (size_t)i * CHUNK, narrow(load(c), load(c + 16)));
      }
      moments.add(to, n, CHUNK, j * CHUNK);
    }
    moments.count += n;
    moments.fresh = false;
  }
}

// Calls put(sums, pixel) for each pixel of a unit and each panel of columns j.
template <class Begin, class Put>
FD_INLINE void shifted_products(const Block& s, const Unit& unit, const bf16* band,
                                const int32_t* steps, const Weights& w, int j, Scratch& t,
                                Begin begin, Put put) {
  const Multipliers& multiply = multipliers();
  const int end = unit.count * s.line - 1, nt = w.tiles_of(j);
  for (int image = 0; image < unit.images; ++image) {
    const int64_t p0 = ((int64_t)(unit.first + image) * s.H + unit.r0) * s.W;
    for (int q = 0; q < end; q += PT) {
      const int n = std::min(PT, end - q);
      multiply({band + ((size_t)image * s.slot() + q) * CHUNK, steps, 2 * CHUNK,
                w.panel(j), w.steps, t.sums, PT},
               n > ROWS ? 2 : 1, nt);
      begin();
      for (int i = 0; i < n; ++i) {
        const int row = (q + i) / s.line, column = (q + i) % s.line;
        if (column < s.W) put(t.sums + i * PT, p0 + (int64_t)row * s.W + column);
      }
    }
  }
}

// Adds the moments of `count` pixels' new channels.
void add_moments(const Block& s, const bf16* X, int64_t p0, int count, int C,
                 Moments& moments, Scratch& t) {
  for (int i = 0; i < count; i += PT) {
    const int n = std::min(PT, count - i);
    for (int j = 0; j < s.grown; ++j) {
      for (int k = 0; k < n; ++k)
        load_part(X + (p0 + i + k) * s.Ct + C + j * CHUNK, s.G - j * CHUNK,
                  t.patch + k * CHUNK);
      moments.add(t.patch, n, CHUNK, j * CHUNK);
    }
    moments.count += n;
    moments.fresh = false;
  }
}

// The 3x3 of some units, into its place in X, and its moments.
void forward_3x3(const Block& s, int first, int last, bf16* X, int C, const bf16* h,
                 const Affine& f, const Weights& w, const Drop& drop, Moments& moments,
                 Scratch& t) {
  bf16* z = room(t.z, (size_t)s.mid * s.places() * CHUNK);
  for (int u = first; u < last; ++u) {
    const Unit unit(s, u);
    load_z(s, unit, h, f, z);
    for (int j = 0; j < s.grown; ++j) {
      const int width = std::min(CHUNK, s.G - j * CHUNK);
      shifted_products(
          s, unit, z, t.tap_steps.data(), w, j, t, [] {},
          [&](const float* sums, int64_t p) {
            F low = load(sums), high = load(sums + 16);
            apply(drop, p, j * CHUNK, low, high);
            store_part(X + p * s.Ct + C + j * CHUNK, narrow(low, high), width);
          });
    }
    for (int image = 0; image < unit.images; ++image) {
      const int64_t p0 = ((int64_t)(unit.first + image) * s.H + unit.r0) * s.W;
      add_moments(s, X, p0, unit.count * s.W, C, moments, t);
    }
  }
}

// One layer without bottleneck for some units, into its place in X. `w` is [C, 9 * G].
void forward_plain(const Block& s, int first, int last, bf16* X, int C, const Affine& f,
                   const Weights& w, const Drop& drop, Moments& moments, Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int line = s.W + 2, ld = s.sums(), chunks = steps_of(C);
  const size_t row = (size_t)line * ld;
  float* taps = room(t.taps, (s.rows + 2) * row + 2 * CHUNK);
  bf16* y = room(t.y, (size_t)steps_of(s.Ct) * PT * CHUNK);
  for (int u = first; u < last; ++u) {
    const Unit unit(s, u);
    const int r0 = unit.r0, r1 = r0 + unit.count;
    // Includes the rows around the band, except outside of the image.
    const int top = std::max(0, r0 - 1), bottom = std::min(s.H, r1 + 1);
    const int64_t image = (int64_t)unit.first * s.H * s.W;
    std::memset(taps, 0, sizeof(float) * (unit.count + 2) * row);
    for (int q = top * s.W; q < bottom * s.W; q += PT) {
      const int n = std::min(PT, bottom * s.W - q);
      for (int k = 0; k < chunks; ++k)
        load_y(s, X, image + q, n, k, C, f, y + (size_t)k * PT * CHUNK);
      for (int j = 0; j < w.panels(); ++j) {
        const int nt = w.tiles_of(j);
        multiply({y, t.chunk_steps.data(), 2 * CHUNK, w.panel(j), chunks, t.sums, PT},
                 n > ROWS ? 2 : 1, nt);
        for (int i = 0; i < n; ++i) {
          const int r = (q + i) / s.W, x = (q + i) % s.W;
          float* to = taps + (r - r0 + 1) * row + (x + 1) * ld + j * 2 * COLUMNS;
          store(to, load(t.sums + i * PT));
          if (nt > 1) store(to + COLUMNS, load(t.sums + i * PT + COLUMNS));
        }
      }
    }
    for (int r = r0; r < r1; ++r)
      for (int x = 0; x < s.W; ++x) {
        const float* from = taps + (r - r0) * row + x * ld;
        const int64_t p = image + r * s.W + x;
        for (int g = 0; g < s.G; g += CHUNK) {
          F low = {}, high = {};
          for (int tap = 0; tap < 9; ++tap) {
            const float* at = from + tap / 3 * row + tap % 3 * ld + tap * s.G + g;
            low += load(at), high += load(at + COLUMNS);
          }
          apply(drop, p, g, low, high);
          store_part(X + p * s.Ct + C + g, narrow(low, high), std::min(CHUNK, s.G - g));
        }
      }
    add_moments(s, X, image + r0 * s.W, unit.count * s.W, C, moments, t);
  }
}

// x, mask, images, then per layer scale1, bias1, w1, scale2, bias2, w2
// -> X [N, H, W, Ct], mean, var [Ct], h [L, chunks, P, 32], mean2, var2 [L, M]
// Without bottleneck a layer is scale1, bias1, w [3, 3, C, G], and M is 0.
ffi::Error Forward(ffi::ThreadPool pool, float epsilon, float rate, BF x, U8 mask,
                   FL images, ffi::RemainingArgs args, ffi::ResultBuffer<ffi::BF16> X,
                   ffi::ResultBuffer<ffi::F32> mean, ffi::ResultBuffer<ffi::F32> var,
                   ffi::ResultBuffer<ffi::BF16> h, ffi::ResultBuffer<ffi::F32> mean2,
                   ffi::ResultBuffer<ffi::F32> var2) {
  const auto d = x.dimensions();
  const int L = (int)mean2->dimensions()[0], M = (int)mean2->dimensions()[1];
  const int G = (int)(X->dimensions()[3] - d[3]) / L;
  const Block s(d[0], d[1], d[2], d[3], L, G, M, (int)pool.num_threads());
  bf16* out = X->typed_data();
  float *m = mean->typed_data(), *v = var->typed_data();
  std::vector<Scratch> scratch(s.T);
  std::vector<Tiled> w1(L), w2(L);
  const std::vector<Parameters> weights = parameters_of(args, L, s.plain ? 3 : 6, s.plain);
  Crew crew(pool, s.T);
  std::vector<Moments> parts(s.T, Moments(s.C0));
  crew.run([&](int t) {
    set_steps(s, scratch[t]);
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); p += PT) {
      const int n = (int)std::min<int64_t>(PT, s.pixel(t + 1) - p);
      for (int i = 0; i < n; ++i)
        std::memcpy(out + (p + i) * s.Ct, x.typed_data() + (p + i) * s.C0,
                    sizeof(bf16) * s.C0);
      for (int k = 0; k < steps_of(s.C0); ++k) {
        for (int i = 0; i < n; ++i)
          load_part(x.typed_data() + (p + i) * s.C0 + k * CHUNK, s.C0 - k * CHUNK,
                    scratch[t].patch + i * CHUNK);
        parts[t].add(scratch[t].patch, n, CHUNK, k * CHUNK);
      }
      parts[t].count += n;
      parts[t].fresh = false;
    }
    for (int l = t; l < L; l += s.T) {
      w1[l].reset(steps_of(s.C(l)), s.plain ? s.M : up(M, 2 * COLUMNS));
      w1[l].set(0, Front(s.plain, s.C(l), G, weights[l].w1).w, s.C(l), s.M, s.M, false);
      if (s.plain) continue;
      w2[l].reset(9 * s.mid, G);
      for (int tap = 0; tap < 9; ++tap)
        w2[l].set(tap * s.mid, weights[l].w2 + (size_t)tap * M * G, M, G, G, false);
    }
  });
  finish_moments(parts, s.C0, m, v);
  for (int l = 0; l < L; ++l) {
    const Parameters& w = weights[l];
    const int C = s.C(l);
    float *m2 = mean2->typed_data() + l * M, *v2 = var2->typed_data() + l * M;
    bf16* hl = h->typed_data() + (size_t)l * s.mid * s.P * CHUNK;
    Affine f1, f2;
    f1.from(w.scale1, w.bias1, m, v, C, epsilon);
    const Drop drop(s, l, rate, mask, images);
    if (s.plain) {
      parts.assign(s.T, Moments(G));
      crew.run([&](int t) {
        const TileConfig tiles;
        forward_plain(s, s.unit(t), s.unit(t + 1), out, C, f1, w1[l].view(), drop,
                      parts[t], scratch[t]);
      });
      finish_moments(parts, G, m + C, v + C);
      continue;
    }
    parts.assign(s.T, Moments(M));
    crew.run([&](int t) {
      const TileConfig tiles;
      forward_1x1(s, s.pixel(t), s.pixel(t + 1), out, C, f1, w1[l].view(), hl, parts[t],
                  scratch[t]);
    });
    finish_moments(parts, M, m2, v2);
    f2.from(w.scale2, w.bias2, m2, v2, M, epsilon);
    parts.assign(s.T, Moments(G));
    crew.run([&](int t) {
      const TileConfig tiles;
      forward_3x3(s, s.unit(t), s.unit(t + 1), out, C, hl, f2, w2[l].view(), drop,
                  parts[t], scratch[t]);
    });
    finish_moments(parts, G, m + C, v + C);
  }
  return ffi::Error::Success();
}

// ---- backward

// Features and their gradient in chunks [chunks][P][32], which are read one after another.
struct Chunked {
  bf16* x;
  float* g;
  int64_t P;
  bf16* x_at(int k, int64_t p) const { return x + (k * P + p) * CHUNK; }
  float* g_at(int k, int64_t p) const { return g + (k * P + p) * CHUNK; }
};

// The `n` channels of a pixel from channel c on, out of one or two chunks.
template <class T>
FD_INLINE void load_channels(const T* chunks, int64_t P, int64_t p, int c, int n, T* to) {
  const int first = std::min(n, CHUNK - c % CHUNK);
  const T* from = chunks + (c / CHUNK * P + p) * CHUNK;
  std::memset(to, 0, sizeof(T) * CHUNK);
  std::memcpy(to, from + c % CHUNK, sizeof(T) * first);
  if (n > first) std::memcpy(to + first, from + P * CHUNK, sizeof(T) * (n - first));
}

// The gradient of the layer's new channels, including the part through their statistics.
struct NewGradient {
  Chunked of;
  Drop drop;
  std::vector<float> k0, k1;  // of x: k0 + k1 * x
  int C, G;
  NewGradient(const Block& s, const Chunked& chunked, int c0, int n,
              const std::vector<double>& gm, const std::vector<double>& gv,
              const float* mean, const Drop& dropped)
      : of(chunked), drop(dropped), k0(up(n, CHUNK)), k1(up(n, CHUNK)), C(c0), G(n) {
    for (int c = 0; c < n; ++c) {
      const double slope = 2 * gv[C + c] / s.P;
      k0[c] = (float)(gm[C + c] / s.P - slope * mean[C + c]);
      k1[c] = (float)slope;
    }
  }
  FD_INLINE S at(int64_t p, int k) const {
    const int c = C + k * CHUNK, valid = std::min(CHUNK, G - k * CHUNK);
    const bf16* x = of.x_at(c / CHUNK, p);
    const float* g = of.g_at(c / CHUNK, p);
    alignas(64) bf16 part[CHUNK];
    alignas(64) float gradient[CHUNK];
    if (valid < CHUNK || c % CHUNK) {
      load_channels(of.x, of.P, p, c, valid, part);
      load_channels(of.g, of.P, p, c, valid, gradient);
      x = part, g = gradient;
    }
    const float *c0 = &k0[k * CHUNK], *c1 = &k1[k * CHUNK];
    F low = load(g) + load(c0) + load(c1) * widen(x);
    F high = load(g + 16) + load(c0 + 16) + load(c1 + 16) * widen(x + 16);
    apply(drop, p, k * CHUNK, low, high);
    return narrow(low, high);
  }
};

// dw2 [9][mid * 32][grown * 32] += z(pixel + tap)^T dg(pixel) over a unit's own rows.
void outer_3x3(const Block& s, const Unit& unit, Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int places = s.places(), own = unit.count * s.line;
  const int64_t ld = up(places, PT) + 3 * PT;
  bf16* zt = room(t.zt, (size_t)s.mid * CHUNK * ld);
  for (int k = 0; k < s.mid; ++k)
    for (int q = 0; q + PT <= places; q += PT)
      transpose_patch(t.z.data() + ((size_t)k * places + q) * CHUNK,
                      zt + (size_t)k * CHUNK * ld + q, ld);
  // The places from the first pixel on, up to the end of the last image's own rows.
  const int all = (unit.images - 1) * s.slot() + own, steps = (all + PT - 1) / PT;
  bf16* dgv = room(t.dgv, (size_t)s.grown * steps * 2 * TILE);
  for (int j = 0; j < s.grown; ++j)
    for (int i = 0; i < steps; ++i) {
      const bf16* from =
          t.dg.data() + ((size_t)j * places + s.line + 1 + i * PT) * CHUNK;
      const int valid = std::min(PT, all - i * PT);
      std::memcpy(t.patch, from, sizeof(bf16) * valid * CHUNK);
      std::memset(t.patch + valid * CHUNK, 0, sizeof(bf16) * (PT - valid) * CHUNK);
      interleave_patch(t.patch, dgv + ((size_t)j * steps + i) * 2 * TILE);
    }
  const int64_t width = s.grown * CHUNK;
  for (int tap = 0; tap < 9; ++tap)
    for (int k = 0; k < s.mid; ++k)
      for (int j = 0; j < s.grown; ++j) {
        multiply({zt + (size_t)k * CHUNK * ld + tap / 3 * s.line + tap % 3,
                  t.pixel_steps.data(), 2 * ld, dgv + (size_t)j * steps * 2 * TILE, steps,
                  t.sums, PT},
                 2, 2);
        add_sums(t.sums, t.dw.data() + ((size_t)tap * s.mid + k) * CHUNK * width + j * CHUNK,
                 width);
      }
}

// Back through the 3x3 and norm2's ReLU: dz [chunks][P][32], the sums over it, dw2.
void backward_3x3(const Block& s, int part, const NewGradient& g, const bf16* h,
                  const Affine& f2, const Weights& w2t, bf16* dz, Scratch& t) {
  const size_t places = s.places();
  bf16* z = room(t.z, s.mid * places * CHUNK);
  bf16* dg = room(t.dg, s.grown * places * CHUNK);
  t.reset((size_t)9 * s.mid * CHUNK * s.grown * CHUNK, s.M);
  for (int u = s.unit(part); u < s.unit(part + 1); ++u) {
    const Unit unit(s, u);
    load_z(s, unit, h, f2, z);
    for (int k = 0; k < s.grown; ++k)
      load_band(s, unit, dg + k * places * CHUNK,
                [&](bf16* to, int64_t p) { store(to, g.at(p, k)); });
    outer_3x3(s, unit, t);
    for (int j = 0; j < s.mid; ++j) {
      const int c = j * CHUNK;
      const F a0 = load(&f2.a[c]), a1 = load(&f2.a[c] + 16), b0 = load(&f2.b[c]),
              b1 = load(&f2.b[c] + 16), m0 = load(&f2.mean[c]),
              m1 = load(&f2.mean[c] + 16), zero = {};
      F p0 = {}, p1 = {}, q0 = {}, q1 = {};
      const auto flush = [&] {
        add_to(&t.s1[c], p0), add_to(&t.s1[c] + 16, p1);
        add_to(&t.s2[c], q0), add_to(&t.s2[c] + 16, q1);
        p0 = p1 = q0 = q1 = F{};
      };
      shifted_products(s, unit, dg, t.grad_steps.data(), w2t, j, t, flush,
                       [&](const float* sums, int64_t p) {
                         const bf16* x = h + ((size_t)j * s.P + p) * CHUNK;
                         const F x0 = widen(x), x1 = widen(x + 16);
                         const F d0 = x0 * a0 + b0 > zero ? load(sums) : zero;
                         const F d1 = x1 * a1 + b1 > zero ? load(sums + 16) : zero;
                         p0 += d0, p1 += d1, q0 += d0 * (x0 - m0), q1 += d1 * (x1 - m1);
                         store(dz + ((size_t)j * s.P + p) * CHUNK, narrow(d0, d1));
                       });
      flush();
    }
  }
}

// Back through norm2, for `n` pixels: the gradient of the 1x1's output, which is
// dz * a + h * slope + rest, to dh [mid][PB][32].
void gradient_of_hidden(const Block& s, int64_t p, int n, const bf16* dz, const bf16* h,
                        const Affine& f2, const std::vector<float>& slope,
                        const std::vector<float>& rest, bf16* dh) {
  for (int k = 0; k < s.mid; ++k) {
    const int c = k * CHUNK;
    const F a0 = load(&f2.a[c]), a1 = load(&f2.a[c] + 16), e0 = load(&slope[c]),
            e1 = load(&slope[c] + 16), r0 = load(&rest[c]), r1 = load(&rest[c] + 16);
    bf16* to = dh + (size_t)k * PB * CHUNK;
    for (int i = 0; i < n; ++i, to += CHUNK) {
      const size_t at = ((size_t)k * s.P + p + i) * CHUNK;
      store(to, narrow(widen(dz + at) * a0 + widen(h + at) * e0 + r0,
                       widen(dz + at + 16) * a1 + widen(h + at + 16) * e1 + r1));
    }
  }
}

// Without bottleneck: the new channels' gradient dg [chunks][P][32] around each of `n`
// pixels. What is stored beyond a tap's G is overwritten by the next one.
void gradient_of_taps(const Block& s, int64_t p, int n, const bf16* dg, bf16* dh) {
  bf16 row[9 * 2 * CHUNK + 2 * CHUNK];
  int x = (int)(p % s.W), y = (int)(p / s.W % s.H);
  for (int i = 0; i < n; ++i, ++p) {
    for (int tap = 0; tap < 9; ++tap) {
      const int dy = 1 - tap / 3, dx = 1 - tap % 3;
      const bool inside = y + dy >= 0 && y + dy < s.H && x + dx >= 0 && x + dx < s.W;
      const bf16* from = dg + (p + dy * s.W + dx) * CHUNK;
      for (int k = 0; k < s.grown; ++k, from += s.P * CHUNK) {
        bf16* to = row + tap * s.G + k * CHUNK;
        if (inside) {
          std::memcpy(to, from, sizeof(bf16) * CHUNK);
        } else {
          std::memset(to, 0, sizeof(bf16) * CHUNK);
        }
      }
    }
    std::memset(row + s.M, 0, sizeof(bf16) * CHUNK);
    for (int k = 0; k < s.mid; ++k)
      std::memcpy(dh + ((size_t)k * PB + i) * CHUNK, row + k * CHUNK,
                  sizeof(bf16) * CHUNK);
    if (++x == s.W) x = 0, y = y + 1 == s.H ? 0 : y + 1;
  }
}

// Back through the product in front and norm1's ReLU: added to the features' gradient,
// with dw [C, mid * 32]. fill(p, n, dh) writes the gradient of the product of `n` pixels.
template <class Fill>
void backward_front(const Block& s, int part, const Chunked& features, int C,
                    const Affine& f1, const Weights& w1t, Scratch& t, Fill fill) {
  const Multipliers& multiply = multipliers();
  const int chunks = steps_of(C);
  const int64_t ld = PB + PT, width = s.mid * CHUNK;
  bf16* yt = room(t.y, (size_t)CHUNK * ld);
  bf16* dh = room(t.dh, (size_t)s.mid * PB * CHUNK);
  bf16* dhv = room(t.dhv, (size_t)s.mid * PB / PT * 2 * TILE);
  t.reset((size_t)chunks * CHUNK * width, C);
  std::vector<int32_t> dh_steps(s.mid);
  for (int k = 0; k < s.mid; ++k) dh_steps[k] = k * PB * CHUNK;
  for (int64_t p = s.pixel(part); p < s.pixel(part + 1); p += PB) {
    const int n = (int)std::min<int64_t>(PB, s.pixel(part + 1) - p);
    const int steps = (n + PT - 1) / PT, all = steps * PT;
    fill(p, n, dh);
    for (int k = 0; k < s.mid; ++k) {
      std::memset(dh + ((size_t)k * PB + n) * CHUNK, 0, sizeof(bf16) * (all - n) * CHUNK);
      for (int i = 0; i < steps; ++i)
        interleave_patch(dh + ((size_t)k * PB + i * PT) * CHUNK,
                         dhv + ((size_t)k * steps + i) * 2 * TILE);
    }
    for (int k = 0; k < chunks; ++k) {
      const int c = k * CHUNK;
      for (int i = 0; i < steps; ++i) {
        const int count = std::min(PT, n - i * PT);
        normalize(features.x_at(k, p + i * PT), count, &f1.a[c], &f1.b[c], t.patch);
        std::memset(t.patch + count * CHUNK, 0, sizeof(bf16) * (PT - count) * CHUNK);
        transpose_patch(t.patch, yt + i * PT, ld);
      }
      for (int j = 0; j < s.mid; ++j) {
        multiply({yt, t.pixel_steps.data(), 2 * ld, dhv + (size_t)j * steps * 2 * TILE,
                  steps, t.sums, PT},
                 2, 2);
        add_sums(t.sums, t.dw.data() + (size_t)c * width + j * CHUNK, width);
      }
      // Beyond C, a and b are 0, and so is the gradient.
      const F a0 = load(&f1.a[c]), a1 = load(&f1.a[c] + 16), b0 = load(&f1.b[c]),
              b1 = load(&f1.b[c] + 16), m0 = load(&f1.mean[c]),
              m1 = load(&f1.mean[c] + 16), zero = {};
      F p0 = {}, p1 = {}, q0 = {}, q1 = {};
      for (int i = 0; i < n; i += PT) {
        const int count = std::min(PT, n - i);
        multiply({dh + (size_t)i * CHUNK, dh_steps.data(), 2 * CHUNK, w1t.panel(k), s.mid,
                  t.sums, PT},
                 count > ROWS ? 2 : 1, 2);
        const bf16* x = features.x_at(k, p + i);
        float* g = features.g_at(k, p + i);
        const float* sums = t.sums;
        for (int r = 0; r < count; ++r, x += CHUNK, g += CHUNK, sums += PT) {
          const F x0 = widen(x), x1 = widen(x + 16);
          const F d0 = x0 * a0 + b0 > zero ? load(sums) : zero;
          const F d1 = x1 * a1 + b1 > zero ? load(sums + 16) : zero;
          p0 += d0, p1 += d1, q0 += d0 * (x0 - m0), q1 += d1 * (x1 - m1);
          store(g, load(g) + a0 * d0), store(g + 16, load(g + 16) + a1 * d1);
        }
      }
      add_to(&t.s1[c], p0), add_to(&t.s1[c] + 16, p1);
      add_to(&t.s2[c], q0), add_to(&t.s2[c] + 16, q1);
    }
  }
}

// The features and their gradient of some pixels, in chunks.
void load_chunks(const Block& s, int part, const bf16* X, const bf16* gX,
                 const Chunked& to) {
  for (int64_t p = s.pixel(part); p < s.pixel(part + 1); ++p)
    for (int k = 0; k < steps_of(s.Ct); ++k) {
      const int64_t at = p * s.Ct + k * CHUNK;
      const int valid = s.Ct - k * CHUNK;
      alignas(64) bf16 gradient[CHUNK];
      load_part(X + at, valid, to.x_at(k, p));
      load_part(gX + at, valid, gradient);
      store(to.g_at(k, p), widen(gradient));
      store(to.g_at(k, p) + 16, widen(gradient + 16));
    }
}

// X, mean, var, h, mean2, var2, mask, images, gX, gmean, gvar, then the layers' weights
// as forward -> gx [N, H, W, C0], room for X and, in float32, gX (see `Chunked`), and for
// one layer's dz (without bottleneck dg [chunks, P, 32]), then for each layer dscale1,
// dbias1, dw1, dscale2, dbias2, dw2
ffi::Error Backward(ffi::ThreadPool pool, float epsilon, float rate, BF X, FL mean,
                    FL var, BF h, FL mean2, FL var2, U8 mask, FL images, BF gX, FL gmean, FL gvar, ffi::RemainingArgs args,
                    ffi::ResultBuffer<ffi::BF16> gx, ffi::ResultBuffer<ffi::BF16> chunks,
                    ffi::ResultBuffer<ffi::F32> work, ffi::ResultBuffer<ffi::BF16> dz, ffi::RemainingRets rets) {
  const auto d = gx->dimensions();
  const int L = (int)mean2.dimensions()[0], M = (int)mean2.dimensions()[1];
  const int G = (int)(X.dimensions()[3] - d[3]) / L;
  const Block s(d[0], d[1], d[2], d[3], L, G, M, (int)pool.num_threads());
  const Chunked features{chunks->typed_data(), work->typed_data(), s.P};
  std::vector<Scratch> scratch(s.T);
  std::vector<Tiled> w1t(L), w2t(L);
  const std::vector<Parameters> weights = parameters_of(args, L, s.plain ? 3 : 6, s.plain);
  Crew crew(pool, s.T);
  crew.run([&](int t) {
    set_steps(s, scratch[t]);
    load_chunks(s, t, X.typed_data(), gX.typed_data(), features);
    for (int l = t; l < L; l += s.T) {
      w1t[l].reset(s.mid, up(s.C(l), 2 * COLUMNS));
      w1t[l].set(0, Front(s.plain, s.C(l), G, weights[l].w1).w, s.M, s.C(l), s.M, true);
      if (s.plain) continue;
      w2t[l].reset(9 * s.grown, up(M, 2 * COLUMNS));
      for (int tap = 0; tap < 9; ++tap)  // in reverse order
        w2t[l].set(tap * s.grown, weights[l].w2 + (size_t)(8 - tap) * M * G, G, M, G, true);
    }
  });
  // Gradients with respect to the shared statistics, added up over the layers.
  std::vector<double> gm(gmean.typed_data(), gmean.typed_data() + s.Ct);
  std::vector<double> gv(gvar.typed_data(), gvar.typed_data() + s.Ct);
  const float *m = mean.typed_data(), *v = var.typed_data();
  const int stride = s.plain ? 3 : 6, wide = s.mid * CHUNK;
  for (int l = L - 1; l >= 0; --l) {
    const Parameters& w = weights[l];
    const int C = s.C(l);
    auto out = [&](int i) {
      return (*rets.get<FL>(l * stride + i))->typed_data();
    };
    Affine f1;
    f1.from(w.scale1, w.bias1, m, v, C, epsilon);
    const NewGradient fresh(s, features, C, G, gm, gv, m, Drop(s, l, rate, mask, images));
    if (s.plain) {
      bf16* dg = dz->typed_data();
      crew.run([&](int t) {
        for (int64_t p = s.pixel(t); p < s.pixel(t + 1); ++p)
          for (int k = 0; k < s.grown; ++k)
            store(dg + (k * s.P + p) * CHUNK, fresh.at(p, k));
      });
      crew.run([&](int t) {
        const TileConfig tiles;
        backward_front(s, t, features, C, f1, w1t[l].view(), scratch[t],
                       [&](int64_t p, int n, bf16* dh) {
                         gradient_of_taps(s, p, n, dg, dh);
                       });
      });
    } else {
      const bf16* hl = h.typed_data() + (size_t)l * s.mid * s.P * CHUNK;
      Affine f2;
      f2.from(w.scale2, w.bias2, mean2.typed_data() + l * M, var2.typed_data() + l * M,
              M, epsilon);
      crew.run([&](int t) {
        const TileConfig tiles;
        backward_3x3(s, t, fresh, hl, f2, w2t[l].view(), dz->typed_data(), scratch[t]);
      });
      add_parts(scratch);
      for (int tap = 0; tap < 9; ++tap)
        for (int i = 0; i < M; ++i)
          std::memcpy(
              out(5) + ((size_t)tap * M + i) * G,
              scratch[0].dw.data() + ((size_t)tap * wide + i) * s.grown * CHUNK,
              sizeof(float) * G);
      std::vector<float> slope(wide), rest(wide);
      for (int k = 0; k < M; ++k) {
        const double s1 = scratch[0].s1[k], s2 = scratch[0].s2[k], r = f2.rstd[k];
        out(3)[k] = (float)(s2 * r);
        out(4)[k] = (float)s1;
        const double e1 = f2.a[k] * r * r * s2 / s.P;
        slope[k] = (float)-e1;
        rest[k] = (float)(e1 * f2.mean[k] - f2.a[k] * s1 / s.P);
      }
      crew.run([&](int t) {
        const TileConfig tiles;
        backward_front(s, t, features, C, f1, w1t[l].view(), scratch[t],
                       [&](int64_t p, int n, bf16* dh) {
                         gradient_of_hidden(s, p, n, dz->typed_data(), hl, f2, slope,
                                            rest, dh);
                       });
      });
    }
    add_parts(scratch);
    const int taps = s.plain ? 9 : 1, each = s.M / taps;  // dw1 is [taps, C, each]
    for (int c = 0; c < C; ++c)
      for (int tap = 0; tap < taps; ++tap)
        std::memcpy(out(2) + ((size_t)tap * C + c) * each,
                    scratch[0].dw.data() + (size_t)c * wide + tap * each,
                    sizeof(float) * each);
    back_through_norm1(scratch[0], f1, w.scale1, C, out(0), out(1), gm, gv);
  }
  const NewGradient input(s, features, 0, s.C0, gm, gv, m, {});
  crew.run([&](int t) {
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); ++p)
      for (int k = 0; k < steps_of(s.C0); ++k)
        store_part(gx->typed_data() + p * s.C0 + k * CHUNK, input.at(p, k),
                   s.C0 - k * CHUNK);
  });
  return ffi::Error::Success();
}

}  // namespace

FD_HANDLER(DenseBlockForwardTrainBfloat16, Forward, "epsilon", "rate");
FD_HANDLER(DenseBlockBackwardBfloat16, Backward, "epsilon", "rate");

FD_TOGETHER(DenseBlockForwardTrainBfloat16);
FD_TOGETHER(DenseBlockBackwardBfloat16);

FLAX_DENSENET_BFLOAT16_PATH
