// All kernels of one instruction set, in the namespace LORASPAN_ISA. Compiled once per set, with that set's flags: so
// nothing here may instantiate a template or inline function of the standard library or of another namespace, or the
// linker could hand the widest copy to every processor.
#include <stdlib.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifdef __linux__
#include <sys/mman.h>
#endif

// Each piece uses those before it.
// clang-format off
#include "loraspan/isa.hpp"
#include "loraspan/parallel.hpp"

#include "load.inl"
#include "simd.inl"
#include "stores.inl"
#include "products.inl"
#include "entries.inl"
#include "scratch.inl"
#include "transpose.inl"
#include "pack.inl"
#include "pairs.inl"
#include "packed.inl"
#include "packed_write.inl"
#include "tile.inl"
#include "slabs.inl"
#include "gram_rows.inl"
#include "philox.inl"
#include "sketch_tile.inl"
#include "row_products.inl"
#include "dense.inl"
#include "image.inl"
#include "image_rows.inl"
#include "image_columns.inl"
#include "reconstruct_place.inl"
#include "combine.inl"
#include "power.inl"
#include "sign_sums.inl"
#include "sketch.inl"
#include "sparse_sketch.inl"
#include "reconstruct_lone.inl"
#include "reconstruct.inl"
#include "thin_tile.inl"
#include "shared_lora_rows.inl"
#include "shared_lora_columns.inl"
#include "shared_lora.inl"
#include "squares.inl"
#include "product.inl"
#include "gram_columns.inl"
#include "gram.inl"
#include "dense_eigh.inl"
#include "dense_svd.inl"
#include "dense_root.inl"
#include "whiten.inl"
#include "joint_gram.inl"
#include "short_svd.inl"
#include "trellis.inl"
#include "range_coder.inl"
#include "coding.inl"
#include "ceilings.inl"
// clang-format on

namespace loraspan {
namespace LORASPAN_ISA {

extern const Kernels kernels;
const Kernels kernels = {&gram,    &combine, &sketch, &power,   &reconstruct, &shared_lora, &sparse_sketch, &squares,
                         &product, &eigh,    &svd,    &root,    &whiten,      &joint_gram,  &short_svd,     &pack,
                         &unpack,  &encode,  &decode, &trellis, &arithmetic,  &traffic};

}  // namespace LORASPAN_ISA
}  // namespace loraspan
