// What the kernels for training in bfloat16 share: weights in tiles, norms, batch
// statistics, and the operands of products over pixels.

#ifndef FLAX_DENSENET_CPU_BF16_TRAINING_H_
#define FLAX_DENSENET_CPU_BF16_TRAINING_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_bf16.h"

namespace {

constexpr int PT = 2 * ROWS;  // pixels of a product
constexpr int CHUNK = DEPTH;  // channels of a chunk

inline bf16 narrow_one(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// The tiles of one or more matrices one above the other; see `Weights`.
struct Tiled {
  Aligned<bf16> data;
  int steps = 0, tiles = 0;
  void reset(int all_steps, int columns) {
    steps = all_steps, tiles = (columns + COLUMNS - 1) / COLUMNS;
    data.assign((size_t)steps * tiles * TILE, 0);
  }
  // w [rows, columns], or its transpose, from `step` on.
  void set(int step, const float* w, int rows, int columns, int ld, bool transposed) {
    for (int k = 0; k < rows; ++k)
      for (int n = 0; n < columns; ++n) {
        const int panel = n / (2 * COLUMNS), nt = std::min(2, tiles - 2 * panel);
        const size_t at = (size_t)panel * 2 * steps * TILE +
                          (size_t)(step + k / DEPTH) * nt * TILE +
                          n / COLUMNS % 2 * TILE + k % DEPTH / 2 * 2 * COLUMNS +
                          n % COLUMNS * 2 + k % 2;
        data[at] = narrow_one(transposed ? w[(size_t)n * ld + k] : w[(size_t)k * ld + n]);
      }
  }
  Weights view() const { return {data.data(), steps, tiles}; }
};

// x * a + b, filled up with zeros to whole chunks.
struct Affine {
  std::vector<float> a, b, mean, rstd;
  void from(const float* scale, const float* bias, const float* m, const float* v, int n,
            float epsilon) {
    const int wide = up(n, CHUNK);
    a.assign(wide, 0), b.assign(wide, 0), mean.assign(wide, 0), rstd.assign(wide, 0);
    for (int c = 0; c < n; ++c) {
      rstd[c] = 1.0f / std::sqrt(v[c] + epsilon);
      a[c] = scale[c] * rstd[c];
      b[c] = (float)(bias[c] - (double)m[c] * a[c]);
      mean[c] = m[c];
    }
  }
};

// Sums of x - shift and of its square, where shift is the mean of the first pixels. This
// is accurate even if the mean is much larger than the standard deviation.
struct Moments {
  double count = 0;
  std::vector<float> shift;
  std::vector<double> s1, s2;
  bool fresh = true;
  explicit Moments(int n = 0) : shift(up(n, CHUNK)), s1(up(n, CHUNK)), s2(up(n, CHUNK)) {}

  // `n` pixels of one chunk that are `ld` values apart; `count` is the caller's.
  FD_INLINE void add(const bf16* x, int n, int64_t ld, int c) {
    if (fresh) {
      F low = {}, high = {};
      for (int i = 0; i < n; ++i) low += widen(x + i * ld), high += widen(x + i * ld + 16);
      store(&shift[c], low * (1.0f / n)), store(&shift[c] + 16, high * (1.0f / n));
    }
    const F m0 = load(&shift[c]), m1 = load(&shift[c] + 16);
    F p0 = {}, p1 = {}, q0 = {}, q1 = {};
    for (int i = 0; i < n; ++i) {
      const F d0 = widen(x + i * ld) - m0, d1 = widen(x + i * ld + 16) - m1;
      p0 += d0, p1 += d1, q0 += d0 * d0, q1 += d1 * d1;
    }
    for (int v = 0; v < 16; ++v) {
      s1[c + v] += p0[v], s1[c + 16 + v] += p1[v];
      s2[c + v] += q0[v], s2[c + 16 + v] += q1[v];
    }
  }
};

inline void finish_moments(const std::vector<Moments>& parts, int n, float* mean, float* var) {
  for (int c = 0; c < n; ++c) {
    Spread all;
    double count = 0;
    for (const Moments& p : parts) {
      if (p.count == 0) continue;
      const double rest = p.s1[c] / p.count;
      all.merge(count, p.count, p.shift[c] + rest, p.s2[c] - p.s1[c] * rest);
      count += p.count;
    }
    mean[c] = (float)all.mean;
    var[c] = (float)std::max(0.0, all.m2 / count);
  }
}

// A chunk of the features of a pixel; zero beyond the last channel.
FD_INLINE void load_part(const bf16* x, int n, bf16* to) {
  if (n >= CHUNK) {
    std::memcpy(to, x, sizeof(bf16) * CHUNK);
  } else {
    std::memset(to, 0, sizeof(bf16) * CHUNK);
    std::memcpy(to, x, sizeof(bf16) * n);
  }
}

// ---- products over pixels, for the gradients of weights

FD_INLINE U shuffle(U a, U b, U from) {
#if defined(__clang__)
  U out;
  for (int j = 0; j < 16; ++j) out[j] = from[j] < 16 ? a[from[j]] : b[from[j] - 16];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// v[i][j] of 16 rows becomes v[j][i].
FD_INLINE void transpose(U (&v)[16]) {
#pragma GCC unroll 4
  for (int s = 8; s > 0; s /= 2) {
    U first, second;
    for (int j = 0; j < 16; ++j) {
      first[j] = j & s ? 16 + j - s : j;
      second[j] = j & s ? 16 + j : j + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      const U a = v[i], b = v[i + s];
      v[i] = shuffle(a, b, first);
      v[i + s] = shuffle(a, b, second);
    }
  }
}

// 32 rows of 32 values in pairs of rows: pairs[half][r][c] = (x[2r][c], x[2r + 1][c]).
FD_INLINE U pair(const bf16* x, int r, int half) {
  const H low = *reinterpret_cast<const HU*>(x + 2 * r * CHUNK + 16 * half);
  const H high = *reinterpret_cast<const HU*>(x + (2 * r + 1) * CHUNK + 16 * half);
  return __builtin_convertvector(low, U) | __builtin_convertvector(high, U) << 16;
}

// The transpose of 32 x 32 values; rows of `to` are `ld` values apart.
inline void transpose_patch(const bf16* x, bf16* to, int64_t ld) {
  for (int half = 0; half < 2; ++half) {
    U v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) v[r] = pair(x, r, half);
    transpose(v);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) std::memcpy(to + (16 * half + c) * ld, &v[c], 64);
  }
}

// The second operand of a product over 32 pixels, two tiles.
inline void interleave_patch(const bf16* x, bf16* to) {
  for (int half = 0; half < 2; ++half)
    for (int r = 0; r < 16; ++r) {
      const U v = pair(x, r, half);
      std::memcpy(to + half * TILE + r * 2 * COLUMNS, &v, 64);
    }
}

// Adds 32 x 32 sums to a matrix whose rows are `ld` apart.
FD_INLINE void add_sums(const float* sums, float* to, int64_t ld) {
  for (int r = 0; r < PT; ++r, to += ld, sums += PT) {
    store(to, load(to) + load(sums));
    store(to + 16, load(to + 16) + load(sums + 16));
  }
}

FD_INLINE void add_to(double* s, F v) {
  for (int i = 0; i < 16; ++i) s[i] += v[i];
}

}  // namespace

#endif  // FLAX_DENSENET_CPU_BF16_TRAINING_H_
