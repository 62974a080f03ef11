// The Python face of the kernels: addresses, sizes and strides in, nothing out. No logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "loraspan/isa.hpp"
#include "loraspan/memory.hpp"

namespace py = pybind11;
using namespace loraspan;

namespace {

// int64 [count, fields]: one row per block or job, the fields in the order in which the functions below read them.
using Table = py::array_t<std::int64_t, py::array::c_style>;

const Kernels& kernels_named(const std::string& name) {
  const Isa* isas = instruction_sets();
  for (int i = 0; i < kIsaCount; ++i)
    if (name == isas[i].name && isas[i].kernels && isas[i].supported) return *isas[i].kernels;
  throw py::value_error("_core: no instruction set '" + name + "' here");
}

template <typename T>
T* address(std::int64_t value) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value));
}

std::vector<Block> read_blocks(const Table& table) {
  const auto rows = table.unchecked<2>();
  std::vector<Block> blocks;
  blocks.reserve(static_cast<std::size_t>(rows.shape(0)));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i)
    blocks.push_back({address<const void>(rows(i, 0)), rows(i, 1), rows(i, 2), rows(i, 3), Dtype(rows(i, 4))});
  return blocks;
}

template <typename Job, typename Read>
std::vector<Job> read_jobs(const Table& table, const Read& read) {
  const auto rows = table.unchecked<2>();
  std::vector<Job> jobs;
  jobs.reserve(static_cast<std::size_t>(rows.shape(0)));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i)
    jobs.push_back(read([&](py::ssize_t field) { return rows(i, field); }));
  return jobs;
}

// Address, row stride, column stride, dtype; of a packed matrix codes, scales, length of its columns, dtype.
template <typename Field>
Matrix read_matrix(const Field& field) {
  const auto dtype = Dtype(field(3));
  if (dtype >= Dtype::packed8)
    return {address<void>(field(0)), 0, 0, dtype, address<const std::uint16_t>(field(1)), field(2)};
  return {address<void>(field(0)), field(1), field(2), dtype};
}

template <typename Field>
Rows read_rows(const std::vector<Block>& blocks, const Field& field) {
  return {blocks.data() + field(0), field(1), field(2)};
}

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

void reconstruct(const Table& job_table, const std::vector<double>& scales, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  std::size_t next = 0;
  const auto jobs = read_jobs<ReconstructJob>(job_table, [&](auto field) {
    const auto matrix = [&](py::ssize_t at) { return read_matrix([&](py::ssize_t i) { return field(at + i); }); };
    return ReconstructJob{matrix(0), matrix(4), matrix(8), field(12), field(13), field(14), scales.at(next++)};
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

// `a`: address, step between members, row and column stride; `b` likewise, columns lying together; `sizes`: members, m,
// n, k.
void product(const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b, std::int64_t c,
             const std::vector<std::int64_t>& sizes, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const ProductJob job = {address<const double>(a.at(0)),
                          a.at(1),
                          a.at(2),
                          a.at(3),
                          address<const double>(b.at(0)),
                          b.at(1),
                          b.at(2),
                          address<double>(c),
                          sizes.at(0),
                          sizes.at(1),
                          sizes.at(3),
                          sizes.at(2)};
  py::gil_scoped_release release;
  kernels.product(job, threads);
}

void eigh(std::int64_t a, std::int64_t count, std::int64_t n, std::int64_t values, std::int64_t vectors, int threads,
          const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const EighJob job{address<const double>(a), count, n, address<double>(values), address<double>(vectors)};
  py::gil_scoped_release release;
  kernels.eigh(job, threads);
}

void svd(std::int64_t a, std::int64_t count, std::int64_t m, std::int64_t n, std::int64_t u, std::int64_t s,
         std::int64_t v, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const SvdJob job{address<const double>(a), count, m, n, address<double>(u), address<double>(s), address<double>(v)};
  py::gil_scoped_release release;
  kernels.svd(job, threads);
}

void root(std::int64_t gram, std::int64_t count, std::int64_t n, std::int64_t r, std::int64_t inverse, int threads,
          const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const RootJob job{address<const double>(gram), count, n, address<double>(r), address<double>(inverse)};
  py::gil_scoped_release release;
  kernels.root(job, threads);
}

// x and v: address, strides, dtype; of a member, with the bytes from one member to the next. sizes: count, rows,
// columns, k. out: values, totals, w and vtv.
void short_svd(const std::vector<std::int64_t>& x, const std::vector<std::int64_t>& v,
               const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& out, int threads,
               const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const Block first = {address<const void>(x.at(0)), sizes.at(1), x.at(1), x.at(2), Dtype(x.at(3))};
  const auto place = [&](std::size_t i) { return address<double>(out.at(i)); };
  const ShortSvdJob job = {first,    sizes.at(2), sizes.at(0), x.at(4),        sizes.at(3), address<void>(v.at(0)),
                           v.at(4),  v.at(1),     v.at(2),     Dtype(v.at(3)), place(0),    place(1),
                           place(2), place(3)};
  py::gil_scoped_release release;
  kernels.short_svd(job, threads);
}

// x: address, rows, row stride, column stride, dtype.
std::int64_t pack(const std::vector<std::int64_t>& x, std::int64_t length, std::int64_t bits, std::int64_t codes,
                  std::int64_t scales, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const Block block = {address<const void>(x.at(0)), x.at(1), x.at(2), x.at(3), Dtype(x.at(4))};
  py::gil_scoped_release release;
  return kernels.pack(block, length, bits, address<std::uint8_t>(codes), address<std::uint16_t>(scales), threads);
}

void unpack(std::int64_t codes, std::int64_t scales, std::int64_t rows, std::int64_t length, std::int64_t bits,
            std::int64_t out, std::int64_t dtype, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const PackedRows x = {address<const std::uint8_t>(codes), address<const std::uint16_t>(scales), length, bits};
  py::gil_scoped_release release;
  kernels.unpack(x, rows, address<void>(out), Dtype(dtype), threads);
}

// tables: address, rows, length, bits, and the addresses of weights and tasks.
std::vector<CodedTable> read_tables(const Table& tables) {
  return read_jobs<CodedTable>(tables, [&](auto field) {
    return CodedTable{address<void>(field(0)),
                      field(1),
                      field(2),
                      field(3),
                      address<const float>(field(4)),
                      address<const std::int32_t>(field(5))};
  });
}

std::int64_t encode(const Table& tables, std::int64_t out, std::int64_t room, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto read = read_tables(tables);
  py::gil_scoped_release release;
  return kernels.encode(read.data(), static_cast<std::int64_t>(read.size()), address<std::uint8_t>(out), room);
}

bool decode(const Table& tables, std::int64_t data, std::int64_t size, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const auto read = read_tables(tables);
  py::gil_scoped_release release;
  return kernels.decode(read.data(), static_cast<std::int64_t>(read.size()), address<const std::uint8_t>(data), size);
}

void trellis(std::int64_t x, std::int64_t rows, std::int64_t length, std::int64_t out, int threads,
             const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  py::gil_scoped_release release;
  kernels.trellis(address<const float>(x), rows, length, address<std::int16_t>(out), threads);
}

double arithmetic(Arithmetic kind, std::int64_t repetitions, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  py::gil_scoped_release release;
  return kernels.arithmetic(kind, repetitions, threads);
}

void traffic(Traffic kind, std::int64_t to, std::int64_t from, std::int64_t bytes, int threads,
             const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  py::gil_scoped_release release;
  kernels.traffic(kind, address<void>(to), address<const void>(from), bytes, threads);
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
  // Contiguous float64 matrices, `count` of them one after another.
  m.def("product", &product, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("sizes"), py::arg("threads"),
        py::arg("isa"));
  m.def("eigh", &eigh, py::arg("a"), py::arg("count"), py::arg("n"), py::arg("values"), py::arg("vectors"),
        py::arg("threads"), py::arg("isa"));
  m.def("svd", &svd, py::arg("a"), py::arg("count"), py::arg("m"), py::arg("n"), py::arg("u"), py::arg("s"),
        py::arg("v"), py::arg("threads"), py::arg("isa"));
  m.def("root", &root, py::arg("gram"), py::arg("count"), py::arg("n"), py::arg("r"), py::arg("inverse"),
        py::arg("threads"), py::arg("isa"));
  m.def("short_svd", &short_svd, py::arg("x"), py::arg("v"), py::arg("sizes"), py::arg("out"), py::arg("threads"),
        py::arg("isa"));
  // Gives -1 or the first row with an entry that cannot be packed.
  m.def("pack", &pack, py::arg("x"), py::arg("length"), py::arg("bits"), py::arg("codes"), py::arg("scales"),
        py::arg("threads"), py::arg("isa"));
  m.def("unpack", &unpack, py::arg("codes"), py::arg("scales"), py::arg("rows"), py::arg("length"), py::arg("bits"),
        py::arg("out"), py::arg("dtype"), py::arg("threads"), py::arg("isa"));
  // Gives the bytes that were written.
  m.def("encode", &encode, py::arg("tables"), py::arg("out"), py::arg("room"), py::arg("isa"));
  // Gives whether the bytes are a stream of such tables.
  m.def("decode", &decode, py::arg("tables"), py::arg("data"), py::arg("size"), py::arg("isa"));
  m.def("trellis", &trellis, py::arg("x"), py::arg("rows"), py::arg("length"), py::arg("out"), py::arg("threads"),
        py::arg("isa"));
  m.def(
      "want_huge_pages", [](std::int64_t data, std::int64_t bytes) { want_huge_pages(address<void>(data), bytes); },
      py::arg("data"), py::arg("bytes"));
  // For benches: operations done by a loop of multiply-adds, and memory moved once.
  py::enum_<Arithmetic>(m, "Arithmetic")
      .value("f32", Arithmetic::f32)
      .value("f64", Arithmetic::f64)
      .value("bf16", Arithmetic::bf16);
  py::enum_<Traffic>(m, "Traffic")
      .value("read", Traffic::read)
      .value("write", Traffic::write)
      .value("stream", Traffic::stream)
      .value("copy", Traffic::copy);
  m.def("arithmetic", &arithmetic, py::arg("kind"), py::arg("repetitions"), py::arg("threads"), py::arg("isa"));
  m.def("traffic", &traffic, py::arg("kind"), py::arg("to"), py::arg("from_"), py::arg("bytes"), py::arg("threads"),
        py::arg("isa"));
}
