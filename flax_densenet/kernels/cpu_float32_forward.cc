// The dense block in float32, forward, for training, evaluation and inference; and the
// mask of dropout.

#include "cpu_float32.h"
#include "cpu_together.h"

namespace {

// The 1x1 convolution of one layer for some pixels: h [P, M]. In training h is its plain
// output, and its moments are added; in evaluation, `f2` and ReLU are applied directly.
void forward_1x1(const Block& s, int64_t first, int64_t last, const float* X, int C,
                 const Affine& f1, const Panels& w1, const Affine* f2, float* h,
                 Moments* moments, Aligned<float>& scratch) {
  float *y = room(scratch, tile_size(C) + (size_t)MR * NR), *c = y + tile_size(C);
  for (int64_t p = first; p < last; p += PT) {
    const int n = (int)std::min<int64_t>(PT, last - p);
    load_tile(s, X, p, n, C, f1, y);
    multiply(y, n, C, w1, s.M, c, [&](int i, int j, V value, int lanes) {
      if (f2) value = normalized(value, *f2, j, lanes);
      store(h + (p + i) * s.M + j, value, lanes);
    });
    if (moments) moments->add(h + p * s.M, n, s.M);
  }
}

// Nine shifted products of MR pixels from `z` on, whose lines are `line` pixels long.
template <int LD, int NV>
inline void taps(int K, const float* z, int line, const Panels* w2, int j, float* C) {
  V sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[i][v] = V{};
  for (int tap = 0; tap < 9; ++tap)
    accumulate<MR, NV, LD, 1>(sum, K, z + (size_t)(tap / 3 * line + tap % 3) * LD,
                              w2[tap].at(j), NV * VL);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(C + i * NR + v * VL, sum[i][v]);
}
template <int LD>
void convolve(int nv, int K, const float* z, int line, const Panels* w2, int j,
              float* C) {
  if (nv == 2) {
    taps<LD, 2>(K, z, line, w2, j, C);
  } else {
    taps<LD, 1>(K, z, line, w2, j, C);
  }
}
typedef void (*Convolution)(int, int, const float*, int, const Panels*, int, float*);
Convolution convolve_of(int w) { EACH_WIDTH(convolve) }

// The 3x3 convolution of one layer for some bands, into its place in X.
void forward_3x3(const Block& s, int first, int last, float* X, int C, const float* h,
                 const Affine* f2, const Panels* w2, const Drop& drop, Moments* moments,
                 Aligned<float>& scratch) {
  const int line = s.W + 2;
  const size_t padded = (size_t)s.padded_rows() * s.wm;
  float *z = room(scratch, padded + (size_t)MR * NR), *c = z + padded;
  const Convolution product = convolve_of(s.wm);
  // Tiles start at each line if they then cover less of the border of zeros than tiles
  // that continue across lines.
  const int tiles = up(s.W, MR) / MR;
  const bool by_lines = tiles * MR < line;
  for (int u = first; u < last; ++u) {
    load_z(s, u, h, f2, z);
    const int n = u / s.bands, r0 = u % s.bands * s.rb;
    const int count = std::min(s.H, r0 + s.rb) - r0;
    const int64_t p0 = ((int64_t)n * s.H + r0) * s.W;
    const int parts = by_lines ? count * tiles : up(count * line, MR) / MR;
    for (int j = 0; j < w2[0].n; j += NR) {
      const int wide = w2[0].wide(j);
      for (int i = 0; i < parts; ++i) {
        const int q = by_lines ? i / tiles * line + i % tiles * MR : i * MR;
        product(wide / VL, s.M, z + (size_t)q * s.wm, line, w2, j, c);
        for (int r = 0; r < MR && q + r < count * line; ++r) {
          const int x = (q + r) % line;
          if (x >= s.W) continue;  // the border of zeros
          const int64_t p = p0 + (q + r) / line * s.W + x;
          float* out = X + p * s.Ct + C;
          for (int v = 0; v < wide && j + v < s.G; v += VL) {
            const int lanes = std::min(VL, s.G - j - v);
            V sum = load(c + r * NR + v);
            store(out + j + v, dropped(sum, drop, p, j + v, lanes), lanes);
          }
        }
      }
    }
    if (moments) {
      for (int r = 0; r < count; ++r)
        moments->add(X + (p0 + (int64_t)r * s.W) * s.Ct + C, s.W, s.Ct);
    }
  }
}

// One layer without bottleneck for some bands, into its place in X. `w` is [C, 9 * G].
void forward_plain(const Block& s, int first, int last, float* X, int C,
                   const Affine& f1, const Panels& w, const Drop& drop,
                   Moments* moments, Aligned<float>& scratch) {
  const int line = s.W + 2, ld = up(s.M, VL);
  const size_t sums = (size_t)(s.rb + 2) * line * ld + NR;
  float* taps = room(scratch, sums + tile_size(C) + (size_t)MR * NR);
  float *y = taps + sums, *c = y + tile_size(C);
  float* to[PT];
  for (int u = first; u < last; ++u) {
    const int n = u / s.bands, r0 = u % s.bands * s.rb;
    const int r1 = std::min(s.H, r0 + s.rb);
    // Includes the rows around the band, except outside of the image.
    const int top = std::max(0, r0 - 1), bottom = std::min(s.H, r1 + 1);
    const size_t row = (size_t)line * ld;
    if (top == r0) std::memset(taps, 0, sizeof(float) * row);
    if (bottom == r1)
      std::memset(taps + (r1 - r0 + 1) * row, 0, sizeof(float) * row);
    for (int r = top; r < bottom; ++r) {
      float* begin = taps + (r - r0 + 1) * row;
      std::memset(begin, 0, sizeof(float) * ld);
      std::memset(begin + row - ld, 0, sizeof(float) * ld);
    }
    const int64_t image = (int64_t)n * s.H * s.W;
    for (int q = top * s.W; q < bottom * s.W; q += PT) {
      const int count = std::min(PT, bottom * s.W - q);
      for (int i = 0; i < count; ++i)
        to[i] = taps + ((q + i) / s.W - r0 + 1) * row + ((q + i) % s.W + 1) * ld;
      load_tile(s, X, image + q, count, C, f1, y);
      multiply(y, count, C, w, s.M, c,
               [&](int i, int j, V value, int) { store(to[i] + j, value); });
    }
    for (int r = r0; r < r1; ++r) {
      for (int x = 0; x < s.W; ++x) {
        const float* from = taps + (r - r0) * row + x * ld;
        const int64_t p = image + r * s.W + x;
        for (int g = 0; g < s.G; g += VL) {
          const int lanes = std::min(VL, s.G - g);
          V sum = {};
          for (int tap = 0; tap < 9; ++tap)
            sum += load(from + tap / 3 * row + tap % 3 * ld + tap * s.G + g);
          store(X + p * s.Ct + C + g, dropped(sum, drop, p, g, lanes), lanes);
        }
      }
      if (moments)
        moments->add(X + (image + r * s.W) * s.Ct + C, s.W, s.Ct);
    }
  }
}

void copy_input(const Block& s, ffi::ThreadPool& pool, const float* x, float* X,
                Moments* moments) {
  parallel(pool, s.T, [&](int t) {
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); p += PT) {
      const int n = (int)std::min<int64_t>(PT, s.pixel(t + 1) - p);
      for (int i = 0; i < n; ++i)
        std::memcpy(X + (p + i) * s.Ct, x + (p + i) * s.C0, sizeof(float) * s.C0);
      if (moments) moments[t].add(x + p * s.C0, n, s.C0);
    }
  });
}

// x, mask, images, then per layer scale1, bias1, w1, scale2, bias2, w2
// -> X [N, H, W, Ct], mean, var [Ct], h [L, P, M], mean2, var2 [L, M]
// Without bottleneck a layer is scale1, bias1, w [3, 3, C, G], and M is 0.
ffi::Error ForwardTrain(ffi::ThreadPool pool, float epsilon, float rate,
                        FL x, U8 mask,
                        FL images, ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> X,
                        ffi::ResultBuffer<ffi::F32> mean,
                        ffi::ResultBuffer<ffi::F32> var, ffi::ResultBuffer<ffi::F32> h,
                        ffi::ResultBuffer<ffi::F32> mean2,
                        ffi::ResultBuffer<ffi::F32> var2) {
  const auto d = x.dimensions();
  const int L = (int)mean2->dimensions()[0], M = (int)mean2->dimensions()[1];
  const int G = (int)(X->dimensions()[3] - d[3]) / L;
  const Block s(d[0], d[1], d[2], d[3], L, G, M, pool.num_threads());
  if (ffi::Error error = check(s); error.failure()) return error;
  float *out = X->typed_data(), *m = mean->typed_data(), *v = var->typed_data();
  {
    std::vector<Moments> parts(s.T, Moments(s.C0));
    copy_input(s, pool, x.typed_data(), out, parts.data());
    finish_moments(parts, s.C0, m, v);
  }
  std::vector<Aligned<float>> scratch(s.T);
  const std::vector<Parameters> weights = parameters_of(args, L, s.plain ? 3 : 6, s.plain);
  for (int l = 0; l < L; ++l) {
    const Parameters& w = weights[l];
    const int C = s.C(l);
    const Drop drop(s, l, rate, mask, images);
    const Front front(s.plain, C, G, w.w1);
    Panels w1;
    w1.pack(front.w, C, s.M, s.M, false);
    if (s.plain) {
      Affine f1;
      f1.from(w.scale1, w.bias1, m, v, C, epsilon);
      std::vector<Moments> parts(s.T, Moments(G));
      parallel(pool, s.T, [&](int t) {
        forward_plain(s, s.unit(t), s.unit(t + 1), out, C, f1, w1, drop, &parts[t],
                      scratch[t]);
      });
      finish_moments(parts, G, m + C, v + C);
      continue;
    }
    float *m2 = mean2->typed_data() + l * M, *v2 = var2->typed_data() + l * M;
    float* hl = h->typed_data() + (int64_t)l * s.P * M;
    Affine f1, f2;
    f1.from(w.scale1, w.bias1, m, v, C, epsilon);
    std::vector<Moments> parts(s.T, Moments(M));
    parallel(pool, s.T, [&](int t) {
      forward_1x1(s, s.pixel(t), s.pixel(t + 1), out, C, f1, w1, nullptr, hl,
                  &parts[t], scratch[t]);
    });
    finish_moments(parts, M, m2, v2);
    f2.from(w.scale2, w.bias2, m2, v2, M, epsilon);
    const std::vector<Panels> w2 = pack_3x3(s, w.w2, false);
    parts.assign(s.T, Moments(G));
    parallel(pool, s.T, [&](int t) {
      forward_3x3(s, s.unit(t), s.unit(t + 1), out, C, hl, &f2, w2.data(), drop,
                  &parts[t], scratch[t]);
    });
    finish_moments(parts, G, m + C, v + C);
  }
  return ffi::Error::Success();
}

// One layer in evaluation: its norms, and its weights in panels.
struct EvalLayer {
  Affine f1, f2;
  Panels w1;
  std::vector<Panels> w2;
};

// What follows a block: a norm, and in a transition ReLU, the mean of 2x2 pixels and a
// 1x1 convolution to F channels; F is 0 after the last block.
struct Tail {
  Affine f;
  Panels w;
  int F;
};

// Chunks as of `load_tile` of relu(norm(x)), averaged over 2x2, for `n` pixels from the
// pixel p of the smaller maps on.
void load_pooled(const Block& s, const float* X, int64_t p, int n, const Affine& f,
                 float* y) {
  const int H2 = s.H / 2, W2 = s.W / 2;
  for (int i = 0; i < n; ++i) {
    const int64_t row = (p + i) / W2, image = row / H2;
    const float* x = X + ((image * s.H + row % H2 * 2) * s.W + (p + i) % W2 * 2) * s.Ct;
    const float* below = x + (int64_t)s.W * s.Ct;
    for (int c = 0; c < s.Ct; c += VL) {
      const int lanes = std::min(VL, s.Ct - c);
      const V sum = normalized(load(x + c, lanes), f, c, lanes) +
                    normalized(load(x + s.Ct + c, lanes), f, c, lanes) +
                    normalized(load(below + c, lanes), f, c, lanes) +
                    normalized(load(below + s.Ct + c, lanes), f, c, lanes);
      store(y + (size_t)(c / KC) * PT * KC + (size_t)i * KC + c % KC, sum * 0.25f);
    }
  }
}

// The tail for some pixels of its result.
void finish(const Block& s, int64_t first, int64_t last, const float* X,
            const Tail& tail, float* out, Aligned<float>& scratch) {
  if (!tail.F) {
    for (int64_t p = first; p < last; ++p)
      for (int c = 0; c < s.Ct; c += VL) {
        const int lanes = std::min(VL, s.Ct - c);
        const V x = load(X + p * s.Ct + c, lanes) - load(&tail.f.mean[c], lanes);
        store(out + p * s.Ct + c,
              x * load(&tail.f.a[c], lanes) + load(&tail.f.b[c], lanes), lanes);
      }
    return;
  }
  float *y = room(scratch, tile_size(s.Ct) + (size_t)MR * NR), *c = y + tile_size(s.Ct);
  for (int64_t p = first; p < last; p += PT) {
    const int n = (int)std::min<int64_t>(PT, last - p);
    load_pooled(s, X, p, n, tail.f, y);
    multiply(y, n, s.Ct, tail.w, tail.F, c, [&](int i, int j, V value, int lanes) {
      store(out + (p + i) * tail.F + j, value, lanes);
    });
  }
}

// A block in evaluation, with its tail or, without one, all of its features.
//
// Without batch statistics, images do not depend on each other. A thread therefore takes a
// few images through all layers, so that their features stay in its cache. With fewer
// images than threads, all threads compute each layer together.
void forward_eval(const Block& s, ffi::ThreadPool& pool, int threads, const float* x,
                  const std::vector<EvalLayer>& layers, const Tail* tail, float* out) {
  const int64_t image = (int64_t)s.H * s.W;
  const int64_t image_out = tail && tail->F ? (int64_t)(s.H / 2) * (s.W / 2) : image;
  const int channels = tail && tail->F ? tail->F : s.Ct;
  if (s.N < threads) {
    thread_local Aligned<float> features, hidden;
    float* X = tail ? room(features, s.P * s.Ct) : out;
    float* h = room(hidden, s.plain ? 0 : s.P * s.M);
    std::vector<Aligned<float>> scratch(s.T);
    copy_input(s, pool, x, X, nullptr);
    for (int l = 0; l < s.L; ++l) {
      const EvalLayer& layer = layers[l];
      if (s.plain) {
        parallel(pool, s.T, [&](int t) {
          forward_plain(s, s.unit(t), s.unit(t + 1), X, s.C(l), layer.f1, layer.w1, {},
                        nullptr, scratch[t]);
        });
        continue;
      }
      parallel(pool, s.T, [&](int t) {
        forward_1x1(s, s.pixel(t), s.pixel(t + 1), X, s.C(l), layer.f1, layer.w1,
                    &layer.f2, h, nullptr, scratch[t]);
      });
      parallel(pool, s.T, [&](int t) {
        forward_3x3(s, s.unit(t), s.unit(t + 1), X, s.C(l), h, nullptr,
                    layer.w2.data(), {}, nullptr, scratch[t]);
      });
    }
    const int64_t all = s.N * image_out;
    if (tail)
      parallel(pool, s.T, [&](int t) {
        finish(s, all * t / s.T, all * (t + 1) / s.T, X, *tail, out, scratch[t]);
      });
    return;
  }
  const int64_t fit = TURN / (4 * image * s.Ct);
  const int turn = std::max(1, (int)std::min<int64_t>(fit, (s.N + threads - 1) / threads));
  // A block with only these images, so that it only allocates memory for them.
  const Block one(turn, s.H, s.W, s.C0, s.L, s.G, s.plain ? 0 : s.M, 1);
  parallel(pool, (s.N + turn - 1) / turn, [&](int i) {
    thread_local Aligned<float> scratch, features, hidden;
    const int64_t first = (int64_t)i * turn, count = std::min<int64_t>(turn, s.N - first);
    float* to = out + first * image_out * channels;
    float* X = tail ? room(features, one.P * s.Ct) : to;
    float* h = room(hidden, s.plain ? 0 : one.P * s.M);
    const float* in = x + first * image * s.C0;
    for (int64_t p = 0; p < count * image; ++p)
      std::memcpy(X + p * s.Ct, in + p * s.C0, sizeof(float) * s.C0);
    for (int l = 0; l < s.L; ++l) {
      const EvalLayer& layer = layers[l];
      if (s.plain) {
        forward_plain(one, 0, count * one.bands, X, s.C(l), layer.f1, layer.w1, {},
                      nullptr, scratch);
        continue;
      }
      forward_1x1(one, 0, count * image, X, s.C(l), layer.f1, layer.w1, &layer.f2, h,
                  nullptr, scratch);
      forward_3x3(one, 0, count * one.bands, X, s.C(l), h, nullptr, layer.w2.data(),
                  {}, nullptr, scratch);
    }
    if (tail) finish(one, 0, count * image_out, X, *tail, to, scratch);
  });
}

// x, then per layer scale1, bias1, w1, scale2, bias2, w2, mean1, var1, mean2, var2,
// without bottleneck scale1, bias1, w, mean1, var1 -> X [N, H, W, Ct]
ffi::Error ForwardEval(ffi::ThreadPool pool, float epsilon, FL x,
                       ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> X) {
  const auto d = x.dimensions(), kernel = args.get<FL>(2)->dimensions();
  const bool plain = kernel[0] == 3;
  const int stride = plain ? 5 : 10, L = (int)args.size() / stride;
  const int G = (int)(X->dimensions()[3] - d[3]) / L, M = plain ? 0 : (int)kernel[3];
  const int threads = pool.num_threads();
  const Block s(d[0], d[1], d[2], d[3], L, G, M, threads);
  if (ffi::Error error = check(s); error.failure()) return error;
  std::vector<EvalLayer> layers(L);
  const std::vector<Parameters> weights = parameters_of(args, L, stride, s.plain);
  parallel(pool, L, [&](int l) {
    const Parameters& w = weights[l];
    auto at = [&](int i) {
      return args.get<FL>(l * stride + i)->typed_data();
    };
    const int first = plain ? 3 : 6;
    EvalLayer& layer = layers[l];
    layer.f1.from(w.scale1, w.bias1, at(first), at(first + 1), s.C(l), epsilon);
    layer.w1.pack(Front(plain, s.C(l), G, w.w1).w, s.C(l), s.M, s.M, false);
    if (plain) return;
    layer.f2.from(w.scale2, w.bias2, at(8), at(9), M, epsilon);
    layer.w2 = pack_3x3(s, w.w2, false);
  });
  forward_eval(s, pool, threads, x.typed_data(), layers, nullptr, X->typed_data());
  return ffi::Error::Success();
}

// x and `packed`: per layer norm1, w1, bias2 and the nine taps of w2, then the tail's
// norm and weights -> [N, H/2, W/2, F], with features = 0 [N, H, W, Ct]
ffi::Error ForwardPacked(ffi::ThreadPool pool, int64_t layers_, int64_t bottleneck,
                         int64_t growth, int64_t features, FL x,
                         FL packed,
                         ffi::ResultBuffer<ffi::F32> out) {
  const auto d = x.dimensions();
  const int L = (int)layers_, M = (int)bottleneck, G = (int)growth;
  const int threads = pool.num_threads();
  const Block s(d[0], d[1], d[2], d[3], L, G, M, threads);
  if (ffi::Error error = check(s); error.failure()) return error;
  std::vector<EvalLayer> layers(L);
  Packed from{packed.typed_data()};
  for (int l = 0; l < L; ++l) {
    EvalLayer& layer = layers[l];
    from.norm(s.C(l), layer.f1);
    from.panels(s.C(l), M, layer.w1);
    from.bias(M, layer.f2);
    layer.w2.resize(9);
    for (Panels& tap : layer.w2) from.panels(M, G, tap);
  }
  Tail tail;
  tail.F = (int)features;
  from.norm(s.Ct, tail.f);
  if (tail.F) from.panels(s.Ct, tail.F, tail.w);
  if (!from.ends(packed))
    return ffi::Error::InvalidArgument("dense block: packed by other rules");
  forward_eval(s, pool, threads, x.typed_data(), layers, &tail, out->typed_data());
  return ffi::Error::Success();
}

// Threefry-2x32 of 20 rounds (Salmon et al., 2011), of VL counters: both words, xored.
typedef uint32_t VU32 __attribute__((vector_size(VL * 4)));
inline VU32 random_bits(uint32_t k0, uint32_t k1, VU32 x0, VU32 x1) {
  const uint32_t keys[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  constexpr int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  x0 += keys[0], x1 += keys[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int r : turns[i % 2]) {
      x0 += x1;
      x1 = (x1 << r | x1 >> (32 - r)) ^ x0;
    }
    x0 += keys[(i + 1) % 3];
    x1 += keys[(i + 2) % 3] + i + 1;
  }
  return x0 ^ x1;
}

// keys [L, 2], place [1] -> mask [L, N, ...]: where jax.random.uniform of a key is at
// least `rate`, of the rows from N * place on.
ffi::Error DropoutMask(ffi::ThreadPool pool, float rate, ffi::Buffer<ffi::U32> keys,
                       ffi::Buffer<ffi::U32> place, ffi::ResultBuffer<ffi::U8> mask) {
  const int64_t L = keys.dimensions()[0], each = (int64_t)mask->element_count() / L;
  const int64_t before = each * place.typed_data()[0];
  constexpr int64_t kPart = 1 << 14;
  const int64_t parts = (each + kPart - 1) / kPart;
  parallel(pool, (int)(L * parts), [&](int i) {
    const uint32_t* key = keys.typed_data() + i / parts * 2;
    uint8_t* to = mask->typed_data() + i / parts * each;
    const int64_t first = i % parts * kPart, last = std::min(each, first + kPart);
    VU32 lane;
    for (int v = 0; v < VL; ++v) lane[v] = v;
    for (int64_t at = first; at < last; at += VL) {
      // The high words of all lanes; the low words may overflow.
      const VU32 low = (uint32_t)(before + at) + lane;
      VU32 high = VU32{} + (uint32_t)((before + at) >> 32);
      high -= (VU32)(low < (uint32_t)(before + at));
      const VU32 bits = random_bits(key[0], key[1], high, low);
      const VU32 unit = bits >> 9 | 0x3f800000u;
      V value;
      std::memcpy(&value, &unit, sizeof value);
      store_index(to + at, (value - 1.0f >= V{} + rate) & 1,
                  (int)std::min<int64_t>(VL, last - at));
    }
  });
  return ffi::Error::Success();
}

// -> [1], a different number each time, for a call from several devices.
ffi::Error Number(ffi::ResultBuffer<ffi::U32> number) {
  static std::atomic<uint32_t> last{0};
  number->typed_data()[0] = ++last;
  return ffi::Error::Success();
}

}  // namespace

FD_HANDLER(DenseBlockForwardTrain, ForwardTrain, "epsilon", "rate");
FD_HANDLER(DenseBlockForwardEval, ForwardEval, "epsilon");
FD_HANDLER(DenseBlockForwardPacked, ForwardPacked, FD_BLOCK_SIZES);
FD_HANDLER(DropoutKeep, DropoutMask, "rate");
FD_HANDLER(CallNumber, Number);

FD_TOGETHER(DenseBlockForwardTrain);

// Columns in a panel and floats in a vector register, used by packed_inference.py.
extern "C" const int flax_densenet_panel[2] = {NR, VL};
