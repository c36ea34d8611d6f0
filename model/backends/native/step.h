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

// The FLASH draft (model/drafters/flash/network.py) around its layers.
struct DraftNetwork {
  const Stack* stack;
  // What enters the layers: of a token its row of token_table (vocab, hidden), or where that is null, `embed` of its row of
  // embeddings (vocab, target's hidden); then masks (block - 1, hidden); normalised by input_norm (hidden).
  const void *token_table, *embeddings, *masks, *input_norm;
  Linear embed;
  Linear out, head;                   // to the target's hidden state, and from there to the vocabulary
  const void *tap_norms, *fuse_norm;  // (num_taps, target's hidden), (hidden)
  // fuse: of the taps; feature: of the last row of the context, to what enters; context: of `out`, to the sequential
  // head, packed null where there is none.
  Linear fuse, feature, context;
  int32_t num_taps;
  Draft candidates;
};

// Where a stack's keys and values lie, as in `Rows`; lengths: (slots,) what every slot holds.
struct Cache {
  void* data;
  int64_t layer_stride, values_stride, slot_stride, head_stride;
  int32_t* lengths;
};

enum { IDLE = -1, PLAIN = -2 };
enum Part { PROPOSING, GROWING, VERIFYING, ACCEPTING, OBSERVING, NUM_PARTS };

// One round over slots 0.. of both caches (model/engine/round.py). `rows` a slot: its root and at most so many nodes less one.
struct Round {
  const Stack* target;
  const void* embeddings;
  Linear head;
  const DraftNetwork* draft;  // null: none
  Cache target_cache, draft_cache;
  int32_t batch, rows, axes;
  int32_t given;                    // whether the trees are there already
  const int64_t *newest, *budgets;  // (batch,) last token; nodes at most, IDLE or PLAIN (model/decoding/tree.py)
  const int32_t* roots;             // (batch,) position ids of the roots
  Trees trees;
  Worth worth;
  int32_t *counts, *positions, *paths;  // (batch,) real rows; (axes, batch, rows); (batch, rows) those of a path
  int32_t *accepted, *shown;              // (batch,) how many those are, and of them the draft is shown
  void *taps, *logits, *drafted, *tails;  // tails: (slots, hidden), the last row of each of the draft's contexts
  int64_t *chosen, *emitted;  // (batch, rows): the target's own tokens; what is emitted
  double* seconds;            // (NUM_PARTS,) that each part took
};
}

namespace {

// y[place(row)] = x times w, row by row; x lies `linear.inputs` apart, in whole tiles.
template <class T, class Place>
void linear_stage(Member& team, const Kept<T>* x, int rows, const Linear& linear, const Place& place) {
  const int outputs = linear.outputs;
  const Panels<T> w{linear.packed, (outputs + LANES - 1) / LANES, PANELS, linear.inputs};
  product_stage<T>(team, x, linear.inputs, rows, w, w.packed, [&](int row, int some, int panel, int num, float* y, long stride) {
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
  Vector most = broadcast(-__builtin_inff());
  long i = 0;
  for (; i + LANES <= count; i += LANES) most = larger(load(x + i), most);
  float best = largest(most);
  for (; i < count; i++) best = to_float(x[i]) > best ? to_float(x[i]) : best;
  for (i = 0; i < count && to_float(x[i]) != best; i++) {
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
  Pass<T> pass(stack, rows);
  team.run([&](Member& member) {
    row_stage(member, pass.num, [&](int row) {
      memcpy((void*)(embeds + pass.where[row] * wide), (const T*)embeddings + tokens[pass.where[row]] * wide, wide * sizeof(T));
    });
    pass.run(member, embeds, (T*)taps);
    const Kept<T>* normed = pass.final_norm(member);
    linear_stage<T>(member, normed, pass.num, head, [&](int row) { return (T*)logits + pass.where[row] * vocab; });
    row_stage(member, pass.num, [&](int row) { chosen[pass.where[row]] = first_largest((const T*)logits + pass.where[row] * vocab, vocab); });
  });
}

// Logits (batch, block, vocab), and trees behind the roots that `trees` has; rows.counts is 0 for those that get none.
template <class T>
void propose(const DraftNetwork& draft, const Rows& rows, const void* tails, const Worth& worth, void* logits, const Trees& trees,
             double& growing) {
  const Stack& stack = *draft.stack;
  const long wide = stack.hidden, block = rows.rows, count = rows.batch * block, most = round_up(count, MANY_ROWS);
  const long wide_in = draft.token_table ? 0 : draft.embed.inputs;
  const long wide_out = draft.out.outputs, vocab = draft.head.outputs, rank = draft.candidates.rank;
  const int nodes = draft.candidates.block * draft.candidates.width;  // of a tree at most
  const long sequences = round_up(rows.batch, MANY_ROWS);
  scratch.reserve(Arena::bytes<T>(count * wide) + 2 * Arena::bytes<Kept<T>>(sequences * wide) + Arena::bytes<Kept<T>>(most * wide_out) +
                  Arena::bytes<Kept<T>>(sequences * wide_in) + Arena::bytes<T>(sequences * wide) + Arena::bytes<T>(count * rank) + Arena::bytes<Candidate>(rows.batch * nodes) +
                  Arena::bytes<int32_t>(rows.batch * nodes) + Arena::bytes<Growth>(rows.batch) + Arena::bytes<int64_t>(rows.batch));
  T *embeds = scratch.take<T>(count * wide), *contexts = scratch.take<T>(count * rank);
  Kept<T>* hidden = scratch.take<Kept<T>>(most * wide_out);
  Kept<T> *read = scratch.take<Kept<T>>(sequences * wide), *features = scratch.take<Kept<T>>(sequences * wide);
  Kept<T>* embeddings = scratch.take<Kept<T>>(sequences * wide_in);
  T* embedded = scratch.take<T>(sequences * wide);  // of the newest tokens
  Candidate* candidate = scratch.take<Candidate>(rows.batch * nodes);
  int32_t* level_of = scratch.take<int32_t>(rows.batch * nodes);
  Growth* growths = scratch.take<Growth>(rows.batch);
  int64_t* admitted = scratch.take<int64_t>(rows.batch);
  for (int b = 0; b < rows.batch; b++) growths[b] = {candidate + b * nodes, level_of + b * nodes, 0};
  Pass<T> pass(stack, rows);
  Draft candidates = draft.candidates;
  candidates.logits = logits, candidates.contexts = contexts;
  const int drafting = pass.num / block;  // sequences
  for (int i = 0; i < drafting; i++) {
    const long b = pass.where[i * block] / block, token = trees.tokens[b * trees.rows];
    copy(read + i * wide, (const T*)tails + b * wide, wide);
    if (draft.token_table)
      memcpy((void*)(embedded + i * wide), (const T*)draft.token_table + token * wide, wide * sizeof(T));
    else
      copy(embeddings + i * wide_in, (const T*)draft.embeddings + token * wide_in, wide_in);
  }
  const pthread_t caller = pthread_self();
  team.run([&](Member& member) {
    linear_stage<T>(member, read, drafting, draft.feature, [&](int i) { return features + i * wide; });
    if (!draft.token_table) linear_stage<T>(member, embeddings, drafting, draft.embed, [&](int i) { return embedded + i * wide; });
    row_stage(member, pass.num, [&](int row) {
      const int r = pass.where[row] % block;
      const T* from = r ? (const T*)draft.masks + (r - 1) * wide : embedded + row / block * wide;
      T* to = embeds + pass.where[row] * wide;
      for (long i = 0; i < wide; i += LANES) store(to + i, load(from + i) + load(features + row / block * wide + i));
      normalise<T>(to, draft.input_norm, nullptr, RMS, stack.eps, wide, to);
    });
    pass.run(member, embeds, (T*)nullptr);
    const Kept<T>* normed = pass.final_norm(member);
    linear_stage<T>(member, normed, pass.num, draft.out, [&](int row) { return hidden + row * wide_out; });
    linear_stage<T>(member, hidden, pass.num, draft.head, [&](int row) { return (T*)logits + pass.where[row] * vocab; });
    if (draft.context.packed)
      linear_stage<T>(member, hidden, pass.num, draft.context, [&](int row) { return contexts + pass.where[row] * rank; });
    double begun = now();
    if (candidates.fixed) {
      member.share(trees.batch, [&](int b) {
        if (rows.counts[b]) fill<T>(candidates, trees, b);
      });
    } else {
      member.share(trees.batch, [&](int b) {
        if (rows.counts[b]) begun += expand<T>(candidates, trees, b, growths[b]);  // this thread's head is not the tree's time
      });
      member.share(1, [&](int) { admit(worth, trees, growths, admitted); });
      member.share(trees.batch, [&](int b) {
        if (rows.counts[b]) plant(trees, b, growths[b], admitted[b]);
      });
    }
    if (pthread_equal(caller, pthread_self())) growing = now() - begun;
  });
}

// Tapped hidden states to context: from(row) is (num_taps, target's hidden), to(row, write) calls write with where its (hidden) goes.
template <class T, class From, class To>
void fuse_stages(Member& team, const DraftNetwork& draft, int rows, Kept<T>* scaled, Kept<T>* fused, const From& from, const To& to) {
  const long wide_taps = draft.fuse.inputs, wide_tap = wide_taps / draft.num_taps, wide = draft.fuse.outputs;
  const float eps = draft.stack->eps;
  row_stage(team, rows, [&](int row) {
    for (long tap = 0; tap < wide_taps; tap += wide_tap)
      normalise<T>(from(row) + tap, (const T*)draft.tap_norms + tap, nullptr, RMS, eps, wide_tap, scaled + row * wide_taps + tap);
  });
  linear_stage<T>(team, scaled, rows, draft.fuse, [&](int row) { return fused + row * wide; });
  row_stage(team, rows, [&](int row) {
    to(row, [&](auto* context) { normalise<T>(fused + row * wide, draft.fuse_norm, nullptr, RMS, eps, wide, context); });
  });
}

// taps (rows, num_taps, target's hidden) -> context (rows, hidden).
template <class T>
void fuse(const DraftNetwork& draft, const void* taps, int rows, void* context) {
  const long wide_taps = draft.fuse.inputs, wide = draft.fuse.outputs, most = round_up(rows, MANY_ROWS);
  scratch.reserve(Arena::bytes<Kept<T>>(most * wide_taps) + Arena::bytes<Kept<T>>(most * wide));
  Kept<T> *scaled = scratch.take<Kept<T>>(most * wide_taps), *fused = scratch.take<Kept<T>>(most * wide);
  team.run([&](Member& member) {
    fuse_stages<T>(member, draft, rows, scaled, fused, [&](int row) { return (const T*)taps + row * wide_taps; },
                   [&](int row, const auto& write) { write((T*)context + row * wide); });
  });
}

// Of taps (batch, num, num_taps, target's hidden) the rows that `paths` (batch, num) names, fused, become context.
template <class T>
void observe(const DraftNetwork& draft, const Rows& rows, const void* taps, int num, const int32_t* paths, void* tails) {
  const long wide = draft.stack->hidden, wide_taps = draft.fuse.inputs;
  const long count = (long)rows.batch * rows.rows, most = round_up(count, MANY_ROWS);
  scratch.reserve(Arena::bytes<Kept<T>>(most * wide_taps) + Arena::bytes<Kept<T>>(most * wide) + Arena::bytes<T>(most * wide));
  Kept<T> *scaled = scratch.take<Kept<T>>(most * wide_taps), *fused = scratch.take<Kept<T>>(most * wide);
  T* context = scratch.take<T>(most * wide);
  Pass<T> pass(*draft.stack, rows);
  const auto from = [&](int row) {
    const int b = pass.where[row] / rows.rows, at = pass.where[row] % rows.rows;
    return (const T*)taps + (b * (long)num + paths[b * (long)num + at]) * wide_taps;
  };
  team.run([&](Member& member) {
    fuse_stages<T>(member, draft, pass.num, scaled, fused, from, [&](int row, const auto& write) { write(context + pass.where[row] * wide); });
    pass.hold(member, context);
  });
  for (int b = 0; b < rows.batch; b++)
    if (const int some = rows.counts[b])
      memcpy((void*)((T*)tails + b * wide), context + (b * (long)rows.rows + some - 1) * wide, wide * sizeof(T));
}

// In every layer and head of a slot, the rows of its path go where it ends.
template <class T>
void move_rows(const Round& round) {
  const Stack& stack = *round.target;
  const Cache& cache = round.target_cache;
  const long bytes = stack.head_dim * sizeof(T);
  const auto moved = [&](int b) { return round.accepted[b] && round.paths[b * (long)round.rows + round.accepted[b] - 1] >= round.accepted[b]; };
  bool any = false;
  for (int b = 0; b < round.batch; b++) any = any || moved(b);
  if (!any) return;
  team.run([&](Member& member) {
    member.share(2 * stack.num_layers, [&](int task) {
      T* part = (T*)cache.data + (task / 2) * cache.layer_stride + (task % 2) * cache.values_stride;
      for (int b = 0; b < round.batch; b++) {
        if (!moved(b)) continue;
        for (int i = 0; i < round.accepted[b]; i++) {
          const int from = round.paths[b * (long)round.rows + i];
          if (from == i) continue;
          for (int head = 0; head < stack.kv_heads; head++) {
            T* rows = part + b * cache.slot_stride + head * cache.head_stride + (long)cache.lengths[b] * stack.head_dim;
            memcpy((void*)(rows + (long)i * stack.head_dim), rows + (long)from * stack.head_dim, bytes);
          }
        }
      }
    });
  });
}

inline Rows rows_of(const Cache& cache, int batch, int rows, Sight sight, const int32_t* counts, const int32_t* parents, const int32_t* positions) {
  return Rows{batch, rows, 0, sight, cache.lengths, counts, parents, positions, cache.data,
              cache.layer_stride, cache.values_stride, cache.slot_stride, cache.head_stride};
}

// Trees for the slots with a budget, and what the target says at every node.
template <class T>
void look(Round& round) {
  const int batch = round.batch;
  const long rows = round.rows, all = batch * rows;
  const double begun = now();
  Trees& trees = round.trees;
  if (!round.given) {
    memset(trees.tokens, 0, all * sizeof *trees.tokens);
    memset(trees.depths, 0, all * sizeof *trees.depths);
    memset(trees.parents, -1, all * sizeof *trees.parents);
    for (int b = 0; b < batch; b++) trees.tokens[b * rows] = round.newest[b], trees.sizes[b] = 1;
  }
  round.seconds[GROWING] = 0.0;
  if (!round.given && rows > 1) {
    const int block = round.draft->candidates.block;
    for (int b = 0; b < batch; b++) round.counts[b] = round.budgets[b] > 0 ? block : 0;
    propose<T>(*round.draft, rows_of(round.draft_cache, batch, block, WHOLE, round.counts, nullptr, nullptr), round.tails, round.worth,
               round.drafted, trees, round.seconds[GROWING]);
  }
  const double drafted = now();
  for (int b = 0; b < batch; b++) {
    round.counts[b] = round.budgets[b] == IDLE ? 0 : trees.sizes[b];
    for (int axis = 0; axis < round.axes; axis++)
      for (long at = b * rows; at < (b + 1) * rows; at++) round.positions[axis * all + at] = round.roots[b] + trees.depths[at];
  }
  const Rows verified = rows_of(round.target_cache, batch, rows, TREE, round.counts, trees.parents, round.positions);
  verify<T>(*round.target, verified, round.embeddings, trees.tokens, round.head, round.taps, round.logits, round.chosen);
  round.seconds[PROPOSING] = drafted - begun - round.seconds[GROWING];
  round.seconds[VERIFYING] = now() - drafted;
}

// Sample and match (model/decoding/verify.py): descend to the child that carries what the target chose, as long as there is one.
inline int walk(const Round& round, int b) {
  const long first = b * (long)round.rows;
  const Trees& trees = round.trees;
  int length = 1;
  for (int row = 1; row < round.counts[b]; row++) round.worth.tried[bin_of(trees.scores[first + row])]++;
  round.paths[first] = 0, round.emitted[first] = round.chosen[first];
  for (int row = 1; row < round.counts[b]; row++) {  // a parent comes before its children, so that once through is enough
    if (trees.parents[first + row] != round.paths[first + length - 1] || trees.tokens[first + row] != round.emitted[first + length - 1]) continue;
    round.worth.held[bin_of(trees.scores[first + row])]++;
    round.paths[first + length] = row, round.emitted[first + length] = round.chosen[first + row];
    length++;
  }
  return length;
}

// What `chosen` agrees with is kept, in both caches, and emitted.
template <class T>
void accept(Round& round) {
  const double begun = now();
  int longest = 0;  // of what the draft is shown
  for (int b = 0; b < round.batch; b++) {
    round.accepted[b] = round.counts[b] ? walk(round, b) : 0;
    round.shown[b] = round.budgets[b] == PLAIN ? 0 : round.accepted[b];
    longest = round.shown[b] > longest ? round.shown[b] : longest;
  }
  move_rows<T>(round);
  const double accepted = now();
  if (round.draft && longest) {
    const Rows kept = rows_of(round.draft_cache, round.batch, longest, CAUSAL, round.shown, nullptr, nullptr);
    observe<T>(*round.draft, kept, round.taps, round.rows, round.paths, round.tails);
  }
  for (int b = 0; b < round.batch; b++) {
    round.target_cache.lengths[b] += round.accepted[b];
    if (round.draft) round.draft_cache.lengths[b] += round.shown[b];
  }
  round.seconds[ACCEPTING] = accepted - begun;
  round.seconds[OBSERVING] = now() - accepted;
}

}  // namespace
