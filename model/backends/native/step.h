// A round of draft and verify, in two calls: draft_and_verify proposes trees and runs the target over them, commit
// keeps the accepted tokens and lets the draft observe them. In between Python may choose other tokens
// (model/engine/native_round.py).
#pragma once
#include "candidates.h"
#include "pass.h"

namespace {

// Multiply rows of x by a linear layer, as one stage; a row's result goes to place(row). Rows of x lie `linear.inputs`
// apart, in whole tiles.
template <class T, class Place>
void linear_stage(Member& team, const Kept<T>* x, int rows, const Linear& linear, const Place& place) {
  const int outputs = linear.outputs;
  const Panels<T> w{linear.packed, (outputs + LANES - 1) / LANES, PANELS, linear.inputs};
  product_stage<T>(team, x, linear.inputs, rows, w, w.packed,
                   [&](int row, int some, int panel, int num, float* y, long stride) {
                     for (int r = 0; r < some; r++)
                       for (int p = 0; p < num; p++) {
                         const long output = (panel + p) * LANES;
                         store_some(place(row + r) + output,
                                    with_bias<T>(y + r * stride + p * LANES, linear.bias, output), outputs - output);
                       }
                   });
}

// Index of the largest number, the first if there are several, as torch's argmax.
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

// Copy the embedding of a token, multiplied as its model does.
template <class T, class Y>
void embed(const T* from, float scale, long width, Y* to) {
  for (long i = 0; i < width; i += LANES) keep<T>(to + i, load(from + i) * scale);
}

// Run the target over tokens (batch, rows) of a vocabulary of num_tokens -> aux (batch, rows, num_aux, hidden), logits
// (batch, rows, vocab) and chosen (batch, rows).
template <class T>
void verify(const Stack& stack, const Rows& rows, const void* embeddings, float embedding_scale, const int64_t* tokens,
            const Linear& head, [[maybe_unused]] int num_tokens, void* aux, void* logits, int64_t* chosen) {
  const long width = stack.hidden, count = (long)rows.batch * rows.rows, vocab = head.outputs;
  scratch.reserve(Arena::bytes<T>(count * width));
  T* embeds = scratch.take<T>(count * width);
  Pass<T> pass(stack, rows);
  team.run([&](Member& member) {
    row_stage(member, pass.num, [&](int row) {
      const int64_t token = tokens[pass.where[row]];
      CHECK(0 <= token && token < num_tokens);
      embed((const T*)embeddings + token * width, embedding_scale, width, embeds + pass.where[row] * width);
    });
    pass.run(member, embeds, (T*)aux);
    const Kept<T>* normed = pass.final_norm(member);
    linear_stage<T>(member, normed, pass.num, head, [&](int row) { return (T*)logits + pass.where[row] * vocab; });
    row_stage(member, pass.num, [&](int row) {
      chosen[pass.where[row]] = first_largest((const T*)logits + pass.where[row] * vocab, vocab);
    });
  });
}

// Draft a block after the newest token of each sequence: logits (batch, block, vocab), and grow trees from the roots in
// `trees`. rows.counts is 0 for sequences that do not draft; last_context: (slots, hidden). growing: seconds that
// growing trees took.
template <class T>
void propose(const DraftNetwork& draft, const Rows& rows, const void* last_context, const Worth& worth, void* logits,
             const Trees& trees, double& growing) {
  check_draft(draft.candidates);
  CHECK(rows.batch == trees.batch && rows.rows == draft.candidates.block);
  const Stack& stack = *draft.stack;
  const long width = stack.hidden, block = rows.rows, count = rows.batch * block, most = round_up(count, MANY_ROWS);
  const long width_in = draft.token_table ? 0 : draft.embed.inputs, width_out = draft.out.outputs;
  const long vocab = draft.head.outputs, rank = draft.candidates.rank, sequences = round_up(rows.batch, MANY_ROWS);
  const long nodes =
      draft.candidates.fixed ? 0 : draft.candidates.block * draft.candidates.width;  // of a tree, at most
  scratch.reserve(Arena::bytes<T>(count * width) + Arena::bytes<T>(count * rank) +
                  Arena::bytes<Kept<T>>(most * width_out) + 2 * Arena::bytes<Kept<T>>(sequences * width) +
                  Arena::bytes<Kept<T>>(sequences * width_in) + Arena::bytes<T>(sequences * width) +
                  Arena::bytes<Candidate>(rows.batch * nodes) + Arena::bytes<int32_t>(rows.batch * nodes) +
                  Arena::bytes<Growth>(rows.batch) + Arena::bytes<int64_t>(rows.batch) +
                  Arena::bytes<float>(2 * rows.batch * nodes));
  T* embeds = scratch.take<T>(count * width);
  T* contexts = draft.candidates.contexts ? (T*)draft.candidates.contexts : scratch.take<T>(count * rank);
  Kept<T>* hidden = scratch.take<Kept<T>>(most * width_out);
  Kept<T>* last = scratch.take<Kept<T>>(sequences * width);
  Kept<T>* features = scratch.take<Kept<T>>(sequences * width);
  Kept<T>* embeddings = scratch.take<Kept<T>>(sequences * width_in);
  T* embedded = scratch.take<T>(sequences * width);  // of the newest tokens
  Candidate* candidate = scratch.take<Candidate>(rows.batch * nodes);
  int32_t* level_of = scratch.take<int32_t>(rows.batch * nodes);
  Growth* growths = scratch.take<Growth>(rows.batch);
  int64_t* admitted = scratch.take<int64_t>(rows.batch);
  float* memory = scratch.take<float>(2 * rows.batch * nodes);
  for (int b = 0; b < rows.batch; b++) growths[b] = {candidate + b * nodes, level_of + b * nodes, 0};
  Pass<T> pass(stack, rows);
  Draft candidates = draft.candidates;
  candidates.logits = logits;
  candidates.contexts = contexts;
  const int drafting = pass.num / block;  // sequences
  for (int i = 0; i < drafting; i++) {
    const long b = pass.where[i * block] / block, token = trees.tokens[b * trees.rows];
    CHECK(0 <= token && token < candidates.num_tokens);
    copy(last + i * width, (const T*)last_context + b * width, width);
    if (draft.token_table)
      memcpy((void*)(embedded + i * width), (const T*)draft.token_table + token * width, width * sizeof(T));
    else
      embed((const T*)draft.embeddings + token * width_in, draft.embedding_scale, width_in, embeddings + i * width_in);
  }
  const pthread_t caller = pthread_self();
  team.run([&](Member& member) {
    linear_stage<T>(member, last, drafting, draft.feature, [&](int i) { return features + i * width; });
    if (!draft.token_table)
      linear_stage<T>(member, embeddings, drafting, draft.embed, [&](int i) { return embedded + i * width; });
    row_stage(member, pass.num, [&](int row) {
      const int r = pass.where[row] % block;
      const T* from = r ? (const T*)draft.masks + (r - 1) * width : embedded + row / block * width;
      T* to = embeds + pass.where[row] * width;
      for (long i = 0; i < width; i += LANES) store(to + i, load(from + i) + load(features + row / block * width + i));
      normalise<T>(to, draft.input_norm, nullptr, RMS, stack.eps, width, to);
    });
    pass.run(member, embeds, (T*)nullptr);
    const Kept<T>* normed = pass.final_norm(member);
    linear_stage<T>(member, normed, pass.num, draft.out, [&](int row) { return hidden + row * width_out; });
    linear_stage<T>(member, hidden, pass.num, draft.head,
                    [&](int row) { return (T*)logits + pass.where[row] * vocab; });
    if (draft.context.packed)
      linear_stage<T>(member, hidden, pass.num, draft.context,
                      [&](int row) { return contexts + pass.where[row] * rank; });
    double begun = now();
    if (candidates.fixed) {
      member.share(trees.batch, [&](int b) {
        if (rows.counts[b]) fill<T>(candidates, trees, b);
      });
    } else {
      member.share(trees.batch, [&](int b) {
        if (rows.counts[b])
          begun += expand<T>(candidates, trees, b, growths[b]);  // the time of the sequential head does not count
      });
      member.share(1, [&](int) { admit(worth, trees, growths, admitted, memory); });
      member.share(trees.batch, [&](int b) {
        if (rows.counts[b]) plant(trees, b, growths[b], admitted[b]);
      });
    }
    if (pthread_equal(caller, pthread_self())) growing = now() - begun;
  });
}

// Fuse auxiliary hidden states into context rows: from(row) is where a row's lie, (num_aux, target's hidden); to(row)
// is where its context (hidden) goes.
template <class T, class From, class To>
void fuse_stages(Member& team, const DraftNetwork& draft, int rows, Kept<T>* scaled, Kept<T>* fused, const From& from,
                 const To& to) {
  const long width_aux = draft.fuse.inputs, width_layer = width_aux / draft.num_aux, width = draft.fuse.outputs;
  const float eps = draft.stack->eps;
  row_stage(team, rows, [&](int row) {
    for (long at = 0; at < width_aux; at += width_layer)
      normalise<T>(from(row) + at, (const T*)draft.aux_norms + at, nullptr, RMS, eps, width_layer,
                   scaled + row * width_aux + at);
  });
  linear_stage<T>(team, scaled, rows, draft.fuse, [&](int row) { return fused + row * width; });
  row_stage(team, rows,
            [&](int row) { normalise<T>(fused + row * width, draft.fuse_norm, nullptr, RMS, eps, width, to(row)); });
}

// aux (rows, num_aux, target's hidden) -> context (rows, hidden).
template <class T>
void fuse(const DraftNetwork& draft, const void* aux, int rows, void* context) {
  const long width_aux = draft.fuse.inputs, width = draft.fuse.outputs, most = round_up(rows, MANY_ROWS);
  scratch.reserve(Arena::bytes<Kept<T>>(most * width_aux) + Arena::bytes<Kept<T>>(most * width));
  Kept<T>* scaled = scratch.take<Kept<T>>(most * width_aux);
  Kept<T>* fused = scratch.take<Kept<T>>(most * width);
  team.run([&](Member& member) {
    fuse_stages<T>(
        member, draft, rows, scaled, fused, [&](int row) { return (const T*)aux + row * width_aux; },
        [&](int row) { return (T*)context + row * width; });
  });
}

// Fuse those rows of aux (batch, num, num_aux, target's hidden) that `paths` (batch, num) names, and add them to the
// contexts.
template <class T>
void observe(const DraftNetwork& draft, const Rows& rows, const void* aux, int num, const int32_t* paths,
             void* last_context) {
  CHECK(rows.rows <= num);
  const long width = draft.stack->hidden, width_aux = draft.fuse.inputs;
  const long count = (long)rows.batch * rows.rows, most = round_up(count, MANY_ROWS);
  scratch.reserve(Arena::bytes<Kept<T>>(most * width_aux) + Arena::bytes<Kept<T>>(most * width) +
                  Arena::bytes<T>(most * width));
  Kept<T>* scaled = scratch.take<Kept<T>>(most * width_aux);
  Kept<T>* fused = scratch.take<Kept<T>>(most * width);
  T* context = scratch.take<T>(most * width);
  Pass<T> pass(*draft.stack, rows);
  const auto from = [&](int row) {
    const int b = pass.where[row] / rows.rows, at = pass.where[row] % rows.rows, path = paths[b * (long)num + at];
    CHECK(0 <= path && path < num);
    return (const T*)aux + (b * (long)num + path) * width_aux;
  };
  team.run([&](Member& member) {
    fuse_stages<T>(member, draft, pass.num, scaled, fused, from,
                   [&](int row) { return context + pass.where[row] * width; });
    pass.write_kv(member, context);
  });
  for (int b = 0; b < rows.batch; b++)
    if (const int some = rows.counts[b])
      memcpy((void*)((T*)last_context + b * width), context + (b * (long)rows.rows + some - 1) * width,
             width * sizeof(T));
}

// Move the rows of each slot's accepted path to where the slot ends, in every layer and head.
template <class T>
void move_rows(const Round& round) {
  const Stack& stack = *round.target;
  const Cache& cache = round.target_cache;
  const long bytes = stack.head_dim * sizeof(T);
  const auto moved = [&](int b) {
    const int accepted = round.accepted[b];
    return accepted && round.paths[b * (long)round.rows + accepted - 1] >= accepted;
  };
  bool any = false;
  for (int b = 0; b < round.batch; b++) any = any || moved(b);
  if (!any) return;
  team.run([&](Member& member) {
    member.share(2 * stack.num_layers, [&](int task) {
      const LayerCache layer = cache_of<T>(cache, task / 2);
      const Places places{layer.ring, layer.capacity};
      T* part = (T*)layer.data + (task % 2) * layer.values_stride;
      for (int b = 0; b < round.batch; b++) {
        if (!moved(b)) continue;
        const long start = cache.lengths[b];
        for (int i = 0; i < round.accepted[b]; i++) {
          const int from = round.paths[b * (long)round.rows + i];
          if (from == i) continue;
          for (int head = 0; head < stack.kv_heads; head++) {
            T* rows = part + b * layer.slot_stride + head * layer.head_stride;
            memcpy((void*)(rows + places(start + i) * stack.head_dim), rows + places(start + from) * stack.head_dim,
                   bytes);
          }
        }
      }
    });
  });
}

inline Rows rows_of(const Cache& cache, int batch, int rows, MaskKind mask, const int32_t* counts,
                    const int32_t* parents, const int32_t* positions) {
  return Rows{batch, rows, 0, mask, cache.lengths, counts, parents, positions, cache, nullptr, nullptr, 0, 0};
}

// Draft trees for the slots with a budget, and run the target over all nodes.
template <class T>
void draft_and_verify(Round& round) {
  const int batch = round.batch;
  const long rows = round.rows, all_rows = batch * rows;
  const double begun = now();
  Trees& trees = round.trees;
  if (!round.has_trees) {
    memset(trees.tokens, 0, all_rows * sizeof *trees.tokens);
    memset(trees.depths, 0, all_rows * sizeof *trees.depths);
    memset(trees.parents, -1, all_rows * sizeof *trees.parents);
    for (int b = 0; b < batch; b++) {
      trees.tokens[b * rows] = round.newest[b];
      trees.sizes[b] = 1;
    }
  }
  round.seconds[GROWING] = 0.0;
  bool drafts = false;
  for (int b = 0; b < batch; b++) drafts = drafts || round.budgets[b] > 0;
  if (!round.has_trees && rows > 1 && drafts) {
    const int block = round.draft->candidates.block;
    for (int b = 0; b < batch; b++) round.counts[b] = round.budgets[b] > 0 ? block : 0;
    const Rows drafted = rows_of(round.draft_cache, batch, block, FULL, round.counts, nullptr, nullptr);
    propose<T>(*round.draft, drafted, round.last_context, round.worth, round.draft_logits, trees,
               round.seconds[GROWING]);
  }
  const double drafted = now();
  round.seconds[PROPOSING] = drafted - begun - round.seconds[GROWING];
  if (round.only_drafts) return;
  for (int b = 0; b < batch; b++) {
    CHECK(1 <= trees.sizes[b] && trees.sizes[b] <= rows);
    round.counts[b] = round.budgets[b] == IDLE ? 0 : trees.sizes[b];
    for (int axis = 0; axis < round.axes; axis++)
      for (long at = b * rows; at < (b + 1) * rows; at++)
        round.positions[axis * all_rows + at] = round.roots[b] + trees.depths[at];
  }
  const Rows verified = rows_of(round.target_cache, batch, rows, TREE, round.counts, trees.parents, round.positions);
  verify<T>(*round.target, verified, round.embeddings, round.embedding_scale, trees.tokens, round.head,
            round.num_tokens, round.aux_hidden_states, round.logits, round.chosen);
  round.seconds[VERIFYING] = now() - drafted;
}

// Find the target's likeliest token at a row of a slot's tree, of those that are allowed, a bit for each; the first
// one among equals.
template <class T>
int64_t likeliest(const Round& round, int slot, int row, const uint8_t* allowed) {
  CHECK(0 <= slot && slot < round.batch && 0 <= row && row < round.rows);
  const long vocab = round.head.outputs;
  const T* logits = (const T*)round.logits + (slot * (long)round.rows + row) * vocab;
  int64_t best = -1;
  for (long token = 0; token < vocab; token++) {
    if (!allowed[token >> 3]) {
      token |= 7;
    } else if (allowed[token >> 3] >> (token & 7) & 1) {
      if (best < 0 || to_float(logits[token]) > to_float(logits[best])) best = token;
    }
  }
  return best < 0 ? 0 : best;
}

// Find the likeliest of the allowed tokens behind a path of slot b's draft, at most `num`, with their log-probabilities
// among those. Returns how many there are.
template <class T>
int go_on(const Round& round, int b, const int64_t* path, int length, const uint8_t* allowed, int num, int64_t* tokens,
          double* scores) {
  Draft draft = round.draft->candidates;
  check_draft(draft);
  CHECK(0 <= b && b < round.batch && 0 <= length && length < draft.block && draft.contexts);
  draft.logits = round.draft_logits;
  Continuations found;
  tiles_begin();
  go_on<T>(draft, round.trees, b, path, length, allowed, found);
  tiles_end();
  if (found.best.num < num) num = found.best.num;
  for (int i = 0; i < num; i++) {
    tokens[i] = found.best.candidates[i].token;
    scores[i] = found.best.candidates[i].score - found.log_sum;
  }
  return num;
}

// Find the accepted path (model/decoding/verify.py): descend to the child whose token the target chose, as long as
// there is one. Returns its length, the root included.
inline int walk(const Round& round, int b) {
  const long first = b * (long)round.rows;
  const Trees& trees = round.trees;
  int length = 1;
  for (int row = 1; row < round.counts[b]; row++) round.worth.tried[bin_of(trees.scores[first + row])]++;
  round.paths[first] = 0;
  round.emitted[first] = round.chosen[first];
  for (int row = 1; row < round.counts[b]; row++) {  // one pass is enough, as parents come first
    const bool on_path = trees.parents[first + row] == round.paths[first + length - 1];
    if (!on_path || trees.tokens[first + row] != round.emitted[first + length - 1]) continue;
    round.worth.accepted[bin_of(trees.scores[first + row])]++;
    round.paths[first + length] = row;
    round.emitted[first + length] = round.chosen[first + row];
    length++;
  }
  return length;
}

// Keep the nodes that agree with `chosen`, in both caches, and emit their tokens.
template <class T>
void commit(Round& round) {
  const double begun = now();
  int longest = 0;  // path that the draft observes
  for (int b = 0; b < round.batch; b++) {
    round.accepted[b] = round.counts[b] ? walk(round, b) : 0;
    round.observed[b] = round.budgets[b] == PLAIN ? 0 : round.accepted[b];
    longest = round.observed[b] > longest ? round.observed[b] : longest;
  }
  move_rows<T>(round);
  const double accepted = now();
  if (round.draft && longest) {
    const Rows kept = rows_of(round.draft_cache, round.batch, longest, CAUSAL, round.observed, nullptr, nullptr);
    observe<T>(*round.draft, kept, round.aux_hidden_states, round.rows, round.paths, round.last_context);
  }
  for (int b = 0; b < round.batch; b++) {
    round.target_cache.lengths[b] += round.accepted[b];
    if (round.draft) round.draft_cache.lengths[b] += round.observed[b];
  }
  round.seconds[ACCEPTING] = accepted - begun;
  round.seconds[OBSERVING] = now() - accepted;
}

}  // namespace
