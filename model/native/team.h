// Threads that work through the same stages together. Stages end when their tasks are done, not when every thread has
// come by: on a machine with other work to do, a thread that lost its core holds nobody up, and passes the finished
// stages by when it is back. (OpenMP's barriers wait for every thread; beside an HTTP server that cost whole time slices.)
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "product.h"

constexpr int MAX_STAGES = 4096;
constexpr int SPINS = 200;         // pauses, some 10 microseconds, before the core is offered to others
constexpr int IDLE_YIELDS = 10000;  // offers, some milliseconds, before an idle thread sleeps

struct Stage {
  alignas(64) std::atomic<int> next{0};  // task to be taken
  alignas(64) std::atomic<int> done{0};
};

static inline void be_patient(int& waited) {
  if (++waited < SPINS)
    __builtin_ia32_pause();
  else
    sched_yield();
}

// One thread's way through the stages of a job. Every thread must call `share` with the same tasks in the same order.
struct Member {
  Stage* stage;
  bool shares;  // the core, with processes that wait for it: best when this thread holds no task that others wait for

  template <class Task>
  void share(int tasks, const Task& task) {
    Stage& here = *stage++;
    for (int t; (t = here.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      task(t);
      here.done.fetch_add(1, std::memory_order_release);
    }
    if (shares) sched_yield();
    for (int waited = 0; here.done.load(std::memory_order_acquire) < tasks;) be_patient(waited);
  }
};

class Team {
  Stage stages[MAX_STAGES];
  std::atomic<uint32_t> calls{0};  // jobs so far: what sleeping threads wait on
  std::atomic<int> sleeping{0}, inside{0};
  std::atomic<bool> open{false};
  void (*job)(void*, Member) = nullptr;
  void* argument = nullptr;
  int helpers = 0;
  std::atomic<bool> shares{false};

  void take_part() {
    tiles_begin();
    job(argument, Member{stages, shares});
    tiles_end();
  }

  void help() {
    for (uint32_t seen = 0;;) {
      for (int waited = 0; calls.load() == seen;) {
        if (waited < SPINS + IDLE_YIELDS) {
          be_patient(waited);
        } else {
          sleeping++;
          syscall(SYS_futex, &calls, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
          sleeping--;
        }
      }
      seen = calls.load();
      inside++;
      if (open.load()) take_part();
      inside--;
    }
  }

 public:
  // So many threads from now on, the caller's included; never fewer than before.
  void grow(int threads) {
    for (; helpers < threads - 1; helpers++) {
      pthread_t thread;
      const auto run = [](void* team) -> void* {
        ((Team*)team)->help();
        return nullptr;
      };
      if (pthread_create(&thread, nullptr, run, this)) return;
      pthread_detach(thread);
    }
  }

  // Whether every stage ends with an offer of the core to whoever waits for it.
  void share_cores(bool yes) { shares = yes; }

  // work(member) on every thread that is free; returns when all its stages are done.
  template <class Work>
  void run(const Work& work) {
    job = [](void* work, Member member) { (*(const Work*)work)(member); };
    argument = (void*)&work;
    open = true;
    calls++;
    if (sleeping.load()) syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    take_part();
    open = false;
    for (int waited = 0; inside.load();) be_patient(waited);  // none may be left that sees `work`
    for (Stage* stage = stages; stage < stages + MAX_STAGES && stage->next.load(); stage++) stage->next = 0, stage->done = 0;
  }
};
