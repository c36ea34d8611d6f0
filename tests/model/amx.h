// AMX for processors that have none: included before all else, it makes the build for AMX run wherever AVX512-BF16
// does, slowly. Tiles are 16 rows of 64 bytes, the only ones that product.h sets up. Sums are made in the order of
// Intel's manual (TDPBF16PS: the even of each pair, the odd, then both and what was there).
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {

constexpr int ROWS = 16, BYTES = 64;
inline thread_local bool configured = false;
inline thread_local char tiles[8][ROWS][BYTES];

inline auto& tile(int number) {
  if (!configured) __builtin_trap();  // as the processor does
  return tiles[number];
}

inline void configure(const void* from) {
  const uint8_t* config = (const uint8_t*)from;
  for (int t = 0; t < 8; t++)
    if (config[16 + 2 * t] != BYTES || config[17 + 2 * t] || config[48 + t] != ROWS) __builtin_trap();
  configured = true;
}

inline void zero(int number) { memset(tile(number), 0, sizeof tiles[number]); }

inline void load(int number, const void* from, long stride) {
  for (int r = 0; r < ROWS; r++) memcpy(tile(number)[r], (const char*)from + r * stride, BYTES);
}

inline void store(int number, void* to, long stride) {
  for (int r = 0; r < ROWS; r++) memcpy((char*)to + r * stride, tile(number)[r], BYTES);
}

inline __m512 even(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
inline __m512 odd(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)); }

inline void multiply(int sums, int left, int right) {
  for (int r = 0; r < ROWS; r++) {
    __m512 evens = _mm512_setzero_ps(), odds = evens;
    for (int k = 0; k < BYTES / 4; k++) {
      int32_t pair;
      memcpy(&pair, tile(left)[r] + 4 * k, sizeof pair);
      const __m512i ours = _mm512_set1_epi32(pair), theirs = _mm512_loadu_si512(tile(right)[k]);
      evens = _mm512_fmadd_ps(even(ours), even(theirs), evens);
      odds = _mm512_fmadd_ps(odd(ours), odd(theirs), odds);
    }
    _mm512_storeu_ps(tile(sums)[r], _mm512_add_ps(_mm512_loadu_ps(tile(sums)[r]), _mm512_add_ps(evens, odds)));
  }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::configure(from)
#define _tile_release() (void)(emulated::configured = false)
#define _tile_zero(number) emulated::zero(number)
#define _tile_loadd(number, from, stride) emulated::load(number, from, stride)
#define _tile_stored(number, to, stride) emulated::store(number, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
// The system need not give permission to use what is not used.
#define syscall(number, ...) ((number) == SYS_arch_prctl ? 0 : (syscall)(number, __VA_ARGS__))
