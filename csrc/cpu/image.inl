// X^T W, chunk by chunk of columns of X: what power and combine begin with. X may have rows or columns along memory.
namespace loraspan {
namespace LORASPAN_ISA {

// A chunk of columns of X: its part of X^T W stays in cache while the rows of X go by. A slab has at least so many.
constexpr std::int64_t kImageColumns = 1024;
constexpr std::int64_t kSlabColumns = 512;
// So far is a row of W^T X from the one before it: not a power of two, whose rows would share few places of a cache.
template <typename T>
constexpr std::int64_t kImageStride = kImageColumns + kLanes<T>;
// Products of so many rows, counted from row 0, are added up from zero before their sum is added to the others: T
// rounds R rows with 128 + R / 128 additions behind each other, not with R.
constexpr std::int64_t kImageRows = 128;
// So many columns of kImageRows rows that lie along memory are packed at a time, and stay in the second cache.
constexpr std::int64_t kBlockColumns = 256;
// So far is a vector of packed columns from the one before it.
template <typename T>
constexpr std::int64_t kStripStride = (kImageRows + 1) * kLanes<T>;

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
