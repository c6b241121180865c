// The layers of RDNet: what float32 and bfloat16 share.
//
// A layer is depthwise 7x7, layer norm, 1x1, GELU, 1x1; a transition is layer norm and a
// convolution of patches that do not overlap. Both are computed for a few rows of images
// at a time, so that the wide values inside a layer stay in the cache. The backward pass
// does the same, and then goes back through the depthwise convolution, which needs the
// gradients of neighboring rows.
//
// Channels are in chunks of 32. Values inside a unit of rows are stored as
// [chunks][pixels][32], padded with zeros. `E` is the arithmetic of one precision:
//
//   T                     the type of features and of the operands of products
//   load, store           32 values of type T as a `Pair`
//   KEEPS_HIDDEN          whether the forward pass saves the input of the GELU
//   gelu, gelu_slope
//   product               rows of [chunks][pixels][32] times packed weights
//   Outer                 sums of products over pixels, for the gradients of weights
//   pack                  packs a chunk of weights
//
// Work is divided into one contiguous part per thread, and the parts are added in order,
// so results on one machine are bit-identical in every run.

#ifndef FLAX_DENSENET_CPU_RDNET_H_
#define FLAX_DENSENET_CPU_RDNET_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_layers.h"
#include "cpu_parallel.h"
#include "cpu_vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

template <class E>
FD_INLINE Pair load_some(const typename E::T* p, int n) {
  if (n >= WIDE) return E::load(p);
  alignas(64) typename E::T part[WIDE] = {};
  std::memcpy(part, p, sizeof(part[0]) * n);
  return E::load(part);
}
template <class E>
FD_INLINE void store_some(typename E::T* p, Pair v, int n) {
  if (n >= WIDE) return E::store(p, v);
  alignas(64) typename E::T part[WIDE];
  E::store(part, v);
  std::memcpy(p, part, sizeof(part[0]) * n);
}

// Some vectors of parameters, padded with zeros to entire chunks.
struct Vector {
  std::vector<float> data;
  Vector(const float* from, int n) : data(padded(n)) {
    std::memcpy(data.data(), from, sizeof(float) * n);
  }
  FD_INLINE Pair operator[](int chunk) const { return load_pair(&data[chunk * WIDE]); }
};

// 1 for channels, 0 for padding.
inline std::vector<float> mask_of(int n) {
  std::vector<float> mask(padded(n));
  std::fill_n(mask.begin(), n, 1.0f);
  return mask;
}

// The images of a call, and the part of each thread.
struct Rows {
  int N, H, W, T;
  Rows(int64_t n, int64_t h, int64_t w, int threads)
      : N((int)n), H((int)h), W((int)w), T(std::max(1, std::min(threads, N * H))) {}
  int rows() const { return N * H; }
  int of(int part) const { return (int)((int64_t)rows() * part / T); }
  int64_t pixels() const { return (int64_t)rows() * W; }
  // Rows of a unit with about so many pixels.
  int step(int64_t pixels) const { return (int)std::max<int64_t>(1, pixels / W); }
};

// Calls f(first, last) for the units of a thread, of about `pixels` pixels each.
template <class F>
void for_units(const Rows& s, int part, int64_t pixels, F f) {
  const int first = s.of(part), count = s.of(part + 1) - first;
  if (count == 0) return;
  const int units = (count + s.step(pixels) - 1) / s.step(pixels);
  for (int u = 0; u < units; ++u)
    f(first + (int)((int64_t)count * u / units),
      first + (int)((int64_t)count * (u + 1) / units));
}

// Rows of scratch for this many pixels: products read beyond the last one.
inline int room_for(int pixels) { return (pixels + WIDE - 1) / WIDE * WIDE + WIDE; }

template <class E>
struct Scratch {
  typedef typename E::T T;
  std::vector<float> d, band, dband, taps;
  std::vector<T> n, g, slope, dh, dy;
  typename E::Products products;
  typename E::Outer outer;
  alignas(64) float sums[WIDE * WIDE];
};

// The sums over a thread's pixels that become gradients of parameters.
struct Gradients {
  std::vector<float> w1, w2, b1, b2, scale, bias, k7, b7;
  static void add(std::vector<Gradients>& parts, std::vector<float> Gradients::*which, int share,
                  int shares) {
    std::vector<float>& to = parts[0].*which;
    const size_t first = to.size() * share / shares, last = to.size() * (share + 1) / shares;
    for (size_t t = 1; t < parts.size(); ++t) {
      const std::vector<float>& from = parts[t].*which;
      for (size_t i = first; i < last; ++i) to[i] += from[i];
    }
  }
};

FD_INLINE void add_pair(std::vector<float>& to, int chunk, Pair v) {
  float* p = &to[chunk * WIDE];
  store_pair(p, load_pair(p) + v);
}

// Puts the gradient of the outputs `[pixels, F]` into chunks of channels, `next` apart,
// and adds its sum to the gradient of the bias.
template <class E>
FD_INLINE void take_gradient(const typename E::T* dy, int pixels, int F,
                             typename E::T* chunks, size_t next,
                             std::vector<float>& bias) {
  for (int k = 0; k < padded(F) / WIDE; ++k) {
    Pair sum = {};
    for (int p = 0; p < pixels; ++p) {
      const Pair v = load_some<E>(dy + (size_t)p * F + k * WIDE, F - k * WIDE);
      E::store(chunks + k * next + p * WIDE, v);
      sum = sum + v;
    }
    add_pair(bias, k, sum);
  }
}

// Layer norm of the pixels d [chunks][ld][32]: put(pixel, chunk, normalized), and
// rstd(pixel, 1 / standard deviation).
template <class Put, class Rstd>
FD_INLINE void layer_norm(const float* d, int ld, int pixels, int C,
                          const std::vector<float>& mask, float epsilon, Put put,
                          Rstd rstd) {
  const int chunks = padded(C) / WIDE;
  const float share = 1.0f / C;
  const size_t next = (size_t)ld * WIDE;
  for (int p = 0; p < pixels; ++p) {
    const float* x = d + (size_t)p * WIDE;
    Pair sum = {};
    for (int k = 0; k < chunks; ++k) sum = sum + load_pair(x + k * next);
    const float mean = total(sum) * share;
    Pair square = {};
    for (int k = 0; k < chunks; ++k) {
      const Pair v = (load_pair(x + k * next) - mean) * load_pair(&mask[k * WIDE]);
      square = square + v * v;
    }
    const float r = 1.0f / std::sqrt(total(square) * share + epsilon);
    for (int k = 0; k < chunks; ++k)
      put(p, k, (load_pair(x + k * next) - mean) * load_pair(&mask[k * WIDE]) * r);
    rstd(p, r);
  }
}

// Back through a layer norm: dn [chunks][ld][32] is the gradient of its output, xhat(p, k)
// the normalized input. put(pixel, chunk, gradient of the input).
template <class Xhat, class Rstd, class Put>
FD_INLINE void layer_norm_back(const float* dn, int ld, int pixels, int C,
                               const Vector& scale, Xhat xhat, Rstd rstd, Put put) {
  const int chunks = padded(C) / WIDE;
  const float share = 1.0f / C;
  const size_t next = (size_t)ld * WIDE;
  for (int p = 0; p < pixels; ++p) {
    const float* x = dn + (size_t)p * WIDE;
    Pair first = {}, second = {};
    for (int k = 0; k < chunks; ++k) {
      const Pair v = load_pair(x + k * next) * scale[k];
      first = first + v;
      second = second + v * xhat(p, k);
    }
    const float mean = total(first) * share, slope = total(second) * share, r = rstd(p);
    for (int k = 0; k < chunks; ++k) {
      const Pair v = load_pair(x + k * next) * scale[k];
      put(p, k, (v - mean - xhat(p, k) * slope) * r);
    }
  }
}

// ---- weights

// w [taps, K, columns], or for `transposed` [taps, columns, K], each tap's K padded to
// entire chunks, as the second operand of a product. For the transposed, the columns of
// the taps are next to each other.
template <class E>
void pack_weights(const float* w, int taps, int K, int columns, bool transposed,
                  typename E::T* out, int share, int shares) {
  const int chunks = padded(K) / WIDE;
  if (!transposed) {
    const int panels = padded(columns) / WIDE, steps = taps * chunks;
    for (int j = panels * share / shares; j < panels * (share + 1) / shares; ++j)
      for (int s = 0; s < steps; ++s) {
        const int k = s % chunks * WIDE;
        E::pack(w + ((size_t)(s / chunks) * K + k) * columns + j * WIDE, columns, 1,
                std::min(WIDE, K - k), std::min(WIDE, columns - j * WIDE),
                out + ((size_t)j * steps + s) * WIDE * WIDE);
      }
    return;
  }
  const int wide = padded(columns) / WIDE, panels = taps * wide;
  for (int j = panels * share / shares; j < panels * (share + 1) / shares; ++j)
    for (int s = 0; s < chunks; ++s) {
      const int n = j % wide * WIDE;
      E::pack(w + ((size_t)(j / wide) * columns + n) * K + s * WIDE, 1, K,
              std::min(WIDE, K - s * WIDE), std::min(WIDE, columns - n),
              out + ((size_t)j * chunks + s) * WIDE * WIDE);
    }
}

// w [taps, K, columns] -> [taps * padded(K) * padded(columns)]
template <class E>
ffi::Error Pack(ffi::ThreadPool pool, FL w, ffi::ResultBuffer<E::TYPE> packed) {
  const auto d = w.dimensions();
  const int shares = (int)pool.num_threads();
  parallel(pool, shares, [&](int i) {
    pack_weights<E>(w.typed_data(), (int)d[0], (int)d[1], (int)d[2], false,
                    packed->typed_data(), i, shares);
  });
  return ffi::Error::Success();
}

}  // namespace

#endif  // FLAX_DENSENET_CPU_RDNET_H_
