#include "loraspan/isa.hpp"

namespace loraspan {

namespace baseline {
extern const Kernels kernels;
}
#ifdef LORASPAN_HAS_avx2
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

const Isa* instruction_sets() {
#ifdef LORASPAN_HAS_avx2
  __builtin_cpu_init();
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  static const Isa table[kIsaCount] = {{"baseline", &baseline::kernels, true},
                                       {"avx2", &avx2::kernels, has_avx2},
                                       {"avx512", &avx512::kernels, has_avx512},
                                       {"avx512bf16", &avx512bf16::kernels, has_bf16}};
#else
  static const Isa table[kIsaCount] = {{"baseline", &baseline::kernels, true},
                                       {"avx2", nullptr, false},
                                       {"avx512", nullptr, false},
                                       {"avx512bf16", nullptr, false}};
#endif
  return table;
}

}  // namespace loraspan
