// The stages of a layer that know nothing of attention or of the cache: products, norms and activations of rows, split
// into tasks for a team; and the memory that a pass works in.
#pragma once
#include <stdlib.h>

#include "check.h"
#include "product.h"
#include "structures.h"
#include "team.h"

namespace {

#define HEAD_DIMS(DO) DO(16) DO(32) DO(64) DO(80) DO(96) DO(128) DO(256)  // head sizes that attention is compiled for

constexpr int CHUNK_ROWS = 128;    // largest number of rows in one task of a product
constexpr int WIDENING_ROWS = 48;  // from so many rows on, bfloat16 weights are widened to float32 in memory first
constexpr int SOME_ROWS = 4;       // rows in one task of stages that do little work per row
constexpr int OWN_NUMBERS =
    4096;  // up to so many numbers, each thread normalises all rows itself: sharing would take longer

struct Arena {
  char* memory = nullptr;
  size_t size = 0, used = 0;

  // Make room for so many bytes; earlier contents are lost.
  void reserve(size_t wanted) {
    used = 0;
    if (wanted <= size) return;
    free(memory);
    size = round_up(wanted, LINE);
    memory = (char*)aligned_alloc(LINE, size);
    if (memory) return;
    char message[80];
    snprintf(message, sizeof message, "there is no memory for %zu bytes of a pass", size);
    give_up(message, __FILE__, __LINE__);
  }
  template <class T>
  T* take(size_t count) {
    T* start = (T*)(memory + used);
    used += bytes<T>(count);
    CHECK(used <= size);
    return start;
  }
  template <class T>
  static size_t bytes(size_t count) {
    return round_up(count * sizeof(T), LINE);
  }
};

// The library's only state. Whoever calls it holds `entry` (transformer.cpp), so that one job at a time uses them.
Arena arena, scratch;  // memory of a pass, and of the steps around it
Team team;

// A packed weight, and how many of its panels make one task.
template <class T>
struct Panels {
  const T* packed;
  int num, group;
  long k;

  Panels(const void* packed, int num, int group, long k) : packed((const T*)packed), num(num), group(group), k(k) {}
  const T* at(int panel) const { return packed + panel * k * LANES; }
  int tasks(int chunks) const { return (num + group - 1) / group * chunks; }
  // The weights at which this member begins a product over so many chunks of rows.
  const T* own(const Member& team, int chunks) const { return at(team.first(tasks(chunks)) / chunks * group); }
};

inline int chunks_of(int rows) { return (rows + CHUNK_ROWS - 1) / CHUNK_ROWS; }

// Widen packed weights to float32, into memory of the calling thread that lasts until the next call. It pays for many
// rows; for fewer, the product widens weights in registers.
inline const float* widened(const bf16* packed, long count) {
  static thread_local struct Wide : Arena {
    ~Wide() { free(memory); }
  } wide;
  wide.reserve(Arena::bytes<float>(count));
  float* to = wide.take<float>(count);
  for (long i = 0; i < count; i += 2 * LANES)
    for (int c = 0; c < REGISTERS_EACH; c++) {
      store(to + i + c * WIDTH, first_of_pairs(packed + i + c * 2 * WIDTH));
      store(to + i + LANES + c * WIDTH, second_of_pairs(packed + i + c * 2 * WIDTH));
    }
  return to;
}

// Multiply rows first..end, CHUNK_ROWS at most, by `panels` panels of w from `panel` on. Calls epilogue(row, rows,
// panel, panels, y, stride) for each block of results, y[row * stride + 16 * panel + lane].
template <class T, class Epilogue>
void product_rows(const Kept<T>* x, long stride, int first, int end, const Panels<T>& w, int panel, int panels,
                  const void* ahead, const Epilogue& epilogue) {
  const long stride_y = (long)panels * LANES;
  if constexpr (WIDENED<T>)
    if (end - first >= WIDENING_ROWS) {
      alignas(64) float y[CHUNK_ROWS * MAX_HEAD_DIM];
      constexpr int together = block_panels(BLOCK_ROWS);
      for (int p = 0; p < panels; p += together) {
        const int some = panels - p < together ? panels - p : together;
        const float* width = widened(w.at(panel + p), some * w.k * LANES);
        for (int row = first; row < end; row += MANY_ROWS)
          product(x + row * stride, stride, end - row < MANY_ROWS ? end - row : MANY_ROWS, width, w.k * LANES, some,
                  w.k, y + (row - first) * stride_y + p * LANES, stride_y, ahead);
      }
      return epilogue(first, end - first, panel, panels, y, stride_y);
    }
  alignas(64) float y[MANY_ROWS * MAX_HEAD_DIM];
  for (int row = first; row < end; row += MANY_ROWS) {
    const int some = end - row < MANY_ROWS ? end - row : MANY_ROWS;
    product(x + row * stride, stride, some, w.at(panel), w.k * LANES, panels, w.k, y, stride_y, ahead);
    epilogue(row, some, panel, panels, y, stride_y);
  }
}

// --- stages: every member of the team calls them

// Multiply all rows by w, as one stage. then: the weights that this member reads next, to be fetched early.
template <class T, class Epilogue>
void product_stage(Member& team, const Kept<T>* x, long stride, int rows, const Panels<T>& w, const void* then,
                   const Epilogue& epilogue) {
  const int chunks = chunks_of(rows);
  const int chunk =
      chunks ? round_up((rows + chunks - 1) / chunks, TILE_ROWS) : 0;  // of almost equal size, in whole tiles
  const int tasks = w.tasks(chunks), last = team.end(tasks) - 1;
  team.share(tasks, [&](int task) {
    const int panel = task / chunks * w.group, first = task % chunks * chunk;
    const int num = w.num - panel < w.group ? w.num - panel : w.group;
    const void* ahead = task < last ? w.at((task + 1) / chunks * w.group) : then;
    product_rows<T>(x, stride, first, first + chunk < rows ? first + chunk : rows, w, panel, num, ahead, epilogue);
  });
}

template <class T>
Vector with_bias(const float* y, const void* bias, long output) {
  Vector x = load(y);
  return rounded(bias ? x + load((const T*)bias + output) : x, (const T*)nullptr);
}

// Normalise one row. x and y: of T, or of Kept<T>.
template <class T, class X, class Y>
void normalise(const X* x, const void* weight, const void* bias, Norm kind, float eps, long width, Y* y) {
  const T* scale = (const T*)weight;
  Vector squares{}, total{};
  float mean = 0.0f;
  if (kind == LAYER) {
    for (long i = 0; i < width; i += LANES) total += load(x + i);
    mean = sum(total) / width;
  }
  for (long i = 0; i < width; i += LANES) {
    Vector part = load(x + i) - mean;
    squares = multiply_add(part, part, squares);
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
  for (long i = 0; i < width; i += LANES) {
    Vector part = (load(x + i) - mean) * factor;
    if (kind == LAYER)
      keep<T>(y + i, part * load(scale + i) + load((const T*)bias + i));
    else if (kind == RMS_PLUS_ONE)
      keep<T>(y + i, part * (1.0f + load(scale + i)));
    else
      keep<T>(y + i, rounded(part, scale) * load(scale + i));
  }
}

// Call each(row) for all rows, as one stage of a few rows per task.
template <class Each>
void row_stage(Member& team, int rows, const Each& each) {
  team.share((rows + SOME_ROWS - 1) / SOME_ROWS, [&](int task) {
    for (int row = task * SOME_ROWS; row < rows && row < (task + 1) * SOME_ROWS; row++) each(row);
  });
}

Vector activated(Vector x, Activation kind) {
  switch (kind) {
    case QUICK_GELU: return x * sigmoid(1.702f * x);
    case GELU: {
      float lanes[LANES];
      store(lanes, x);
      for (float& lane : lanes) lane = 0.5f * lane * (1.0f + __builtin_erff(lane * 0.70710678f));
      return load(lanes);
    }
    case GELU_TANH: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));  // 0.5 (1 + tanh z) = sigmoid 2z
    default: return x * sigmoid(x);
  }
}

}  // namespace
