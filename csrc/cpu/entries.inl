// Entry types by their dtype, and whole numbers that bound loops.
namespace loraspan {
namespace LORASPAN_ISA {

template <typename P>
struct Writable;
template <typename S>
struct Writable<const S*> {
  using type = S;
};

// Calls body(p) with `data` as a pointer to its entry type.
template <typename Body>
inline void with_type(const void* data, Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f16:
      return body(static_cast<const Half*>(data));
    case Dtype::bf16:
      return body(static_cast<const Bfloat*>(data));
    case Dtype::f32:
      return body(static_cast<const float*>(data));
    default:
      return body(static_cast<const double*>(data));
  }
}

inline std::int64_t entry_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
inline std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace LORASPAN_ISA
}  // namespace loraspan
