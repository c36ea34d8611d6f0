// What Python calls (library.py, stack.py, candidates.py, step.py): forward passes, and the steps made of them.
#include "step.h"

namespace {

template <class T>
void forward(const Stack& stack, const Rows& rows, const void* embeds, void* hidden, void* taps) {
  Pass<T> pass(stack, rows);
  team.run([&](Member& member) {
    pass.run(member, embeds, (T*)taps);
    pass.finish(member, (T*)hidden);
  });
}

template <class T>
void hold(const Stack& stack, const Rows& rows, const void* context) {
  Pass<T> pass(stack, rows);
  team.run([&](Member& member) { pass.hold(member, context); });
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
    linear_stage<T>(member, from, rows, Linear{w, bias, (int32_t)k, outputs}, [&](int row) { return (T*)y + (long)row * outputs; });
  });
}

// Pictures of bytes (images, height, width, 3) cut into patches, left to right and top to bottom: rows of channel, y, x,
// each byte looked up in the table of its channel.
template <class T>
void patches(const uint8_t* pictures, int images, int height, int width, int patch, const float* table, void* y) {
  const int across = width / patch, down = height / patch, area = patch * patch, size = 3 * area;
  team.run([&](Member& member) {
    member.share(images * down, [&](int task) {
      const uint8_t* strip = pictures + (long)(task / down) * height * width * 3 + (long)(task % down) * patch * width * 3;
      T* to = (T*)y + (long)task * across * size;
      alignas(64) float row[3 * MAX_PATCH * MAX_PATCH + LANES];
      for (int p = 0; p < across; p++, to += size) {
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
  team.run([&](Member& member) { member.share(trees.batch, [&](int b) { grow<T>(draft, trees, b); }); });
}

template <class T>
void pack(const void* from, int inputs, int outputs, void* to) {
  const long k = round_up(inputs, K_STEP);
  team.run([&](Member& member) {
    member.share((outputs + LANES - 1) / LANES, [&](int panel) {
      pack_panel((const T*)from + (long)panel * LANES * inputs, inputs, outputs - panel * LANES, k, (T*)to + panel * k * LANES);
    });
  });
}

}  // namespace

#define BY_TYPE(call, ...) (bfloat16 ? call<bf16>(__VA_ARGS__) : call<float>(__VA_ARGS__))

#if !defined(FLASH_STAMP)
#define FLASH_STAMP "compiled by hand"
#endif

extern "C" {

// What this was compiled from, and how: builds.py looks for it in the file.
const char* flash_stamp() { return FLASH_STAMP; }

// Bytes of a structure that Python fills in; 0: there is none of that name.
long flash_size(const char* name) {
#define SIZE(type) \
  if (!strcmp(name, #type)) return sizeof(type);
  SIZE(Layer) SIZE(Stack) SIZE(Rows) SIZE(Draft) SIZE(Trees) SIZE(Linear) SIZE(DraftNetwork) SIZE(Cache) SIZE(Round)
#undef SIZE
  return 0;
}

// To be called first. False where the system does not let this process use what the library was built for.
bool flash_begin(int threads) {
#if defined(__AMX_BF16__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return false;
#endif
  team.grow(threads);
  return true;
}

// Whether the threads offer their cores to other processes between any two stages.
void flash_share_cores(bool yes) { team.share_cores(yes); }

// (outputs, inputs) to panels: ceil(outputs / 16) * 16 * ceil(inputs / 32) * 32 numbers.
void flash_pack(bool bfloat16, const void* from, int inputs, int outputs, void* to) { BY_TYPE(pack, from, inputs, outputs, to); }

// x (rows, inputs) -> y (rows, outputs).
void flash_linear(bool bfloat16, const void* x, int rows, int inputs, int outputs, const void* w, const void* bias, void* y) {
  BY_TYPE(linear, x, rows, inputs, outputs, w, bias, y);
}

// pictures (images, height, width, 3), table (3, 256) -> y (images * patches, 3 * patch * patch).
void flash_patches(bool bfloat16, const uint8_t* pictures, int images, int height, int width, int patch, const float* table, void* y) {
  BY_TYPE(patches, pictures, images, height, width, patch, table, y);
}

// embeds (batch, rows, hidden) -> hidden (batch, rows, hidden) and taps (batch, rows, num_taps, hidden).
void flash_forward(bool bfloat16, const Stack* stack, const Rows* rows, const void* embeds, void* hidden, void* taps) {
  BY_TYPE(forward, *stack, *rows, embeds, hidden, taps);
}

// Only write every layer's keys and values of `context` (batch, rows, hidden) to the cache.
void flash_hold(bool bfloat16, const Stack* stack, const Rows* rows, const void* context) { BY_TYPE(hold, *stack, *rows, context); }

// Trees of the likeliest drafted nodes behind the roots that `trees` has.
void flash_grow(bool bfloat16, const Draft* draft, const Trees* trees) { BY_TYPE(grow_all, *draft, *trees); }

void flash_fuse(bool bfloat16, const DraftNetwork* draft, const void* taps, int rows, void* context) {
  BY_TYPE(fuse, *draft, taps, rows, context);
}

// Draft a block behind the newest token of every sequence: logits (batch, block, vocab), and trees grown from them.
void flash_propose(bool bfloat16, const DraftNetwork* draft, const Rows* rows, const void* tails, void* logits, const Trees* trees) {
  double growing;
  BY_TYPE(propose, *draft, *rows, tails, Worth{}, logits, *trees, growing);
}

// Add the accepted rows of taps (batch, num, num_taps, target's hidden), paths (batch, num), to the draft's context.
void flash_observe(bool bfloat16, const DraftNetwork* draft, const Rows* rows, const void* taps, int num, const int32_t* paths, void* tails) {
  BY_TYPE(observe, *draft, *rows, taps, num, paths, tails);
}

void flash_look(bool bfloat16, Round* round) { BY_TYPE(look, *round); }
void flash_accept(bool bfloat16, Round* round) { BY_TYPE(accept, *round); }
}
