// The layers of RDNet in float32; see cpu_rdnet.h.

#include "cpu_float32.h"
#include "cpu_rdnet_handlers.h"

namespace {

struct Float32 {
  typedef float T;
  static constexpr ffi::DataType TYPE = ffi::F32;
  static constexpr bool KEEPS_HIDDEN = true;
  struct Config {
    Config() {}
  };
  struct Products {};

  static FD_INLINE Pair load(const float* p) { return load_pair(p); }
  static FD_INLINE void store(float* p, Pair v) { store_pair(p, v); }
  static FD_INLINE Lanes load_lanes(const float* p) { return ::load_lanes(p); }
  static FD_INLINE void store_lanes(float* p, Lanes v, int n) {
    if (n >= DL) return ::store_lanes(p, v);
    std::memcpy(p, &v, sizeof(float) * n);
  }
  static FD_INLINE Pair gelu(Pair v) {
    return {v.low * (normal(v.low) + 0.5f), v.high * (normal(v.high) + 0.5f)};
  }
  static FD_INLINE R slope_of(R x) { return normal(x) + 0.5f + x * density(x); }
  static FD_INLINE Pair gelu_slope(Pair v) { return {slope_of(v.low), slope_of(v.high)}; }

  // w[k * rs + n * cs] -> 32 rows of 32 columns
  static void pack(const float* w, int64_t rs, int64_t cs, int rows, int columns,
                   float* out) {
    if (rows < WIDE || columns < WIDE) std::memset(out, 0, sizeof(float) * WIDE * WIDE);
    if (cs == 1) {
      for (int k = 0; k < rows; ++k)
        std::memcpy(out + k * WIDE, w + k * rs, sizeof(float) * columns);
      return;
    }
    for (int n = 0; n < columns; ++n)
      for (int k = 0; k < rows; ++k) out[k * WIDE + n] = w[k * rs + n * cs];
  }

  template <class Put>
  static FD_INLINE void product(Products&, const float* x, int ld, int pixels, int chunks,
                                const float* w, int panels, float* sums, Put put) {
    for (int j = 0; j < panels; ++j, w += (size_t)chunks * WIDE * WIDE)
      for (int i = 0; i < pixels; i += MR) {
        for (int v = 0; v < WIDE; v += NR)
          rows_times(chunks, x + (size_t)i * WIDE, (size_t)ld * WIDE, w + v, sums + v);
        put(j, i, std::min(MR, pixels - i), sums);
      }
  }

  struct Outer {
    static constexpr int PIXELS = 128;
    // out [left chunks * 32, right chunks * 32] += left^T right
    void add(float* left, int lefts, float* right, int rights, int ld, int pixels,
             float* out, float*) {
      const size_t next = (size_t)ld * WIDE;
      const int width = rights * WIDE;
      // So many pixels at a time that they stay in L1.
      const int blocks = std::max(1, pixels / PIXELS), step = (pixels + blocks - 1) / blocks;
      for (int p = 0; p < pixels; p += step)
        for (int j = 0; j < width; j += NR)
          for (int i = 0; i < lefts * WIDE; i += MW)
            micro<MW, NR / VL, 1, WIDE>(
                std::min(step, pixels - p),
                left + i / WIDE * next + (size_t)p * WIDE + i % WIDE,
                right + j / WIDE * next + (size_t)p * WIDE + j % WIDE, WIDE,
                out + (size_t)i * width + j, width, true);
    }
  };

 private:
  // Not inlined, so that the sums stay in registers.
  static __attribute__((noinline)) void rows_times(int chunks, const float* x, size_t next,
                                                   const float* w, float* out) {
    constexpr int NV = NR / VL;
    V sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) sum[i][j] = V{};
    for (int k = 0; k < chunks; ++k, x += next, w += WIDE * WIDE)
      accumulate<MR, NV, WIDE, 1>(sum, WIDE, x, w, WIDE);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) ::store(out + i * WIDE + j * VL, sum[i][j]);
  }
};

}  // namespace

FLAX_DENSENET_RDNET(Float32, );
