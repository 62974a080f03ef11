// combine: per chunk of columns, V^T = W^T X, rounded and written; then V^T V, and X V where it is asked for, of what
// was written. Slabs of columns have their own float64 sums, added in order.
namespace loraspan {
namespace LORASPAN_ISA {

// Without X V the sums are few, and slabs may be many.
inline std::int64_t combine_slab_width(const CombineJob& job) {
  const std::int64_t parts = job.xv ? 1 : 4;
  return slab_columns(job.x.columns,
                      max_of(parts * kSlabColumns, parts * (std::int64_t{1} << 17) / max_of(row_count(job.x), 1)), 32);
}

// Rounds V^T [k, n] to the dtype that is stored, and writes these columns of it.
template <typename T>
inline void store_image(const CombineJob& job, const Image& s, std::int64_t c0, std::int64_t n, T* image) {
  constexpr int L = kLanes<T>;
  with_type(job.v, job.v_dtype, [&](auto* v) {
    using S = typename Writable<decltype(v)>::type;
    for (std::int64_t j = 0; j < s.k; ++j)
      for (T* p = image + j * kImageStride<T>; p < image + j * kImageStride<T> + n; p += L) {
        S rounded[L];
        store_as(rounded, load(static_cast<const T*>(p)));
        store(p, load_as<T>(static_cast<const S*>(rounded)));
      }
  });
  const Matrix out = {job.v, job.v_row_stride, job.v_col_stride, job.v_dtype};
  for (std::int64_t j = 0; j < s.k; j += kPlaceColumns)
    place(Tile<T>{image + j * kImageStride<T>, L, kImageStride<T>, n, min_of(kPlaceColumns, s.k - j)}, T{1}, out, c0,
          j);
}

// Adds the tiles of V^T V over n columns of V^T.
template <typename T>
inline void multiply_image(const T* image, std::int64_t k, std::int64_t n, double* tiles) {
  constexpr std::int64_t L = kLanes<T>, kRow = kImageStride<T>;
  for (std::int64_t i = 0; i < k; i += kDotRows)
    for (std::int64_t j = i; j < k; j += kDotRows, tiles += kDotTile)
      for (std::int64_t c = 0; c < n; c += kDotColumns<T>)
        dot_tile<T, kRow, L>(image + i * kRow + c, image + j * kRow + c, (min_of(n - c, kDotColumns<T>) + L - 1) / L,
                             tiles);
}

// The sums of a slab: X V, if it is asked for, and V^T V; written, or added to what is there.
template <typename T>
inline void combine_slab(const CombineJob& job, const Image& s, const T* weights, std::int64_t slab, bool fresh,
                         double* xv, double* vtv) {
  T* image = scratch<T>(Use::basis, s.groups * kTileRows * kImageStride<T>);
  T* basis = scratch<T>(Use::factors, s.width / kLanes<T> * kBasisStride<T>);
  double* dots = fresh ? vtv : scratch<double>(Use::dots, dot_sums(s.k));
  for (std::int64_t i = 0; i < dot_sums(s.k); ++i) dots[i] = 0;
  const std::int64_t width = combine_slab_width(job), end = min_of(job.x.columns, (slab + 1) * width);
  for (std::int64_t c = slab * width, first = c; c == first || c < end; c += kImageColumns) {
    const std::int64_t n = min_of(kImageColumns, end - c);
    make_image(s, weights, c, n, image);
    store_image(job, s, c, n, image);
    multiply_image(image, s.k, n, dots);
    if (!xv) continue;
    turn_image(image, s, n, basis);
    add_products(Products<T>{job.x, c, c + n, basis, kBasisStride<T>, s.width}, fresh && c == first, xv);
  }
  if (!fresh) add_sums(dot_sums(s.k), dots, vtv);
}

// Adds the sums of all slabs and writes a share of the rows of X V and of V^T V.
inline void finish_combine(const CombineJob& job, const SlabSums& sums, std::int64_t part, std::int64_t parts) {
  const Image s = image_of(job.x, job.w, job.k);
  if (job.xv) add_slabs(sums, s.width, s.k, s.rows * part / parts, s.rows * (part + 1) / parts, job.xv);
  finish_dots(s.k, sums.from(sums.stride - dot_sums(s.k)), part, parts, job.vtv);
}

template <typename T>
inline void combine_all(const CombineJob* jobs, std::int64_t count, int threads) {
  const auto sums_of = [&](std::int64_t i) {
    return (jobs[i].xv ? image_of(jobs[i].x, jobs[i].w, jobs[i].k).product_entries() : 0) + dot_sums(jobs[i].k);
  };
  run_slabs(
      count, threads,
      [&](std::int64_t i) {
        return plan_slabs(jobs[i].x.columns, combine_slab_width(jobs[i]), kImageColumns, sums_of(i));
      },
      [&](std::int64_t i, const SlabRun& run) {
        const CombineJob& job = jobs[i];
        const Image s = image_of(job.x, job.w, job.k);
        const T* weights = pack_weights<T>(s);
        for (std::int64_t slab = run.first; slab < run.last; ++slab) {
          double* sums = run.sums_of(slab);
          combine_slab<T>(job, s, weights, slab, run.begins(slab), job.xv ? sums : nullptr,
                          sums + run.stride - dot_sums(job.k));
        }
      },
      [&](std::int64_t i, const SlabSums& sums, std::int64_t part, std::int64_t parts) {
        finish_combine(jobs[i], sums, part, parts);
      });
}

void combine(const CombineJob* jobs, std::int64_t count, Precision precision, int threads) {
  if (precision == Precision::f32)
    combine_all<float>(jobs, count, threads);
  else
    combine_all<double>(jobs, count, threads);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
