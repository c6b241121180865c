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

#include "cpu_depthwise.h"
#include "cpu_layers.h"
#include "cpu_parallel.h"
#include "cpu_together.h"
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

// ---- a layer

constexpr int64_t FORWARD_BYTES = 1024 * 1024;  // of the values inside a unit
constexpr int64_t BACKWARD_BYTES = 3 * 1024 * 1024;

// Back through the layer for one unit of rows, up to the depthwise convolution.
template <class E>
struct LayerBack {
  typedef typename E::T T;
  const Rows& s;
  int C, M, G;
  const T *xhat, *h, *dy;
  const float* rstd;
  const T *w1, *w1t, *w2t;
  const Vector &scale, &bias, &b1;
  T* dd;

  void operator()(int first, int last, Gradients& sums, Scratch<E>& t) const {
    const int64_t p0 = (int64_t)first * s.W;
    const int pixels = (last - first) * s.W, ld = room_for(pixels);
    const int kc = padded(C) / WIDE, km = padded(M) / WIDE, kg = padded(G) / WIDE;
    const size_t next = (size_t)ld * WIDE;
    T* n = room(t.n, kc * next);
    T* g = room(t.g, km * next);
    T* slope = room(t.slope, km * next);
    T* dh = room(t.dh, km * next);
    T* y = room(t.dy, kg * next);
    float* dn = room(t.d, kc * next);
    const auto normalized = [&](int p, int k) {
      return load_some<E>(xhat + (p0 + p) * C + k * WIDE, C - k * WIDE);
    };
    for (int k = 0; k < kc; ++k)
      for (int p = 0; p < pixels; ++p)
        E::store(n + k * next + p * WIDE, normalized(p, k) * scale[k] + bias[k]);
    for (int k = 0; k < kg; ++k) {
      Pair sum = {};
      for (int p = 0; p < pixels; ++p) {
        const Pair v = load_some<E>(dy + (p0 + p) * G + k * WIDE, G - k * WIDE);
        E::store(y + k * next + p * WIDE, v);
        sum = sum + v;
      }
      add_pair(sums.b2, k, sum);
    }
    const auto activate = [&](int p, int k, Pair v) {
      E::store(g + k * next + p * WIDE, E::gelu(v));
      E::store(slope + k * next + p * WIDE, E::gelu_slope(v));
    };
    if (E::KEEPS_HIDDEN) {
      for (int k = 0; k < km; ++k)
        for (int p = 0; p < pixels; ++p)
          activate(p, k, load_some<E>(h + (p0 + p) * M + k * WIDE, M - k * WIDE));
    } else {
      E::product(t.products, n, ld, pixels, kc, w1, km, t.sums,
                 [&](int k, int p, int count, const float* c) {
                   const Pair b = b1[k];
                   for (int i = 0; i < count; ++i)
                     activate(p + i, k, load_pair(c + i * WIDE) + b);
                 });
    }
    t.outer.add(y, kg, g, km, ld, pixels, sums.w2.data(), t.sums);
    E::product(t.products, y, ld, pixels, kg, w2t, km, t.sums,
               [&](int k, int p, int count, const float* c) {
                 Pair sum = {};
                 for (int i = 0; i < count; ++i) {
                   const size_t at = k * next + (p + i) * WIDE;
                   const Pair v = load_pair(c + i * WIDE) * E::load(slope + at);
                   E::store(dh + at, v);
                   sum = sum + v;
                 }
                 add_pair(sums.b1, k, sum);
               });
    t.outer.add(n, kc, dh, km, ld, pixels, sums.w1.data(), t.sums);
    E::product(t.products, dh, ld, pixels, km, w1t, kc, t.sums,
               [&](int k, int p, int count, const float* c) {
                 Pair of_scale = {}, of_bias = {};
                 for (int i = 0; i < count; ++i) {
                   const Pair v = load_pair(c + i * WIDE);
                   store_pair(dn + k * next + (p + i) * WIDE, v);
                   of_scale = of_scale + v * normalized(p + i, k);
                   of_bias = of_bias + v;
                 }
                 add_pair(sums.scale, k, of_scale);
                 add_pair(sums.bias, k, of_bias);
               });
    layer_norm_back(dn, ld, pixels, C, scale, normalized,
                    [&](int p) { return rstd[p0 + p]; },
                    [&](int p, int k, Pair v) {
                      store_some<E>(dd + (p0 + p) * C + k * WIDE, v, C - k * WIDE);
                    });
  }
};

// x [N, H, W, C], kernel [7, 7, 1, C], its bias, scale, bias, packed w1, b1, packed w2, b2
// -> y [N, H, W, G]; for the backward pass the normalized values [N, H, W, C], 1 / their
// standard deviation [N, H, W] and, if E::KEEPS_HIDDEN, h [N, H, W, M]. Without backward
// pass, these three are empty.
template <class E>
ffi::Error LayerForward(ffi::ThreadPool pool, float epsilon, ffi::Buffer<E::TYPE> x, FL k7,
                        FL b7, FL scale, FL bias, ffi::Buffer<E::TYPE> w1, FL b1,
                        ffi::Buffer<E::TYPE> w2, FL b2, ffi::ResultBuffer<E::TYPE> y,
                        ffi::ResultBuffer<E::TYPE> xhat, ffi::ResultBuffer<ffi::F32> rstd,
                        ffi::ResultBuffer<E::TYPE> hidden) {
  typedef typename E::T T;
  const auto d = x.dimensions();
  const int C = (int)d[3], M = (int)b1.dimensions()[0], G = (int)b2.dimensions()[0];
  const int kc = padded(C) / WIDE, km = padded(M) / WIDE, kg = padded(G) / WIDE;
  if (w1.element_count() != (size_t)kc * km * WIDE * WIDE ||
      w2.element_count() != (size_t)km * kg * WIDE * WIDE)
    return ffi::Error::InvalidArgument("RDNet: packed by other rules");
  const Rows s(d[0], d[1], d[2], (int)pool.num_threads());
  const Depthwise<E> depthwise(s.H, s.W, C, k7.typed_data(), b7.typed_data(), false);
  const Vector a(scale.typed_data(), C), b(bias.typed_data(), C);
  const Vector of1(b1.typed_data(), M), of2(b2.typed_data(), G);
  const std::vector<float> mask = mask_of(C);
  const bool keep = xhat->element_count() != 0;
  T* h = hidden->element_count() ? hidden->typed_data() : nullptr;
  const int64_t most = std::max<int64_t>(WIDE, FORWARD_BYTES / (sizeof(T) * (M + 2 * C)));
  parallel(pool, s.T, [&](int part) {
    static thread_local Scratch<E> t;
    const typename E::Config config;
    for_units(s, part, std::min<int64_t>(most, 512), [&](int first, int last) {
      const int64_t p0 = (int64_t)first * s.W;
      const int pixels = (last - first) * s.W, ld = room_for(pixels);
      const size_t next = (size_t)ld * WIDE;
      float* conv = room(t.d, kc * next);
      T* n = room(t.n, kc * next);
      T* g = room(t.g, km * next);
      depthwise.forward(x.typed_data(), first, last, t.band, [&](int p, int c, Lanes v) {
        store_lanes(conv + c / WIDE * next + (size_t)p * WIDE + c % WIDE, v);
      });
      layer_norm(conv, ld, pixels, C, mask, epsilon,
                 [&](int p, int k, Pair v) {
                   if (keep)
                     store_some<E>(xhat->typed_data() + (p0 + p) * C + k * WIDE, v,
                                   C - k * WIDE);
                   E::store(n + k * next + p * WIDE, v * a[k] + b[k]);
                 },
                 [&](int p, float r) {
                   if (keep) rstd->typed_data()[p0 + p] = r;
                 });
      E::product(t.products, n, ld, pixels, kc, w1.typed_data(), km, t.sums,
                 [&](int k, int p, int count, const float* c) {
                   const Pair bias = of1[k];
                   for (int i = 0; i < count; ++i) {
                     const Pair v = load_pair(c + i * WIDE) + bias;
                     if (h)
                       store_some<E>(h + (p0 + p + i) * M + k * WIDE, v, M - k * WIDE);
                     E::store(g + k * next + (p + i) * WIDE, E::gelu(v));
                   }
                 });
      E::product(t.products, g, ld, pixels, km, w2.typed_data(), kg, t.sums,
                 [&](int k, int p, int count, const float* c) {
                   const Pair bias = of2[k];
                   for (int i = 0; i < count; ++i)
                     store_some<E>(y->typed_data() + (p0 + p + i) * G + k * WIDE,
                                   load_pair(c + i * WIDE) + bias, G - k * WIDE);
                 });
    });
  });
  return ffi::Error::Success();
}

// x, normalized values, 1 / standard deviation, h, gradient of y, kernel, scale, bias,
// w1 [1, C, M], b1, w2 [1, M, G] -> gradient of x, room for that of the depthwise
// convolution's output, gradients of kernel, its bias, scale, bias, w1, b1, w2, b2
template <class E>
ffi::Error LayerBackward(ffi::ThreadPool pool, ffi::Buffer<E::TYPE> x,
                         ffi::Buffer<E::TYPE> xhat, FL rstd, ffi::Buffer<E::TYPE> h,
                         ffi::Buffer<E::TYPE> dy, FL k7, FL scale, FL bias, FL w1, FL b1,
                         FL w2, ffi::ResultBuffer<E::TYPE> dx,
                         ffi::ResultBuffer<E::TYPE> dd, ffi::ResultBuffer<ffi::F32> dk7,
                         ffi::ResultBuffer<ffi::F32> db7, ffi::ResultBuffer<ffi::F32> dscale,
                         ffi::ResultBuffer<ffi::F32> dbias, ffi::ResultBuffer<ffi::F32> dw1,
                         ffi::ResultBuffer<ffi::F32> db1, ffi::ResultBuffer<ffi::F32> dw2,
                         ffi::ResultBuffer<ffi::F32> db2) {
  typedef typename E::T T;
  const auto d = x.dimensions();
  const int C = (int)d[3], M = (int)w1.dimensions()[2], G = (int)w2.dimensions()[2];
  const int wc = padded(C), wm = padded(M), wg = padded(G);
  const Rows s(d[0], d[1], d[2], (int)pool.num_threads());
  const Vector a(scale.typed_data(), C), b(bias.typed_data(), C), of1(b1.typed_data(), M);
  const Depthwise<E> back(s.H, s.W, C, k7.typed_data(), nullptr, true);
  std::vector<T> w1p(E::KEEPS_HIDDEN ? 0 : (size_t)wc * wm), w1t((size_t)wc * wm),
      w2t((size_t)wm * wg);
  std::vector<Gradients> sums(s.T);
  const LayerBack<E> layer{s, C, M, G, xhat.typed_data(), h.typed_data(), dy.typed_data(),
                           rstd.typed_data(), w1p.data(), w1t.data(), w2t.data(), a, b,
                           of1, dd->typed_data()};
  const int64_t most =
      std::max<int64_t>(4 * WIDE, BACKWARD_BYTES / (sizeof(T) * (3 * M + 4 * C)));
  Crew crew(pool, s.T);
  crew.run([&](int t) {
    if (!E::KEEPS_HIDDEN)
      pack_weights<E>(w1.typed_data(), 1, C, M, false, w1p.data(), t, s.T);
    pack_weights<E>(w1.typed_data(), 1, M, C, true, w1t.data(), t, s.T);
    pack_weights<E>(w2.typed_data(), 1, G, M, true, w2t.data(), t, s.T);
  });
  crew.run([&](int t) {
    static thread_local Scratch<E> scratch;
    const typename E::Config config;
    Gradients& own = sums[t];
    own.w1.resize((size_t)wc * wm), own.w2.resize((size_t)wg * wm);
    own.b1.resize(wm), own.b2.resize(wg), own.scale.resize(wc), own.bias.resize(wc);
    own.k7.resize(49 * (size_t)wc), own.b7.resize(wc);
    for_units(s, t, most,
              [&](int first, int last) { layer(first, last, own, scratch); });
  });
  crew.run([&](int t) {
    static thread_local Scratch<E> scratch;
    for_units(s, t, 1024, [&](int first, int last) {
      back.backward(x.typed_data(), dd->typed_data(), first, last, scratch.band,
                    scratch.dband, dx->typed_data(), sums[t].k7.data(),
                    sums[t].b7.data(), wc);
    });
  });
  crew.run([&](int t) {
    for (auto which : {&Gradients::w1, &Gradients::w2, &Gradients::b1, &Gradients::b2, &Gradients::scale,
                       &Gradients::bias, &Gradients::k7, &Gradients::b7})
      Gradients::add(sums, which, t, s.T);
  });
  const Gradients& all = sums[0];
  const auto rows_of = [](ffi::ResultBuffer<ffi::F32>& to, const std::vector<float>& from,
                          int rows, int columns, int ld) {
    for (int r = 0; r < rows; ++r)
      std::memcpy(to->typed_data() + (size_t)r * columns, from.data() + (size_t)r * ld,
                  sizeof(float) * columns);
  };
  rows_of(dk7, all.k7, 49, C, wc);
  rows_of(db7, all.b7, 1, C, wc);
  rows_of(dscale, all.scale, 1, C, wc);
  rows_of(dbias, all.bias, 1, C, wc);
  rows_of(dw1, all.w1, C, M, wm);
  rows_of(db1, all.b1, 1, M, wm);
  rows_of(db2, all.b2, 1, G, wg);
  crew.run([&](int t) {
    float* to = dw2->typed_data();
    for (int m = M * t / s.T; m < M * (t + 1) / s.T; ++m)
      for (int j = 0; j < G; ++j) to[(size_t)m * G + j] = all.w2[(size_t)j * wm + m];
  });
  return ffi::Error::Success();
}

// ---- a transition

// Loads the pixels of patches: [chunks][taps * ld][32], from rows first to last of the
// result, which has W columns.
template <class E>
void load_patches(const typename E::T* x, int H, int W, int C, int size, int first, int last,
                  int out_h, int out_w, int ld, float* d) {
  const int chunks = padded(C) / WIDE;
  for (int tap = 0; tap < size * size; ++tap)
    for (int r = first; r < last; ++r) {
      const int row = r % out_h * size + tap / size;
      const typename E::T* from =
          x + (((int64_t)(r / out_h) * H + row) * W + tap % size) * C;
      float* to = d + ((size_t)tap * ld + (size_t)(r - first) * out_w) * WIDE;
      for (int q = 0; q < out_w; ++q, from += (int64_t)size * C, to += WIDE)
        for (int k = 0; k < chunks; ++k)
          store_pair(to + (size_t)k * size * size * ld * WIDE,
                     load_some<E>(from + k * WIDE, C - k * WIDE));
    }
}

// x [N, H, W, C], scale, bias, packed w, b -> y [N, H / size, W / size, F]
template <class E>
ffi::Error TransitionForward(ffi::ThreadPool pool, float epsilon, int64_t size,
                             ffi::Buffer<E::TYPE> x, FL scale, FL bias,
                             ffi::Buffer<E::TYPE> w, FL b, ffi::ResultBuffer<E::TYPE> y) {
  typedef typename E::T T;
  const auto d = x.dimensions(), e = y->dimensions();
  const int H = (int)d[1], W = (int)d[2], C = (int)d[3], F = (int)e[3];
  const int taps = (int)(size * size), kc = padded(C) / WIDE, kf = padded(F) / WIDE;
  if (w.element_count() != (size_t)taps * kc * kf * WIDE * WIDE)
    return ffi::Error::InvalidArgument("RDNet: packed by other rules");
  const Rows s(e[0], e[1], e[2], (int)pool.num_threads());
  const Vector a(scale.typed_data(), C), of(bias.typed_data(), C), add(b.typed_data(), F);
  const std::vector<float> mask = mask_of(C);
  const int64_t most =
      std::max<int64_t>(WIDE, FORWARD_BYTES / (int64_t)((sizeof(T) + 4) * C * taps));
  parallel(pool, s.T, [&](int part) {
    static thread_local Scratch<E> t;
    const typename E::Config config;
    for_units(s, part, std::min<int64_t>(most, 512), [&](int first, int last) {
      const int64_t p0 = (int64_t)first * s.W;
      const int pixels = (last - first) * s.W, ld = room_for(pixels);
      const size_t next = (size_t)ld * WIDE;
      float* from = room(t.d, taps * kc * next);
      T* n = room(t.n, taps * kc * next);
      load_patches<E>(x.typed_data(), H, W, C, (int)size, first, last, s.H, s.W, ld, from);
      for (int tap = 0; tap < taps; ++tap)
        layer_norm(from + tap * next, taps * ld, pixels, C, mask, epsilon,
                   [&](int p, int k, Pair v) {
                     E::store(n + (tap * kc + k) * next + p * WIDE, v * a[k] + of[k]);
                   },
                   [](int, float) {});
      E::product(t.products, n, ld, pixels, taps * kc, w.typed_data(), kf, t.sums,
                 [&](int k, int p, int count, const float* c) {
                   for (int i = 0; i < count; ++i)
                     store_some<E>(y->typed_data() + (p0 + p + i) * F + k * WIDE,
                                   load_pair(c + i * WIDE) + add[k], F - k * WIDE);
                 });
    });
  });
  return ffi::Error::Success();
}

// Back through a transition for one unit of rows of its result.
template <class E>
struct TransitionBack {
  typedef typename E::T T;
  const Rows& s;
  int H, W, C, F, size;
  float epsilon;
  const T *x, *dy, *wt;
  const Vector &scale, &bias;
  const std::vector<float>& mask;
  T* dx;

  void operator()(int first, int last, Gradients& sums, Scratch<E>& t) const {
    const int64_t p0 = (int64_t)first * s.W;
    const int pixels = (last - first) * s.W, ld = room_for(pixels), taps = size * size;
    const int kc = padded(C) / WIDE, kf = padded(F) / WIDE;
    const size_t next = (size_t)ld * WIDE;
    float* from = room(t.d, taps * kc * next);
    float* dn = room(t.band, taps * kc * next);
    float* rstd = room(t.taps, (size_t)taps * ld);
    T* n = room(t.n, taps * kc * next);
    T* y = room(t.dy, kf * next);
    load_patches<E>(x, H, W, C, size, first, last, s.H, s.W, ld, from);
    for (int tap = 0; tap < taps; ++tap)
      layer_norm(from + tap * next, taps * ld, pixels, C, mask, epsilon,
                 [&](int p, int k, Pair v) {
                   store_pair(from + ((size_t)k * taps + tap) * next + p * WIDE, v);
                   E::store(n + (tap * kc + k) * next + p * WIDE, v * scale[k] + bias[k]);
                 },
                 [&](int p, float r) { rstd[tap * ld + p] = r; });
    for (int k = 0; k < kf; ++k) {
      Pair sum = {};
      for (int p = 0; p < pixels; ++p) {
        const Pair v = load_some<E>(dy + (p0 + p) * F + k * WIDE, F - k * WIDE);
        E::store(y + k * next + p * WIDE, v);
        sum = sum + v;
      }
      add_pair(sums.b1, k, sum);
    }
    t.outer.add(n, taps * kc, y, kf, ld, pixels, sums.w1.data(), t.sums);
    const auto xhat = [&](int tap) {
      return [=](int p, int k) {
        return load_pair(from + ((size_t)k * taps + tap) * next + p * WIDE);
      };
    };
    E::product(t.products, y, ld, pixels, kf, wt, taps * kc, t.sums,
               [&](int j, int p, int count, const float* c) {
                 const int tap = j / kc, k = j % kc;
                 const auto normalized = xhat(tap);
                 Pair of_scale = {}, of_bias = {};
                 for (int i = 0; i < count; ++i) {
                   const Pair v = load_pair(c + i * WIDE);
                   store_pair(dn + ((size_t)k * taps + tap) * next + (p + i) * WIDE, v);
                   of_scale = of_scale + v * normalized(p + i, k);
                   of_bias = of_bias + v;
                 }
                 add_pair(sums.scale, k, of_scale);
                 add_pair(sums.bias, k, of_bias);
               });
    for (int tap = 0; tap < taps; ++tap)
      layer_norm_back(dn + tap * next, taps * ld, pixels, C, scale, xhat(tap),
                      [&](int p) { return rstd[tap * ld + p]; },
                      [&](int p, int k, Pair v) {
                        const int r = first + p / s.W, q = p % s.W * size + tap % size;
                        const int row = r % s.H * size + tap / size;
                        const int64_t to = ((int64_t)(r / s.H) * H + row) * W + q;
                        store_some<E>(dx + to * C + k * WIDE, v, C - k * WIDE);
                      });
  }
};

// x, gradient of y, scale, bias, w [taps, C, F] -> gradients of x, scale, bias, w and the
// convolution's bias
template <class E>
ffi::Error TransitionBackward(ffi::ThreadPool pool, float epsilon, int64_t size,
                              ffi::Buffer<E::TYPE> x, ffi::Buffer<E::TYPE> dy, FL scale,
                              FL bias, FL w, ffi::ResultBuffer<E::TYPE> dx,
                              ffi::ResultBuffer<ffi::F32> dscale,
                              ffi::ResultBuffer<ffi::F32> dbias,
                              ffi::ResultBuffer<ffi::F32> dw,
                              ffi::ResultBuffer<ffi::F32> db) {
  typedef typename E::T T;
  const auto d = x.dimensions(), e = dy.dimensions();
  const int H = (int)d[1], W = (int)d[2], C = (int)d[3], F = (int)e[3];
  const int taps = (int)(size * size), wc = padded(C), wf = padded(F);
  const Rows s(e[0], e[1], e[2], (int)pool.num_threads());
  const Vector a(scale.typed_data(), C), b(bias.typed_data(), C);
  const std::vector<float> mask = mask_of(C);
  std::vector<T> wt((size_t)taps * wc * wf);
  std::vector<Gradients> sums(s.T);
  const TransitionBack<E> back{s, H, W, C, F, (int)size, epsilon, x.typed_data(),
                               dy.typed_data(), wt.data(), a, b, mask, dx->typed_data()};
  // Rows and columns beyond the last patch have no gradient.
  if (H % size || W % size)
    std::memset(dx->typed_data(), 0, sizeof(T) * dx->element_count());
  Crew crew(pool, s.T);
  crew.run([&](int t) {
    pack_weights<E>(w.typed_data(), taps, F, C, true, wt.data(), t, s.T);
  });
  crew.run([&](int t) {
    static thread_local Scratch<E> scratch;
    const typename E::Config config;
    Gradients& own = sums[t];
    own.w1.resize((size_t)taps * wc * wf), own.b1.resize(wf);
    own.scale.resize(wc), own.bias.resize(wc);
    const int64_t most = BACKWARD_BYTES / (int64_t)((sizeof(T) + 8) * C * taps);
    for_units(s, t, std::max<int64_t>(most, 2 * WIDE),
              [&](int first, int last) { back(first, last, own, scratch); });
  });
  crew.run([&](int t) {
    for (auto which : {&Gradients::w1, &Gradients::b1, &Gradients::scale, &Gradients::bias})
      Gradients::add(sums, which, t, s.T);
  });
  const Gradients& all = sums[0];
  std::memcpy(dscale->typed_data(), all.scale.data(), sizeof(float) * C);
  std::memcpy(dbias->typed_data(), all.bias.data(), sizeof(float) * C);
  std::memcpy(db->typed_data(), all.b1.data(), sizeof(float) * F);
  for (int tap = 0; tap < taps; ++tap)
    for (int c = 0; c < C; ++c)
      std::memcpy(dw->typed_data() + ((size_t)tap * C + c) * F,
                  all.w1.data() + ((size_t)tap * wc + c) * wf, sizeof(float) * F);
  return ffi::Error::Success();
}

}  // namespace

// The handlers of one precision, and those for several devices.
#define FLAX_DENSENET_RDNET(E, Suffix)                                                    \
  using FD_T = ffi::Buffer<E::TYPE>;                                                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(RDNetPack##Suffix, Pack<E>,                               \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<FL>()         \
                                    .Ret<FD_T>());                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetLayerForward##Suffix, LayerForward<E>,                                         \
      (bind<Results, FD_T, FD_T, FL, FD_T>(                                               \
          bind<Arguments, FD_T, FL, FL, FL, FL, FD_T, FL, FD_T, FL>(bind_pool()))));      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetLayerBackward##Suffix, LayerBackward<E>,                                       \
      (bind<Results, FD_T, FD_T, FL, FL, FL, FL, FL, FL, FL, FL>(                         \
          bind<Arguments, FD_T, FD_T, FL, FD_T, FD_T, FL, FL, FL, FL, FL, FL>(            \
              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()))));                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetTransitionForward##Suffix, TransitionForward<E>,                               \
      (bind<Results, FD_T>(bind<Arguments, FD_T, FL, FL, FD_T, FL>(                       \
          bind_pool().Attr<int64_t>("size")))));                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetTransitionBackward##Suffix, TransitionBackward<E>,                             \
      (bind<Results, FD_T, FL, FL, FL, FL>(bind<Arguments, FD_T, FD_T, FL, FL, FL>(       \
          bind_pool().Attr<int64_t>("size")))));                                          \
  FD_TOGETHER(RDNetLayerBackward##Suffix);                                                \
  FD_TOGETHER(RDNetTransitionBackward##Suffix)

#endif  // FLAX_DENSENET_CPU_RDNET_H_
