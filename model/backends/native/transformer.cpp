// The functions that Python calls: forward passes, and the steps made of them. structures.py declares them too; their
// structures are in structures.h.
#include <mutex>

#include "step.h"

namespace {

template <class T>
void forward(const Stack& stack, const Rows& rows, const void* embeds, void* hidden, void* aux) {
  Pass<T> pass(stack, rows);
  team.run([&](Member& member) {
    pass.run(member, embeds, (T*)aux);
    pass.finish(member, (T*)hidden);
  });
}

template <class T>
void write_kv(const Stack& stack, const Rows& rows, const void* context) {
  Pass<T> pass(stack, rows);
  team.run([&](Member& member) { pass.write_kv(member, context); });
}

template <class T>
void linear(const void* x, int rows, int inputs, int outputs, const void* w, const void* bias, void* y) {
  const long k = round_up(inputs, K_STEP), most = round_up(rows, MANY_ROWS);
  arena.reserve(Arena::bytes<Kept<T>>(most * k));
  Kept<T>* from = arena.take<Kept<T>>(most * k);
  for (int row = 0; row < rows; row++) {
    copy(from + row * k, (const T*)x + (long)row * inputs, inputs);
    memset((void*)(from + row * k + inputs), 0, (k - inputs) * sizeof *from);
  }
  team.run([&](Member& member) {
    const Linear layer{w, bias, (int32_t)k, outputs};
    linear_stage<T>(member, from, rows, layer, [&](int row) { return (T*)y + (long)row * outputs; });
  });
}

// Cut pictures of bytes (images, height, width, 3) into patches, left to right and top to bottom: rows of channel, y,
// x, each byte looked up in the table of its channel.
template <class T>
void patches(const uint8_t* pictures, int images, int height, int width, int patch, const float* table, void* y) {
  CHECK(0 < patch && patch <= MAX_PATCH);
  const int grid_w = width / patch, grid_h = height / patch, area = patch * patch, size = 3 * area;
  team.run([&](Member& member) {
    member.share(images * grid_h, [&](int task) {
      const uint8_t* strip =
          pictures + (long)(task / grid_h) * height * width * 3 + (long)(task % grid_h) * patch * width * 3;
      T* to = (T*)y + (long)task * grid_w * size;
      alignas(64) float row[3 * MAX_PATCH * MAX_PATCH + LANES];
      for (int p = 0; p < grid_w; p++, to += size) {
        for (int line = 0; line < patch; line++) {
          const uint8_t* from = strip + ((long)line * width + p * patch) * 3;
          for (int x = 0; x < patch; x++)
            for (int c = 0; c < 3; c++) row[c * area + line * patch + x] = table[c * 256 + from[3 * x + c]];
        }
        int i = 0;
        for (; i + LANES <= size; i += LANES) store(to + i, load(row + i));
        store_some(to + i, load(row + i), size - i);
      }
    });
  });
}

template <class T>
void grow_all(const Draft& draft, const Trees& trees) {
  check_draft(draft);
  team.run([&](Member& member) { member.share(trees.batch, [&](int b) { grow<T>(draft, trees, b); }); });
}

template <class T>
void pack(const void* from, int inputs, int outputs, void* to) {
  const long k = round_up(inputs, K_STEP);
  team.run([&](Member& member) {
    member.share((outputs + LANES - 1) / LANES, [&](int panel) {
      pack_panel((const T*)from + (long)panel * LANES * inputs, inputs, outputs - panel * LANES, k,
                 (T*)to + panel * k * LANES);
    });
  });
}

}  // namespace

#define BY_TYPE(call, ...) (bfloat16 ? call<bf16>(__VA_ARGS__) : call<float>(__VA_ARGS__))
// Let one call in at a time: the threads and memory that passes use are one for the process, and Python releases its
// own lock around a call.
#define ENTER const std::lock_guard<std::mutex> alone(entry)

#if !defined(FLASH_STAMP)
#define FLASH_STAMP "compiled by hand"
#endif

namespace {
std::mutex entry;
}

extern "C" {

// The hash of sources and flags that this was compiled from; builds.py looks for it in the file.
const char* flash_stamp() { return FLASH_STAMP; }

// Structures, their fields, and constants; a fact without a name ends them.
const Fact* flash_facts() { return FACTS; }

// Whether attention is compiled for heads of so many numbers.
bool flash_has_head_dim(int head_dim) {
  switch (head_dim) {
#define CASE(D) case D:
    HEAD_DIMS(CASE)
#undef CASE
    return true;
  }
  return false;
}

// Grow the team to so many threads; to be called first. Returns false if the system does not let this process use the
// instructions that the library was built for.
bool flash_begin(int threads) {
  ENTER;
#if defined(__AMX_BF16__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return false;
#endif
  team.grow(threads);
  return true;
}

// Choose whether threads offer their cores to other processes after each stage.
void flash_share_cores(bool yes) { team.share_cores(yes); }

// Pack weights (outputs, inputs) into panels: ceil(outputs / 16) * 16 * ceil(inputs / 32) * 32 numbers.
void flash_pack(bool bfloat16, const void* from, int inputs, int outputs, void* to) {
  ENTER;
  BY_TYPE(pack, from, inputs, outputs, to);
}

// Apply a linear layer: x (rows, inputs) -> y (rows, outputs).
void flash_linear(bool bfloat16, const void* x, int rows, int inputs, int outputs, const void* w, const void* bias,
                  void* y) {
  ENTER;
  BY_TYPE(linear, x, rows, inputs, outputs, w, bias, y);
}

// Cut pictures into patches: pictures (images, height, width, 3), table (3, 256) -> y (patches, 3 * patch * patch).
void flash_patches(bool bfloat16, const uint8_t* pictures, int images, int height, int width, int patch,
                   const float* table, void* y) {
  ENTER;
  BY_TYPE(patches, pictures, images, height, width, patch, table, y);
}

// Run a stack: embeds (batch, rows, hidden) -> hidden (batch, rows, hidden) and aux (batch, rows, num_aux, hidden).
void flash_forward(bool bfloat16, const Stack* stack, const Rows* rows, const void* embeds, void* hidden, void* aux) {
  ENTER;
  BY_TYPE(forward, *stack, *rows, embeds, hidden, aux);
}

// Only write every layer's keys and values of `context` (batch, rows, hidden) to the cache.
void flash_write_kv(bool bfloat16, const Stack* stack, const Rows* rows, const void* context) {
  ENTER;
  BY_TYPE(write_kv, *stack, *rows, context);
}

// Grow trees of the likeliest drafted nodes from the roots in `trees`.
void flash_grow(bool bfloat16, const Draft* draft, const Trees* trees) {
  ENTER;
  BY_TYPE(grow_all, *draft, *trees);
}

// Fuse auxiliary hidden states: aux (rows, num_aux, target's hidden) -> context (rows, hidden).
void flash_fuse(bool bfloat16, const DraftNetwork* draft, const void* aux, int rows, void* context) {
  ENTER;
  BY_TYPE(fuse, *draft, aux, rows, context);
}

// Draft a block after the newest token of every sequence: logits (batch, block, vocab), and trees grown from them.
void flash_propose(bool bfloat16, const DraftNetwork* draft, const Rows* rows, const void* last_context, void* logits,
                   const Trees* trees) {
  ENTER;
  double growing;
  BY_TYPE(propose, *draft, *rows, last_context, Worth{}, logits, *trees, growing);
}

// Add the accepted rows of aux (batch, num, num_aux, target's hidden), paths (batch, num), to the draft's contexts.
void flash_observe(bool bfloat16, const DraftNetwork* draft, const Rows* rows, const void* aux, int num,
                   const int32_t* paths, void* last_context) {
  ENTER;
  BY_TYPE(observe, *draft, *rows, aux, num, paths, last_context);
}

// The two halves of a round.
void flash_draft_and_verify(bool bfloat16, Round* round) {
  ENTER;
  BY_TYPE(draft_and_verify, *round);
}
void flash_commit(bool bfloat16, Round* round) {
  ENTER;
  BY_TYPE(commit, *round);
}

// Find the target's likeliest token at a row of a slot's tree, of those that are allowed, a bit for each.
int64_t flash_likeliest(bool bfloat16, const Round* round, int slot, int row, const uint8_t* allowed) {
  ENTER;
  return BY_TYPE(likeliest, *round, slot, row, allowed);
}

// Go on behind a path of a slot's draft: tokens and scores (num,), of which so many are there as it returns.
int flash_go_on(bool bfloat16, const Round* round, int slot, const int64_t* path, int length, const uint8_t* allowed,
                int num, int64_t* tokens, double* scores) {
  ENTER;
  return BY_TYPE(go_on, *round, slot, path, length, allowed, num, tokens, scores);
}
}
