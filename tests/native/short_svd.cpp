// short_svd against gram, eigh and combine one after the other: the same bits.
#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

struct Size {
  std::int64_t count, rows, columns, k;
};

void compare(const Kernels& kernels, const Size& size, Dtype dtype, bool turned, int threads) {
  const auto [count, rows, columns, k] = size;
  Random random(20261123);
  // the members one under the other, as rows or as columns of memory
  const Strided x = turned ? Strided::random(columns, count * rows, dtype, Layout::transposed, random)
                           : Strided::random(count * rows, columns, dtype, Layout::compact, random);
  const Block whole = turned ? Block{x.data(), rows, x.column_stride(), x.row_stride(), dtype}
                             : Block{x.data(), rows, x.row_stride(), x.column_stride(), dtype};
  const std::int64_t bytes[] = {2, 2, 4, 8}, step = rows * whole.row_stride * bytes[static_cast<int>(dtype)];
  Strided v(count * k, columns, Dtype::f32, Layout::compact), v_parts(count * k, columns, Dtype::f32, Layout::compact);
  Strided values = doubles(count, rows), totals = doubles(1, count), w = doubles(count * rows, k),
          vtv = doubles(count * k, k);
  Strided grams = doubles(rows, rows), vectors = doubles(rows, rows), values_part = doubles(1, rows);
  Strided weights = doubles(rows, k), vtv_part = doubles(k, k);
  const auto at = [](const Strided& from, std::int64_t i) { return static_cast<double*>(from.data()) + i; };
  kernels.short_svd({whole, columns, count, step, k, v.data(), k * columns * 4, 1, columns, Dtype::f32, at(values, 0),
                     at(totals, 0), at(w, 0), at(vtv, 0)},
                    threads);
  for (std::int64_t i = 0; i < count; ++i) {
    Block block = whole;
    block.data = static_cast<const char*>(whole.data) + i * step;
    const GramJob gram = {{&block, 1, columns}, at(grams, 0)};
    kernels.gram(&gram, 1, Precision::f32, 1);
    kernels.eigh({at(grams, 0), 1, rows, at(values_part, 0), at(vectors, 0)}, 1);
    double total = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      total += grams.at(r, r);
      CHECK(values.at(i, r) == values_part.at(0, r), "member %d: value %d differs", int(i), int(r));
      for (std::int64_t j = 0; j < k; ++j) {
        CHECK(std::fabs(w.at(i * rows + r, j)) == std::fabs(vectors.at(r, j)), "member %d: vector %d", int(i), int(j));
        at(weights, 0)[r * k + j] = w.at(i * rows + r, j) / std::sqrt(values.at(i, j));
      }
    }
    CHECK(totals.at(0, i) == total, "member %d: its total differs", int(i));
    void* place = static_cast<float*>(v_parts.data()) + i * k * columns;
    const CombineJob combine = {{&block, 1, columns}, at(weights, 0), k, place, 1, columns, Dtype::f32, nullptr,
                                at(vtv_part, 0)};
    kernels.combine(&combine, 1, Precision::f32, 1);
    for (std::int64_t j = 0; j < k * k; ++j)
      CHECK(at(vtv, i * k * k)[j] == at(vtv_part, 0)[j], "member %d: V^T V differs", int(i));
  }
  CHECK(v.same_bytes(v_parts), "V differs");
}

void test_short_svd(const Kernels& kernels) {
  const Size sizes[] = {{1, 1, 1, 1}, {3, 5, 33, 2}, {9, 17, 600, 17}, {2, 40, 2500, 16}, {20, 24, 130, 8}};
  for (const Size& size : sizes)
    for (const Dtype dtype : kDtypes)
      for (const bool turned : {false, true})
        for (const int threads : {1, 2, 5}) {
          subject() = std::string(name(dtype)) + (turned ? ", columns" : ", rows") + " along memory";
          compare(kernels, size, dtype, turned, threads);
        }
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_short_svd); }
