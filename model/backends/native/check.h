// Checks of what Python hands over, in builds that are made for it (FLASH_SANITIZE=1, see builds.py): tokens, positions
// and slots are indices, and a wrong one would read or write memory of something else. In other builds a check is
// nothing.
#pragma once
#include <stdio.h>
#include <stdlib.h>

[[noreturn]] inline void give_up(const char* message, const char* file, int line) {
  fprintf(stderr, "FlashServe's native library: %s (%s:%d)\n", message, file, line);
  abort();
}

#if defined(FLASH_CHECKS)
#define CHECK(condition) ((condition) ? (void)0 : give_up("this does not hold: " #condition, __FILE__, __LINE__))
#else
#define CHECK(condition) ((void)0)
#endif
