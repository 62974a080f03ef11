// combine: per chunk of columns, V^T = W^T X, rounded and written; then V^T V, and X V where it is asked for, of what
// was written. Slabs of columns have their own float64 sums, added in order at the end.
namespace loraspan {
namespace LORASPAN_ISA {

// Without X V the sums are few, and slabs may be many.
inline std::int64_t combine_slab_width(const CombineJob& job) {
  const std::int64_t parts = job.xv ? 1 : 4;
  return slab_columns(job.x.columns,
                      max_of(parts * kSlabColumns, parts * (std::int64_t{1} << 17) / max_of(row_count(job.x), 1)), 32);
}

// Rounds the first n lanes of x to the entries of type S from p on, `stride` apart; gives them as they are now.
template <typename S, typename T>
inline Vec<T> round_to(S* p, std::int64_t stride, std::int64_t n, Vec<T> x) {
  constexpr int L = kLanes<T>;
  if (stride == 1 && n == L) {
    store_as(p, x);
    return load_as<T>(static_cast<const S*>(p));
  }
  S rounded[L];
  store_as(rounded, x);
  for (std::int64_t i = 0; i < n; ++i) p[i * stride] = rounded[i];
  return load_as<T>(static_cast<const S*>(rounded));
}

// Writes columns [c0, c0 + n) of V^T and leaves them in `image` as they were rounded.
template <typename T>
inline void store_image(const CombineJob& job, const Image& s, std::int64_t c0, std::int64_t n, T* image) {
  constexpr int L = kLanes<T>;
  with_type(job.v, job.v_dtype, [&](auto* v) {
    using S = typename Writable<decltype(v)>::type;
    S* out = const_cast<S*>(v);
    for (std::int64_t j = 0; j < s.k; ++j)
      for (std::int64_t c = 0; c < n; c += L) {
        T* entries = image + j * kImageStride<T> + c;
        S* p = out + (c0 + c) * job.v_row_stride + j * job.v_col_stride;
        store(entries, round_to<S, T>(p, job.v_row_stride, min_of(L, n - c), load(static_cast<const T*>(entries))));
      }
  });
}

inline double add_all_lanes(Vec<double> x) { return add_lanes(x); }
inline double add_all_lanes(Vec<float> x) {
  alignas(64) float entries[kLanes<float>];
  store(entries, x);
  constexpr int L = kLanes<double>;
  return add_lanes(load_as<double>(entries) + load_as<double>(entries + L));
}

// Adds to row i and columns [j, j + N) of V^T V. A lane's sum runs over at most kSumColumns columns.
template <typename T, int N>
inline void image_products(const T* image, std::int64_t i, std::int64_t j, std::int64_t n, double* out) {
  constexpr int L = kLanes<T>;
  for (std::int64_t start = 0; start < n; start += kSumColumns * L) {
    Vec<T> sums[N] = {};
    for (std::int64_t c = start; c < min_of(n, start + kSumColumns * L); c += L) {
      const Vec<T> x = load(image + i * kImageStride<T> + c);
      LORASPAN_UNROLL
      for (int q = 0; q < N; ++q) sums[q] = x * load(image + (j + q) * kImageStride<T> + c) + sums[q];
    }
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) out[q] += add_all_lanes(sums[q]);
  }
}

// The sums of a slab: X V, if it is asked for, and V^T V.
template <typename T>
inline void combine_slab(const CombineJob& job, std::int64_t slab, double* xv, double* vtv) {
  const Image s = image_of(job.x, job.w, job.k);
  const T* weights = pack_weights<T>(s);
  T* image = scratch<T>(Use::basis, s.groups * kTileRows * kImageStride<T>);
  T* basis = scratch<T>(Use::factors, s.width / kLanes<T> * kBasisStride<T>);
  for (std::int64_t i = 0; xv && i < s.product_entries(); ++i) xv[i] = 0;
  for (std::int64_t i = 0; i < s.k * s.k; ++i) vtv[i] = 0;
  const std::int64_t width = combine_slab_width(job), end = min_of(job.x.columns, (slab + 1) * width);
  for (std::int64_t c = slab * width; c < end; c += kImageColumns) {
    const std::int64_t n = min_of(kImageColumns, end - c);
    make_image(s, weights, c, n, image);
    store_image(job, s, c, n, image);
    for (std::int64_t i = 0; i < s.k; ++i) {
      double* row = vtv + i * s.k;
      std::int64_t j = 0;
      for (; j + 4 <= i + 1; j += 4) image_products<T, 4>(image, i, j, n, row + j);
      for (; j <= i; ++j) image_products<T, 1>(image, i, j, n, row + j);
    }
    if (!xv) continue;
    turn_image(image, s, n, basis);
    add_products<T>(job.x, 0, s.rows, c, c + n, basis, kBasisStride<T>, xv, s.width);
  }
}

// Adds the slabs, `stride` sums apart, in order and writes a share of the rows of X V and of V^T V.
inline void finish_combine(const CombineJob& job, std::int64_t slabs, const double* sums, std::int64_t stride,
                           std::int64_t part, std::int64_t parts) {
  const Image s = image_of(job.x, job.w, job.k);
  const auto total = [&](std::int64_t at) {
    double sum = sums[at];
    for (std::int64_t slab = 1; slab < slabs; ++slab) sum += sums[slab * stride + at];
    return sum;
  };
  const std::int64_t vtv = stride - s.k * s.k;
  for (std::int64_t i = s.rows * part / parts; job.xv && i < s.rows * (part + 1) / parts; ++i)
    for (std::int64_t j = 0; j < s.k; ++j) job.xv[i * s.k + j] = total(i * s.width + j);
  for (std::int64_t i = s.k * part / parts; i < s.k * (part + 1) / parts; ++i)
    for (std::int64_t j = 0; j <= i; ++j) job.vtv[i * s.k + j] = job.vtv[j * s.k + i] = total(vtv + i * s.k + j);
}

template <typename T>
inline void combine_all(const CombineJob* jobs, std::int64_t count, int threads) {
  const auto sums_of = [&](std::int64_t i) {
    return (jobs[i].xv ? image_of(jobs[i].x, jobs[i].w, jobs[i].k).product_entries() : 0) + jobs[i].k * jobs[i].k;
  };
  run_slabs(
      count, threads,
      [&](std::int64_t i) {
        return Slabs{slabs_of(jobs[i].x.columns, combine_slab_width(jobs[i])), sums_of(i), 0, nullptr};
      },
      [&](std::int64_t i, std::int64_t first, std::int64_t last, double* sums) {
        for (std::int64_t slab = first; slab < last; ++slab, sums += sums_of(i))
          combine_slab<T>(jobs[i], slab, jobs[i].xv ? sums : nullptr, sums + sums_of(i) - jobs[i].k * jobs[i].k);
      },
      [&](std::int64_t i, std::int64_t slabs, const double* sums, std::int64_t part, std::int64_t parts) {
        finish_combine(jobs[i], slabs, sums, sums_of(i), part, parts);
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
