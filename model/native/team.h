// Threads that work through the same stages together. Stages end when their tasks are done, not when every thread has
// come by: on a machine with other work to do, a thread that lost its core holds nobody up, and passes the finished
// stages by when it is back; a job that is over is not held up by it either. (OpenMP's barriers wait for every thread;
// beside an HTTP server that cost whole time slices.)
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

constexpr int MAX_STAGES = 4096, MAX_HELPERS = 255;
constexpr int SPINS = 200;         // pauses, some 10 microseconds, before the core is offered to others
constexpr int IDLE_YIELDS = 10000;  // offers, some milliseconds, before an idle thread sleeps

struct Stage {
  alignas(64) std::atomic<int> next{0};  // task to be taken
  alignas(64) std::atomic<int> done{0};
};

template <class Offer>
static inline void be_patient(int& waited, const Offer& offer_core) {
  if (++waited < SPINS)
    __builtin_ia32_pause();
  else
    offer_core();
}

class Team;

// A thread beside the caller's, and where it is: outside of any job, in one, or in one but without a core. The last it
// says itself, before it offers its core; the caller, whose job is over, may then dismiss it. Coming back, it leaves the
// job where it stands, for all that the job's tasks refer to may be gone: nothing between here and home has a destructor.
struct alignas(64) Helper {
  enum Place { OUT, IN, AWAY };
  std::atomic<int> place{OUT};
  Team* team = nullptr;
  uint32_t seen = 0;  // jobs
  jmp_buf home;

  void step_aside() {
    place = AWAY;
    sched_yield();
    int away = AWAY;
    if (!place.compare_exchange_strong(away, IN)) longjmp(home, 1);
  }

  // Whether it is outside of any job now: it was, or is dismissed.
  bool dismiss() {
    int away = AWAY;
    return place.load() == OUT || place.compare_exchange_strong(away, OUT);
  }
};

// One thread's way through the stages of a job. Every thread must call `share` with the same tasks in the same order.
struct Member {
  Stage* stage;
  Helper* helper;  // none: the caller
  bool shares;  // the core, with processes that wait for it: best when this thread holds no task that others wait for

  template <class Task>
  void share(int tasks, const Task& task) {
    Stage& here = *stage++;
    for (int t; (t = here.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      task(t);
      here.done.fetch_add(1, std::memory_order_release);
    }
    if (shares) offer_core();
    for (int waited = 0; here.done.load(std::memory_order_acquire) < tasks;) be_patient(waited, [&] { offer_core(); });
  }

  void offer_core() { helper ? helper->step_aside() : (void)sched_yield(); }
};

class Team {
  Stage stages[MAX_STAGES];
  Helper helpers[MAX_HELPERS];
  int num_helpers = 0;
  std::atomic<uint32_t> calls{0};  // jobs so far: what sleeping threads wait on
  std::atomic<int> sleeping{0};
  std::atomic<bool> open{false};
  void (*job)(void*, Member) = nullptr;
  void* argument = nullptr;
  std::atomic<bool> shares{false};

  void take_part(Helper* helper) {
    tiles_begin();
    job(argument, Member{stages, helper, shares});
    tiles_end();
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
  // So many threads from now on, the caller's included; never fewer than before.
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

  // Whether every stage ends with an offer of the core to whoever waits for it.
  void share_cores(bool yes) { shares = yes; }

  // work(member) on every thread that is free; returns when all its stages are done. What it refers to must be of trivial
  // types, see Helper.
  template <class Work>
  void run(const Work& work) {
    job = [](void* work, Member member) { (*(const Work*)work)(member); };
    argument = (void*)&work;
    open = true;
    calls++;
    if (sleeping.load()) syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    take_part(nullptr);
    open = false;
    for (Helper* helper = helpers; helper < helpers + num_helpers; helper++)  // none may be left that sees `work`
      for (int waited = 0; !helper->dismiss();) be_patient(waited, sched_yield);
    for (Stage* stage = stages; stage < stages + MAX_STAGES && stage->next.load(); stage++) stage->next = 0, stage->done = 0;
  }
};
