// Vectors of sixteen float32 lanes, however wide the processor's registers are. Besides some products (product.h,
// attention.h) only this file knows instruction sets. Kernels are written once, for sixteen lanes: so every build packs
// weights alike and adds lanes in the same order.
//
// Sixteen lanes are one register with AVX512 and two halves with AVX2; with registers of four lanes they would be
// halves of halves. GCC's vector types bring the operators; what they lack is written below, once for each instruction
// set.
//
// The compiler fuses no multiplication with an addition by itself (-ffp-contract=off); `multiply_add` does.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "structures.h"

#define INLINE static INLINE_MEMBER
#define INLINE_MEMBER inline __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};

// --- one register

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // lanes of a register
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int WIDTH = 8;
#else
#error "simd.h has no section for this instruction set"
#endif

typedef float Register __attribute__((vector_size(4 * WIDTH)));
// Also the result of a comparison: all bits of a lane, or none.
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Bfloats __attribute__((vector_size(2 * WIDTH)));  // bfloat16, as they lie in memory

#if defined(__AVX512F__)

INLINE Register broadcast_register(float x) { return (Register)_mm512_set1_ps(x); }
INLINE Register multiply_add(Register a, Register b, Register c) {
  return (Register)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
// The larger or smaller of both, lane by lane; b if one is NaN.
INLINE Register larger(Register a, Register b) { return (Register)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Register smaller(Register a, Register b) { return (Register)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE bool any_larger(Register a, Register b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }

// Reduce all lanes to one number, half by half.
template <class Join>
INLINE float reduce(Register x, Join join) {
  x = join(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = join(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = join(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return join(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))[0];
}

// Lane i of the result: the sum of part[i].
INLINE Register sums(Register* part) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    part[i] =
        __builtin_shufflevector(part[i], part[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(part[i], part[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    part[i] = __builtin_shufflevector(part[i], part[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
              __builtin_shufflevector(part[i], part[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    part[i] = __builtin_shufflevector(part[i], part[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              __builtin_shufflevector(part[i], part[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(part[0], part[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(part[0], part[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

#else  // AVX2

INLINE Register broadcast_register(float x) { return (Register)_mm256_set1_ps(x); }
INLINE Register multiply_add(Register a, Register b, Register c) {
  return (Register)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE Register larger(Register a, Register b) { return (Register)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Register smaller(Register a, Register b) { return (Register)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE bool any_larger(Register a, Register b) { return _mm256_movemask_ps((__m256)(a > b)); }

template <class Join>
INLINE float reduce(Register x, Join join) {
  x = join(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = join(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  return join(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6))[0];
}

INLINE Register sums(Register* part) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    part[i] = __builtin_shufflevector(part[i], part[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
              __builtin_shufflevector(part[i], part[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    part[i] = __builtin_shufflevector(part[i], part[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(part[i], part[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(part[0], part[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(part[0], part[1], 1, 9, 3, 11, 5, 13, 7, 15);
}

#endif

// Keep x in a register: otherwise GCC reads it from memory again for each use.
INLINE void in_register(Register& x) { asm("" : "+v"(x)); }

INLINE Register widened(Bfloats x) { return (Register)(__builtin_convertvector(x, Bits) << 16); }

#if !defined(__AVX512BF16__)
// Round to the nearest bfloat16, ties to even, as torch does; the result is in the upper half of each lane. A NaN is
// treated apart, since rounding would make it an infinity or 0.
INLINE Bits nearest_bf16(Register x) {
  const Bits bits = (Bits)x;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : Bits{} + 0x7fc00000;
}
#endif

// Round to bfloat16, as it lies in memory.
INLINE Bfloats narrowed(Register x) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  Bfloats y;
  memcpy(&y, &rounded, sizeof y);
  return y;
#else
  return __builtin_convertvector(nearest_bf16(x) >> 16, Bfloats);
#endif
}

// Round x to bfloat16 and widen it again.
INLINE Register through_bf16(Register x) {
#if defined(__AVX512BF16__)
  return widened(narrowed(x));
#else
  return (Register)(nearest_bf16(x) & 0xffff0000);
#endif
}

INLINE float first_lane(Register x) { return x[0]; }
INLINE Register folded(Register x) { return x; }

// x with its lanes from `count` on replaced by `otherwise`.
INLINE Register first_lanes(Register x, int count, float otherwise) {
  Integers lane;
  for (int i = 0; i < WIDTH; i++) lane[i] = i;
  return lane < count ? x : broadcast_register(otherwise);
}

// e^x to within two units in the last place; 0 below -87, where a float's own range ends.
INLINE Register exponential(Register x) {
  const Register bounded = smaller(broadcast_register(88.0f), larger(broadcast_register(-87.0f), x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Register shifted = multiply_add(bounded, broadcast_register(1.44269504f), broadcast_register(12582912.0f));
  const Register whole = shifted - 12582912.0f;
  Register r = multiply_add(whole, broadcast_register(-0.693359375f), bounded);
  r = multiply_add(whole, broadcast_register(2.12194440e-4f), r);
  Register p = broadcast_register(1.9875691500e-4f);
  p = multiply_add(p, r, broadcast_register(1.3981999507e-3f));
  p = multiply_add(p, r, broadcast_register(8.3334519073e-3f));
  p = multiply_add(p, r, broadcast_register(4.1665795894e-2f));
  p = multiply_add(p, r, broadcast_register(1.6666665459e-1f));
  p = multiply_add(p, r, broadcast_register(5.0000001201e-1f));
  p = multiply_add(p * r, r, r) + 1.0f;
  const Register y = (Register)((Bits)p + ((Bits)shifted << 23));
  return x >= -87.0f ? y : larger(Register{}, x);  // a NaN stays one
}

// --- sixteen lanes

// Two halves, to which every operation is applied alike.
template <class Half>
struct Halves {
  Half low, high;
};

#define BOTH Halves<Half>
#define OPERATOR(NAME)                                                               \
  template <class Half>                                                              \
  INLINE auto operator NAME(BOTH a, BOTH b) {                                        \
    return Halves<decltype(a.low NAME b.low)>{a.low NAME b.low, a.high NAME b.high}; \
  }                                                                                  \
  template <class Half>                                                              \
  INLINE auto operator NAME(BOTH a, float b) {                                       \
    return Halves<decltype(a.low NAME b)>{a.low NAME b, a.high NAME b};              \
  }                                                                                  \
  template <class Half>                                                              \
  INLINE auto operator NAME(float a, BOTH b) {                                       \
    return Halves<decltype(a NAME b.low)>{a NAME b.low, a NAME b.high};              \
  }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(<)
#undef OPERATOR
template <class Half>
INLINE BOTH operator-(BOTH x) {
  return {-x.low, -x.high};
}
template <class Half, class Other>
INLINE BOTH& operator+=(BOTH& a, Other b) {
  return a = a + b;
}
template <class Half, class Other>
INLINE BOTH& operator*=(BOTH& a, Other b) {
  return a = a * b;
}
template <class Half>
INLINE BOTH multiply_add(BOTH a, BOTH b, BOTH c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}
template <class Half>
INLINE BOTH larger(BOTH a, BOTH b) {
  return {larger(a.low, b.low), larger(a.high, b.high)};
}
template <class Half>
INLINE bool any_larger(BOTH a, BOTH b) {
  return any_larger(a.low, b.low) || any_larger(a.high, b.high);
}
template <class Half>
INLINE BOTH through_bf16(BOTH x) {
  return {through_bf16(x.low), through_bf16(x.high)};
}
template <class Half>
INLINE BOTH exponential(BOTH x) {
  return {exponential(x.low), exponential(x.high)};
}
template <class Half>
INLINE BOTH first_lanes(BOTH x, int count, float otherwise) {
  constexpr int half = sizeof(Half) / sizeof(float);
  return {first_lanes(x.low, count, otherwise), first_lanes(x.high, count - half, otherwise)};
}
// Add its lanes up to those of one register.
template <class Half>
INLINE Register folded(BOTH x) {
  return folded(x.low + x.high);
}
template <class Half, class Join>
INLINE float reduce(BOTH x, Join join) {
  return reduce(join(x.low, x.high), join);
}
#undef BOTH

template <int N>
struct LanesOf {
  typedef Halves<typename LanesOf<N / 2>::type> type;
};
template <>
struct LanesOf<WIDTH> {
  typedef Register type;
};
typedef LanesOf<LANES>::type Vector;

constexpr int REGISTERS_EACH = LANES / WIDTH;  // registers for sixteen lanes

template <class V>
INLINE V broadcast_to(float x) {
  if constexpr (sizeof(V) == sizeof(Register)) {
    return broadcast_register(x);
  } else {
    const auto half = broadcast_to<decltype(V::low)>(x);
    return {half, half};
  }
}
INLINE Vector broadcast(float x) { return broadcast_to<Vector>(x); }

// Load register by register: GCC keeps in memory what is copied as a whole.
INLINE Register load_register(const float* from) {
  Register x;
  memcpy(&x, from, sizeof x);
  return x;
}
INLINE Register load_register(const bf16* from) {
  Bfloats x;
  memcpy(&x, from, sizeof x);
  return widened(x);
}
template <class V, class T>
INLINE V load_to(const T* from) {
  if constexpr (sizeof(V) == sizeof(Register)) {
    return load_register(from);
  } else {
    typedef decltype(V::low) Half;
    return {load_to<Half>(from), load_to<Half>(from + sizeof(Half) / sizeof(float))};
  }
}
INLINE Vector load(const float* from) { return load_to<Vector>(from); }
INLINE Vector load(const bf16* from) { return load_to<Vector>(from); }

// Load the first (or second) number of as many pairs as a register has lanes.
INLINE Register first_of_pairs(const bf16* from) {
  Bits pairs;
  memcpy(&pairs, from, sizeof pairs);
  return (Register)(pairs << 16);
}
INLINE Register second_of_pairs(const bf16* from) {
  Bits pairs;
  memcpy(&pairs, from, sizeof pairs);
  return (Register)(pairs & 0xffff0000);
}

// Load sixteen numbers in the order that is fastest: bfloat16 that take two registers come with even places first.
// `in_order` restores the order, `unordered` brings ordered numbers into that order.
INLINE Register register_unordered(const float* from, int number) { return load_register(from + number * WIDTH); }
INLINE Vector load_unordered(const float* from) { return load(from); }
INLINE Vector in_order(Vector x, const float*) { return x; }
#if defined(__AVX512F__)
INLINE Register register_unordered(const bf16* from, int number) { return load_register(from + number * WIDTH); }
INLINE Vector load_unordered(const bf16* from) { return load(from); }
INLINE Vector in_order(Vector x, const bf16*) { return x; }
INLINE Vector unordered(Vector x) { return x; }
#else
INLINE Register register_unordered(const bf16* from, int number) {
  from += number / 2 * LANES;
  return number % 2 ? second_of_pairs(from) : first_of_pairs(from);
}
INLINE Vector load_unordered(const bf16* from) { return {first_of_pairs(from), second_of_pairs(from)}; }
INLINE Vector in_order(Vector x, const bf16*) {
  return {__builtin_shufflevector(x.low, x.high, 0, 8, 1, 9, 2, 10, 3, 11),
          __builtin_shufflevector(x.low, x.high, 4, 12, 5, 13, 6, 14, 7, 15)};
}
INLINE Vector unordered(Vector x) {
  return {__builtin_shufflevector(x.low, x.high, 0, 2, 4, 6, 8, 10, 12, 14),
          __builtin_shufflevector(x.low, x.high, 1, 3, 5, 7, 9, 11, 13, 15)};
}
#endif

INLINE void store(float* to, Register x) { memcpy(to, &x, sizeof x); }
INLINE void store(bf16* to, Register x) {
  const Bfloats y = narrowed(x);
  memcpy((void*)to, &y, sizeof y);
}
template <class T, class Half>
INLINE void store(T* to, Halves<Half> x) {
  store(to, x.low);
  store(to + sizeof(Half) / sizeof(float), x.high);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Store only the first `count` lanes, or all if there are more.
template <class T>
INLINE void store_some(T* to, Vector x, long count) {
  if (count >= LANES) return store(to, x);
  T lanes[LANES];
  store(lanes, x);
  memcpy((void*)to, lanes, count * sizeof(T));
}

// Load `count` numbers, and zeros after them.
template <class T>
INLINE Vector load_some(const T* from, long count) {
  if (count >= LANES) return load(from);
  T lanes[LANES] = {};
  memcpy((void*)lanes, from, count * sizeof(T));
  return load(lanes);
}

// Round x to the model's type, as storing it would: models round every result.
INLINE Vector rounded(Vector x, const float*) { return x; }
INLINE Vector rounded(Vector x, const bf16*) { return through_bf16(x); }

struct Larger {
  template <class V>
  INLINE_MEMBER V operator()(V a, V b) const {
    return larger(a, b);
  }
};
struct Plus {
  template <class V>
  INLINE_MEMBER V operator()(V a, V b) const {
    return a + b;
  }
};
INLINE float largest(Vector x) { return reduce(x, Larger{}); }
INLINE float sum(Vector x) { return reduce(x, Plus{}); }

INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }
