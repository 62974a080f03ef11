// sketch and power against float64 loops, and the signs against Philox as its authors publish it.
#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

using Outputs = std::vector<std::vector<Strided>>;

// Widths of Omega and Q: nothing, one, around the tiles and past the 128 signs of one Philox block.
constexpr std::int64_t kWidths[] = {5, 1, 0, 16, 33, 64, 65, 130};
constexpr std::uint64_t kSeed = 0x0123456789abcdefu;

struct Words {
  std::uint32_t at[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011).
Words philox(Words counter, std::uint32_t key_low, std::uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53u} * counter.at[0];
    const std::uint64_t second = std::uint64_t{0xCD9E8D57u} * counter.at[2];
    counter = {{static_cast<std::uint32_t>(second >> 32) ^ counter.at[1] ^ key_low, static_cast<std::uint32_t>(second),
                static_cast<std::uint32_t>(first >> 32) ^ counter.at[3] ^ key_high, static_cast<std::uint32_t>(first)}};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

double sign_at(std::int64_t j, std::int64_t c) {
  const auto row = static_cast<std::uint64_t>(j);
  const Words words = philox({{static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32),
                               static_cast<std::uint32_t>(c / 128), 0}},
                             static_cast<std::uint32_t>(kSeed), static_cast<std::uint32_t>(kSeed >> 32));
  return (words.at[c % 128 / 32] >> (c % 32)) & 1u ? -1.0 : 1.0;
}

// The known answers that come with Random123.
void test_philox() {
  subject() = "Philox known answers";
  const Words zeros = philox({{0, 0, 0, 0}}, 0, 0);
  const Words pi = philox({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u);
  const Words expected[2] = {{{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
                             {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}};
  for (int i = 0; i < 4; ++i) {
    CHECK(zeros.at[i] == expected[0].at[i], "word %d of zeros: %08x", i, zeros.at[i]);
    CHECK(pi.at[i] == expected[1].at[i], "word %d of pi: %08x", i, pi.at[i]);
  }
}

// Omega [columns, width]
std::vector<double> signs(std::int64_t columns, std::int64_t width) {
  std::vector<double> omega;
  for (std::int64_t j = 0; j < columns; ++j)
    for (std::int64_t c = 0; c < width; ++c) omega.push_back(sign_at(j, c));
  return omega;
}

void check_entry(const char* what, const Ragged& x, const Strided& y, std::int64_t i, std::int64_t c, const Sum& sum,
                 double allowed) {
  CHECK(std::fabs(y.at(i, c) - sum.value) <= allowed, "%s [%d, %d] of %d x %d x %d: %.17g, not %.17g within %.3g", what,
        int(i), int(c), int(x.rows()), int(x.columns()), int(y.columns()), y.at(i, c), sum.value, allowed);
}

void check_sketch(const Ragged& x, const Strided& y, Precision precision) {
  const std::int64_t columns = x.columns(), width = y.columns();
  const std::vector<double> omega = signs(columns, width);
  for (std::int64_t i = 0; i < x.rows(); ++i)
    for (std::int64_t c = 0; c < width; ++c) {
      Sum sum;
      for (std::int64_t j = 0; j < columns; ++j)
        sum.add(x.value(i, j) * omega[static_cast<std::size_t>(j * width + c)]);
      check_entry("X Omega", x, y, i, c, sum, bound(sum, column_steps(precision, columns), precision, columns));
    }
}

void check_power(const Ragged& x, const Strided& q, const Strided& y, Precision precision) {
  const std::int64_t rows = x.rows(), columns = x.columns(), terms = rows + columns;
  const double steps = static_cast<double>(rows) + column_steps(precision, columns) + 3;
  for (std::int64_t c = 0; c < q.columns(); ++c) {
    std::vector<Sum> sums(static_cast<std::size_t>(rows));
    for (std::int64_t j = 0; j < columns; ++j) {
      Sum inner;
      for (std::int64_t i = 0; i < rows; ++i) inner.add(x.value(i, j) * q.at(i, c));
      for (std::int64_t i = 0; i < rows; ++i) {
        sums[static_cast<std::size_t>(i)].value += x.value(i, j) * inner.value;
        sums[static_cast<std::size_t>(i)].size += std::fabs(x.value(i, j)) * inner.size;
      }
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      const Sum& sum = sums[static_cast<std::size_t>(i)];
      check_entry("X (X^T Q)", x, y, i, c, sum, bound(sum, steps, precision, terms));
    }
  }
}

// Runs one of the two operators on a batch; make_job(i, output) gives matrix i's job.
template <typename Job, typename Function, typename MakeJob>
Outputs run_batch(const std::vector<Ragged>& batch, const std::vector<Strided>& q, Precision precision,
                  Function* function, const MakeJob& make_job) {
  return run_every_way(batch.size(), [&](std::size_t first, std::size_t count, int threads) {
    Outputs out(count);
    std::vector<Job> jobs;
    for (std::size_t i = 0; i < count; ++i) {
      out[i].push_back(doubles(batch[first + i].rows(), q[first + i].columns()));
      jobs.push_back(make_job(first + i, static_cast<double*>(out[i][0].data())));
    }
    function(jobs.data(), static_cast<std::int64_t>(count), precision, threads);
    return out;
  });
}

void test_sketch(const Kernels& kernels) {
  test_philox();
  kernels.sketch(nullptr, 0, Precision::f32, 2);
  kernels.power(nullptr, 0, Precision::f32, 2);
  Random random(7);
  std::size_t turn = 0;
  for_each_batch([&](const std::vector<Ragged>& batch, Precision precision) {
    std::vector<Strided> q;
    for (std::size_t i = 0; i < batch.size(); ++i)
      q.push_back(Strided::random(batch[i].rows(), kWidths[(turn + i) % std::size(kWidths)], Dtype::f64,
                                  Layout::compact, random));
    ++turn;
    const Outputs sketched = run_batch<SketchJob>(
        batch, q, precision, kernels.sketch,
        [&](std::size_t i, double* y) -> SketchJob { return {batch[i].view(), q[i].columns(), kSeed, y}; });
    const Outputs powered =
        run_batch<PowerJob>(batch, q, precision, kernels.power, [&](std::size_t i, double* y) -> PowerJob {
          return {batch[i].view(), static_cast<const double*>(q[i].data()), q[i].columns(), y};
        });
    for (std::size_t i = 0; i < batch.size(); ++i) {
      check_sketch(batch[i], sketched[i][0], precision);
      check_power(batch[i], q[i], powered[i][0], precision);
    }
  });
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_sketch); }
