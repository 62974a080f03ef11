// reconstruct against a float64 loop: every triple of dtypes, every layout, and private columns put in place.
#include <optional>

#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

using Outputs = std::vector<std::vector<Strided>>;

struct Case {
  Strided basis;
  std::optional<Strided> loadings;  // none is the identity
  std::int64_t columns;
  double scale;
};

// [m, k, p]
constexpr std::int64_t kSizes[][3] = {{1, 1, 1},     {0, 2, 3},    {3, 0, 2},     {3, 2, 0},    {5, 3, 7},
                                      {16, 16, 16},  {17, 33, 1},  {65, 5, 48},   {64, 32, 17}, {129, 64, 65},
                                      {1031, 17, 4}, {1, 64, 300}, {2200, 33, 14}};

std::vector<Case> make_cases(Dtype basis, Dtype loadings, int turn, Random& random) {
  const auto layout = [&](int shift) { return static_cast<Layout>((turn + shift) % kLayouts); };
  std::vector<Case> cases;
  for (const auto& [m, k, p] : kSizes) {
    ++turn;
    cases.push_back(
        {Strided::random(m, k, basis, layout(0), random), Strided::random(k, p, loadings, layout(3), random), p, -0.3});
  }
  for (const auto& [m, k, unused] : kSizes) {
    ++turn;
    cases.push_back({Strided::random(m, k, basis, layout(0), random), std::nullopt, k, turn % 2 ? 1.0 : 0.7});
  }
  return cases;
}

Sum exact_entry(const Case& c, std::int64_t i, std::int64_t j) {
  Sum sum;
  if (!c.loadings) sum.add(c.basis.at(i, j));
  if (c.loadings)
    for (std::int64_t r = 0; r < c.basis.columns(); ++r) sum.add(c.basis.at(i, r) * c.loadings->at(r, j));
  return {c.scale * sum.value, std::fabs(c.scale) * sum.size};
}

void check_case(const Case& c, const Strided& out) {
  const bool wide =
      c.basis.dtype() == Dtype::f64 || out.dtype() == Dtype::f64 || (c.loadings && c.loadings->dtype() == Dtype::f64);
  const std::int64_t terms = c.loadings ? c.basis.columns() : 0;
  CHECK(out.untouched_between(), "wrote between the entries of %d x %d", int(out.rows()), int(out.columns()));
  for (std::int64_t i = 0; i < out.rows(); ++i)
    for (std::int64_t j = 0; j < out.columns(); ++j) {
      const Sum sum = exact_entry(c, i, j);
      const double before = bound(sum, static_cast<double>(terms) + 2, wide ? Precision::f64 : Precision::f32, terms);
      const double allowed = before + roundoff(out.dtype()) * (std::fabs(sum.value) + before) + underflow(out.dtype());
      CHECK(std::fabs(out.at(i, j) - sum.value) <= allowed,
            "[%d, %d] of %d x %d x %d to %s: %.17g, not %.17g within %.3g", int(i), int(j), int(out.rows()), int(terms),
            int(out.columns()), name(out.dtype()), out.at(i, j), sum.value, allowed);
      if (!c.loadings && c.scale == 1 && out.dtype() == c.basis.dtype())
        CHECK(out.at(i, j) == c.basis.at(i, j), "[%d, %d]: a column put in place changed", int(i), int(j));
    }
}

void check_cases(const Kernels& kernels, const std::vector<Case>& cases, Dtype out_dtype, int turn) {
  const Outputs outputs = run_every_way(cases.size(), [&](std::size_t first, std::size_t count, int threads) {
    Outputs out(count);
    std::vector<ReconstructJob> jobs;
    for (std::size_t i = 0; i < count; ++i) {
      const Case& c = cases[first + i];
      const auto layout = static_cast<Layout>((turn + static_cast<int>(first + i)) % kOutputLayouts);
      out[i].emplace_back(c.basis.rows(), c.columns, out_dtype, layout);
      jobs.push_back({c.basis.matrix(), c.loadings ? c.loadings->matrix() : Matrix{nullptr, 0, 0, Dtype::f16},
                      out[i][0].matrix(), c.basis.rows(), c.basis.columns(), c.columns, c.scale});
    }
    kernels.reconstruct(jobs.data(), static_cast<std::int64_t>(count), threads);
    return out;
  });
  for (std::size_t i = 0; i < cases.size(); ++i) check_case(cases[i], outputs[i][0]);
}

void test_reconstruct(const Kernels& kernels) {
  kernels.reconstruct(nullptr, 0, 2);
  Random random(20261122);
  int turn = 0;
  for (const Dtype basis : kDtypes)
    for (const Dtype loadings : kDtypes)
      for (const Dtype out : kDtypes) {
        subject() = std::string(name(basis)) + " basis, " + name(loadings) + " loadings";
        check_cases(kernels, make_cases(basis, loadings, turn, random), out, turn);
        ++turn;
      }
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_reconstruct); }
