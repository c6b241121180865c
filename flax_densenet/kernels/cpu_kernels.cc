// A whole dense block, forward and backward, in one call on the CPU.
//
// The mathematics stands in dense_block.py; this file is about doing it while the
// numbers are in a core's cache. A layer's batch norm and ReLU are applied to a tile of
// pixels as it is loaded, the 1x1 convolution multiplies that tile, the statistics of
// what comes out are taken before it leaves the cache, and the 3x3 convolution is nine
// shifted products over an image band padded with zeros. Backward, each tile of the
// concatenated features is read once per layer and its gradient added in place. In
// evaluation a thread takes a few images through all layers of a block, so that their
// features stay in its cache, and for inference alone through the transition as well.
//
// A layer without bottleneck is one product, too, with the columns of all nine taps: a
// pixel's C features by [C, 9 * G], whose results are added up over the pixels around.
//
// All products go through `micro`, a register tile of MR x (NV * VL) sums. Work is cut
// into one contiguous part per thread, and parts are added in their order, so results
// on one machine are the same bit for bit in every run.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu_parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 14, MW = 8;  // 32 registers: 28 sums, 2 weights
#elif defined(__AVX__)
constexpr int VL = 8, MR = 6, MW = 4;  // 16 registers
#else
constexpr int VL = 4, MR = 8, MW = 8;
#endif
constexpr int NR = 2 * VL;
constexpr int KC = 256;         // channels of a chunk of the 1x1's input
constexpr int PT = 8 * MR;      // pixels of a tile of the 1x1
constexpr int KP = 64;          // pixels of a step of the 3x3's weight gradient
constexpr int64_t BAND = 480 * 1024;  // bytes of a padded band, to stay in L2
constexpr int64_t PLAIN_BAND = 640 * 1024;  // the same, of sums
constexpr int64_t TURN = 2048 * 1024; // bytes of the features of one turn in evaluation
constexpr int LINE = 16;              // floats of a cache line

typedef float V __attribute__((vector_size(VL * 4)));
typedef float VU __attribute__((vector_size(VL * 4), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
inline V load(const float* p, int n) {
  if (n >= VL) return load(p);
#if defined(__AVX512F__)
  return (V)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p);
#endif
  V v = {};
  std::memcpy(&v, p, sizeof(float) * n);
  return v;
}
inline void store(float* p, V v, int n) {
  if (n >= VL) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1 << n) - 1), (__m512)v);
#else
  std::memcpy(p, &v, sizeof(float) * n);
#endif
}
typedef int32_t VI __attribute__((vector_size(VL * 4)));
typedef uint8_t VB __attribute__((vector_size(VL)));
inline VI load_index(const uint8_t* p, int lanes) {
  VB v = {};
  if (lanes >= VL) {
    std::memcpy(&v, p, VL);
  } else {
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
  }
  return __builtin_convertvector(v, VI);
}
inline void store_index(uint8_t* p, VI v, int lanes) {
  const VB b = __builtin_convertvector(v, VB);
  std::memcpy(p, &b, lanes);
}
inline V relu(V v) {
  V zero = {};
  return v > zero ? v : zero;
}
inline int up(int n, int m) { return (n + m - 1) / m * m; }

// sum[i][j] += sum_k A[i * AI + k * AK] * B[k * ldb + j], i < R, j < NV * VL.
template <int R, int NV, int AI, int AK>
inline void accumulate(V (&sum)[R][NV], int K, const float* __restrict A,
                       const float* __restrict B, int ldb) {
  for (int k = 0; k < K; ++k) {
    V b[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) b[j] = load(B + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float a = A[i * AI];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) sum[i][j] += a * b[j];
    }
    A += AK;
    B += ldb;
  }
}

// C[i][j] (+)= sum_k A[i * AI + k * AK] * B[k * ldb + j], i < R, j < NV * VL.
template <int R, int NV, int AI, int AK>
inline void micro(int K, const float* __restrict A, const float* __restrict B, int ldb,
                  float* __restrict C, int ldc, bool add) {
  V sum[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) sum[i][j] = V{};
  accumulate<R, NV, AI, AK>(sum, K, A, B, ldb);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      float* c = C + i * ldc + j * VL;
      store(c, add ? load(c) + sum[i][j] : sum[i][j]);
    }
}

// Rows of A are `LD` apart, a constant so that they are plain offsets.
template <int LD>
void rows(int nv, int K, const float* A, const float* B, int ldb, float* C, int ldc,
          bool add) {
  if (nv == 2) {
    micro<MR, 2, LD, 1>(K, A, B, ldb, C, ldc, add);
  } else {
    micro<MR, 1, LD, 1>(K, A, B, ldb, C, ldc, add);
  }
}
template <int LD>
void columns(int nv, int K, const float* A, const float* B, int ldb, float* C, int ldc,
             bool add) {
  if (nv == 2) {
    micro<MW, 2, 1, LD>(K, A, B, ldb, C, ldc, add);
  } else {
    micro<MW, 1, 1, LD>(K, A, B, ldb, C, ldc, add);
  }
}
typedef void (*Product)(int, int, const float*, const float*, int, float*, int, bool);

// Widths of scratch rows for which there is a product.
int width(int n) {
  for (int w : {16, 32, 48, 64, 96, 128, 192, 256})
    if (n <= w) return w;
  return 0;
}
#define EACH_WIDTH(f) \
  switch (w) {        \
    case 16: return f<16>;   \
    case 32: return f<32>;   \
    case 48: return f<48>;   \
    case 64: return f<64>;   \
    case 96: return f<96>;   \
    case 128: return f<128>; \
    case 192: return f<192>; \
    default: return f<256>;  \
  }
Product rows_of(int w) { EACH_WIDTH(rows) }
Product columns_of(int w) { EACH_WIDTH(columns) }

// Count, mean and sum of squared deviations of some channels, merged exactly (Chan,
// Golub, LeVeque 1979): safe where the mean is large beside the spread.
struct Moments {
  double count = 0;
  std::vector<double> mean, m2;
  explicit Moments(int n = 0) : mean(n), m2(n) {}

  void merge(double n, int c, double tile_mean, double tile_m2) {
    const double delta = tile_mean - mean[c], total = count + n;
    mean[c] += delta * (n / total);
    m2[c] += tile_m2 + delta * delta * (count * n / total);
  }
  // Adds `n` rows of data that are `ld` apart.
  void add(const float* data, int n, int ld) {
    const int C = mean.size();
    for (int c = 0; c < C; c += VL) {
      const int lanes = std::min(VL, C - c);
      V sum = {}, first = {}, second = {};
      for (int i = 0; i < n; ++i) sum += load(data + (int64_t)i * ld + c, lanes);
      const V middle = sum * (1.0f / n);
      for (int i = 0; i < n; ++i) {
        const V d = load(data + (int64_t)i * ld + c, lanes) - middle;
        first += d;
        second += d * d;
      }
      for (int v = 0; v < lanes; ++v) {
        const double rest = (double)first[v] / n;
        merge(n, c + v, middle[v] + rest, (double)second[v] - first[v] * rest);
      }
    }
    count += n;
  }
  void add(const Moments& other) {
    if (other.count == 0) return;
    for (size_t c = 0; c < mean.size(); ++c)
      merge(other.count, c, other.mean[c], other.m2[c]);
    count += other.count;
  }
};

struct Block {
  int N, H, W, C0, L, G, M, T;
  int64_t P;
  int Ct;          // channels of the block's output
  bool plain;      // no bottleneck; M is 9 * G
  int wm, wg;      // scratch widths of the bottleneck and of the growth
  int bands, rb;   // bands of an image, rows of a band
  int units;
  int C(int l) const { return C0 + l * G; }

  Block(int n, int h, int w, int c0, int layers, int growth, int bottleneck, int threads)
      : N(n), H(h), W(w), C0(c0), L(layers), G(growth), plain(bottleneck == 0) {
    M = plain ? 9 * G : bottleneck;
    P = (int64_t)N * H * W;
    Ct = C0 + L * G;
    wm = width(M);
    wg = width(G);
    const int64_t row = 4LL * (plain ? up(M, VL) : wm) * (W + 2);
    const int64_t fit = (plain ? PLAIN_BAND : BAND) / row - 2;
    bands = (int)((H + std::max<int64_t>(fit, 1) - 1) / std::max<int64_t>(fit, 1));
    // Of a few images every thread gets a part all the same.
    bands = std::max(bands, std::min(H, (threads + N - 1) / N));
    rb = (H + bands - 1) / bands;
    bands = (H + rb - 1) / rb;
    units = N * bands;
    T = std::max(1, std::min(threads, units));
  }
  bool fits() const { return wm && wg; }
  int64_t pixel(int t) const { return P * t / T; }
  int unit(int t) const { return (int)((int64_t)units * t / T); }
  // Rows of a padded band, with spare rows for the last register tile.
  int padded_rows() const { return (rb + 2) * (W + 2) + MR + 2; }
};

// W [K, n] (rows `ld` apart, transposed where `transpose`) in panels of NR columns,
// the last one of VL where that is enough.
struct Panels {
  int K = 0, n = 0;
  std::vector<float> own;
  const float* data = nullptr;
  Panels() = default;
  Panels(Panels&&) = default;  // a copy's `data` would be the other's
  void pack(const float* w, int rows, int columns, int ld, bool transpose) {
    K = rows;
    n = up(columns, VL);
    own.resize((size_t)K * n);
    data = own.data();
    for (int j = 0; j < n; j += NR) {
      const int wide = std::min(NR, n - j), valid = std::min(wide, columns - j);
      float* out = own.data() + (size_t)j * K;
      for (int k = 0; k < K; ++k, out += wide) {
        for (int i = 0; i < valid; ++i)
          out[i] = transpose ? w[(size_t)(j + i) * ld + k] : w[(size_t)k * ld + j + i];
        for (int i = valid; i < wide; ++i) out[i] = 0.0f;
      }
    }
  }
  void view(const float* packed, int rows, int columns) {
    K = rows;
    n = up(columns, VL);
    data = packed;
  }
  int wide(int j) const { return std::min(NR, n - j); }
  const float* at(int j) const { return data + (size_t)j * K; }
};

struct Affine {
  std::vector<float> a, b, mean, rstd;
  void from(const float* scale, const float* bias, const float* m, const float* v, int n,
            float epsilon) {
    a.resize(n), b.resize(n), mean.assign(m, m + n), rstd.resize(n);
    for (int c = 0; c < n; ++c) {
      rstd[c] = 1.0f / std::sqrt(v[c] + epsilon);
      a[c] = scale[c] * rstd[c];
      b[c] = bias[c];
    }
  }
};

// relu((x - mean) * a + b); the mean is taken off first, which keeps the digits of a
// channel whose mean is large.
inline V normalized(V x, const Affine& f, int c, int lanes) {
  return relu((x - load(&f.mean[c], lanes)) * load(&f.a[c], lanes) +
              load(&f.b[c], lanes));
}

// Chunks of KC channels of relu(norm1(x)) for `n` pixels: y[chunk][PT][KC].
void load_tile(const Block& s, const float* X, int64_t p, int n, int C, const Affine& f,
               float* y) {
  for (int c0 = 0; c0 < C; c0 += KC) {
    const int end = std::min(KC, C - c0);
    float* out = y + (size_t)(c0 / KC) * PT * KC;
    for (int c = 0; c < end; c += VL) {
      const int lanes = std::min(VL, end - c);
      const V mean = load(&f.mean[c0 + c], lanes), a = load(&f.a[c0 + c], lanes),
              b = load(&f.b[c0 + c], lanes);
      const float* x = X + p * s.Ct + c0 + c;
      for (int i = 0; i < n; ++i)
        store(out + (size_t)i * KC + c,
              relu((load(x + (int64_t)i * s.Ct, lanes) - mean) * a + b));
    }
  }
}
inline size_t tile_size(int C) { return (size_t)up(C, KC) / KC * PT * KC; }

// A band of an image with a border of zeros. `fill(out, p)` writes one pixel.
template <class F>
void load_band(const Block& s, int unit, int wide, float* out, F fill) {
  const int n = unit / s.bands, r0 = unit % s.bands * s.rb;
  const int r1 = std::min(s.H, r0 + s.rb);
  const size_t line = (size_t)(s.W + 2) * wide;
  for (int r = r0 - 1; r <= r1; ++r, out += line) {
    if (r < 0 || r >= s.H) {
      std::memset(out, 0, line * sizeof(float));
      continue;
    }
    std::memset(out, 0, wide * sizeof(float));
    std::memset(out + line - wide, 0, wide * sizeof(float));
    const int64_t p = ((int64_t)n * s.H + r) * s.W;
    for (int x = 0; x < s.W; ++x) fill(out + (size_t)(x + 1) * wide, p + x);
  }
  std::memset(out, 0, (size_t)(MR + 2) * wide * sizeof(float));
}

// relu(norm2(h)) of a band; with `f` null h is that already.
void load_z(const Block& s, int unit, const float* h, const Affine* f, float* z) {
  load_band(s, unit, s.wm, z, [&](float* out, int64_t p) {
    const float* in = h + p * s.M;
    for (int c = 0; c < s.M; c += VL) {
      const int lanes = std::min(VL, s.M - c);
      const V v = load(in + c, lanes);
      store(out + c, f ? normalized(v, *f, c, lanes) : v, std::min(VL, s.wm - c));
    }
  });
}

// What dropout and stochastic depth leave of a layer's new channels, as a factor.
struct Drop {
  const uint8_t* mask = nullptr;   // [P, G], 1 where a value stays
  const float* images = nullptr;   // [N], the factor of each image
  float scale = 1;                 // of the values that stay
  int G = 0;
  int64_t image = 1;               // pixels
  bool any() const { return mask || images; }
  V at(int64_t p, int c, int lanes) const {
    const V all = V{} + (images ? scale * images[p / image] : scale);
    if (!mask) return all;
    return all * __builtin_convertvector(load_index(mask + p * G + c, lanes), V);
  }
};

struct Weights {
  const float *scale1, *bias1, *w1, *scale2, *bias2, *w2;
};

// Memory for `n` numbers; what is in it does not matter.
float* room(std::vector<float>& scratch, size_t n) {
  if (scratch.size() < n) scratch.resize(n);
  return scratch.data();
}

// y, `n` pixels of C channels in chunks as of `load_tile`, times w, whose columns are
// `columns`; put(i, j, v, lanes) gets the sums of pixel i from column j on.
template <class F>
inline void multiply(const float* y, int n, int C, const Panels& w, int columns,
                     float* c, F put) {
  for (int j = 0; j < w.n; j += NR) {
    const int wide = w.wide(j);
    for (int i = 0; i < n; i += MR) {
      for (int k = 0; k < C; k += KC)
        rows<KC>(wide / VL, std::min(KC, C - k),
                 y + (size_t)(k / KC) * PT * KC + (size_t)i * KC,
                 w.at(j) + (size_t)k * wide, wide, c, NR, k > 0);
      for (int r = 0; r < std::min(MR, n - i); ++r)
        for (int v = 0; v < wide && j + v < columns; v += VL)
          put(i + r, j + v, load(c + r * NR + v), std::min(VL, columns - j - v));
    }
  }
}

// The 1x1 convolution of one layer for some pixels: h [P, M]. In training h is as it
// comes out and its moments are added; in evaluation `f2` and ReLU follow at once.
void forward_1x1(const Block& s, int64_t first, int64_t last, const float* X, int C,
                 const Affine& f1, const Panels& w1, const Affine* f2, float* h,
                 Moments* moments, std::vector<float>& scratch) {
  float *y = room(scratch, tile_size(C) + (size_t)MR * NR), *c = y + tile_size(C);
  for (int64_t p = first; p < last; p += PT) {
    const int n = (int)std::min<int64_t>(PT, last - p);
    load_tile(s, X, p, n, C, f1, y);
    multiply(y, n, C, w1, s.M, c, [&](int i, int j, V value, int lanes) {
      if (f2) value = normalized(value, *f2, j, lanes);
      store(h + (p + i) * s.M + j, value, lanes);
    });
    if (moments) moments->add(h + p * s.M, n, s.M);
  }
}

// Nine shifted products of MR pixels from `z` on, whose lines are `line` pixels long.
template <int LD, int NV>
inline void taps(int K, const float* z, int line, const Panels* w2, int j, float* C) {
  V sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[i][v] = V{};
  for (int tap = 0; tap < 9; ++tap)
    accumulate<MR, NV, LD, 1>(sum, K, z + (size_t)(tap / 3 * line + tap % 3) * LD,
                              w2[tap].at(j), NV * VL);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(C + i * NR + v * VL, sum[i][v]);
}
template <int LD>
void convolve(int nv, int K, const float* z, int line, const Panels* w2, int j,
              float* C) {
  if (nv == 2) {
    taps<LD, 2>(K, z, line, w2, j, C);
  } else {
    taps<LD, 1>(K, z, line, w2, j, C);
  }
}
typedef void (*Convolution)(int, int, const float*, int, const Panels*, int, float*);
Convolution convolve_of(int w) { EACH_WIDTH(convolve) }

// The 3x3 convolution of one layer for some bands, into its place in X.
void forward_3x3(const Block& s, int first, int last, float* X, int C, const float* h,
                 const Affine* f2, const Panels* w2, const Drop& drop, Moments* moments,
                 std::vector<float>& scratch) {
  const int line = s.W + 2;
  const size_t padded = (size_t)s.padded_rows() * s.wm;
  float *z = room(scratch, padded + (size_t)MR * NR), *c = z + padded;
  const Convolution product = convolve_of(s.wm);
  // Tiles that begin with each line, where they reach less far into the border of zeros
  // than those that run on over the lines.
  const int tiles = up(s.W, MR) / MR;
  const bool by_lines = tiles * MR < line;
  for (int u = first; u < last; ++u) {
    load_z(s, u, h, f2, z);
    const int n = u / s.bands, r0 = u % s.bands * s.rb;
    const int count = std::min(s.H, r0 + s.rb) - r0;
    const int64_t p0 = ((int64_t)n * s.H + r0) * s.W;
    const int parts = by_lines ? count * tiles : up(count * line, MR) / MR;
    for (int j = 0; j < w2[0].n; j += NR) {
      const int wide = w2[0].wide(j);
      for (int i = 0; i < parts; ++i) {
        const int q = by_lines ? i / tiles * line + i % tiles * MR : i * MR;
        product(wide / VL, s.M, z + (size_t)q * s.wm, line, w2, j, c);
        for (int r = 0; r < MR && q + r < count * line; ++r) {
          const int x = (q + r) % line;
          if (x >= s.W) continue;  // the border of zeros
          const int64_t p = p0 + (q + r) / line * s.W + x;
          float* out = X + p * s.Ct + C;
          for (int v = 0; v < wide && j + v < s.G; v += VL) {
            const int lanes = std::min(VL, s.G - j - v);
            V sum = load(c + r * NR + v);
            if (drop.any()) sum *= drop.at(p, j + v, lanes);
            store(out + j + v, sum, lanes);
          }
        }
      }
    }
    if (moments) {
      for (int r = 0; r < count; ++r)
        moments->add(X + (p0 + (int64_t)r * s.W) * s.Ct + C, s.W, s.Ct);
    }
  }
}

// One layer without bottleneck for some bands, into its place in X. `w` is [C, 9 * G].
void forward_plain(const Block& s, int first, int last, float* X, int C,
                   const Affine& f1, const Panels& w, const Drop& drop,
                   Moments* moments, std::vector<float>& scratch) {
  const int line = s.W + 2, ld = up(s.M, VL);
  const size_t sums = (size_t)(s.rb + 2) * line * ld + NR;
  float* taps = room(scratch, sums + tile_size(C) + (size_t)MR * NR);
  float *y = taps + sums, *c = y + tile_size(C);
  float* to[PT];
  for (int u = first; u < last; ++u) {
    const int n = u / s.bands, r0 = u % s.bands * s.rb;
    const int r1 = std::min(s.H, r0 + s.rb);
    // Of the rows around the band, too; there are none outside of the image.
    const int top = std::max(0, r0 - 1), bottom = std::min(s.H, r1 + 1);
    const size_t row = (size_t)line * ld;
    if (top == r0) std::memset(taps, 0, sizeof(float) * row);
    if (bottom == r1)
      std::memset(taps + (r1 - r0 + 1) * row, 0, sizeof(float) * row);
    for (int r = top; r < bottom; ++r) {
      float* begin = taps + (r - r0 + 1) * row;
      std::memset(begin, 0, sizeof(float) * ld);
      std::memset(begin + row - ld, 0, sizeof(float) * ld);
    }
    const int64_t image = (int64_t)n * s.H * s.W;
    for (int q = top * s.W; q < bottom * s.W; q += PT) {
      const int count = std::min(PT, bottom * s.W - q);
      for (int i = 0; i < count; ++i)
        to[i] = taps + ((q + i) / s.W - r0 + 1) * row + ((q + i) % s.W + 1) * ld;
      load_tile(s, X, image + q, count, C, f1, y);
      multiply(y, count, C, w, s.M, c,
               [&](int i, int j, V value, int) { store(to[i] + j, value); });
    }
    for (int r = r0; r < r1; ++r) {
      for (int x = 0; x < s.W; ++x) {
        const float* from = taps + (r - r0) * row + x * ld;
        const int64_t p = image + r * s.W + x;
        for (int g = 0; g < s.G; g += VL) {
          const int lanes = std::min(VL, s.G - g);
          V sum = {};
          for (int tap = 0; tap < 9; ++tap)
            sum += load(from + tap / 3 * row + tap % 3 * ld + tap * s.G + g);
          if (drop.any()) sum *= drop.at(p, g, lanes);
          store(X + p * s.Ct + C + g, sum, lanes);
        }
      }
      if (moments)
        moments->add(X + (image + r * s.W) * s.Ct + C, s.W, s.Ct);
    }
  }
}

void copy_input(const Block& s, ffi::ThreadPool& pool, const float* x, float* X,
                Moments* moments) {
  parallel(pool, s.T, [&](int t) {
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); p += PT) {
      const int n = (int)std::min<int64_t>(PT, s.pixel(t + 1) - p);
      for (int i = 0; i < n; ++i)
        std::memcpy(X + (p + i) * s.Ct, x + (p + i) * s.C0, sizeof(float) * s.C0);
      if (moments) moments[t].add(x + p * s.C0, n, s.C0);
    }
  });
}

void finish_moments(std::vector<Moments>& parts, int n, float* mean, float* var) {
  Moments all(n);
  for (const Moments& part : parts) all.add(part);
  for (int c = 0; c < n; ++c) {
    mean[c] = (float)all.mean[c];
    var[c] = (float)(all.m2[c] / all.count);
  }
}

// Of each layer `stride` arguments, of which the first are these.
std::vector<Weights> weights_of(const Block& s, ffi::RemainingArgs& args, int stride) {
  std::vector<Weights> all(s.L);
  for (int l = 0; l < s.L; ++l) {
    auto at = [&](int i) {
      return args.get<ffi::Buffer<ffi::F32>>(l * stride + i)->typed_data();
    };
    all[l] = {at(0), at(1), at(2)};
    if (!s.plain) all[l].scale2 = at(3), all[l].bias2 = at(4), all[l].w2 = at(5);
  }
  return all;
}

// The weights in front of a layer's product: those of its 1x1, or without bottleneck
// the nine taps of the 3x3 [3, 3, C, G] side by side.
struct Front {
  std::vector<float> own;
  const float* w;  // [C, M]
  Front(const Block& s, int C, const float* w1) : w(w1) {
    if (!s.plain) return;
    own.resize((size_t)C * s.M);
    w = own.data();
    for (int tap = 0; tap < 9; ++tap)
      for (int c = 0; c < C; ++c)
        std::memcpy(own.data() + (size_t)c * s.M + tap * s.G,
                    w1 + ((size_t)tap * C + c) * s.G, sizeof(float) * s.G);
  }
};

std::vector<Panels> pack_3x3(const Block& s, const float* w2, bool transpose) {
  std::vector<Panels> panels(9);
  for (int tap = 0; tap < 9; ++tap) {
    // The gradient with respect to the input runs over the taps the other way round.
    const float* w = w2 + (size_t)(transpose ? 8 - tap : tap) * s.M * s.G;
    if (transpose) {
      panels[tap].pack(w, s.G, s.M, s.G, true);
    } else {
      panels[tap].pack(w, s.M, s.G, s.G, false);
    }
  }
  return panels;
}

ffi::Error check(const Block& s) {
  if (s.fits()) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("dense block: too wide for the CPU kernel");
}

// `mask` [L, N, H, W, G] and `images` [L, N], each empty where nothing drops.
Drop drop_of(const Block& s, int l, float rate, const ffi::Buffer<ffi::U8>& mask,
             const ffi::Buffer<ffi::F32>& images) {
  Drop drop;
  drop.G = s.G, drop.image = (int64_t)s.H * s.W;
  if (mask.element_count()) {
    drop.mask = mask.typed_data() + l * s.P * s.G;
    drop.scale = 1.0f / (1.0f - rate);
  }
  if (images.element_count()) drop.images = images.typed_data() + (size_t)l * s.N;
  return drop;
}

// x, mask, images, then per layer scale1, bias1, w1, scale2, bias2, w2
// -> X [N, H, W, Ct], mean, var [Ct], h [L, P, M], mean2, var2 [L, M]
// Without bottleneck a layer is scale1, bias1, w [3, 3, C, G], and M is 0.
ffi::Error ForwardTrain(ffi::ThreadPool pool, float epsilon, float rate,
                        ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> mask,
                        ffi::Buffer<ffi::F32> images, ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> X,
                        ffi::ResultBuffer<ffi::F32> mean,
                        ffi::ResultBuffer<ffi::F32> var, ffi::ResultBuffer<ffi::F32> h,
                        ffi::ResultBuffer<ffi::F32> mean2,
                        ffi::ResultBuffer<ffi::F32> var2) {
  const auto d = x.dimensions();
  const int L = (int)mean2->dimensions()[0], M = (int)mean2->dimensions()[1];
  const int G = (int)(X->dimensions()[3] - d[3]) / L;
  const Block s(d[0], d[1], d[2], d[3], L, G, M, pool.num_threads());
  if (ffi::Error error = check(s); error.failure()) return error;
  float *out = X->typed_data(), *m = mean->typed_data(), *v = var->typed_data();
  {
    std::vector<Moments> parts(s.T, Moments(s.C0));
    copy_input(s, pool, x.typed_data(), out, parts.data());
    finish_moments(parts, s.C0, m, v);
  }
  std::vector<std::vector<float>> scratch(s.T);
  const std::vector<Weights> weights = weights_of(s, args, s.plain ? 3 : 6);
  for (int l = 0; l < L; ++l) {
    const Weights& w = weights[l];
    const int C = s.C(l);
    const Drop drop = drop_of(s, l, rate, mask, images);
    const Front front(s, C, w.w1);
    Panels w1;
    w1.pack(front.w, C, s.M, s.M, false);
    if (s.plain) {
      Affine f1;
      f1.from(w.scale1, w.bias1, m, v, C, epsilon);
      std::vector<Moments> parts(s.T, Moments(G));
      parallel(pool, s.T, [&](int t) {
        forward_plain(s, s.unit(t), s.unit(t + 1), out, C, f1, w1, drop, &parts[t],
                      scratch[t]);
      });
      finish_moments(parts, G, m + C, v + C);
      continue;
    }
    float *m2 = mean2->typed_data() + l * M, *v2 = var2->typed_data() + l * M;
    float* hl = h->typed_data() + (int64_t)l * s.P * M;
    Affine f1, f2;
    f1.from(w.scale1, w.bias1, m, v, C, epsilon);
    std::vector<Moments> parts(s.T, Moments(M));
    parallel(pool, s.T, [&](int t) {
      forward_1x1(s, s.pixel(t), s.pixel(t + 1), out, C, f1, w1, nullptr, hl,
                  &parts[t], scratch[t]);
    });
    finish_moments(parts, M, m2, v2);
    f2.from(w.scale2, w.bias2, m2, v2, M, epsilon);
    const std::vector<Panels> w2 = pack_3x3(s, w.w2, false);
    parts.assign(s.T, Moments(G));
    parallel(pool, s.T, [&](int t) {
      forward_3x3(s, s.unit(t), s.unit(t + 1), out, C, hl, &f2, w2.data(), drop,
                  &parts[t], scratch[t]);
    });
    finish_moments(parts, G, m + C, v + C);
  }
  return ffi::Error::Success();
}

// One layer in evaluation: its norms, and its weights in panels.
struct EvalLayer {
  Affine f1, f2;
  Panels w1;
  std::vector<Panels> w2;
};

// What follows a block: a norm, and in a transition ReLU, the mean of 2x2 pixels and a
// 1x1 convolution to F channels; F is 0 behind the last block.
struct Tail {
  Affine f;
  Panels w;
  int F;
};

// Chunks as of `load_tile` of relu(norm(x)), averaged over 2x2, for `n` pixels from the
// pixel p of the smaller maps on.
void load_pooled(const Block& s, const float* X, int64_t p, int n, const Affine& f,
                 float* y) {
  const int H2 = s.H / 2, W2 = s.W / 2;
  for (int i = 0; i < n; ++i) {
    const int64_t row = (p + i) / W2, image = row / H2;
    const float* x = X + ((image * s.H + row % H2 * 2) * s.W + (p + i) % W2 * 2) * s.Ct;
    const float* below = x + (int64_t)s.W * s.Ct;
    for (int c = 0; c < s.Ct; c += VL) {
      const int lanes = std::min(VL, s.Ct - c);
      const V sum = normalized(load(x + c, lanes), f, c, lanes) +
                    normalized(load(x + s.Ct + c, lanes), f, c, lanes) +
                    normalized(load(below + c, lanes), f, c, lanes) +
                    normalized(load(below + s.Ct + c, lanes), f, c, lanes);
      store(y + (size_t)(c / KC) * PT * KC + (size_t)i * KC + c % KC, sum * 0.25f);
    }
  }
}

// The tail for some pixels of its result.
void finish(const Block& s, int64_t first, int64_t last, const float* X,
            const Tail& tail, float* out, std::vector<float>& scratch) {
  if (!tail.F) {
    for (int64_t p = first; p < last; ++p)
      for (int c = 0; c < s.Ct; c += VL) {
        const int lanes = std::min(VL, s.Ct - c);
        const V x = load(X + p * s.Ct + c, lanes) - load(&tail.f.mean[c], lanes);
        store(out + p * s.Ct + c,
              x * load(&tail.f.a[c], lanes) + load(&tail.f.b[c], lanes), lanes);
      }
    return;
  }
  float *y = room(scratch, tile_size(s.Ct) + (size_t)MR * NR), *c = y + tile_size(s.Ct);
  for (int64_t p = first; p < last; p += PT) {
    const int n = (int)std::min<int64_t>(PT, last - p);
    load_pooled(s, X, p, n, tail.f, y);
    multiply(y, n, s.Ct, tail.w, tail.F, c, [&](int i, int j, V value, int lanes) {
      store(out + (p + i) * tail.F + j, value, lanes);
    });
  }
}

// A block in evaluation, with its tail or, without one, all of its features.
//
// Without statistics no image depends on another, so a thread takes a few images, whose
// features stay in its cache, through all of the layers. Of fewer images than threads
// each layer is computed by all of them.
void forward_eval(const Block& s, ffi::ThreadPool& pool, int threads, const float* x,
                  const std::vector<EvalLayer>& layers, const Tail* tail, float* out) {
  const int64_t image = (int64_t)s.H * s.W;
  const int64_t image_out = tail && tail->F ? (int64_t)(s.H / 2) * (s.W / 2) : image;
  const int channels = tail && tail->F ? tail->F : s.Ct;
  if (s.N < threads) {
    thread_local std::vector<float> features, hidden;
    float* X = tail ? room(features, s.P * s.Ct) : out;
    float* h = room(hidden, s.plain ? 0 : s.P * s.M);
    std::vector<std::vector<float>> scratch(s.T);
    copy_input(s, pool, x, X, nullptr);
    for (int l = 0; l < s.L; ++l) {
      const EvalLayer& layer = layers[l];
      if (s.plain) {
        parallel(pool, s.T, [&](int t) {
          forward_plain(s, s.unit(t), s.unit(t + 1), X, s.C(l), layer.f1, layer.w1, {},
                        nullptr, scratch[t]);
        });
        continue;
      }
      parallel(pool, s.T, [&](int t) {
        forward_1x1(s, s.pixel(t), s.pixel(t + 1), X, s.C(l), layer.f1, layer.w1,
                    &layer.f2, h, nullptr, scratch[t]);
      });
      parallel(pool, s.T, [&](int t) {
        forward_3x3(s, s.unit(t), s.unit(t + 1), X, s.C(l), h, nullptr,
                    layer.w2.data(), {}, nullptr, scratch[t]);
      });
    }
    const int64_t all = s.N * image_out;
    if (tail)
      parallel(pool, s.T, [&](int t) {
        finish(s, all * t / s.T, all * (t + 1) / s.T, X, *tail, out, scratch[t]);
      });
    return;
  }
  const int64_t fit = TURN / (4 * image * s.Ct);
  const int turn = std::max(1, (int)std::min<int64_t>(fit, (s.N + threads - 1) / threads));
  // A block of these images alone, so that there is room for them only.
  const Block one(turn, s.H, s.W, s.C0, s.L, s.G, s.plain ? 0 : s.M, 1);
  parallel(pool, (s.N + turn - 1) / turn, [&](int i) {
    thread_local std::vector<float> scratch, features, hidden;
    const int64_t first = (int64_t)i * turn, count = std::min<int64_t>(turn, s.N - first);
    float* to = out + first * image_out * channels;
    float* X = tail ? room(features, one.P * s.Ct) : to;
    float* h = room(hidden, s.plain ? 0 : one.P * s.M);
    const float* in = x + first * image * s.C0;
    for (int64_t p = 0; p < count * image; ++p)
      std::memcpy(X + p * s.Ct, in + p * s.C0, sizeof(float) * s.C0);
    for (int l = 0; l < s.L; ++l) {
      const EvalLayer& layer = layers[l];
      if (s.plain) {
        forward_plain(one, 0, count * one.bands, X, s.C(l), layer.f1, layer.w1, {},
                      nullptr, scratch);
        continue;
      }
      forward_1x1(one, 0, count * image, X, s.C(l), layer.f1, layer.w1, &layer.f2, h,
                  nullptr, scratch);
      forward_3x3(one, 0, count * one.bands, X, s.C(l), h, nullptr, layer.w2.data(),
                  {}, nullptr, scratch);
    }
    if (tail) finish(one, 0, count * image_out, X, *tail, to, scratch);
  });
}

// x, then per layer scale1, bias1, w1, scale2, bias2, w2, mean1, var1, mean2, var2,
// without bottleneck scale1, bias1, w, mean1, var1 -> X [N, H, W, Ct]
ffi::Error ForwardEval(ffi::ThreadPool pool, float epsilon, ffi::Buffer<ffi::F32> x,
                       ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> X) {
  const auto d = x.dimensions(), kernel = args.get<ffi::Buffer<ffi::F32>>(2)->dimensions();
  const bool plain = kernel[0] == 3;
  const int stride = plain ? 5 : 10, L = (int)args.size() / stride;
  const int G = (int)(X->dimensions()[3] - d[3]) / L, M = plain ? 0 : (int)kernel[3];
  const int threads = pool.num_threads();
  const Block s(d[0], d[1], d[2], d[3], L, G, M, threads);
  if (ffi::Error error = check(s); error.failure()) return error;
  std::vector<EvalLayer> layers(L);
  const std::vector<Weights> weights = weights_of(s, args, stride);
  parallel(pool, L, [&](int l) {
    const Weights& w = weights[l];
    auto at = [&](int i) {
      return args.get<ffi::Buffer<ffi::F32>>(l * stride + i)->typed_data();
    };
    const int first = plain ? 3 : 6;
    EvalLayer& layer = layers[l];
    layer.f1.from(w.scale1, w.bias1, at(first), at(first + 1), s.C(l), epsilon);
    layer.w1.pack(Front(s, s.C(l), w.w1).w, s.C(l), s.M, s.M, false);
    if (plain) return;
    layer.f2.from(w.scale2, w.bias2, at(8), at(9), M, epsilon);
    layer.w2 = pack_3x3(s, w.w2, false);
  });
  forward_eval(s, pool, threads, x.typed_data(), layers, nullptr, X->typed_data());
  return ffi::Error::Success();
}

// Reads what native_eval.py packed: each part is filled up to whole cache lines.
struct Packed {
  const float* next;
  void vector(int n, std::vector<float>& out) {
    out.assign(next, next + n);
    next += up(n, LINE);
  }
  void norm(int n, Affine& f) { vector(n, f.mean), vector(n, f.a), vector(n, f.b); }
  void bias(int n, Affine& f) {
    f.mean.assign(n, 0.0f), f.a.assign(n, 1.0f);
    vector(n, f.b);
  }
  void panels(int rows, int columns, Panels& w) {
    w.view(next, rows, columns);
    next += up(rows * w.n, LINE);
  }
  bool ends(ffi::Buffer<ffi::F32>& all) const {
    return next == all.typed_data() + all.element_count();
  }
};

// x and `packed`: per layer norm1, w1, bias2 and the nine taps of w2, then the tail's
// norm and weights -> [N, H/2, W/2, F], with features = 0 [N, H, W, Ct]
ffi::Error ForwardPacked(ffi::ThreadPool pool, int64_t layers_, int64_t bottleneck,
                         int64_t growth, int64_t features, ffi::Buffer<ffi::F32> x,
                         ffi::Buffer<ffi::F32> packed,
                         ffi::ResultBuffer<ffi::F32> out) {
  const auto d = x.dimensions();
  const int L = (int)layers_, M = (int)bottleneck, G = (int)growth;
  const int threads = pool.num_threads();
  const Block s(d[0], d[1], d[2], d[3], L, G, M, threads);
  if (ffi::Error error = check(s); error.failure()) return error;
  std::vector<EvalLayer> layers(L);
  Packed from{packed.typed_data()};
  for (int l = 0; l < L; ++l) {
    EvalLayer& layer = layers[l];
    from.norm(s.C(l), layer.f1);
    from.panels(s.C(l), M, layer.w1);
    from.bias(M, layer.f2);
    layer.w2.resize(9);
    for (Panels& tap : layer.w2) from.panels(M, G, tap);
  }
  Tail tail;
  tail.F = (int)features;
  from.norm(s.Ct, tail.f);
  if (tail.F) from.panels(s.Ct, tail.F, tail.w);
  if (!from.ends(packed))
    return ffi::Error::InvalidArgument("dense block: packed by other rules");
  forward_eval(s, pool, threads, x.typed_data(), layers, &tail, out->typed_data());
  return ffi::Error::Success();
}

// One thread's share of a layer's sums.
struct Sums {
  std::vector<float> dw;       // of the weights
  std::vector<double> s1, s2;  // of the gradient, and of it times (input - mean)
  void reset(size_t weights, int channels) {
    dw.assign(weights, 0.0f);
    s1.assign(channels, 0.0);
    s2.assign(channels, 0.0);
  }
};

void add_sums(std::vector<Sums>& parts) {
  for (size_t t = 1; t < parts.size(); ++t) {
    for (size_t i = 0; i < parts[0].dw.size(); ++i) parts[0].dw[i] += parts[t].dw[i];
    for (size_t c = 0; c < parts[0].s1.size(); ++c) {
      parts[0].s1[c] += parts[t].s1[c];
      parts[0].s2[c] += parts[t].s2[c];
    }
  }
}

// Gradient of the layer's new channels, the share of their statistics included.
struct NewGradient {
  const float *X, *gX;
  std::vector<float> k0, k1, mean;
  Drop drop;
  int C, Ct;
  NewGradient(const Block& s, const float* x, const float* g, int first, int count,
              const std::vector<double>& gm, const std::vector<double>& gv,
              const float* means, const Drop& dropped)
      : X(x), gX(g), mean(means + first, means + first + count), drop(dropped),
        C(first), Ct(s.Ct) {
    for (int c = first; c < first + count; ++c) {
      k0.push_back((float)(gm[c] / s.P));
      k1.push_back((float)(2 * gv[c] / s.P));
    }
  }
  V at(int64_t p, int c, int lanes) const {
    const V x = load(X + p * Ct + C + c, lanes);
    const V g = load(gX + p * Ct + C + c, lanes) + load(&k0[c], lanes) +
                load(&k1[c], lanes) * (x - load(&mean[c], lanes));
    return drop.any() ? g * drop.at(p, c, lanes) : g;
  }
};

// Back through the 3x3 and norm2's ReLU: dz [P, M], the sums over it, dw [9, M, G].
void backward_3x3(const Block& s, int t, const NewGradient& g, const float* h,
                  const Affine& f2, const std::vector<Panels>& w2t, float* dz,
                  Sums& sums, std::vector<float>& scratch) {
  const int line = s.W + 2, n16 = up(s.G, VL), m8 = up(s.M, MW);
  const size_t zsize = (size_t)s.padded_rows() * s.wm;
  const size_t gsize = (size_t)s.padded_rows() * s.wg;
  scratch.assign(zsize + gsize + (size_t)MR * s.wm, 0.0f);
  float *z = scratch.data(), *dg = z + zsize, *c = dg + gsize;
  sums.reset((size_t)9 * m8 * n16, s.M);
  const Product product = rows_of(s.wg), outer = columns_of(s.wm);
  std::vector<float> a1(s.wm), a2(s.wm);
  for (int u = s.unit(t); u < s.unit(t + 1); ++u) {
    load_z(s, u, h, &f2, z);
    load_band(s, u, s.wg, dg, [&](float* out, int64_t p) {
      for (int k = 0; k < s.G; k += VL)
        store(out + k, g.at(p, k, std::min(VL, s.G - k)), std::min(VL, s.wg - k));
    });
    const int n = u / s.bands, r0 = u % s.bands * s.rb;
    const int count = std::min(s.H, r0 + s.rb) - r0;
    const int64_t p0 = ((int64_t)n * s.H + r0) * s.W;
    // dw[tap] += z(pixel + tap)^T dg(pixel), over the band's own rows; dg is zero in
    // the border. Tap (1, 1) is the pixel itself.
    const int first = line, last = (count + 1) * line;
    for (int q = first; q < last; q += KP)
      for (int tap = 0; tap < 9; ++tap) {
        const float* zt = z + (int64_t)(q + (tap / 3 - 1) * line + tap % 3 - 1) * s.wm;
        for (int i = 0; i < s.M; i += MW)
          for (int j = 0; j < n16; j += NR) {
            // The very first pixel of the border has no left neighbor in the band.
            int skip = q == first && tap == 0 ? 1 : 0;
            outer(std::min(NR, n16 - j) / VL, std::min(KP, last - q) - skip,
                  zt + (size_t)skip * s.wm + i, dg + (size_t)(q + skip) * s.wg + j,
                  s.wg, sums.dw.data() + ((size_t)tap * m8 + i) * n16 + j, n16, true);
          }
      }
    // dz(pixel) = sum over taps of dg(pixel + tap) w2[8 - tap]^T
    std::fill(a1.begin(), a1.end(), 0.0f);
    std::fill(a2.begin(), a2.end(), 0.0f);
    for (int q = 0; q < count * line; q += MR) {
      for (int j = 0; j < w2t[0].n; j += NR) {
        const int wide = w2t[0].wide(j);
        for (int tap = 0; tap < 9; ++tap)
          product(wide / VL, s.G, dg + (size_t)(q + tap / 3 * line + tap % 3) * s.wg,
                  w2t[tap].at(j), wide, c + j, s.wm, tap > 0);
      }
      for (int r = 0; r < MR && q + r < count * line; ++r) {
        const int x = (q + r) % line;
        if (x >= s.W) continue;
        const int64_t p = p0 + (q + r) / line * s.W + x;
        const float* zp = z + (size_t)(q + r + line + 1) * s.wm;
        for (int k = 0; k < s.M; k += VL) {
          const int lanes = std::min(VL, s.M - k);
          const V zero = {};
          const V d = load(zp + k) > zero ? load(c + r * s.wm + k) : zero;
          const V e = load(h + p * s.M + k, lanes) - load(&f2.mean[k], lanes);
          store(&a1[k], load(&a1[k]) + d);
          store(&a2[k], load(&a2[k]) + d * e);
          store(dz + p * s.M + k, d, lanes);
        }
      }
    }
    for (int k = 0; k < s.M; ++k) sums.s1[k] += a1[k], sums.s2[k] += a2[k];
  }
}

// Back through norm2, for `n` pixels: the gradient of the 1x1's output to rows of wm.
void gradient_of_hidden(const Block& s, int64_t p, int n, const float* dz,
                        const float* h, const Affine& f2, const std::vector<float>& e0,
                        const std::vector<float>& e1, float* dh) {
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < s.M; k += VL) {
      const int lanes = std::min(VL, s.M - k);
      const int64_t at = (p + i) * s.M + k;
      const V e = load(h + at, lanes) - load(&f2.mean[k], lanes);
      store(dh + (size_t)i * s.wm + k,
            load(&f2.a[k], lanes) * load(dz + at, lanes) - load(&e0[k], lanes) -
                load(&e1[k], lanes) * e,
            std::min(VL, s.wm - k));
    }
}

// Without bottleneck: the new channels' gradient dg [P, G] around each of `n` pixels.
// What is stored beyond a tap's G is overwritten by the next tap or the next row.
void gradient_of_taps(const Block& s, int64_t p, int n, const float* dg, float* dh) {
  int x = (int)(p % s.W), y = (int)(p / s.W % s.H);
  for (int i = 0; i < n; ++i, ++p, dh += s.wm) {
    for (int tap = 0; tap < 9; ++tap) {
      const int dy = 1 - tap / 3, dx = 1 - tap % 3;
      const bool inside = y + dy >= 0 && y + dy < s.H && x + dx >= 0 && x + dx < s.W;
      const float* from = dg + (p + dy * s.W + dx) * s.G;
      for (int g = 0; g < s.G; g += VL)
        store(dh + tap * s.G + g, inside ? load(from + g, std::min(VL, s.G - g)) : V{});
    }
    if (++x == s.W) x = 0, y = y + 1 == s.H ? 0 : y + 1;
  }
}

// Back through the product in front and norm1's ReLU: added to gX, with dw [M, C].
// fill(p, n, dh) writes the gradient of the product of `n` pixels.
template <class F>
void backward_front(const Block& s, int t, const float* X, float* gX, int C,
                    const Affine& f1, const Panels& w1t, Sums& sums,
                    std::vector<float>& scratch, F fill) {
  const int nc = up(C, VL);
  const size_t ysize = tile_size(C);
  scratch.assign(ysize + (size_t)PT * s.wm + (size_t)PT * NR, 0.0f);
  float *y = scratch.data(), *dh = y + ysize, *c = dh + (size_t)PT * s.wm;
  sums.reset((size_t)up(s.M, MW) * nc, C);
  const Product product = rows_of(s.wm), outer = columns_of(s.wm);
  for (int64_t p = s.pixel(t); p < s.pixel(t + 1); p += PT) {
    const int n = (int)std::min<int64_t>(PT, s.pixel(t + 1) - p);
    load_tile(s, X, p, n, C, f1, y);
    fill(p, n, dh);
    // Transposed, so that a panel of y stays in L1 while all of dh passes by.
    for (int j = 0; j < nc; j += NR)
      for (int i = 0; i < s.M; i += MW)
        outer(std::min(NR, nc - j) / VL, n, dh + i,
              y + (size_t)(j / KC) * PT * KC + j % KC, KC,
              sums.dw.data() + (size_t)i * nc + j, nc, true);
    for (int j = 0; j < w1t.n; j += NR) {
      const int wide = w1t.wide(j);
      for (int i = 0; i < n; i += MR)
        product(wide / VL, s.M, dh + (size_t)i * s.wm, w1t.at(j), wide,
                c + (size_t)i * NR, NR, false);
      for (int v = 0; v < wide && j + v < C; v += VL) {
        const int lanes = std::min(VL, C - j - v), k = j + v;
        const V a = load(&f1.a[k], lanes), mean = load(&f1.mean[k], lanes), zero = {};
        V s1 = {}, s2 = {};
        const float* yk = y + (size_t)(k / KC) * PT * KC + k % KC;
        for (int i = 0; i < n; ++i) {
          const V d = load(yk + (size_t)i * KC) > zero ? load(c + i * NR + v) : zero;
          const int64_t at = (p + i) * s.Ct + k;
          s1 += d;
          s2 += d * (load(X + at, lanes) - mean);
          store(gX + at, load(gX + at, lanes) + a * d, lanes);
        }
        for (int i = 0; i < lanes; ++i) sums.s1[k + i] += s1[i], sums.s2[k + i] += s2[i];
      }
    }
  }
}

// Back through one layer without bottleneck; dg is room for [P, G].
void backward_plain(const Block& s, ffi::ThreadPool& pool, const float* X, float* gX,
                    int C, const NewGradient& fresh, const Affine& f1, const Panels& w1t,
                    float* dg, std::vector<Sums>& sums,
                    std::vector<std::vector<float>>& scratch) {
  parallel(pool, s.T, [&](int t) {
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); ++p)
      for (int g = 0; g < s.G; g += VL) {
        const int lanes = std::min(VL, s.G - g);
        store(dg + p * s.G + g, fresh.at(p, g, lanes), lanes);
      }
  });
  parallel(pool, s.T, [&](int t) {
    backward_front(s, t, X, gX, C, f1, w1t, sums[t], scratch[t],
                   [&](int64_t p, int n, float* dh) {
                     gradient_of_taps(s, p, n, dg, dh);
                   });
  });
}

// X, mean, var, h, mean2, var2, mask, images, gX, gmean, gvar, then the layers' weights
// as forward -> gx [N, H, W, C0], room for gX and for one layer's dz [P, M] (without
// bottleneck dg [P, G]), then per layer dscale1, dbias1, dw1, dscale2, dbias2, dw2
ffi::Error Backward(ffi::ThreadPool pool, float epsilon, float rate,
                    ffi::Buffer<ffi::F32> X,
                    ffi::Buffer<ffi::F32> mean, ffi::Buffer<ffi::F32> var,
                    ffi::Buffer<ffi::F32> h, ffi::Buffer<ffi::F32> mean2,
                    ffi::Buffer<ffi::F32> var2, ffi::Buffer<ffi::U8> mask,
                    ffi::Buffer<ffi::F32> images, ffi::Buffer<ffi::F32> gX,
                    ffi::Buffer<ffi::F32> gmean, ffi::Buffer<ffi::F32> gvar,
                    ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> gx,
                    ffi::ResultBuffer<ffi::F32> work, ffi::ResultBuffer<ffi::F32> dz,
                    ffi::RemainingRets rets) {
  const auto d = gx->dimensions();
  const int L = (int)mean2.dimensions()[0], M = (int)mean2.dimensions()[1];
  const int G = (int)(X.dimensions()[3] - d[3]) / L;
  const Block s(d[0], d[1], d[2], d[3], L, G, M, pool.num_threads());
  if (ffi::Error error = check(s); error.failure()) return error;
  const float* x = X.typed_data();
  float* g = work->typed_data();
  parallel(pool, s.T, [&](int t) {
    const int64_t a = s.pixel(t) * s.Ct, b = s.pixel(t + 1) * s.Ct;
    std::memcpy(g + a, gX.typed_data() + a, sizeof(float) * (b - a));
  });
  // Gradients with respect to the shared statistics, added up over the layers.
  std::vector<double> gm(gmean.typed_data(), gmean.typed_data() + s.Ct);
  std::vector<double> gv(gvar.typed_data(), gvar.typed_data() + s.Ct);
  std::vector<std::vector<float>> scratch(s.T);
  std::vector<Sums> sums(s.T);
  const float *m = mean.typed_data(), *v = var.typed_data();
  const int stride = s.plain ? 3 : 6;
  const std::vector<Weights> weights = weights_of(s, args, stride);
  for (int l = L - 1; l >= 0; --l) {
    const Weights& w = weights[l];
    const int C = s.C(l), nc = up(C, VL);
    auto out = [&](int i) {
      return (*rets.get<ffi::Buffer<ffi::F32>>(l * stride + i))->typed_data();
    };
    Affine f1;
    f1.from(w.scale1, w.bias1, m, v, C, epsilon);
    const NewGradient fresh(s, x, g, C, G, gm, gv, m, drop_of(s, l, rate, mask, images));
    Panels w1t;
    w1t.pack(Front(s, C, w.w1).w, s.M, C, s.M, true);
    if (s.plain) {
      backward_plain(s, pool, x, g, C, fresh, f1, w1t, dz->typed_data(), sums, scratch);
    } else {
      const float* hl = h.typed_data() + (int64_t)l * s.P * M;
      Affine f2;
      f2.from(w.scale2, w.bias2, mean2.typed_data() + l * M, var2.typed_data() + l * M,
              M, epsilon);
      const std::vector<Panels> w2t = pack_3x3(s, w.w2, true);
      parallel(pool, s.T, [&](int t) {
        backward_3x3(s, t, fresh, hl, f2, w2t, dz->typed_data(), sums[t], scratch[t]);
      });
      add_sums(sums);
      const int n16 = up(G, VL), m8 = up(M, MW);
      for (int tap = 0; tap < 9; ++tap)
        for (int i = 0; i < M; ++i)
          std::memcpy(out(5) + ((size_t)tap * M + i) * G,
                      sums[0].dw.data() + ((size_t)tap * m8 + i) * n16, 4 * G);
      std::vector<float> e0(M), e1(M);
      for (int k = 0; k < M; ++k) {
        const double s1 = sums[0].s1[k], s2 = sums[0].s2[k], r = f2.rstd[k];
        out(3)[k] = (float)(s2 * r);
        out(4)[k] = (float)s1;
        e0[k] = (float)(f2.a[k] * s1 / s.P);
        e1[k] = (float)(f2.a[k] * r * r * s2 / s.P);
      }
      parallel(pool, s.T, [&](int t) {
        backward_front(s, t, x, g, C, f1, w1t, sums[t], scratch[t],
                       [&](int64_t p, int n, float* dh) {
                         gradient_of_hidden(s, p, n, dz->typed_data(), hl, f2, e0, e1, dh);
                       });
      });
    }
    add_sums(sums);
    float* dw1 = out(2);  // [C, M], or [9, C, G]
    const int taps = s.plain ? 9 : 1, each = s.M / taps;
    parallel(pool, s.T, [&](int t) {
      for (int tap = 0; tap < taps; ++tap)
        for (int i = C * t / s.T; i < C * (t + 1) / s.T; ++i)
          for (int k = 0; k < each; ++k)
            dw1[((size_t)tap * C + i) * each + k] =
                sums[0].dw[(size_t)(tap * each + k) * nc + i];
    });
    for (int c = 0; c < C; ++c) {
      const double s1 = sums[0].s1[c], s2 = sums[0].s2[c], r = f1.rstd[c];
      out(0)[c] = (float)(s2 * r);
      out(1)[c] = (float)s1;
      gm[c] -= f1.a[c] * s1;
      gv[c] -= 0.5 * w.scale1[c] * r * r * r * s2;
    }
  }
  const NewGradient input(s, x, g, 0, s.C0, gm, gv, m, {});
  parallel(pool, s.T, [&](int t) {
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); ++p)
      for (int c = 0; c < s.C0; c += VL) {
        const int lanes = std::min(VL, s.C0 - c);
        store(gx->typed_data() + p * s.C0 + c, input.at(p, c, lanes), lanes);
      }
  });
  return ffi::Error::Success();
}

// The stem behind its convolution: batch norm, ReLU and 3x3 max pooling of stride 2.
struct Stem {
  int N, H, W, C, H2, W2, low_h, low_w, T;
  int64_t pixels;
  Stem(int n, int h, int w, int c, int h2, int w2, int lh, int lw, int threads)
      : N(n), H(h), W(w), C(c), H2(h2), W2(w2), low_h(lh), low_w(lw) {
    pixels = (int64_t)N * H * W;
    T = std::max(1, std::min(threads, N * H2));
  }
  int out_row(int t) const { return (int)((int64_t)N * H2 * t / T); }
  int in_row(int t) const { return (int)((int64_t)N * H * t / T); }
};

// which: place of the largest value in its window, 0 to 8; 9 where all are 0 behind
// the ReLU, so that no gradient goes back.
void pool(const Stem& s, int t, const float* x, const Affine& f, float* y,
          uint8_t* which) {
  for (int row = s.out_row(t); row < s.out_row(t + 1); ++row) {
    const int n = row / s.H2, i = row % s.H2;
    for (int j = 0; j < s.W2; ++j) {
      const int64_t out = ((int64_t)row * s.W2 + j) * s.C;
      for (int c = 0; c < s.C; c += VL) {
        const int lanes = std::min(VL, s.C - c);
        V best = {};
        VI place = VI{} + 9;
        for (int k = 0; k < 9; ++k) {
          const int r = 2 * i - s.low_h + k / 3, q = 2 * j - s.low_w + k % 3;
          if (r < 0 || r >= s.H || q < 0 || q >= s.W) continue;
          const int64_t in = (((int64_t)n * s.H + r) * s.W + q) * s.C + c;
          const V v = normalized(load(x + in, lanes), f, c, lanes);
          const VI larger = v > best;
          best = larger ? v : best;
          place = larger ? VI{} + k : place;
        }
        store(y + out + c, best, lanes);
        if (which) store_index(which + out + c, place, lanes);
      }
    }
  }
}

ffi::Error StemTrain(ffi::ThreadPool pool_, float epsilon, int64_t low_h, int64_t low_w,
                     ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                     ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> y,
                     ffi::ResultBuffer<ffi::U8> which, ffi::ResultBuffer<ffi::F32> mean,
                     ffi::ResultBuffer<ffi::F32> var) {
  const auto d = x.dimensions(), e = y->dimensions();
  const Stem s(d[0], d[1], d[2], d[3], e[1], e[2], low_h, low_w, pool_.num_threads());
  std::vector<Moments> parts(s.T, Moments(s.C));
  parallel(pool_, s.T, [&](int t) {
    for (int row = s.in_row(t); row < s.in_row(t + 1); ++row)
      parts[t].add(x.typed_data() + (int64_t)row * s.W * s.C, s.W, s.C);
  });
  finish_moments(parts, s.C, mean->typed_data(), var->typed_data());
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean->typed_data(), var->typed_data(),
         s.C, epsilon);
  parallel(pool_, s.T, [&](int t) {
    pool(s, t, x.typed_data(), f, y->typed_data(), which->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error StemEval(ffi::ThreadPool pool_, float epsilon, int64_t low_h, int64_t low_w,
                    ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                    ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> mean,
                    ffi::Buffer<ffi::F32> var, ffi::ResultBuffer<ffi::F32> y) {
  const auto d = x.dimensions(), e = y->dimensions();
  const Stem s(d[0], d[1], d[2], d[3], e[1], e[2], low_h, low_w, pool_.num_threads());
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean.typed_data(), var.typed_data(), s.C,
         epsilon);
  parallel(pool_, s.T, [&](int t) {
    pool(s, t, x.typed_data(), f, y->typed_data(), nullptr);
  });
  return ffi::Error::Success();
}

// The whole stem in evaluation: 7x7 convolution of stride 2, 3x3 max pooling of stride
// 2, bias, ReLU. Rows of the convolution live in a ring of three.
constexpr int K7 = 7;

struct StemEvalShape {
  int N, H, W, Hc, Wc, F, H2, W2;         // image, convolution, result
  int low_h, low_w, pool_low_h, pool_low_w;  // paddings
};

template <int C, int NV>
inline void stem_tile(const float* a, int line, const float* b, float* out, int ldo) {
  V sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[i][v] = V{};
  for (int r = 0; r < K7; ++r)
    accumulate<MR, NV, 2 * C, 1>(sum, K7 * C, a + (size_t)r * line,
                                 b + (size_t)r * K7 * C * NV * VL, NV * VL);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(out + (size_t)i * ldo + v * VL, sum[i][v]);
}

// Rows i0 to i1 of one image's result.
template <int C>
void stem_rows(const StemEvalShape& s, const float* x, int i0, int i1, const Panels& w,
               const float* bias, float* y, std::vector<float>& scratch) {
  const int wide = up(s.Wc, MR), Fp = w.n;
  const int line = (2 * (wide - 1) + K7) * C;  // floats of a padded row of the image
  const int r0 = std::max(0, 2 * i0 - s.pool_low_h);
  const int r1 = std::min(s.Hc, 2 * (i1 - 1) - s.pool_low_h + 3);
  const int in_rows = 2 * (r1 - r0 - 1) + K7;
  float* band = room(scratch, (size_t)in_rows * line + (size_t)3 * wide * Fp);
  float* ring = band + (size_t)in_rows * line;
  for (int r = 0; r < in_rows; ++r) {
    const int h = 2 * r0 - s.low_h + r;
    float* to = band + (size_t)r * line;
    std::memset(to, 0, sizeof(float) * line);
    if (h < 0 || h >= s.H) continue;
    const int count = std::min(s.W, line / C - s.low_w);
    std::memcpy(to + s.low_w * C, x + (size_t)h * s.W * C, sizeof(float) * count * C);
  }
  int done = r0;
  for (int i = i0; i < i1; ++i) {
    const int top = 2 * i - s.pool_low_h;
    for (; done < std::min(s.Hc, top + 3); ++done) {
      const float* a = band + (size_t)2 * (done - r0) * line;
      float* to = ring + (size_t)(done % 3) * wide * Fp;
      for (int j = 0; j < Fp; j += NR)
        for (int q = 0; q < wide; q += MR) {
          float* out = to + (size_t)q * Fp + j;
          if (w.wide(j) == NR) {
            stem_tile<C, 2>(a + 2 * q * C, line, w.at(j), out, Fp);
          } else {
            stem_tile<C, 1>(a + 2 * q * C, line, w.at(j), out, Fp);
          }
        }
    }
    for (int q = 0; q < s.W2; ++q) {
      const int left = 2 * q - s.pool_low_w;
      for (int c = 0; c < s.F; c += VL) {
        const int lanes = std::min(VL, s.F - c);
        V best = V{} - INFINITY;
        for (int r = std::max(0, top); r < std::min(s.Hc, top + 3); ++r)
          for (int k = std::max(0, left); k < std::min(s.Wc, left + 3); ++k) {
            const V v = load(ring + ((size_t)(r % 3) * wide + k) * Fp + c);
            best = v > best ? v : best;
          }
        store(y + ((size_t)i * s.W2 + q) * s.F + c, relu(best + load(bias + c, lanes)),
              lanes);
      }
    }
  }
}

// x [N, H, W, C] of 1 or 3 channels, `packed`: kernel [49 * C, F] and bias -> y
ffi::Error StemPacked(ffi::ThreadPool pool_, int64_t height, int64_t width, int64_t low_h,
                      int64_t low_w, int64_t pool_low_h, int64_t pool_low_w,
                      ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> packed,
                      ffi::ResultBuffer<ffi::F32> y) {
  const auto d = x.dimensions(), e = y->dimensions();
  const StemEvalShape s{(int)d[0], (int)d[1], (int)d[2], (int)height, (int)width,
                        (int)e[3], (int)e[1], (int)e[2], (int)low_h, (int)low_w,
                        (int)pool_low_h, (int)pool_low_w};
  const int C = (int)d[3], threads = pool_.num_threads();
  Panels w;
  std::vector<float> bias;
  Packed from{packed.typed_data()};
  from.panels(K7 * K7 * C, s.F, w);
  from.vector(s.F, bias);
  if (!from.ends(packed) || (C != 1 && C != 3))
    return ffi::Error::InvalidArgument("stem: packed by other rules");
  const int parts = std::min(s.H2, s.N < threads ? (threads + s.N - 1) / s.N : 1);
  parallel(pool_, s.N * parts, [&](int u) {
    thread_local std::vector<float> scratch;
    const int n = u / parts, t = u % parts;
    const int i0 = s.H2 * t / parts, i1 = s.H2 * (t + 1) / parts;
    const float* in = x.typed_data() + (size_t)n * s.H * s.W * C;
    float* out = y->typed_data() + (size_t)n * s.H2 * s.W2 * s.F;
    if (C == 3) {
      stem_rows<3>(s, in, i0, i1, w, bias.data(), out, scratch);
    } else {
      stem_rows<1>(s, in, i0, i1, w, bias.data(), out, scratch);
    }
  });
  return ffi::Error::Success();
}

// x, scale, bias, mean, var, which, gy -> gx, dscale, dbias
ffi::Error StemBackward(ffi::ThreadPool pool_, float epsilon, int64_t low_h,
                        int64_t low_w, ffi::Buffer<ffi::F32> x,
                        ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> bias,
                        ffi::Buffer<ffi::F32> mean, ffi::Buffer<ffi::F32> var,
                        ffi::Buffer<ffi::U8> which, ffi::Buffer<ffi::F32> gy,
                        ffi::ResultBuffer<ffi::F32> gx,
                        ffi::ResultBuffer<ffi::F32> dscale,
                        ffi::ResultBuffer<ffi::F32> dbias) {
  const auto d = x.dimensions(), e = gy.dimensions();
  const Stem s(d[0], d[1], d[2], d[3], e[1], e[2], low_h, low_w, pool_.num_threads());
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean.typed_data(), var.typed_data(), s.C,
         epsilon);
  std::vector<Sums> sums(s.T);
  parallel(pool_, s.T, [&](int t) {
    sums[t].reset(0, s.C);
    std::vector<float> a1(up(s.C, VL)), a2(up(s.C, VL));
    for (int row = s.in_row(t); row < s.in_row(t + 1); ++row) {
      const int n = row / s.H, r = row % s.H + s.low_h;
      std::fill(a1.begin(), a1.end(), 0.0f);
      std::fill(a2.begin(), a2.end(), 0.0f);
      for (int w = 0; w < s.W; ++w) {
        const int q = w + s.low_w;
        const int64_t in = ((int64_t)row * s.W + w) * s.C;
        for (int c = 0; c < s.C; c += VL) {
          const int lanes = std::min(VL, s.C - c);
          V g = {};
          // The windows that hold this pixel: two where it lies between, else one.
          for (int i = std::max(0, (r - 1) / 2); i <= std::min(s.H2 - 1, r / 2); ++i)
            for (int j = std::max(0, (q - 1) / 2); j <= std::min(s.W2 - 1, q / 2); ++j) {
              const int64_t out = (((int64_t)n * s.H2 + i) * s.W2 + j) * s.C + c;
              const int place = (r - 2 * i) * 3 + q - 2 * j;
              const V zero = {};
              const VI mine = load_index(which.typed_data() + out, lanes) == place;
              g += mine ? load(gy.typed_data() + out, lanes) : zero;
            }
          const V e =
              load(x.typed_data() + in + c, lanes) - load(&f.mean[c], lanes);
          store(&a1[c], load(&a1[c]) + g);
          store(&a2[c], load(&a2[c]) + g * e);
          store(gx->typed_data() + in + c, g, lanes);
        }
      }
      for (int c = 0; c < s.C; ++c) sums[t].s1[c] += a1[c], sums[t].s2[c] += a2[c];
    }
  });
  add_sums(sums);
  std::vector<float> e0(s.C), e1(s.C);
  for (int c = 0; c < s.C; ++c) {
    const double s1 = sums[0].s1[c], s2 = sums[0].s2[c], rstd = f.rstd[c];
    dscale->typed_data()[c] = (float)(s2 * rstd);
    dbias->typed_data()[c] = (float)s1;
    e0[c] = (float)(f.a[c] * s1 / s.pixels);
    e1[c] = (float)(f.a[c] * rstd * rstd * s2 / s.pixels);
  }
  parallel(pool_, s.T, [&](int t) {
    const int64_t first = (int64_t)s.in_row(t) * s.W, last = (int64_t)s.in_row(t + 1) * s.W;
    for (int64_t p = first; p < last; ++p)
      for (int c = 0; c < s.C; c += VL) {
        const int lanes = std::min(VL, s.C - c);
        const int64_t at = p * s.C + c;
        const V e = load(x.typed_data() + at, lanes) - load(&f.mean[c], lanes);
        store(gx->typed_data() + at,
              load(&f.a[c], lanes) * load(gx->typed_data() + at, lanes) -
                  load(&e0[c], lanes) - load(&e1[c], lanes) * e,
              lanes);
      }
  });
  return ffi::Error::Success();
}

// Threefry-2x32 of 20 rounds (Salmon et al., 2011), of VL counters: both words, xored.
typedef uint32_t VU32 __attribute__((vector_size(VL * 4)));
inline VU32 random_bits(uint32_t k0, uint32_t k1, VU32 x0, VU32 x1) {
  const uint32_t keys[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  constexpr int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  x0 += keys[0], x1 += keys[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int r : turns[i % 2]) {
      x0 += x1;
      x1 = (x1 << r | x1 >> (32 - r)) ^ x0;
    }
    x0 += keys[(i + 1) % 3];
    x1 += keys[(i + 2) % 3] + i + 1;
  }
  return x0 ^ x1;
}

// keys [L, 2] -> mask [L, ...]: where jax.random.uniform of a key is at least `rate`.
ffi::Error DropoutMask(ffi::ThreadPool pool, float rate, ffi::Buffer<ffi::U32> keys,
                       ffi::ResultBuffer<ffi::U8> mask) {
  const int64_t L = keys.dimensions()[0], each = (int64_t)mask->element_count() / L;
  constexpr int64_t kPart = 1 << 14;
  const int64_t parts = (each + kPart - 1) / kPart;
  parallel(pool, (int)(L * parts), [&](int i) {
    const uint32_t* key = keys.typed_data() + i / parts * 2;
    uint8_t* to = mask->typed_data() + i / parts * each;
    const int64_t first = i % parts * kPart, last = std::min(each, first + kPart);
    VU32 lane;
    for (int v = 0; v < VL; ++v) lane[v] = v;
    for (int64_t at = first; at < last; at += VL) {
      const VU32 low = (uint32_t)at + lane;
      const VU32 bits =
          random_bits(key[0], key[1], VU32{} + (uint32_t)(at >> 32), low);
      const VU32 unit = bits >> 9 | 0x3f800000u;
      V value;
      std::memcpy(&value, &unit, sizeof value);
      store_index(to + at, (value - 1.0f >= V{} + rate) & 1,
                  (int)std::min<int64_t>(VL, last - at));
    }
  });
  return ffi::Error::Success();
}

using F = ffi::Buffer<ffi::F32>;

}  // namespace


// Compiled in two parts at the same time, each with what its handlers need.
#if FLAX_DENSENET_PART == 0

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseBlockForwardTrain, ForwardTrain,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<float>("rate")
                                  .Arg<F>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<F>()
                                  .RemainingArgs()
                                  .Ret<F>()
                                  .Ret<F>()
                                  .Ret<F>()
                                  .Ret<F>()
                                  .Ret<F>()
                                  .Ret<F>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseBlockForwardEval, ForwardEval,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Arg<F>()
                                  .RemainingArgs()
                                  .Ret<F>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseBlockForwardPacked, ForwardPacked,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("layers")
                                  .Attr<int64_t>("bottleneck")
                                  .Attr<int64_t>("growth")
                                  .Attr<int64_t>("features")
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Ret<F>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(StemForwardPacked, StemPacked,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("height")
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("low_h")
                                  .Attr<int64_t>("low_w")
                                  .Attr<int64_t>("pool_low_h")
                                  .Attr<int64_t>("pool_low_w")
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Ret<F>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(DropoutKeep, DropoutMask,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("rate")
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

// Columns of a panel and floats of a vector register, by which native_eval.py packs.
extern "C" const int flax_densenet_panel[2] = {NR, VL};

XLA_FFI_DEFINE_HANDLER_SYMBOL(StemForwardTrain, StemTrain,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("low_h")
                                  .Attr<int64_t>("low_w")
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Ret<F>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<F>()
                                  .Ret<F>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(StemForwardEval, StemEval,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("low_h")
                                  .Attr<int64_t>("low_w")
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Ret<F>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(StemBackwardTrain, StemBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("low_h")
                                  .Attr<int64_t>("low_w")
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<F>()
                                  .Ret<F>()
                                  .Ret<F>()
                                  .Ret<F>());

#else

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseBlockBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<float>("rate")
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .Arg<F>()
                                  .RemainingArgs()
                                  .Ret<F>()
                                  .Ret<F>()
                                  .Ret<F>()
                                  .RemainingRets());

#endif
