// Matrices as the operators take them, in row blocks of all sizes, dtypes and strides, and batches of them.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "matrix.hpp"

namespace loraspan::test {

// X [R, columns] in blocks; `value` gives an entry in float64.
class Ragged {
 public:
  Ragged(std::vector<Strided> parts, std::int64_t columns) : parts_(std::move(parts)), columns_(columns) {
    for (const Strided& part : parts_) {
      blocks_.push_back(part.block());
      rows_ += part.rows();
      for (std::int64_t i = 0; i < part.rows(); ++i)
        for (std::int64_t j = 0; j < columns; ++j) values_.push_back(part.at(i, j));
    }
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  Rows view() const { return {blocks_.data(), static_cast<std::int64_t>(blocks_.size()), columns_}; }
  double value(std::int64_t i, std::int64_t j) const { return values_[static_cast<std::size_t>(i * columns_ + j)]; }

 private:
  std::vector<Strided> parts_;
  std::vector<Block> blocks_;
  std::vector<double> values_;
  std::int64_t rows_ = 0, columns_;
};

struct Shape {
  std::vector<std::int64_t> heights;  // rows of each block
  std::int64_t columns;
};

// Nothing, single, ragged and empty blocks.
inline const std::vector<Shape>& small_shapes() {
  static const std::vector<Shape> shapes = {{{}, 5},        {{0}, 3},  {{1}, 0},      {{1}, 1},
                                            {{2, 0, 3}, 7}, {{5}, 33}, {{1, 16}, 19}, {{4, 3}, 129}};
  return shapes;
}

// Past a tile, a panel, a float32 sum and a slab of columns in every way, by one and by more.
inline const std::vector<Shape>& large_shapes() {
  static const std::vector<Shape> shapes = {
      {{17, 15, 1, 16}, 257}, {{48}, 128}, {{33, 64, 0, 3}, 127}, {{100, 31}, 140}, {{7}, 4227},
      {{1, 2, 5}, 8193},      {{8}, 130},  {{16}, 8195}};
  return shapes;
}

constexpr int kMixedDtypes = 4;
constexpr int kMixedLayouts = kLayouts;

// Block b of each matrix has dtype and layout `dtype` and `layout`, or goes round all of them where those say mixed.
inline std::vector<Ragged> make_batch(const std::vector<Shape>& shapes, int dtype, int layout, Random& random) {
  std::vector<Ragged> batch;
  int turn = 0;
  for (const Shape& shape : shapes) {
    std::vector<Strided> parts;
    for (const std::int64_t height : shape.heights) {
      const Dtype part_dtype = kDtypes[dtype == kMixedDtypes ? turn % kMixedDtypes : dtype];
      const Layout part_layout = static_cast<Layout>(layout == kMixedLayouts ? turn % kLayouts : layout);
      parts.push_back(Strided::random(height, shape.columns, part_dtype, part_layout, random));
      ++turn;
    }
    batch.emplace_back(std::move(parts), shape.columns);
  }
  return batch;
}

// Calls check(batch, precision) for batches that together meet every dtype, layout and size.
template <typename Check>
void for_each_batch(const Check& check) {
  Random random(20261122);
  const auto visit = [&](const std::vector<Shape>& shapes, int dtype, int layout) {
    const std::vector<Ragged> batch = make_batch(shapes, dtype, layout, random);
    for (const Precision precision : kPrecisions) {
      subject() = std::string(dtype == kMixedDtypes ? "mixed dtypes" : name(kDtypes[dtype])) + ", layout " +
                  std::to_string(layout) + ", " + name(precision);
      check(batch, precision);
    }
  };
  for (int dtype = 0; dtype <= kMixedDtypes; ++dtype) {
    for (int layout = 0; layout <= kMixedLayouts; ++layout) visit(small_shapes(), dtype, layout);
    visit(large_shapes(), dtype, dtype);  // one layout of each kind: as many as there are dtypes
    visit(large_shapes(), dtype, kMixedLayouts);
  }
}

// A float64 sum beside the sum of its terms' sizes, from which its error follows.
struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
};

// Bound on the difference between an operator's sum and ours. The operator takes `steps` roundings of unit roundoff u
// for a term; with u = 2^-24 it also adds the partial sums in float64, as we add all `terms`.
inline double bound(const Sum& sum, double steps, Precision precision, std::int64_t terms) {
  return (gamma(steps, roundoff(precision)) + gamma(2.0 * static_cast<double>(terms) + 2, 0x1p-53)) * sum.size;
}

// Roundings per term of a sum over `columns`: product, sum and the rounding of both factors to float32, where float32
// sums run over at most 128 columns; product and sum in float64.
inline double column_steps(Precision precision, std::int64_t columns) {
  return precision == Precision::f32 ? 130 : static_cast<double>(columns) + 1;
}

// `run(first, count, threads)` runs count matrices from `first` and gives their outputs, one list per matrix. Checks
// that neither the threads nor the company change a bit, and gives the outputs.
template <typename Run>
auto run_every_way(std::size_t count, const Run& run) {
  auto together = run(std::size_t{0}, count, 1);
  const auto threaded = run(std::size_t{0}, count, 2);
  for (std::size_t i = 0; i < count; ++i) {
    const auto alone = run(i, std::size_t{1}, 2);
    for (std::size_t o = 0; o < together[i].size(); ++o) {
      CHECK(together[i][o].same_bytes(threaded[i][o]), "job %zu, output %zu: 2 threads change its bits", i, o);
      CHECK(together[i][o].same_bytes(alone[0][o]), "job %zu, output %zu: company changes its bits", i, o);
    }
  }
  return together;
}

}  // namespace loraspan::test
