// Products of bfloat16 matrices with float32 sums, for all kinds of processors.
//
// All paths read the same layout. A consists of rows of 32 values with any stride, with 16
// rows in a tile. B consists of tiles of 32 x 16, stored as 16 rows of 16 pairs: row r
// holds rows 2r and 2r + 1 of the matrix, interleaved. A product sums several steps of
// K = 32 and yields 16 or 32 rows of 16 or 32 float32 sums.
//
// The path is chosen when the library is first used: AMX tiles, AVX512-BF16, or plain
// loops that widen to float32. `emulated` runs the code for tiles over plain loops, so
// that it can be tested on any machine.

#ifndef FLAX_DENSENET_CPU_BF16_H_
#define FLAX_DENSENET_CPU_BF16_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu_layers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef uint16_t bf16;
constexpr int ROWS = 16, DEPTH = 32, COLUMNS = 16;  // of a tile
constexpr int TILE = DEPTH * COLUMNS;               // values of a tile

typedef float F __attribute__((vector_size(64)));
typedef float FU __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint32_t UU __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t H __attribute__((vector_size(32)));
typedef uint16_t HU __attribute__((vector_size(32), aligned(2), may_alias));
typedef int16_t S __attribute__((vector_size(64)));
typedef int16_t SU __attribute__((vector_size(64), aligned(2), may_alias));

FD_INLINE F load(const float* p) { return *reinterpret_cast<const FU*>(p); }
FD_INLINE void store(float* p, F v) { *reinterpret_cast<FU*>(p) = v; }

// 16 values, exactly.
FD_INLINE F widen(const bf16* p) {
  const U bits = __builtin_convertvector(*reinterpret_cast<const HU*>(p), U) << 16;
  F v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// 32 values, rounded to the nearest, ties to even.
FD_INLINE S narrow(F low, F high) {
  S out;
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  const auto both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  std::memcpy(&out, &both, sizeof out);
#else
  for (int i = 0; i < 2; ++i) {
    const F v = i ? high : low;
    U bits;
    std::memcpy(&bits, &v, sizeof bits);
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U nan = (bits >> 16) | 0x40;
    const auto number = v == v;
    const H half = __builtin_convertvector(number ? rounded : nan, H);
    std::memcpy(reinterpret_cast<char*>(&out) + 32 * i, &half, 32);
  }
#endif
  return out;
}
FD_INLINE void store(bf16* p, S v) { *reinterpret_cast<SU*>(p) = v; }

// The sign bit of a negative number is also that of an integer.
FD_INLINE S relu(S v) {
  const S zero = {};
  return v > zero ? v : zero;
}

FD_INLINE int up(int n, int m) { return (n + m - 1) / m * m; }
FD_INLINE int steps_of(int n) { return (n + DEPTH - 1) / DEPTH; }

// One product: `steps` times A [16 * MT, 32] B [32, 16 * NT], added up.
struct Product {
  const bf16* a;
  const int32_t* offsets;  // of each step's A, in values
  int64_t stride;          // bytes from a row of A to the next
  const bf16* b;           // [steps][NT][TILE]
  int steps;
  float* out;
  int width;  // floats from a row of the sums to the next
};

// Eight registers of 16 rows of 64 bytes, in the processor...
struct Tiles {
#if defined(__x86_64__)
  template <int T>
  static FD_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static FD_INLINE void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T)
                 : "memory");
  }
  template <int T>
  static FD_INLINE void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T)
                 : "memory");
  }
  template <int C, int A, int B>
  static FD_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
#endif
};

FD_INLINE float widen_one(bf16 v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// ... and in memory.
struct EmulatedTiles {
  static unsigned char* tile(int t) {
    static thread_local unsigned char tiles[8][ROWS * 64];
    return tiles[t];
  }
  template <int T>
  static void zero() {
    std::memset(tile(T), 0, ROWS * 64);
  }
  template <int T>
  static void load(const void* p, int64_t stride) {
    for (int r = 0; r < ROWS; ++r)
      std::memcpy(tile(T) + r * 64, (const char*)p + r * stride, 64);
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    for (int r = 0; r < ROWS; ++r)
      std::memcpy((char*)p + r * stride, tile(T) + r * 64, 64);
  }
  template <int C, int A, int B>
  static void dot() {
    float* c = (float*)tile(C);
    const bf16 *a = (const bf16*)tile(A), *b = (const bf16*)tile(B);
    for (int i = 0; i < ROWS; ++i)
      for (int r = 0; r < DEPTH; ++r) {
        const float x = widen_one(a[i * DEPTH + r]);
        for (int j = 0; j < COLUMNS; ++j)
          c[i * COLUMNS + j] += x * widen_one(b[(r / 2 * COLUMNS + j) * 2 + r % 2]);
      }
  }
};

template <class T, int MT, int NT>
FD_INLINE void multiply_tiles(const Product& p) {
  T::template zero<0>();
  if (NT > 1) T::template zero<1>();
  if (MT > 1) T::template zero<2>();
  if (MT > 1 && NT > 1) T::template zero<3>();
  const bf16* b = p.b;
  for (int s = 0; s < p.steps; ++s, b += NT * TILE) {
    const char* a = (const char*)(p.a + p.offsets[s]);
    T::template load<6>(b, 64);
    T::template load<4>(a, p.stride);
    T::template dot<0, 4, 6>();
    if (MT > 1) {
      T::template load<5>(a + ROWS * p.stride, p.stride);
      T::template dot<2, 5, 6>();
    }
    if (NT > 1) {
      T::template load<7>(b + TILE, 64);
      T::template dot<1, 4, 7>();
      if (MT > 1) T::template dot<3, 5, 7>();
    }
  }
  const int64_t row = 4 * p.width;
  T::template store<0>(p.out, row);
  if (NT > 1) T::template store<1>(p.out + COLUMNS, row);
  if (MT > 1) T::template store<2>(p.out + ROWS * p.width, row);
  if (MT > 1 && NT > 1) T::template store<3>(p.out + ROWS * p.width + COLUMNS, row);
}

constexpr int BLOCK = 8;  // rows of sums in registers, without tiles

#if defined(__x86_64__)
template <int MT, int NT>
__attribute__((target("amx-tile,amx-bf16"))) void multiply_amx(const Product& p) {
  multiply_tiles<Tiles, MT, NT>(p);
}

template <int MT, int NT>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void multiply_avx512(
    const Product& p) {
  for (int i = 0; i < MT * ROWS; i += BLOCK) {
    __m512 sum[BLOCK][NT];
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NT; ++j) sum[r][j] = _mm512_setzero_ps();
    const bf16* b = p.b;
    for (int s = 0; s < p.steps; ++s, b += NT * TILE) {
      const char* a = (const char*)(p.a + p.offsets[s]) + i * p.stride;
      for (int k = 0; k < DEPTH / 2; ++k) {
        __m512i w[NT];
#pragma GCC unroll 2
        for (int j = 0; j < NT; ++j)
          w[j] = _mm512_loadu_si512(b + j * TILE + k * 2 * COLUMNS);
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK; ++r) {
          int pair;
          std::memcpy(&pair, a + r * p.stride + k * 4, 4);
          const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
          for (int j = 0; j < NT; ++j)
            sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)x, (__m512bh)w[j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NT; ++j)
        _mm512_storeu_ps(p.out + (i + r) * p.width + j * COLUMNS, sum[r][j]);
  }
}
#endif

template <int MT, int NT>
void multiply_emulated(const Product& p) {
  multiply_tiles<EmulatedTiles, MT, NT>(p);
}

FD_INLINE F as_float(U bits) {
  F v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <int MT, int NT>
void multiply_portable(const Product& p) {
  for (int i = 0; i < MT * ROWS; i += BLOCK) {
    F sum[BLOCK][NT];
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NT; ++j) sum[r][j] = F{};
    const bf16* b = p.b;
    for (int s = 0; s < p.steps; ++s, b += NT * TILE) {
      const char* a = (const char*)(p.a + p.offsets[s]) + i * p.stride;
      for (int k = 0; k < DEPTH / 2; ++k) {
        F even[NT], odd[NT];
#pragma GCC unroll 2
        for (int j = 0; j < NT; ++j) {
          const U w =
              *reinterpret_cast<const UU*>(b + j * TILE + k * 2 * COLUMNS);
          even[j] = as_float(w << 16);
          odd[j] = as_float(w & 0xffff0000u);
        }
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK; ++r) {
          bf16 pair[2];
          std::memcpy(pair, a + r * p.stride + k * 4, 4);
          const float x = widen_one(pair[0]), y = widen_one(pair[1]);
#pragma GCC unroll 2
          for (int j = 0; j < NT; ++j) {
            sum[r][j] += x * even[j];
            sum[r][j] += y * odd[j];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NT; ++j)
        store(p.out + (i + r) * p.width + j * COLUMNS, sum[r][j]);
  }
}

// ---- what inference and training share

// Weights [steps][columns / 32][2][TILE], in panels of two tiles; the last panel has one
// tile if that is enough.
struct Weights {
  const bf16* data;
  int steps, tiles;
  int panels() const { return (tiles + 1) / 2; }
  int tiles_of(int panel) const { return std::min(2, tiles - 2 * panel); }
  const bf16* panel(int i) const { return data + (size_t)i * 2 * steps * TILE; }
};

// relu(x * a + b) of one chunk of `n` pixels.
FD_INLINE void normalize(const bf16* x, int n, const float* a, const float* b, bf16* y) {
  const F a0 = load(a), a1 = load(a + 16), b0 = load(b), b1 = load(b + 16);
  for (int i = 0; i < n; ++i, x += DEPTH, y += DEPTH)
    store(y, relu(narrow(widen(x) * a0 + b0, widen(x + 16) * a1 + b1)));
}

inline void store_part(bf16* to, S v, int n) {
  if (n >= DEPTH) {
    store(to, v);
  } else {
    std::memcpy(to, &v, sizeof(bf16) * n);
  }
}

// ---- which path

enum Path { AMX, AVX512, PORTABLE, EMULATED, PATHS };
constexpr const char* PATH_NAMES[PATHS] = {"amx", "avx512", "portable", "emulated"};

// Linux gives a process the registers of tiles if it asks.
inline bool amx_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

inline bool has_path(int path) {
  if (path == PORTABLE || path == EMULATED) return true;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (path == AMX)
    return (d >> 22 & 1) && (d >> 24 & 1) && (low >> 17 & 3) == 3 && amx_permitted();
  // AVX512F, BW and VL, and the registers of the operating system.
  const bool wide = (b >> 16 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
  if (!wide || (low & 0xe6) != 0xe6) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
  return false;
#endif
}

inline int choose_path() {
  const char* named = std::getenv("FLAX_DENSENET_BFLOAT16");
  for (int path = 0; named && path < PATHS; ++path)
    if (!std::strcmp(named, PATH_NAMES[path]) && has_path(path)) return path;
  return has_path(AMX) ? AMX : has_path(AVX512) ? AVX512 : PORTABLE;
}

inline int& current_path() {
  static int path = choose_path();
  return path;
}

typedef void (*Multiply)(const Product&);

// By tiles of rows and columns, each 1 or 2.
struct Multipliers {
  Multiply by[2][2];
  void operator()(const Product& p, int mt, int nt) const { by[mt - 1][nt - 1](p); }
};
#define FD_EACH(f) {{{f<1, 1>, f<1, 2>}, {f<2, 1>, f<2, 2>}}}

inline const Multipliers& multipliers() {
  static const Multipliers portable FD_EACH(multiply_portable);
  static const Multipliers emulated FD_EACH(multiply_emulated);
#if defined(__x86_64__)
  static const Multipliers amx FD_EACH(multiply_amx), avx512 FD_EACH(multiply_avx512);
  if (current_path() == AMX) return amx;
  if (current_path() == AVX512) return avx512;
#endif
  return current_path() == EMULATED ? emulated : portable;
}

// Sets up a thread's tiles as long as it lives.
struct TileConfig {
  bool used = current_path() == AMX;
  TileConfig() {
#if defined(__x86_64__)
    if (!used) return;
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes of a row
      config[48 + t] = ROWS;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
#endif
  }
  ~TileConfig() {
#if defined(__x86_64__)
    if (used) asm volatile("tilerelease");
#endif
  }
  TileConfig(const TileConfig&) = delete;
};

}  // namespace

// The path in use; -1 if the processor does not support the requested one.
#define FLAX_DENSENET_BFLOAT16_PATH                      \
  extern "C" int flax_densenet_bfloat16_path(int path) { \
    if (path >= 0) {                                     \
      if (path >= PATHS || !has_path(path)) return -1;   \
      current_path() = path;                             \
    }                                                    \
    return current_path();                               \
  }

#endif  // FLAX_DENSENET_CPU_BF16_H_
