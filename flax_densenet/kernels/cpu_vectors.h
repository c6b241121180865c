// 32 float32 values at a time, and the GELU.

#ifndef FLAX_DENSENET_CPU_VECTORS_H_
#define FLAX_DENSENET_CPU_VECTORS_H_

#include <cstdint>
#include <cstring>

#include "cpu_layers.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int WIDE = 32;  // channels of a chunk

typedef float R __attribute__((vector_size(64)));
typedef float RU __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(64)));

struct Pair {
  R low, high;
};
FD_INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
FD_INLINE Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
FD_INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
FD_INLINE Pair operator-(Pair a, float b) { return {a.low - b, a.high - b}; }
FD_INLINE Pair operator*(Pair a, float b) { return {a.low * b, a.high * b}; }

FD_INLINE Pair load_pair(const float* p) {
  const RU* from = reinterpret_cast<const RU*>(p);
  return {from[0], from[1]};
}
FD_INLINE void store_pair(float* p, Pair v) {
  RU* to = reinterpret_cast<RU*>(p);
  to[0] = v.low, to[1] = v.high;
}

FD_INLINE float total(Pair v) {
  const R sum = v.low + v.high;
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)sum);
#else
  float parts[16];
  std::memcpy(parts, &sum, sizeof parts);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
  return parts[0];
#endif
}

constexpr int padded(int n) { return (n + WIDE - 1) / WIDE * WIDE; }

FD_INLINE R limited(R x, float most) {
  const R high = R{} + most, low = -high;
  x = x > high ? high : x;
  return x < low ? low : x;
}

// The normal distribution minus 1/2, by the rational approximation of erf in Eigen and
// XLA: within 1e-7.
FD_INLINE R normal(R x) {
  const R z = limited(x * 0.70710678f, 4.0f), q = z * z;
  R above = R{} - 2.72614225801306e-10f;
  above = above * q + 2.77068142495902e-08f;
  above = above * q - 2.10102402082508e-06f;
  above = above * q - 5.69250639462346e-05f;
  above = above * q - 7.34990630326855e-04f;
  above = above * q - 2.95459980854025e-03f;
  above = above * q - 1.60960333262415e-02f;
  R below = R{} - 1.45660718464996e-05f;
  below = below * q - 2.13374055278905e-04f;
  below = below * q - 1.68282697438203e-03f;
  below = below * q - 7.37332916720468e-03f;
  below = below * q - 1.42647390514189e-02f;
  return z * above / below * 0.5f;
}

// exp(-x^2 / 2) / sqrt(2 pi), relative error 2e-7.
FD_INLINE R density(R x) {
  const R z = limited(x * x * -0.72134752f, 120.0f);  // log2(e) / 2
  const float round = 12582912.0f;                    // 1.5 * 2^23
  const R whole = (z + round) - round, f = z - whole;
  R y = R{} + 0.00134004417f;
  y = y * f + 0.00967604675f;
  y = y * f + 0.05550327190f;
  y = y * f + 0.24022107174f;
  y = y * f + 0.69314720672f;
  y = y * f + 1.00000007555f;
  I bits;
  std::memcpy(&bits, &y, sizeof bits);
  bits += __builtin_convertvector(whole, I) << 23;
  std::memcpy(&y, &bits, sizeof bits);
  return y * 0.39894228f;
}

// x * P(x^2) for polynomials fitted to the normal distribution minus 1/2 (within 1.4e-5)
// and to the derivative of the GELU minus 1/2 (within 1.9e-4): below the precision of
// bfloat16. At the limits, both are exactly 1/2.
FD_INLINE R rough_normal(R x) {
  const R z = limited(x, 4.2f), q = z * z;
  R y = R{} + 6.89602680514767e-11f;
  y = y * q - 6.311778655287981e-09f;
  y = y * q + 2.5551838689352735e-07f;
  y = y * q - 6.111603852332337e-06f;
  y = y * q + 9.790120384423062e-05f;
  y = y * q - 0.001132140401750803f;
  y = y * q + 0.009882154874503613f;
  y = y * q - 0.06642880290746689f;
  y = y * q + 0.39893433451652527f;
  return y * z;
}
FD_INLINE R rough_slope(R x) {
  const R z = limited(x, 4.4f), q = z * z;
  R y = R{} + 4.747056081555456e-10f;
  y = y * q - 4.715855084214127e-08f;
  y = y * q + 2.030193854807294e-06f;
  y = y * q - 4.99199413752649e-05f;
  y = y * q + 0.0007789350929670036f;
  y = y * q - 0.008098617196083069f;
  y = y * q + 0.05689436197280884f;
  y = y * q - 0.2630755305290222f;
  y = y * q + 0.7970466613769531f;
  return y * z;
}

}  // namespace

#endif  // FLAX_DENSENET_CPU_VECTORS_H_
