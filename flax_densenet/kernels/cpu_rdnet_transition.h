// A transition of RDNet, forward and backward: layer norm, a convolution of patches.

#ifndef FLAX_DENSENET_CPU_RDNET_TRANSITION_H_
#define FLAX_DENSENET_CPU_RDNET_TRANSITION_H_

#include "cpu_rdnet.h"

namespace {

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
    take_gradient<E>(dy + p0 * F, pixels, F, y, next, sums.b1);
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

#endif  // FLAX_DENSENET_CPU_RDNET_TRANSITION_H_
