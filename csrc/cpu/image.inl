// X^T W, chunk by chunk of columns of X: what power and combine begin with. X may have rows or columns along memory.
namespace loraspan {
namespace LORASPAN_ISA {

// A chunk of columns of X: its part of X^T W stays in cache while the rows of X go by.
constexpr std::int64_t kImageColumns = 512;

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
