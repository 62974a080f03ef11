// X^T W, chunk by chunk of columns of X: what power and combine begin with. X may have rows or columns along memory.
namespace loraspan {
namespace LORASPAN_ISA {

// A chunk of columns of X: its part of X^T W stays in cache while the rows of X go by. A slab has at least so many.
constexpr std::int64_t kImageColumns = 1024;
constexpr std::int64_t kSlabColumns = 512;
// Rows whose columns of a chunk are gone along at once: few enough for the hardware to fetch ahead along each.
constexpr std::int64_t kStreams = 16;
// So far is a row of W^T X from the one before it: not a power of two, whose rows would share few places of a cache.
template <typename T>
constexpr std::int64_t kImageStride = kImageColumns + kLanes<T>;
// Products of so many rows, counted from row 0, are added up from zero before their sum is added to the others: T
// rounds R rows with 128 + R / 128 additions behind each other, not with R.
constexpr std::int64_t kImageRows = 128;

// Where products of rows go: added to the sums of their kImageRows at `part`, unless they are the first of these, and
// with the last of them on to `whole`.
template <typename T>
struct Run {
  T* part;
  T* whole;
  bool first, last;

  // Of `rows` rows of `all` from row i on, which lie within one kImageRows.
  Run of(std::int64_t i, std::int64_t rows, std::int64_t all) const {
    return {part, whole, i % kImageRows == 0, (i + rows) % kImageRows == 0 || i + rows == all};
  }
  Run from(std::int64_t at) const { return {part + at, whole + at, first, last}; }
  Vec<T> begin(std::int64_t at) const { return first ? Vec<T>{} : load(static_cast<const T*>(part + at)); }
  void end(std::int64_t at, Vec<T> sum) const {
    last ? store(whole + at, load(static_cast<const T*>(whole + at)) + sum) : store(part + at, sum);
  }
};

struct Image {
  Rows x;
  const double* w;  // [rows, k] row-major
  std::int64_t rows, k;
  std::int64_t groups;  // of kTileRows columns of W
  std::int64_t width;   // k up to whole vectors of any type: the row stride of products with X^T W
  bool by_columns;      // whether columns of X, rather than rows, lie along memory

  std::int64_t weight_entries() const { return rows * round_up(width, kTileRows); }
  std::int64_t product_entries() const { return round_up(rows, kPanelRows) * width; }
};

inline Image image_of(const Rows& x, const double* w, std::int64_t k) {
  return {x,
          w,
          row_count(x),
          k,
          (k + kTileRows - 1) / kTileRows,
          round_up(k, kLanes<float>),
          x.count > 0 && is_column_major(x.blocks[0])};
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
