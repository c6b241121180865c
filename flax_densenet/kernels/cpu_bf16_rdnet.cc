// The layers of RDNet in bfloat16, with sums, norms and parameters in float32; see
// cpu_rdnet.h. The forward pass does not save the wide values inside a layer: computing
// them again takes no longer than reading them.

#include "cpu_bf16_training.h"
#include "cpu_rdnet_handlers.h"

namespace {

struct Bfloat16 {
  typedef bf16 T;
  static constexpr ffi::DataType TYPE = ffi::BF16;
  static constexpr bool KEEPS_HIDDEN = false;
  typedef TileConfig Config;
  typedef std::vector<int32_t> Products;  // the offsets of the chunks

  static FD_INLINE Pair load(const bf16* p) { return {widen(p), widen(p + 16)}; }
  static FD_INLINE void store(bf16* p, Pair v) { ::store(p, narrow(v.low, v.high)); }
  static FD_INLINE Lanes load_lanes(const bf16* p) {
#if defined(__AVX512F__)
    return widen(p);
#else
    float part[DL];
    for (int i = 0; i < DL; ++i) part[i] = widen_one(p[i]);
    return ::load_lanes(part);
#endif
  }
  static FD_INLINE void store_lanes(bf16* p, Lanes v, int n) {
    F wide = {};
    std::memcpy(&wide, &v, sizeof v);
    const S out = narrow(wide, wide);
    std::memcpy(p, &out, sizeof(bf16) * n);
  }
  static FD_INLINE Pair gelu(Pair v) {
    return {v.low * (rough_normal(v.low) + 0.5f), v.high * (rough_normal(v.high) + 0.5f)};
  }
  static FD_INLINE Pair gelu_slope(Pair v) {
    return {rough_slope(v.low) + 0.5f, rough_slope(v.high) + 0.5f};
  }

  // w[k * rs + n * cs] -> two tiles
  static void pack(const float* w, int64_t rs, int64_t cs, int rows, int columns,
                   bf16* out) {
    const bool transposed = cs != 1;
    const int lines = transposed ? columns : rows, length = transposed ? rows : columns;
    const int64_t stride = transposed ? cs : rs;
    alignas(64) bf16 patch[WIDE * WIDE];
    for (int i = 0; i < WIDE; ++i) {
      alignas(64) float line[WIDE] = {};
      if (i < lines) std::memcpy(line, w + i * stride, sizeof(float) * length);
      ::store(patch + i * WIDE, narrow(::load(line), ::load(line + 16)));
    }
    if (!transposed) return interleave_patch(patch, out);
    for (int half = 0; half < 2; ++half) {
      U v[16];
      std::memcpy(v, patch + half * 16 * WIDE, sizeof v);
      transpose(v);
      std::memcpy(out + half * TILE, v, sizeof v);
    }
  }

  template <class Put>
  static FD_INLINE void product(Products& offsets, const bf16* x, int ld, int pixels,
                                int chunks, const bf16* w, int panels, float* sums,
                                Put put) {
    const Multipliers& multiply = multipliers();
    offsets.resize(chunks);
    for (int k = 0; k < chunks; ++k) offsets[k] = k * ld * WIDE;
    for (int j = 0; j < panels; ++j, w += (size_t)chunks * 2 * TILE)
      for (int q = 0; q < pixels; q += PT) {
        const int count = std::min(PT, pixels - q);
        multiply({x + (size_t)q * WIDE, offsets.data(), 2 * WIDE, w, chunks, sums, WIDE},
                 count > ROWS ? 2 : 1, 2);
        put(j, q, count, sums);
      }
  }

  struct Outer {
    std::vector<bf16> columns, pairs;
    std::vector<int32_t> offsets;

    // out [left chunks * 32, right chunks * 32] += left^T right
    void add(bf16* left, int lefts, bf16* right, int rights, int ld, int pixels, float* out,
             float* sums) {
      const Multipliers& multiply = multipliers();
      const size_t next = (size_t)ld * WIDE;
      const int steps = steps_of(pixels), rest = steps * PT - pixels;
      const int64_t line = steps * PT + PT;  // no power of two
      const int width = rights * WIDE;
      bf16* a = room(columns, (size_t)lefts * WIDE * line);
      bf16* b = room(pairs, (size_t)steps * 2 * TILE);
      offsets.resize(steps);
      for (int i = 0; i < steps; ++i) offsets[i] = i * PT;
      for (int k = 0; k < lefts; ++k) {
        bf16* from = left + k * next;
        std::memset(from + (size_t)pixels * WIDE, 0, sizeof(bf16) * rest * WIDE);
        for (int i = 0; i < steps; ++i)
          transpose_patch(from + (size_t)i * PT * WIDE, a + k * WIDE * line + i * PT, line);
      }
      for (int j = 0; j < rights; ++j) {
        bf16* from = right + j * next;
        std::memset(from + (size_t)pixels * WIDE, 0, sizeof(bf16) * rest * WIDE);
        for (int i = 0; i < steps; ++i)
          interleave_patch(from + (size_t)i * PT * WIDE, b + (size_t)i * 2 * TILE);
        for (int k = 0; k < lefts; ++k) {
          multiply({a + k * WIDE * line, offsets.data(), 2 * line, b, steps, sums, WIDE}, 2,
                   2);
          add_sums(sums, out + (size_t)k * WIDE * width + j * WIDE, width);
        }
      }
    }
  };
};

}  // namespace

FLAX_DENSENET_RDNET(Bfloat16, Bfloat16);
FLAX_DENSENET_BFLOAT16_PATH
