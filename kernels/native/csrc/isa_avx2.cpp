// The kernels for AVX2 with FMA.
#include "api.h"
#include "fp8_table.h"
#include "integer_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define ISO_ATTR __attribute__((target("avx2,fma,bmi2")))
#define ISO_NAME avx2
#define ISO_LABEL "avx2"
#define ISO_W 8
#define ISO_INTEGERS 1
#define ISO_SIMD "simd_avx2.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#include "kernels.inc"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#include "kernels.inc"
#pragma GCC pop_options
#endif

namespace iso {
const Ops* avx2_ops() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? avx2::ops()
                                                                                                           : nullptr;
}
}  // namespace iso
#else
namespace iso {
const Ops* avx2_ops() { return nullptr; }
}  // namespace iso
#endif
