// A layer of RDNet, forward and backward: depthwise 7x7, layer norm, 1x1, GELU, 1x1.

#ifndef FLAX_DENSENET_CPU_RDNET_LAYER_H_
#define FLAX_DENSENET_CPU_RDNET_LAYER_H_

#include "cpu_depthwise.h"
#include "cpu_rdnet.h"

namespace {

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
    take_gradient<E>(dy + p0 * G, pixels, G, y, next, sums.b2);
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

}  // namespace

#endif  // FLAX_DENSENET_CPU_RDNET_LAYER_H_
