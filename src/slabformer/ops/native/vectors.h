// Vectors of floats in the compiler's own terms, as wide as the processor has them.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

namespace {

inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 24;  // floats a vector; vectors that sums may take
#elif defined(__AVX2__)
constexpr int WIDTH = 8, REGISTERS = 12;
#else
constexpr int WIDTH = 4, REGISTERS = 24;
#endif
using Vector = float __attribute__((vector_size(WIDTH * 4)));
using Unaligned = float __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
using Bits = uint32_t __attribute__((vector_size(WIDTH * 4)));
using Short = uint16_t __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline Vector load(const BFloat16* p) {
  return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Short*>(p), Bits) << 16);
}
inline void store(float* p, Vector x) { *reinterpret_cast<Unaligned*>(p) = x; }
inline void store(BFloat16* p, Vector x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Bits is_nan = reinterpret_cast<Bits>(x != x);
  *reinterpret_cast<Short*>(p) = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Short);
}
inline Vector relu(Vector x) { return x < 0.0f ? Vector{} : x; }  // NaN stays
inline float sum(Vector x) {
  using Four = float __attribute__((vector_size(16)));
  union {
    Vector whole;
    Four parts[WIDTH / 4];
  } split = {x};
  Four four = split.parts[0];
  for (int i = 1; i < WIDTH / 4; ++i) four += split.parts[i];
  return (four[0] + four[1]) + (four[2] + four[3]);
}

}  // namespace
