// Reading and writing one entry of any dtype.
namespace loraspan {
namespace LORASPAN_ISA {

inline float bits_to_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  // infinity and NaN: the exponent field is all ones in both formats
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  // the exponent bias moves by 112: multiplying by 2^112 also gets the subnormals right
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even.
inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {
    // adding 0.5 puts the subnormal's last bit at the float's last bit, so the addition does the rounding
    return sign | static_cast<std::uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | static_cast<std::uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

inline float bfloat_to_float(std::uint16_t bfloat) { return bits_to_float(static_cast<std::uint32_t>(bfloat) << 16); }

inline std::uint16_t float_to_bfloat(float value) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline double load_entry(const void* data, std::int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::f16:
      return half_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case Dtype::bf16:
      return bfloat_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case Dtype::f32:
      return static_cast<const float*>(data)[index];
    default:
      return static_cast<const double*>(data)[index];
  }
}

// float64 is rounded to odd before it is narrowed further, so that two roundings give what one would.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || nearest != nearest) return nearest;
  std::uint32_t bits = float_to_bits(nearest);
  if (bits & 1u) return nearest;
  const double magnitude = value < 0 ? -value : value;
  const double nearest_magnitude = nearest < 0 ? -static_cast<double>(nearest) : static_cast<double>(nearest);
  return bits_to_float(nearest_magnitude > magnitude ? bits - 1u : bits + 1u);
}

inline void store_entry(void* data, std::int64_t index, Dtype dtype, double value) {
  switch (dtype) {
    case Dtype::f16:
      static_cast<std::uint16_t*>(data)[index] = float_to_half(round_to_odd(value));
      break;
    case Dtype::bf16:
      static_cast<std::uint16_t*>(data)[index] = float_to_bfloat(round_to_odd(value));
      break;
    case Dtype::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    default:
      static_cast<double*>(data)[index] = value;
  }
}

inline double entry(const Block& b, std::int64_t i, std::int64_t j) {
  return load_entry(b.data, i * b.row_stride + j * b.col_stride, b.dtype);
}

inline std::int64_t row_count(const Rows& x) {
  std::int64_t rows = 0;
  for (std::int64_t b = 0; b < x.count; ++b) rows += x.blocks[b].rows;
  return rows;
}

// Row i of X, found by walking the blocks.
inline double entry(const Rows& x, std::int64_t i, std::int64_t j) {
  std::int64_t b = 0;
  while (i >= x.blocks[b].rows) i -= x.blocks[b++].rows;
  return entry(x.blocks[b], i, j);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
