// sparse_sketch against float64 loops over an Omega drawn as the header says.
#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

constexpr std::int64_t kWidths[] = {4, 8, 12, 64, 68, 256};
constexpr std::uint64_t kSeed = 0xfedcba9876543210u;

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) of counter (j, 0, 0, 1), small j.
std::vector<std::uint32_t> words_of(std::int64_t j) {
  std::uint32_t c[4] = {static_cast<std::uint32_t>(j), 0, 0, 1};
  std::uint32_t low = static_cast<std::uint32_t>(kSeed), high = static_cast<std::uint32_t>(kSeed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53u} * c[0], second = std::uint64_t{0xCD9E8D57u} * c[2];
    const std::uint32_t next[4] = {
        static_cast<std::uint32_t>(second >> 32) ^ c[1] ^ low, static_cast<std::uint32_t>(second),
        static_cast<std::uint32_t>(first >> 32) ^ c[3] ^ high, static_cast<std::uint32_t>(first)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return {c, c + 4};
}

void check(const Ragged& x, const std::vector<float>& y, std::int64_t width) {
  const std::int64_t m = width / 4;
  std::vector<Sum> sums(static_cast<std::size_t>(x.rows() * width));
  for (std::int64_t j = 0; j < x.columns(); ++j) {
    const auto own = words_of(j), first = words_of(j - j % m);
    for (std::int64_t q = 0; q < 4; ++q) {
      const auto shift =
          static_cast<std::int64_t>((std::uint64_t{first[std::size_t(q)]} >> 1) * static_cast<std::uint64_t>(m) >> 31);
      const std::int64_t c = q * m + (j + shift) % m;
      for (std::int64_t i = 0; i < x.rows(); ++i)
        sums[std::size_t(i * width + c)].add(own[std::size_t(q)] & 1u ? -x.value(i, j) : x.value(i, j));
    }
  }
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const double allowed = bound(sums[i], 130, Precision::f32, x.columns());
    CHECK(std::fabs(y[i] - sums[i].value) <= allowed, "entry %zu of %d x %d x %d: %.9g, not %.9g within %.3g", i,
          int(x.rows()), int(x.columns()), int(width), double(y[i]), sums[i].value, allowed);
  }
}

void test_sparse_sketch(const Kernels& kernels) {
  kernels.sparse_sketch(nullptr, 0, 2);
  std::size_t turn = 0;
  for_each_batch([&](const std::vector<Ragged>& batch, Precision) {
    std::vector<std::int64_t> widths;
    for (std::size_t i = 0; i < batch.size(); ++i) widths.push_back(kWidths[(turn + i) % std::size(kWidths)]);
    ++turn;
    const auto run = [&](std::size_t first, std::size_t count, int threads) {
      std::vector<std::vector<float>> out(count);
      std::vector<SparseSketchJob> jobs;
      for (std::size_t i = 0; i < count; ++i) {
        out[i].assign(std::size_t(batch[first + i].rows() * widths[first + i]), NAN);
        jobs.push_back({batch[first + i].view(), widths[first + i], kSeed, out[i].data()});
      }
      kernels.sparse_sketch(jobs.data(), static_cast<std::int64_t>(count), threads);
      return out;
    };
    const auto together = run(0, batch.size(), 1), threaded = run(0, batch.size(), 2);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      check(batch[i], together[i], widths[i]);
      CHECK(together[i] == threaded[i], "job %zu: 2 threads change its bits", i);
      CHECK(together[i] == run(i, 1, 2)[0], "job %zu: company changes its bits", i);
    }
  });
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_sparse_sketch); }
