// The EAGLE draft (model/drafters/eagle/network.py): a tree grown by a pass per depth, and what the target kept read into its context.
#pragma once
#include "step.h"

namespace {

// The nodes of one sequence while its tree grows. Nodes are numbered from 1 on, the root is 0; rows are those of its nodes
// that passes were made over, the root's first.
struct Growing {
  Candidate* nodes;
  int32_t* level_of;
  Candidate frontier[MAX_WIDTH];  // to be expanded next
  int32_t numbers[MAX_WIDTH];     // their nodes
  int num, count;                 // of the frontier; of nodes

  // The score below which no node gets into a tree of `budget`.
  float bar(int budget) const {
    if (count < budget) return -1e30f;
    float* best = (float*)__builtin_alloca(budget * sizeof(float));
    int held = 0;
    for (int i = 0; i < count; i++) {
      const float score = nodes[i].score;
      if (held == budget && score <= best[held - 1]) continue;
      int at = held < budget ? held++ : held - 1;
      for (; at > 0 && best[at - 1] < score; at--) best[at] = best[at - 1];
      best[at] = score;
    }
    return best[budget - 1];
  }
};

// Trees behind the roots that `trees` has, for sequences with a budget. Depth by depth the likeliest `width` nodes are
// expanded, all sequences in one pass; those that cannot get into the tree any more are not, which changes nothing.
// pending (slots, hidden): the feature of each sequence's last kept position. given.starts: how long contexts are.
template <class T>
void propose_eagle(const DraftNetwork& draft, const Rows& given, const void* pending, const Trees& trees) {
  const Stack& stack = *draft.stack;
  const int batch = trees.batch, width = draft.candidates.width, block = draft.candidates.block;
  const int most_rows = 1 + (block - 1) * width, most_nodes = block * width;  // of a sequence
  const long wide = stack.hidden, wide_out = draft.out.outputs, vocab = draft.head.outputs;
  const long places = (long)batch * most_rows, fresh = round_up((long)batch * width, MANY_ROWS);  // rows of one pass at most
  scratch.reserve(2 * Arena::bytes<T>(places * wide) + 2 * Arena::bytes<Kept<T>>(fresh * wide) + Arena::bytes<Kept<T>>(fresh * wide_out) +
                  Arena::bytes<T>(fresh * vocab) + 3 * Arena::bytes<int32_t>(places) + 2 * Arena::bytes<int32_t>(batch) +
                  Arena::bytes<Growing>(batch) + Arena::bytes<Candidate>(batch * most_nodes) +
                  2 * Arena::bytes<int32_t>(batch * (most_nodes + 1)));
  T *features = scratch.take<T>(places * wide), *embeds = scratch.take<T>(places * wide);
  Kept<T> *read = scratch.take<Kept<T>>(fresh * wide), *made = scratch.take<Kept<T>>(fresh * wide), *hidden = scratch.take<Kept<T>>(fresh * wide_out);
  T* logits = scratch.take<T>(fresh * vocab);
  int32_t *tokens = scratch.take<int32_t>(places), *parents = scratch.take<int32_t>(places), *positions = scratch.take<int32_t>(places);
  int32_t *counts = scratch.take<int32_t>(batch), *done = scratch.take<int32_t>(batch);
  Growing* growing = scratch.take<Growing>(batch);
  Candidate* nodes = scratch.take<Candidate>(batch * most_nodes);
  int32_t *levels = scratch.take<int32_t>(batch * (most_nodes + 1)), *row_of = scratch.take<int32_t>(batch * (most_nodes + 1));

  int deepest = 0;
  for (int b = 0; b < batch; b++) {
    Growing& one = growing[b];
    one.nodes = nodes + b * most_nodes, one.level_of = levels + b * (most_nodes + 1);
    one.frontier[0] = {0.0f, (int32_t)trees.tokens[b * (long)trees.rows], 0}, one.numbers[0] = 0;
    one.num = trees.budgets[b] > 0, one.count = 0;
    counts[b] = done[b] = 0;
    if (trees.budgets[b] > deepest) deepest = trees.budgets[b];
  }
  Rows rows = given;
  rows.batch = batch, rows.rows = most_rows, rows.sight = TREE;
  rows.counts = counts, rows.done = done, rows.parents = parents, rows.positions = positions;
  Draft candidates = draft.candidates;
  for (int depth = 0; depth < block && depth < deepest; depth++) {
    int num = 0;
    for (int b = 0; b < batch; b++) {
      Growing& one = growing[b];
      done[b] = counts[b];
      for (int n = 0; n < one.num; n++, counts[b]++, num++) {
        const long place = b * (long)most_rows + counts[b];
        tokens[place] = one.frontier[n].token, positions[place] = given.starts[b] + depth;
        parents[place] = depth ? row_of[b * (most_nodes + 1) + one.frontier[n].parent] : -1;
        row_of[b * (most_nodes + 1) + one.numbers[n]] = counts[b];
      }
    }
    if (!num) break;
    Pass<T> pass(stack, rows);
    team.run([&](Member& member) {
      row_stage(member, num, [&](int row) {
        const int place = pass.where[row], b = place / most_rows;
        const T* from = depth ? features + (b * (long)most_rows + parents[place]) * wide : (const T*)pending + b * wide;
        copy(read + row * wide, from, wide);
      });
      linear_stage<T>(member, read, num, draft.feature, [&](int row) { return made + row * wide; });
      row_stage(member, num, [&](int row) {
        const T* entry = (const T*)draft.entries + tokens[pass.where[row]] * wide;
        const Kept<T>* part = made + row * wide;
        T* to = embeds + pass.where[row] * wide;
        for (long i = 0; i < wide; i += LANES) store(to + i, load(part + i) + load(entry + i));
      });
      pass.run(member, embeds, (T*)nullptr);
      const Kept<T>* normed = pass.final_norm(member);
      linear_stage<T>(member, normed, num, draft.out, [&](int row) { return hidden + row * wide_out; });
      linear_stage<T>(member, hidden, num, draft.head, [&](int row) { return logits + row * vocab; });
      row_stage(member, num, [&](int row) { copy(features + pass.where[row] * wide, normed + row * wide, wide); });
      member.share(batch, [&](int b) {
        Growing& one = growing[b];
        int row = 0;
        for (int before = 0; before < b; before++) row += counts[before] - done[before];
        Best next{width};
        for (int n = 0; n < one.num; n++, row++) {
          Found found;
          continuations<T>(candidates, logits + row * vocab, nullptr, 1, &found);
          offer_children(candidates, one.frontier[n], one.numbers[n], found, next);
        }
        const int first = one.count;
        for (int n = 0; n < next.num; n++) one.level_of[one.count] = depth, one.nodes[one.count++] = next.held[n];
        const float bar = one.num ? one.bar(trees.budgets[b]) : 0.0f;
        one.num = 0;
        for (int n = 0; n < next.num; n++)
          if (next.held[n].score > bar) one.numbers[one.num] = first + n + 1, one.frontier[one.num++] = next.held[n];
      });
    });
  }
  team.run([&](Member& member) {
    member.share(batch, [&](int b) {
      if (trees.budgets[b] > 0) plant(trees, b, {growing[b].nodes, growing[b].level_of, growing[b].count}, trees.budgets[b]);
    });
  });
}

// What was kept of taps (batch, num, num_taps, target's hidden) becomes context: row i of a sequence is the feature of the
// position before it and the token at paths[i]. The last one's feature is pending from now on.
template <class T>
void observe_eagle(const DraftNetwork& draft, const Rows& rows, const void* taps, int num, const int32_t* paths, const int64_t* tokens,
                   void* pending) {
  const Stack& stack = *draft.stack;
  const long wide = stack.hidden, wide_taps = draft.fuse.inputs;
  const long count = (long)rows.batch * rows.rows, most = round_up(count, MANY_ROWS);
  scratch.reserve(Arena::bytes<Kept<T>>(most * wide_taps) + 3 * Arena::bytes<Kept<T>>(most * wide) + Arena::bytes<T>(most * wide));
  Kept<T> *scaled = scratch.take<Kept<T>>(most * wide_taps), *fused = scratch.take<Kept<T>>(most * wide);
  Kept<T> *features = scratch.take<Kept<T>>(most * wide), *made = scratch.take<Kept<T>>(most * wide);
  T* context = scratch.take<T>(most * wide);
  Pass<T> pass(stack, rows);
  const auto from = [&](int row) {
    const int place = pass.where[row], b = place / rows.rows;
    return (const T*)taps + (b * (long)num + paths[place]) * wide_taps;
  };
  const auto to = [&](int row, const auto& write) {  // the next row of the sequence begins with it
    const int place = pass.where[row], b = place / rows.rows;
    if (place % rows.rows + 1 < rows.counts[b])
      write(features + (row + 1) * wide);
    else
      write((T*)pending + b * wide);
  };
  team.run([&](Member& member) {
    row_stage(member, pass.num, [&](int row) {
      const int place = pass.where[row];
      if (place % rows.rows == 0) copy(features + row * wide, (const T*)pending + place / rows.rows * wide, wide);
    });
    fuse_stages<T>(member, draft, pass.num, scaled, fused, from, to);
    linear_stage<T>(member, features, pass.num, draft.feature, [&](int row) { return made + row * wide; });
    row_stage(member, pass.num, [&](int row) {
      const int place = pass.where[row];
      const T* entry = (const T*)draft.entries + tokens[place / rows.rows * (long)num + paths[place]] * wide;
      Kept<T>* part = made + row * wide;
      for (long i = 0; i < wide; i += LANES) keep<T>(part + i, load(part + i) + load(entry + i));
      normalise<T>(part, stack.layers[0].norm1, nullptr, RMS, stack.eps, wide, context + place * wide);
    });
    pass.hold(member, context);
  });
}

}  // namespace
