// The kernels for AVX512-BF16.
#include "api.h"
#include "fp8_table.h"
#include "integer_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define ISO_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,bmi2"
#define ISO_ATTR __attribute__((target(ISO_TARGET)))
#define ISO_NAME avx512
#define ISO_LABEL "avx512_bf16"
#define ISO_W 16
#define ISO_SIMD "simd_avx512.h"
#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,bmi2"))), \
    apply_to = function)
#include "kernels.inc"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,bmi2,prefer-vector-width=512")
#include "kernels.inc"
#pragma GCC pop_options
#endif

namespace iso {
const Ops* avx512_ops() {
  __builtin_cpu_init();
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return here ? avx512::ops() : nullptr;
}
}  // namespace iso
#else
namespace iso {
const Ops* avx512_ops() { return nullptr; }
}  // namespace iso
#endif
