// gram against a float64 loop.
#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

using Outputs = std::vector<std::vector<Strided>>;

void check_entries(const Ragged& x, const Strided& out, Precision precision) {
  const std::int64_t rows = x.rows(), columns = x.columns();
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j <= i; ++j) {
      Sum sum;
      for (std::int64_t c = 0; c < columns; ++c) sum.add(x.value(i, c) * x.value(j, c));
      const double got = out.at(i, j), allowed = bound(sum, column_steps(precision, columns), precision, columns);
      CHECK(std::fabs(got - sum.value) <= allowed, "[%d, %d] of %d x %d: %.17g, not %.17g within %.3g", int(i), int(j),
            int(rows), int(columns), got, sum.value, allowed);
      CHECK(out.at(j, i) == got, "[%d, %d] of %d x %d: not symmetric", int(i), int(j), int(rows), int(columns));
    }
}

void test_gram(const Kernels& kernels) {
  kernels.gram(nullptr, 0, Precision::f32, 2);
  for_each_batch([&](const std::vector<Ragged>& batch, Precision precision) {
    const Outputs outputs = run_every_way(batch.size(), [&](std::size_t first, std::size_t count, int threads) {
      Outputs out(count);
      std::vector<GramJob> jobs;
      for (std::size_t i = 0; i < count; ++i) {
        const Ragged& x = batch[first + i];
        out[i].push_back(doubles(x.rows(), x.rows()));
        jobs.push_back({x.view(), static_cast<double*>(out[i][0].data())});
      }
      kernels.gram(jobs.data(), static_cast<std::int64_t>(count), precision, threads);
      return out;
    });
    for (std::size_t i = 0; i < batch.size(); ++i) check_entries(batch[i], outputs[i][0], precision);
  });
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_gram); }
