// Runs a stack of transformer layers over rows of many sequences, on the CPU: one call per forward pass. The caller
// owns rows, weights and cache (stack.py). This file knows no tokens, no trees and no models by name.
//
// Each stage of a layer is split into small tasks for the threads of a team, and ends when all its tasks are done:
//
//   norm | qkv, rotary, write to the cache | attention | out + residual | norm | up, activation | down + residual
//
// With few rows, norms are not a stage: each thread computes all of them for itself. QKV and attention are then one
// stage. Some models normalise what attention and the MLP add to a row; that is a stage of its own.
//
// Results are rounded to the model's type where transformers' own layers would store them.
#pragma once
#include "attention.h"
#include "stages.h"

namespace {

// A few rows of one sequence that all see its first `context` keys, a multiple of KEYS, and some of those up to `end`.
struct Block {
  int row, rows;
  long context, end;
};

// What a layer reads and writes: its weights, its keys and values, the rotations of its rows.
struct View {
  const Layer& weights;
  LayerCache cache;
  const float *cos, *sin;  // (num, head_dim); null: rows are not rotated
  Places places() const { return {cache.ring, cache.capacity}; }
};

// Where the keys and values of a layer lie.
template <class T>
LayerCache cache_of(const Cache& cache, int layer) {
  if (cache.layers) return cache.layers[layer];
  return {(T*)cache.data + layer * cache.layer_stride,
          cache.values_stride,
          cache.slot_stride,
          cache.head_stride,
          INT32_MAX,
          INT32_MAX};
}

template <class T>
struct Pass {
  const Stack& stack;
  const Rows& rows;
  int num = 0, num_blocks = 0;  // real rows, which lie side by side from here on; blocks of them
  Kept<T>* x;
  Kept<T>* norms;
  Kept<T>* q;
  Kept<T>* mixed;
  Kept<T>* inner;
  Kept<T>* beside;                       // what is normalised before it is added to x
  bool own_norms;                        // each member has its own copy in `norms`
  float *cos = nullptr, *sin = nullptr;  // (num_tables, num, head_dim)
  // Of each row: its index in (batch, rows), its slot and position there; its place in the sequence, which siblings in
  // a tree share; the first key that it sees whatever the window; and the end of the keys that it sees.
  int32_t *where, *slot, *at, *order, *firsts, *ends;
  Block* blocks;
  const int32_t** tails;  // TREE: the keys that a row sees beyond its block's context
  int32_t *tail_sizes, *lists;
  long width, width_heads, width_inner;  // of rows: multiples of K_STEP, which the caller ensures

  Pass(const Stack& stack, const Rows& rows) : stack(stack), rows(rows) {
    CHECK(0 <= rows.first_slot && rows.first_slot + rows.batch <= rows.cache.num_slots);
    CHECK(!rows.blocks || rows.mask == CAUSAL);
    CHECK(stack.hidden % K_STEP == 0 && stack.intermediate % K_STEP == 0 && stack.head_dim <= MAX_HEAD_DIM);
    long listed = 0;
    for (int b = 0; b < rows.batch; b++) {
      CHECK(0 <= rows.counts[b] && rows.counts[b] <= rows.rows);
      CHECK(!rows.counts[b] || (0 <= rows.starts[b] && rows.starts[b] + rows.counts[b] <= rows.cache.num_positions));
      const int count = rows.counts[b];
      num += count;
      listed += rows.mask == TREE ? count * (KEYS + count) : 0;
    }
    const long most = round_up(num, MANY_ROWS), head_dim = stack.head_dim;
    width = stack.hidden;
    width_heads = stack.heads * head_dim;
    width_inner = stack.intermediate;
    own_norms = num * width <= OWN_NUMBERS;
    const long copies = own_norms ? team.size() : 1, angles = stack.num_tables * most * head_dim;
    const long wide = stack.layers[0].post1 ? most * width : 0;
    arena.reserve(Arena::bytes<Kept<T>>(most * width) + Arena::bytes<Kept<T>>(copies * most * width) +
                  2 * Arena::bytes<Kept<T>>(most * width_heads) + Arena::bytes<Kept<T>>(most * width_inner) +
                  Arena::bytes<Kept<T>>(wide) + 2 * Arena::bytes<float>(angles) + 7 * Arena::bytes<int32_t>(most) +
                  Arena::bytes<Block>(most) + Arena::bytes<int32_t*>(most) + Arena::bytes<int32_t>(listed));
    x = arena.take<Kept<T>>(most * width);
    norms = arena.take<Kept<T>>(copies * most * width);
    beside = arena.take<Kept<T>>(wide);
    q = arena.take<Kept<T>>(most * width_heads);
    mixed = arena.take<Kept<T>>(most * width_heads);
    inner = arena.take<Kept<T>>(most * width_inner);
    cos = arena.take<float>(angles);
    sin = arena.take<float>(angles);
    where = arena.take<int32_t>(most);
    slot = arena.take<int32_t>(most);
    at = arena.take<int32_t>(most);
    order = arena.take<int32_t>(most);
    firsts = arena.take<int32_t>(most);
    ends = arena.take<int32_t>(most);
    tail_sizes = arena.take<int32_t>(most);
    blocks = arena.take<Block>(most);
    tails = arena.take<const int32_t*>(most);
    lists = arena.take<int32_t>(listed);
    lay_out();
  }

  // Lay the real rows side by side, and in blocks.
  void lay_out() {
    const int queries = MAX_QUERIES / (stack.heads / stack.kv_heads), together = queries < 1 ? 1 : queries;
    int32_t* list = lists;
    int row = 0;
    for (int b = 0; b < rows.batch; b++) {
      const int start = rows.starts[b], count = rows.counts[b];
      for (int r = 0, first = 0, end = 0; r < count; r++, row++) {
        where[row] = b * rows.rows + r;
        slot[row] = rows.first_slot + b;
        order[row] = at[row] = start + r;
        if (r == end)  // of the last block of rows that see each other
          for (first = r, end = r + 1; end < count && together_with_next(end - 1);) end++;
        firsts[row] = rows.whole ? start + first : at[row];
        ends[row] = start + (rows.mask == CAUSAL ? end : count);
        const long context = (rows.mask == CAUSAL ? at[row] : start) / KEYS * KEYS;
        if (r % together == 0) blocks[num_blocks++] = {row, 0, context, 0};
        Block& block = blocks[num_blocks - 1];
        block.rows++;
        block.end = ends[row];
        if (rows.mask == TREE) {
          tails[row] = list;
          list = tail(list, block.context, start, rows.parents + b * rows.rows, r);
          tail_sizes[row] = list - tails[row];
          order[row] = context + tail_sizes[row] - 1;
        }
      }
    }
  }

  // Whether a row and the next one see each other.
  bool together_with_next(int row) const {
    return rows.blocks && rows.blocks[row] >= 0 && rows.blocks[row] == rows.blocks[row + 1];
  }

  // The first key that a row sees in a layer.
  long first_key(const View& view, int row) const {
    if (!view.weights.window) return 0;
    const int first = order[row] - view.weights.window + 1;
    const int seen = first < firsts[row] ? first : firsts[row];
    return seen > 0 ? seen : 0;
  }

  // List the keys of a sequence behind `context`, the row's ancestors and itself. Returns the end of the list.
  static int32_t* tail(int32_t* list, long context, int start, const int32_t* parents, int row) {
    CHECK(-1 <= parents[row] && parents[row] < row);
    for (int key = context; key < start; key++) *list++ = key;
    for (int node = row; node >= 0; node = parents[node]) list++;
    int32_t* place = list;
    for (int node = row; node >= 0; node = parents[node]) *--place = start + node;
    return list;
  }

  // --- by every member of the team

  void load_rows(Member& team, const void* embeds) {
    const long half = stack.head_dim / 2, all_rows = (long)rows.batch * rows.rows;
    row_stage(team, num, [&](int row) {
      copy(x + row * width, (const T*)embeds + where[row] * width, width);
      for (long table = 0; table < stack.num_tables; table++) {
        float *c = cos + (table * num + row) * 2 * half, *s = sin + (table * num + row) * 2 * half;
        for (long d = 0; d < half; d++) {
          const long position = rows.positions ? rows.positions[stack.axes[d] * all_rows + where[row]] : at[row];
          CHECK(0 <= position && position < stack.num_positions);
          const long from = (table * stack.num_positions + position) * half + d;
          c[d] = c[d + half] = to_float(((const T*)stack.cos)[from]);
          s[d + half] = to_float(((const T*)stack.sin)[from]);
          s[d] = -s[d + half];
        }
      }
    });
  }

  View view(int index) const {
    const Layer& layer = stack.layers[index];
    const Cache& cache = rows.cache;
    const long angles = (long)layer.table * num * stack.head_dim;
    return {layer, cache_of<T>(cache, index), stack.cos ? cos + angles : nullptr, sin + angles};
  }

  // Where keys (which: 0) or values (1) of a row's slot lie, and where the row's own do.
  T* slot_kv(const View& view, int which, int row, int head) const {
    const LayerCache& cache = view.cache;
    return (T*)cache.data + which * cache.values_stride + slot[row] * cache.slot_stride + head * cache.head_stride;
  }
  T* kv_ptr(const View& view, int which, int row, int head) const {
    return slot_kv(view, which, row, head) + view.places()(at[row]) * stack.head_dim;
  }

  // Normalise, if there is a norm, and rotate one head's query or key in place: (head_dim,) numbers already rounded.
  void apply_rope(const View& view, float* head, const void* norm, int row) const {
    const long head_dim = stack.head_dim, half = head_dim / 2;
    const T* type = nullptr;
    if (norm) {
      Vector squares{};
      for (long d = 0; d < head_dim; d += LANES) squares = multiply_add(load(head + d), load(head + d), squares);
      const float factor = 1.0f / __builtin_sqrtf(sum(squares) / head_dim + stack.eps);
      for (long d = 0; d < head_dim; d += LANES) {
        const Vector part = load(head + d) * factor, weight = load((const T*)norm + d);
        store(head + d,
              rounded(stack.norm == RMS_PLUS_ONE ? part * (1.0f + weight) : rounded(part, type) * weight, type));
      }
    }
    if (!view.cos) return;
    float swapped[MAX_HEAD_DIM];
    const float *c = view.cos + row * head_dim, *s = view.sin + row * head_dim;
    for (long d = 0; d < half; d++) {
      swapped[d] = head[d + half];
      swapped[d + half] = head[d];
    }
    for (long d = 0; d < head_dim; d += LANES)
      store(head + d, rounded(load(head + d) * load(c + d), type) + rounded(load(swapped + d) * load(s + d), type));
  }

  // Split some rows' fused product from `panel` on into queries, which stay here, and keys and values, for the cache.
  void split_qkv(const View& view, int first_row, int some, int panel, int num, float* y, long stride_y) {
    const Layer& layer = view.weights;
    const int panels = stack.head_dim / LANES, heads = stack.heads, kv_heads = stack.kv_heads, head = panel / panels;
    for (int row = first_row; row < first_row + some; row++, y += stride_y) {
      for (int p = 0; p < num; p++)
        store(y + p * LANES, with_bias<T>(y + p * LANES, layer.qkv_bias, (panel + p) * LANES));
      if (head < heads + kv_heads) apply_rope(view, y, head < heads ? layer.q_norm : layer.k_norm, row);
      if (head < heads)
        copy(q + row * width_heads + head * stack.head_dim, y, stack.head_dim);
      else
        copy(head < heads + kv_heads ? kv_ptr(view, 0, row, head - heads)
                                     : kv_ptr(view, 1, row, head - heads - kv_heads),
             y, stack.head_dim);
    }
  }

  // Fetch the first keys and values that a block's queries see, while those are computed.
  void fetch_first(const View& view, const Block& block, int head) const {
    if (block.context == 0) return;
    const long from = view.places()(first_key(view, block.row) / KEYS * KEYS) * stack.head_dim;
    const T *keys = slot_kv(view, 0, block.row, head) + from, *values = slot_kv(view, 1, block.row, head) + from;
    for (int line = 0; line < KEYS * stack.head_dim * (int)sizeof(T) / LINE; line++) {
      fetch(keys, line);
      fetch(values, line);
    }
  }

  // Attend from the queries of a block that read this head of keys and values.
  template <int D>
  void attend(const View& view, const Block& block, int head) {
    const int group = stack.heads / stack.kv_heads, queries = block.rows * group;
    const T *keys = slot_kv(view, 0, block.row, head), *values = slot_kv(view, 1, block.row, head);
    for (int first = 0; first < queries; first += MAX_QUERIES) {
      Attention<T, D> attention(keys, values, view.places(), stack.scale);
      const int num = queries - first < MAX_QUERIES ? queries - first : MAX_QUERIES;
      const auto row = [&](int n) { return block.row + (first + n) / group; };
      const auto place = [&](int n) { return row(n) * width_heads + (head * group + (first + n) % group) * D; };
      for (int n = 0; n < num; n++) attention.add_query(q + place(n));
      int visible[MAX_QUERIES], hidden[MAX_QUERIES], firsts[MAX_QUERIES];
      int* const behind = view.weights.window ? hidden : nullptr;
      long key = behind ? block.context : 0;
      if (behind)
        for (int n = 0; n < num; n++) {
          firsts[n] = first_key(view, row(n));
          key = firsts[n] < key ? firsts[n] : key;
        }
      const auto hide = [&](long key) {
        for (int n = 0; n < num; n++) {
          hidden[n] = firsts[n] - key;
          if (hidden[n] >= visible[n]) visible[n] = 0;
        }
      };
      for (int n = 0; n < num; n++) visible[n] = KEYS;
      for (key = key / KEYS * KEYS; key < block.context; key += KEYS) {
        if (behind) {
          for (int n = 0; n < num; n++) visible[n] = KEYS;
          hide(key);
        }
        attention.add_keys(key, visible, behind);
      }
      if (rows.mask == TREE) {
        const int32_t *lists[MAX_QUERIES], *sizes = visible;
        for (int n = 0; n < num; n++) {
          lists[n] = tails[row(n)];
          visible[n] = tail_sizes[row(n)];
          hidden[n] = behind ? firsts[n] - block.context : 0;
        }
        attention.add_listed_keys(block.context, block.end, lists, sizes, behind);
      } else {
        for (long key = block.context; key < block.end; key += KEYS) {
          for (int n = 0; n < num; n++) visible[n] = ends[row(n)] - key < KEYS ? ends[row(n)] - key : KEYS;
          if (behind) hide(key);
          attention.add_keys(key, visible, behind);
        }
      }
      for (int n = 0; n < num; n++) attention.finish(n, mixed + place(n));
    }
  }

  void attend(const View& view, const Block& block, int head) {
    switch (stack.head_dim) {
#define CASE(D) \
  case D: return attend<D>(view, block, head);
      HEAD_DIMS(CASE)
#undef CASE
    }
  }

  // Whether one task does everything for one KV head (QKV product and attention), so that threads exchange nothing in
  // between: with few rows, if every member then has a task.
  bool by_heads(const Member& team) const { return num <= CHUNK_ROWS && stack.kv_heads % team.members == 0; }

  // The weights of a layer; a task of the QKV product is one head.
  Panels<T> qkv(const Layer& layer) const {
    const int panels = stack.head_dim / LANES;
    return {layer.qkv, (stack.heads + 2 * stack.kv_heads) * panels, panels, width};
  }
  Panels<T> out(const Layer& layer) const { return {layer.out, stack.hidden / LANES, PANELS, width_heads}; }
  Panels<T> up(const Layer& layer) const {
    return {layer.up, stack.intermediate / LANES * (gated() ? 2 : 1), PANELS, width};
  }
  Panels<T> down(const Layer& layer) const { return {layer.down, stack.hidden / LANES, PANELS, width_inner}; }
  bool gated() const { return stack.gated; }

  // The first weights that this member reads in a layer; after the last layer, those of the last layer again.
  const T* first_weights(const Member& team, int index) const {
    const Layer& layer = stack.layers[index < stack.num_layers ? index : index - 1];
    if (!by_heads(team)) return qkv(layer).own(team, chunks_of(num));
    return qkv(layer).at(part(team.first(stack.kv_heads), 0));
  }

  // The first panel of the i-th part of a KV head: one of its queries, then its keys, then its values.
  int part(int head, int i) const {
    const int heads = stack.heads, kv_heads = stack.kv_heads, group = heads / kv_heads;
    return (i < group ? head * group + i : heads + (i - group) * kv_heads + head) * (stack.head_dim / LANES);
  }

  void attention(Member& team, const View& view, const Kept<T>* from, const T* then) {
    const int kv_heads = stack.kv_heads, group = stack.heads / kv_heads;
    const Panels<T> w = qkv(view.weights);
    if (!by_heads(team)) {
      project(team, view, from, w, 0, then);
      team.share(num_blocks * kv_heads, [&](int task) { attend(view, blocks[task / kv_heads], task % kv_heads); });
      return;
    }
    const int last = team.end(kv_heads) - 1;
    team.share(kv_heads, [&](int head) {
      for (int b = 0; b < num_blocks && num > 1; b++) fetch_first(view, blocks[b], head);
      for (int i = 0; i < group + 2; i++) {  // queries, keys and values
        const T* ahead = i < group + 1 ? w.at(part(head, i + 1)) : head < last ? w.at(part(head + 1, 0)) : then;
        product_rows<T>(from, width, 0, num, w, part(head, i), w.group, ahead,
                        [&](auto... block) { split_qkv(view, block...); });
      }
      for (int b = 0; b < num_blocks; b++) attend(view, blocks[b], head);
    });
  }

  // Multiply by the weights of whole heads; w begins at head `first_head`.
  void project(Member& team, const View& view, const Kept<T>* from, const Panels<T>& w, int first_head, const T* then) {
    product_stage<T>(team, from, width, num, w, then,
                     [&](int row, int some, int panel, int num, float* y, long stride_y) {
                       split_qkv(view, row, some, first_head * w.group + panel, num, y, stride_y);
                     });
  }

  // Multiply, and add the result to x: as it is, or normalised if there is a norm.
  void add_product(Member& team, const Kept<T>* from, long stride, const Panels<T>& w, const void* bias,
                   const void* post, const T* then) {
    product_stage<T>(team, from, stride, num, w, then,
                     [&](int row, int some, int panel, int panels, float* y, long stride_y) {
                       for (int r = 0; r < some; r++)
                         for (int p = 0; p < panels; p++) {
                           const long output = (panel + p) * LANES, to = (row + r) * width + output;
                           const Vector result = with_bias<T>(y + r * stride_y + p * LANES, bias, output);
                           if (post)
                             keep<T>(beside + to, result);
                           else
                             keep<T>(x + to, load(x + to) + result);
                         }
                     });
    if (!post) return;
    row_stage(team, num, [&](int row) {
      Kept<T>*to = x + row * width, *from = beside + row * width;
      normalise<T>(from, post, nullptr, (Norm)stack.norm, stack.eps, width, from);
      add(to, from);
    });
  }

  // Add a row of numbers to a row.
  template <class X>
  void add(Kept<T>* to, const X* from) const {
    for (long i = 0; i < width; i += LANES) keep<T>(to + i, load(to + i) + load(from + i));
  }

  // Multiply by the up weights and apply the activation. If it is gated, panels of gate and up alternate.
  void activate(Member& team, const Kept<T>* from, const Panels<T>& w, const void* bias, const T* then) {
    const int step = gated() ? 2 : 1;
    const T* type = nullptr;
    product_stage<T>(
        team, from, width, num, w, then, [&](int row, int some, int panel, int panels, float* y, long stride_y) {
          for (int r = 0; r < some; r++)
            for (int p = 0; p < panels; p += step) {
              const long output = (panel + p) * LANES;
              const float* at = y + r * stride_y + p * LANES;
              Vector value = rounded(activated(with_bias<T>(at, bias, output), (Activation)stack.activation), type);
              if (step == 2) value *= with_bias<T>(at + LANES, bias, output + LANES);
              keep<T>(inner + (row + r) * width_inner + output / step, value);
            }
        });
  }

  void layer(Member& team, int index) {
    const Layer& layer = stack.layers[index];
    const int chunks = chunks_of(num);
    attention(team, view(index), norm(team, layer.norm1, layer.norm1_bias), out(layer).own(team, chunks));
    add_product(team, mixed, width_heads, out(layer), layer.out_bias, layer.post1, up(layer).own(team, chunks));
    activate(team, norm(team, layer.norm2, layer.norm2_bias), up(layer), layer.up_bias, down(layer).own(team, chunks));
    add_product(team, inner, width_inner, down(layer), layer.down_bias, layer.post2, first_weights(team, index + 1));
  }

  // Normalise x. With few rows each member normalises all rows itself. A late member may then read x while others
  // already add the stage's results to it. Its stage has finished, so it claims no task and its result is discarded.
  // Formally this is a data race (plain loads beside plain stores); atomic accesses would prevent vector instructions.
  const Kept<T>* norm(Member& team, const void* weight, const void* bias) {
    Kept<T>* normed = norms + (own_norms ? team.index * round_up(num, MANY_ROWS) * width : 0);
    const auto each = [&](int row) {
      normalise<T>(x + row * width, weight, bias, (Norm)stack.norm, stack.eps, width, normed + row * width);
    };
    if (own_norms)
      for (int row = 0; row < num; row++) each(row);
    else
      row_stage(team, num, each);
    return normed;
  }

  // Copy all rows to column `column` of to (batch, rows, columns, hidden).
  void copy_out(Member& team, T* to, int column, int columns) {
    row_stage(team, num,
              [&](int row) { copy(to + (where[row] * (long)columns + column) * width, x + row * width, width); });
  }

  // Run all layers; the outputs of auxiliary ones go to aux (batch, rows, num_aux, hidden), before anything is added.
  void run(Member& team, const void* embeds, T* aux) {
    load_rows(team, embeds);
    for (int index = 0, next = 0; index < stack.num_layers; index++) {
      layer(team, index);
      if (next < stack.num_aux && stack.aux_layers[next] == index) copy_out(team, aux, next++, stack.num_aux);
      if (index >= rows.num_added) continue;
      const T* added = (const T*)rows.added + (long)index * rows.batch * rows.rows * width;
      row_stage(team, num, [&](int row) { add(x + row * width, added + where[row] * width); });
    }
  }

  // Only write keys and values of `context` to the cache.
  void write_kv(Member& team, const void* context) {
    load_rows(team, context);
    for (int index = 0; index < stack.num_layers; index++) {
      const Panels<T> whole = qkv(stack.layers[index]);
      const Panels<T> w{whole.at(stack.heads * whole.group), 2 * stack.kv_heads * whole.group, whole.group, width};
      project(team, view(index), x, w, stack.heads, w.packed);
    }
  }

  const Kept<T>* final_norm(Member& team) { return norm(team, stack.final_norm, stack.final_bias); }

  void finish(Member& team, T* hidden) {
    if (!stack.final_norm) return copy_out(team, hidden, 0, 1);
    row_stage(team, num, [&](int row) {
      normalise<T>(x + row * width, stack.final_norm, stack.final_bias, (Norm)stack.norm, stack.eps, width,
                   hidden + where[row] * width);
    });
  }
};

}  // namespace
