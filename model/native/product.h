// Rows times a packed weight. A row's result has the same bits however many rows it is computed with: every number is
// one chain of additions over k, in order, whatever the blocking.
//
//   packed, float:  panel (16 outputs) | k          | output           16 outputs lie side by side,
//   packed, bf16:   panel (16 outputs) | pairs of k | output | k, k+1  as AVX512-BF16 and AMX both read them
//
// k is filled up with zeros to a multiple of 32, outputs to a multiple of 16.
//
// What is read next is fetched `ahead`, a line for every line read: the processor follows four panels at a time by itself, but
// only to the end of a page, which is soon, and a few rows are done before it has found the next ones.
#pragma once
#include "vector.h"

constexpr int PANELS = 4;       // computed together
constexpr int TILE_ROWS = 16;   // of an AMX tile: buffers of rows are allocated in whole tiles
constexpr int MANY_ROWS = 32;   // computed together at most
constexpr int K_STEP = 32;

static inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

constexpr int LINE = 64;  // bytes

// A line of those that lie one after the other from `ahead` on; to where several rows' products do not wait for it. Where there
// is AMX it was never measured, and does nothing.
static inline void fetch(const void* ahead, long line) {
#if !defined(__AMX_BF16__)
  __builtin_prefetch((const char*)ahead + line * LINE, 0, 2);
#endif
}

// y[row * stride_y + 16 * panel + lane], for `rows` <= MANY_ROWS rows of x and P panels that lie panel_stride apart.

#if defined(__AVX512F__)
constexpr int ROWS_AT_ONCE = 6;  // 6 x 4 sums, 4 weights and a factor: 29 of 32 registers
#else
constexpr int ROWS_AT_ONCE = 1;
#endif

template <int R, int P>
static inline void block(const float* x, long stride_x, const float* w, long panel_stride, long k, float* y, long stride_y,
                         const void* ahead) {
  vf sums[R][P] = {};
  for (long i = 0; i < k; i++) {
    vf weights[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) weights[p] = load(w + p * panel_stride + i * LANES), fetch(ahead, i * P + p);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      vf factor = all(x[r * stride_x + i]);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) sums[r][p] += factor * weights[p];
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) store(y + r * stride_y + p * LANES, sums[r][p]);
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <int R, int P>
static inline void block(const bf16* x, long stride_x, const bf16* w, long panel_stride, long k, float* y, long stride_y,
                         const void* ahead) {
  __m512 sums[R][P] = {};
  for (long i = 0; i < k; i += 2) {
    __m512bh weights[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) weights[p] = (__m512bh)_mm512_loadu_si512(w + p * panel_stride + i * LANES), fetch(ahead, i / 2 * P + p);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, x + r * stride_x + i, sizeof pair);
      __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], factor, weights[p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(y + r * stride_y + p * LANES, sums[r][p]);
}
#endif

template <class T, int P>
static inline void blocks(const T* x, long stride_x, int rows, const T* w, long panel_stride, long k, float* y, long stride_y, const void* ahead) {
  int r = 0;
  for (; r + ROWS_AT_ONCE <= rows; r += ROWS_AT_ONCE)
    block<ROWS_AT_ONCE, P>(x + r * stride_x, stride_x, w, panel_stride, k, y + r * stride_y, stride_y, ahead);
  x += r * stride_x, y += r * stride_y;
  switch (rows - r) {
    case 5: return block<5, P>(x, stride_x, w, panel_stride, k, y, stride_y, ahead);
    case 4: return block<4, P>(x, stride_x, w, panel_stride, k, y, stride_y, ahead);
    case 3: return block<3, P>(x, stride_x, w, panel_stride, k, y, stride_y, ahead);
    case 2: return block<2, P>(x, stride_x, w, panel_stride, k, y, stride_y, ahead);
    case 1: return block<1, P>(x, stride_x, w, panel_stride, k, y, stride_y, ahead);
  }
}

template <class T>
static inline void product(const T* x, long stride_x, int rows, const T* w, long panel_stride, int panels, long k, float* y, long stride_y,
                           const void* ahead) {
  for (int p = 0; p < panels; p += PANELS, w += PANELS * panel_stride, y += PANELS * LANES) {
    const void* next = p + PANELS < panels ? w + PANELS * panel_stride : ahead;
    switch (panels - p) {
      case 1: blocks<T, 1>(x, stride_x, rows, w, panel_stride, k, y, stride_y, next); break;
      case 2: blocks<T, 2>(x, stride_x, rows, w, panel_stride, k, y, stride_y, next); break;
      case 3: blocks<T, 3>(x, stride_x, rows, w, panel_stride, k, y, stride_y, next); break;
      default: blocks<T, 4>(x, stride_x, rows, w, panel_stride, k, y, stride_y, next);
    }
  }
}

#if defined(__AMX_BF16__)
// AMX: x is read, and y written, in whole tiles of 16 rows; what stands in the rows beyond `rows` does not matter.
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

// One tile of rows, 1 or 4 panels; two tiles of rows, 2 panels.
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

static inline void product(const bf16* x, long sx, int rows, const bf16* w, long ps, int panels, long k, float* y, long sy, const void*) {
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

// Weights (outputs, inputs) as torch keeps them, to panels.
static inline void pack_panel(const float* from, long inputs, long outputs, long k, float* to) {
  for (long i = 0; i < k; i++)
    for (int lane = 0; lane < LANES; lane++) *to++ = i < inputs && lane < outputs ? from[lane * inputs + i] : 0.0f;
}

static inline void pack_panel(const bf16* from, long inputs, long outputs, long k, bf16* to) {
  for (long i = 0; i < k; i += 2)
    for (int lane = 0; lane < LANES; lane++)
      for (long j = i; j < i + 2; j++) *to++ = j < inputs && lane < outputs ? from[lane * inputs + j] : bf16{0};
}
