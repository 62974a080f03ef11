// Rounding by a trellis: Viterbi's algorithm in whole numbers, so that every processor finds the same path.
namespace loraspan {
namespace LORASPAN_ISA {

// What is rounded is in 64ths, distances are squares of those. A zero between odd numbers is as rare as it is dear to
// write: it costs a square of 1.
constexpr std::int32_t kFraction = 64, kZeroCost = kFraction * kFraction;
// Costs are brought back to 0 before they could leave 32 bits.
constexpr std::int64_t kCostsRun = 4096;

// The nearest number and its cost in each of the four sets, [odd state][index & 1], for a size in 64ths.
struct Choices {
  std::int32_t cost[2][2];
  std::int8_t number[2][2];
};

inline std::int32_t nearest_of(std::int32_t size, std::int32_t first) {
  const std::int32_t past = size - first * kFraction + 2 * kFraction;
  return past < 0 ? first : first + 4 * (past / (4 * kFraction));
}

inline std::int32_t cost_of(std::int32_t size, std::int32_t number) {
  const std::int32_t off = size - number * kFraction;
  return off * off;
}

inline Choices choices_for(std::int32_t size) {
  Choices found;
  const std::int32_t first[2][2] = {{0, 2}, {3, 1}};
  for (int odd = 0; odd < 2; ++odd)
    for (int index = 0; index < 2; ++index) {
      const std::int32_t number = nearest_of(size, first[odd][index]);
      found.cost[odd][index] = cost_of(size, number);
      found.number[odd][index] = static_cast<std::int8_t>(number);
    }
  const std::int32_t zero = cost_of(size, 0) + kZeroCost;
  if (zero < found.cost[1][0]) {
    found.cost[1][0] = zero;
    found.number[1][0] = 0;
  }
  return found;
}

// The state from which a number of even index leads to `state`; from that for state ^ 2 leads one of odd index.
constexpr int state_before(int state) { return state < 8 ? 2 * state : 2 * (state ^ 9) + 1; }

// Costs of all states, and the same for a byte each.
using Costs = std::int32_t __attribute__((vector_size(4 * kTrellisStates)));
using Marks = std::int8_t __attribute__((vector_size(kTrellisStates)));

// One step: cheapest ways to every state, and a mark for those that an odd index leads to.
inline Marks advance(Costs& cost, const Choices& choices) {
  const std::int32_t (&c)[2][2] = choices.cost;
  const Costs even = {c[0][0], c[0][0], c[0][0], c[0][0], c[0][0], c[0][0], c[0][0], c[0][0],
                      c[1][0], c[1][0], c[1][0], c[1][0], c[1][0], c[1][0], c[1][0], c[1][0]};
  const Costs odd = {c[0][1], c[0][1], c[0][1], c[0][1], c[0][1], c[0][1], c[0][1], c[0][1],
                     c[1][1], c[1][1], c[1][1], c[1][1], c[1][1], c[1][1], c[1][1], c[1][1]};
  // the states before: state_before(s), and state_before(s ^ 2)
  const Costs by_even =
      even + __builtin_shufflevector(cost, cost, 0, 2, 4, 6, 8, 10, 12, 14, 3, 1, 7, 5, 11, 9, 15, 13);
  const Costs by_odd = odd + __builtin_shufflevector(cost, cost, 4, 6, 0, 2, 12, 14, 8, 10, 7, 5, 3, 1, 15, 13, 11, 9);
  const auto took = by_odd < by_even;
  cost = (took & by_odd) | (~took & by_even);
  return __builtin_convertvector(took, Marks);
}

inline int cheapest(const Costs& cost) {
  int best = 0;
  for (int s = 1; s < kTrellisStates; ++s)
    if (cost[s] < cost[best]) best = s;
  return best;
}

inline void round_row(const float* x, std::int64_t length, std::int8_t* out) {
  auto* took = scratch<Marks>(Use::tile, length);
  auto* choices = scratch<Choices>(Use::rows, length);
  Costs cost = (1 << 29) - Costs{};
  cost[0] = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    // exact but for the cast: a product with a power of two
    choices[i] = choices_for(static_cast<std::int32_t>(__builtin_fabsf(x[i]) * kFraction + 0.5f));
    took[i] = advance(cost, choices[i]);
    if (i % kCostsRun == kCostsRun - 1) cost -= cost[cheapest(cost)];
  }
  int state = cheapest(cost);
  for (std::int64_t i = length; i-- > 0;) {
    const int index = took[i][state] & 1;
    state = state_before(index ? state ^ 2 : state);
    const std::int8_t number = choices[i].number[state & 1][index];
    out[i] = static_cast<std::int8_t>(x[i] < 0 ? -number : number);
  }
}

void trellis(const float* x, std::int64_t rows, std::int64_t length, std::int8_t* out, int threads) {
  parallel_for(rows, threads, [&](std::int64_t i) { round_row(x + i * length, length, out + i * length); });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
