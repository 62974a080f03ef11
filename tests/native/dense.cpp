// eigh, svd and root: that they give back the matrix they were given, in heap blocks that end with their last entry.
#include <cmath>
#include <memory>
#include <vector>

#include "check.hpp"
#include "matrix.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

using Values = std::vector<double>;

constexpr std::int64_t kSizes[] = {1, 2, 7, 8, 9, 17, 25, 40};
constexpr std::int64_t kCount = 3;

Values random_values(std::int64_t count, std::uint64_t seed) {
  Random random(seed);
  Values out(static_cast<std::size_t>(count));
  for (double& x : out) x = random.uniform();
  return out;
}

// x^T y [p, q] of row-major x [m, p], y [m, q].
Values product(const double* x, const double* y, std::int64_t m, std::int64_t p, std::int64_t q) {
  Values out(static_cast<std::size_t>(p * q));
  for (std::int64_t k = 0; k < m; ++k)
    for (std::int64_t i = 0; i < p; ++i)
      for (std::int64_t j = 0; j < q; ++j) out[std::size_t(i * q + j)] += x[k * p + i] * y[k * q + j];
  return out;
}

void check_close(const Values& got, const double* want, double allowed, const char* what) {
  for (std::size_t i = 0; i < got.size(); ++i)
    CHECK(std::fabs(got[i] - want[i]) <= allowed, "%s: entry %d is %.17g, not %.17g", what, int(i), got[i], want[i]);
}

Values identity(std::int64_t n) {
  Values out(static_cast<std::size_t>(n * n));
  for (std::int64_t i = 0; i < n; ++i) out[std::size_t(i * n + i)] = 1;
  return out;
}

Values transposed(const double* x, std::int64_t m, std::int64_t n) {
  Values out(static_cast<std::size_t>(m * n));
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) out[std::size_t(j * m + i)] = x[i * n + j];
  return out;
}

void test_eigh(const Kernels& kernels, std::int64_t n, int threads) {
  Values grams;
  for (std::int64_t i = 0; i < kCount; ++i) {
    const Values b = random_values((n + 2) * n, 7 + i);
    const Values gram = product(b.data(), b.data(), n + 2, n, n);
    grams.insert(grams.end(), gram.begin(), gram.end());
  }
  Values values(std::size_t(kCount * n)), vectors(std::size_t(kCount * n * n));
  kernels.eigh({grams.data(), kCount, n, values.data(), vectors.data()}, threads);
  Values r(vectors.size()), inverse(vectors.size());
  kernels.root({grams.data(), kCount, n, r.data(), inverse.data()}, threads);
  for (std::int64_t i = 0; i < kCount; ++i) {
    const double *gram = grams.data() + i * n * n, *v = vectors.data() + i * n * n;
    check_close(product(v, v, n, n, n), identity(n).data(), 1e-13, "eigenvectors are orthonormal");
    const Values rows = transposed(v, n, n);
    Values scaled = rows;
    for (std::int64_t j = 0; j < n * n; ++j) scaled[std::size_t(j)] *= values[std::size_t(i * n + j / n)];
    check_close(product(rows.data(), scaled.data(), n, n, n), gram, 1e-12, "eigenvectors give the matrix back");
    const double* root = r.data() + i * n * n;
    check_close(product(root, root, n, n, n), gram, 1e-12, "the root gives the Gram back");
    const Values upper = transposed(root, n, n);
    check_close(product(upper.data(), inverse.data() + i * n * n, n, n, n), identity(n).data(), 1e-9,
                "the inverse of the root");
  }
}

void test_svd(const Kernels& kernels, std::int64_t n, int threads) {
  const std::int64_t m = n + 3;
  Values a;
  for (std::int64_t i = 0; i < kCount; ++i) {
    const Values one = random_values(m * n, 70 + i);
    a.insert(a.end(), one.begin(), one.end());
  }
  // one that is zero but for a column
  for (std::int64_t i = 0; i < m * n; ++i) a[std::size_t(i)] *= i % n == 0;
  Values u(a.size()), s(std::size_t(kCount * n)), v(std::size_t(kCount * n * n));
  kernels.svd({a.data(), kCount, m, n, u.data(), s.data(), v.data()}, threads);
  for (std::int64_t i = 0; i < kCount; ++i) {
    const double* right = v.data() + i * n * n;
    check_close(product(right, right, n, n, n), identity(n).data(), 1e-13, "right vectors are orthonormal");
    Values left = transposed(u.data() + i * m * n, m, n), rows = transposed(right, n, n);
    for (std::int64_t j = 0; j < n; ++j)
      for (std::int64_t c = 0; c < m; ++c) left[std::size_t(j * m + c)] *= s[std::size_t(i * n + j)];
    check_close(product(left.data(), rows.data(), n, m, n), a.data() + i * m * n, 1e-12,
                "singular vectors give the matrix back");
  }
}

void test_dense(const Kernels& kernels) {
  kernels.eigh({nullptr, 0, 4, nullptr, nullptr}, 2);
  kernels.svd({nullptr, 2, 4, 0, nullptr, nullptr, nullptr}, 2);
  kernels.root({nullptr, 2, 0, nullptr, nullptr}, 2);
  for (const std::int64_t n : kSizes)
    for (const int threads : {1, 3}) {
      subject() = std::to_string(n) + " columns, " + std::to_string(threads) + " threads";
      test_eigh(kernels, n, threads);
      test_svd(kernels, n, threads);
    }
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_dense); }
