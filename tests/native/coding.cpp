// encode, decode and trellis: what goes in comes out, in heap blocks that end with the last number and the last byte;
// bytes that are no stream leave the same blocks whole.
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.hpp"
#include "matrix.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

constexpr std::int64_t kLengths[] = {1, 2, 17, 64, 1031}, kHeights[] = {1, 0, 3, 40};

// Numbers of a table in memory of their own.
struct Numbers {
  Numbers(std::int64_t rows, std::int64_t length, std::int64_t bits)
      : table{nullptr, rows, length, bits, nullptr, nullptr},
        bytes(rows * length * bits / 8),
        data(new std::uint8_t[bytes]()) {
    table.numbers = data.get();
  }

  void put(std::int64_t i, std::int64_t value) {
    if (table.bits == 8) static_cast<std::int8_t*>(table.numbers)[i] = static_cast<std::int8_t>(value);
    if (table.bits == 16) static_cast<std::int16_t*>(table.numbers)[i] = static_cast<std::int16_t>(value);
  }

  CodedTable table;
  std::size_t bytes;
  std::unique_ptr<std::uint8_t[]> data;
};

// Bits of any weights, and of every other row the task of the row before.
struct Beside {
  Beside(std::int64_t rows, Random& random) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto bits = static_cast<std::uint32_t>(random.next());
      std::memcpy(&weights.emplace_back(), &bits, sizeof bits);
      tasks.push_back(static_cast<std::int32_t>(i % 2 ? tasks.back() : random.next() % 5));
    }
  }

  void put(CodedTable& table) const { table.weights = weights.data(), table.tasks = tasks.data(); }

  std::vector<float> weights;
  std::vector<std::int32_t> tasks;
};

// Rows of a size of their own, the odd ones on paths through the trellis or on their negatives.
Numbers drawn(const Kernels& kernels, std::int64_t rows, std::int64_t length, std::int64_t bits, Random& random) {
  Numbers made(rows, length, bits);
  const double most = bits == 8 ? 127 : 32512;
  for (std::int64_t r = 0; r < rows; ++r) {
    const double size = std::pow(most, std::fabs(random.uniform()));
    std::vector<float> x(static_cast<std::size_t>(length));
    for (float& each : x) each = static_cast<float>(size * random.uniform());
    for (std::int64_t i = 0; i < length; ++i) made.put(r * length + i, std::llround(x[static_cast<std::size_t>(i)]));
    if (r % 2 == 0) continue;
    std::vector<std::int16_t> path(x.size());
    for (float& each : x) each *= static_cast<float>((most - 2) / most);
    kernels.trellis(x.data(), 1, length, path.data(), 1);
    for (std::int64_t i = 0; i < length; ++i)
      made.put(r * length + i, r % 4 == 1 ? path[static_cast<std::size_t>(i)] : -path[static_cast<std::size_t>(i)]);
  }
  return made;
}

void check_path(const Kernels& kernels, std::int64_t length, Random& random) {
  std::vector<float> x(static_cast<std::size_t>(3 * length));
  for (float& each : x) each = static_cast<float>(20 * random.uniform());
  std::vector<std::int16_t> one(x.size()), two(x.size());
  kernels.trellis(x.data(), 3, length, one.data(), 1);
  kernels.trellis(x.data(), 3, length, two.data(), 3);
  CHECK(one == two, "3 threads change rows of %d", int(length));
  for (std::size_t i = 0, state = 0; i < x.size(); ++i) {
    if (i % static_cast<std::size_t>(length) == 0) state = 0;
    CHECK(((one[i] ^ static_cast<int>(state)) & 1) == 0, "%d in state %d", int(one[i]), int(state));
    CHECK(std::fabs(static_cast<float>(one[i]) - x[i]) <= 2.01F, "%.4g is rounded to %d", static_cast<double>(x[i]),
          int(one[i]));
    state = static_cast<std::size_t>(next_state(static_cast<int>(state), one[i] >> 1));
  }
}

void check_stream(const Kernels& kernels, const std::vector<Numbers>& tables, bool known, Random& random) {
  std::vector<Beside> beside;
  std::vector<CodedTable> jobs, back_jobs;
  std::vector<Numbers> back;
  std::int64_t room = kBytesPerStream;
  for (const Numbers& each : tables) {
    jobs.push_back(each.table);
    back.emplace_back(each.table.rows, each.table.length, each.table.bits);
    back_jobs.push_back(back.back().table);
    beside.emplace_back(each.table.rows, random);
    if (known) beside.back().put(jobs.back()), beside.back().put(back_jobs.back());
    room += kBytesPerRow * each.table.rows + kBytesPerNumber * each.table.rows * each.table.length;
  }
  const auto count = static_cast<std::int64_t>(jobs.size());
  std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[static_cast<std::size_t>(room)]);
  const std::int64_t size = kernels.encode(jobs.data(), count, out.get(), room);
  std::vector<std::uint8_t> stream(out.get(), out.get() + size);
  CHECK(kernels.decode(back_jobs.data(), count, stream.data(), size), "a stream of %d bytes is refused", int(size));
  for (std::size_t t = 0; t < tables.size(); ++t)
    CHECK(std::memcmp(back[t].data.get(), tables[t].data.get(), tables[t].bytes) == 0, "table %d differs", int(t));
  for (int turn = 0; turn < 20; ++turn) {
    std::vector<std::uint8_t> other = stream;
    other[random.next() % other.size()] ^= static_cast<std::uint8_t>(random.next());
    if (turn % 2) other.resize(random.next() % other.size());
    if (turn % 5 == 0)
      for (std::uint8_t& byte : other) byte = static_cast<std::uint8_t>(random.next());
    kernels.decode(back_jobs.data(), count, other.data(), static_cast<std::int64_t>(other.size()));
  }
}

void test_coding(const Kernels& kernels) {
  Random random(20261123);
  for (const std::int64_t length : kLengths) {
    check_path(kernels, length, random);
    for (const std::int64_t height : kHeights)
      for (const std::int64_t bits : {8, 16}) {
        subject() = std::to_string(height) + " rows of " + std::to_string(length) + " in " + std::to_string(bits);
        std::vector<Numbers> tables;
        tables.push_back(drawn(kernels, height, length, bits, random));
        tables.push_back(drawn(kernels, height, length + 3, 8, random));
        tables.push_back(drawn(kernels, height + 1, 1, 16, random));
        for (const bool known : {false, true}) check_stream(kernels, tables, known, random);
      }
  }
  check_stream(kernels, {}, false, random);
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_coding); }
