// Candidate trees from a draft's logits: model/decoding/tree.py's `best_first`, in one call.
#pragma once
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <functional>

#include "product.h"

extern "C" {

struct Draft {
  int32_t block, vocab, width, rank;
  const void* logits;  // (batch, block, vocab)
  // The sequential head (model/drafters/flash/network.py): (batch, block, rank), (vocab, rank); packed: rank -> rank, rank -> vocab.
  const void *contexts, *before, *state, *after;  // before null: none
  const int32_t *fixed;  // (num_fixed, 3): parent, rank and depth of the nodes of a fixed tree; null: best-first
  const int64_t* ends;   // (num_ends,) tokens behind which an answer does not go on
  const int32_t* offered;  // (vocab,) tokens that logits are of; null: all
  int32_t num_fixed, num_ends;
};

// What drafting is worth (model/engine/speculation.py); seconds null: every node has its place.
struct Worth {
  const double* seconds;  // of a round, by nodes over all sequences
  const double* chance;   // (BINS,) of a node's being accepted, by its score
  int64_t *tried, *held;  // (BINS,) nodes verified so far, and accepted
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

inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

constexpr int MAX_WIDTH = 16;
constexpr int BINS = 24;
constexpr float FINENESS = 12.0f;  // of scores' bins; see model/engine/speculation.py

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
    if (!(one.score > least())) return;  // nor is what is no number
    int at = num < width ? num++ : num - 1;
    for (; at > 0 && held[at - 1].score < one.score; at--) held[at] = held[at - 1];
    held[at] = one;
  }
};

// What the vocabulary offers behind one token: its best, as logits, and log(sum(exp(logits))).
struct Found {
  Best best;
  float whole;
};

// That behind each of `num` tokens, whose states of the sequential head lie round_up(rank, K_STEP) apart; null: it has none.
template <class T>
void continuations(const Draft& draft, const T* logits, const Kept<T>* states, int num, Found* found) {
  const int panels = (draft.vocab + LANES - 1) / LANES;
  const long k = round_up(draft.rank, K_STEP);
  alignas(64) float bias[MAX_WIDTH * PANELS * LANES] = {};
  Vector most[MAX_WIDTH], total[MAX_WIDTH];
  for (int n = 0; n < num; n++) most[n] = broadcast(-1e30f), total[n] = Vector{}, found[n].best = Best{draft.width};
  for (int panel = 0; panel < panels; panel += PANELS) {
    const int some = panels - panel < PANELS ? panels - panel : PANELS;
    const long stride = some * LANES;
    const T* after = (const T*)draft.after + panel * k * LANES;
    if (states) product(states, k, num, after, k * LANES, some, k, bias, stride, after + some * k * LANES);
    for (int p = 0; p < some; p++) {
      const int token = (panel + p) * LANES;
      const int left = draft.vocab - token;
      const Vector drafted = first_lanes(load_some(logits + token, left), left, -1e30f);
      for (int n = 0; n < num; n++) {
        const Vector score = drafted + load(bias + n * stride + p * LANES);
        if (any_larger(score, most[n])) {
          const Vector now = larger(most[n], score);
          total[n] *= exponential(most[n] - now);
          most[n] = now;
        }
        total[n] += exponential(score - most[n]);
        if (any_larger(score, broadcast(found[n].best.least()))) {
          float lanes[LANES];
          store(lanes, score);
          for (int i = 0; i < LANES; i++) found[n].best.offer({lanes[i], token + i, n});
        }
      }
    }
  }
  for (int n = 0; n < num; n++) {
    const float top = largest(most[n]);
    found[n].whole = top + __builtin_logf(sum(total[n] * exponential(most[n] - top)));
    if (draft.offered)
      for (int i = 0; i < found[n].best.num; i++) found[n].best.held[i].token = draft.offered[found[n].best.held[i].token];
  }
}

inline int bin_of(float score) {
  const int bin = FINENESS * __builtin_sqrtf(-score);
  return bin < BINS ? bin : BINS - 1;
}

// The nodes of one tree, level by level; a node's parent is its number from 1 on, or the root's, 0.
struct Growth {
  Candidate* nodes;
  int32_t* level_of;
  int count;
};

// How many nodes of each tree are verified: in descending probability, where tokens per second have their maximum.
// Where nothing is said of worth, as many as the budgets have.
inline void admit(const Worth& worth, const Trees& trees, const Growth* growths, int64_t* admitted) {
  int total = 0, sequences = 0;
  for (int b = 0; b < trees.batch; b++) {
    const int count = trees.budgets[b] > 0 ? growths[b].count : 0;
    admitted[b] = count < trees.budgets[b] ? count : trees.budgets[b];
    total += admitted[b] > 0 ? admitted[b] : 0, sequences += trees.budgets[b] != -1;
  }
  if (!worth.seconds || !total) return;
  float* best = (float*)malloc(2 * total * sizeof(float));
  float *of_tree = best, *all = best + total;
  int num = 0;
  for (int b = 0; b < trees.batch; b++) {
    if (admitted[b] <= 0) continue;
    of_tree = all + num;  // of a tree only its best
    for (int taken = 0, count = 0; count < growths[b].count; count++) {
      const float score = growths[b].nodes[count].score;
      if (taken == admitted[b] && score <= of_tree[taken - 1]) continue;
      int at = taken < admitted[b] ? taken++ : taken - 1;
      for (; at > 0 && of_tree[at - 1] < score; at--) of_tree[at] = of_tree[at - 1];
      of_tree[at] = score;
    }
    num += admitted[b];
  }
  memcpy(best, all, num * sizeof(float));
  std::sort(all, all + num, std::greater<float>());
  double expected = sequences, rate = expected / worth.seconds[0];
  int most = 0;
  for (int n = 1; n <= num; n++) {
    expected += worth.chance[bin_of(all[n - 1])];
    if (expected > rate * worth.seconds[n]) rate = expected / worth.seconds[n], most = n;
  }
  const float bar = most ? all[most - 1] : 1.0f;
  num = 0;
  for (int b = 0; b < trees.batch; b++) {
    if (admitted[b] <= 0) continue;
    const float* scores = best + num;
    num += admitted[b];
    while (admitted[b] && scores[admitted[b] - 1] < bar) admitted[b]--;
  }
  free(best);
}

// Tree b of the best of its nodes, `budget` of them. Parents come before their children and are always
// better; a node's parent is its number from 1 on, or the root's, 0.
void plant(const Trees& trees, int b, const Growth& growth, int budget) {
  const Candidate* nodes = growth.nodes;
  const int32_t* level_of = growth.level_of;
  const int rows = trees.rows, count = growth.count;
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

// The best children of a node, whose continuations are found, are offered to `next`. An end has none, unless it is the
// root, 0: then the answer goes on all the same.
inline void offer_children(const Draft& draft, const Candidate& node, int number, const Found& found, Best& next) {
  if (number && std::find(draft.ends, draft.ends + draft.num_ends, node.token) != draft.ends + draft.num_ends) return;
  for (int i = 0; i < found.best.num; i++) {  // always less than the parent's, also when the draft is certain
    const float score = found.best.held[i].score - found.whole;
    next.offer({node.score + (score < 0 ? score : 0) - 1e-6f, found.best.held[i].token, number});
  }
}

inline int no_worse(const Candidate* nodes, int count, float score) {
  int found = 0;
  for (int i = 0; i < count; i++) found += nodes[i].score >= score;
  return found;
}

template <class T>
const T* logits_of(const Draft& draft, int b, int depth) {
  return (const T*)draft.logits + (b * (long)draft.block + depth) * draft.vocab;
}

// Tree b of the first nodes of the fixed tree, as many as its budget has and the draft has said something of.
template <class T>
void fill(const Draft& draft, const Trees& trees, int b) {
  Found* found = (Found*)__builtin_alloca(draft.block * sizeof(Found));  // at each depth
  for (int depth = 0; depth < draft.block; depth++)
    continuations<T>(draft, logits_of<T>(draft, b, depth), nullptr, 1, found + depth);
  const int num = trees.budgets[b] < draft.num_fixed ? trees.budgets[b] : draft.num_fixed;
  const long at = b * (long)trees.rows;
  int row = 1;
  for (; row <= num; row++) {
    const int32_t parent = draft.fixed[3 * row - 3], rank = draft.fixed[3 * row - 2], depth = draft.fixed[3 * row - 1];
    const Found& behind = found[depth - 1];
    if (rank >= behind.best.num) break;
    const Candidate& one = behind.best.held[rank];
    const double score = (parent ? trees.scores[at + parent] : 0.0) + one.score - behind.whole;
    if (!__builtin_isfinite(score)) break;
    trees.tokens[at + row] = one.token, trees.scores[at + row] = score;
    trees.parents[at + row] = parent, trees.depths[at + row] = depth;
  }
  trees.sizes[b] = row;
}

// The nodes from which a tree goes on.
struct Frontier {
  int num, first, before;  // how many; the number of the first, the root's being 0; and of the first a level before
  Candidate nodes[MAX_WIDTH];

  Frontier(const Trees& trees, int b)
      : num(1), first(0), before(0), nodes{{0.0f, (int32_t)trees.tokens[b * (long)trees.rows], 0}} {}

  // To the best of what is found behind it.
  void go_on(const Draft& draft, Growth& growth, int depth, int budget, const Found* found) {
    Best next{draft.width};
    for (int n = 0; n < num; n++) offer_children(draft, nodes[n], first + n, found[n], next);
    before = first, first = growth.count + 1, num = next.num;
    for (int n = 0; n < num; n++) growth.level_of[growth.count] = depth, growth.nodes[growth.count++] = nodes[n] = next.held[n];
    // What follows a node is worse than it: where the tree is full of what is no worse, nothing behind it has a place.
    while (num && no_worse(growth.nodes, growth.count, nodes[num - 1].score) >= budget) num--;
  }
};

// The sequential head goes on to the frontier: the states of the level before, `num` of them, become its own.
template <class T>
void follow(const Draft& draft, const Frontier& frontier, int b, int depth, Kept<T>* states, int num) {
  const long rank = draft.rank, k = round_up(rank, K_STEP), wide = round_up(rank, LANES);
  const T* context = (const T*)draft.contexts + (b * (long)draft.block + depth) * rank;
  float* carried = (float*)__builtin_alloca_with_align(MAX_WIDTH * wide * sizeof(float), 512);
  if (depth) product(states, k, num, (const T*)draft.state, k * LANES, wide / LANES, k, carried, wide, draft.after);
  for (int n = 0; n < frontier.num; n++) {
    const T* before = (const T*)draft.before + frontier.nodes[n].token * rank;
    const float* from = carried + (frontier.nodes[n].parent - frontier.before) * wide;
    for (long i = 0; i < rank; i += LANES) {
      Vector x = load_some(before + i, rank - i) + load_some(context + i, rank - i);
      if (depth) x += load(from + i);
      keep<T>(states + n * k + i, x * sigmoid(x));
    }
  }
}

// Returns the seconds that the sequential head took, which is a layer of the draft that runs while the tree grows.
template <class T>
double expand(const Draft& draft, const Trees& trees, int b, Growth& growth) {
  Frontier frontier(trees, b);
  Found found[MAX_WIDTH];
  const long size = MAX_WIDTH * round_up(draft.rank, K_STEP) * sizeof(Kept<T>);
  Kept<T>* states = draft.before ? (Kept<T>*)__builtin_alloca_with_align(size, 512) : nullptr;
  if (states) memset((void*)states, 0, size);
  double head = 0.0;
  int num = 0;  // of states
  for (int depth = 0; depth < draft.block && frontier.num; depth++) {
    const double begun = now();
    if (states) follow<T>(draft, frontier, b, depth, states, num);
    num = frontier.num;
    continuations<T>(draft, logits_of<T>(draft, b, depth), states, frontier.num, found);
    head += now() - begun;
    frontier.go_on(draft, growth, depth, trees.budgets[b], found);
  }
  return head;
}

template <class T>
void grow(const Draft& draft, const Trees& trees, int b) {
  if (draft.fixed) return fill<T>(draft, trees, b);
  const int most = draft.block * draft.width;
  Growth growth = {(Candidate*)__builtin_alloca(most * sizeof(Candidate)), (int32_t*)__builtin_alloca(most * sizeof(int32_t)), 0};
  expand<T>(draft, trees, b, growth);
  plant(trees, b, growth, trees.budgets[b]);
}

}  // namespace
