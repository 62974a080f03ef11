// shared_lora against dense dW in float64: every form of column, either way round, tables that end with their last
// entry.
#include <array>

#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

// rows, n, d, k_out, k_in, rows per distinct task: with many, a task's own factors are rebuilt
constexpr std::int64_t kSizes[][6] = {{0, 5, 6, 2, 3, 1},         {1, 1, 1, 1, 1, 1},   {7, 33, 21, 5, 4, 1},
                                      {9, 97, 513, 16, 32, 1},    {6, 0, 9, 3, 2, 1},   {6, 9, 0, 3, 2, 1},
                                      {5, 20, 30, 0, 4, 1},       {5, 20, 30, 4, 0, 1}, {66, 130, 140, 33, 17, 2},
                                      {150, 260, 530, 40, 48, 75}};
constexpr std::int64_t kTasks = 5;
constexpr std::array<std::array<std::int64_t, 4>, kTasks> kCounts = {
    {{3, 0, 0, 0}, {0, 0, 0, 0}, {1, 2, 1, 1}, {0, 0, 2, 0}, {4, 1, 1, 0}}};
constexpr std::int64_t kDenseTask = 4;

struct Column {
  double weight;
  std::vector<double> left, right;            // in full
  std::vector<double> left_size, right_size;  // the same of absolute values
};

// Tables in memory of their exact size, and what each task's columns are.
struct Planted {
  Strided left, left_private, right, right_private;
  std::vector<float> weights;
  std::vector<double> weights64;
  std::vector<std::int64_t> index;
  std::vector<std::vector<Column>> columns;
};

std::vector<double> on_basis(const Strided& basis, const Strided& rows, std::int64_t row, bool absolute) {
  std::vector<double> out(static_cast<std::size_t>(basis.rows()));
  for (std::int64_t i = 0; i < basis.rows(); ++i)
    for (std::int64_t k = 0; k < basis.columns(); ++k) {
      const double product = basis.at(i, k) * rows.at(row, k);
      out[static_cast<std::size_t>(i)] += absolute ? std::fabs(product) : product;
    }
  return out;
}

std::vector<double> as_they_are(const Strided& from, std::int64_t index, bool column, bool absolute) {
  std::vector<double> out;
  for (std::int64_t i = 0; i < (column ? from.rows() : from.columns()); ++i) {
    const double entry = column ? from.at(i, index) : from.at(index, i);
    out.push_back(absolute ? std::fabs(entry) : entry);
  }
  return out;
}

Planted plant(const Strided& u, const Strided& v, Dtype dtype, Random& random) {
  std::int64_t heights[4] = {}, at[5] = {};
  std::vector<std::int64_t> index;
  for (std::int64_t t = 0; t < kTasks; ++t) {
    std::int64_t ss = kCounts[t][0];
    const std::int64_t sp = kCounts[t][1], ps = kCounts[t][2], pp = kCounts[t][3];
    const bool dense = t == kDenseTask;
    if (dense) ss = v.columns();
    for (const std::int64_t start : at) index.push_back(start);
    for (const std::int64_t field : {ss, sp, ps, pp, std::int64_t{dense}}) index.push_back(field);
    const std::int64_t lengths[5] = {ss + sp + ps + pp, ss + sp, ps + pp, (dense ? 0 : ss) + ps, sp + pp};
    for (int i = 0; i < 5; ++i) at[i] += lengths[i];
    for (int i = 0; i < 4; ++i) heights[i] = at[i + 1];
  }
  Planted p = {Strided::random(heights[0], u.columns(), dtype, Layout::compact, random),
               Strided::random(heights[1], u.rows(), dtype, Layout::compact, random),
               Strided::random(heights[2], v.columns(), dtype, Layout::compact, random),
               Strided::random(heights[3], v.rows(), dtype, Layout::compact, random),
               {},
               {},
               index,
               {}};
  for (std::int64_t c = 0; c < at[0]; ++c) p.weights.push_back(static_cast<float>(random.uniform()));
  p.weights64.assign(p.weights.begin(), p.weights.end());
  for (std::int64_t t = 0; t < kTasks; ++t) {
    const std::int64_t* f = p.index.data() + t * kTaskFields;
    const std::int64_t ss = f[kSs], sp = f[kSp], ps = f[kPs], pp = f[kPp], dense = f[kDense];
    std::vector<Column> columns;
    for (std::int64_t c = 0; c < ss + sp + ps + pp; ++c) {
      std::vector<double> ends[4];
      for (const int absolute : {0, 1}) {
        ends[absolute] = c < ss + sp ? on_basis(u, p.left, f[kLeft] + c, absolute)
                                     : as_they_are(p.left_private, f[kLeftPrivate] + c - ss - sp, false, absolute);
        const std::int64_t own = f[kRightPrivate] + (c < ss + sp ? c - ss : c - ss - ps);
        const std::int64_t shared = f[kRight] + (c < ss ? c : (dense ? 0 : ss) + c - ss - sp);
        const bool on_v = c < ss || (c >= ss + sp && c < ss + sp + ps);
        ends[2 + absolute] = dense && c < ss ? as_they_are(v, c, true, absolute)
                             : on_v          ? on_basis(v, p.right, shared, absolute)
                                             : as_they_are(p.right_private, own, false, absolute);
      }
      columns.push_back({p.weights64[static_cast<std::size_t>(f[kWeights] + c)], ends[0], ends[2], ends[1], ends[3]});
    }
    p.columns.push_back(columns);
  }
  return p;
}

Cores cores_of(const Planted& p, Dtype dtype) {
  const void* weights = dtype == Dtype::f64 ? static_cast<const void*>(p.weights64.data()) : p.weights.data();
  return {p.index.data(),
          kTasks,
          weights,
          p.left.data(),
          p.left_private.data(),
          p.right.data(),
          p.right_private.data(),
          {static_cast<std::int64_t>(p.weights.size()), p.left.rows(), p.left_private.rows(), p.right.rows(),
           p.right_private.rows()},
          dtype};
}

struct Problem {
  Strided x, y, v, u;
  Planted planted;
  std::vector<std::int64_t> tasks;
  std::vector<float> shares;
  std::int64_t mixture;
  double scale;
  bool transposed;
};

// Row t of y, each entry with the sum of the absolute values that make it.
std::vector<Sum> exact_row(const Problem& p, std::int64_t t) {
  std::vector<Sum> row(static_cast<std::size_t>(p.y.columns()));
  for (std::int64_t j = 0; j < p.y.columns(); ++j) row[static_cast<std::size_t>(j)].add(p.y.at(t, j));
  std::vector<double> x;
  for (std::int64_t i = 0; i < p.x.columns(); ++i) x.push_back(p.x.at(t, i));
  for (std::int64_t m = 0; m < p.mixture; ++m) {
    const std::size_t at = static_cast<std::size_t>(t * p.mixture + m);
    if (p.tasks[at] < 0) continue;
    for (const Column& column : p.planted.columns[static_cast<std::size_t>(p.tasks[at])]) {
      const auto& in = p.transposed ? column.left : column.right;
      const auto& in_size = p.transposed ? column.left_size : column.right_size;
      const auto& out = p.transposed ? column.right : column.left;
      const auto& out_size = p.transposed ? column.right_size : column.left_size;
      double product = 0, size = 0;
      for (std::size_t i = 0; i < x.size(); ++i) product += in[i] * x[i], size += in_size[i] * std::fabs(x[i]);
      const double share = p.scale * p.shares[at] * column.weight;
      for (std::size_t j = 0; j < row.size(); ++j) {
        row[j].value += share * product * out[j];
        row[j].size += std::fabs(share) * size * out_size[j];
      }
    }
  }
  return row;
}

void check(const Problem& p, const Strided& out, bool wide) {
  CHECK(out.untouched_between(), "wrote between the entries");
  const double steps = static_cast<double>(p.x.columns() + p.v.columns() + p.u.columns() + 8) + 60;
  for (std::int64_t t = 0; t < out.rows(); ++t) {
    bool any = false;
    for (std::int64_t m = 0; m < p.mixture; ++m) any |= p.tasks[static_cast<std::size_t>(t * p.mixture + m)] >= 0;
    const std::vector<Sum> exact = exact_row(p, t);
    for (std::int64_t j = 0; j < out.columns(); ++j) {
      if (!any) {
        CHECK(out.at(t, j) == p.y.at(t, j), "[%d, %d]: a row without a task changed", int(t), int(j));
        continue;
      }
      const Sum sum = exact[static_cast<std::size_t>(j)];
      const double before = gamma(steps, wide ? 0x1p-53 : 0x1p-24) * sum.size + gamma(steps, 0x1p-53) * sum.size +
                            (wide ? 0 : steps * 0x1p-126);
      const double allowed = before + roundoff(out.dtype()) * (std::fabs(sum.value) + before) + underflow(out.dtype());
      CHECK(std::fabs(out.at(t, j) - sum.value) <= allowed, "[%d, %d]: %.17g, not %.17g within %.3g", int(t), int(j),
            out.at(t, j), sum.value, allowed);
    }
  }
}

Strided copy_of(const Strided& from, Layout layout) {
  Strided to(from.rows(), from.columns(), from.dtype(), layout);
  for (std::int64_t i = 0; i < from.rows(); ++i)
    for (std::int64_t j = 0; j < from.columns(); ++j) to.put(i, j, from.at(i, j));
  return to;
}

void run_problem(const Kernels& kernels, const Problem& p, Dtype ends, Layout out_layout) {
  Strided one = copy_of(p.y, out_layout), two = copy_of(p.y, out_layout);
  for (const int threads : {1, 2}) {
    // the transposed kernel is handed u for v: what x is on
    const Strided &v = p.v, &u = p.u;
    const SharedLoraJob job = {(threads == 1 ? one : two).matrix(),
                               p.x.matrix(),
                               v.matrix(),
                               u.matrix(),
                               p.x.rows(),
                               p.x.columns(),
                               p.y.columns(),
                               v.columns(),
                               u.columns(),
                               cores_of(p.planted, ends),
                               p.tasks.data(),
                               p.mixture,
                               p.shares.data(),
                               p.scale,
                               p.transposed};
    CHECK(kernels.shared_lora(job, threads) == -1, "a task was refused");
  }
  CHECK(one.same_bytes(two), "threads change the answer");
  const bool wide = p.y.dtype() == Dtype::f64 || p.x.dtype() == Dtype::f64 || p.v.dtype() == Dtype::f64 ||
                    p.u.dtype() == Dtype::f64 || ends == Dtype::f64;
  check(p, one, wide);
}

void test_shared_lora(const Kernels& kernels) {
  Random random(20261122);
  int turn = 0;
  for (const auto& [rows, n, d, k_out, k_in, per_task] : kSizes)
    for (const Dtype dtype : kDtypes)
      for (const bool transposed : {false, true}) {
        ++turn;
        subject() = std::string(name(dtype)) + (transposed ? ", transposed, " : ", ") + std::to_string(rows) +
                    " rows, " + std::to_string(n) + " x " + std::to_string(d);
        const auto layout = [&](int shift) { return static_cast<Layout>((turn + shift) % kOutputLayouts); };
        const Dtype other = kDtypes[turn % 3], ends = turn % 2 ? dtype : other;
        Strided v = Strided::random(d, k_in, dtype, layout(1), random);
        Strided u = Strided::random(n, k_out, other, layout(2), random);
        Planted planted = plant(u, v, ends, random);
        const std::int64_t mixture = per_task > 1 ? 1 : 1 + turn % 3;
        std::vector<std::int64_t> tasks;
        std::vector<float> shares;
        for (std::int64_t i = 0; i < rows * mixture; ++i) {
          tasks.push_back(i % 7 == 3 ? -1 : (per_task > 1 ? i / per_task * 2 + 2 : i) % kTasks);
          shares.push_back(static_cast<float>(random.uniform()));
        }
        Problem p = {Strided::random(rows, transposed ? n : d, dtype, layout(3), random),
                     Strided::random(rows, transposed ? d : n, other, layout(4), random),
                     transposed ? std::move(u) : std::move(v),
                     transposed ? std::move(v) : std::move(u),
                     std::move(planted),
                     tasks,
                     shares,
                     mixture,
                     -0.3,
                     transposed};
        run_problem(kernels, p, ends, layout(5));
      }
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_shared_lora); }
