namespace loraspan {
namespace LORASPAN_ISA {

inline bool sums_in_double(const SharedLoraJob& job) {
  return job.y.dtype == Dtype::f64 || job.x.dtype == Dtype::f64 || job.v.dtype == Dtype::f64 ||
         job.u.dtype == Dtype::f64 || job.cores.dtype == Dtype::f64;
}

// Rows that have a task, and what the largest of them needs.
struct Active {
  std::int64_t* rows;
  std::int64_t count;
  std::int64_t own_in, own_out;  // most explicit ends on either side of one row
};

inline std::int64_t own_columns(const SharedLoraJob& job, std::int64_t task, bool out) {
  FormColumns forms[4];
  read_forms(job, task, forms);
  std::int64_t own = 0;
  for (const FormColumns& form : forms) own += (out ? form.out : form.in).kind == End::own ? form.count : 0;
  return own;
}

// Finds them; gives -1, or the first row with a task that is not there.
inline std::int64_t find_active(const SharedLoraJob& job, Active* active) {
  active->count = active->own_in = active->own_out = 0;
  for (std::int64_t t = 0; t < job.t; ++t) {
    bool any = false;
    std::int64_t in = 0, out = 0;
    for (std::int64_t m = 0; m < job.mixture; ++m) {
      const std::int64_t task = job.tasks[t * job.mixture + m];
      if (task == -1) continue;
      if (!task_fits(job, task)) return t;
      any = true;
      in += own_columns(job, task, false);
      out += own_columns(job, task, true);
    }
    if (any) active->rows[active->count++] = t;
    active->own_in = max_of(active->own_in, in);
    active->own_out = max_of(active->own_out, out);
  }
  return -1;
}

// Rows of all kinds of tasks by way of the shared bases.
template <typename T>
void run_shared(const SharedLoraJob& job, const Active& active, int threads) {
  constexpr int L = kLanes<T>;
  if (active.count == 0) return;
  const Sides sides = sides_of(job);
  const std::int64_t in = round_up(job.k_in, L), out = round_up(job.k_out, L), count = active.count;
  T* z = scratch<T>(Use::rows, count * (in + out));
  T* g = z + count * in;
  OwnEnd<T>* ends = scratch<OwnEnd<T>>(Use::factors, count * active.own_out + count);
  std::int64_t* found = reinterpret_cast<std::int64_t*>(ends + count * active.own_out);
  project<T>({job.x, active.rows, count}, job.d, job.v, job.k_in, z, in, threads);
  constexpr std::int64_t kRows = 8;
  parallel_for((count + kRows - 1) / kRows, threads, [&](std::int64_t task) {
    T* x = active.own_in ? scratch<T>(Use::weights, round_up(job.d, L)) : nullptr;
    T* spare = sides.packed ? scratch<T>(Use::basis, max_of(max_of(job.d, job.n), max_of(in, out))) : nullptr;
    for (std::int64_t i = task * kRows; i < min_of(count, (task + 1) * kRows); ++i) {
      const std::int64_t t = active.rows[i];
      for (std::int64_t k = 0; k < out; ++k) g[i * out + k] = 0;
      if (x)
        with_type(job.x.data, job.x.dtype,
                  [&](auto* data) { read_line(data + t * job.x.row_stride, job.x.col_stride, job.d, x); });
      std::int64_t own = 0;
      for (std::int64_t m = 0; m < job.mixture; ++m) {
        const std::int64_t at = t * job.mixture + m, id = job.tasks[at];
        if (id == -1) continue;
        const T share = static_cast<T>(job.scale) * (job.shares ? static_cast<T>(job.shares[at]) : T{1});
        own += add_task<T>(job, sides, id, share, {z + i * in, x, spare}, g + i * out, ends + i * active.own_out + own);
      }
      found[i] = own;
    }
  });
  const OwnEnds<T> own = {ends, found, active.own_out, sides.out_own};
  expand<T>({job.y, active.rows, count}, job.n, job.u, job.k_out, g, out, active.own_out ? &own : nullptr, threads);
}

// A task's own factors cost `columns` times the work of rebuilding one, and then save the difference per row.
inline bool pays_alone(const SharedLoraJob& job, std::int64_t task, std::int64_t rows) {
  FormColumns forms[4];
  read_forms(job, task, forms);
  double columns = 0, rebuilt_in = 0, rebuilt_out = 0, own = 0;
  for (const FormColumns& form : forms) {
    const double count = static_cast<double>(form.count);
    columns += count;
    (form.in.kind == End::own ? own : rebuilt_in) += count;
    (form.out.kind == End::own ? own : rebuilt_out) += count;
  }
  const double d = static_cast<double>(job.d), n = static_cast<double>(job.n), m = static_cast<double>(rows);
  const double basis_in = d * static_cast<double>(job.k_in), basis_out = n * static_cast<double>(job.k_out);
  // explicit ends, one row at a time, go at a fraction of the rate of products of many rows
  constexpr double kRebuild = 2, kOwn = 4, kStart = 2e6;
  const double shared = m * (basis_in + basis_out + kOwn * own * (d + n) / 2);
  const double alone = m * columns * (d + n) + kRebuild * (rebuilt_in * basis_in + rebuilt_out * basis_out) + kStart;
  return alone < shared;
}

// The ends from row `first` on as the columns of a matrix.
inline Matrix ends_from(const EndTable& t, std::int64_t first) {
  char* data = const_cast<char*>(static_cast<const char*>(t.data));
  if (!is_packed(t.dtype)) return {data + first * t.length * entry_bytes(t.dtype), 1, t.length, t.dtype};
  const std::int64_t bytes = code_bytes(t.length, packed_ends(t).bits);
  return {data + first * bytes, 0, 0, t.dtype, t.scales + first * scale_count(t.length), t.length};
}

// One side of a task's columns in full, [length, stride] of T: explicit ends as they are, coefficients on the basis.
template <typename T>
std::int64_t factor_jobs(const SharedLoraJob& job, const FormColumns* forms, bool out, T* factor, std::int64_t stride,
                         ReconstructJob* jobs) {
  const Sides sides = sides_of(job);
  const Matrix& basis = out ? job.u : job.v;
  const std::int64_t length = out ? job.n : job.d, k = out ? job.k_out : job.k_in;
  std::int64_t at = 0, found = 0;
  for (int i = 0; i < 4; ++i) {
    const FormColumns& form = forms[i];
    const End& end = out ? form.out : form.in;
    const Matrix place = {factor + at, stride, 1, sizeof(T) == 4 ? Dtype::f32 : Dtype::f64};
    at += form.count;
    if (form.count == 0 || length == 0) continue;
    const EndTable& table = end.kind == End::own ? (out ? sides.out_own : sides.in_own) : (out ? sides.out : sides.in);
    const Matrix none = {nullptr, 0, 0, Dtype::f32};
    if (end.kind == End::own)
      jobs[found++] = {ends_from(table, end.first), none, place, length, form.count, form.count, 1.0};
    else if (end.kind == End::axes)
      jobs[found++] = {basis, none, place, length, k, k, 1.0};
    else
      jobs[found++] = {basis, ends_from(table, end.first), place, length, k, form.count, 1.0};
  }
  return found;
}

// Rows of one task, many enough that its own factors, rebuilt, save work: y += (x A^T) B^T.
template <typename T>
void run_alone(const SharedLoraJob& job, std::int64_t task, const Active& active, int threads) {
  constexpr int L = kLanes<T>;
  FormColumns forms[4];
  read_forms(job, task, forms);
  std::int64_t columns = 0;
  for (const FormColumns& form : forms) columns += form.count;
  const std::int64_t stride = round_up(columns, L), count = active.count;
  if (columns == 0) return run_shared<T>(job, active, threads);
  T* z = scratch<T>(Use::rows, count * stride + stride * (job.d + job.n));
  T* down = z + count * stride;
  T* up = down + job.d * stride;
  // what lies past the columns, in the factors and in z, is computed with and never used
  ReconstructJob jobs[8];
  const std::int64_t found = factor_jobs(job, forms, false, down, stride, jobs);
  reconstruct(jobs, found + factor_jobs(job, forms, true, up, stride, jobs + found), threads);
  const Dtype own = sizeof(T) == 4 ? Dtype::f32 : Dtype::f64;
  project<T>({job.x, active.rows, count}, job.d, {down, stride, 1, own}, stride, z, stride, threads);
  T* weights = scratch<T>(Use::factors, columns);
  std::int64_t at = 0;
  for (const FormColumns& form : forms)
    for (std::int64_t j = 0; j < form.count; ++j) weights[at++] = static_cast<T>(weight_at(job.cores, form.weight + j));
  for (std::int64_t i = 0; i < count; ++i) {
    const T share = static_cast<T>(job.scale) * (job.shares ? static_cast<T>(job.shares[active.rows[i]]) : T{1});
    for (std::int64_t c = 0; c < columns; ++c) z[i * stride + c] *= weights[c] * share;
  }
  expand<T>({job.y, active.rows, count}, job.n, {up, stride, 1, own}, columns, z, stride, nullptr, threads);
}

template <typename T>
void run_rows(const SharedLoraJob& job, Active active, std::int64_t* spare, int threads) {
  if (job.mixture != 1) return run_shared<T>(job, active, threads);
  // rows of a task together, in their order; those that do not pay alone are gathered at the front
  const auto precedes = [&](std::int64_t a, std::int64_t b) { return job.tasks[a] <= job.tasks[b]; };
  std::int64_t* sorted = sort_order(active.count, active.rows, spare, precedes);
  std::int64_t* shared = sorted == spare ? active.rows : spare;
  std::int64_t kept = 0;
  for (std::int64_t first = 0, last; first < active.count; first = last) {
    const std::int64_t task = job.tasks[sorted[first]];
    for (last = first + 1; last < active.count && job.tasks[sorted[last]] == task;) ++last;
    Active mine = active;
    mine.rows = sorted + first;
    mine.count = last - first;
    if (pays_alone(job, task, mine.count)) {
      run_alone<T>(job, task, mine, threads);
    } else {
      for (std::int64_t i = first; i < last; ++i) shared[kept++] = sorted[i];
    }
  }
  active.rows = shared;
  active.count = kept;
  run_shared<T>(job, active, threads);
}

std::int64_t shared_lora(const SharedLoraJob& job, int threads) {
  std::int64_t* rows = scratch<std::int64_t>(Use::plan, 2 * job.t + 1);
  Active active = {rows, 0, 0, 0};
  const std::int64_t wrong = find_active(job, &active);
  if (wrong >= 0) return wrong;
  if (sums_in_double(job))
    run_rows<double>(job, active, rows + job.t, threads);
  else
    run_rows<float>(job, active, rows + job.t, threads);
  return -1;
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
