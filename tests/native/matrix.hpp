// Matrices for the native tests: every dtype and stride, in heap blocks that end with their last entry.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "loraspan/reconstruct.hpp"
#include "loraspan/types.hpp"

namespace loraspan::test {

constexpr Dtype kDtypes[] = {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64};
constexpr Precision kPrecisions[] = {Precision::f32, Precision::f64};

inline const char* name(Dtype dtype) {
  static const char* const names[] = {"f16", "bf16", "f32", "f64"};
  return names[static_cast<int>(dtype)];
}

inline const char* name(Precision precision) { return precision == Precision::f32 ? "sums in f32" : "sums in f64"; }

// Half the gap between 1 and the next number.
inline double roundoff(Dtype dtype) {
  static const double roundoffs[] = {0x1p-11, 0x1p-8, 0x1p-24, 0x1p-53};
  return roundoffs[static_cast<int>(dtype)];
}

inline double roundoff(Precision precision) { return precision == Precision::f32 ? 0x1p-24 : 0x1p-53; }

// Half the smallest number above zero: the largest error of rounding what is near zero.
inline double underflow(Dtype dtype) {
  static const double halves[] = {0x1p-25, 0x1p-134, 0x1p-150, 0.0};
  return halves[static_cast<int>(dtype)];
}

// Higham's gamma: the relative error of `steps` roundings in a row.
inline double gamma(double steps, double u) { return steps * u / (1 - steps * u); }

// splitmix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  // in [-1, 1)
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1.0; }

 private:
  std::uint64_t state_;
};

// The two 16-bit formats, straight from their definition: `digits` bits after the leading one, exponents from `lowest`.
inline std::uint16_t encode16(double value, int digits, int lowest) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fffu;
  if (magnitude == 0) return sign;
  const int exponent = std::ilogb(magnitude) < lowest ? lowest : std::ilogb(magnitude);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, digits - exponent)));
  return static_cast<std::uint16_t>(sign | (units + ((exponent - lowest) << digits)));
}

inline double decode16(std::uint16_t bits, int digits, int lowest) {
  const int field = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
  const double infinite = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  const bool special = field == 0x7fff >> digits;
  const double magnitude = special ? infinite
                           : field ? std::ldexp((1 << digits) + fraction, field - 1 + lowest - digits)
                                   : std::ldexp(fraction, lowest - digits);
  return bits & 0x8000u ? -magnitude : magnitude;
}

template <typename T>
T read_as(const unsigned char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <typename T>
void write_as(unsigned char* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

// Where the entries of a matrix lie. All but `compact` begin one entry into their memory and so on no vector boundary.
enum class Layout { compact, shifted, padded, transposed, transposed_padded, spread, reversed, repeated_row };
constexpr int kLayouts = 8;
// of these each entry has a place of its own, as an output needs
constexpr int kOutputLayouts = 7;

class Strided {
 public:
  Strided(std::int64_t rows, std::int64_t columns, Dtype dtype, Layout layout)
      : rows_(rows), columns_(columns), dtype_(dtype), lead_(layout == Layout::compact ? 0 : 1) {
    choose_strides(layout);
    const std::int64_t last_row = rows > 0 ? rows - 1 : 0, last_column = columns > 0 ? columns - 1 : 0;
    if (row_stride_ < 0) lead_ -= last_row * row_stride_ + last_column * column_stride_;
    const std::int64_t reach = row_stride_ < 0 ? 0 : last_row * row_stride_ + last_column * column_stride_;
    entries_ = rows * columns == 0 ? 0 : lead_ + reach + 1;
    bytes_.reset(new unsigned char[static_cast<std::size_t>(entries_ * size())]);
    for (std::int64_t i = 0; i < entries_; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
  }

  static Strided random(std::int64_t rows, std::int64_t columns, Dtype dtype, Layout layout, Random& random) {
    Strided matrix(rows, columns, dtype, layout);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) {
        const double value = random.uniform();
        // now and then a zero, and a number that float16 holds only as a subnormal
        matrix.set(matrix.index(i, j), i % 7 == 3 && j % 5 == 2 ? 0.0 : (i + j) % 11 == 10 ? value * 0x1p-18 : value);
      }
    return matrix;
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  std::int64_t row_stride() const { return row_stride_; }
  std::int64_t column_stride() const { return column_stride_; }
  Dtype dtype() const { return dtype_; }
  void* data() const { return entries_ ? bytes_.get() + lead_ * size() : bytes_.get(); }
  Block block() const { return {data(), rows_, row_stride_, column_stride_, dtype_}; }
  Matrix matrix() const { return {data(), row_stride_, column_stride_, dtype_}; }
  double at(std::int64_t i, std::int64_t j) const { return get(index(i, j)); }
  void put(std::int64_t i, std::int64_t j, double value) { set(index(i, j), value); }

  // The entries in float64, row-major and compact, for loops that read each of them often.
  std::vector<double> values() const {
    std::vector<double> all;
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < columns_; ++j) all.push_back(at(i, j));
    return all;
  }

  bool same_bytes(const Strided& other) const {
    return std::memcmp(bytes_.get(), other.bytes_.get(), static_cast<std::size_t>(entries_ * size())) == 0;
  }

  // Whether the entries between those of the matrix still hold the NaN that they began with.
  bool untouched_between() const {
    std::vector<bool> inside(static_cast<std::size_t>(entries_), false);
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < columns_; ++j) inside[static_cast<std::size_t>(index(i, j))] = true;
    for (std::int64_t i = 0; i < entries_; ++i)
      if (!inside[static_cast<std::size_t>(i)] && !std::isnan(get(i))) return false;
    return true;
  }

 private:
  void choose_strides(Layout layout) {
    const bool transposed = layout == Layout::transposed || layout == Layout::transposed_padded;
    const std::int64_t gap = layout == Layout::padded || layout == Layout::transposed_padded ? 3 : 0;
    row_stride_ = transposed ? 1 : columns_ + gap;
    column_stride_ = transposed ? rows_ + gap : 1;
    if (layout == Layout::spread) row_stride_ = 2 * columns_ + 5, column_stride_ = 2;
    if (layout == Layout::reversed) row_stride_ = -columns_, column_stride_ = -1;
    if (layout == Layout::repeated_row) row_stride_ = 0;
  }

  std::int64_t size() const { return dtype_ == Dtype::f64 ? 8 : dtype_ == Dtype::f32 ? 4 : 2; }
  std::int64_t index(std::int64_t i, std::int64_t j) const { return lead_ + i * row_stride_ + j * column_stride_; }

  double get(std::int64_t entry) const {
    const unsigned char* at = bytes_.get() + entry * size();
    switch (dtype_) {
      case Dtype::f16:
        return decode16(read_as<std::uint16_t>(at), 10, -14);
      case Dtype::bf16:
        return decode16(read_as<std::uint16_t>(at), 7, -126);
      case Dtype::f32:
        return read_as<float>(at);
      default:
        return read_as<double>(at);
    }
  }

  void set(std::int64_t entry, double value) {
    unsigned char* at = bytes_.get() + entry * size();
    switch (dtype_) {
      case Dtype::f16:
        return write_as(at, encode16(value, 10, -14));
      case Dtype::bf16:
        return write_as(at, encode16(value, 7, -126));
      case Dtype::f32:
        return write_as(at, static_cast<float>(value));
      default:
        return write_as(at, value);
    }
  }

  std::int64_t rows_, columns_, row_stride_ = 0, column_stride_ = 0, entries_ = 0;
  Dtype dtype_;
  std::int64_t lead_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// A row-major float64 matrix, as the operators take weights and write results.
inline Strided doubles(std::int64_t rows, std::int64_t columns) { return {rows, columns, Dtype::f64, Layout::compact}; }

}  // namespace loraspan::test
