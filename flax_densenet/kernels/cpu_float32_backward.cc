// The dense block in float32, backward.

#include "cpu_float32.h"
#include "cpu_together.h"

namespace {

// The gradient of the layer's new channels, including the part through their statistics.
struct NewGradient {
  const float *X, *gX;
  std::vector<float> k0, k1, mean;
  Drop drop;
  int C, Ct;
  NewGradient(const Block& s, const float* x, const float* g, int first, int count,
              const std::vector<double>& gm, const std::vector<double>& gv,
              const float* means, const Drop& dropped)
      : X(x), gX(g), mean(means + first, means + first + count), drop(dropped),
        C(first), Ct(s.Ct) {
    for (int c = first; c < first + count; ++c) {
      k0.push_back((float)(gm[c] / s.P));
      k1.push_back((float)(2 * gv[c] / s.P));
    }
  }
  V at(int64_t p, int c, int lanes) const {
    const V x = load(X + p * Ct + C + c, lanes);
    const V g = load(gX + p * Ct + C + c, lanes) + load(&k0[c], lanes) +
                load(&k1[c], lanes) * (x - load(&mean[c], lanes));
    return dropped(g, drop, p, c, lanes);
  }
};

// Back through the 3x3 and norm2's ReLU: dz [P, M], the sums over it, dw [9, M, G].
void backward_3x3(const Block& s, int t, const NewGradient& g, const float* h,
                  const Affine& f2, const std::vector<Panels>& w2t, float* dz,
                  Sums& sums, Aligned<float>& scratch) {
  const int line = s.W + 2, n16 = up(s.G, VL), m8 = up(s.M, MW);
  const size_t zsize = (size_t)s.padded_rows() * s.wm;
  const size_t gsize = (size_t)s.padded_rows() * s.wg;
  scratch.assign(zsize + gsize + (size_t)MR * s.wm, 0.0f);
  float *z = scratch.data(), *dg = z + zsize, *c = dg + gsize;
  sums.reset((size_t)9 * m8 * n16, s.M);
  const Product product = rows_of(s.wg), outer = columns_of(s.wm);
  std::vector<float> a1(s.wm), a2(s.wm);
  for (int u = s.unit(t); u < s.unit(t + 1); ++u) {
    load_z(s, u, h, &f2, z);
    load_band(s, u, s.wg, dg, [&](float* out, int64_t p) {
      for (int k = 0; k < s.G; k += VL)
        store(out + k, g.at(p, k, std::min(VL, s.G - k)), std::min(VL, s.wg - k));
    });
    const int n = u / s.bands, r0 = u % s.bands * s.rb;
    const int count = std::min(s.H, r0 + s.rb) - r0;
    const int64_t p0 = ((int64_t)n * s.H + r0) * s.W;
    // dw[tap] += z(pixel + tap)^T dg(pixel), over the band's own rows; dg is zero in
    // the border. Tap (1, 1) is the pixel itself.
    const int first = line, last = (count + 1) * line;
    for (int q = first; q < last; q += KP)
      for (int tap = 0; tap < 9; ++tap) {
        const float* zt = z + (int64_t)(q + (tap / 3 - 1) * line + tap % 3 - 1) * s.wm;
        for (int i = 0; i < s.M; i += MW)
          for (int j = 0; j < n16; j += NR) {
            // The very first pixel of the border has no left neighbor in the band.
            int skip = q == first && tap == 0 ? 1 : 0;
            outer(std::min(NR, n16 - j) / VL, std::min(KP, last - q) - skip,
                  zt + (size_t)skip * s.wm + i, dg + (size_t)(q + skip) * s.wg + j,
                  s.wg, sums.dw.data() + ((size_t)tap * m8 + i) * n16 + j, n16, true);
          }
      }
    // dz(pixel) = sum over taps of dg(pixel + tap) w2[8 - tap]^T
    std::fill(a1.begin(), a1.end(), 0.0f);
    std::fill(a2.begin(), a2.end(), 0.0f);
    for (int q = 0; q < count * line; q += MR) {
      for (int j = 0; j < w2t[0].n; j += NR) {
        const int wide = w2t[0].wide(j);
        for (int tap = 0; tap < 9; ++tap)
          product(wide / VL, s.G, dg + (size_t)(q + tap / 3 * line + tap % 3) * s.wg,
                  w2t[tap].at(j), wide, c + j, s.wm, tap > 0);
      }
      for (int r = 0; r < MR && q + r < count * line; ++r) {
        const int x = (q + r) % line;
        if (x >= s.W) continue;
        const int64_t p = p0 + (q + r) / line * s.W + x;
        const float* zp = z + (size_t)(q + r + line + 1) * s.wm;
        for (int k = 0; k < s.M; k += VL) {
          const int lanes = std::min(VL, s.M - k);
          const V zero = {};
          const V d = load(zp + k) > zero ? load(c + r * s.wm + k) : zero;
          const V e = load(h + p * s.M + k, lanes) - load(&f2.mean[k], lanes);
          store(&a1[k], load(&a1[k]) + d);
          store(&a2[k], load(&a2[k]) + d * e);
          store(dz + p * s.M + k, d, lanes);
        }
      }
    }
    for (int k = 0; k < s.M; ++k) sums.s1[k] += a1[k], sums.s2[k] += a2[k];
  }
}

// Back through norm2, for `n` pixels: the gradient of the 1x1's output to rows of wm.
void gradient_of_hidden(const Block& s, int64_t p, int n, const float* dz,
                        const float* h, const Affine& f2, const std::vector<float>& e0,
                        const std::vector<float>& e1, float* dh) {
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < s.M; k += VL) {
      const int lanes = std::min(VL, s.M - k);
      const int64_t at = (p + i) * s.M + k;
      const V e = load(h + at, lanes) - load(&f2.mean[k], lanes);
      store(dh + (size_t)i * s.wm + k,
            load(&f2.a[k], lanes) * load(dz + at, lanes) - load(&e0[k], lanes) -
                load(&e1[k], lanes) * e,
            std::min(VL, s.wm - k));
    }
}

// Without bottleneck: the new channels' gradient dg [P, G] around each of `n` pixels.
// What is stored beyond a tap's G is overwritten by the next tap or the next row.
void gradient_of_taps(const Block& s, int64_t p, int n, const float* dg, float* dh) {
  int x = (int)(p % s.W), y = (int)(p / s.W % s.H);
  for (int i = 0; i < n; ++i, ++p, dh += s.wm) {
    for (int tap = 0; tap < 9; ++tap) {
      const int dy = 1 - tap / 3, dx = 1 - tap % 3;
      const bool inside = y + dy >= 0 && y + dy < s.H && x + dx >= 0 && x + dx < s.W;
      const float* from = dg + (p + dy * s.W + dx) * s.G;
      for (int g = 0; g < s.G; g += VL)
        store(dh + tap * s.G + g, inside ? load(from + g, std::min(VL, s.G - g)) : V{});
    }
    if (++x == s.W) x = 0, y = y + 1 == s.H ? 0 : y + 1;
  }
}

// Back through the product in front and norm1's ReLU: added to gX, with dw [M, C].
// fill(p, n, dh) writes the gradient of the product of `n` pixels.
template <class F>
void backward_front(const Block& s, int t, const float* X, float* gX, int C,
                    const Affine& f1, const Panels& w1t, Sums& sums,
                    Aligned<float>& scratch, F fill) {
  const int nc = up(C, VL);
  const size_t ysize = tile_size(C);
  scratch.assign(ysize + (size_t)PT * s.wm + (size_t)PT * NR, 0.0f);
  float *y = scratch.data(), *dh = y + ysize, *c = dh + (size_t)PT * s.wm;
  sums.reset((size_t)up(s.M, MW) * nc, C);
  const Product product = rows_of(s.wm), outer = columns_of(s.wm);
  for (int64_t p = s.pixel(t); p < s.pixel(t + 1); p += PT) {
    const int n = (int)std::min<int64_t>(PT, s.pixel(t + 1) - p);
    load_tile(s, X, p, n, C, f1, y);
    fill(p, n, dh);
    // Transposed, so that a panel of y stays in L1 while all of dh is read.
    for (int j = 0; j < nc; j += NR)
      for (int i = 0; i < s.M; i += MW)
        outer(std::min(NR, nc - j) / VL, n, dh + i,
              y + (size_t)(j / KC) * PT * KC + j % KC, KC,
              sums.dw.data() + (size_t)i * nc + j, nc, true);
    for (int j = 0; j < w1t.n; j += NR) {
      const int wide = w1t.wide(j);
      for (int i = 0; i < n; i += MR)
        product(wide / VL, s.M, dh + (size_t)i * s.wm, w1t.at(j), wide,
                c + (size_t)i * NR, NR, false);
      for (int v = 0; v < wide && j + v < C; v += VL) {
        const int lanes = std::min(VL, C - j - v), k = j + v;
        const V a = load(&f1.a[k], lanes), mean = load(&f1.mean[k], lanes), zero = {};
        V s1 = {}, s2 = {};
        const float* yk = y + (size_t)(k / KC) * PT * KC + k % KC;
        for (int i = 0; i < n; ++i) {
          const V d = load(yk + (size_t)i * KC) > zero ? load(c + i * NR + v) : zero;
          const int64_t at = (p + i) * s.Ct + k;
          s1 += d;
          s2 += d * (load(X + at, lanes) - mean);
          store(gX + at, load(gX + at, lanes) + a * d, lanes);
        }
        for (int i = 0; i < lanes; ++i) sums.s1[k + i] += s1[i], sums.s2[k + i] += s2[i];
      }
    }
  }
}

// Back through one layer without bottleneck; dg is room for [P, G].
void backward_plain(const Block& s, ffi::ThreadPool& pool, const float* X, float* gX,
                    int C, const NewGradient& fresh, const Affine& f1, const Panels& w1t,
                    float* dg, std::vector<Sums>& sums,
                    std::vector<Aligned<float>>& scratch) {
  parallel(pool, s.T, [&](int t) {
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); ++p)
      for (int g = 0; g < s.G; g += VL) {
        const int lanes = std::min(VL, s.G - g);
        store(dg + p * s.G + g, fresh.at(p, g, lanes), lanes);
      }
  });
  parallel(pool, s.T, [&](int t) {
    backward_front(s, t, X, gX, C, f1, w1t, sums[t], scratch[t],
                   [&](int64_t p, int n, float* dh) {
                     gradient_of_taps(s, p, n, dg, dh);
                   });
  });
}

// X, mean, var, h, mean2, var2, mask, images, gX, gmean, gvar, then the layers' weights
// as forward -> gx [N, H, W, C0], room for gX and for one layer's dz [P, M] (without
// bottleneck dg [P, G]), then per layer dscale1, dbias1, dw1, dscale2, dbias2, dw2
ffi::Error Backward(ffi::ThreadPool pool, float epsilon, float rate,
                    FL X,
                    FL mean, FL var,
                    FL h, FL mean2,
                    FL var2, U8 mask,
                    FL images, FL gX,
                    FL gmean, FL gvar,
                    ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> gx,
                    ffi::ResultBuffer<ffi::F32> work, ffi::ResultBuffer<ffi::F32> dz,
                    ffi::RemainingRets rets) {
  const auto d = gx->dimensions();
  const int L = (int)mean2.dimensions()[0], M = (int)mean2.dimensions()[1];
  const int G = (int)(X.dimensions()[3] - d[3]) / L;
  const Block s(d[0], d[1], d[2], d[3], L, G, M, pool.num_threads());
  if (ffi::Error error = check(s); error.failure()) return error;
  const float* x = X.typed_data();
  float* g = work->typed_data();
  parallel(pool, s.T, [&](int t) {
    const int64_t a = s.pixel(t) * s.Ct, b = s.pixel(t + 1) * s.Ct;
    std::memcpy(g + a, gX.typed_data() + a, sizeof(float) * (b - a));
  });
  // Gradients with respect to the shared statistics, added up over the layers.
  std::vector<double> gm(gmean.typed_data(), gmean.typed_data() + s.Ct);
  std::vector<double> gv(gvar.typed_data(), gvar.typed_data() + s.Ct);
  std::vector<Aligned<float>> scratch(s.T);
  std::vector<Sums> sums(s.T);
  const float *m = mean.typed_data(), *v = var.typed_data();
  const int stride = s.plain ? 3 : 6;
  const std::vector<Parameters> weights = parameters_of(args, L, stride, s.plain);
  for (int l = L - 1; l >= 0; --l) {
    const Parameters& w = weights[l];
    const int C = s.C(l), nc = up(C, VL);
    auto out = [&](int i) {
      return (*rets.get<FL>(l * stride + i))->typed_data();
    };
    Affine f1;
    f1.from(w.scale1, w.bias1, m, v, C, epsilon);
    const NewGradient fresh(s, x, g, C, G, gm, gv, m, Drop(s, l, rate, mask, images));
    Panels w1t;
    w1t.pack(Front(s.plain, C, G, w.w1).w, s.M, C, s.M, true);
    if (s.plain) {
      backward_plain(s, pool, x, g, C, fresh, f1, w1t, dz->typed_data(), sums, scratch);
    } else {
      const float* hl = h.typed_data() + (int64_t)l * s.P * M;
      Affine f2;
      f2.from(w.scale2, w.bias2, mean2.typed_data() + l * M, var2.typed_data() + l * M,
              M, epsilon);
      const std::vector<Panels> w2t = pack_3x3(s, w.w2, true);
      parallel(pool, s.T, [&](int t) {
        backward_3x3(s, t, fresh, hl, f2, w2t, dz->typed_data(), sums[t], scratch[t]);
      });
      add_parts(sums);
      const int n16 = up(G, VL), m8 = up(M, MW);
      for (int tap = 0; tap < 9; ++tap)
        for (int i = 0; i < M; ++i)
          std::memcpy(out(5) + ((size_t)tap * M + i) * G,
                      sums[0].dw.data() + ((size_t)tap * m8 + i) * n16, 4 * G);
      std::vector<float> e0(M), e1(M);
      for (int k = 0; k < M; ++k) {
        const double s1 = sums[0].s1[k], s2 = sums[0].s2[k], r = f2.rstd[k];
        out(3)[k] = (float)(s2 * r);
        out(4)[k] = (float)s1;
        e0[k] = (float)(f2.a[k] * s1 / s.P);
        e1[k] = (float)(f2.a[k] * r * r * s2 / s.P);
      }
      parallel(pool, s.T, [&](int t) {
        backward_front(s, t, x, g, C, f1, w1t, sums[t], scratch[t],
                       [&](int64_t p, int n, float* dh) {
                         gradient_of_hidden(s, p, n, dz->typed_data(), hl, f2, e0, e1, dh);
                       });
      });
    }
    add_parts(sums);
    float* dw1 = out(2);  // [C, M], or [9, C, G]
    const int taps = s.plain ? 9 : 1, each = s.M / taps;
    parallel(pool, s.T, [&](int t) {
      for (int tap = 0; tap < taps; ++tap)
        for (int i = C * t / s.T; i < C * (t + 1) / s.T; ++i)
          for (int k = 0; k < each; ++k)
            dw1[((size_t)tap * C + i) * each + k] =
                sums[0].dw[(size_t)(tap * each + k) * nc + i];
    });
    back_through_norm1(sums[0], f1, w.scale1, C, out(0), out(1), gm, gv);
  }
  const NewGradient input(s, x, g, 0, s.C0, gm, gv, m, {});
  parallel(pool, s.T, [&](int t) {
    for (int64_t p = s.pixel(t); p < s.pixel(t + 1); ++p)
      for (int c = 0; c < s.C0; c += VL) {
        const int lanes = std::min(VL, s.C0 - c);
        store(gx->typed_data() + p * s.C0 + c, input.at(p, c, lanes), lanes);
      }
  });
  return ffi::Error::Success();
}

}  // namespace

FD_HANDLER(DenseBlockBackward, Backward, "epsilon", "rate");

FD_TOGETHER(DenseBlockBackward);
