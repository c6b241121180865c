// The stem in training in bfloat16, forward and backward: 7x7 convolution with stride 2,
// batch norm, ReLU, 3x3 max pooling with stride 2.
//
// A step of the convolution's product is one row of the window: 7 * C values of the image,
// which are next to each other. The output of the convolution is kept in bfloat16, in
// chunks of 32 channels. Pooling compares it before the norm: bits of bfloat16 as integers,
// in reverse where the norm has a negative factor. It notes which of the nine values was
// the largest, and the backward pass collects from the windows of each pixel what belongs
// to it. The gradient of the kernel is a product over the pixels of a row; for this, each
// row of the image is stored once for each of the 7 * C places of the window.
//
// Work is divided into one contiguous part per thread, and the parts are added in order,
// so results on one machine are bit-identical in every run.

#include "cpu_bf16_training.h"
#include "cpu_parallel.h"
#include "cpu_together.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int K7 = 7;
constexpr int RB = 8;      // rows of the convolution in a step
constexpr int NOBODY = 9;  // all values of a window are 0 after the ReLU

typedef uint8_t B __attribute__((vector_size(32)));

struct Stem {
  int N, H, W, C, F, Hc, Wc, H2, W2;         // image, convolution, result
  int low_h, low_w, pool_low_h, pool_low_w;  // paddings
  int chunks, T;
  int64_t P, P2;  // pixels of the convolution and of the result
  Stem(int64_t n, int64_t h, int64_t w, int64_t c, int64_t f, int64_t hc, int64_t wc,
       int64_t h2, int64_t w2, int64_t lh, int64_t lw, int64_t plh, int64_t plw,
       int threads)
      : N(n), H(h), W(w), C(c), F(f), Hc(hc), Wc(wc), H2(h2), W2(w2), low_h(lh), low_w(lw),
        pool_low_h(plh), pool_low_w(plw), chunks(steps_of(f)), P(n * hc * wc),
        P2(n * h2 * w2) {
    T = (int)std::max<int64_t>(1, std::min<int64_t>(threads, n * h2));
  }
  int conv_row(int t) const { return (int)((int64_t)N * Hc * t / T); }
  int out_row(int t) const { return (int)((int64_t)N * H2 * t / T); }
  // Where a padded row of an image begins to be real, and how many of its pixels the
  // windows read.
  int real(int wide) const { return std::min(W, 2 * (wide - 1) + K7 - low_w); }
  // The rows and columns of the convolution in a window.
  int top(int i) const { return 2 * i - pool_low_h; }
  int left(int j) const { return 2 * j - pool_low_w; }
};

struct Scratch {
  Aligned<bf16> band, parity, patches, gv, h;
  std::vector<int32_t> steps;
  Aligned<float> dw;
  std::vector<double> s1, s2;
  alignas(64) float sums[PT * PT];
  alignas(64) bf16 patch[PT * CHUNK];
};

// ---- forward

Tiled tiles_of(const Stem& s, const float* kernel) {
  Tiled w;
  w.reset(K7, s.chunks * CHUNK);
  for (int r = 0; r < K7; ++r)
    w.set(r, kernel + (size_t)r * K7 * s.C * s.F, K7 * s.C, s.F, s.F, false);
  return w;
}

// `count` rows of the convolution from row r0 of one image x on, to h, whose chunks are
// `length` pixels apart. Adds to `moments` unless that is null.
void convolve(const Stem& s, const bf16* x, int r0, int count, const Weights& w, bf16* h,
              int64_t length, Moments* moments, Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int wide = up(s.Wc, ROWS), line = (2 * (wide - 1) + K7) * s.C + DEPTH;
  const int rows = 2 * (count - 1) + K7;
  bf16* band = room(t.band, (size_t)rows * line);
  for (int r = 0; r < rows; ++r) {
    const int at = 2 * r0 - s.low_h + r;
    bf16* to = band + (size_t)r * line;
    std::memset(to, 0, sizeof(bf16) * line);
    if (at >= 0 && at < s.H)
      std::memcpy(to + s.low_w * s.C, x + (size_t)at * s.W * s.C,
                  sizeof(bf16) * s.real(wide) * s.C);
  }
  int32_t steps[K7];
  for (int r = 0; r < K7; ++r) steps[r] = r * line;
  for (int r = 0; r < count; ++r)
    for (int q = 0; q < s.Wc; q += PT) {
      const int n = std::min(PT, s.Wc - q);
      for (int j = 0; j < s.chunks; ++j) {
        multiply({band + (size_t)2 * r * line + 2 * q * s.C, steps, 4 * s.C, w.panel(j),
                  K7, t.sums, PT},
                 n > ROWS ? 2 : 1, 2);
        bf16* to = h + (j * length + (int64_t)r * s.Wc + q) * CHUNK;
        for (int i = 0; i < n; ++i)
          store(to + (size_t)i * CHUNK,
                narrow(load(t.sums + i * PT), load(t.sums + i * PT + 16)));
        if (moments) moments->add(to, n, CHUNK, j * CHUNK);
      }
      if (moments) moments->count += n, moments->fresh = false;
    }
}

FD_INLINE S load_s(const bf16* p) { return *reinterpret_cast<const SU*>(p); }

// Integers in the order of the numbers, and back again.
FD_INLINE S ordered(S v) { return v ^ ((v >> 15) & 0x7fff); }

// One row i of the result of one image, from its h. `which` may be null.
void pool(const Stem& s, int i, const bf16* h, int64_t length, const Affine& f, bf16* y,
          uint8_t* which, int64_t which_length) {
  const int r0 = std::max(0, s.top(i)), r1 = std::min(s.Hc, s.top(i) + 3);
  for (int k = 0; k < s.chunks; ++k) {
    const F a0 = load(&f.a[k * CHUNK]), a1 = load(&f.a[k * CHUNK] + 16);
    const F b0 = load(&f.b[k * CHUNK]), b1 = load(&f.b[k * CHUNK] + 16);
    S flip, nobody = S{} + NOBODY, zero = {};
    for (int c = 0; c < CHUNK; ++c) flip[c] = f.a[k * CHUNK + c] < 0 ? -1 : 0;
    for (int j = 0; j < s.W2; ++j) {
      const int q0 = std::max(0, s.left(j)), q1 = std::min(s.Wc, s.left(j) + 3);
      S best = zero - 0x7fff - 1, place = nobody;
      for (int r = r0; r < r1; ++r)
        for (int q = q0; q < q1; ++q) {
          const S v = load_s(h + (k * length + (int64_t)r * s.Wc + q) * CHUNK);
          const S key = ordered(v) ^ flip;
          const S larger = key > best;
          best = larger ? key : best;
          if (which)
            place = larger ? zero + (short)((r - s.top(i)) * 3 + q - s.left(j)) : place;
        }
      alignas(64) bf16 x[CHUNK];
      store(x, ordered(best ^ flip));
      const S v = relu(narrow(widen(x) * a0 + b0, widen(x + 16) * a1 + b1));
      store_part(y + (size_t)j * s.F + k * CHUNK, v, s.F - k * CHUNK);
      if (!which) continue;
      const B bytes = __builtin_convertvector(v > zero ? place : nobody, B);
      std::memcpy(which + (k * which_length + j) * CHUNK, &bytes, sizeof bytes);
    }
  }
}

// x, kernel [7, 7, C, F], scale, bias -> y [N, H2, W2, F], mean, var,
// h [chunks, N, Hc, Wc, 32], which [chunks, N, H2, W2, 32]
ffi::Error Forward(ffi::ThreadPool pool_, float epsilon, int64_t height, int64_t width,
                   int64_t low_h, int64_t low_w, int64_t pool_low_h, int64_t pool_low_w,
                   BF x, FL kernel, FL scale, FL bias, ffi::ResultBuffer<ffi::BF16> y,
                   ffi::ResultBuffer<ffi::F32> mean, ffi::ResultBuffer<ffi::F32> var,
                   ffi::ResultBuffer<ffi::BF16> h, ffi::ResultBuffer<ffi::U8> which) {
  const auto d = x.dimensions(), e = y->dimensions();
  const Stem s(d[0], d[1], d[2], d[3], e[3], height, width, e[1], e[2], low_h, low_w,
               pool_low_h, pool_low_w, (int)pool_.num_threads());
  const Tiled w = tiles_of(s, kernel.typed_data());
  std::vector<Moments> parts(s.T, Moments(s.F));
  parallel(pool_, s.T, [&](int t) {
    const TileConfig tiles;
    Scratch scratch;
    for (int row = s.conv_row(t), count; row < s.conv_row(t + 1); row += count) {
      const int n = row / s.Hc, r = row % s.Hc;
      count = std::min({RB, s.Hc - r, s.conv_row(t + 1) - row});
      convolve(s, x.typed_data() + (size_t)n * s.H * s.W * s.C, r, count, w.view(),
               h->typed_data() + (size_t)row * s.Wc * CHUNK, s.P, &parts[t], scratch);
    }
  });
  finish_moments(parts, s.F, mean->typed_data(), var->typed_data());
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean->typed_data(), var->typed_data(), s.F,
         epsilon);
  parallel(pool_, s.T, [&](int t) {
    for (int row = s.out_row(t); row < s.out_row(t + 1); ++row)
      pool(s, row % s.H2, h->typed_data() + (size_t)(row / s.H2) * s.Hc * s.Wc * CHUNK, s.P,
           f, y->typed_data() + (size_t)row * s.W2 * s.F,
           which->typed_data() + (size_t)row * s.W2 * CHUNK, s.P2);
  });
  return ffi::Error::Success();
}

// With given statistics, image by image. x, kernel, scale, bias, mean, var -> y
ffi::Error ForwardEval(ffi::ThreadPool pool_, float epsilon, int64_t height, int64_t width,
                       int64_t low_h, int64_t low_w, int64_t pool_low_h,
                       int64_t pool_low_w, BF x, FL kernel, FL scale, FL bias, FL mean,
                       FL var, ffi::ResultBuffer<ffi::BF16> y) {
  const auto d = x.dimensions(), e = y->dimensions();
  const Stem s(d[0], d[1], d[2], d[3], e[3], height, width, e[1], e[2], low_h, low_w,
               pool_low_h, pool_low_w, (int)pool_.num_threads());
  const Tiled w = tiles_of(s, kernel.typed_data());
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean.typed_data(), var.typed_data(), s.F,
         epsilon);
  parallel(pool_, s.N, [&](int n) {
    static thread_local Scratch scratch;
    const TileConfig tiles;
    const int64_t length = (int64_t)s.Hc * s.Wc;
    bf16* h = room(scratch.h, s.chunks * length * CHUNK);
    for (int r = 0; r < s.Hc; r += RB)
      convolve(s, x.typed_data() + (size_t)n * s.H * s.W * s.C, r, std::min(RB, s.Hc - r),
               w.view(), h + (size_t)r * s.Wc * CHUNK, length, nullptr, scratch);
    for (int i = 0; i < s.H2; ++i)
      pool(s, i, h, length, f, y->typed_data() + ((size_t)n * s.H2 + i) * s.W2 * s.F,
           nullptr, 0);
  });
  return ffi::Error::Success();
}

// ---- backward

// Where a value of the result came from, and its gradient.
struct Source {
  const uint8_t* which;  // [chunks, P2, 32]
  const bf16* gy;        // [P2, F]
  int64_t P2;
  int F;
  FD_INLINE S place(int64_t p, int k) const {
    B bytes;
    std::memcpy(&bytes, which + (k * P2 + p) * CHUNK, sizeof bytes);
    return __builtin_convertvector(bytes, S);
  }
  FD_INLINE S gradient(int64_t p, int k) const {
    const bf16* from = gy + p * F + k * CHUNK;
    alignas(64) bf16 part[CHUNK];
    if (F - k * CHUNK < CHUNK) load_part(from, F - k * CHUNK, part), from = part;
    return load_s(from);
  }
};

FD_INLINE void halves(S v, F& low, F& high) {
  H both[2];
  std::memcpy(both, &v, sizeof both);
  low = as_float(__builtin_convertvector(both[0], U) << 16);
  high = as_float(__builtin_convertvector(both[1], U) << 16);
}

// The sums over a row of the result: of its gradient, and times the norm's input.
void sum_row(const Stem& s, int row, const bf16* h, const Source& from, const Affine& f,
             Scratch& t) {
  const int i = row % s.H2, r0 = std::max(0, s.top(i)), r1 = std::min(s.Hc, s.top(i) + 3);
  h += (size_t)(row / s.H2) * s.Hc * s.Wc * CHUNK;
  for (int k = 0; k < s.chunks; ++k) {
    const int c = k * CHUNK;
    const F m0 = load(&f.mean[c]), m1 = load(&f.mean[c] + 16);
    F p0 = {}, p1 = {}, q0 = {}, q1 = {};
    for (int j = 0; j < s.W2; ++j) {
      const int64_t p = (int64_t)row * s.W2 + j;
      const S place = from.place(p, k), zero = {};
      S x = zero;
      for (int r = r0; r < r1; ++r)
        for (int q = std::max(0, s.left(j)); q < std::min(s.Wc, s.left(j) + 3); ++q) {
          const S at = zero + (short)((r - s.top(i)) * 3 + q - s.left(j));
          x = place == at ? load_s(h + (k * s.P + (int64_t)r * s.Wc + q) * CHUNK) : x;
        }
      const S g = place == zero + NOBODY ? zero : from.gradient(p, k);
      F x0, x1, g0, g1;
      halves(x, x0, x1), halves(g, g0, g1);
      p0 += g0, p1 += g1, q0 += g0 * (x0 - m0), q1 += g1 * (x1 - m1);
    }
    add_to(&t.s1[c], p0), add_to(&t.s1[c] + 16, p1);
    add_to(&t.s2[c], q0), add_to(&t.s2[c] + 16, q1);
  }
}

// Rows of an image, each [32][Wp]: row dx * C + c has channel c of the pixels 2q + dx, for
// the columns q of the convolution.
void load_patches(const Stem& s, const bf16* x, int r0, int rows, int Wp, Scratch& t) {
  bf16* to = room(t.patches, (size_t)rows * DEPTH * Wp);
  const int half = s.Wc + K7 / 2;
  bf16* parity = room(t.parity, (size_t)2 * s.C * half);
  std::fill_n(to, (size_t)rows * DEPTH * Wp, bf16{0});
  const int end = std::min(s.real(s.Wc) + s.low_w, 2 * half);
  for (int r = 0; r < rows; ++r, to += (size_t)DEPTH * Wp) {
    const int at = 2 * r0 - s.low_h + r;
    if (at < 0 || at >= s.H) continue;
    std::fill_n(parity, (size_t)2 * s.C * half, bf16{0});
    const bf16* from = x + (size_t)at * s.W * s.C;
    for (int q = s.low_w; q < end; ++q)
      for (int c = 0; c < s.C; ++c) parity[(q % 2 * s.C + c) * half + q / 2] = *from++;
    for (int dx = 0; dx < K7; ++dx)
      for (int c = 0; c < s.C; ++c)
        std::memcpy(to + (size_t)(dx * s.C + c) * Wp,
                    parity + (dx % 2 * s.C + c) * half + dx / 2, sizeof(bf16) * s.Wc);
  }
}

// The gradient of the convolution's output at `n` pixels from column q of row r of image
// n on: a * g + k0 + k1 * h, where g is what the windows around a pixel give it.
void gradient_of_row(const Stem& s, int image, int r, int q0, int n, int k, const bf16* h,
                     const Source& from, const Affine& f, const float* k0,
                     const float* k1, bf16* to) {
  const int c = k * CHUNK, row = r + s.pool_low_h;
  const F a0 = load(&f.a[c]), a1 = load(&f.a[c] + 16), e0 = load(k0 + c),
          e1 = load(k0 + c + 16), d0 = load(k1 + c), d1 = load(k1 + c + 16);
  const int i0 = std::max(0, (row - 1) / 2), i1 = std::min(s.H2 - 1, row / 2);
  h += (k * s.P + ((int64_t)image * s.Hc + r) * s.Wc) * CHUNK;
  for (int q = q0; q < q0 + n; ++q, to += CHUNK) {
    const int column = q + s.pool_low_w;
    const int j0 = std::max(0, (column - 1) / 2), j1 = std::min(s.W2 - 1, column / 2);
    F low = {}, high = {};
    for (int i = i0; i <= i1; ++i)
      for (int j = j0; j <= j1; ++j) {
        const int64_t p = ((int64_t)image * s.H2 + i) * s.W2 + j;
        const S zero = {}, own = zero + (short)((row - 2 * i) * 3 + column - 2 * j);
        F g0, g1;
        halves(from.place(p, k) == own ? from.gradient(p, k) : zero, g0, g1);
        low += g0, high += g1;
      }
    const bf16* x = h + (size_t)q * CHUNK;
    store(to, narrow(a0 * low + e0 + d0 * widen(x),
                     a1 * high + e1 + d1 * widen(x + 16)));
  }
}

// Adds to dw [7][32][chunks * 32] the share of `count` rows from row r0 of one image on.
void outer(const Stem& s, const bf16* x, int image, int r0, int count, const bf16* h,
           const Source& from, const Affine& f, const float* k0, const float* k1,
           Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int Wp = up(s.Wc, PT), segments = Wp / PT, all = count * segments;
  load_patches(s, x + (size_t)image * s.H * s.W * s.C, r0, 2 * (count - 1) + K7, Wp, t);
  bf16* gv = room(t.gv, (size_t)s.chunks * all * 2 * TILE);
  room(t.steps, all);
  for (int r = 0; r < count; ++r)
    for (int i = 0; i < segments; ++i) {
      const int n = std::min(PT, s.Wc - i * PT);
      t.steps[r * segments + i] = 2 * r * DEPTH * Wp + i * PT;
      for (int k = 0; k < s.chunks; ++k) {
        gradient_of_row(s, image, r0 + r, i * PT, n, k, h, from, f, k0, k1, t.patch);
        std::memset(t.patch + n * CHUNK, 0, sizeof(bf16) * (PT - n) * CHUNK);
        interleave_patch(t.patch,
                         gv + ((size_t)k * all + r * segments + i) * 2 * TILE);
      }
    }
  const int64_t width = s.chunks * CHUNK;
  for (int dy = 0; dy < K7; ++dy)
    for (int k = 0; k < s.chunks; ++k) {
      multiply({t.patches.data() + (size_t)dy * DEPTH * Wp, t.steps.data(), 2 * Wp,
                gv + (size_t)k * all * 2 * TILE, all, t.sums, PT},
               2, 2);
      add_sums(t.sums, t.dw.data() + (size_t)dy * DEPTH * width + k * CHUNK, width);
    }
}

// x, scale, bias, mean, var, h, which, gy -> the gradients of kernel, scale, bias
ffi::Error Backward(ffi::ThreadPool pool_, float epsilon, int64_t height, int64_t width,
                    int64_t low_h, int64_t low_w, int64_t pool_low_h, int64_t pool_low_w,
                    BF x, FL scale, FL bias, FL mean, FL var, BF h, U8 which, BF gy,
                    ffi::ResultBuffer<ffi::F32> gkernel,
                    ffi::ResultBuffer<ffi::F32> gscale,
                    ffi::ResultBuffer<ffi::F32> gbias) {
  const auto d = x.dimensions(), e = gy.dimensions();
  const Stem s(d[0], d[1], d[2], d[3], e[3], height, width, e[1], e[2], low_h, low_w,
               pool_low_h, pool_low_w, (int)pool_.num_threads());
  const Source from{which.typed_data(), gy.typed_data(), s.P2, s.F};
  const int wide = s.chunks * CHUNK;
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean.typed_data(), var.typed_data(), s.F,
         epsilon);
  std::vector<Scratch> scratch(s.T);
  parallel(pool_, s.T, [&](int t) {
    scratch[t].s1.assign(wide, 0.0), scratch[t].s2.assign(wide, 0.0);
    scratch[t].dw.assign((size_t)K7 * DEPTH * wide, 0.0f);
    for (int row = s.out_row(t); row < s.out_row(t + 1); ++row)
      sum_row(s, row, h.typed_data(), from, f, scratch[t]);
  });
  std::vector<float> k0(wide), k1(wide);
  for (int c = 0; c < s.F; ++c) {
    double s1 = 0, s2 = 0;
    for (const Scratch& part : scratch) s1 += part.s1[c], s2 += part.s2[c];
    const double r = f.rstd[c], slope = f.a[c] * r * r * s2 / s.P;
    gscale->typed_data()[c] = (float)(s2 * r);
    gbias->typed_data()[c] = (float)s1;
    k0[c] = (float)(slope * f.mean[c] - f.a[c] * s1 / s.P);
    k1[c] = (float)-slope;
  }
  parallel(pool_, s.T, [&](int t) {
    const TileConfig tiles;
    for (int row = s.conv_row(t), count; row < s.conv_row(t + 1); row += count) {
      const int r = row % s.Hc;
      count = std::min({RB, s.Hc - r, s.conv_row(t + 1) - row});
      outer(s, x.typed_data(), row / s.Hc, r, count, h.typed_data(), from, f, k0.data(),
            k1.data(), scratch[t]);
    }
  });
  add_parts(scratch);
  for (int dy = 0; dy < K7; ++dy)
    for (int i = 0; i < K7 * s.C; ++i)
      std::memcpy(gkernel->typed_data() + ((size_t)dy * K7 * s.C + i) * s.F,
                  scratch[0].dw.data() + ((size_t)dy * DEPTH + i) * wide,
                  sizeof(float) * s.F);
  return ffi::Error::Success();
}

}  // namespace

FD_HANDLER(StemForwardTrainBfloat16, Forward, "epsilon", FD_STEM_SIZES);
FD_HANDLER(StemForwardEvalBfloat16, ForwardEval, "epsilon", FD_STEM_SIZES);
FD_HANDLER(StemBackwardBfloat16, Backward, "epsilon", FD_STEM_SIZES);

FD_TOGETHER(StemForwardTrainBfloat16);
FD_TOGETHER(StemBackwardBfloat16);

FLAX_DENSENET_BFLOAT16_PATH
