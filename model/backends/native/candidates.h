// Grows candidate trees from a draft's logits, as `best_first` in model/decoding/tree.py does.
#pragma once
#include <time.h>

#include <algorithm>
#include <functional>

#include "check.h"
#include "product.h"
#include "structures.h"

namespace {

inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

struct Candidate {
  float score;  // cumulative log-probability
  int32_t token, parent;
};

// The best `width` candidates so far, best first.
struct Best {
  int width, num = 0;
  Candidate candidates[MAX_WIDTH];

  float least() const { return num < width ? -1e30f : candidates[num - 1].score; }
  void offer(const Candidate& one) {
    if (!(one.score > least())) return;  // a NaN is not offered either
    int at = num < width ? num++ : num - 1;
    for (; at > 0 && candidates[at - 1].score < one.score; at--) candidates[at] = candidates[at - 1];
    candidates[at] = one;
  }
};

// What follows one token: its best continuations, as logits, and log(sum(exp(logits))) over the vocabulary.
struct Continuations {
  Best best;
  float log_sum;
};

// What to add to the logits of LANES places of the draft's vocabulary: nothing where `allowed`, a bit for each token,
// has the token, and else so much that it is never chosen.
inline Vector refusal(const Draft& draft, const uint8_t* allowed, int place) {
  float lanes[LANES];
  for (int i = 0; i < LANES; i++) {
    if (place + i >= draft.vocab) {
      lanes[i] = 0.0f;  // left out already
      continue;
    }
    const int token = draft.draft_vocab ? draft.draft_vocab[place + i] : place + i;
    lanes[i] = allowed[token >> 3] >> (token & 7) & 1 ? 0.0f : -1e30f;
  }
  return load(lanes);
}

// Find the continuations of each of `num` tokens. states: of the sequential head, round_up(rank, K_STEP) numbers apart;
// null if there is no such head; allowed: the tokens that may follow, a bit for each, null for all.
template <class T>
void find_continuations(const Draft& draft, const T* logits, const Kept<T>* states, int num, Continuations* found,
                        const uint8_t* allowed = nullptr) {
  const int panels = (draft.vocab + LANES - 1) / LANES;
  const long k = round_up(draft.rank, K_STEP);
  alignas(64) float bias[MAX_WIDTH * PANELS * LANES] = {};
  Vector most[MAX_WIDTH], total[MAX_WIDTH];
  for (int n = 0; n < num; n++) {
    most[n] = broadcast(-1e30f);
    total[n] = Vector{};
    found[n].best = Best{draft.width};
  }
  for (int panel = 0; panel < panels; panel += PANELS) {
    const int some = panels - panel < PANELS ? panels - panel : PANELS;
    const long stride = some * LANES;
    const T* after = (const T*)draft.after + panel * k * LANES;
    if (states) product(states, k, num, after, k * LANES, some, k, bias, stride, after + some * k * LANES);
    for (int p = 0; p < some; p++) {
      const int token = (panel + p) * LANES;
      const int left = draft.vocab - token;
      Vector drafted = first_lanes(load_some(logits + token, left), left, -1e30f);
      if (allowed) drafted += refusal(draft, allowed, token);
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
    found[n].log_sum = top + __builtin_logf(sum(total[n] * exponential(most[n] - top)));
    if (!draft.draft_vocab) continue;
    for (int i = 0; i < found[n].best.num; i++) {
      int32_t& token = found[n].best.candidates[i].token;
      token = draft.draft_vocab[token];
      CHECK(0 <= token && token < draft.num_tokens);
    }
  }
}

// The bin of a score, a log-probability. Any number is valid: a drafter may supply its own scores.
inline int bin_of(float score) {
  const float bin = FINENESS * __builtin_sqrtf(-score);
  return bin < BINS ? int(bin) : score >= 0.0f ? 0 : BINS - 1;
}

// The nodes of one tree while it grows, level by level; a node's parent is its number from 1 on, or the root's, 0.
struct Growth {
  Candidate* nodes;
  int32_t* level_of;
  int count;
};

// Decide how many nodes of each tree are verified: the likeliest of all trees, as many as give the most tokens per
// second
// (`admitted` in model/decoding/tree.py). Without prices, as many as the budgets allow. memory: room for 2 numbers per
// node.
inline void admit(const Worth& worth, const Trees& trees, const Growth* growths, int64_t* admitted, float* memory) {
  int total = 0, sequences = 0;
  for (int b = 0; b < trees.batch; b++) {
    const int count = trees.budgets[b] > 0 ? growths[b].count : 0;
    admitted[b] = count < trees.budgets[b] ? count : trees.budgets[b];
    total += admitted[b] > 0 ? admitted[b] : 0;
    sequences += trees.budgets[b] != IDLE;
  }
  if (!worth.seconds || !total) return;
  float *best = memory, *scores = best + total;  // of each tree in turn, descending; of all trees together
  int num = 0;
  for (int b = 0; b < trees.batch; b++) {
    if (admitted[b] <= 0) continue;
    float* own = best + num;
    for (int chosen = 0, i = 0; i < growths[b].count; i++) {
      const float score = growths[b].nodes[i].score;
      if (chosen == admitted[b] && score <= own[chosen - 1]) continue;
      int at = chosen < admitted[b] ? chosen++ : chosen - 1;
      for (; at > 0 && own[at - 1] < score; at--) own[at] = own[at - 1];
      own[at] = score;
    }
    num += admitted[b];
  }
  memcpy(scores, best, num * sizeof(float));
  std::sort(scores, scores + num, std::greater<float>());
  double expected = sequences, rate = expected / worth.seconds[0];
  int most = 0;
  for (int n = 1; n <= num; n++) {
    expected += worth.chance[bin_of(scores[n - 1])];
    if (expected > rate * worth.seconds[n]) {
      rate = expected / worth.seconds[n];
      most = n;
    }
  }
  const float bar = most ? scores[most - 1] : 1.0f;
  for (int b = 0; b < trees.batch; b++) {
    if (admitted[b] <= 0) continue;
    const float* own = best;
    best += admitted[b];
    while (admitted[b] && own[admitted[b] - 1] < bar) admitted[b]--;
  }
}

// Make tree b of the best of its nodes, `budget` of them. Parents come before their children and are always better.
void plant(const Trees& trees, int b, const Growth& growth, int budget) {
  const Candidate* nodes = growth.nodes;
  const int count = growth.count;
  int32_t row_of[MAX_BLOCK * MAX_WIDTH + 1];  // of nodes as they are numbered while growing; the root is 0
  bool waiting[MAX_BLOCK * MAX_WIDTH] = {};   // chosen, and not in the tree yet
  for (int chosen = 0; chosen < budget && chosen < count; chosen++) {
    int best = -1;
    for (int i = 0; i < count; i++)
      if (!waiting[i] && (best < 0 || nodes[i].score > nodes[best].score)) best = i;
    waiting[best] = true;
  }
  // The likeliest path comes first: if it is accepted, its keys and values already lie where they belong.
  int row = 1;
  const auto add = [&](int i) {
    CHECK(row < trees.rows);
    const long at = b * (long)trees.rows + row;
    trees.tokens[at] = nodes[i].token;
    trees.scores[at] = nodes[i].score;
    trees.depths[at] = 1 + growth.level_of[i];
    trees.parents[at] = nodes[i].parent ? row_of[nodes[i].parent] : 0;
    row_of[i + 1] = row++;
    waiting[i] = false;
  };
  for (int parent = 0, next; parent >= 0; parent = next) {
    next = -1;
    for (int i = 0; i < count; i++)
      if (waiting[i] && nodes[i].parent == parent && (next < 0 || nodes[i].score > nodes[next - 1].score)) next = i + 1;
    if (next >= 0) add(next - 1);
  }
  for (int i = 0; i < count; i++)
    if (waiting[i]) add(i);
  trees.sizes[b] = row;
}

// Offer the continuations of a node to `next`. A token that ends the answer has none, unless it is the root (0), after
// which the answer goes on in any case.
inline void offer_children(const Draft& draft, const Candidate& node, int number, const Continuations& found,
                           Best& next) {
  const int64_t* end = draft.eos_tokens + draft.num_eos;
  if (number && std::find(draft.eos_tokens, end, node.token) != end) return;
  for (int i = 0; i < found.best.num; i++) {  // always below the parent's score, even if the draft is certain
    const float score = found.best.candidates[i].score - found.log_sum;
    next.offer({node.score + (score < 0 ? score : 0) - 1e-6f, found.best.candidates[i].token, number});
  }
}

// How many of the nodes have at least this score.
inline int count_no_worse(const Candidate* nodes, int count, float score) {
  int found = 0;
  for (int i = 0; i < count; i++) found += nodes[i].score >= score;
  return found;
}

template <class T>
const T* logits_of(const Draft& draft, int b, int depth) {
  return (const T*)draft.logits + (b * (long)draft.block + depth) * draft.vocab;
}

// Fill tree b with the first nodes of the fixed tree, as many as its budget has and the draft proposes tokens for.
template <class T>
void fill(const Draft& draft, const Trees& trees, int b) {
  Continuations found[MAX_BLOCK];  // at each depth
  for (int depth = 0; depth < draft.block; depth++)
    find_continuations<T>(draft, logits_of<T>(draft, b, depth), nullptr, 1, found + depth);
  const int num = trees.budgets[b] < draft.num_fixed ? trees.budgets[b] : draft.num_fixed;
  CHECK(num < trees.rows);
  const long at = b * (long)trees.rows;
  int row = 1;
  for (; row <= num; row++) {
    const int32_t parent = draft.fixed[3 * row - 3], rank = draft.fixed[3 * row - 2], depth = draft.fixed[3 * row - 1];
    CHECK(0 <= parent && parent < row && 1 <= depth && depth <= draft.block);
    const Continuations& behind = found[depth - 1];
    if (rank >= behind.best.num) break;
    const Candidate& one = behind.best.candidates[rank];
    const double score = (parent ? trees.scores[at + parent] : 0.0) + one.score - behind.log_sum;
    if (!__builtin_isfinite(score)) break;
    trees.tokens[at + row] = one.token;
    trees.scores[at + row] = score;
    trees.parents[at + row] = parent;
    trees.depths[at + row] = depth;
  }
  trees.sizes[b] = row;
}

// The deepest level of a tree, whose nodes are expanded next.
struct Frontier {
  int num, first, before;  // how many; the number of the first (the root is 0); and of the first one level up
  Candidate nodes[MAX_WIDTH];

  Frontier(const Trees& trees, int b)
      : num(1), first(0), before(0), nodes{{0.0f, (int32_t)trees.tokens[b * (long)trees.rows], 0}} {}

  // Replace it by the best continuations of its nodes, and add those to the tree.
  void advance(const Draft& draft, Growth& growth, int depth, int budget, const Continuations* found) {
    Best next{draft.width};
    for (int n = 0; n < num; n++) offer_children(draft, nodes[n], first + n, found[n], next);
    before = first;
    first = growth.count + 1;
    num = next.num;
    for (int n = 0; n < num; n++) {
      nodes[n] = next.candidates[n];
      growth.nodes[growth.count] = nodes[n];
      growth.level_of[growth.count] = depth;
      growth.count++;
    }
    // Children are worse than their parent: a node is not expanded if enough others are at least as good.
    while (num && count_no_worse(growth.nodes, growth.count, nodes[num - 1].score) >= budget) num--;
  }
};

// Compute the sequential head's states at the frontier from those of the level before, `num` of them, in their place.
template <class T>
void advance_states(const Draft& draft, const Frontier& frontier, int b, int depth, Kept<T>* states, int num) {
  const long rank = draft.rank, k = round_up(rank, K_STEP), width = round_up(rank, LANES);
  const T* context = (const T*)draft.contexts + (b * (long)draft.block + depth) * rank;
  alignas(64) float carried[MAX_WIDTH * MAX_RANK];
  if (depth) product(states, k, num, (const T*)draft.state, k * LANES, width / LANES, k, carried, width, draft.after);
  for (int n = 0; n < frontier.num; n++) {
    CHECK(0 <= frontier.nodes[n].token && frontier.nodes[n].token < draft.num_tokens);
    const T* before = (const T*)draft.before + frontier.nodes[n].token * rank;
    const float* from = carried + (frontier.nodes[n].parent - frontier.before) * width;
    for (long i = 0; i < rank; i += LANES) {
      Vector x = load_some(before + i, rank - i) + load_some(context + i, rank - i);
      if (depth) x += load(from + i);
      keep<T>(states + n * k + i, x * sigmoid(x));
    }
  }
}

// Grow the nodes of tree b, level by level. Returns the seconds that the sequential head took: it is a layer of the
// draft, and only runs while the tree grows.
template <class T>
double expand(const Draft& draft, const Trees& trees, int b, Growth& growth) {
  Frontier frontier(trees, b);
  Continuations found[MAX_WIDTH];
  alignas(64) Kept<T> memory[MAX_WIDTH * MAX_RANK];
  Kept<T>* states = draft.before ? memory : nullptr;
  if (states) memset((void*)states, 0, MAX_WIDTH * round_up(draft.rank, K_STEP) * sizeof *states);
  double head = 0.0;
  int num = 0;  // number of states
  for (int depth = 0; depth < draft.block && frontier.num; depth++) {
    const double begun = now();
    if (states) advance_states<T>(draft, frontier, b, depth, states, num);
    num = frontier.num;
    find_continuations<T>(draft, logits_of<T>(draft, b, depth), states, frontier.num, found);
    head += now() - begun;
    frontier.advance(draft, growth, depth, trees.budgets[b], found);
  }
  return head;
}

// Find what may follow a path behind the root of tree b.
template <class T>
void go_on(const Draft& draft, const Trees& trees, int b, const int64_t* path, int length, const uint8_t* allowed,
           Continuations& found) {
  Frontier frontier(trees, b);
  alignas(64) Kept<T> memory[MAX_WIDTH * MAX_RANK];
  Kept<T>* states = draft.before ? memory : nullptr;
  if (states) {
    memset((void*)states, 0, round_up(draft.rank, K_STEP) * sizeof *states);
    for (int depth = 0; depth <= length; depth++) {
      if (depth) frontier.nodes[0].token = path[depth - 1];
      advance_states<T>(draft, frontier, b, depth, states, depth ? 1 : 0);
    }
  }
  find_continuations<T>(draft, logits_of<T>(draft, b, length), states, 1, &found, allowed);
}

template <class T>
void grow(const Draft& draft, const Trees& trees, int b) {
  if (draft.fixed) return fill<T>(draft, trees, b);
  Candidate nodes[MAX_BLOCK * MAX_WIDTH];
  int32_t level_of[MAX_BLOCK * MAX_WIDTH];
  Growth growth = {nodes, level_of, 0};
  expand<T>(draft, trees, b, growth);
  plant(trees, b, growth, trees.budgets[b]);
}

inline void check_draft([[maybe_unused]] const Draft& draft) {
  CHECK(0 < draft.width && draft.width <= MAX_WIDTH && 0 < draft.block && draft.block <= MAX_BLOCK &&
        draft.rank <= MAX_RANK);
  CHECK(draft.num_fixed <= MAX_NODES && draft.width <= draft.vocab && draft.vocab <= draft.num_tokens);
}

}  // namespace
