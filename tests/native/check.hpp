// CHECK and the main function of a native test: each test program checks one operator on one instruction set.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "loraspan/isa.hpp"

namespace loraspan::test {

inline int failures = 0;

// What the checks are about at the moment, printed with a failure.
inline std::string& subject() {
  static std::string text;
  return text;
}

[[gnu::format(printf, 3, 4)]] inline void fail(const char* file, int line, const char* format, ...) {
  if (++failures > 20) return;
  std::fprintf(stderr, "%s:%d: %s: ", file, line, subject().c_str());
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputc('\n', stderr);
}

// ctest counts this exit status as skipped.
constexpr int kSkipped = 77;

// Runs `test` on the kernels of the instruction set that the command line names.
inline int run(int argc, char** argv, void (*test)(const Kernels&)) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s INSTRUCTION_SET\n", argv[0]);
    return 2;
  }
  const Isa* sets = instruction_sets();
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(argv[1], sets[i].name) != 0) continue;
    if (!sets[i].kernels || !sets[i].supported) {
      std::printf("skipped: this %s has no %s\n", sets[i].kernels ? "processor" : "build", argv[1]);
      return kSkipped;
    }
    test(*sets[i].kernels);
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
  }
  std::fprintf(stderr, "no instruction set %s\n", argv[1]);
  return 2;
}

}  // namespace loraspan::test

#define CHECK(condition, ...)                                                  \
  do {                                                                         \
    if (!(condition)) ::loraspan::test::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)
