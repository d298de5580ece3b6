// The kernels for AVX512-BF16.
#include "api.h"
#include "fp8_table.h"
#include "integer_table.h"

#if defined(__x86_64__)

#define ISO_NAME avx512
#define ISO_LABEL "avx512_bf16"
#include "kernels_avx512.inc"

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
