// Products of rows and a packed weight. A row's result has the same bits however many rows it is computed with: each
// number is one chain of additions over k, in order, whatever the blocking.
//
//   packed, float:  panel (16 outputs) | k          | output           16 outputs lie side by side,
//   packed, bf16:   panel (16 outputs) | pairs of k | output | k, k+1  as AVX512-BF16 and AMX both read them
//
// k is padded with zeros to a multiple of 32, outputs to a multiple of 16.
//
// For each line that a product reads, it prefetches one of what is read next (`ahead`). The processor's own prefetcher
// stops at the end of a page, and with few rows a panel is done before it has found the next one.
#pragma once
#include <type_traits>

#include "simd.h"
#include "structures.h"

constexpr int PANELS = 4;      // panels computed together, at most
constexpr int TILE_ROWS = 16;  // rows of an AMX tile; buffers of rows are allocated in whole tiles
constexpr int MANY_ROWS = 32;  // rows computed together, at most

static inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

constexpr int LINE = 64;  // bytes

// Prefetch the line-th line from `ahead` on, into the second-level cache. It does nothing in the AMX build, where its
// gain was never measured.
static inline void fetch(const void* ahead, long line) {
#if !defined(__AMX_BF16__)
  __builtin_prefetch((const char*)ahead + line * LINE, 0, 2);
#endif
}

// The type that rows of T have between products: T itself, where the processor multiplies bfloat16. Elsewhere rows are
// float32, though rounded to T, and weights are widened in registers.
#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif
template <class T>
using Kept = std::conditional_t<MULTIPLIES_BF16, T, float>;
// Whether numbers of T are widened before they are multiplied.
template <class T>
constexpr bool WIDENED = !std::is_same_v<Kept<T>, T>;

// Store a result, rounded to the model's type T.
template <class T, class To>
INLINE void keep(To* to, Vector x) {
  if constexpr (std::is_same_v<To, T>)
    store(to, x);
  else
    store(to, rounded(x, (const T*)nullptr));
}

// Copy numbers that are rounded already, and convert their type.
template <class To, class From>
static inline void copy(To* to, const From* from, long count) {
  if constexpr (std::is_same_v<To, From>)
    memcpy((void*)to, from, count * sizeof(To));
  else
    for (long i = 0; i < count; i += LANES) store_some(to + i, load_some(from + i, count - i), count - i);
}

// --- R rows of x times P panels that lie panel_stride apart: y[row * stride_y + 16 * panel + lane]

constexpr int EACH = REGISTERS_EACH;  // registers per panel

// These three are unrolled by pragmas; otherwise GCC keeps a copy of the sums in memory.
template <int R, int P>
INLINE void clear_block(Register (&sums)[R][P * EACH]) {
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < P * EACH; c++) sums[r][c] = Register{};
}

template <int R, int P>
INLINE void add_block(Register (&sums)[R][P * EACH], const float* x, long stride_x,
                      const Register (&weights)[P * EACH]) {
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    const Register factor = broadcast_register(x[r * stride_x]);
#pragma GCC unroll 8
    for (int c = 0; c < P * EACH; c++) sums[r][c] = multiply_add(factor, weights[c], sums[r][c]);
  }
}

template <int R, int P>
INLINE void store_block(const Register (&sums)[R][P * EACH], float* y, long stride_y) {
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < P * EACH; c++) store(y + r * stride_y + c * WIDTH, sums[r][c]);
}

template <int R, int P>
static inline void block(const float* x, long stride_x, const float* w, long panel_stride, long k, float* y,
                         long stride_y, const void* ahead) {
  Register sums[R][P * EACH];
  clear_block<R, P>(sums);
  for (long i = 0; i < k; i++) {
    Register weights[P * EACH];
#pragma GCC unroll 8
    for (int c = 0; c < P * EACH; c++) {
      weights[c] = load_register(w + c / EACH * panel_stride + i * LANES + c % EACH * WIDTH);
      if (R > 1) in_register(weights[c]);
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) fetch(ahead, i * P + p);
    add_block<R, P>(sums, x + i, stride_x, weights);
  }
  store_block<R, P>(sums, y, stride_y);
}

// For each pair of k: first the weights of k, then those of k + 1.
template <int R, int P>
static inline void block(const float* x, long stride_x, const bf16* w, long panel_stride, long k, float* y,
                         long stride_y, const void* ahead) {
  Register sums[R][P * EACH];
  clear_block<R, P>(sums);
  for (long i = 0; i < k; i += 2) {
    const bf16* pairs = w + i * LANES;
    Register weights[P * EACH];
#pragma GCC unroll 8
    for (int c = 0; c < P * EACH; c++)
      weights[c] = first_of_pairs(pairs + c / EACH * panel_stride + c % EACH * 2 * WIDTH);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) fetch(ahead, i / 2 * P + p);
    add_block<R, P>(sums, x + i, stride_x, weights);
#pragma GCC unroll 8
    for (int c = 0; c < P * EACH; c++)
      weights[c] = second_of_pairs(pairs + c / EACH * panel_stride + c % EACH * 2 * WIDTH);
    add_block<R, P>(sums, x + i + 1, stride_x, weights);
  }
  store_block<R, P>(sums, y, stride_y);
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <int R, int P>
static inline void block(const bf16* x, long stride_x, const bf16* w, long panel_stride, long k, float* y,
                         long stride_y, const void* ahead) {
  Register sums[R][P];
  clear_block<R, P>(sums);
  for (long i = 0; i < k; i += 2) {
    __m512bh weights[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      weights[p] = (__m512bh)_mm512_loadu_si512(w + p * panel_stride + i * LANES);
      fetch(ahead, i / 2 * P + p);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, x + r * stride_x + i, sizeof pair);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) sums[r][p] = (Register)_mm512_dpbf16_ps((__m512)sums[r][p], factor, weights[p]);
    }
  }
  store_block<R, P>(sums, y, stride_y);
}
#endif

// The most rows computed together, and how many panels with so many rows. Sums take most of the registers; with few
// rows there must still be enough independent sums to hide the latency of an addition.
constexpr int BLOCK_ROWS = 6;
constexpr int block_panels(int rows) {
  if (REGISTERS_EACH == 1) return PANELS;    // 6 x 4 sums, 4 weights and a factor: 29 of 32 registers
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;  // at most 12 sums, 2 weights and a factor: 15 of 16
}

// Multiply R rows by `panels` panels, P at a time; ahead: what is read after them.
template <int R, int P, class F, class W>
static inline void row_block(const F* x, long stride_x, const W* w, long panel_stride, int panels, long k, float* y,
                             long stride_y, const void* ahead) {
  for (; panels >= P; panels -= P, w += P * panel_stride, y += P * LANES)
    block<R, P>(x, stride_x, w, panel_stride, k, y, stride_y, panels > P ? w + P * panel_stride : ahead);
  if constexpr (P > 1)
    if (panels) row_block<R, P - 1>(x, stride_x, w, panel_stride, panels, k, y, stride_y, ahead);
}

template <class F, class W>
static inline void row_blocks(const F* x, long stride_x, int rows, const W* w, long panel_stride, int panels, long k,
                              float* y, long stride_y, const void* ahead) {
  for (int blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; blocks > 0; blocks--) {  // sizes differ by at most one
    const int some = (rows + blocks - 1) / blocks;
#define CASE(R) \
  case R: row_block<R, block_panels(R)>(x, stride_x, w, panel_stride, panels, k, y, stride_y, ahead); break;
    switch (some) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
    rows -= some;
    x += some * stride_x;
    y += some * stride_y;
  }
}

// Multiply `rows` <= MANY_ROWS rows of x by all panels into y[row * stride_y + 16 * panel + lane]. A few panels at a
// time are used for all rows before the next are read.
template <class F, class W>
static inline void product(const F* x, long stride_x, int rows, const W* w, long panel_stride, int panels, long k,
                           float* y, long stride_y, const void* ahead) {
  for (int p = 0; p < panels; p += PANELS, w += PANELS * panel_stride, y += PANELS * LANES) {
    const int some = panels - p < PANELS ? panels - p : PANELS;
    row_blocks(x, stride_x, rows, w, panel_stride, some, k, y, stride_y,
               p + PANELS < panels ? w + PANELS * panel_stride : ahead);
  }
}

#if defined(__AMX_BF16__)
// AMX reads x and writes y in whole tiles of 16 rows; contents of rows beyond `rows` do not matter.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static inline void tiles_begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}
static inline void tiles_end() { _tile_release(); }

// Products of one tile of rows and 1 or 4 panels, and of two tiles and 2 panels.
static inline void tiles_1x1(const bf16* x, long sx, const bf16* w, long, long k, float* y, long sy) {
  _tile_zero(0);
  for (long i = 0; i < k; i += K_STEP) {
    _tile_loadd(4, x + i, sx * 2);
    _tile_loadd(6, w + i * LANES, 64);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, y, sy * 4);
}

static inline void tiles_1x4(const bf16* x, long sx, const bf16* w, long ps, long k, float* y, long sy) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long i = 0; i < k; i += K_STEP, w += K_STEP * LANES) {
    _tile_loadd(4, x + i, sx * 2);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + ps, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, w + 2 * ps, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, w + 3 * ps, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, y, sy * 4);
  _tile_stored(1, y + LANES, sy * 4);
  _tile_stored(2, y + 2 * LANES, sy * 4);
  _tile_stored(3, y + 3 * LANES, sy * 4);
}

static inline void tiles_2x2(const bf16* x, long sx, const bf16* w, long ps, long k, float* y, long sy) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long i = 0; i < k; i += K_STEP, w += K_STEP * LANES) {
    _tile_loadd(4, x + i, sx * 2);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + ps, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + TILE_ROWS * sx + i, sx * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, y, sy * 4);
  _tile_stored(1, y + LANES, sy * 4);
  _tile_stored(2, y + TILE_ROWS * sy, sy * 4);
  _tile_stored(3, y + TILE_ROWS * sy + LANES, sy * 4);
}

static inline void product(const bf16* x, long sx, int rows, const bf16* w, long ps, int panels, long k, float* y,
                           long sy, const void*) {
  int p = 0;
  if (rows > TILE_ROWS)
    for (; p + 2 <= panels; p += 2) tiles_2x2(x, sx, w + p * ps, ps, k, y + p * LANES, sy);
  else
    for (; p + 4 <= panels; p += 4) tiles_1x4(x, sx, w + p * ps, ps, k, y + p * LANES, sy);
  for (; p < panels; p++)
    for (int r = 0; r < rows; r += TILE_ROWS) tiles_1x1(x + r * sx, sx, w + p * ps, ps, k, y + r * sy + p * LANES, sy);
}
#else
static inline void tiles_begin() {}
static inline void tiles_end() {}
#endif

// Pack weights (outputs, inputs), as torch has them, into a panel.
static inline void pack_panel(const float* from, long inputs, long outputs, long k, float* to) {
  for (long i = 0; i < k; i++)
    for (int lane = 0; lane < LANES; lane++) *to++ = i < inputs && lane < outputs ? from[lane * inputs + i] : 0.0f;
}

static inline void pack_panel(const bf16* from, long inputs, long outputs, long k, bf16* to) {
  for (long i = 0; i < k; i += 2)
    for (int lane = 0; lane < LANES; lane++)
      for (long j = i; j < i + 2; j++) *to++ = j < inputs && lane < outputs ? from[lane * inputs + j] : bf16{0};
}
