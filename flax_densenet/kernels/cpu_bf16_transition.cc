// A transition in training in bfloat16, forward and backward: batch norm, ReLU, mean of
// 2x2 pixels, 1x1 convolution.
//
// The mean is computed before the product, which then has a quarter of the pixels. The
// backward pass reads the features again instead of keeping what was pooled. Statistics
// are arguments and have gradients, since the dense block before computes them.
//
// Work is divided into one contiguous part per thread, and the parts are added in order,
// so results on one machine are bit-identical in every run.

#include "cpu_bf16_training.h"
#include "cpu_parallel.h"
#include "cpu_together.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int PB = 256;  // pooled pixels of a step of the weights' gradient

struct Shape {
  int H, W, C, F, H2, W2, T;
  int chunks, panels;  // of the features and of the result
  int64_t P2, P;       // pixels of the result and of the features
  Shape(int64_t n, int64_t h, int64_t w, int64_t c, int64_t f, int threads)
      : H(h), W(w), C(c), F(f), H2(h / 2), W2(w / 2), chunks(steps_of(c)),
        panels(steps_of(f)), P2(n * H2 * W2), P(n * h * w) {
    T = (int)std::max<int64_t>(1, std::min<int64_t>(threads, P2 / PT));
  }
  int64_t pooled(int t) const { return P2 * t / T; }
  // The first of the four pixels of a pooled one.
  int64_t source(int64_t p) const {
    const int64_t row = p / W2;
    return (row / H2 * H + row % H2 * 2) * W + p % W2 * 2;
  }
};

struct Scratch {
  Aligned<bf16> y, g, gv;
  std::vector<int64_t> from;  // the first source of each pixel
  std::vector<int32_t> steps, pixels;
  Aligned<float> dw;
  std::vector<double> s1, s2;
  alignas(64) float sums[PT * PT];
  alignas(64) bf16 patch[PT * CHUNK];
};

FD_INLINE F positive(F v) {
  const F zero = {};
  return v > zero ? v : zero;
}

// The norm of one chunk, in registers.
struct Chunk {
  F a0, a1, b0, b1;
  Chunk(const Affine& f, int k)
      : a0(load(&f.a[k * CHUNK])), a1(load(&f.a[k * CHUNK] + 16)),
        b0(load(&f.b[k * CHUNK])), b1(load(&f.b[k * CHUNK] + 16)) {}
};

// The mean of 2x2 pixels of relu(norm(x)), for `n` pixels of one chunk.
void pool(const Shape& s, const bf16* X, const int64_t* from, int n, int k,
          const Affine& f, bf16* y) {
  const Chunk norm(f, k);
  const int valid = s.C - k * CHUNK;
  for (int i = 0; i < n; ++i, y += CHUNK) {
    const bf16* x = X + from[i] * s.C + k * CHUNK;
    F low = {}, high = {};
#pragma GCC unroll 4
    for (int place = 0; place < 4; ++place) {
      const bf16* at = x + (int64_t)(place / 2 * s.W + place % 2) * s.C;
      alignas(64) bf16 part[CHUNK];
      if (valid < CHUNK) load_part(at, valid, part), at = part;
      low += positive(widen(at) * norm.a0 + norm.b0);
      high += positive(widen(at + 16) * norm.a1 + norm.b1);
    }
    store(y, narrow(low * 0.25f, high * 0.25f));
  }
}

void set_sources(const Shape& s, int64_t p, int n, Scratch& t) {
  for (int i = 0; i < n; ++i) t.from[i] = s.source(p + i);
}

// X, mean, var, scale, bias, w [C, F] -> [N, H / 2, W / 2, F]
ffi::Error Forward(ffi::ThreadPool pool_, float epsilon, BF X, FL mean, FL var, FL scale,
                   FL bias, FL w, ffi::ResultBuffer<ffi::BF16> out) {
  const auto d = X.dimensions();
  const Shape s(d[0], d[1], d[2], d[3], w.dimensions()[1], (int)pool_.num_threads());
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean.typed_data(), var.typed_data(), s.C,
         epsilon);
  Tiled tiled;
  tiled.reset(s.chunks, s.F);
  tiled.set(0, w.typed_data(), s.C, s.F, s.F, false);
  const Weights weights = tiled.view();
  parallel(pool_, s.T, [&](int part) {
    const TileConfig tiles;
    const Multipliers& multiply = multipliers();
    Scratch t;
    t.from.resize(PT);
    bf16* y = room(t.y, (size_t)s.chunks * PT * CHUNK);
    for (int k = 0; k < s.chunks; ++k) t.steps.push_back(k * PT * CHUNK);
    for (int64_t p = s.pooled(part); p < s.pooled(part + 1); p += PT) {
      const int n = (int)std::min<int64_t>(PT, s.pooled(part + 1) - p);
      set_sources(s, p, n, t);
      for (int k = 0; k < s.chunks; ++k)
        pool(s, X.typed_data(), t.from.data(), n, k, f, y + (size_t)k * PT * CHUNK);
      for (int j = 0; j < weights.panels(); ++j) {
        multiply({y, t.steps.data(), 2 * CHUNK, weights.panel(j), s.chunks, t.sums, PT},
                 n > ROWS ? 2 : 1, weights.tiles_of(j));
        for (int i = 0; i < n; ++i)
          store_part(out->typed_data() + (p + i) * s.F + j * PT,
                     narrow(load(t.sums + i * PT), load(t.sums + i * PT + 16)),
                     s.F - j * PT);
      }
    }
  });
  return ffi::Error::Success();
}

// The gradient of `n` pixels of the result, in chunks g [panels][PB][32], and in pairs of
// pixels for the weights' gradient.
void load_gradient(const Shape& s, const bf16* gy, int64_t p, int n, Scratch& t) {
  const int steps = (n + PT - 1) / PT;
  for (int j = 0; j < s.panels; ++j) {
    bf16* g = t.g.data() + (size_t)j * PB * CHUNK;
    for (int i = 0; i < n; ++i)
      load_part(gy + (p + i) * s.F + j * CHUNK, s.F - j * CHUNK, g + (size_t)i * CHUNK);
    std::memset(g + (size_t)n * CHUNK, 0, sizeof(bf16) * (steps * PT - n) * CHUNK);
    for (int i = 0; i < steps; ++i)
      interleave_patch(g + (size_t)i * PT * CHUNK,
                       t.gv.data() + ((size_t)j * steps + i) * 2 * TILE);
  }
}

// Adds pooled^T g of `n` pixels to dw [chunks * 32][panels * 32].
void outer(const Shape& s, const bf16* X, int n, const Affine& f, Scratch& t) {
  const Multipliers& multiply = multipliers();
  const int steps = (n + PT - 1) / PT, width = s.panels * CHUNK;
  const int64_t ld = PB + PT;
  for (int k = 0; k < s.chunks; ++k) {
    for (int i = 0; i < steps; ++i) {
      const int count = std::min(PT, n - i * PT);
      pool(s, X, t.from.data() + i * PT, count, k, f, t.patch);
      std::memset(t.patch + count * CHUNK, 0, sizeof(bf16) * (PT - count) * CHUNK);
      transpose_patch(t.patch, t.y.data() + i * PT, ld);
    }
    for (int j = 0; j < s.panels; ++j) {
      multiply({t.y.data(), t.pixels.data(), 2 * ld,
                t.gv.data() + (size_t)j * steps * 2 * TILE, steps, t.sums, PT},
               2, 2);
      add_sums(t.sums, t.dw.data() + (size_t)k * CHUNK * width + j * CHUNK, width);
    }
  }
}

// The gradient of the features of `n` pooled pixels, and its sums.
void spread(const Shape& s, const bf16* X, int n, const Affine& f, const Weights& wt,
            bf16* gX, Scratch& t) {
  const Multipliers& multiply = multipliers();
  for (int k = 0; k < s.chunks; ++k) {
    const Chunk norm(f, k);
    const F m0 = load(&f.mean[k * CHUNK]), m1 = load(&f.mean[k * CHUNK] + 16), zero = {};
    const int valid = s.C - k * CHUNK;
    F p0 = {}, p1 = {}, q0 = {}, q1 = {};
    for (int i = 0; i < n; i += PT) {
      const int count = std::min(PT, n - i);
      multiply({t.g.data() + (size_t)i * CHUNK, t.steps.data(), 2 * CHUNK, wt.panel(k),
                s.panels, t.sums, PT},
               count > ROWS ? 2 : 1, 2);
      for (int r = 0; r < count; ++r) {
        const F g0 = load(t.sums + r * PT) * 0.25f, g1 = load(t.sums + r * PT + 16) * 0.25f;
#pragma GCC unroll 4
        for (int place = 0; place < 4; ++place) {
          const int64_t at =
              (t.from[i + r] + place / 2 * s.W + place % 2) * s.C + k * CHUNK;
          const bf16* x = X + at;
          alignas(64) bf16 part[CHUNK];
          if (valid < CHUNK) load_part(x, valid, part), x = part;
          const F x0 = widen(x), x1 = widen(x + 16);
          const F d0 = x0 * norm.a0 + norm.b0 > zero ? g0 : zero;
          const F d1 = x1 * norm.a1 + norm.b1 > zero ? g1 : zero;
          p0 += d0, p1 += d1, q0 += d0 * (x0 - m0), q1 += d1 * (x1 - m1);
          store_part(gX + at, narrow(norm.a0 * d0, norm.a1 * d1), valid);
        }
      }
    }
    add_to(&t.s1[k * CHUNK], p0), add_to(&t.s1[k * CHUNK] + 16, p1);
    add_to(&t.s2[k * CHUNK], q0), add_to(&t.s2[k * CHUNK] + 16, q1);
  }
}

void prepare(const Shape& s, Scratch& t) {
  t.from.resize(PB);
  room(t.y, (size_t)CHUNK * (PB + PT));
  room(t.g, (size_t)s.panels * PB * CHUNK);
  room(t.gv, (size_t)s.panels * PB / PT * 2 * TILE);
  for (int j = 0; j < s.panels; ++j) t.steps.push_back(j * PB * CHUNK);
  for (int i = 0; i < PB / PT; ++i) t.pixels.push_back(i * PT);
  t.dw.assign((size_t)s.chunks * CHUNK * s.panels * CHUNK, 0.0f);
  t.s1.assign(s.chunks * CHUNK, 0.0), t.s2.assign(s.chunks * CHUNK, 0.0);
}

// X, mean, var, scale, bias, w, gy -> the gradients of the first six
ffi::Error Backward(ffi::ThreadPool pool_, float epsilon, BF X, FL mean, FL var, FL scale,
                    FL bias, FL w, BF gy, ffi::ResultBuffer<ffi::BF16> gX,
                    ffi::ResultBuffer<ffi::F32> gmean, ffi::ResultBuffer<ffi::F32> gvar,
                    ffi::ResultBuffer<ffi::F32> gscale, ffi::ResultBuffer<ffi::F32> gbias,
                    ffi::ResultBuffer<ffi::F32> gw) {
  const auto d = X.dimensions();
  const Shape s(d[0], d[1], d[2], d[3], w.dimensions()[1], (int)pool_.num_threads());
  Affine f;
  f.from(scale.typed_data(), bias.typed_data(), mean.typed_data(), var.typed_data(), s.C,
         epsilon);
  Tiled tiled;
  tiled.reset(s.panels, up(s.C, 2 * COLUMNS));
  tiled.set(0, w.typed_data(), s.F, s.C, s.F, true);
  std::vector<Scratch> scratch(s.T);
  const bf16* x = X.typed_data();
  if (s.H % 2 || s.W % 2)  // the last row or column is not pooled
    std::memset(gX->typed_data(), 0, sizeof(bf16) * s.P * s.C);
  parallel(pool_, s.T, [&](int part) {
    const TileConfig tiles;
    Scratch& t = scratch[part];
    prepare(s, t);
    for (int64_t p = s.pooled(part); p < s.pooled(part + 1); p += PB) {
      const int n = (int)std::min<int64_t>(PB, s.pooled(part + 1) - p);
      set_sources(s, p, n, t);
      load_gradient(s, gy.typed_data(), p, n, t);
      outer(s, x, n, f, t);
      spread(s, x, n, f, tiled.view(), gX->typed_data(), t);
    }
  });
  add_parts(scratch);
  for (int c = 0; c < s.C; ++c)
    std::memcpy(gw->typed_data() + (size_t)c * s.F,
                scratch[0].dw.data() + (size_t)c * s.panels * CHUNK, sizeof(float) * s.F);
  std::vector<double> gm(s.C), gv(s.C);
  back_through_norm1(scratch[0], f, scale.typed_data(), s.C, gscale->typed_data(),
                     gbias->typed_data(), gm, gv);
  for (int c = 0; c < s.C; ++c) {
    gmean->typed_data()[c] = (float)gm[c];
    gvar->typed_data()[c] = (float)gv[c];
  }
  return ffi::Error::Success();
}

}  // namespace

FD_HANDLER(TransitionForwardBfloat16, Forward, "epsilon");
FD_HANDLER(TransitionBackwardBfloat16, Backward, "epsilon");

FD_TOGETHER(TransitionBackwardBfloat16);

FLAX_DENSENET_BFLOAT16_PATH
