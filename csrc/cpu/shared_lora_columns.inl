// The columns of one task: where the ends of each form lie, and their products with a row.
namespace loraspan {
namespace LORASPAN_ISA {

// One end of the columns of one form: rows of a table of coefficients or of explicit vectors, or the axes of a basis.
struct End {
  enum Kind { shared, own, axes } kind;
  std::int64_t first;  // row of its table
};

// The columns of one form of a task, seen from the side that reads x (`in`) and the side that writes y (`out`).
struct FormColumns {
  std::int64_t count;
  std::int64_t weight;  // of the first of them
  End in, out;
};

// The tables as they are read: by the side whose ends meet x, and by the side whose ends make y.
struct Sides {
  EndTable in, in_own, out, out_own;
  bool packed;  // whether any of them is
};

inline Sides sides_of(const SharedLoraJob& job) {
  const Cores& c = job.cores;
  const auto table = [&](int i, const void* data, std::int64_t length) {
    const Dtype dtype = packed_dtype(c.bits[i], c.dtype);
    return EndTable{data, c.scales[i], length, dtype};
  };
  const bool packed = c.bits[0] != 0 || c.bits[1] != 0 || c.bits[2] != 0 || c.bits[3] != 0;
  if (job.transposed)
    return {table(0, c.left, job.k_in), table(1, c.left_private, job.d), table(2, c.right, job.k_out),
            table(3, c.right_private, job.n), packed};
  return {table(2, c.right, job.k_in), table(3, c.right_private, job.d), table(0, c.left, job.k_out),
          table(1, c.left_private, job.n), packed};
}

inline double weight_at(const Cores& cores, std::int64_t i) {
  return cores.dtype == Dtype::f64 ? static_cast<const double*>(cores.weights)[i]
                                   : static_cast<const float*>(cores.weights)[i];
}

// Forms ss, sp, ps, pp of a task, in `forms`.
inline void read_forms(const SharedLoraJob& job, std::int64_t task, FormColumns* forms) {
  const std::int64_t* f = job.cores.index + task * kTaskFields;
  const std::int64_t ss = f[kSs], sp = f[kSp], ps = f[kPs], pp = f[kPp], kept = f[kDense] ? 0 : ss;
  const std::int64_t w = f[kWeights];
  const End left[4] = {{End::shared, f[kLeft]},
                       {End::shared, f[kLeft] + ss},
                       {End::own, f[kLeftPrivate]},
                       {End::own, f[kLeftPrivate] + ps}};
  const End right[4] = {{f[kDense] ? End::axes : End::shared, f[kRight]},
                        {End::own, f[kRightPrivate]},
                        {End::shared, f[kRight] + kept},
                        {End::own, f[kRightPrivate] + sp}};
  const std::int64_t counts[4] = {ss, sp, ps, pp}, weights[4] = {w, w + ss, w + ss + sp, w + ss + sp + ps};
  for (int i = 0; i < 4; ++i)
    forms[i] = {counts[i], weights[i], job.transposed ? left[i] : right[i], job.transposed ? right[i] : left[i]};
}

// Whether the columns of a task lie in the tables.
inline bool task_fits(const SharedLoraJob& job, std::int64_t task) {
  if (task < 0 || task >= job.cores.tasks) return false;
  const std::int64_t* f = job.cores.index + task * kTaskFields;
  const std::int64_t ss = f[kSs], sp = f[kSp], ps = f[kPs], pp = f[kPp], dense = f[kDense];
  // far below what could overflow when added
  for (int i = 0; i < kDense; ++i)
    if (f[i] < 0 || f[i] > (std::int64_t{1} << 60)) return false;
  if (dense && ss != (job.transposed ? job.k_out : job.k_in)) return false;
  const std::int64_t lengths[5] = {ss + sp + ps + pp, ss + sp, ps + pp, (dense ? 0 : ss) + ps, sp + pp};
  for (int i = 0; i < 5; ++i)
    if (lengths[i] > 0 && f[i] + lengths[i] > job.cores.rows[i]) return false;
  return true;
}

template <typename T, typename S>
inline T dot_with(const S* a, const T* b, std::int64_t n) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[2] = {};
  std::int64_t c = 0;
  for (; c + 2 * L <= n; c += 2 * L) {
    sums[0] = load_as<T>(a + c) * load(b + c) + sums[0];
    sums[1] = load_as<T>(a + c + L) * load(b + c + L) + sums[1];
  }
  for (; c < n; c += L) {
    const std::int64_t width = min_of(L, n - c);
    sums[0] = load_first<T>(a + c, width) * load_first<T>(b + c, width) + sums[0];
  }
  return static_cast<T>(add_all_lanes(sums[0] + sums[1]));
}

template <typename T, typename S>
inline void add_scaled(const S* from, T share, std::int64_t n, T* to) {
  constexpr int L = kLanes<T>;
  const Vec<T> s = broadcast(share);
  std::int64_t c = 0;
  for (; c + L <= n; c += L) store(to + c, s * load_as<T>(from + c) + load(static_cast<const T*>(to) + c));
  for (; c < n; ++c) to[c] += share * static_cast<T>(widen_entry(from[c]));
}

// What one row brings to its task: z = x V, and x itself as T for explicit ends (null where no task has any); and room
// for the longest packed end.
template <typename T>
struct RowIn {
  const T *z, *x;
  T* spare;
};

// Adds a task's columns for one row to g [k_out], and its explicit left ends to `ends`; gives how many those are.
template <typename T>
inline std::int64_t add_task(const SharedLoraJob& job, const Sides& sides, std::int64_t task, T share, RowIn<T> row,
                             T* g, OwnEnd<T>* ends) {
  FormColumns forms[4];
  read_forms(job, task, forms);
  std::int64_t found = 0;
  for (const FormColumns& form : forms) {
    const bool in_own = form.in.kind == End::own;
    const EndTable& in = in_own ? sides.in_own : sides.in;
    const T* target = in_own ? row.x : row.z;
    for (std::int64_t j = 0; j < form.count; ++j) {
      const T weight = static_cast<T>(weight_at(job.cores, form.weight + j)) * share;
      T product = form.in.kind == End::axes ? row.z[j] : 0;
      if (form.in.kind != End::axes)
        with_end<T>(in, form.in.first + j, 0, in.length, row.spare,
                    [&](auto* end) { product = dot_with<T>(end, target, in.length); });
      const T load_of = weight * product;
      if (form.out.kind == End::axes) {
        g[j] += load_of;
      } else if (form.out.kind == End::shared) {
        with_end<T>(sides.out, form.out.first + j, 0, sides.out.length, row.spare,
                    [&](auto* end) { add_scaled(end, load_of, sides.out.length, g); });
      } else {
        ends[found++] = {form.out.first + j, load_of};
      }
    }
  }
  return found;
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
