// ceilings: the most that this processor does, measured by loops that do nothing else. For benches, not for results.
#pragma once

#include <cstdint>

namespace loraspan {

enum class Arithmetic : std::int64_t { f32 = 0, f64 = 1, bf16 = 2 };

// Runs `repetitions` rounds of independent multiply-adds in registers on each of `threads` threads. Gives the number of
// operations done, a multiply-add counting as two; 0, at once, if the instruction set has no such instruction.
using ArithmeticFn = double(Arithmetic kind, std::int64_t repetitions, int threads);

enum class Traffic : std::int64_t { read = 0, write = 1, stream = 2, copy = 3 };

// Moves memory once, each thread a part of it of its own: read [from], write [to] by ordinary stores, stream [to] by
// stores that go past the caches (ordinary ones where there are none), or copy [from] to [to] by ordinary stores.
// Both addresses are multiples of 64, and so is `bytes`.
using TrafficFn = void(Traffic kind, void* to, const void* from, std::int64_t bytes, int threads);

}  // namespace loraspan
