// Depthwise 7x7 convolution, forward and backward, for some rows of images.
//
// A few channels at a time are copied to a band with a border of zeros, in float32. There,
// a row of results is computed 14 or 7 at a time, with the sums in registers.

#ifndef FLAX_DENSENET_CPU_DEPTHWISE_H_
#define FLAX_DENSENET_CPU_DEPTHWISE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_layers.h"
#include "cpu_vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int DL = 16, DB = 14, DG = 4;  // lanes, results at a time, kernel rows at a time
#else
constexpr int DL = 8, DB = 7, DG = 1;
#endif
constexpr int K = 7, REACH = K / 2;

typedef float Lanes __attribute__((vector_size(DL * 4)));
typedef float LanesU __attribute__((vector_size(DL * 4), aligned(4), may_alias));
FD_INLINE Lanes load_lanes(const float* p) { return *reinterpret_cast<const LanesU*>(p); }
FD_INLINE void store_lanes(float* p, Lanes v) { *reinterpret_cast<LanesU*>(p) = v; }

// sum[i] += the taps of a kernel around place i of a row.
template <int B>
FD_INLINE void add_taps(const float* band, int64_t line, const float* w, Lanes (&sum)[B]) {
  for (int r = 0; r < K; ++r, band += line * DL, w += K * DL) {
    Lanes tap[K];
#pragma GCC unroll 7
    for (int k = 0; k < K; ++k) tap[k] = load_lanes(w + k * DL);
#pragma GCC unroll 20
    for (int i = 0; i < B + K - 1; ++i) {
      const Lanes v = load_lanes(band + i * DL);
#pragma GCC unroll 7
      for (int k = 0; k < K; ++k)
        if (i - k >= 0 && i - k < B) sum[i - k] += v * tap[k];
    }
  }
}

// to[r * 7 + k] += the sum over a band's pixels of dy times x, for R rows of the kernel.
template <int R>
FD_INLINE void add_kernel(const float* x, const float* dy, int64_t line, int rows, int W,
                          float* to, int64_t ld) {
  Lanes sum[R][K];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 7
    for (int k = 0; k < K; ++k) sum[r][k] = Lanes{};
  for (int y = 0; y < rows; ++y, x += line * DL, dy += line * DL)
    for (int q = 0; q < W; ++q) {
      const Lanes g = load_lanes(dy + q * DL);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 7
        for (int k = 0; k < K; ++k)
          sum[r][k] += g * load_lanes(x + ((int64_t)r * line + q + k) * DL);
    }
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) {
      float* p = to + (r * K + k) * ld;
      store_lanes(p, load_lanes(p) + sum[r][k]);
    }
}

template <class E>
class Depthwise {
 public:
  typedef typename E::T T;

  // kernel [49, C], bias [C] or null; `flipped` for the gradient of the input.
  Depthwise(int height, int width, int channels, const float* kernel, const float* bias,
            bool flipped)
      : H(height), W(width), C(channels), line_(width + 2 * REACH + DB) {
    const int blocks = padded(C) / DL;
    w_.resize((size_t)blocks * K * K * DL), b_.resize((size_t)blocks * DL);
    for (int c = 0; c < C; ++c) {
      for (int tap = 0; tap < K * K; ++tap)
        w_[((size_t)c / DL * K * K + tap) * DL + c % DL] =
            kernel[(size_t)(flipped ? K * K - 1 - tap : tap) * C + c];
      if (bias) b_[c] = bias[c];
    }
  }

  // put(pixel from `first` on, channel, DL results); channels up to padded(C).
  template <class Put>
  void forward(const T* x, int first, int last, std::vector<float>& scratch,
               Put put) const {
    for_images(first, last, [&](int image, int r0, int r1) {
      float* band = room(scratch, size(r1 - r0));
      const int p0 = (image * H + r0 - first) * W;
      for (int c = 0; c < padded(C); c += DL) {
        load_band(x, image, r0, r1, c, band);
        convolve(band, r1 - r0, c,
                 [&](int p, Lanes v) { put(p0 + p, c, v); });
      }
    });
  }

  // dx of some rows from dy, and adds the gradients of the kernel [49, ld] and the bias.
  void backward(const T* x, const T* dy, int first, int last, std::vector<float>& scratch,
                std::vector<float>& dscratch, T* dx, float* dk, float* db, int ld) const {
    for_images(first, last, [&](int image, int r0, int r1) {
      const int rows = r1 - r0;
      float* band = room(scratch, size(rows));
      float* dband = room(dscratch, size(rows));
      const int64_t p0 = ((int64_t)image * H + r0) * W;
      for (int c = 0; c < C; c += DL) {
        load_band(x, image, r0, r1, c, band);
        load_band(dy, image, r0, r1, c, dband);
        convolve(dband, rows, c, [&](int p, Lanes v) {
          E::store_lanes(dx + (p0 + p) * C + c, v, std::min(DL, C - c));
        });
        const float* own = dband + ((int64_t)REACH * line_ + REACH) * DL;
        Lanes sum = {};
        for (int y = 0; y < rows; ++y)
          for (int q = 0; q < W; ++q)
            sum += load_lanes(own + ((int64_t)y * line_ + q) * DL);
        ::store_lanes(db + c, load_lanes(db + c) + sum);
        int r = 0;
        for (; r + DG <= K; r += DG)
          add_kernel<DG>(band + (int64_t)r * line_ * DL, own, line_, rows, W,
                         dk + (int64_t)r * K * ld + c, ld);
        if (r < K)
          add_kernel<K % DG ? K % DG : 1>(band + (int64_t)r * line_ * DL, own, line_, rows,
                                          W, dk + (int64_t)r * K * ld + c, ld);
      }
    });
  }

 private:
  // The rows first to last of all images together, image by image.
  template <class F>
  void for_images(int first, int last, F f) const {
    for (int row = first; row < last;) {
      const int image = row / H, end = std::min(last, (image + 1) * H);
      f(image, row - image * H, end - image * H);
      row = end;
    }
  }
  size_t size(int rows) const { return (size_t)(rows + 2 * REACH) * line_ * DL; }

  void load_band(const T* x, int image, int r0, int r1, int c, float* band) const {
    const int lanes = std::min(DL, C - c);
    for (int r = r0 - REACH; r < r1 + REACH; ++r, band += (int64_t)line_ * DL) {
      if (r < 0 || r >= H || lanes <= 0) {
        std::memset(band, 0, sizeof(float) * line_ * DL);
        continue;
      }
      std::memset(band, 0, sizeof(float) * REACH * DL);
      const T* from = x + ((int64_t)image * H + r) * W * C + c;
      float* to = band + REACH * DL;
      if (lanes == DL) {
        for (int q = 0; q < W; ++q, from += C, to += DL)
          ::store_lanes(to, E::load_lanes(from));
      } else {
        for (int q = 0; q < W; ++q, from += C, to += DL) {
          T part[DL] = {};
          std::memcpy(part, from, sizeof(T) * lanes);
          ::store_lanes(to, E::load_lanes(part));
        }
      }
      std::memset(to, 0, sizeof(float) * (line_ - REACH - W) * DL);
    }
  }

  template <int B, class Put>
  FD_INLINE void some(const float* band, int c, int p, int count, Put put) const {
    Lanes sum[B];
    const Lanes first = load_lanes(&b_[c]);
#pragma GCC unroll 14
    for (int i = 0; i < B; ++i) sum[i] = first;
    add_taps<B>(band, line_, &w_[(size_t)c * K * K], sum);
    if (count >= B) {
#pragma GCC unroll 14
      for (int i = 0; i < B; ++i) put(p + i, sum[i]);
    } else {
      for (int i = 0; i < count; ++i) put(p + i, sum[i]);
    }
  }

  // put(pixel of the band, results)
  template <class Put>
  void convolve(const float* band, int rows, int c, Put put) const {
    for (int r = 0; r < rows; ++r) {
      const float* row = band + (int64_t)r * line_ * DL;
      int q = 0;
      for (; DB > K && q + K < W; q += DB)
        some<DB>(row + q * DL, c, r * W + q, W - q, put);
      for (; q < W; q += K) some<K>(row + q * DL, c, r * W + q, W - q, put);
    }
  }

  int H, W, C, line_;
  std::vector<float> w_, b_;
};

}  // namespace

#endif  // FLAX_DENSENET_CPU_DEPTHWISE_H_
