// What the dense block's kernels in float32 and bfloat16 share.

#ifndef FLAX_DENSENET_CPU_LAYERS_H_
#define FLAX_DENSENET_CPU_LAYERS_H_

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "cpu_handler.h"

namespace {

#define FD_INLINE inline __attribute__((always_inline))

using FL = ffi::Buffer<ffi::F32>;
using BF = ffi::Buffer<ffi::BF16>;
using U8 = ffi::Buffer<ffi::U8>;

// The attributes of a packed block's handlers.
#define FD_BLOCK_SIZES "layers", "bottleneck", "growth", "features"

// The attributes of the stem's handlers.
#define FD_STEM_SIZES "height", "width", "low_h", "low_w", "pool_low_h", "pool_low_w"

// Memory that begins at a cache line. A tile with rows of a line then reads no line twice.
template <class T>
struct Lines {
  typedef T value_type;
  Lines() = default;
  template <class U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
};
template <class T, class U>
bool operator==(const Lines<T>&, const Lines<U>&) {
  return true;
}
template <class T, class U>
bool operator!=(const Lines<T>&, const Lines<U>&) {
  return false;
}
template <class T>
using Aligned = std::vector<T, Lines<T>>;

// Memory for `n` numbers, with any numbers in it.
template <class T, class A>
T* room(std::vector<T, A>& scratch, size_t n) {
  if (scratch.size() < n) scratch.resize(n);
  return scratch.data();
}

// Parameters of a layer; without bottleneck the first three, with w1 [3, 3, C, G].
struct Parameters {
  const float *scale1, *bias1, *w1, *scale2, *bias2, *w2;
};

// Each layer has `stride` arguments, and these are the first ones.
inline std::vector<Parameters> parameters_of(ffi::RemainingArgs& args, int layers,
                                             int stride, bool plain) {
  std::vector<Parameters> all(layers);
  for (int l = 0; l < layers; ++l) {
    auto at = [&](int i) { return args.get<FL>(l * stride + i)->typed_data(); };
    all[l] = {at(0), at(1), at(2)};
    if (!plain) all[l].scale2 = at(3), all[l].bias2 = at(4), all[l].w2 = at(5);
  }
  return all;
}

// The weights of the first product in a layer: its 1x1 or, without bottleneck, the nine
// taps of the 3x3 [3, 3, C, G] next to each other.
struct Front {
  std::vector<float> own;
  const float* w;  // [C, M], or [C, 9 * G]
  Front(bool plain, int C, int G, const float* w1) : w(w1) {
    if (!plain) return;
    own.resize((size_t)C * 9 * G);
    w = own.data();
    for (int tap = 0; tap < 9; ++tap)
      for (int c = 0; c < C; ++c)
        std::memcpy(own.data() + ((size_t)c * 9 + tap) * G,
                    w1 + ((size_t)tap * C + c) * G, sizeof(float) * G);
  }
};

// Count, mean and sum of squared deviations of one channel, merged exactly (Chan,
// Golub, LeVeque 1979): accurate even if the mean is much larger than the spread.
struct Spread {
  double mean = 0, m2 = 0;
  FD_INLINE void merge(double count, double n, double other_mean, double other_m2) {
    const double delta = other_mean - mean, total = count + n;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * n / total);
  }
};

// A thread's sums over a layer's gradient: of the weights' gradients `dw`, and s1, s2.
template <class Part>
void add_parts(std::vector<Part>& parts) {
  for (size_t t = 1; t < parts.size(); ++t) {
    for (size_t i = 0; i < parts[0].dw.size(); ++i) parts[0].dw[i] += parts[t].dw[i];
    for (size_t c = 0; c < parts[0].s1.size(); ++c) {
      parts[0].s1[c] += parts[t].s1[c];
      parts[0].s2[c] += parts[t].s2[c];
    }
  }
}

// Gradients of norm1, and its share of those of the statistics, gm and gv.
template <class Part, class Affine>
void back_through_norm1(const Part& sums, const Affine& f, const float* scale, int C,
                        float* dscale, float* dbias, std::vector<double>& gm,
                        std::vector<double>& gv) {
  for (int c = 0; c < C; ++c) {
    const double s1 = sums.s1[c], s2 = sums.s2[c], r = f.rstd[c];
    dscale[c] = (float)(s2 * r);
    dbias[c] = (float)s1;
    gm[c] -= f.a[c] * s1;
    gv[c] -= 0.5 * scale[c] * r * r * r * s2;
  }
}

// What dropout and stochastic depth leave of the new channels of a layer, as a factor.
struct Drop {
  const uint8_t* mask = nullptr;  // [P, G], 1 for values that are kept
  const float* images = nullptr;  // [N], the factor of each image
  float scale = 1;                // of the values that are kept
  int64_t G = 0, image = 1;       // channels; pixels of an image
  Drop() = default;
  // `masks` [L, N, H, W, G] and `factors` [L, N], each empty if nothing is dropped.
  template <class Block>
  Drop(const Block& s, int l, float rate, const U8& masks, const FL& factors)
      : G(s.G), image((int64_t)s.H * s.W) {
    if (masks.element_count()) {
      mask = masks.typed_data() + l * s.P * s.G;
      scale = 1.0f / (1.0f - rate);
    }
    if (factors.element_count()) images = factors.typed_data() + (size_t)l * s.N;
  }
  bool any() const { return mask || images; }
  float of_image(int64_t p) const { return images ? scale * images[p / image] : scale; }
};

}  // namespace

#endif  // FLAX_DENSENET_CPU_LAYERS_H_
