// The stem in float32: its norm and pooling, forward and backward, and for inference
// its convolution as well.

#include "cpu_float32.h"
#include "cpu_together.h"

namespace {

// The stem after its convolution: batch norm, ReLU and 3x3 max pooling with stride 2.
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

// which: the position of the largest value in its window, 0 to 8; 9 if all are 0 after
// the ReLU, so that there is no gradient.
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
                     FL x, FL scale,
                     FL bias, ffi::ResultBuffer<ffi::F32> y,
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
                    FL x, FL scale,
                    FL bias, FL mean,
                    FL var, ffi::ResultBuffer<ffi::F32> y) {
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
               const float* bias, float* y, Aligned<float>& scratch) {
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
                      FL x, FL packed,
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
    thread_local Aligned<float> scratch;
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
                        int64_t low_w, FL x,
                        FL scale, FL bias,
                        FL mean, FL var,
                        U8 which, FL gy,
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
          // The windows that contain this pixel: two if they overlap here, else one.
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
  add_parts(sums);
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

}  // namespace

FD_HANDLER(StemForwardPacked, StemPacked, FD_STEM_SIZES);
FD_HANDLER(StemForwardTrain, StemTrain, "epsilon", "low_h", "low_w");
FD_HANDLER(StemForwardEval, StemEval, "epsilon", "low_h", "low_w");
FD_HANDLER(StemBackwardTrain, StemBackward, "epsilon", "low_h", "low_w");

FD_TOGETHER(StemForwardTrain);
FD_TOGETHER(StemBackwardTrain);
