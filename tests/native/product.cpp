// product against float64 loops, in heap blocks that end with their last entry, for every layout of A.
#include <cmath>
#include <memory>
#include <vector>

#include "check.hpp"
#include "matrix.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

struct Shape {
  std::int64_t count, m, k, n;
};

constexpr Shape kShapes[] = {{1, 1, 1, 1},    {3, 2, 3, 5},     {0, 4, 4, 4},    {2, 0, 3, 2},
                             {2, 3, 0, 2},    {2, 3, 2, 0},     {4, 16, 16, 48}, {2, 17, 9, 25},
                             {1, 130, 48, 7}, {1, 48, 257, 33}, {5, 7, 128, 8},  {1, 65, 129, 24}};

using Values = std::unique_ptr<double[]>;

Values random_values(std::int64_t count, Random& random) {
  Values out(new double[static_cast<std::size_t>(count)]);
  for (std::int64_t i = 0; i < count; ++i) out[std::size_t(i)] = random.uniform() - 0.5;
  return out;
}

void check(const Kernels& kernels, const Shape& s, bool turned, bool shared, Random& random) {
  const Values a = random_values(s.count * s.m * s.k, random), b = random_values(s.count * s.k * s.n, random);
  const std::size_t entries = static_cast<std::size_t>(s.count * s.m * s.n);
  std::vector<Values> out;
  for (const int threads : {1, 2, 3}) {
    out.emplace_back(new double[entries]);
    for (std::size_t i = 0; i < entries; ++i) out.back()[i] = NAN;
    kernels.product({a.get(), s.m * s.k, turned ? 1 : s.k, turned ? s.m : 1, b.get(), shared ? 0 : s.k * s.n, s.n,
                     out.back().get(), s.count, s.m, s.k, s.n},
                    threads);
  }
  for (std::int64_t t = 0; t < s.count; ++t)
    for (std::int64_t i = 0; i < s.m; ++i)
      for (std::int64_t j = 0; j < s.n; ++j) {
        double sum = 0, size = 0;
        for (std::int64_t p = 0; p < s.k; ++p) {
          const double term = a[std::size_t(t * s.m * s.k + (turned ? p * s.m + i : i * s.k + p))] *
                              b[std::size_t((shared ? 0 : t * s.k * s.n) + p * s.n + j)];
          sum += term;
          size += std::fabs(term);
        }
        const std::size_t at = std::size_t((t * s.m + i) * s.n + j);
        CHECK(std::fabs(out[0][at] - sum) <= gamma(2.0 * double(s.k) + 4, 0x1p-53) * size,
              "%d x %d x %d x %d, entry %zu: %.17g, not %.17g", int(s.count), int(s.m), int(s.k), int(s.n), at,
              out[0][at], sum);
        for (const Values* other : {&out[1], &out[2]})
          CHECK((*other)[at] == out[0][at], "entry %zu: threads change its bits", at);
      }
}

void test_product(const Kernels& kernels) {
  Random random(11);
  for (const Shape& shape : kShapes)
    for (const bool turned : {false, true})
      for (const bool shared : {false, true}) check(kernels, shape, turned, shared, random);
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_product); }
