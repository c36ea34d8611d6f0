// Threads that work through the same stages together. A stage ends when its tasks are done, not when every thread has
// arrived: a thread that lost its core to other work delays nobody. When it is back, it skips the stages that have
// finished; a finished job does not wait for it either. (OpenMP's barriers wait for every thread, which beside an HTTP
// server cost whole time slices.)
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "product.h"

constexpr int MAX_HELPERS = 255;
constexpr int TASK_BITS = 20;       // bits of a claim that count a stage's tasks; the other 44 count stages, for years
constexpr int SPINS = 200;          // pauses before a waiting thread offers its core to others: some 10 microseconds
constexpr int IDLE_YIELDS = 10000;  // offers before an idle thread sleeps: some milliseconds

// A member's share of the stages, on a cache line of its own. It owns a range of each stage's tasks, the same range
// whenever a stage has as many tasks: so it finds what it wrote of a head in its own caches, and claims tasks without
// contention. A member whose range is finished claims from the next member's. Nothing is reset: stages are counted on
// from job to job.
struct alignas(64) Range {
  std::atomic<uint64_t> claimed{0};  // a stage, above TASK_BITS, and how many of its tasks in this range are claimed
  std::atomic<uint64_t> done{0};     // tasks that this member has done, in all stages so far
};

template <class Offer>
static inline void be_patient(int& waited, const Offer& offer_core) {
  if (++waited < SPINS)
    __builtin_ia32_pause();
  else
    offer_core();
}

class Team;

// A thread beside the caller's, and where it is: outside of any job (OUT), in one (IN), or in one but without a core
// (AWAY). It sets AWAY before it offers its core; the caller, whose job is over, may then dismiss it. When it has a
// core again, it must not return through the job's functions: everything they refer to lies on the caller's stack and
// may be gone. It jumps home instead. That is defined as long as nothing between here and home has a destructor:
// helpers offer their cores only in Member::share, never inside a task, and jobs hold plain pointers and numbers.
// (Leaving a job by returning would need its memory until the late thread is back, and the next job would have to wait
// for that.)
struct alignas(64) Helper {
  enum Place { OUT, IN, AWAY };
  std::atomic<int> place{OUT};
  Team* team = nullptr;
  uint32_t seen = 0;  // the latest job that it knows of
  jmp_buf home;

  void step_aside() {
    place = AWAY;
    sched_yield();
    int away = AWAY;
    if (!place.compare_exchange_strong(away, IN)) longjmp(home, 1);
  }

  // Dismiss it if it is away. Returns whether it is outside of any job now.
  bool dismiss() {
    int away = AWAY;
    return place.load() == OUT || place.compare_exchange_strong(away, OUT);
  }
};

// One thread's progress through the stages of a job. Every thread must call `share` with the same tasks in the same
// order.
struct Member {
  Range* ranges;
  int members, index;
  Helper* helper;                 // null: the caller
  bool shares;                    // offers its core after each stage, when it holds no task that others wait for
  uint64_t stage = 0, total = 0;  // the current stage; number of tasks of all stages up to its end

  template <class Task>
  void share(int tasks, const Task& task) {
    stage++;
    total += tasks;
    int did = 0;
    for (int i = 0; i < members; i++) {
      const int whose = index + i < members ? index + i : index + i - members;
      for (int t; (t = claim(whose, tasks)) >= 0; did++) task(t);
    }
    if (did)
      ranges[index].done.store(ranges[index].done.load(std::memory_order_relaxed) + did, std::memory_order_release);
    if (shares) offer_core();
    for (int waited = 0; !over();) be_patient(waited, [&] { offer_core(); });
  }

  // The first and the end of this member's own range, in a stage of so many tasks.
  int first(int tasks) const { return first_of(index, tasks); }
  int end(int tasks) const { return first_of(index + 1, tasks); }

  void offer_core() { helper ? helper->step_aside() : (void)sched_yield(); }

 private:
  int first_of(int whose, int tasks) const { return ((long)tasks * whose + members - 1) / members; }

  // Claim a task from a member's range; -1: none is left, or the stage is over.
  int claim(int whose, int tasks) {
    const int first = first_of(whose, tasks), end = first_of(whose + 1, tasks);
    std::atomic<uint64_t>& claimed = ranges[whose].claimed;
    uint64_t seen = claimed.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begun = seen >> TASK_BITS == stage ? seen & ((1 << TASK_BITS) - 1) : 0;
      if (seen >> TASK_BITS > stage || first + begun >= (uint64_t)end) return -1;
      if (claimed.compare_exchange_weak(seen, (stage << TASK_BITS) + begun + 1, std::memory_order_relaxed))
        return first + begun;
    }
  }

  // Whether all tasks of this stage are done. Nobody starts a task of a later stage before that, so the counts may be
  // read one after the other.
  bool over() const {
    uint64_t done = 0;
    for (int m = 0; m < members; m++) done += ranges[m].done.load(std::memory_order_acquire);
    return done >= total;
  }
};

class Team {
  Range ranges[MAX_HELPERS + 1];  // the caller's first
  Helper helpers[MAX_HELPERS];
  int num_helpers = 0;
  std::atomic<uint32_t> calls{0};  // jobs so far; sleeping threads wait for it to change
  std::atomic<int> sleeping{0};
  std::atomic<bool> open{false};
  void (*job)(void*, Member&) = nullptr;
  void* argument = nullptr;
  std::atomic<bool> shares{false};
  uint64_t stage = 0, total = 0;  // of the jobs before

  Member take_part(Helper* helper) {
    Member member{ranges, num_helpers + 1, helper ? int(helper - helpers) + 1 : 0, helper, shares, stage, total};
    tiles_begin();
    job(argument, member);
    tiles_end();
    return member;
  }

  void help(Helper& me) {
    if (setjmp(me.home)) tiles_end();  // it was dismissed
    for (;;) {
      for (int waited = 0; calls.load() == me.seen;) {
        if (waited < SPINS + IDLE_YIELDS) {
          be_patient(waited, sched_yield);
        } else {
          sleeping++;
          syscall(SYS_futex, &calls, FUTEX_WAIT_PRIVATE, me.seen, nullptr, nullptr, 0);
          sleeping--;
        }
      }
      me.seen = calls.load();
      me.place = Helper::IN;
      if (open.load()) take_part(&me);
      me.place = Helper::OUT;
    }
  }

 public:
  // Use so many threads from now on, the caller's included; never fewer than before.
  void grow(int threads) {
    for (; num_helpers < std::min(threads - 1, MAX_HELPERS); num_helpers++) {
      pthread_t thread;
      helpers[num_helpers].team = this;
      const auto run = [](void* helper) -> void* {
        ((Helper*)helper)->team->help(*(Helper*)helper);
        return nullptr;
      };
      if (pthread_create(&thread, nullptr, run, &helpers[num_helpers])) return;
      pthread_detach(thread);
    }
  }

  int size() const { return num_helpers + 1; }

  // Choose whether threads offer their cores to other processes after each stage.
  void share_cores(bool yes) { shares = yes; }

  // Call work(member) on every free thread; returns when all its stages are done. Its variables must need no
  // destructor, see Helper. One caller at a time.
  template <class Work>
  void run(const Work& work) {
    static_assert(std::is_trivially_destructible_v<Work>);
    job = [](void* work, Member& member) { (*(const Work*)work)(member); };
    argument = (void*)&work;
    open = true;
    calls++;
    if (sleeping.load()) syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    const Member me = take_part(nullptr);
    open = false;
    for (Helper* helper = helpers; helper < helpers + num_helpers; helper++)  // none may be left in the job
      for (int waited = 0; !helper->dismiss();) be_patient(waited, sched_yield);
    stage = me.stage;
    total = me.total;
  }
};
