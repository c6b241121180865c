// An entire dense block in float32, forward or backward in one call on the CPU.
//
// dense_block.py explains the mathematics; these files compute it while the numbers are in
// the cache of a core. Batch norm and ReLU of a layer are applied to a tile of pixels when
// it is loaded, the 1x1 convolution multiplies that tile, the statistics of the output are
// computed before it leaves the cache, and the 3x3 convolution is nine shifted products
// over an image band padded with zeros. In the backward pass, each tile of the
// concatenated features is read once per layer, and its gradient is added in place. In
// evaluation, a thread takes a few images through all layers of a block (for inference,
// also through the transition), so that their features stay in its cache.
//
// A layer without bottleneck is also a single product, with the columns of all nine taps:
// the C features of a pixel times [C, 9 * G]. The results are summed over neighboring
// pixels.
//
// All products go through `micro`, a register tile of MR x (NV * VL) sums. Work is divided
// into one contiguous part per thread, and the parts are added in order, so results on one
// machine are bit-identical in every run.

#ifndef FLAX_DENSENET_CPU_FLOAT32_H_
#define FLAX_DENSENET_CPU_FLOAT32_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu_layers.h"
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

// The statistics of some channels.
struct Moments {
  double count = 0;
  std::vector<Spread> of;
  explicit Moments(int n = 0) : of(n) {}

  // Adds `n` rows of data that are `ld` apart.
  void add(const float* data, int n, int ld) {
    const int C = of.size();
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
        of[c + v].merge(count, n, middle[v] + rest,
                        (double)second[v] - first[v] * rest);
      }
    }
    count += n;
  }
  void add(const Moments& other) {
    if (other.count == 0) return;
    for (size_t c = 0; c < of.size(); ++c)
      of[c].merge(count, other.count, other.of[c].mean, other.of[c].m2);
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
    // Even with only a few images, every thread gets a part.
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
// the last one with VL columns if that is enough.
struct Panels {
  int K = 0, n = 0;
  Aligned<float> own;
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

// relu((x - mean) * a + b). The mean is subtracted first, which preserves the precision of
// a channel with a large mean.
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

// relu(norm2(h)) of a band; if `f` is null, h already has this value.
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

// What dropout leaves of the value `v` of some channels.
inline V dropped(V v, const Drop& drop, int64_t p, int c, int lanes) {
  if (!drop.any()) return v;
  v *= drop.of_image(p);
  if (!drop.mask) return v;
  const VI kept = load_index(drop.mask + p * drop.G + c, lanes);
  return v * __builtin_convertvector(kept, V);
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

void finish_moments(std::vector<Moments>& parts, int n, float* mean, float* var) {
  Moments all(n);
  for (const Moments& part : parts) all.add(part);
  for (int c = 0; c < n; ++c) {
    mean[c] = (float)all.of[c].mean;
    var[c] = (float)(all.of[c].m2 / all.count);
  }
}

std::vector<Panels> pack_3x3(const Block& s, const float* w2, bool transpose) {
  std::vector<Panels> panels(9);
  for (int tap = 0; tap < 9; ++tap) {
    // The gradient with respect to the input uses the taps in reverse order.
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

// Reads what packed_inference.py packed: each part is padded to entire cache lines.
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
  bool ends(FL& all) const {
    return next == all.typed_data() + all.element_count();
  }
};

// The part of a layer's sums that one thread computes.
struct Sums {
  Aligned<float> dw;       // of the weights
  std::vector<double> s1, s2;  // of the gradient, and of it times (input - mean)
  void reset(size_t weights, int channels) {
    dw.assign(weights, 0.0f);
    s1.assign(channels, 0.0);
    s2.assign(channels, 0.0);
  }
};

}  // namespace

#endif  // FLAX_DENSENET_CPU_FLOAT32_H_
