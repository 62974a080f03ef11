// pack and unpack against their bounds, and reconstruct from packed rows against the same from unpacked ones: in heap
// blocks that end with the last code and the last scale.
#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

constexpr std::int64_t kLengths[] = {1, 0, 2, 15, 17, 63, 64, 65, 96, 129, 1031, 4101};
constexpr std::int64_t kHeights[] = {1, 3, 0, 17};

// Packed rows in memory of their own.
struct PackedMatrix {
  PackedMatrix(std::int64_t rows, std::int64_t length, std::int64_t bits)
      : rows(rows),
        length(length),
        bits(bits),
        blocks((length + kPackedBlock - 1) / kPackedBlock),
        bytes((length * bits + 7) / 8),
        codes(new std::uint8_t[static_cast<std::size_t>(rows * bytes)]()),
        scales(new std::uint16_t[static_cast<std::size_t>(rows * blocks)]()) {}

  PackedRows view() const { return {codes.get(), scales.get(), length, bits}; }
  Matrix matrix() const {
    const Dtype dtype = bits == 16 ? Dtype::packed16 : bits == 8 ? Dtype::packed8 : Dtype::packed4;
    return {codes.get(), 0, 0, dtype, scales.get(), length};
  }
  double scale(std::int64_t row, std::int64_t i) const {
    return decode16(scales[static_cast<std::size_t>(row * blocks + i / kPackedBlock)], 10, -14);
  }
  bool same(const PackedMatrix& other) const {
    return std::memcmp(codes.get(), other.codes.get(), static_cast<std::size_t>(rows * bytes)) == 0 &&
           std::memcmp(scales.get(), other.scales.get(), static_cast<std::size_t>(rows * blocks * 2)) == 0;
  }

  std::int64_t rows, length, bits, blocks, bytes;
  std::unique_ptr<std::uint8_t[]> codes;
  std::unique_ptr<std::uint16_t[]> scales;
};

PackedMatrix packed(const Kernels& kernels, const Strided& x, std::int64_t bits, int threads) {
  PackedMatrix out(x.rows(), x.columns(), bits);
  const std::int64_t wrong = kernels.pack(x.block(), x.columns(), bits, out.codes.get(), out.scales.get(), threads);
  CHECK(wrong == -1, "row %d was refused", int(wrong));
  return out;
}

// Numbers of 16 bits, which nobody packs, with the scales of other rows.
PackedMatrix drawn(const PackedMatrix& like, Random& random) {
  PackedMatrix out(like.rows, like.length, 16);
  for (std::int64_t i = 0; i < out.rows * out.bytes; ++i)
    out.codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(random.next());
  std::memcpy(out.scales.get(), like.scales.get(), static_cast<std::size_t>(like.rows * like.blocks * 2));
  return out;
}

void check_numbers(const PackedMatrix& rows, const Strided& exact) {
  for (std::int64_t i = 0; i < rows.rows; ++i)
    for (std::int64_t j = 0; j < rows.length; ++j) {
      std::int16_t level;
      std::memcpy(&level, rows.codes.get() + i * rows.bytes + 2 * j, 2);
      const float value = static_cast<float>(level) * static_cast<float>(rows.scale(i, j) / 128);
      CHECK(exact.at(i, j) == static_cast<double>(value), "[%d, %d]: %.9g, not %.9g", int(i), int(j), exact.at(i, j),
            static_cast<double>(value));
    }
}

void check_entries(const Strided& x, const PackedMatrix& rows, const Strided& exact) {
  for (std::int64_t i = 0; i < x.rows(); ++i)
    for (std::int64_t j = 0; j < x.columns(); ++j) {
      const double value = x.at(i, j), got = exact.at(i, j), scale = std::fabs(rows.scale(i, j));
      const double beyond = std::fabs(value) - 116 * scale / 128, floor = rows.bits == 8 ? 0x1p-25 : beyond;
      const double half = rows.bits == 8 ? scale / 256 : scale / 8, allowed = half > floor ? half : floor;
      CHECK(std::fabs(got - value) <= allowed + 0x1p-23 * (std::fabs(value) + allowed),
            "[%d, %d] of %d x %d in %d bits: %.9g, not %.9g within %.3g", int(i), int(j), int(x.rows()),
            int(x.columns()), int(rows.bits), got, value, allowed);
    }
}

Strided unpacked(const Kernels& kernels, const PackedMatrix& rows, Dtype dtype, int threads) {
  Strided out(rows.rows, rows.length, dtype, Layout::compact);
  kernels.unpack(rows.view(), rows.rows, out.data(), dtype, threads);
  return out;
}

void check_dtypes(const Kernels& kernels, const PackedMatrix& rows, const Strided& exact) {
  for (const Dtype dtype : kDtypes) {
    const Strided out = unpacked(kernels, rows, dtype, 2);
    Strided rounded(rows.rows, rows.length, dtype, Layout::compact);
    for (std::int64_t i = 0; i < rows.rows; ++i)
      for (std::int64_t j = 0; j < rows.length; ++j) rounded.put(i, j, exact.at(i, j));
    for (std::int64_t i = 0; i < rows.rows; ++i)
      for (std::int64_t j = 0; j < rows.length; ++j)
        CHECK(out.at(i, j) == rounded.at(i, j), "[%d, %d] in %s: %.17g, not %.17g", int(i), int(j), name(dtype),
              out.at(i, j), rounded.at(i, j));
  }
}

// basis [length, rows] and loadings [rows, 5], either packed or not, and the basis itself.
void check_reconstruct(const Kernels& kernels, const PackedMatrix& basis, const Strided& plain, Random& random) {
  const std::int64_t m = basis.length, k = basis.rows, p = 5;
  const PackedMatrix loadings =
      packed(kernels, Strided::random(p, k, Dtype::f32, Layout::shifted, random), basis.bits == 8 ? 4 : 8, 1);
  const Strided full = unpacked(kernels, loadings, Dtype::f32, 1);
  const Matrix bases[2] = {basis.matrix(), {plain.data(), 1, m, Dtype::f32}};
  const Matrix weights[2] = {loadings.matrix(), {full.data(), 1, k, Dtype::f32}};
  const Matrix none = {nullptr, 0, 0, Dtype::f32};
  for (const Dtype dtype : {Dtype::bf16, Dtype::f64}) {
    std::vector<Strided> outs;
    std::vector<ReconstructJob> jobs;
    for (int way = 0; way < 4; ++way) {
      outs.emplace_back(m, p, dtype, Layout::padded);
      jobs.push_back({bases[way / 2], weights[way % 2], outs.back().matrix(), m, k, p, -0.3});
    }
    for (const Matrix& one : bases) {
      outs.emplace_back(m, k, dtype, Layout::padded);
      jobs.push_back({one, none, outs.back().matrix(), m, k, k, 0.7});
    }
    kernels.reconstruct(jobs.data(), static_cast<std::int64_t>(jobs.size()), 2);
    for (std::size_t way = 0; way < 3; ++way)
      CHECK(outs[way].same_bytes(outs[3]), "%d x %d from packed rows, way %d to %s", int(m), int(k), int(way),
            name(dtype));
    CHECK(outs[4].same_bytes(outs[5]), "%d x %d columns from packed rows to %s", int(m), int(k), name(dtype));
  }
}

void check_refusals(const Kernels& kernels) {
  for (const double value : {65000.0, -1e30, HUGE_VAL, static_cast<double>(NAN)})
    for (const std::int64_t bits : {8, 4}) {
      Strided x(4, 70, Dtype::f64, Layout::compact);
      for (std::int64_t i = 0; i < 4; ++i)
        for (std::int64_t j = 0; j < 70; ++j) x.put(i, j, i < 2 ? 64992.0 : 1.0);
      x.put(2, 69, value);
      x.put(3, 0, value);
      PackedMatrix out(4, 70, bits);
      const std::int64_t wrong = kernels.pack(x.block(), 70, bits, out.codes.get(), out.scales.get(), 2);
      CHECK(wrong == 2, "%g: row %d was refused, not 2", value, int(wrong));
    }
}

void test_packed(const Kernels& kernels) {
  Random random(20261122);
  int turn = 0;
  for (const std::int64_t length : kLengths)
    for (const std::int64_t height : kHeights)
      for (const std::int64_t bits : {8, 4}) {
        const Dtype dtype = kDtypes[turn % 4];
        const auto layout = static_cast<Layout>(turn++ % kLayouts);
        subject() = std::string(name(dtype)) + " rows";
        const Strided x = Strided::random(height, length, dtype, layout, random);
        const PackedMatrix rows = packed(kernels, x, bits, 1);
        CHECK(rows.same(packed(kernels, x, bits, 2)), "2 threads change its bits");
        const Strided exact = unpacked(kernels, rows, Dtype::f64, 1);
        check_entries(x, rows, exact);
        check_dtypes(kernels, rows, exact);
        check_reconstruct(kernels, rows, unpacked(kernels, rows, Dtype::f32, 2), random);
        const PackedMatrix wide = drawn(rows, random);
        const Strided numbers = unpacked(kernels, wide, Dtype::f64, 1);
        check_numbers(wide, numbers);
        check_dtypes(kernels, wide, numbers);
        check_reconstruct(kernels, wide, unpacked(kernels, wide, Dtype::f32, 2), random);
      }
  check_refusals(kernels);
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_packed); }
