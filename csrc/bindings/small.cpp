// The Python face of what works on single matrices, rows and numbers. No logic.
#include "tables.hpp"

namespace loraspan::bindings {

namespace {

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

bool whiten(std::int64_t y, std::int64_t z, std::int64_t m, std::int64_t n, double limit, int threads,
            const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const WhitenJob job{address<double>(y), address<const double>(z), m, n, limit};
  py::gil_scoped_release release;
  return kernels.whiten(job, threads);
}

// sizes: members, r, l, d, k.
void joint_gram(std::int64_t near, std::int64_t far, std::int64_t g, std::int64_t out,
                const std::vector<std::int64_t>& sizes, int threads, const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  const JointGramJob job{address<const double>(near),
                         address<const double>(far),
                         address<const double>(g),
                         address<double>(out),
                         sizes.at(0),
                         sizes.at(1),
                         sizes.at(2),
                         sizes.at(3),
                         sizes.at(4)};
  py::gil_scoped_release release;
  kernels.joint_gram(job, threads);
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

}  // namespace

void bind_small(py::module_& m) {
  m.def("product", &product, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("sizes"), py::arg("threads"),
        py::arg("isa"));
  // Contiguous float64 matrices, `count` of them one after another.
  m.def("eigh", &eigh, py::arg("a"), py::arg("count"), py::arg("n"), py::arg("values"), py::arg("vectors"),
        py::arg("threads"), py::arg("isa"));
  m.def("svd", &svd, py::arg("a"), py::arg("count"), py::arg("m"), py::arg("n"), py::arg("u"), py::arg("s"),
        py::arg("v"), py::arg("threads"), py::arg("isa"));
  m.def("root", &root, py::arg("gram"), py::arg("count"), py::arg("n"), py::arg("r"), py::arg("inverse"),
        py::arg("threads"), py::arg("isa"));
  // Gives whether it was done.
  m.def("whiten", &whiten, py::arg("y"), py::arg("z"), py::arg("m"), py::arg("n"), py::arg("limit"), py::arg("threads"),
        py::arg("isa"));
  m.def("joint_gram", &joint_gram, py::arg("near"), py::arg("far"), py::arg("g"), py::arg("out"), py::arg("sizes"),
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

}  // namespace loraspan::bindings
