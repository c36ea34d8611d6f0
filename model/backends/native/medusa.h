// The Medusa draft (model/drafters/medusa/network.py): heads over one hidden state of each sequence, and trees from what they say.
#pragma once
#include "step.h"

extern "C" {

struct MedusaNetwork {
  const void* norm;    // (hidden)
  Linear heads, head;  // hidden -> block * hidden; and from there to the vocabulary
  float eps;
  Draft candidates;
};
}

namespace {

// last (batch, hidden) -> logits (batch, block, vocab), and trees behind the roots that `trees` has; a budget of 0: none.
template <class T>
void propose_medusa(const MedusaNetwork& draft, const void* last, void* logits, const Trees& trees) {
  const long wide = draft.head.inputs, block = draft.candidates.block, vocab = draft.head.outputs;
  const long most = round_up(trees.batch, MANY_ROWS), many = round_up(trees.batch * block, MANY_ROWS);
  scratch.reserve(Arena::bytes<Kept<T>>(most * wide) + Arena::bytes<Kept<T>>(many * wide) + Arena::bytes<int32_t>(trees.batch));
  Kept<T> *said = scratch.take<Kept<T>>(most * wide), *guessed = scratch.take<Kept<T>>(many * wide);
  int32_t* where = scratch.take<int32_t>(trees.batch);  // sequences that draft, side by side
  int num = 0;
  for (int b = 0; b < trees.batch; b++)
    if (trees.budgets[b] > 0) where[num++] = b;
  Draft candidates = draft.candidates;
  candidates.logits = logits;
  team.run([&](Member& member) {
    row_stage(member, num, [&](int row) {
      normalise<T>((const T*)last + where[row] * wide, draft.norm, nullptr, RMS, draft.eps, wide, said + row * wide);
    });
    const Panels<T> heads{draft.heads.packed, int(draft.heads.outputs / LANES), PANELS, wide};
    product_stage<T>(member, said, wide, num, heads, heads.packed, [&](int row, int some, int panel, int panels, float* y, long stride) {
      for (int r = 0; r < some; r++)
        for (int p = 0; p < panels; p++) {
          const long output = (panel + p) * LANES, head = output / wide, at = output % wide;
          const Vector moved = with_bias<T>(y + r * stride + p * LANES, draft.heads.bias, output);
          keep<T>(guessed + ((row + r) * block + head) * wide + at,
                  load(said + (row + r) * wide + at) + rounded(activated(moved, SILU_GATED), (const T*)nullptr));
        }
    });
    linear_stage<T>(member, guessed, num * block, draft.head,
                 [&](int row) { return (T*)logits + (where[row / block] * block + row % block) * vocab; });
    member.share(num, [&](int row) { grow<T>(candidates, trees, where[row]); });
  });
}

}  // namespace
