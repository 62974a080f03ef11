// The Python face of the kernels: addresses, sizes and strides in, nothing out. No logic.
#include "loraspan/memory.hpp"
#include "tables.hpp"

using namespace loraspan;
using namespace loraspan::bindings;

namespace {

void gram(const Table& block_table, const Table& job_table, Precision precision, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto blocks = read_blocks(block_table);
  const auto jobs = read_jobs<GramJob>(
      job_table, [&](auto field) { return GramJob{read_rows(blocks, field), address<double>(field(3))}; });
  py::gil_scoped_release release;
  kernels.gram(jobs.data(), static_cast<std::int64_t>(jobs.size()), precision, threads);
}

void combine(const Table& block_table, const Table& job_table, Precision precision, int threads,
             const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto blocks = read_blocks(block_table);
  const auto jobs = read_jobs<CombineJob>(job_table, [&](auto field) {
    return CombineJob{read_rows(blocks, field),
                      address<const double>(field(3)),
                      field(4),
                      address<void>(field(5)),
                      field(6),
                      field(7),
                      Dtype(field(8)),
                      address<double>(field(9)),
                      address<double>(field(10))};
  });
  py::gil_scoped_release release;
  kernels.combine(jobs.data(), static_cast<std::int64_t>(jobs.size()), precision, threads);
}

void sketch(const Table& block_table, const Table& job_table, Precision precision, int threads,
            const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto blocks = read_blocks(block_table);
  const auto jobs = read_jobs<SketchJob>(job_table, [&](auto field) {
    return SketchJob{read_rows(blocks, field), field(3), static_cast<std::uint64_t>(field(4)),
                     address<double>(field(5))};
  });
  py::gil_scoped_release release;
  kernels.sketch(jobs.data(), static_cast<std::int64_t>(jobs.size()), precision, threads);
}

void sparse_sketch(const Table& block_table, const Table& job_table, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto blocks = read_blocks(block_table);
  const auto jobs = read_jobs<SparseSketchJob>(job_table, [&](auto field) {
    return SparseSketchJob{read_rows(blocks, field), field(3), static_cast<std::uint64_t>(field(4)),
                           address<float>(field(5))};
  });
  py::gil_scoped_release release;
  kernels.sparse_sketch(jobs.data(), static_cast<std::int64_t>(jobs.size()), threads);
}

void power(const Table& block_table, const Table& job_table, Precision precision, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto blocks = read_blocks(block_table);
  const auto jobs = read_jobs<PowerJob>(job_table, [&](auto field) {
    return PowerJob{read_rows(blocks, field), address<const double>(field(3)), field(4), address<double>(field(5))};
  });
  py::gil_scoped_release release;
  kernels.power(jobs.data(), static_cast<std::int64_t>(jobs.size()), precision, threads);
}

void reconstruct(const Table& job_table, const py::array_t<double>& scale_table, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto scales = scale_table.unchecked<1>();
  if (scales.shape(0) != job_table.shape(0)) throw py::value_error("_core: a scale for each job");
  py::ssize_t next = 0;
  const auto jobs = read_jobs<ReconstructJob>(job_table, [&](auto field) {
    const auto matrix = [&](py::ssize_t at) { return read_matrix([&](py::ssize_t i) { return field(at + i); }); };
    return ReconstructJob{matrix(0), matrix(4), matrix(8), field(12), field(13), field(14), scales(next++)};
  });
  py::gil_scoped_release release;
  kernels.reconstruct(jobs.data(), static_cast<std::int64_t>(jobs.size()), threads);
}

// `fixed`: v and u (four fields each), d, n, k_in, k_out; index, tasks, five tables, their rows, dtype of ends; bits
// and scales of the four tables of ends.
std::int64_t shared_lora(const std::vector<std::int64_t>& fixed, const std::vector<std::int64_t>& rows, double scale,
                         bool transposed, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto matrix = [](const std::vector<std::int64_t>& from, std::size_t at) {
    return read_matrix([&](std::size_t i) { return from.at(at + i); });
  };
  const auto scales = [&](std::size_t at) { return address<const std::uint16_t>(fixed.at(at)); };
  const auto table = [&](std::size_t at) { return address<const void>(fixed.at(at)); };
  const Cores cores = {address<const std::int64_t>(fixed.at(12)),
                       fixed.at(13),
                       table(14),
                       table(15),
                       table(16),
                       table(17),
                       table(18),
                       {fixed.at(19), fixed.at(20), fixed.at(21), fixed.at(22), fixed.at(23)},
                       Dtype(fixed.at(24)),
                       {fixed.at(25), fixed.at(26), fixed.at(27), fixed.at(28)},
                       {scales(29), scales(30), scales(31), scales(32)}};
  const SharedLoraJob job = {matrix(rows, 0),
                             matrix(rows, 4),
                             matrix(fixed, 0),
                             matrix(fixed, 4),
                             rows.at(8),
                             fixed.at(8),
                             fixed.at(9),
                             fixed.at(10),
                             fixed.at(11),
                             cores,
                             address<const std::int64_t>(rows.at(9)),
                             rows.at(10),
                             address<const float>(rows.at(11)),
                             scale,
                             transposed};
  py::gil_scoped_release release;
  return kernels.shared_lora(job, threads);
}

void squares(const Table& block_table, const Table& job_table, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto blocks = read_blocks(block_table);
  const auto jobs = read_jobs<SquaresJob>(
      job_table, [&](auto field) { return SquaresJob{read_rows(blocks, field), address<double>(field(3))}; });
  py::gil_scoped_release release;
  kernels.squares(jobs.data(), static_cast<std::int64_t>(jobs.size()), threads);
}

// [(name, built, supported)], narrowest first.
std::vector<std::tuple<std::string, bool, bool>> list_instruction_sets() {
  std::vector<std::tuple<std::string, bool, bool>> found;
  const Isa* isas = instruction_sets();
  for (int i = 0; i < kIsaCount; ++i) found.emplace_back(isas[i].name, isas[i].kernels != nullptr, isas[i].supported);
  return found;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::enum_<Precision>(m, "Precision").value("f32", Precision::f32).value("f64", Precision::f64);
  m.def("instruction_sets", &list_instruction_sets);
  // blocks: address, rows, row stride, column stride, dtype. Every job starts with first block, blocks, columns.
  m.def("gram", &gram, py::arg("blocks"), py::arg("jobs"), py::arg("precision"), py::arg("threads"), py::arg("isa"));
  m.def("combine", &combine, py::arg("blocks"), py::arg("jobs"), py::arg("precision"), py::arg("threads"),
        py::arg("isa"));
  m.def("sketch", &sketch, py::arg("blocks"), py::arg("jobs"), py::arg("precision"), py::arg("threads"),
        py::arg("isa"));
  m.def("sparse_sketch", &sparse_sketch, py::arg("blocks"), py::arg("jobs"), py::arg("threads"), py::arg("isa"));
  m.def("power", &power, py::arg("blocks"), py::arg("jobs"), py::arg("precision"), py::arg("threads"), py::arg("isa"));
  m.def("reconstruct", &reconstruct, py::arg("jobs"), py::arg("scales"), py::arg("threads"), py::arg("isa"));
  // rows: y and x (address, strides, dtype), their number, tasks, tasks per row, shares. Gives -1 or the first row
  // whose task is not in the table.
  m.def("shared_lora", &shared_lora, py::arg("fixed"), py::arg("rows"), py::arg("scale"), py::arg("transposed"),
        py::arg("threads"), py::arg("isa"));
  m.def("squares", &squares, py::arg("blocks"), py::arg("jobs"), py::arg("threads"), py::arg("isa"));
  m.def(
      "want_huge_pages", [](std::int64_t data, std::int64_t bytes) { want_huge_pages(address<void>(data), bytes); },
      py::arg("data"), py::arg("bytes"));
  bind_small(m);
  bind_mapping(m);
  bind_tensors(m);
}
