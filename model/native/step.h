// What a decoding step does, each in one call: propose trees, verify them, keep what was accepted, show it to the draft.
// Between two calls only tokens are looked at (engine.py).
#pragma once
#include <time.h>

#include "candidates.h"
#include "pass.h"

extern "C" {

struct Linear {
  const void *packed, *bias;
  int32_t inputs, outputs;
};

// The FLASH draft (model/draft/network.py) around its layers.
struct DraftNetwork {
  const Stack* stack;
  const void *entries, *masks;        // (vocab, hidden), (block - 1, hidden): what enters the layers
  Linear out, head;                   // to the target's hidden state, and from there to the vocabulary
  const void *tap_norms, *fuse_norm;  // (num_taps, target's hidden), (hidden)
  Linear fuse;
  int32_t num_taps;
  Draft candidates;
};
}

namespace {

double tree_seconds = 0.0;  // that `propose` has spent on trees, for whoever measures

static inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

// y[place(row)] = x times w, row by row; x lies `linear.inputs` apart, in whole tiles.
template <class T, class Place>
void linear_stage(Member& team, const T* x, int rows, const Linear& linear, const Place& place) {
  const int outputs = linear.outputs, panels = (outputs + LANES - 1) / LANES;
  product_stage(team, x, linear.inputs, rows, linear.packed, panels, PANELS, linear.inputs,
                [&](int row, int some, int panel, int num, float* y, long stride) {
                  for (int r = 0; r < some; r++)
                    for (int p = 0; p < num; p++) {
                      const long output = (panel + p) * LANES;
                      store_some(place(row + r) + output, with_bias<T>(y + r * stride + p * LANES, linear.bias, output), outputs - output);
                    }
                });
}

// The first of the largest, as torch's argmax.
template <class T>
int64_t first_largest(const T* x, long count) {
  vf most = all(-__builtin_inff());
  long i = 0;
  for (; i + LANES <= count; i += LANES) most = larger(load(x + i), most);
  float best = largest(most);
  for (; i < count; i++) best = number(x[i]) > best ? number(x[i]) : best;
  for (i = 0; i < count && number(x[i]) != best; i++) {
  }
  return i < count ? i : 0;
}

// tokens (batch, rows) -> taps (batch, rows, num_taps, hidden), logits (batch, rows, vocab) and chosen (batch, rows).
template <class T>
void verify(const Stack& stack, const Rows& rows, const void* embeddings, const int64_t* tokens, const Linear& head, void* taps, void* logits,
            int64_t* chosen) {
  const long wide = stack.hidden, count = (long)rows.batch * rows.rows, vocab = head.outputs;
  scratch.reserve(Arena::bytes<T>(count * wide));
  T* embeds = scratch.take<T>(count * wide);
  Pass<T> pass(stack, rows, arena);
  team.run([&](Member member) {
    row_stage(member, pass.num, [&](int row) {
      memcpy((void*)(embeds + pass.where[row] * wide), (const T*)embeddings + tokens[pass.where[row]] * wide, wide * sizeof(T));
    });
    pass.run(member, embeds, (T*)taps);
    pass.final_norm(member);
    linear_stage(member, pass.normed, pass.num, head, [&](int row) { return (T*)logits + pass.where[row] * vocab; });
    row_stage(member, pass.num, [&](int row) { chosen[pass.where[row]] = first_largest((const T*)logits + pass.where[row] * vocab, vocab); });
  });
}

// Logits (batch, block, vocab), and trees behind the roots that `trees` has; rows.counts is 0 for those that get none.
template <class T>
void propose(const DraftNetwork& draft, const Rows& rows, void* logits, const Trees& trees) {
  const Stack& stack = *draft.stack;
  const long wide = stack.hidden, block = rows.rows, count = rows.batch * block, most = round_up(count, MANY_ROWS);
  const long wide_out = draft.out.outputs, vocab = draft.head.outputs;
  scratch.reserve(Arena::bytes<T>(count * wide) + Arena::bytes<T>(most * wide_out));
  T *embeds = scratch.take<T>(count * wide), *hidden = scratch.take<T>(most * wide_out);
  Pass<T> pass(stack, rows, arena);
  Draft candidates = draft.candidates;
  candidates.logits = logits;
  const pthread_t caller = pthread_self();
  team.run([&](Member member) {
    row_stage(member, pass.num, [&](int row) {
      const int b = pass.where[row] / block, r = pass.where[row] % block;
      const T* from = r ? (const T*)draft.masks + (r - 1) * wide : (const T*)draft.entries + trees.tokens[b * (long)trees.rows] * wide;
      memcpy((void*)(embeds + pass.where[row] * wide), from, wide * sizeof(T));
    });
    pass.run(member, embeds, (T*)nullptr);
    pass.final_norm(member);
    linear_stage(member, pass.normed, pass.num, draft.out, [&](int row) { return hidden + row * wide_out; });
    linear_stage(member, hidden, pass.num, draft.head, [&](int row) { return (T*)logits + pass.where[row] * vocab; });
    const double begun = now();
    member.share(trees.batch, [&](int b) {
      if (rows.counts[b]) grow<T>(candidates, trees, b);
    });
    if (pthread_equal(caller, pthread_self())) tree_seconds += now() - begun;
  });
}

// Tapped hidden states to context: from(row) is (num_taps, target's hidden), to(row) is (hidden).
template <class T, class From, class To>
void fuse_stages(Member& team, const DraftNetwork& draft, int rows, T* scaled, T* fused, const From& from, const To& to) {
  const long wide_taps = draft.fuse.inputs, wide_tap = wide_taps / draft.num_taps, wide = draft.fuse.outputs;
  const float eps = draft.stack->eps;
  row_stage(team, rows, [&](int row) {
    for (long tap = 0; tap < wide_taps; tap += wide_tap)
      normalise(from(row) + tap, (const T*)draft.tap_norms + tap, nullptr, RMS, eps, wide_tap, scaled + row * wide_taps + tap);
  });
  linear_stage(team, scaled, rows, draft.fuse, [&](int row) { return fused + row * wide; });
  row_stage(team, rows, [&](int row) { normalise(fused + row * wide, draft.fuse_norm, nullptr, RMS, eps, wide, to(row)); });
}

// taps (rows, num_taps, target's hidden) -> context (rows, hidden).
template <class T>
void fuse(const DraftNetwork& draft, const void* taps, int rows, void* context) {
  const long wide_taps = draft.fuse.inputs, wide = draft.fuse.outputs, most = round_up(rows, MANY_ROWS);
  scratch.reserve(Arena::bytes<T>(most * wide_taps) + Arena::bytes<T>(most * wide));
  T *scaled = scratch.take<T>(most * wide_taps), *fused = scratch.take<T>(most * wide);
  team.run([&](Member member) {
    fuse_stages(member, draft, rows, scaled, fused, [&](int row) { return (const T*)taps + row * wide_taps; },
                [&](int row) { return (T*)context + row * wide; });
  });
}

// Of taps (batch, num, num_taps, target's hidden) the rows that `paths` (batch, rows.rows) names, fused, become context.
template <class T>
void observe(const DraftNetwork& draft, const Rows& rows, const void* taps, int num, const int32_t* paths) {
  const long wide = draft.stack->hidden, wide_taps = draft.fuse.inputs;
  const long count = (long)rows.batch * rows.rows, most = round_up(count, MANY_ROWS);
  scratch.reserve(Arena::bytes<T>(most * wide_taps) + 2 * Arena::bytes<T>(most * wide));
  T *scaled = scratch.take<T>(most * wide_taps), *fused = scratch.take<T>(most * wide), *context = scratch.take<T>(most * wide);
  Pass<T> pass(*draft.stack, rows, arena);
  const auto from = [&](int row) {
    const int place = pass.where[row], b = place / rows.rows;
    return (const T*)taps + (b * (long)num + paths[place]) * wide_taps;
  };
  team.run([&](Member member) {
    fuse_stages(member, draft, pass.num, scaled, fused, from, [&](int row) { return context + pass.where[row] * wide; });
    pass.hold(member, context);
  });
}

// moves (num, 3): in every layer and head of a slot, the row at one position goes to another; in order.
inline void move_rows(char* cache, int layers, int heads, const int64_t* strides, long row_bytes, const int32_t* moves, int num) {
  team.run([&](Member member) {
    member.share(2 * layers, [&](int task) {
      char* part = cache + (task / 2) * strides[0] + (task % 2) * strides[1];
      for (int i = 0; i < num; i++)
        for (int head = 0; head < heads; head++) {
          char* rows = part + moves[3 * i] * strides[2] + head * strides[3];
          memcpy(rows + moves[3 * i + 2] * row_bytes, rows + moves[3 * i + 1] * row_bytes, row_bytes);
        }
    });
  });
}

}  // namespace
