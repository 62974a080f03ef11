// combine against float64 loops: V before its rounding, and the products against V as it was stored.
#include "ragged.hpp"

using namespace loraspan;
using namespace loraspan::test;

namespace {

using Outputs = std::vector<std::vector<Strided>>;

// Widths of W: nothing, one, and around the tiles.
constexpr std::int64_t kWidths[] = {1, 0, 5, 16, 17, 33, 48, 64, 65};

void check_basis(const Ragged& x, const Strided& w, const Strided& v, Precision precision) {
  CHECK(v.untouched_between(), "V: wrote between its entries");
  const std::vector<double> weights = w.values();
  const auto weight = [&](std::int64_t i, std::int64_t c) {
    return weights[static_cast<std::size_t>(i * w.columns() + c)];
  };
  for (std::int64_t j = 0; j < x.columns(); ++j)
    for (std::int64_t c = 0; c < w.columns(); ++c) {
      Sum sum;
      for (std::int64_t i = 0; i < x.rows(); ++i) sum.add(x.value(i, j) * weight(i, c));
      const double before = bound(sum, static_cast<double>(x.rows()) + 2, precision, x.rows());
      const double allowed = before + roundoff(v.dtype()) * (std::fabs(sum.value) + before) + underflow(v.dtype());
      CHECK(std::fabs(v.at(j, c) - sum.value) <= allowed, "V [%d, %d] of %d x %d in %s: %.17g, not %.17g within %.3g",
            int(j), int(c), int(x.columns()), int(w.columns()), name(v.dtype()), v.at(j, c), sum.value, allowed);
    }
}

void check_product(const char* what, double got, const Sum& sum, Precision precision, std::int64_t columns) {
  const double allowed = bound(sum, column_steps(precision, columns), precision, columns);
  CHECK(std::fabs(got - sum.value) <= allowed, "%s over %d columns: %.17g, not %.17g within %.3g", what, int(columns),
        got, sum.value, allowed);
}

void check_products(const Ragged& x, const Strided& v, const Strided& xv, const Strided& vtv, Precision precision,
                    bool with_products) {
  const std::int64_t columns = x.columns();
  const std::vector<double> stored = v.values();
  const auto basis = [&](std::int64_t j, std::int64_t c) {
    return stored[static_cast<std::size_t>(j * v.columns() + c)];
  };
  for (std::int64_t c = 0; c < v.columns(); ++c) {
    for (std::int64_t i = 0; with_products && i < x.rows(); ++i) {
      Sum sum;
      for (std::int64_t j = 0; j < columns; ++j) sum.add(x.value(i, j) * basis(j, c));
      check_product("X V", xv.at(i, c), sum, precision, columns);
    }
    for (std::int64_t d = 0; d <= c; ++d) {
      Sum sum;
      for (std::int64_t j = 0; j < columns; ++j) sum.add(basis(j, d) * basis(j, c));
      check_product("V^T V", vtv.at(d, c), sum, precision, columns);
      CHECK(vtv.at(d, c) == vtv.at(c, d), "V^T V [%d, %d]: not symmetric", int(d), int(c));
    }
  }
}

void test_combine(const Kernels& kernels) {
  kernels.combine(nullptr, 0, Precision::f32, 2);
  Random random(7);
  std::size_t turn = 0;
  for_each_batch([&](const std::vector<Ragged>& batch, Precision precision) {
    std::vector<Strided> weights;
    for (std::size_t i = 0; i < batch.size(); ++i)
      weights.push_back(Strided::random(batch[i].rows(), kWidths[(turn + i) % std::size(kWidths)], Dtype::f64,
                                        Layout::compact, random));
    const Dtype v_dtype = kDtypes[turn % 4];
    const Layout v_layout = static_cast<Layout>(turn % kOutputLayouts);
    const bool with_products = ++turn % 2 == 0;
    const Outputs outputs = run_every_way(batch.size(), [&](std::size_t first, std::size_t count, int threads) {
      Outputs out(count);
      std::vector<CombineJob> jobs;
      for (std::size_t i = 0; i < count; ++i) {
        const Ragged& x = batch[first + i];
        const Strided& w = weights[first + i];
        const std::int64_t k = w.columns();
        out[i].emplace_back(x.columns(), k, v_dtype, v_layout);
        out[i].push_back(doubles(x.rows(), k));
        out[i].push_back(doubles(k, k));
        const Strided& v = out[i][0];
        jobs.push_back({x.view(), static_cast<const double*>(w.data()), k, v.data(), v.row_stride(), v.column_stride(),
                        v_dtype, with_products ? static_cast<double*>(out[i][1].data()) : nullptr,
                        static_cast<double*>(out[i][2].data())});
      }
      kernels.combine(jobs.data(), static_cast<std::int64_t>(count), precision, threads);
      return out;
    });
    for (std::size_t i = 0; i < batch.size(); ++i) {
      check_basis(batch[i], weights[i], outputs[i][0], precision);
      check_products(batch[i], outputs[i][0], outputs[i][1], outputs[i][2], precision, with_products);
    }
  });
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, test_combine); }
