// Sixteen floats at a time, in GCC's portable vectors; and the two element types that models are kept in.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};

static inline vf all(float x) { return vf{} + x; }

static inline vf load(const float* from) {
  vf x;
  memcpy(&x, from, sizeof x);
  return x;
}

static inline void store(float* to, vf x) { memcpy(to, &x, sizeof x); }

static inline vf load(const bf16* from) {
  vh x;
  memcpy(&x, from, sizeof x);
  return (vf)(__builtin_convertvector(x, vi) << 16);
}

static inline float number(float x) { return x; }
static inline float number(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// To the nearest, ties to even, as torch rounds.
static inline void store(bf16* to, vf x) {
#if defined(__AVX512BF16__)
  __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  memcpy(to, &rounded, sizeof rounded);
#else
  typedef uint32_t vu __attribute__((vector_size(64)));
  vu bits = (vu)x;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vh rounded = __builtin_convertvector(bits, vh);
  memcpy(to, &rounded, sizeof rounded);
#endif
}

// The first `count` lanes only, where there are fewer than all.
template <class T>
static inline void store_some(T* to, vf x, long count) {
  if (count >= LANES) return store(to, x);
  T lanes[LANES];
  store(lanes, x);
  memcpy((void*)to, lanes, count * sizeof(T));
}

// So many numbers, and zeros behind them.
template <class T>
static inline vf load_some(const T* from, long count) {
  if (count >= LANES) return load(from);
  T lanes[LANES] = {};
  memcpy((void*)lanes, from, count * sizeof(T));
  return load(lanes);
}

// What is left of x once it has been stored: models are written with every result rounded to their type.
static inline vf rounded(vf x, const float*) { return x; }

static inline vf rounded(vf x, const bf16*) {
  bf16 stored[LANES];
  store(stored, x);
  return load(stored);
}

static inline vf larger(vf a, vf b) { return a > b ? a : b; }

static inline bool any_larger(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  const vi larger = a > b;
  int any = 0;
  for (int i = 0; i < LANES; i++) any |= larger[i];
  return any;
#endif
}

// All lanes to one, half by half.
template <class Join>
static inline vf folded(vf x, Join join) {
  x = join(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = join(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = join(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = join(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return x;
}
static inline float largest(vf x) { return folded(x, larger)[0]; }
static inline float sum(vf x) {
  return folded(x, [](vf a, vf b) { return a + b; })[0];
}

// e^x to within two units in the last place; 0 below -87, where a float's own range ends.
static inline vf exponential(vf x) {
  vf bounded = x < -87.0f ? all(-87.0f) : x;
  bounded = bounded > 88.0f ? all(88.0f) : bounded;
  vf shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is then in the low bits
  vf whole = shifted - 12582912.0f;
  vf r = bounded - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf y = (vf)((vi)p + (__builtin_convertvector(whole, vi) << 23));
  return x < -87.0f ? vf{} : y;
}

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// Rows become columns: in four rounds, each of which swaps the off-diagonal quarters of ever smaller squares.
static inline void transpose(vf* m) {
#define ROUND(SPAN, LOW, HIGH)                               \
  for (int i = 0; i < LANES; i++)                            \
    if (!(i & SPAN)) {                                       \
      const vf a = m[i], b = m[i + SPAN];                    \
      m[i] = __builtin_shufflevector(a, b, LOW);             \
      m[i + SPAN] = __builtin_shufflevector(a, b, HIGH);     \
    }
#define SIDE_BY_SIDE(...) __VA_ARGS__
#pragma GCC unroll 16
  ROUND(8, SIDE_BY_SIDE(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        SIDE_BY_SIDE(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#pragma GCC unroll 16
  ROUND(4, SIDE_BY_SIDE(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        SIDE_BY_SIDE(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#pragma GCC unroll 16
  ROUND(2, SIDE_BY_SIDE(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        SIDE_BY_SIDE(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#pragma GCC unroll 16
  ROUND(1, SIDE_BY_SIDE(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        SIDE_BY_SIDE(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef ROUND
#undef SIDE_BY_SIDE
}

// The same rounds as `transpose`, adding what they bring together: lane i becomes the sum of part[i].
static inline vf sums(vf* part) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    part[i] = __builtin_shufflevector(part[i], part[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
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
