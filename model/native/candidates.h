// Candidate trees from a draft's logits: model/tree.py's `best_first`, in one call.
#pragma once
#include "product.h"

extern "C" {

struct Draft {
  int32_t block, vocab, width, rank;
  const void *logits;  // (batch, block, vocab)
  const void *before;  // (vocab, rank) of the sequential head; null: none
  const void *after;   // packed: rank -> vocab
  const int32_t *fixed;  // (num_fixed, 3): parent, rank and depth of the nodes of a fixed tree; null: best-first
  int32_t num_fixed;
};

// One tree per sequence, `rows` each, to be filled behind their roots.
struct Trees {
  int32_t batch, rows;
  const int64_t* budgets;
  int64_t *tokens, *sizes;
  int32_t *parents, *depths;
  double* scores;
};
}

namespace {

constexpr int MAX_WIDTH = 16;

struct Candidate {
  float score;  // cumulative log-probability
  int32_t token, parent;
};

// The best `width` seen, best first.
struct Best {
  int width, num = 0;
  Candidate held[MAX_WIDTH];

  float least() const { return num < width ? -1e30f : held[num - 1].score; }
  void offer(const Candidate& one) {
    if (one.score <= least()) return;
    int at = num < width ? num++ : num - 1;
    for (; at > 0 && held[at - 1].score < one.score; at--) held[at] = held[at - 1];
    held[at] = one;
  }
};

// The best continuations of each frontier token at one depth, with their log-probabilities.
template <class T>
void continuations(const Draft& draft, const T* logits, const Candidate* frontier, int num, Best* best) {
  const int panels = (draft.vocab + LANES - 1) / LANES;
  const long k = round_up(draft.rank, K_STEP);
  alignas(64) float bias[MANY_ROWS * PANELS * LANES] = {};
  T* before = (T*)__builtin_alloca_with_align(MANY_ROWS * (k + K_STEP) * sizeof(T), 512);
  if (draft.before) {
    memset((void*)before, 0, MANY_ROWS * k * sizeof(T));
    for (int n = 0; n < num; n++)
      memcpy((void*)(before + n * k), (const T*)draft.before + frontier[n].token * (long)draft.rank, draft.rank * sizeof(T));
  }
  vf most[MAX_WIDTH], total[MAX_WIDTH];
  for (int n = 0; n < num; n++) most[n] = all(-1e30f), total[n] = vf{};
  for (int panel = 0; panel < panels; panel += PANELS) {
    const int some = panels - panel < PANELS ? panels - panel : PANELS;
    const long stride = some * LANES;
    if (draft.before) product(before, k, num, (const T*)draft.after + panel * k * LANES, k * LANES, some, k, bias, stride);
    for (int p = 0; p < some; p++) {
      const int first = (panel + p) * LANES;
      vf drafted = all(-1e30f);
      if (first + LANES <= draft.vocab)
        drafted = load(logits + first);
      else
        for (int i = 0; first + i < draft.vocab; i++) drafted[i] = number(logits[first + i]);
      for (int n = 0; n < num; n++) {
        const vf score = drafted + load(bias + n * stride + p * LANES);
        if (any_larger(score, most[n])) {
          const vf now = larger(most[n], score);
          total[n] *= exponential(most[n] - now);
          most[n] = now;
        }
        total[n] += exponential(score - most[n]);
        if (any_larger(score, all(best[n].least())))
          for (int i = 0; i < LANES; i++) best[n].offer({score[i], first + i, n});
      }
    }
  }
  for (int n = 0; n < num; n++) {
    const float top = largest(most[n]);
    const float whole = top + __builtin_logf(sum(total[n] * exponential(most[n] - top)));
    for (int i = 0; i < best[n].num; i++) best[n].held[i].score -= whole;
  }
}

// Tree b of the best of `count` nodes, as many as its budget has. Parents come before their children and are always
// better; a node's parent is its number from 1 on, or the root's, 0.
void plant(const Trees& trees, int b, const Candidate* nodes, const int32_t* level_of, int count) {
  const int rows = trees.rows, budget = trees.budgets[b];
  int32_t* number_of = (int32_t*)__builtin_alloca((count + 1) * sizeof(int32_t));  // row of a node; the root is 0
  bool* kept = (bool*)__builtin_alloca(count + 1);
  memset(kept, 0, count + 1);
  for (int taken = 0; taken < budget && taken < count; taken++) {
    int best = -1;
    for (int i = 0; i < count; i++)
      if (!kept[i] && (best < 0 || nodes[i].score > nodes[best].score)) best = i;
    kept[best] = true;
  }
  // The likeliest path comes first, so that where it is accepted its keys and values already lie where they belong.
  int row = 1;
  const auto take = [&](int i) {
    const long at = b * (long)rows + row;
    trees.tokens[at] = nodes[i].token, trees.scores[at] = nodes[i].score, trees.depths[at] = 1 + level_of[i];
    trees.parents[at] = nodes[i].parent ? number_of[nodes[i].parent] : 0;
    number_of[i + 1] = row++;
    kept[i] = false;
  };
  for (int parent = 0, next; parent >= 0; parent = next) {
    next = -1;
    for (int i = 0; i < count; i++)
      if (kept[i] && nodes[i].parent == parent && (next < 0 || nodes[i].score > nodes[next - 1].score)) next = i + 1;
    if (next >= 0) take(next - 1);
  }
  for (int i = 0; i < count; i++)
    if (kept[i]) take(i);
  trees.sizes[b] = row;
}

// The `width` best children of frontier node n, whose continuations those in `best` are, are offered to `next`.
void offer_children(const Candidate& node, int number, const Best& best, Best& next) {
  for (int i = 0; i < best.num; i++)  // always less than the parent's, also when the draft is certain
    next.offer({node.score + (best.held[i].score < 0 ? best.held[i].score : 0) - 1e-6f, best.held[i].token, number});
}

inline int no_worse(const Candidate* nodes, int count, float score) {
  int found = 0;
  for (int i = 0; i < count; i++) found += nodes[i].score >= score;
  return found;
}

// Tree b of the first nodes of the fixed tree, as many as its budget has.
template <class T>
void fill(const Draft& draft, const Trees& trees, int b) {
  const Candidate root = {0.0f, (int32_t)trees.tokens[b * (long)trees.rows], 0};
  Best* best = (Best*)__builtin_alloca(draft.block * sizeof(Best));  // at each depth
  for (int depth = 0; depth < draft.block; depth++) {
    best[depth] = Best{draft.width};
    continuations<T>(draft, (const T*)draft.logits + (b * (long)draft.block + depth) * draft.vocab, &root, 1, best + depth);
  }
  const int num = trees.budgets[b] < draft.num_fixed ? trees.budgets[b] : draft.num_fixed;
  const long at = b * (long)trees.rows;
  for (int row = 1; row <= num; row++) {
    const int32_t parent = draft.fixed[3 * row - 3], rank = draft.fixed[3 * row - 2], depth = draft.fixed[3 * row - 1];
    const Candidate& one = best[depth - 1].held[rank];
    trees.tokens[at + row] = one.token, trees.scores[at + row] = trees.scores[at + parent] + one.score;
    trees.parents[at + row] = parent, trees.depths[at + row] = depth;
  }
  trees.sizes[b] = 1 + num;
}

template <class T>
void grow(const Draft& draft, const Trees& trees, int b) {
  if (draft.fixed) return fill<T>(draft, trees, b);
  const int most = draft.block * draft.width;
  Candidate* nodes = (Candidate*)__builtin_alloca(most * sizeof(Candidate));
  int32_t* level_of = (int32_t*)__builtin_alloca(most * sizeof(int32_t));
  Candidate frontier[MAX_WIDTH] = {{0.0f, (int32_t)trees.tokens[b * (long)trees.rows], 0}};
  int num = 1, count = 0, first = 0;  // of the frontier; nodes so far; the frontier's first node, the root being 0
  for (int depth = 0; depth < draft.block; depth++) {
    Best next{draft.width}, best[MAX_WIDTH];
    for (int n = 0; n < num; n++) best[n].width = draft.width;
    continuations<T>(draft, (const T*)draft.logits + (b * (long)draft.block + depth) * draft.vocab, frontier, num, best);
    for (int n = 0; n < num; n++) offer_children(frontier[n], first + n, best[n], next);
    first = count + 1, num = next.num;
    for (int n = 0; n < num; n++) level_of[count] = depth, nodes[count++] = frontier[n] = next.held[n];
    // What follows a node is worse than it: where the tree is full of what is no worse, nothing behind it has a place.
    while (num && no_worse(nodes, count, frontier[num - 1].score) >= trees.budgets[b]) num--;
    if (!num) break;
  }
  plant(trees, b, nodes, level_of, count);
}

}  // namespace
