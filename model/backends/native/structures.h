// What Python and the library tell each other: structures that Python fills in (structures.py has the same), the
// constants that both sides know, and a table of both, which library.py compares with its own when it loads the
// library.
#pragma once
#include <stddef.h>
#include <stdint.h>

constexpr int LANES = 16;
constexpr int K_STEP = 32;  // inputs of a packed weight are filled up to a multiple of this
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_PATCH = 32;      // pixels along a side
constexpr int MAX_WIDTH = 16;      // nodes of a tree at one depth
constexpr int MAX_BLOCK = 64;      // tokens that a draft proposes in one pass
constexpr int MAX_RANK = 1024;     // of a sequential head
constexpr int MAX_NODES = 1024;    // of a tree, without its root
constexpr int BINS = 24;           // of nodes' scores; see model/engine/speculation.py
constexpr float FINENESS = 12.0f;  // of those bins

enum Norm : int32_t { RMS, RMS_PLUS_ONE, LAYER };  // RMS_PLUS_ONE: multiplied by 1 + weight, and then rounded once
enum Activation : int32_t { SILU, QUICK_GELU, GELU, GELU_TANH };
enum MaskKind : int32_t { CAUSAL, TREE, FULL };  // what rows of one sequence see of each other
enum Budget { IDLE = -1, PLAIN = -2 };  // of a slot that has no part in a round, and of one that is not drafted for
enum Part { PROPOSING, GROWING, VERIFYING, ACCEPTING, OBSERVING, NUM_PARTS };  // of a round

extern "C" {

// --- a stack of transformer layers (pass.h)

// Null where a model has none. Weights are packed (product.h); biases are filled up to whole panels.
struct Layer {
  const void *norm1, *norm1_bias, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias;
  const void *norm2, *norm2_bias, *up, *up_bias, *down, *down_bias;
  const void *post1, *post2;  // norms of what attention and the MLP add to a row
  int32_t window;             // positions that a row sees, its own included; 0: all
  int32_t table;              // of the rotary embedding
};

struct Stack {
  int32_t num_layers, hidden, heads, kv_heads, head_dim, intermediate;
  int32_t norm, activation, gated, num_aux, num_tables, num_positions;
  float eps, scale;
  const Layer* layers;
  const void *cos, *sin;      // (num_tables, num_positions, head_dim / 2); null: no rotary embedding
  const int32_t* axes;        // (head_dim,) which axis of the position ids rotates each dimension
  const int32_t* aux_layers;  // (num_aux,) layers whose outputs are returned, ascending
  const void *final_norm, *final_bias;
};

// Where a layer's keys and values lie: [keys, values][slot][head][place][head_dim]. Strides are in numbers. The place
// of a position is the remainder of its division by `ring`, a multiple of 64; from `capacity` on, places lie behind the
// ring.
struct LayerCache {
  void* data;
  int64_t values_stride, slot_stride, head_stride;
  int32_t ring, capacity;
};

// The same for all layers, one behind the other; or `layers`, where they differ.
struct Cache {
  void* data;
  int64_t layer_stride, values_stride, slot_stride, head_stride;
  const LayerCache* layers;
  int32_t num_slots, num_positions;
  int32_t* lengths;  // (slots,) positions that each slot holds; null where only a pass is described
};

// Rows lie in (batch, rows); of sequence b the first counts[b] are real, the others are left alone.
struct Rows {
  int32_t batch, rows, first_slot, mask;
  const int32_t* starts;     // (batch,) position in its slot of a sequence's first row
  const int32_t* counts;     // (batch,)
  const int32_t* parents;    // (batch, rows), TREE only: -1 for a root; a parent comes before its children
  const int32_t* positions;  // (axes, batch, rows) for the rotary embedding; null: where a row lies in its slot
  Cache cache;
  const int32_t*
      blocks;         // (rows,), CAUSAL only: neighbours with the same number, 0 or more, see each other; null: none
  const void* added;  // (num_added, batch, rows, hidden), added to what the first layers return
  int32_t num_added;
  int32_t whole;  // rows of a block see all of it, whatever the window
};

// --- candidate trees (candidates.h)

struct Draft {
  int32_t block, vocab, width, rank;
  int32_t num_fixed, num_eos, num_tokens;  // num_tokens: of the target's vocabulary
  const void* logits;                      // (batch, block, vocab)
  // The sequential head (model/drafters/flash/network.py): (batch, block, rank), (num_tokens, rank); packed: rank ->
  // rank, rank -> vocab. before null: there is none.
  const void *contexts, *before, *state, *after;
  const int32_t* fixed;        // (num_fixed, 3): parent, rank and depth of the nodes of a fixed tree; null: best-first
  const int64_t* eos_tokens;   // (num_eos,) tokens that end an answer
  const int32_t* draft_vocab;  // (vocab,) tokens that the logits are of; null: all
};

// What drafting is worth (model/engine/speculation.py). seconds null: every node is admitted.
struct Worth {
  const double* seconds;      // of a round, by nodes over all sequences
  const double* chance;       // (BINS,) of a node's being accepted, by its score
  int64_t *tried, *accepted;  // (BINS,) nodes verified so far, and accepted
};

// One tree for each sequence, `rows` rows each, to be filled behind their roots.
struct Trees {
  int32_t batch, rows;
  const int64_t* budgets;
  int64_t *tokens, *sizes;
  int32_t *parents, *depths;
  double* scores;
};

// --- a round (step.h)

struct Linear {
  const void *packed, *bias;
  int32_t inputs, outputs;
};

// The FLASH draft (model/drafters/flash/network.py) around its layers.
struct DraftNetwork {
  const Stack* stack;
  // What enters the layers: of a token its row of token_table (vocab, hidden), or where that is null, `embed` of its
  // row of embeddings (vocab, target's hidden); then masks (block - 1, hidden); normalised by input_norm (hidden).
  const void *token_table, *embeddings, *masks, *input_norm;
  Linear embed;
  Linear out, head;                   // to the target's hidden state, and from there to the vocabulary
  const void *aux_norms, *fuse_norm;  // (num_aux, target's hidden), (hidden)
  // fuse: of the target's auxiliary hidden states; feature: of the last row of the context, to what enters; context: of
  // `out`, to the sequential head, packed null where there is none.
  Linear fuse, feature, context;
  int32_t num_aux;
  float embedding_scale;  // that `embeddings` are multiplied by
  Draft candidates;
};

// One round over slots 0.. of both caches (model/engine/round.py). `rows` a slot: its root and at most so many nodes
// less one.
struct Round {
  const Stack* target;
  const void* embeddings;
  float embedding_scale;  // that they are multiplied by
  Linear head;
  const DraftNetwork* draft;  // null: none
  Cache target_cache, draft_cache;
  int32_t batch, rows, axes;
  int32_t has_trees;                // whether a drafter has filled in the trees already
  int32_t only_drafts;              // whether the trees are to be drafted, and not verified yet
  int32_t num_tokens;               // of the vocabulary: rows of embeddings
  const int64_t *newest, *budgets;  // (batch,) last token; nodes at most, IDLE or PLAIN (model/decoding/tree.py)
  const int32_t* roots;             // (batch,) position ids of the roots
  Trees trees;
  Worth worth;
  int32_t *counts, *positions, *paths;  // (batch,) real rows; (axes, batch, rows); (batch, rows) those of a path
  int32_t *accepted, *observed;         // (batch,) how many those are, and of them the draft observes
  // (batch, rows, num_aux, hidden); (batch, rows, vocab); the draft's (batch, block, vocab); the last row of each of
  // the draft's contexts (slots, hidden)
  void *aux_hidden_states, *logits, *draft_logits, *last_context;
  int64_t *chosen, *emitted;  // (batch, rows): the target's own tokens; what is emitted
  double* seconds;            // (NUM_PARTS,) that each part took
};

// --- the table

// A structure: its name and size. A field: "structure.field", its size and offset. A constant: its value.
struct Fact {
  const char* name;
  int64_t value, offset;
};
}

namespace {

// Every field of a structure must be here: library.py refuses a library that does not name all that it knows, or
// others.
#define STRUCTURE(S) {#S, sizeof(S), -1}
#define FIELD(S, name) {#S "." #name, sizeof(S::name), offsetof(S, name)}
#define CONSTANT(name) {#name, int64_t(name), -1}
const Fact FACTS[] = {
    STRUCTURE(Layer),
    FIELD(Layer, norm1),
    FIELD(Layer, norm1_bias),
    FIELD(Layer, qkv),
    FIELD(Layer, qkv_bias),
    FIELD(Layer, q_norm),
    FIELD(Layer, k_norm),
    FIELD(Layer, out),
    FIELD(Layer, out_bias),
    FIELD(Layer, norm2),
    FIELD(Layer, norm2_bias),
    FIELD(Layer, up),
    FIELD(Layer, up_bias),
    FIELD(Layer, down),
    FIELD(Layer, down_bias),
    FIELD(Layer, post1),
    FIELD(Layer, post2),
    FIELD(Layer, window),
    FIELD(Layer, table),
    STRUCTURE(Stack),
    FIELD(Stack, num_layers),
    FIELD(Stack, hidden),
    FIELD(Stack, heads),
    FIELD(Stack, kv_heads),
    FIELD(Stack, head_dim),
    FIELD(Stack, intermediate),
    FIELD(Stack, norm),
    FIELD(Stack, activation),
    FIELD(Stack, gated),
    FIELD(Stack, num_aux),
    FIELD(Stack, num_tables),
    FIELD(Stack, num_positions),
    FIELD(Stack, eps),
    FIELD(Stack, scale),
    FIELD(Stack, layers),
    FIELD(Stack, cos),
    FIELD(Stack, sin),
    FIELD(Stack, axes),
    FIELD(Stack, aux_layers),
    FIELD(Stack, final_norm),
    FIELD(Stack, final_bias),
    STRUCTURE(LayerCache),
    FIELD(LayerCache, data),
    FIELD(LayerCache, values_stride),
    FIELD(LayerCache, slot_stride),
    FIELD(LayerCache, head_stride),
    FIELD(LayerCache, ring),
    FIELD(LayerCache, capacity),
    STRUCTURE(Cache),
    FIELD(Cache, data),
    FIELD(Cache, layer_stride),
    FIELD(Cache, values_stride),
    FIELD(Cache, slot_stride),
    FIELD(Cache, head_stride),
    FIELD(Cache, layers),
    FIELD(Cache, num_slots),
    FIELD(Cache, num_positions),
    FIELD(Cache, lengths),
    STRUCTURE(Rows),
    FIELD(Rows, batch),
    FIELD(Rows, rows),
    FIELD(Rows, first_slot),
    FIELD(Rows, mask),
    FIELD(Rows, starts),
    FIELD(Rows, counts),
    FIELD(Rows, parents),
    FIELD(Rows, positions),
    FIELD(Rows, cache),
    FIELD(Rows, blocks),
    FIELD(Rows, added),
    FIELD(Rows, num_added),
    FIELD(Rows, whole),
    STRUCTURE(Draft),
    FIELD(Draft, block),
    FIELD(Draft, vocab),
    FIELD(Draft, width),
    FIELD(Draft, rank),
    FIELD(Draft, num_fixed),
    FIELD(Draft, num_eos),
    FIELD(Draft, num_tokens),
    FIELD(Draft, logits),
    FIELD(Draft, contexts),
    FIELD(Draft, before),
    FIELD(Draft, state),
    FIELD(Draft, after),
    FIELD(Draft, fixed),
    FIELD(Draft, eos_tokens),
    FIELD(Draft, draft_vocab),
    STRUCTURE(Worth),
    FIELD(Worth, seconds),
    FIELD(Worth, chance),
    FIELD(Worth, tried),
    FIELD(Worth, accepted),
    STRUCTURE(Trees),
    FIELD(Trees, batch),
    FIELD(Trees, rows),
    FIELD(Trees, budgets),
    FIELD(Trees, tokens),
    FIELD(Trees, sizes),
    FIELD(Trees, parents),
    FIELD(Trees, depths),
    FIELD(Trees, scores),
    STRUCTURE(Linear),
    FIELD(Linear, packed),
    FIELD(Linear, bias),
    FIELD(Linear, inputs),
    FIELD(Linear, outputs),
    STRUCTURE(DraftNetwork),
    FIELD(DraftNetwork, stack),
    FIELD(DraftNetwork, token_table),
    FIELD(DraftNetwork, embeddings),
    FIELD(DraftNetwork, masks),
    FIELD(DraftNetwork, input_norm),
    FIELD(DraftNetwork, embed),
    FIELD(DraftNetwork, out),
    FIELD(DraftNetwork, head),
    FIELD(DraftNetwork, aux_norms),
    FIELD(DraftNetwork, fuse_norm),
    FIELD(DraftNetwork, fuse),
    FIELD(DraftNetwork, feature),
    FIELD(DraftNetwork, context),
    FIELD(DraftNetwork, num_aux),
    FIELD(DraftNetwork, embedding_scale),
    FIELD(DraftNetwork, candidates),
    STRUCTURE(Round),
    FIELD(Round, target),
    FIELD(Round, embeddings),
    FIELD(Round, embedding_scale),
    FIELD(Round, head),
    FIELD(Round, draft),
    FIELD(Round, target_cache),
    FIELD(Round, draft_cache),
    FIELD(Round, batch),
    FIELD(Round, rows),
    FIELD(Round, axes),
    FIELD(Round, has_trees),
    FIELD(Round, only_drafts),
    FIELD(Round, num_tokens),
    FIELD(Round, newest),
    FIELD(Round, budgets),
    FIELD(Round, roots),
    FIELD(Round, trees),
    FIELD(Round, worth),
    FIELD(Round, counts),
    FIELD(Round, positions),
    FIELD(Round, paths),
    FIELD(Round, accepted),
    FIELD(Round, observed),
    FIELD(Round, aux_hidden_states),
    FIELD(Round, logits),
    FIELD(Round, draft_logits),
    FIELD(Round, last_context),
    FIELD(Round, chosen),
    FIELD(Round, emitted),
    FIELD(Round, seconds),
    CONSTANT(LANES),
    CONSTANT(K_STEP),
    CONSTANT(MAX_HEAD_DIM),
    CONSTANT(MAX_PATCH),
    CONSTANT(MAX_WIDTH),
    CONSTANT(MAX_BLOCK),
    CONSTANT(MAX_RANK),
    CONSTANT(MAX_NODES),
    CONSTANT(BINS),
    CONSTANT(FINENESS),
    CONSTANT(RMS),
    CONSTANT(RMS_PLUS_ONE),
    CONSTANT(LAYER),
    CONSTANT(SILU),
    CONSTANT(QUICK_GELU),
    CONSTANT(GELU),
    CONSTANT(GELU_TANH),
    CONSTANT(CAUSAL),
    CONSTANT(TREE),
    CONSTANT(FULL),
    CONSTANT(IDLE),
    CONSTANT(PLAIN),
    CONSTANT(NUM_PARTS),
    {nullptr, 0, 0},
};
#undef STRUCTURE
#undef FIELD
#undef CONSTANT

}  // namespace
