// squares against a float64 loop.
#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

void test_squares(const Kernels& kernels) {
  kernels.squares(nullptr, 0, 2);
  for_each_batch([&](const std::vector<Ragged>& batch, Precision) {
    const auto outputs = run_every_way(batch.size(), [&](std::size_t first, std::size_t count, int threads) {
      std::vector<std::vector<Strided>> out(count);
      std::vector<SquaresJob> jobs;
      for (std::size_t i = 0; i < count; ++i) {
        const Ragged& x = batch[first + i];
        out[i].push_back(doubles(1, x.rows()));
        jobs.push_back({x.view(), static_cast<double*>(out[i][0].data())});
      }
      kernels.squares(jobs.data(), static_cast<std::int64_t>(count), threads);
      return out;
    });
    for (std::size_t i = 0; i < batch.size(); ++i)
      for (std::int64_t row = 0; row < batch[i].rows(); ++row) {
        double sum = 0;
        for (std::int64_t c = 0; c < batch[i].columns(); ++c) sum += batch[i].value(row, c) * batch[i].value(row, c);
        const double got = outputs[i][0].at(0, row), steps = static_cast<double>(batch[i].columns() + 1);
        CHECK(std::fabs(got - sum) <= 2 * gamma(steps, 0x1p-53) * sum, "row %d: %.17g, not %.17g", int(row), got, sum);
      }
  });
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_squares); }
