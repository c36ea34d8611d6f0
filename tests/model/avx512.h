// AVX512 and AVX512-BF16 for processors that have none: included before all else, it makes the builds for them run
// wherever AVX2 and FMA do, slowly. What kernels write with GCC's operators is the compiler's to take apart; what they
// write with intrinsics is made here of halves of 256 bits. Compiled with -mno-avx512f behind a build's own flags, and,
// for bfloat16 products, with -DEMULATED_BF16. An intrinsic that is missing here does not compile.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// As the build's own flags would.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if defined(EMULATED_BF16)
#define __AVX512BF16__ 1
#endif

// Kernels keep a vector in a register by it; here there is none that would hold one.
#define asm(...)

namespace emulated {

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint32_t HalfBits __attribute__((vector_size(32)));

template <class Half, class Whole>
inline Half half(Whole x, int which) {
  Half y;
  memcpy(&y, (const char*)&x + which * sizeof y, sizeof y);
  return y;
}

template <class Whole, class Half>
inline Whole whole(Half low, Half high) {
  Whole x;
  memcpy(&x, &low, sizeof low);
  memcpy((char*)&x + sizeof low, &high, sizeof high);
  return x;
}

template <class T>
inline T loaded(const void* from) {
  T x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <class Operation>
inline __m512 floats(Operation operation, __m512 a, __m512 b) {
  return whole<__m512>(operation(half<__m256>(a, 0), half<__m256>(b, 0)),
                       operation(half<__m256>(a, 1), half<__m256>(b, 1)));
}

template <class Operation>
inline __m512i integers(Operation operation, __m512i a, __m512i b) {
  return whole<__m512i>(operation(half<__m256i>(a, 0), half<__m256i>(b, 0)),
                        operation(half<__m256i>(a, 1), half<__m256i>(b, 1)));
}

inline __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m512 fused(__m512 a, __m512 b, __m512 c) {
  return whole<__m512>(fused(half<__m256>(a, 0), half<__m256>(b, 0), half<__m256>(c, 0)),
                       fused(half<__m256>(a, 1), half<__m256>(b, 1), half<__m256>(c, 1)));
}

template <int KIND>
inline uint16_t compared(__m512 a, __m512 b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(half<__m256>(a, 0), half<__m256>(b, 0), KIND));
  return low | _mm256_movemask_ps(_mm256_cmp_ps(half<__m256>(a, 1), half<__m256>(b, 1), KIND)) << 8;
}

// --- AVX512-BF16, by Intel's manual

// Denormals count as zeros, and become zeros.
inline __m256 flushed(__m256 x) {
  const HalfBits bits = (HalfBits)x;
  return (__m256)((bits & 0x7f800000) ? bits : bits & 0x80000000);
}

// VDPBF16PS: of each pair the second is multiplied and added, then the first, each with one rounding.
inline __m256 dot(__m256 sums, __m256i a, __m256i b) {
  const HalfBits left = (HalfBits)a, right = (HalfBits)b;
  sums = flushed(fused(flushed((__m256)(left & 0xffff0000)), flushed((__m256)(right & 0xffff0000)), flushed(sums)));
  return flushed(fused(flushed((__m256)(left << 16)), flushed((__m256)(right << 16)), sums));
}
inline __m512 dot(__m512 sums, __m512i a, __m512i b) {
  return whole<__m512>(dot(half<__m256>(sums, 0), half<__m256i>(a, 0), half<__m256i>(b, 0)),
                       dot(half<__m256>(sums, 1), half<__m256i>(a, 1), half<__m256i>(b, 1)));
}

// VCVTNEPS2BF16: to the nearest, ties to even; a NaN keeps its upper bits and is made quiet.
inline __m256bh narrowed(__m512 x) {
  const Bits bits = (Bits)x, size = bits & 0x7fffffff;
  const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits upper = size > 0x7f800000 ? bits >> 16 | 0x40 : nearest;
  typedef uint16_t Shorts __attribute__((vector_size(32)));
  return loaded<__m256bh>(
      &(const Shorts&)__builtin_convertvector(size < 0x00800000 ? bits >> 16 & 0x8000 : upper, Shorts));
}

inline __m512i masked(uint32_t mask, const void* from) {
  uint16_t lanes[32] = {};
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) memcpy(lanes + i, (const uint16_t*)from + i, sizeof lanes[i]);
  return loaded<__m512i>(lanes);
}

inline __m512i widened(__m256i x) {
  typedef uint16_t Shorts __attribute__((vector_size(32)));
  return (__m512i) __builtin_convertvector((Shorts)x, Bits);
}

}  // namespace emulated

#define _mm512_setzero_ps() (__m512{})
#define _mm512_set1_ps(x) (__m512{} + (float)(x))
#define _mm512_set1_epi32(x) ((__m512i)(emulated::Bits{} + (uint32_t)(x)))
#define _mm512_loadu_ps(from) emulated::loaded<__m512>(from)
#define _mm512_load_ps(from) emulated::loaded<__m512>(from)
#define _mm512_loadu_si512(from) emulated::loaded<__m512i>(from)
#define _mm512_storeu_ps(to, x) (void)memcpy(to, &(const __m512&)(x), 64)
#define _mm512_store_ps(to, x) _mm512_storeu_ps(to, x)
#define _mm512_maskz_loadu_epi16(mask, from) emulated::masked(mask, from)
#define _mm512_add_ps(a, b) ((__m512)(a) + (__m512)(b))
#define _mm512_fmadd_ps(a, b, c) emulated::fused((__m512)(a), (__m512)(b), (__m512)(c))
#define _mm512_max_ps(a, b) emulated::floats([](__m256 one, __m256 other) { return _mm256_max_ps(one, other); }, a, b)
#define _mm512_min_ps(a, b) emulated::floats([](__m256 one, __m256 other) { return _mm256_min_ps(one, other); }, a, b)
#define _mm512_cmp_ps_mask(a, b, kind) emulated::compared<kind>(a, b)
#define _mm512_and_si512(a, b) ((__m512i)((emulated::Bits)(a) & (emulated::Bits)(b)))
#define _mm512_or_si512(a, b) ((__m512i)((emulated::Bits)(a) | (emulated::Bits)(b)))
#define _mm512_slli_epi32(x, count) ((__m512i)((emulated::Bits)(x) << (count)))
#define _mm512_unpacklo_epi16(a, b) \
  emulated::integers([](__m256i one, __m256i other) { return _mm256_unpacklo_epi16(one, other); }, a, b)
#define _mm512_unpackhi_epi16(a, b) \
  emulated::integers([](__m256i one, __m256i other) { return _mm256_unpackhi_epi16(one, other); }, a, b)
#define _mm512_cvtepu16_epi32(x) emulated::widened(x)
#define _mm512_cvtneps_pbh(x) emulated::narrowed(x)
#define _mm512_dpbf16_ps(sums, a, b) emulated::dot((__m512)(sums), (__m512i)(a), (__m512i)(b))
