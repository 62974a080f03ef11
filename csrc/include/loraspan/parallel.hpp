// parallel_for: independent pieces of work on the pool of threads that the process already has.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __APPLE__
#include <dispatch/dispatch.h>
#endif

namespace loraspan {

// Runs body(i) for i in [0, count), each exactly once, on at most `threads` threads. Which thread runs which piece is
// left open, so a piece must not depend on it. `body` must not throw.
template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
  if (count <= 1 || threads <= 1) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#ifdef __APPLE__
  struct Context {
    const Body* body;
    std::int64_t count, chunks;
  } context{&body, count, count < threads ? count : threads};
  dispatch_apply_f(static_cast<std::size_t>(context.chunks), DISPATCH_APPLY_AUTO, &context,
                   [](void* raw, std::size_t chunk) {
                     const Context& c = *static_cast<Context*>(raw);
                     for (std::int64_t i = static_cast<std::int64_t>(chunk); i < c.count; i += c.chunks) (*c.body)(i);
                   });
#else
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t i = 0; i < count; ++i) body(i);
#endif
}

}  // namespace loraspan
