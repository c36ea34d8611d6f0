// Attention of a few rows over the keys of one sequence, in one pass (the running softmax of Milakov and Gimelshein,
// arXiv 1805.02867). Keys are read 32 at a time in their logical order, wherever they lie in memory. So a row's result
// has the same bits on a branch of a tree, in a chunk of a prompt and alone.
#pragma once
#include "check.h"
#include "product.h"

constexpr int KEYS = 32;         // keys per step
constexpr int MAX_QUERIES = 16;  // queries per call: the rows of an AMX tile
constexpr int MAX_LISTED = (MAX_NODES + 1 + KEYS + LANES - 1) / LANES *
                           LANES;  // largest range of keys listed one by one: a tree's rows, and a rest of KEYS

// Where the positions of one slot and head lie: see LayerCache.
struct Places {
  int ring, capacity;
  long operator()(long position) const {
    if (position < ring) return position;
    return position < capacity ? position % ring : ring + (position - capacity);
  }
};

// Keys and values of D numbers each, contiguous or at listed positions.
template <class K, int D>
struct Contiguous {
  const K *keys, *values;
  const K* key(int i) const { return keys + i * D; }
  const K* value(int i) const { return values + i * D; }
};
template <class K, int D>
struct Listed {
  const K *keys, *values;
  const int32_t* at;
  Places places;
  const K* key(int i) const { return keys + places(at[i]) * D; }
  const K* value(int i) const { return values + places(at[i]) * D; }
};

// Multiply a query and a key elementwise, and add up to one register of partial sums. q: in the order of
// load_unordered.
template <int D, class T>
static inline Register products(const float* q, const T* key) {
  Vector sum{};
#pragma GCC unroll 16
  for (int d = 0; d < D; d += LANES) sum = multiply_add(load(q + d), load_unordered(key + d), sum);
  return folded(sum);
}

#if defined(__AVX512BF16__)
template <int D>
static inline Register products(const bf16* q, const bf16* key) {
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int d = 0; d < D; d += 2 * LANES) {
    const __mmask32 inside = d + 2 * LANES <= D ? 0xffffffff : 0xffff;
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(inside, q + d),
                           (__m512bh)_mm512_maskz_loadu_epi16(inside, key + d));
  }
  return (Register)sum;
}
#endif

#if defined(__AMX_BF16__)
// Transpose 16 x 16 numbers, in four rounds that swap the off-diagonal quarters of ever smaller squares.
static inline void transpose(Register* m) {
#define ROUND(SPAN, LOW, HIGH)                           \
  for (int i = 0; i < LANES; i++)                        \
    if (!(i & SPAN)) {                                   \
      const Register a = m[i], b = m[i + SPAN];          \
      m[i] = __builtin_shufflevector(a, b, LOW);         \
      m[i + SPAN] = __builtin_shufflevector(a, b, HIGH); \
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
#endif

template <class T, int D>
struct Attention {
  static constexpr int VECTORS = D / LANES;
  // Sums that fit the registers, split into SLICE vectors of a head for TOGETHER queries.
  static constexpr int SUMS = REGISTERS_EACH == 1 ? 16 : 6;
  static constexpr int SLICE = VECTORS <= SUMS ? VECTORS : 4;
  static constexpr int TOGETHER = SUMS / SLICE < 4 ? SUMS / SLICE : 4;

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  static constexpr bool PAIRED = sizeof(T) == 2;
#else
  static constexpr bool PAIRED = false;
#endif

  const T *keys, *values;  // of one slot and head, D apart
  Places places;
  float scale;
  int num = 0;  // queries
  static constexpr bool REORDERS = sizeof(T) == 2 && REGISTERS_EACH > 1;
  const Kept<T>* q[MAX_QUERIES];
  alignas(64) float reordered[REORDERS ? MAX_QUERIES : 1][D];  // queries in the order of load_unordered
  alignas(64) float scores[MAX_QUERIES][KEYS];
  alignas(64) Kept<T> weights[MAX_QUERIES][KEYS];
  // Weighted sums of values so far, in the order of load_unordered; PAIRED: see add_pairs.
  alignas(64) float mixed[MAX_QUERIES][D];
  alignas(64) float most[MAX_QUERIES] = {};  // largest score so far
  Vector total[MAX_QUERIES];                 // of the weights so far, lane by lane
#if !defined(__AMX_BF16__)
  static constexpr bool KNOWS_LISTED = false;
#else
  // With tiles, scores of listed keys are computed for all queries at once, before they are needed.
  static constexpr bool KNOWS_LISTED = sizeof(T) == 2;
  static constexpr int DEPTH = (D + K_STEP - 1) / K_STEP * K_STEP;
  // Queries in the layout of AMX's right-hand side, and buffers for one query alone.
  alignas(64) bf16 columns[DEPTH * MAX_QUERIES] = {};
  alignas(64) bf16 lone_weights[TILE_ROWS][KEYS] = {};
  alignas(64) float lone_mixed[TILE_ROWS][D];
#endif

  // Keys and values widened once for many queries, where the processor cannot multiply bfloat16.
  static constexpr int WIDENING_QUERIES = 4;
  alignas(64) float wide_keys[WIDENED<T> ? KEYS * D : 1], wide_values[WIDENED<T> ? KEYS * D : 1];

  Attention(const T* keys, const T* values, Places places, float scale)
      : keys(keys), values(values), places(places), scale(scale) {}

  void add_query(const Kept<T>* query) {
    q[num] = query;
    if constexpr (REORDERS) {
      for (int d = 0; d < D; d += LANES) store(reordered[num] + d, unordered(load(query + d)));
      q[num] = reordered[num];
    }
    most[num] = -1e30f;
    total[num] = Vector{};
    memset(mixed[num], 0, sizeof mixed[num]);
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == 2)
      for (int d = 0; d < D; d += 2) memcpy(columns + d * MAX_QUERIES + 2 * num, query + d, 2 * sizeof(T));
#endif
    num++;
  }

  void finish(int n, Kept<T>* out) const {
    const float weight_sum = sum(total[n]);
    int d = 0;
#if defined(__AVX512BF16__)
    if (PAIRED)
      for (; d + 2 * LANES <= D; d += 2 * LANES) {
        const Vector low = load(mixed[n] + d) / weight_sum, high = load(mixed[n] + d + LANES) / weight_sum;
        store(out + d, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
        store(out + d + LANES,
              __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
      }
#endif
    for (; d < D; d += LANES) keep<T>(out + d, in_order(load(mixed[n] + d) / weight_sum, (const T*)nullptr));
  }

  // Attend to the next keys from position `from` on, a multiple of KEYS, of which query n sees visible[n]: none, some
  // of the first, or all KEYS; but not the first hidden[n], if there is such a list.
  void add_keys(long from, const int* visible, const int* hidden = nullptr) {
    const long first = places(from);
    int longest = 0;
    for (int n = 0; n < num; n++) longest = visible[n] > longest ? visible[n] : longest;
    if constexpr (WIDENED<T>)
      if (num >= WIDENING_QUERIES) return add_keys_from(widened(first, longest), first, visible, hidden, longest);
    add_keys_from(Contiguous<T, D>{keys + first * D, values + first * D}, first, visible, hidden, longest);
  }

  template <class Source>
  void add_keys_from(Source at, long first, const int* visible, const int* hidden, int longest) {
    score_all(at, first, longest);
    alignas(64) float factors[MAX_QUERIES];
    const Vector before = load(most);
    for (int n = 0; n < num; n++) most[n] = larger_of(scaled_scores(n, visible[n], hidden ? hidden[n] : 0), most[n]);
    store(factors, exponential(before - load(most)));
    for (int n = 0; n < num; n++) weigh(n, visible[n], factors[n]);
    mix(at, longest);
  }

  // Attend to the last keys, different ones for every query: lists[n], of sizes[n], all of them from `first` to `end`;
  // but not to the first hidden[n], if there is such a list.
  void add_listed_keys(long first, long end, const int32_t* const* lists, const int32_t* sizes,
                       const int32_t* hidden = nullptr) {
    alignas(64) float memory[KNOWS_LISTED ? MAX_LISTED * MAX_QUERIES : 1];
    CHECK(end - first <= MAX_LISTED);
    const float* known = score_range(first, end, memory);
    for (int n = 0; n < num; n++)
      for (int i = 0; i < sizes[n]; i += KEYS) {
        const Listed<T, D> at{keys, values, lists[n] + i, places};
        const int count = sizes[n] - i < KEYS ? sizes[n] - i : KEYS, behind = hidden ? hidden[n] - i : 0;
        if (behind >= count) continue;
        if (known)
          for (int j = 0; j < count; j++) scores[n][j] = known[(at.at[j] - first) * MAX_QUERIES + n];
        else
          score(n, at, count);
        const float before = most[n];
        most[n] = larger_of(scaled_scores(n, count, behind), before);
        weigh(n, count, first_lane(exponential(broadcast_register(before - most[n]))));
        mix_alone(n, at, count);
      }
  }

 private:
  // Scale the scores of a query's next `count` keys, and make them small where there is no key, and for the first
  // `behind`. Returns the largest.
  float scaled_scores(int n, int count, int behind) {
    Vector low = first_lanes(load(scores[n]) * scale, count, -1e30f);
    Vector high = first_lanes(load(scores[n] + LANES) * scale, count - LANES, -1e30f);
    if (behind > 0) {
      float lanes[KEYS];
      store(lanes, low);
      store(lanes + LANES, high);
      for (int i = 0; i < behind && i < KEYS; i++) lanes[i] = -1e30f;
      low = load(lanes);
      high = load(lanes + LANES);
    }
    store(scores[n], low);
    store(scores[n] + LANES, high);
    return largest(larger(low, high));
  }

  static float larger_of(float a, float b) { return a > b ? a : b; }

  // Widen the next keys and values, in the order of load_unordered: sums are then added in the same order.
  Contiguous<float, D> widened(long first, int count) {
    for (long i = 0; i < (long)count * D; i += LANES) {
      store(wide_keys + i, load_unordered(keys + first * D + i));
      store(wide_values + i, load_unordered(values + first * D + i));
    }
    return {wide_keys, wide_values};
  }

  // Turn a query's scores into weights. factor: rescales earlier sums to the new maximum. It is often 1, but a branch
  // would cost more than the multiplication.
  void weigh(int n, int count, float factor) {
#pragma GCC unroll 16
    for (int d = 0; d < D; d += LANES) store(mixed[n] + d, load(mixed[n] + d) * factor);
    if (count <= 0) {
      memset((void*)weights[n], 0, sizeof weights[n]);
      return;
    }
    const Vector low = exponential(load(scores[n]) - most[n]), high = exponential(load(scores[n] + LANES) - most[n]);
    total[n] = total[n] * factor + low + high;
    const T* type = nullptr;
    store(weights[n], rounded(low, type));
    store(weights[n] + LANES, rounded(high, type));
  }

  // Score a query's next keys. Lanes without a key get the last key's score, which scaled_scores masks.
  template <class Source>
  void score(int n, Source at, int count) {
    for (int g = 0; g < count; g += WIDTH) {
      Register part[WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; i++) part[i] = products<D>(q[n], at.key(g + i < count ? g + i : count - 1));
      store(scores[n] + g, sums(part));
    }
  }

  // Add weighted values to the sums of N queries, V vectors from d on.
  template <int N, int V, class Source>
  void add_values(int first, int d, Source at, int count) {
    constexpr int COLUMNS = V * REGISTERS_EACH;
    Register sums[N][COLUMNS];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; c++) sums[n][c] = load_register(mixed[first + n] + d + c * WIDTH);
    for (int i = 0; i < count; i++) {
      const auto* from = at.value(i) + d;
      Register value[COLUMNS];
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; c++) value[c] = register_unordered(from, c);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const Register weight = broadcast_register(to_float(weights[first + n][i]));
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; c++) sums[n][c] = multiply_add(weight, value[c], sums[n][c]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; c++) store(mixed[first + n] + d + c * WIDTH, sums[n][c]);
  }

  // Add weighted values two keys at a time; if their number is odd, the last key's neighbour has weight 0. Interleaving
  // two rows is cheap within quarters of a register, so sums lie, in every 32 numbers, first 0-3, 8-11, 16-19, 24-27.
  template <int N, class Source>
  void add_pairs(int first, Source at, int count) {
#if defined(__AVX512BF16__)
    __m512 sums[N][VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v++) sums[n][v] = _mm512_load_ps(mixed[first + n] + v * LANES);
    for (int i = 0; i < count; i += 2) {
      const T *one = at.value(i), *other = at.value(i + 1 < count ? i + 1 : i);
      __m512i pairs[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v + 1 < VECTORS; v += 2) {
        const __m512i a = _mm512_loadu_si512(one + v * LANES), b = _mm512_loadu_si512(other + v * LANES);
        pairs[v] = _mm512_unpacklo_epi16(a, b);
        pairs[v + 1] = _mm512_unpackhi_epi16(a, b);
      }
      if (VECTORS % 2) {
        const long d = D - LANES;
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(one + d)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(other + d)));
        pairs[VECTORS - 1] = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        int32_t both;
        memcpy(&both, weights[first + n] + i, sizeof both);
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) sums[n][v] = _mm512_dpbf16_ps(sums[n][v], weight, (__m512bh)pairs[v]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v++) _mm512_store_ps(mixed[first + n] + v * LANES, sums[n][v]);
#endif
  }

  template <int N, class Source>
  void mix_few(int first, Source at, int count) {
    if constexpr (PAIRED) return add_pairs<N>(first, at, count);
    static_assert(VECTORS % SLICE == 0);
    for (int d = 0; d < D; d += SLICE * LANES) add_values<N, SLICE>(first, d, at, count);
  }

#if defined(__AMX_BF16__)
  // Multiply 16 keys (left, as they lie) by all queries (right): scores come out key by key.
  void score_tile(const T* keys, float* turned) const {
    _tile_zero(0);
    for (int d = 0; d < D; d += K_STEP) {
      _tile_loadd(4, keys + d, D * 2);
      _tile_loadd(6, columns + d * MAX_QUERIES, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, turned, 64);
  }

  void score_all(Contiguous<T, D> at, long first, int count) {
    if constexpr (sizeof(T) == 4) {
      for (int n = 0; n < num; n++) score(n, at, count);
    } else {
      alignas(64) float turned[LANES * MAX_QUERIES];
      for (int g = 0; g < count; g += LANES) {
        score_tile(keys + (first + g) * D, turned);
        Register m[LANES];
        for (int i = 0; i < LANES; i++) m[i] = load(turned + i * MAX_QUERIES);
        transpose(m);
        for (int n = 0; n < num; n++) store(scores[n] + g, m[n]);
      }
    }
  }

  float* score_range(long first, long end, float* turned) const {
    if constexpr (sizeof(T) == 4) return nullptr;
    for (long key = first; key < end; key += LANES) {
      alignas(64) T together[LANES * D + K_STEP] = {};
      const T* from = keys + places(key) * D;
      if (places(key + LANES - 1) != places(key) + LANES - 1) {  // they do not lie side by side
        for (int i = 0; i < LANES; i++) memcpy((void*)(together + i * D), keys + places(key + i) * D, D * sizeof(T));
        from = together;
      }
      score_tile(from, turned + (key - first) * MAX_QUERIES);
    }
    return turned;
  }

  template <class Source>
  static void mix_tiles(const bf16 (*weights)[KEYS], float (*mixed)[D], Source at, int count) {
    alignas(64) bf16 pairs[VECTORS][KEYS * LANES];  // values in the layout of AMX's right-hand side
    for (int i = 0; i < KEYS; i += 2) {
      const T* one = at.value(i < count ? i : 0);  // any number will do where the weight is 0
      const T* other = at.value(i + 1 < count ? i + 1 : 0);
      for (int v = 0; v < VECTORS; v++) {
        Bfloats a, b;
        memcpy(&a, one + v * LANES, sizeof a);
        memcpy(&b, other + v * LANES, sizeof b);
        const auto both = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                                  9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        memcpy((void*)(pairs[v] + i * LANES), &both, sizeof both);
      }
    }
    _tile_loadd(4, weights, 64);
    for (int v = 0; v < VECTORS; v++) {
      _tile_loadd(0, mixed[0] + v * LANES, D * 4);
      _tile_loadd(6, pairs[v], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stored(0, mixed[0] + v * LANES, D * 4);
    }
  }

  template <class Source>
  void mix(Source at, int count) {
    if constexpr (sizeof(T) == 4)
      mix_rows(0, num, at, count);
    else
      mix_tiles(weights, mixed, at, count);
  }

  template <class Source>
  void mix_alone(int n, Source at, int count) {
    if constexpr (sizeof(T) == 4) {
      mix_rows(n, 1, at, count);
    } else {
      memcpy((void*)lone_weights[0], weights[n], sizeof weights[n]);
      memcpy(lone_mixed[0], mixed[n], sizeof mixed[n]);
      mix_tiles(lone_weights, lone_mixed, at, count);
      memcpy(mixed[n], lone_mixed[0], sizeof mixed[n]);
    }
  }
#else
  // Score all queries. Each of several queries also fetches a part of the next keys and values: fetching all at once
  // would exceed what the processor can have in flight. A single query finishes too soon to gain from it.
  template <class Source>
  void score_all(Source at, long first, int count) {
    constexpr int lines = KEYS * D * sizeof(T) / LINE;
    for (int n = 0; n < num; n++) {
      if (num > 1)
        for (int line = lines * n / num; line < lines * (n + 1) / num; line++) {
          fetch(keys + (first + KEYS) * D, line);
          fetch(values + (first + KEYS) * D, line);
        }
      score(n, at, count);
    }
  }
  float* score_range(long, long, float*) const { return nullptr; }
  template <class Source>
  void mix(Source at, int count) {
    mix_rows(0, num, at, count);
  }
  template <class Source>
  void mix_alone(int n, Source at, int count) {
    mix_rows(n, 1, at, count);
  }
#endif

  template <class Source>
  void mix_rows(int n, int num, Source at, int count) {
    const int end = n + num;
    for (; n + TOGETHER <= end; n += TOGETHER) mix_few<TOGETHER>(n, at, count);
    for (; n < end; n++) mix_few<1>(n, at, count);
  }
};
