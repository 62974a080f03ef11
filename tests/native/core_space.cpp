// whiten and joint_gram against wider loops, in heap blocks that end with their last entry.
#include <cmath>
#include <memory>
#include <vector>

#include "check.hpp"
#include "matrix.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

using Values = std::unique_ptr<double[]>;

Values random_values(std::int64_t count, Random& random) {
  Values out(new double[static_cast<std::size_t>(count)]);
  for (std::int64_t i = 0; i < count; ++i) out[std::size_t(i)] = random.uniform() - 0.5;
  return out;
}

struct Tall {
  std::int64_t m, n;
};

constexpr Tall kTall[] = {{1, 1}, {9, 3}, {33, 8}, {300, 25}, {1600, 48}, {140, 17}, {4, 0}};

// Y is whitened by itself, three times as large: Q = Y R^-1 with R^T R = 3 Y^T Y, and the result is 3 Q.
void check_whiten(const Kernels& kernels, const Tall& s, Random& random) {
  const std::size_t entries = static_cast<std::size_t>(s.m * s.n);
  const Values start = random_values(s.m * s.n, random);
  Values image(new double[entries]);
  for (std::size_t i = 0; i < entries; ++i) image[i] = 3 * start[i];
  std::vector<Values> out;
  for (const int threads : {1, 2, 3}) {
    out.emplace_back(new double[entries]);
    for (std::size_t i = 0; i < entries; ++i) out.back()[i] = start[i];
    const bool refused = kernels.whiten({out.back().get(), image.get(), s.m, s.n, -1.0}, threads);
    CHECK(refused == (s.n == 0), "%d x %d: no limit", int(s.m), int(s.n));
    for (std::size_t i = 0; i < entries; ++i) CHECK(out.back()[i] == start[i], "entry %zu: touched", i);
    CHECK(kernels.whiten({out.back().get(), image.get(), s.m, s.n, 1e-8}, threads), "%d x %d: refused", int(s.m),
          int(s.n));
  }
  for (std::int64_t i = 0; i < s.n; ++i)
    for (std::int64_t j = 0; j < s.n; ++j) {
      long double sum = 0;
      for (std::int64_t p = 0; p < s.m; ++p)
        sum += static_cast<long double>(out[0][std::size_t(p * s.n + i)]) * out[0][std::size_t(p * s.n + j)];
      CHECK(std::fabs(double(sum) / 3 - (i == j)) <= 1e-9, "%d x %d: product %d, %d is %.17g", int(s.m), int(s.n),
            int(i), int(j), double(sum) / 3);
    }
  for (const Values* other : {&out[1], &out[2]})
    for (std::size_t i = 0; i < entries; ++i) CHECK((*other)[i] == out[0][i], "entry %zu: threads change its bits", i);
}

struct Joint {
  std::int64_t count, r, l, d, k;
};

constexpr Joint kJoint[] = {{1, 1, 1, 1, 1},    {0, 3, 4, 2, 2},   {5, 0, 4, 2, 2}, {3, 2, 0, 2, 2},
                            {3, 2, 4, 0, 2},    {3, 2, 4, 2, 0},   {7, 5, 9, 8, 3}, {40, 16, 48, 8, 4},
                            {300, 3, 17, 5, 6}, {9, 17, 24, 25, 8}};

void check_joint(const Kernels& kernels, const Joint& s, Random& random) {
  const Values near = random_values(s.count * s.r * s.l, random), far = random_values(s.count * s.r * s.d, random);
  const Values g = random_values(s.d * s.k, random);
  const std::size_t square = static_cast<std::size_t>(s.l * s.l);
  std::vector<Values> out;
  for (const int threads : {1, 2, 3}) {
    out.emplace_back(new double[square]);
    for (std::size_t i = 0; i < square; ++i) out.back()[i] = NAN;
    kernels.joint_gram({near.get(), far.get(), g.get(), out.back().get(), s.count, s.r, s.l, s.d, s.k}, threads);
  }
  std::vector<long double> wanted(square, 0.0L), sizes(square, 0.0L);
  for (std::int64_t t = 0; t < s.count; ++t)
    for (std::int64_t c = 0; c < s.k; ++c)
      for (std::int64_t i = 0; i < s.l; ++i) {
        // column c of C_t G, entry i and all others
        const auto along = [&](std::int64_t j, bool size) {
          long double sum = 0;
          for (std::int64_t p = 0; p < s.r; ++p) {
            long double seen = 0;
            for (std::int64_t q = 0; q < s.d; ++q) {
              const long double term =
                  static_cast<long double>(far[std::size_t((t * s.r + p) * s.d + q)]) * g[std::size_t(q * s.k + c)];
              seen += size ? std::fabs(term) : term;
            }
            const long double entry = near[std::size_t((t * s.r + p) * s.l + j)];
            sum += (size ? std::fabs(entry) : entry) * seen;
          }
          return sum;
        };
        const long double here = along(i, false), most = along(i, true);
        for (std::int64_t j = 0; j <= i; ++j) {
          wanted[std::size_t(i * s.l + j)] += here * along(j, false);
          sizes[std::size_t(i * s.l + j)] += most * along(j, true);
        }
      }
  const double steps = 2.0 * double(s.d + s.k + s.r + s.count * s.r) + 16;
  for (std::int64_t i = 0; i < s.l; ++i)
    for (std::int64_t j = 0; j <= i; ++j) {
      const std::size_t at = std::size_t(i * s.l + j), other = std::size_t(j * s.l + i);
      CHECK(std::fabs(out[0][at] - double(wanted[at])) <= gamma(steps, 0x1p-53) * double(sizes[at]),
            "%d tasks, entry %zu: %.17g, not %.17g", int(s.count), at, out[0][at], double(wanted[at]));
      CHECK(out[0][at] == out[0][other], "entry %zu: not symmetric", at);
    }
  for (const Values* other : {&out[1], &out[2]})
    for (std::size_t i = 0; i < square; ++i) CHECK((*other)[i] == out[0][i], "entry %zu: threads change its bits", i);
}

void test_core_space(const Kernels& kernels) {
  Random random(17);
  for (const Tall& shape : kTall) check_whiten(kernels, shape, random);
  for (const Joint& shape : kJoint) check_joint(kernels, shape, random);
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_core_space); }
